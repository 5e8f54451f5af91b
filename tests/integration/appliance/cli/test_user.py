"""``appliance user``: the accounts of the box on its command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from appliance.cli.main import main
from appliance.core.settings import Settings
from appliance.store.accounts import Accounts
from appliance.store.api_tokens import ApiTokens
from appliance.store.logins import Logins
from appliance.store.store import Store

pytestmark = pytest.mark.usefixtures("quick_passwords")


class Console:
    """The command line of one box."""

    def __init__(self, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._data_dir, self._capsys = data_dir, capsys
        self.error = ""

    def run(self, *words: str, exit_code: int = 0) -> str:
        """Run ``appliance user`` with these words; returns what it printed."""
        self._capsys.readouterr()
        assert main(["user", *words, "--data-dir", str(self._data_dir)]) == exit_code
        printed = self._capsys.readouterr()
        self.error = printed.err
        return printed.out


@pytest.fixture
def box(store: Store) -> Store:
    return store


@pytest.fixture
def console(box: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("LC_ALL", "C")
    return Console(box.settings.data_dir, capsys)


def password_in(text: str) -> str:
    return re.findall(r": (\S+)$", text, re.MULTILINE)[0]


def changes(store: Store) -> list[dict[str, object]]:
    entries = (json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit ORDER BY seq"))
    return [entry["detail"] | {"actor": entry["actor"], "object": entry["object"]} for entry in entries if entry["event"] == "110113"]


def test_the_old_form_changes_the_role_of_an_existing_account_as_the_audit_says(console: Console, box: Store) -> None:
    console.run("wang", "--role", "clinician")
    assert "deprecated" in console.error
    password = password_in(console.run("wang", "--role", "technician"))
    accounts = Accounts(box)
    assert accounts.require("wang").role == "technician"
    assert [item["role"] for item in changes(box) if "role" in item] == ["clinician", "technician"]
    assert Logins(box, accounts).login("wang", password, "peer")
    console.run("wang")
    assert accounts.require("wang").role == "technician"


def test_add_list_role_disable_enable_password(console: Console, box: Store) -> None:
    first = password_in(console.run("add", "wang", "--role", "security_administrator"))
    console.run("add", "li")
    console.run("role", "li", "auditor")
    console.run("disable", "li")
    listed = console.run("list")
    assert re.search(r"^li +auditor +disabled +-$", listed, re.MULTILINE)
    assert re.search(r"^wang +security_administrator +one-time password +-$", listed, re.MULTILINE)
    console.run("enable", "li")
    second = password_in(console.run("password", "wang"))
    logins = Logins(box, Accounts(box))
    assert logins.login("wang", first, "peer") is None
    assert logins.login("wang", second, "peer")
    assert {item["actor"] for item in changes(box)} == {"cli"}


def test_sessions_are_listed_and_ended(console: Console, box: Store) -> None:
    password = password_in(console.run("add", "wang"))
    logins = Logins(box, Accounts(box))
    token = logins.login("wang", password, "10.1.2.3") or ""
    console.run("add", "li")
    assert "10.1.2.3" in console.run("sessions")
    assert "10.1.2.3" in console.run("sessions", "wang")
    assert "10.1.2.3" not in console.run("sessions", "li")
    assert console.run("sessions", "wang", "--end") == "1 sessions ended\n"
    assert logins.resume(token) is None


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["add"], 2, "number of names"),
        (["add", "a", "b"], 2, "number of names"),
        (["list", "a"], 2, "number of names"),
        (["role", "wang"], 2, "number of names"),
        (["wang", "li"], 2, "number of names"),
        (["sessions", "--end"], 2, "number of names"),
        (["add", "wang"], 1, "already an account"),
        (["add", "a b"], 1, "cannot be a user name"),
        (["role", "wang", "administrator"], 1, "no such role"),
        (["role", "wang", "clinician"], 1, "last security administrator"),
        (["disable", "wang"], 1, "last security administrator"),
        (["disable", "nobody"], 1, "no account"),
        (["password", "nobody"], 1, "no account"),
        (["sessions", "nobody"], 1, "no account"),
    ],
)
def test_wrong_uses_change_nothing(console: Console, box: Store, words: list[str], exit_code: int, said: str) -> None:
    console.run("add", "wang", "--role", "security_administrator")
    before = changes(box)
    console.run(*words, exit_code=exit_code)
    assert said in console.error
    assert changes(box) == before


def test_a_box_is_made_by_add_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["list"], ["disable", "x"], ["sessions"]):
        (tmp_path / "none").mkdir(exist_ok=True)
        assert main(["user", *words, "--data-dir", str(tmp_path / "none")]) == 2
    assert list((tmp_path / "none").iterdir()) == []
    assert main(["user", "add", "wang", "--role", "security_administrator", "--data-dir", str(tmp_path / "none")]) == 0
    capsys.readouterr()
    store = Store(Settings.load(tmp_path / "none"))
    assert Accounts(store).has_security_administrator()
    store.close()


def test_tokens_are_made_listed_and_revoked(console: Console, box: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    console.run("add", "wang")
    printed = console.run("token", "add", "wang", "--scope", "upload", "--scope", "results", "--days", "7")
    token = password_in(printed)
    tokens = ApiTokens(box, Accounts(box))
    assert tokens.use(token, "192.0.2.7")
    assert "SEVERAL" not in console.run("token", "list")
    assert tokens.use(token, "192.0.2.8")
    listed = console.run("token", "list", "wang").splitlines()[1]
    assert listed.split()[:5] == ["1", "wang", "results,", "upload", "7"]
    assert re.search(r"SEVERAL: .*192\.0\.2\.7", listed)
    assert token not in listed
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert "多个：" in console.run("token", "list")
    assert "已吊销" in console.run("token", "revoke", "1")
    assert tokens.use(token, "192.0.2.7") is None
    assert [change["changed"] for change in changes(box) if "token" in change] == ["token made", "token revoked"]


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["add"], 2),
        (["revoke"], 2),
        (["frobnicate", "wang"], 2),
        (["add", "wang"], 1),
        (["add", "nobody", "--scope", "upload"], 1),
        (["add", "chief", "--scope", "upload"], 1),
        (["add", "wang", "--scope", "upload", "--days", "0"], 1),
        (["add", "wang", "--scope", "upload", "--days", "366"], 1),
        (["revoke", "1"], 1),
        (["revoke", "x"], 1),
        (["revoke", "9" * 30], 1),
        (["list", "nobody"], 1),
    ],
)
def test_wrong_uses_of_tokens_change_nothing(console: Console, box: Store, words: list[str], exit_code: int) -> None:
    console.run("add", "wang")
    console.run("add", "chief", "--role", "security_administrator")
    before = len(changes(box))
    console.run("token", *words, exit_code=exit_code)
    assert "hint" in console.error
    assert len(changes(box)) == before
