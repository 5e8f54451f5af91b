"""Emergency access: with a reason, for a short time, and seen by others."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.errors import StoreError
from appliance.core.roles import Role
from appliance.store.accounts import Accounts
from appliance.store.emergency_access import EmergencyAccesses
from appliance.store.store import Store
from tests.support.clocks import TestClock

REASON = "no clinician can be reached"
pytestmark = pytest.mark.usefixtures("quick_passwords")


class Desk:
    """A technician ``zhao``, a security administrator ``chief`` and a clock."""

    def __init__(self, store: Store) -> None:
        self.store, self.clock = store, TestClock()
        self.accounts = Accounts(store, self.clock)
        self.emergencies = EmergencyAccesses(store, self.accounts)
        people = {"zhao": Role.TECHNICIAN, "chief": Role.SECURITY_ADMINISTRATOR, "auditor": Role.AUDITOR, "wang": Role.CLINICIAN}
        for name, role in people.items():
            self.accounts.add(name, role, "t")
        self.zhao, self.chief = self.accounts.require("zhao"), self.accounts.require("chief")
        self.duration_s = store.settings.emergency_access_s


@pytest.fixture
def desk(store: Store) -> Desk:
    return Desk(store)


def test_r7_emergency_access_ends_by_itself(desk: Desk) -> None:
    assert desk.emergencies.remaining_s(desk.zhao) == 0
    desk.emergencies.begin(desk.zhao, REASON)
    assert desk.emergencies.remaining_s(desk.zhao) == pytest.approx(desk.duration_s)
    desk.clock.wait(desk.duration_s - 1)
    assert desk.emergencies.remaining_s(desk.zhao) == pytest.approx(1, abs=0.01)
    desk.clock.wait(2)
    assert desk.emergencies.remaining_s(desk.zhao) == 0


def test_r7_asking_again_does_not_extend_it(desk: Desk) -> None:
    desk.emergencies.begin(desk.zhao, REASON)
    desk.clock.wait(600)
    desk.emergencies.begin(desk.zhao, REASON)
    assert desk.emergencies.remaining_s(desk.zhao) == pytest.approx(desk.duration_s - 600)
    assert len(desk.emergencies.open_alarms()) == 1


@given(st.lists(st.tuples(st.sampled_from(["wait", "set", "restart"]), st.floats(-4e7, 4e7)), max_size=20))
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_r7_no_change_of_the_clock_extends_it(desk: Desk, steps: list[tuple[str, float]]) -> None:
    desk.emergencies.end(desk.zhao)
    desk.emergencies.begin(desk.zhao, REASON)
    for step, seconds in steps:
        if step == "wait":
            desk.clock.wait(abs(seconds) % 600)
        elif step == "set":
            desk.clock.set_by(seconds)
        else:
            desk.clock.restart()
    desk.clock.wait(desk.duration_s + 1)
    assert desk.emergencies.remaining_s(desk.zhao) == 0


@pytest.mark.parametrize("reason", ["", "short", " " * 50, "a\n \t b"])
def test_r7_without_a_reason_there_is_none(desk: Desk, reason: str) -> None:
    with pytest.raises(StoreError) as refused:
        desk.emergencies.begin(desk.zhao, reason)
    assert refused.value.code == "emergency.reason"
    assert desk.emergencies.open_alarms() == []


@pytest.mark.parametrize("name", ["chief", "auditor", "wang"])
def test_r7_only_technician_and_system_administrator_may_ask(desk: Desk, name: str) -> None:
    with pytest.raises(StoreError) as refused:
        desk.emergencies.begin(desk.accounts.require(name), REASON)
    assert refused.value.code == "account.not_allowed"


def test_r7_a_change_of_role_ends_it(desk: Desk) -> None:
    desk.emergencies.begin(desk.zhao, REASON)
    desk.accounts.set_role("zhao", Role.AUDITOR, "t")
    assert desk.emergencies.remaining_s(desk.accounts.require("zhao")) == 0


def test_r7_start_and_end_are_security_alerts_of_the_audit(desk: Desk) -> None:
    desk.emergencies.begin(desk.zhao, f"  {REASON}\n ")
    desk.emergencies.end(desk.zhao)
    desk.emergencies.end(desk.zhao)
    entries = [json.loads(row["entry"]) for row in desk.store.database.query("SELECT entry FROM audit ORDER BY seq")]
    alerts = [entry for entry in entries if entry["object"].startswith("emergency:")]
    assert [item["detail"]["type"] for item in alerts] == ["110127", "110138"]
    assert {(item["event"], item["actor"]) for item in alerts} == {("110113", "zhao")}
    assert alerts[0]["detail"]["reason"] == REASON
    assert desk.emergencies.remaining_s(desk.zhao) == 0


def test_r7_the_alarm_stays_until_a_security_administrator_has_looked_at_it(desk: Desk) -> None:
    desk.emergencies.begin(desk.zhao, REASON)
    (alarm,) = desk.emergencies.open_alarms()
    for actor, code in ((desk.zhao, "account.not_allowed"), (desk.chief, "emergency.running")):
        with pytest.raises(StoreError) as refused:
            desk.emergencies.acknowledge(alarm.id, actor)
        assert refused.value.code == code
    desk.clock.wait(desk.duration_s + 1)
    assert desk.emergencies.open_alarms()[0].remaining_s == 0
    desk.emergencies.acknowledge(alarm.id, desk.chief)
    assert desk.emergencies.open_alarms() == []
    with pytest.raises(StoreError):
        desk.emergencies.acknowledge(999, desk.chief)
