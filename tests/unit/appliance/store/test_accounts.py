"""Accounts: roles, one-time passwords, the last administrator, and what is audited."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.core.errors import StoreError
from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.store.accounts import COMMAND_WORDS, Account, Accounts
from appliance.store.keys import AUDIT_KEY, Keys
from appliance.store.logins import Logins
from appliance.store.store import Store
from tests.support.clocks import TestClock
from tests.support.old_database import old_database

OWN = "a new phrase 7"
pytestmark = pytest.mark.usefixtures("quick_passwords")


@pytest.fixture
def clock() -> TestClock:
    return TestClock()


@pytest.fixture
def accounts(store: Store, clock: TestClock) -> Accounts:
    return Accounts(store, clock)


@pytest.fixture
def logins(store: Store, accounts: Accounts) -> Logins:
    return Logins(store, accounts)


def audited(store: Store) -> list[dict[str, object]]:
    return [json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit ORDER BY seq")]


def _added(accounts: Accounts, username: str, role: Role | str) -> Account:
    accounts.add(username, role, "t")
    return accounts.require(username)


def test_r1_no_default_account(accounts: Accounts, logins: Logins) -> None:
    assert accounts.all() == []
    assert logins.login("demo", "demo", "peer") is None


def test_r1_an_account_has_one_role_so_nobody_holds_two_of_the_three_administrators(accounts: Accounts) -> None:
    accounts.add("li", Role.SYSTEM_ADMINISTRATOR, "t")
    accounts.add("wu", Role.SECURITY_ADMINISTRATOR, "t")
    accounts.set_role("li", Role.AUDITOR, "t")
    assert accounts.require("li").role is Role.AUDITOR
    for role in ("administrator", "auditor,security_administrator", "", "root"):
        for change in (lambda role=role: accounts.set_role("li", role, "t"), lambda role=role: accounts.add("x", role, "t")):
            with pytest.raises(StoreError) as refused:
                change()
            assert refused.value.code == "account.role"
    assert accounts.find("x") is None


def test_an_existing_account_is_not_overwritten(accounts: Accounts, logins: Logins) -> None:
    password = accounts.add("Demo", Role.CLINICIAN, "t")
    with pytest.raises(StoreError) as refused:
        accounts.add("demo", Role.AUDITOR, "t")
    assert refused.value.code == "account.exists"
    assert accounts.require("demo").role is Role.CLINICIAN
    assert logins.login("demo", password, "peer")


@pytest.mark.parametrize("name", ["", " ", "a b", "x" * 65, "a\nb", "a/b", "<b>", *COMMAND_WORDS, "LIST"])
def test_what_cannot_be_a_name(accounts: Accounts, name: str) -> None:
    with pytest.raises(StoreError) as refused:
        accounts.add(name, Role.CLINICIAN, "t")
    assert refused.value.code == "account.name"
    assert accounts.all() == []


@pytest.mark.parametrize("name", ["wang", "王医生", "li.wei", "a@b-c_d"])
def test_what_can_be_a_name(accounts: Accounts, name: str) -> None:
    accounts.add(f" {name} ", Role.CLINICIAN, "t")
    assert [item.username for item in accounts.all()] == [name]


def test_a_change_of_role_takes_effect_ends_the_sessions_and_is_audited(store: Store, accounts: Accounts, logins: Logins) -> None:
    token = logins.login("wang", accounts.add("wang", Role.CLINICIAN, "t"), "peer") or ""
    accounts.set_role("WANG", Role.TECHNICIAN, "chief")
    assert accounts.require("wang").role is Role.TECHNICIAN
    assert logins.resume(token) is None
    last = audited(store)[-1]
    assert (last["actor"], last["object"]) == ("chief", "user:wang")
    assert last["detail"] | {"role": "technician", "former_role": "clinician", "changed": "role"} == last["detail"]
    count = len(audited(store))
    accounts.set_role("wang", Role.TECHNICIAN, "chief")
    assert len(audited(store)) == count


def test_a_disabled_account_is_logged_out_and_cannot_log_in(store: Store, accounts: Accounts, logins: Logins) -> None:
    password = accounts.add("wang", Role.CLINICIAN, "t")
    token = logins.login("wang", password, "peer") or ""
    accounts.set_active("wang", False, "chief")
    assert logins.resume(token) is None
    assert logins.login("wang", password, "peer") is None
    accounts.set_active("wang", True, "chief")
    assert logins.resume(token) is None
    assert logins.login("wang", password, "peer")
    assert [item["detail"]["changed"] for item in audited(store) if item["actor"] == "chief"] == ["disabled", "enabled"]  # type: ignore[index]


@pytest.mark.parametrize(
    "change",
    [
        lambda accounts, actor: accounts.set_role("chief", Role.AUDITOR, actor),
        lambda accounts, actor: accounts.set_active("chief", False, actor),
    ],
)
def test_the_last_security_administrator_stays(accounts: Accounts, change: Callable[[Accounts, Account], None]) -> None:
    chief = own_added(accounts, "chief")
    with pytest.raises(StoreError) as refused:
        change(accounts, chief)
    assert refused.value.code == "account.last_administrator"
    own_added(accounts, "deputy")
    change(accounts, chief)
    assert accounts.has_security_administrator()
    with pytest.raises(StoreError) as refused:
        accounts.set_active("deputy", False, "cli")
    assert refused.value.code == "account.last_administrator"


def own_added(accounts: Accounts, name: str) -> Account:
    accounts.add(name, Role.SECURITY_ADMINISTRATOR, "t")
    return accounts.require(name)


@pytest.mark.parametrize("demote", [False, True])
def test_two_administrators_who_remove_each_other_at_once_leave_one(store: Store, accounts: Accounts, demote: bool) -> None:
    for attempt in range(10):
        pair = [own_added(accounts, f"a{attempt}"), own_added(accounts, f"b{attempt}")]
        for item in accounts.all():
            if item not in pair and item.is_active:
                accounts.set_active(item.username, False, "t")
        barrier, codes = threading.Barrier(2), []

        def remove(actor: Account, other: Account, barrier: threading.Barrier = barrier, codes: list[str] = codes) -> None:
            barrier.wait()
            try:
                if demote:
                    accounts.set_role(other.username, Role.CLINICIAN, actor)
                else:
                    accounts.set_active(other.username, False, actor)
            except StoreError as refusal:
                codes.append(refusal.code)
            store.database.close()

        threads = [threading.Thread(target=remove, args=(pair[i], pair[1 - i])) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == ["account.not_allowed"]
        assert len([item for item in accounts.all() if item.is_active and item.role is Role.SECURITY_ADMINISTRATOR]) == 1


def test_who_may_change_what_is_checked_in_the_transaction(accounts: Accounts) -> None:
    chief = own_added(accounts, "chief")
    people = {role: _added(accounts, f"p-{role}", role) for role in Role}
    accounts.add("wang", Role.CLINICIAN, "t")
    for role, person in people.items():
        if role is Role.SECURITY_ADMINISTRATOR:
            continue
        for change in (
            lambda person=person: accounts.add("new", Role.CLINICIAN, person),
            lambda person=person: accounts.set_role("wang", Role.AUDITOR, person),
            lambda person=person: accounts.set_active("wang", False, person),
            lambda person=person: accounts.end_sessions("wang", person),
            lambda person=person: accounts.issue_one_time_password("chief", person),
        ):
            with pytest.raises(StoreError) as refused:
                change()
            assert refused.value.code == "account.not_allowed"
    for role, may in zip(Role, (False, True, True, True, False), strict=True):
        if may:
            accounts.issue_one_time_password("wang", people[role])
        else:
            with pytest.raises(StoreError):
                accounts.issue_one_time_password("wang", people[role])
    accounts.set_active("p-technician", False, chief)
    with pytest.raises(StoreError):
        accounts.issue_one_time_password("wang", people[Role.TECHNICIAN])


@pytest.mark.parametrize(
    "change",
    [
        lambda accounts: accounts.issue_one_time_password("none", "t"), lambda accounts: accounts.set_role("none", Role.AUDITOR, "t"),
        lambda accounts: accounts.set_active("none", False, "t"), lambda accounts: accounts.end_sessions("none", "t"),
        lambda accounts: accounts.require("none"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_there(accounts: Accounts, change: Callable[[Accounts], object]) -> None:
    with pytest.raises(StoreError) as refused:
        change(accounts)
    assert refused.value.code == "account.unknown"


def test_one_time_password_must_be_changed_and_ends_every_session(accounts: Accounts, logins: Logins) -> None:
    password = accounts.add("Demo", Role.CLINICIAN, "t")
    token = logins.login("demo", password, "peer") or ""
    session = logins.resume(token)
    assert session
    assert session.account.must_change
    accounts.change_password(session.account, password, OWN)
    assert logins.resume(token) is None
    assert logins.login("demo", password, "peer") is None
    changed = logins.resume(logins.login("demo", OWN, "peer") or "")
    assert changed
    assert not changed.account.must_change
    fresh = accounts.issue_one_time_password("demo", "t")
    assert logins.login("demo", OWN, "peer") is None
    assert logins.login("demo", fresh, "peer")


def test_a_one_time_password_expires_and_a_password_of_ones_own_does_not(
    store: Store, accounts: Accounts, logins: Logins, clock: TestClock
) -> None:
    password = accounts.add("demo", Role.CLINICIAN, "t")
    clock.wait(store.settings.one_time_password_s - 1)
    assert logins.login("demo", password, "peer")
    clock.wait(2)
    assert logins.login("demo", password, "peer") is None
    fresh = accounts.issue_one_time_password("demo", "t")
    accounts.change_password(accounts.require("demo"), fresh, OWN)
    clock.wait(10 * 365 * 86400)
    assert logins.login("demo", OWN, "peer")


def test_a_one_time_password_made_while_the_clock_was_a_year_ahead_does_not_last_a_year(
    store: Store, accounts: Accounts, logins: Logins, clock: TestClock
) -> None:
    clock.set_by(365 * 86400)
    password = accounts.add("demo", Role.CLINICIAN, "t")
    clock.set_by(-365 * 86400)
    assert logins.login("demo", password, "peer")
    clock.wait(store.settings.one_time_password_s + 1)
    assert logins.login("demo", password, "peer") is None
    clock.set_by(365 * 86400)
    password = accounts.add("other", Role.CLINICIAN, "t")
    clock.restart()
    clock.set_by(-365 * 86400)
    assert logins.login("other", password, "peer") is None


def test_a_password_changed_by_somebody_else_meanwhile_is_not_overwritten(
    accounts: Accounts, logins: Logins, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = accounts.add("demo", Role.CLINICIAN, "t")
    account, issued = accounts.require("demo"), []

    def weakness(*_: object) -> str:
        issued.append(accounts.issue_one_time_password("demo", "chief"))
        return ""

    monkeypatch.setattr("appliance.store.passwords.weakness", weakness)
    with pytest.raises(StoreError) as refused:
        accounts.change_password(account, password, OWN)
    assert refused.value.code == "account.wrong_password"
    assert logins.login("demo", issued[0], "peer")


def test_no_token_or_password_is_stored_plain(accounts: Accounts, logins: Logins, store: Store) -> None:
    password = accounts.add("demo", Role.CLINICIAN, "t")
    token = logins.login("demo", password, "peer") or ""
    dump = "\n".join(str(tuple(row)) for table in ("users", "sessions", "audit") for row in store.database.query(f"SELECT * FROM {table}"))  # noqa: S608
    assert password not in dump
    assert token not in dump


def old_box(path: Path) -> None:
    """The database of a box before migration 11, with accounts of all former roles and an open session."""
    connection = old_database(path, 10)
    for number, role in enumerate(("clinician", "technician", "auditor", "administrator"), 1):
        values = (number, f"p-{role}", "hash", role, int(role == "auditor"), "2026-01-01T00:00:00.000+00:00", 4e9 if number == 1 else 0)
        connection.execute("INSERT INTO users VALUES (?, ?, ?, ?, ?, 3, ?, ?)", (*values[:5], values[6], values[5]))
    connection.execute("INSERT INTO sessions VALUES ('digest', 4, 4e9, 4e9)")
    connection.commit()
    connection.close()


def test_an_existing_box_is_migrated_nobody_is_locked_out_and_the_change_is_audited(settings: Settings) -> None:
    settings.data_dir.mkdir(parents=True)
    Keys(settings.data_dir).load(AUDIT_KEY, lambda: True)
    old_box(settings.data_dir / "box.sqlite3")
    store = Store(settings)
    accounts = Accounts(store)
    roles = {item.username: item.role for item in accounts.all()}
    assert roles == {
        "p-clinician": Role.CLINICIAN,
        "p-technician": Role.TECHNICIAN,
        "p-auditor": Role.AUDITOR,
        "p-administrator": Role.CLINICIAN,
    }
    assert all(item.is_active for item in accounts.all())
    assert not accounts.has_security_administrator()
    assert Logins(store, accounts).sessions() == []
    auditor = store.database.one("SELECT * FROM users WHERE username = 'p-auditor'")
    assert auditor
    assert 0 <= accounts.clock.age_s(auditor["password_set_at"]) < 600  # the one-time password counts from the migration
    Accounts(store)
    (entry,) = (item for item in audited(store) if item["actor"] == "migration")
    assert entry["object"] == "user:p-administrator"
    assert entry["detail"] | {"former_role": "administrator", "role": "clinician"} == entry["detail"]
    store.close()
