"""API tokens: shown once, for few things and a limited time, and an alarm when a second machine uses one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.errors import StoreError
from appliance.core.roles import Role, Scope
from appliance.core.settings import Settings
from appliance.store.accounts import Accounts
from appliance.store.api_tokens import _MAX_ADDRESSES, MAX_DAYS, SECOND_ADDRESS, ApiTokens
from appliance.store.keys import AUDIT_KEY, Keys
from appliance.store.store import Store
from model_sync.login_throttle import MAX_WAIT_S, SLOW_AFTER, SLOW_S, TooManyAttemptsError
from tests.support.clocks import TestClock
from tests.support.old_database import old_database

DAY_S = 24 * 3600
PEER = "192.0.2.7"
pytestmark = pytest.mark.usefixtures("quick_passwords")


class Desk:
    """A clinician ``wang``, a security administrator ``chief`` and a clock."""

    def __init__(self, store: Store) -> None:
        self.store, self.clock = store, TestClock()
        self.accounts = Accounts(store, self.clock)
        self.tokens = ApiTokens(store, self.accounts)
        for name, role in {"wang": Role.CLINICIAN, "chief": Role.SECURITY_ADMINISTRATOR, "zhao": Role.TECHNICIAN}.items():
            self.accounts.add(name, role, "t")
        self.chief = self.accounts.require("chief")

    def issue(self, days: int = 30, *scopes: str) -> str:
        """A token of wang."""
        return self.tokens.issue("wang", scopes or ("upload",), days, self.chief)

    def alerts(self) -> list[dict[str, object]]:
        """The entries of the audit about second machines."""
        entries = [json.loads(row["entry"]) for row in self.store.database.query("SELECT entry FROM audit ORDER BY seq")]
        return [entry for entry in entries if entry["detail"].get("code") == SECOND_ADDRESS]


@pytest.fixture
def desk(store: Store) -> Desk:
    return Desk(store)


def test_a_token_is_shown_once_and_only_its_hash_is_stored(desk: Desk) -> None:
    token = desk.issue(30, "upload", "results")
    assert len(token) > 40
    rows = [tuple(row) for row in desk.store.database.query("SELECT * FROM api_tokens")]
    entries = [row["entry"] for row in desk.store.database.query("SELECT entry FROM audit")]
    assert token not in str(rows) + str(entries)
    found = desk.tokens.use(token, PEER)
    assert found
    assert (found.account.username, found.scopes, found.created_by) == ("wang", {Scope.UPLOAD, Scope.RESULTS}, "chief")
    made = json.loads(entries[-1])
    assert (made["actor"], made["detail"]["token"], made["detail"]["scopes"]) == ("chief", found.id, ["results", "upload"])


@pytest.mark.parametrize("days", [0, -1, MAX_DAYS + 1, 10**12, True])
def test_a_token_works_for_one_to_365_days(desk: Desk, days: int) -> None:
    with pytest.raises(StoreError, match=r"account\.token_days"):
        desk.issue(days)
    assert desk.tokens.all() == []


@pytest.mark.parametrize("scopes", [(), ("everything",), ("upload", ""), ("UPLOAD",)])
def test_scopes_that_do_not_exist_are_refused(desk: Desk, scopes: tuple[str, ...]) -> None:
    with pytest.raises(StoreError, match=r"account\.scope"):
        desk.tokens.issue("wang", scopes, 30, desk.chief)


def test_tokens_are_for_active_clinicians_and_made_by_the_security_administrator(desk: Desk) -> None:
    for name, code in (("zhao", "account.scope"), ("chief", "account.scope"), ("nobody", "account.unknown")):
        with pytest.raises(StoreError, match=code):
            desk.tokens.issue(name, ["upload"], 30, desk.chief)
    for actor in ("zhao", "wang"):
        with pytest.raises(StoreError, match=r"account\.not_allowed"):
            desk.tokens.issue("wang", ["upload"], 30, desk.accounts.require(actor))
        with pytest.raises(StoreError, match=r"account\.not_allowed"):
            desk.tokens.revoke(1, desk.accounts.require(actor))
    desk.accounts.set_active("wang", False, desk.chief)
    with pytest.raises(StoreError, match=r"account\.disabled"):
        desk.issue()


def test_a_revoked_token_is_not_valid_any_more(desk: Desk) -> None:
    token = desk.issue()
    (known,) = desk.tokens.all()
    assert desk.tokens.use(token, PEER)
    assert desk.tokens.revoke(known.id, desk.chief) == "wang"
    assert desk.tokens.use(token, PEER) is None
    with pytest.raises(StoreError, match=r"account\.token_unknown"):
        desk.tokens.revoke(known.id, desk.chief)


@pytest.mark.parametrize("change", ["disable", "role"])
def test_disabling_an_account_and_changing_its_role_revoke_its_tokens_for_good(desk: Desk, change: str) -> None:
    token, other = desk.issue(), desk.issue()
    if change == "disable":
        desk.accounts.set_active("wang", False, desk.chief)
        desk.accounts.set_active("wang", True, desk.chief)
    else:
        desk.accounts.set_role("wang", Role.TECHNICIAN, desk.chief)
        desk.accounts.set_role("wang", Role.CLINICIAN, desk.chief)
    assert desk.tokens.use(token, PEER) is None
    assert desk.tokens.use(other, PEER) is None
    entries = [json.loads(row["entry"])["detail"] for row in desk.store.database.query("SELECT entry FROM audit ORDER BY seq")]
    assert [entry["tokens_revoked"] for entry in entries if "tokens_revoked" in entry] == [[1, 2]]


def test_a_token_expires_after_its_days(desk: Desk) -> None:
    token = desk.issue(2)
    desk.clock.wait(2 * DAY_S - 1)
    assert desk.tokens.use(token, PEER)
    desk.clock.wait(2)
    assert desk.tokens.use(token, PEER) is None
    (expired,) = desk.tokens.all()
    assert expired.remaining_s == 0


@given(st.lists(st.tuples(st.sampled_from(["wait", "set", "use"]), st.floats(-4e7, 4e7)), max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_change_of_the_clock_stretches_or_shortens_a_token(store: Store, steps: list[tuple[str, float]]) -> None:
    with store.database.transaction() as tx:
        for table in ("api_tokens", "sessions", "users"):
            tx.execute(f"DELETE FROM {table}")  # noqa: S608 - constants
    desk, passed = Desk(store), 0.0
    token = desk.issue(30)
    for kind, seconds in steps:
        if kind == "wait":
            desk.clock.wait(abs(seconds))
            passed += abs(seconds)
        elif kind == "set":
            desk.clock.set_by(seconds)
        else:
            assert (desk.tokens.use(token, PEER) is not None) == (passed < 30 * DAY_S)
    assert (desk.tokens.use(token, PEER) is not None) == (passed < 30 * DAY_S)


def test_a_clock_set_back_before_a_restart_stretches_nothing(desk: Desk) -> None:
    token = desk.issue(30)
    desk.clock.wait(29 * DAY_S)
    assert desk.tokens.use(token, PEER)
    desk.clock.set_by(-28 * DAY_S)  # after the token was made, before its last use
    desk.clock.restart()
    assert desk.tokens.use(token, PEER) is None
    desk.clock.set_by(28 * DAY_S)  # put right: what is left of its days
    assert desk.tokens.use(token, PEER)
    desk.clock.wait(2 * DAY_S)
    assert desk.tokens.use(token, PEER) is None


def test_an_expired_token_stays_expired_when_the_clock_is_set_back(desk: Desk) -> None:
    token = desk.issue(30)
    desk.clock.wait(31 * DAY_S)
    assert desk.tokens.use(token, PEER) is None
    desk.clock.set_by(-15 * DAY_S)
    desk.clock.restart()
    assert desk.tokens.use(token, PEER) is None


def test_a_clock_a_year_ahead_ends_a_token_made_under_it_at_the_restart(desk: Desk) -> None:
    desk.clock.set_by(365 * DAY_S)
    token = desk.issue(30)
    desk.clock.set_by(-365 * DAY_S)
    assert desk.tokens.use(token, PEER)
    desk.clock.restart()
    assert desk.tokens.use(token, PEER) is None


def test_a_token_used_from_two_addresses_is_shown_as_such_and_audited_once_per_address(desk: Desk) -> None:
    token = desk.issue()
    for peer in (PEER, PEER, "192.0.2.8", PEER, "192.0.2.8", "2001:db8::1", "2001:db8::2"):  # the last two are one machine
        assert desk.tokens.use(token, peer)
    (shown,) = desk.tokens.all()
    assert set(shown.addresses) == {PEER, "192.0.2.8", "2001:db8::/64"}
    alerts = desk.alerts()
    assert [alert["detail"]["peer"] for alert in alerts] == ["192.0.2.8", "2001:db8::1"]  # type: ignore[index]
    assert {(alert["event"], alert["actor"], alert["object"]) for alert in alerts} == {("110113", "wang", f"token:{shown.id}")}


def test_the_addresses_of_a_token_are_bounded(desk: Desk) -> None:
    token = desk.issue()
    for number in range(_MAX_ADDRESSES + 5):
        desk.clock.wait(1)
        assert desk.tokens.use(token, f"192.0.2.{number}")
    (shown,) = desk.tokens.all()
    assert shown.addresses == tuple(f"192.0.2.{number}" for number in range(_MAX_ADDRESSES + 4, 4, -1))


def test_the_last_use_is_recorded_and_not_written_at_every_request(desk: Desk) -> None:
    token = desk.issue()
    assert desk.tokens.all()[0].last_used_at == ""
    desk.tokens.use(token, PEER)
    first = desk.tokens.all()[0].last_used_at
    desk.clock.wait(5)
    desk.tokens.use(token, PEER)
    assert desk.tokens.all()[0].last_used_at == first != ""
    desk.clock.wait(60)
    desk.tokens.use(token, PEER)
    assert desk.tokens.all()[0].last_used_at != first


def test_guessing_is_slowed_for_its_machine_and_for_no_token_that_works_there(desk: Desk) -> None:
    token = desk.issue()
    assert desk.tokens.use(token, PEER)
    throttle = desk.tokens.throttle
    for number in range(SLOW_AFTER):
        assert desk.tokens.present(f"guess{number}", PEER) is None
    waits = [throttle.wait_s(f"more{number}", PEER) for number in range(int(MAX_WAIT_S / SLOW_S) + 2)]
    assert waits == [0, *(SLOW_S * (number + 1) for number in range(int(MAX_WAIT_S / SLOW_S))), None]
    with pytest.raises(TooManyAttemptsError):
        desk.tokens.present("guess", PEER)
    assert desk.tokens.present(token, PEER)
    assert desk.tokens.present("guess", "192.0.2.9") is None


def test_migration_17_an_older_box_gets_its_first_token(settings: Settings) -> None:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    Keys(settings.data_dir).load(AUDIT_KEY, lambda: True)
    raw = old_database(Path(settings.data_dir / "box.sqlite3"), 16)
    raw.execute(
        "INSERT INTO users (username, password_hash, role, must_change, created_at) VALUES ('wang', 'x', 'clinician', 0, '2026-01-01')"
    )
    raw.commit()
    raw.close()
    store = Store(settings)
    tokens = ApiTokens(store, Accounts(store))
    assert tokens.all() == []
    assert tokens.use(tokens.issue("wang", ["results"], 1, "cli"), PEER)
    store.close()
