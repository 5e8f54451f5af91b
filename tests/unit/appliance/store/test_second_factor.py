"""The second factor: codes that work once, recovery codes, secrets that are not readable on the disk."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing

import pyotp
import pytest

from appliance.core.errors import StoreError
from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.store import passwords
from appliance.store.accounts import Accounts
from appliance.store.keys import ACCOUNTS_KEY
from appliance.store.logins import Logins, Session
from appliance.store.second_factor import RECOVERY_CODES, SecondFactors
from appliance.store.store import Store
from model_sync.login_throttle import MAX_FAILURES
from tests.support.clocks import TestClock
from tests.support.old_database import old_database
from tests.support.paths import ROOT

OWN = "a new phrase 7"
pytestmark = pytest.mark.usefixtures("quick_passwords")


class Desk:
    """A technician ``zhao`` with a second factor, the phone, and a clock."""

    def __init__(self, store: Store) -> None:
        self.store, self.clock = store, TestClock()
        self.accounts = Accounts(store, self.clock)
        self.logins = Logins(store, self.accounts)
        self.factors = self.logins.second_factors
        one_time = self.accounts.add("zhao", Role.TECHNICIAN, "t")
        self.accounts.change_password(self.accounts.require("zhao"), one_time, OWN)
        first = open_session(self.logins, OWN)
        self.secret = self.factors.begin(first.account, first.id)
        self.recovery = self.factors.confirm(first.account, first.id, self.code())
        self.account = self.accounts.require("zhao")

    def code(self, steps: int = 0) -> str:
        """What the phone shows, some steps of 30 s earlier or later."""
        return pyotp.TOTP(self.secret).at(int(self.clock.wall + 30 * steps))

    def log_in(self, peer: str = "10.0.0.1") -> tuple[Session, str]:
        token = self.logins.login("zhao", OWN, peer) or ""
        session = self.logins.resume(token)
        assert session
        assert session.needs_code
        return session, token


def open_session(logins: Logins, password: str, peer: str = "10.0.0.1") -> Session:
    """A new session of ``zhao``."""
    session = logins.resume(logins.login("zhao", password, peer) or "")
    assert session
    return session


@pytest.fixture
def desk(store: Store) -> Desk:
    return Desk(store)


def test_r4_required_for_all_but_clinicians_and_for_them_by_a_setting(store: Store) -> None:
    accounts = Accounts(store)
    people = {role: accounts.require(f"p-{role}") for role in Role if accounts.add(f"p-{role}", role, "t")}
    assert [SecondFactors(store, accounts).is_required(people[role]) for role in Role] == [False, True, True, True, True]
    store.settings = store.settings.model_copy(update={"second_factor_for_clinicians": True})
    assert SecondFactors(store, accounts).is_required(people[Role.CLINICIAN])


def test_r4_the_password_alone_opens_nothing(desk: Desk) -> None:
    session, token = desk.log_in()
    desk.clock.wait(30)
    assert not desk.logins.complete(session, token, "000000")
    assert desk.logins.complete(session, token, desk.code())
    resumed = desk.logins.resume(token)
    assert resumed
    assert not resumed.needs_code
    assert not desk.factors.is_required(resumed.account)


@pytest.mark.parametrize(("steps", "fits"), [(-2, False), (-1, True), (0, True), (1, True), (2, False)])
def test_r4_a_drift_of_one_step_is_allowed(desk: Desk, steps: int, fits: bool) -> None:
    desk.clock.wait(600)
    assert bool(desk.factors.take(desk.account, desk.code(steps))) is fits


def test_r4_a_code_works_once_in_all_sessions_and_processes(desk: Desk) -> None:
    desk.clock.wait(60)
    code = desk.code()
    first, second = desk.log_in(), desk.log_in("10.0.0.2")
    assert desk.logins.complete(*first, code)
    assert not desk.logins.complete(*second, code)
    assert SecondFactors(desk.store, Accounts(desk.store, desk.clock)).take(desk.account, code) == ""
    desk.clock.wait(30)
    assert desk.logins.complete(*second, desk.code())


def test_r4_of_threads_that_use_a_code_at_once_one_gets_in(desk: Desk) -> None:
    desk.clock.wait(60)
    code, results, barrier = desk.code(), [], threading.Barrier(8)

    def use() -> None:
        factors = SecondFactors(desk.store, Accounts(desk.store, desk.clock))
        barrier.wait()
        results.append(factors.take(desk.account, code))
        desk.store.database.close()

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [""] * 7 + ["totp"]


def test_r4_another_process_does_not_accept_a_used_code(store: Store) -> None:
    accounts = Accounts(store)
    session = open_session(Logins(store, accounts), accounts.add("zhao", Role.TECHNICIAN, "t"))
    factors = SecondFactors(store, accounts)
    totp = pyotp.TOTP(factors.begin(session.account, session.id))
    code = totp.now()
    factors.confirm(session.account, session.id, code)
    script = (
        "import sys; from pathlib import Path; from appliance.store.store import open_box; from appliance.store.accounts import Accounts;"
        "from appliance.store.second_factor import SecondFactors; store = open_box(Path(sys.argv[1])); accounts = Accounts(store);"
        "factors = SecondFactors(store, accounts); account = accounts.require('zhao');"
        "first = factors.take(account, sys.argv[2]);"
        "print(repr(first), repr(factors.take(account, sys.argv[3])), repr(factors.take(account, sys.argv[3])))"
    )
    later = totp.at(int(accounts.clock.wall_s()) + 30)
    command = [sys.executable, "-c", script, str(store.settings.data_dir), code, later]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split() == ["''", "'totp'", "''"]


def test_r4_codes_used_while_the_clock_was_a_year_ahead_lock_nobody_out_and_are_not_accepted_twice(desk: Desk) -> None:
    desk.clock.wait(60)
    before = desk.code()
    assert desk.factors.take(desk.account, before) == "totp"
    desk.clock.set_by(365 * 86400)
    assert desk.factors.take(desk.account, desk.code()) == "totp"
    desk.clock.set_by(-365 * 86400)
    assert desk.factors.take(desk.account, before) == ""
    desk.clock.wait(30)
    assert desk.factors.take(desk.account, desk.code()) == "totp"


@pytest.mark.parametrize("code", ["", "1", "12345a", "１２３４５６", "0" * 64, "\x00", "-00001", "123456 OR 1=1"])
def test_r4_bad_codes_are_wrong_codes(desk: Desk, code: str) -> None:
    assert desk.factors.take(desk.account, code) == ""


def test_r4_a_code_may_be_typed_with_a_blank(desk: Desk) -> None:
    desk.clock.wait(60)
    code = desk.code()
    assert desk.factors.take(desk.account, f" {code[:3]} {code[3:]} ") == "totp"


def test_r4_recovery_codes_work_once_each_however_they_are_typed(desk: Desk) -> None:
    assert len(set(desk.recovery)) == RECOVERY_CODES
    assert desk.factors.take(desk.account, desk.recovery[0].upper().replace("-", " ")) == "recovery"
    assert desk.factors.take(desk.account, desk.recovery[0]) == ""
    assert desk.factors.recovery_codes_left(desk.account) == RECOVERY_CODES - 1


def test_r4_wrong_codes_lock_like_wrong_passwords_and_the_right_password_does_not_reset_them(desk: Desk) -> None:
    desk.clock.wait(60)
    for _ in range(MAX_FAILURES):
        session, token = desk.logins.resume(desk.logins.login("zhao", OWN, "10.0.0.1") or ""), ""
        if session:
            assert not desk.logins.complete(session, token, "000000")
    assert desk.logins.login("zhao", OWN, "10.0.0.1") is None
    session, token = desk.log_in("10.0.0.2")
    assert desk.logins.complete(session, token, desk.code())


def test_r4_a_login_without_its_code_ends_after_five_minutes(desk: Desk) -> None:
    _, token = desk.log_in()
    desk.clock.wait(301)
    assert desk.logins.resume(token) is None


def test_r4_secrets_and_codes_are_not_readable_on_the_disk(desk: Desk) -> None:
    tables = ("users", "used_codes", "recovery_codes", "sessions", "audit")
    dump = "\n".join(str(tuple(row)) for table in tables for row in desk.store.database.query(f"SELECT * FROM {table}"))  # noqa: S608
    assert desk.secret not in dump
    assert not any(code in dump for code in desk.recovery)
    files = b"".join(path.read_bytes() for path in desk.store.settings.data_dir.rglob("*") if path.is_file())
    assert desk.secret.encode() not in files


def test_r4_a_secret_of_another_account_does_not_decrypt(desk: Desk) -> None:
    desk.accounts.add("other", Role.TECHNICIAN, "t")
    with desk.store.database.transaction() as tx:
        tx.execute("UPDATE users SET totp_secret = (SELECT totp_secret FROM users WHERE username = 'zhao') WHERE username = 'other'")
    desk.clock.wait(60)
    assert desk.factors.take(desk.accounts.require("other"), desk.code()) == ""


def test_r4_a_lost_key_is_not_made_anew_and_leaves_the_recovery_codes(desk: Desk) -> None:
    key = desk.store.settings.data_dir / "keys" / ACCOUNTS_KEY
    assert key.stat().st_mode & 0o777 == 0o600
    one_time = desk.accounts.add("li", Role.TECHNICIAN, "t")
    other = desk.logins.resume(desk.logins.login("li", one_time, "10.0.0.9") or "")
    assert other
    key.unlink()
    desk.clock.wait(60)
    assert desk.factors.take(desk.account, desk.code()) == ""
    assert desk.factors.take(desk.account, desk.recovery[0]) == "recovery"
    assert not key.exists()
    with pytest.raises(StoreError, match=r"key\.missing"):  # the old secret of zhao needs the lost key
        desk.factors.begin(other.account, other.id)
    desk.factors.remove("zhao", "cli")
    assert desk.factors.begin(other.account, other.id)
    assert key.exists()


def test_r4_a_lost_phone_the_second_factor_is_removed_which_is_audited(desk: Desk) -> None:
    _, token = desk.log_in()
    desk.factors.remove("zhao", "chief")
    assert desk.logins.resume(token) is None
    assert desk.factors.is_required(desk.accounts.require("zhao"))
    assert desk.store.database.number("SELECT count(*) FROM recovery_codes") == 0
    last = json.loads(desk.store.database.query("SELECT entry FROM audit ORDER BY seq DESC LIMIT 1")[0]["entry"])
    assert (last["actor"], last["object"], last["detail"]["changed"]) == ("chief", "user:zhao", "second factor removed")
    with pytest.raises(StoreError) as refused:
        desk.factors.remove("zhao", desk.account)
    assert refused.value.code == "account.not_allowed"


def test_r4_a_new_second_factor_ends_the_sessions_that_never_needed_its_code(store: Store) -> None:
    accounts = Accounts(store)
    one_time = accounts.add("zhao", Role.TECHNICIAN, "t")
    accounts.change_password(accounts.require("zhao"), one_time, OWN)
    logins = Logins(store, accounts)
    guest, own = (logins.login("zhao", OWN, peer) or "" for peer in ("10.0.0.66", "10.0.0.1"))
    session = logins.resume(own)
    assert session
    assert logins.resume(guest)
    totp = pyotp.TOTP(logins.second_factors.begin(session.account, session.id))
    with pytest.raises(StoreError):
        logins.second_factors.confirm(session.account, session.id, "000000")
    assert logins.resume(guest)
    logins.second_factors.confirm(session.account, session.id, totp.now())
    assert logins.resume(guest) is None
    assert logins.resume(own)


def test_r4_a_login_that_is_under_way_when_the_second_factor_is_set_up_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = Accounts(store)
    one_time = accounts.add("zhao", Role.TECHNICIAN, "t")
    accounts.change_password(accounts.require("zhao"), one_time, OWN)
    logins = Logins(store, accounts)
    verify, session = passwords.verify_password, open_session(logins, OWN)

    def slowly(*given: str) -> bool:
        secret = logins.second_factors.begin(session.account, session.id)
        logins.second_factors.confirm(session.account, session.id, pyotp.TOTP(secret).now())
        return verify(*given)

    monkeypatch.setattr(passwords, "verify_password", slowly)
    assert logins.login("zhao", OWN, "10.0.0.66") is None
    assert logins.begin_again(session) is None


@pytest.mark.parametrize(
    "reset",
    [
        lambda desk: desk.accounts.change_password(desk.account, OWN, "another phrase 8"),
        lambda desk: desk.accounts.issue_one_time_password("zhao", "t"), lambda desk: desk.factors.remove("zhao", "t"),
        lambda desk: desk.accounts.set_role("zhao", Role.AUDITOR, "t"), lambda desk: desk.accounts.end_sessions("zhao", "t"),
        lambda desk: desk.accounts.set_active("zhao", False, "t"),
    ],
    ids=["password", "one-time password", "second factor", "role", "sessions", "disabled"],
)  # fmt: skip
def test_r4_a_secret_that_was_shown_and_not_confirmed_is_gone_after_every_reset(desk: Desk, reset: Callable[[Desk], object]) -> None:
    desk.factors.remove("zhao", "t")
    thief = open_session(desk.logins, OWN, "10.0.0.66")
    seen = desk.factors.begin(thief.account, thief.id)
    reset(desk)
    for attempt in (lambda: desk.factors.begin(thief.account, thief.id), lambda: desk.factors.confirm(thief.account, thief.id, "000000")):
        with pytest.raises(StoreError, match=r"store\.missing"):
            attempt()
    assert desk.store.database.number("SELECT count(*) FROM sessions") == 0
    assert desk.store.database.number("SELECT count(*) FROM users WHERE totp_secret IS NOT NULL") == 0
    if seen_in := desk.logins.resume(desk.logins.login("zhao", OWN, "10.0.0.1") or ""):
        assert desk.factors.begin(seen_in.account, seen_in.id) != seen


def test_r4_the_secret_that_one_session_shows_is_unknown_to_the_others(desk: Desk) -> None:
    desk.factors.remove("zhao", "t")
    thief, owner = open_session(desk.logins, OWN, "10.0.0.66"), open_session(desk.logins, OWN)
    seen = desk.factors.begin(thief.account, thief.id)
    own = desk.factors.begin(owner.account, owner.id)
    assert own == desk.factors.begin(owner.account, owner.id) != seen
    with pytest.raises(StoreError, match=r"account\.wrong_code"):
        desk.factors.confirm(owner.account, owner.id, pyotp.TOTP(seen).at(int(desk.clock.wall)))
    desk.factors.confirm(owner.account, owner.id, pyotp.TOTP(own).at(int(desk.clock.wall)))
    with pytest.raises(StoreError, match=r"store\.missing"):
        desk.factors.begin(thief.account, thief.id)


def test_r4_a_session_that_ends_while_its_code_is_checked_sets_up_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.factors.remove("zhao", "t")
    thief = open_session(desk.logins, OWN, "10.0.0.66")
    code = pyotp.TOTP(desk.factors.begin(thief.account, thief.id)).at(int(desk.clock.wall))
    step = desk.factors._step

    def slowly(secret: str, typed: str) -> int | None:
        desk.accounts.end_sessions("zhao", "t")
        return step(secret, typed)

    monkeypatch.setattr(desk.factors, "_step", slowly)
    with pytest.raises(StoreError, match=r"store\.missing"):
        desk.factors.confirm(thief.account, thief.id, code)
    assert not desk.accounts.require("zhao").has_second_factor


def test_r8_confirming_needs_password_and_code(desk: Desk) -> None:
    desk.clock.wait(60)
    session, token = desk.log_in()
    assert desk.logins.complete(session, token, desk.code())
    desk.clock.wait(400)
    assert not desk.logins.confirm(session, token, OWN, "000000")
    assert not desk.logins.confirm(session, token, "wrong", desk.code())
    resumed = desk.logins.resume(token)
    assert resumed
    assert resumed.confirmed_s > 300
    assert desk.logins.confirm(session, token, OWN, desk.code())
    resumed = desk.logins.resume(token)
    assert resumed
    assert resumed.confirmed_s < 1


def test_migration_18_a_secret_that_was_being_set_up_is_forgotten_and_sessions_go_on(settings: Settings) -> None:
    settings.data_dir.mkdir(parents=True)
    clock = TestClock()
    old = old_database(settings.data_dir / "box.sqlite3", 17)
    old.execute(
        "INSERT INTO users (id, username, password_hash, role, must_change, created_at, password_set_at, totp_pending)"
        " VALUES (1, 'zhao', 'hash', 'technician', 0, '2026-01-01T00:00:00.000+00:00', ?, X'0011')", (clock.now(),),
    )  # fmt: skip
    digest = hashlib.sha256(b"token").hexdigest()
    old.execute(
        "INSERT INTO sessions (token_sha256, user_id, created_at, seen_at, confirmed_at, needs_code, peer) VALUES (?, 1, ?, ?, ?, 0, 'p')",
        (digest, *[clock.now()] * 3),
    )
    old.commit()
    old.close()
    with closing(Store(settings)) as store:
        logins = Logins(store, Accounts(store, clock))
        session = logins.resume("token")
        assert session
        secret = logins.second_factors.begin(session.account, session.id)
        assert logins.second_factors.confirm(session.account, session.id, pyotp.TOTP(secret).at(int(clock.wall)))
        assert "totp_pending" not in {row["name"] for row in store.database.query("SELECT name FROM pragma_table_info('users')")}
