"""The wipe of a box by two persons (R8), killed at any point."""

from __future__ import annotations

import base64
import io
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.cli.main import EXIT_ERROR, EXIT_OK, EXIT_USAGE, main
from appliance.core.errors import ApplianceError, StoreError
from appliance.core.process import Lock
from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.store import passwords
from appliance.store.accounts import Accounts
from appliance.store.logins import Logins
from appliance.store.store import DATABASE_NAME, WIPE_MARK, Store, open_box
from appliance.store.wipe import ROLES, Secrets, approve, begin_wipe, finish_wipe, stop_programs
from tests.support.killed_work import kill_at
from tests.support.web_box import PASSWORD, QUICK_HASHER, Box, own_password

CANARY = "WANG^XIAOMING"
NAMES = {Role.SYSTEM_ADMINISTRATOR: "sysadmin", Role.SECURITY_ADMINISTRATOR: "secadmin", Role.AUDITOR: "auditor"}


@pytest.fixture(autouse=True)
def quick_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real hash that costs less."""
    monkeypatch.setattr(passwords, "_HASHER", QUICK_HASHER)


def make_box(data_dir: Path) -> tuple[Settings, dict[Role, Secrets]]:
    """A box with a file and one person of each role, and what each of them types: the code is a recovery code."""
    settings = Settings.parse({"data_dir": data_dir, "disk_reserve_bytes": 0})
    (data_dir / "models" / "x").mkdir(parents=True)
    (data_dir / "models" / "x" / "link").symlink_to(data_dir.parent)
    (data_dir / "box.toml").write_text("disk_reserve_bytes = 0\n")
    secrets = {}
    with closing(Store(settings)) as store:
        store.content.write(CANARY.encode(), lambda: "ab" * 32)
        box = Box(settings, "", store)
        for role, name in NAMES.items():
            own_password(box.accounts, name, role)
            secrets[role] = Secrets(name, PASSWORD, box.second_factor(name))
    return settings, secrets


def left(data_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.is_file())


def begin(settings: Settings, secrets: dict[Role, Secrets], audit_file: Path) -> None:
    with closing(open_box(settings.data_dir)) as store:
        first, second = (approve(store, role, secrets[role]) for role in ROLES)
        begin_wipe(store, (first, second), audit_file)


def finish(settings: Settings) -> int:
    with stop_programs(settings):
        return finish_wipe(settings, lambda _done, _of: None)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Secrets]]:
    """What the persons type at the command, when it asks."""
    people: list[Secrets] = []

    class Typed(io.StringIO):
        def readline(self, *_: object) -> str:
            if not self.getvalue():
                self.write("".join(f"{item.username}\n{item.password}\n{item.code}\n" for item in people))
                self.seek(0)
            return super().readline()

    monkeypatch.setattr("sys.stdin", Typed())
    yield people


def test_r08_two_persons_wipe_a_box_and_its_audit_stays(tmp_path: Path, typed: list[Secrets], capsys: pytest.CaptureFixture[str]) -> None:
    settings, secrets = make_box(tmp_path / "box")
    typed += [secrets[role] for role in ROLES]
    assert main(["wipe", "--data-dir", str(settings.data_dir), "--audit", str(tmp_path / "audit.xml")]) == EXIT_OK
    printed = capsys.readouterr()
    assert "0 studies, 0 images and 3 accounts will be destroyed" in printed.err
    assert "escrow copy" in printed.out
    assert left(settings.data_dir) == ["box.toml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.xml", "box"]  # what a link leads to is not followed
    last = ET.fromstring((tmp_path / "audit.xml").read_text().splitlines()[-1])  # noqa: S314 - of this test's own box
    said = [base64.b64decode(item.attrib["value"]).decode() for item in last.iter("ParticipantObjectDetail")]
    assert any(all(word in text for word in ("sysadmin", "secadmin", "wipe")) for text in said)
    with closing(Store(settings)) as store:  # it can be set up anew
        assert Accounts(store).is_empty()


@pytest.mark.parametrize("fault", ["one person twice", "roles exchanged", "auditor", "wrong password", "wrong code", "no code", "unknown"])
def test_r08_without_two_persons_of_the_two_roles_nothing_is_deleted(tmp_path: Path, typed: list[Secrets], fault: str) -> None:
    settings, secrets = make_box(tmp_path / "box")
    system, security = (secrets[role] for role in ROLES)
    typed += {
        "one person twice": [system, system],
        "roles exchanged": [security, system],
        "auditor": [system, secrets[Role.AUDITOR]],
        "wrong password": [system, Secrets(security.username, "not this one", security.code)],
        "wrong code": [system, Secrets(security.username, PASSWORD, "000000")],
        "no code": [Secrets(system.username, PASSWORD, ""), security],
        "unknown": [system, Secrets("nobody", PASSWORD, security.code)],
    }[fault]
    before = left(settings.data_dir)
    assert main(["wipe", "--data-dir", str(settings.data_dir), "--audit", str(tmp_path / "audit.xml")]) == EXIT_ERROR
    assert [name for name in left(settings.data_dir) if not name.startswith("run/")] == [
        name for name in before if not name.startswith("run/")
    ]
    assert not (tmp_path / "audit.xml").exists()
    with closing(open_box(settings.data_dir)) as store:
        assert store.content.read("ab" * 32) == CANARY.encode()
        assert Logins(store, Accounts(store)).sessions() == []


def test_r08_a_one_time_password_approves_no_wipe(tmp_path: Path) -> None:
    settings, secrets = make_box(tmp_path / "box")
    with closing(open_box(settings.data_dir)) as store:
        password = Accounts(store).issue_one_time_password("secadmin", "test")
        with pytest.raises(StoreError, match=r"wipe\.not_approved"):
            approve(store, Role.SECURITY_ADMINISTRATOR, Secrets("secadmin", password, secrets[Role.SECURITY_ADMINISTRATOR].code))


def test_r08_a_box_that_runs_is_not_wiped(tmp_path: Path, typed: list[Secrets]) -> None:
    settings, _ = make_box(tmp_path / "box")
    lock = Lock(settings.data_dir, "worker")
    try:
        with pytest.raises(ApplianceError, match=r"box\.busy"):
            stop_programs(settings)
        assert main(["wipe", "--data-dir", str(settings.data_dir), "--audit", str(tmp_path / "audit.xml")]) == EXIT_USAGE
    finally:
        lock.release()
    stop_programs(settings).close()


@pytest.mark.parametrize("audit_file", ["", "box/audit.xml", "there.xml"])
def test_r08_without_a_new_file_for_the_audit_nobody_is_asked(tmp_path: Path, typed: list[Secrets], audit_file: str) -> None:
    settings, _ = make_box(tmp_path / "box")
    (tmp_path / "there.xml").write_text("of another box")
    options = ["--audit", str(tmp_path / audit_file)] if audit_file else []
    assert main(["wipe", "--data-dir", str(settings.data_dir), *options]) == EXIT_USAGE
    assert (tmp_path / "there.xml").read_text() == "of another box"
    assert (settings.data_dir / DATABASE_NAME).exists()


@pytest.mark.parametrize("is_every_one", [False, pytest.param(True, marks=pytest.mark.long)], ids=["some", "every"])
def test_r08_a_wipe_killed_at_any_operation_leaves_a_closed_box_and_goes_on(tmp_path: Path, is_every_one: bool) -> None:
    """Some: 1, 2, 3, 5, 8 and so on, since the keys are destroyed first."""
    begun, secrets = make_box(tmp_path / "begun")
    begin(begun, secrets, tmp_path / "audit.xml")
    is_killed, operation, step = True, 0, 1
    while is_killed:
        operation, step = operation + (1 if is_every_one else step), operation
        settings = Settings.parse({"data_dir": tmp_path / "box"})
        shutil.copytree(begun.data_dir, settings.data_dir, symlinks=True)
        is_killed = kill_at(operation, lambda settings=settings: finish(settings))  # type: ignore[misc]
        if (settings.data_dir / WIPE_MARK).exists():
            for opened in (lambda settings=settings: Store(settings), lambda settings=settings: open_box(settings.data_dir)):
                with pytest.raises(StoreError, match=r"box\.wiping"):
                    opened()  # type: ignore[no-untyped-call]
            assert main(["wipe", "--data-dir", str(settings.data_dir)]) == EXIT_OK  # nobody is asked again
        assert left(settings.data_dir) == ["box.toml"]
        shutil.rmtree(settings.data_dir)
    assert operation > 10


def test_r08_after_the_first_key_nothing_can_be_read_any_more(tmp_path: Path) -> None:
    settings, secrets = make_box(tmp_path / "box")
    begin(settings, secrets, tmp_path / "audit.xml")

    def stop(_done: int, _of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), stop_programs(settings):
        finish_wipe(settings, stop)
    (settings.data_dir / WIPE_MARK).unlink()
    with pytest.raises(StoreError, match=r"key\.missing"):
        Store(settings)
