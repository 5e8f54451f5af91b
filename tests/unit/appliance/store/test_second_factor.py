"""The second factor: codes that work once, recovery codes, secrets that are not readable on the disk."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pyotp
import pytest

from appliance.core.errors import StoreError
from appliance.core.roles import Role
from appliance.store import passwords
from appliance.store.accounts import Accounts
from appliance.store.keys import ACCOUNTS_KEY
from appliance.store.logins import Logins, Session
from appliance.store.second_factor import RECOVERY_CODES, SecondFactors
from appliance.store.store import Store
from model_sync.login_throttle import MAX_FAILURES
from tests.support.clocks import TestClock
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
        self.secret = self.factors.begin(self.accounts.require("zhao"))
        self.recovery = self.factors.confirm(self.accounts.require("zhao"), self.code())
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
    accounts.add("zhao", Role.TECHNICIAN, "t")
    factors, account = SecondFactors(store, accounts), accounts.require("zhao")
    totp = pyotp.TOTP(factors.begin(account))
    code = totp.now()
    factors.confirm(account, code)
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
    key.unlink()
    desk.clock.wait(60)
    assert desk.factors.take(desk.account, desk.code()) == ""
    assert desk.factors.take(desk.account, desk.recovery[0]) == "recovery"
    assert not key.exists()
    desk.factors.remove("zhao", "cli")
    assert desk.factors.begin(desk.accounts.require("zhao"))


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
    totp = pyotp.TOTP(logins.second_factors.begin(session.account))
    with pytest.raises(StoreError):
        logins.second_factors.confirm(session.account, "000000", session.id)
    assert logins.resume(guest)
    logins.second_factors.confirm(session.account, totp.now(), session.id)
    assert logins.resume(guest) is None
    assert logins.resume(own)


def test_r4_a_login_that_is_under_way_when_the_second_factor_is_set_up_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = Accounts(store)
    one_time = accounts.add("zhao", Role.TECHNICIAN, "t")
    accounts.change_password(accounts.require("zhao"), one_time, OWN)
    logins, account = Logins(store, accounts), accounts.require("zhao")
    verify = passwords.verify_password

    def slowly(*given: str) -> bool:
        logins.second_factors.confirm(account, pyotp.TOTP(logins.second_factors.begin(account)).now())
        return verify(*given)

    session = logins.resume(logins.login("zhao", OWN, "10.0.0.1") or "")
    assert session
    monkeypatch.setattr(passwords, "verify_password", slowly)
    assert logins.login("zhao", OWN, "10.0.0.66") is None
    assert logins.begin_again(session) is None


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
