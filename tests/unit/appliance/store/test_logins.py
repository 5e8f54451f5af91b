"""Logins: limits for guessing, sessions that end on the server, audit rows that guessing cannot multiply."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.roles import Role
from appliance.store import passwords
from appliance.store.accounts import Accounts
from appliance.store.logins import Logins
from appliance.store.store import Store
from model_sync.login_throttle import LOCKOUT_S, MAX_FAILURES, FailureRows
from tests.support.clocks import TestClock

YEAR_S = 365 * 86400.0
pytestmark = pytest.mark.usefixtures("quick_passwords")


class Desk:
    """A store with one clinician ``demo``, and a clock."""

    def __init__(self, store: Store) -> None:
        self.store, self.clock = store, TestClock()
        self.accounts = Accounts(store, self.clock)
        self.logins = Logins(store, self.accounts)
        one_time = self.accounts.add("demo", Role.CLINICIAN, "t")
        self.password = "a new phrase 7"
        self.accounts.change_password(self.accounts.require("demo"), one_time, self.password)

    def log_in(self, peer: str = "10.0.0.1") -> str:
        token = self.logins.login("demo", self.password, peer)
        assert token
        return token

    def rows(self) -> list[dict[str, object]]:
        entries = (json.loads(row["entry"]) for row in self.store.database.query("SELECT entry FROM audit ORDER BY seq"))
        return [entry for entry in entries if entry["event"] == "110114" and entry["outcome"] == 4]


@pytest.fixture
def desk(store: Store) -> Desk:
    return Desk(store)


def test_r3_five_failures_lock_for_fifteen_minutes(desk: Desk) -> None:
    for _ in range(MAX_FAILURES):
        assert desk.logins.login("demo", "wrong", "10.0.0.1") is None
    assert desk.logins.login("demo", desk.password, "10.0.0.1") is None
    assert desk.logins.login("demo", desk.password, "10.0.0.2")
    desk.clock.wait(LOCKOUT_S + 1)
    assert desk.logins.login("demo", desk.password, "10.0.0.1")


def test_r3_two_hundred_failures_from_fifty_addresses_lock_nobody_out(desk: Desk) -> None:
    for number in range(200):
        assert desk.logins.login("demo", "wrong", f"10.0.1.{number % 50}") is None
    assert desk.logins.login("demo", desk.password, "10.0.0.7")


def test_r3_a_lock_set_while_the_clock_was_a_year_ahead_lasts_fifteen_minutes(desk: Desk) -> None:
    desk.clock.set_by(YEAR_S)
    for _ in range(MAX_FAILURES):
        assert desk.logins.login("demo", "wrong", "10.0.0.1") is None
    desk.clock.set_by(-YEAR_S)
    assert desk.logins.login("demo", desk.password, "10.0.0.1") is None
    desk.clock.wait(LOCKOUT_S + 1)
    assert desk.logins.login("demo", desk.password, "10.0.0.1")


def test_a_success_clears_the_failures(desk: Desk) -> None:
    for _ in range(3):
        for _ in range(MAX_FAILURES - 1):
            assert desk.logins.login("demo", "wrong", "10.0.0.1") is None
        desk.log_in()


def test_a_new_password_ends_a_lock(desk: Desk) -> None:
    for _ in range(MAX_FAILURES):
        assert desk.logins.login("demo", "wrong", "10.0.0.1") is None
    fresh = desk.accounts.issue_one_time_password("demo", "t")
    assert desk.logins.login("demo", fresh, "10.0.0.1")


def test_r3_the_same_work_for_every_refusal(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.accounts.add("off", Role.CLINICIAN, "t")
    desk.accounts.set_active("off", False, "t")
    checked: list[bool] = []
    verify = passwords.verify_password
    monkeypatch.setattr(passwords, "verify_password", lambda *given: checked.append(True) or verify(*given))
    for name in ("nobody", "demo", "off", *["demo"] * MAX_FAILURES, *["nobody"] * MAX_FAILURES):
        before = len(checked)
        assert desk.logins.login(name, "wrong", "10.0.0.1") is None
        assert len(checked) == before + 1  # one check of a hash of the same cost, whatever the reason
    parameters = {row["password_hash"].rsplit("$", 2)[0] for row in desk.store.database.query("SELECT password_hash FROM users")}
    assert parameters == {passwords.UNKNOWN_HASH.rsplit("$", 2)[0]}


def test_r5_sessions_end_at_logout_idleness_and_age(desk: Desk) -> None:
    settings, clock = desk.store.settings, desk.clock
    token = desk.log_in()
    desk.logins.logout(token)
    assert desk.logins.resume(token) is None
    desk.logins.logout(token)
    token = desk.log_in()
    clock.wait(60)
    assert desk.logins.resume(token)
    clock.wait(settings.session_idle_s - 1)
    assert desk.logins.resume(token)
    clock.wait(settings.session_idle_s + 1)
    assert desk.logins.resume(token) is None
    token, age = desk.log_in(), 0.0
    while desk.logins.resume(token):
        clock.wait(settings.session_idle_s * 0.9)
        age += settings.session_idle_s * 0.9
    assert settings.session_absolute_s < age <= settings.session_absolute_s + settings.session_idle_s


def test_r5_sessions_are_listed_and_killed(desk: Desk) -> None:
    first, second = desk.log_in("10.0.0.1"), desk.log_in("10.0.0.2")
    listed = desk.logins.sessions()
    assert [(item.account.username, item.peer) for item in listed] == [("demo", "10.0.0.2"), ("demo", "10.0.0.1")]
    assert desk.accounts.end_sessions("demo", "chief", listed[0].id) == 1
    assert desk.logins.resume(second) is None
    assert desk.logins.resume(first)
    assert desk.accounts.end_sessions("demo", "chief") == 1
    assert desk.logins.resume(first) is None
    assert desk.accounts.end_sessions("demo", "chief") == 0


def test_r15_sessions_that_ended_leave_no_row(desk: Desk) -> None:
    tokens = [desk.log_in() for _ in range(3)]
    desk.logins.logout(tokens[0])
    desk.clock.wait(desk.store.settings.session_absolute_s + 1)
    desk.log_in()
    assert desk.store.database.number("SELECT count(*) FROM sessions") == 1
    desk.accounts.issue_one_time_password("demo", "chief")
    assert desk.store.database.number("SELECT count(*) FROM sessions") == 0


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S])
def test_a_session_survives_a_correction_of_the_clock_and_lasts_no_longer_for_it(desk: Desk, jump_s: float) -> None:
    token = desk.log_in()
    desk.clock.set_by(jump_s)
    assert desk.logins.resume(token)
    desk.clock.wait(desk.store.settings.session_idle_s + 1)
    assert desk.logins.resume(token) is None


def test_a_session_begun_while_the_clock_was_a_year_ahead_ends_with_the_restart_that_corrects_it(desk: Desk) -> None:
    desk.clock.set_by(YEAR_S)
    token = desk.log_in()
    desk.clock.restart()
    desk.clock.set_by(-YEAR_S)
    assert desk.logins.resume(token) is None


def test_every_login_is_audited(desk: Desk) -> None:
    desk.logins.login("demo", "wrong", "10.0.0.1")
    desk.logins.login("nobody-here", "wrong", "10.0.0.1")
    assert [row["actor"] for row in desk.rows()] == ["demo", "unknown"]
    assert not any("nobody-here" in json.dumps(row) for row in desk.rows())


def test_the_audit_of_guessing_is_bounded_and_counts_every_attempt(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "verify_password", lambda *_: False)
    for number in range(300):
        desk.logins.login(f"name{number}", "wrong", "10.0.0.1")
        desk.clock.wait(0.1)
    assert len(desk.rows()) == 20
    desk.clock.wait(61)
    desk.logins.login("demo", "wrong", "10.0.0.1")
    assert len(desk.rows()) == 21
    assert sum(row["detail"].get("attempts", 1) for row in desk.rows()) == 301  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.integers(0, 300), st.floats(0, 5)), max_size=400))
@settings(suppress_health_check=list(HealthCheck))
def test_rows_for_failures_never_exceed_one_per_second_over_all(attempts: list[tuple[int, float]]) -> None:
    clock = TestClock()
    rows, written, counted, start = FailureRows(clock.uptime_s), 0, 0, clock.uptime
    for machine, seconds in attempts:
        clock.wait(seconds)
        stands_for = rows.take(str(machine))
        written += stands_for > 0
        counted += stands_for
    assert counted <= len(attempts)
    assert written <= 60 * ((clock.uptime - start) / 60 + 1)
