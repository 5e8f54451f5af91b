"""A power cut is no failure of the model, and a model that takes its machine down is stopped: boots are injected, the journal is real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.attempts import MAX_ATTEMPTS, MAX_INTERRUPTED, Attempts
from appliance.core.domain import Note
from appliance.core.self_test_report import SelfTestReport
from appliance.core.settings import Settings
from appliance.core.states import ActivationState
from appliance.lifecycle.journal import ActivationRequest, Journal
from appliance.lifecycle.journal_queries import reason_code
from appliance.lifecycle.model_control import reference_bundle
from appliance.store.store import DATABASE_NAME, Store
from appliance.store.tuning_requests import TuningRequests
from model_sync import atomic_files
from model_sync.bundle import Manifest
from tests.support.old_database import old_database

LINE = "cxr-pneumonia"
MANIFEST = Manifest.parse((reference_bundle() / "manifest.json").read_bytes())
REPORT = SelfTestReport(precision="fp32", runtime="onnxruntime 1", median_ms=1.0)
_numbers = count()


class Machine:
    """A machine whose boots the test controls, and the journal of a box on it."""

    def __init__(self, store: Store, file: Path) -> None:
        self.store, self.journal, self._file = store, Journal(store), file
        self.boot()

    def boot(self) -> None:
        self._file.write_text(f"boot-{next(_numbers)}\n")

    def enter(self, version: str = "1.1.0") -> int:
        digest = version.replace(".", "").zfill(64)
        return self.journal.start(ActivationRequest(LINE, version, digest, "library", Path("/nowhere"), "model-sync"))

    def put_to_work(self, version: str) -> int:
        number = self.enter(version)
        assert self.journal.begin_attempt(number)
        self.journal.set_state(number, ActivationState.SELF_TEST)
        self.journal.record_self_test(number, REPORT)
        self.journal.switch(number, MANIFEST)
        return number

    def ended(self, number: int) -> tuple[str, str]:
        row = self.journal.row(number)
        return row["state"], reason_code(row)


@pytest.fixture
def machine(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(atomic_files, "_BOOT_ID", tmp_path / "boot_id")
    yield Machine(store, tmp_path / "boot_id")


def test_three_power_cuts_during_the_self_test_are_no_crash(machine: Machine) -> None:
    """ADR 0017."""
    number = machine.enter()
    for _ in range(MAX_ATTEMPTS + 2):
        assert machine.journal.begin_attempt(number)
        machine.boot()
    assert machine.journal.begin_attempt(number)
    assert machine.journal.row(number)["attempts"] == 1
    assert machine.journal.find_blocking_failure("110".zfill(64)) is None


def test_crashes_count_whatever_the_power_does_between_them(machine: Machine) -> None:
    number = machine.enter()
    for crash in range(MAX_ATTEMPTS):
        assert machine.journal.begin_attempt(number), crash  # crashes
        if crash < MAX_ATTEMPTS - 1:
            assert machine.journal.begin_attempt(number)  # a power cut ends it
            machine.boot()
    assert not machine.journal.begin_attempt(number)
    assert machine.ended(number) == ("failed", "activation.crash_loop")


def test_a_model_that_takes_the_machine_down_is_stopped_and_tried_less_and_less(machine: Machine) -> None:
    """The reboot loop is broken."""
    number = machine.enter()
    for _ in range(MAX_INTERRUPTED):
        assert machine.journal.begin_attempt(number)
        machine.boot()
    assert not machine.journal.begin_attempt(number)
    assert machine.ended(number) == ("failed", "activation.interrupted")
    row = machine.journal.row(number)
    assert machine.journal.find_blocking_failure(row["digest"]) == Note("activation.interrupted", "10 attempts, last in staged")

    later = (datetime.now(timezone.utc) - timedelta(minutes=11)).isoformat()
    with machine.store.database.transaction() as tx:
        tx.execute("UPDATE activations SET ended_at = ? WHERE id = ?", (later, number))
    assert machine.journal.find_blocking_failure(row["digest"]) is None  # not for good: the power may have been the cause
    again = machine.enter()
    assert machine.journal.begin_attempt(again)
    machine.boot()
    assert not machine.journal.begin_attempt(again)  # one boot, not ten
    assert machine.ended(again) == ("failed", "activation.interrupted")
    assert machine.journal.find_blocking_failure(row["digest"]) is not None


def test_a_clean_stop_before_a_boot_costs_nothing(machine: Machine) -> None:
    number = machine.enter()
    for _ in range(MAX_INTERRUPTED + 1):
        assert machine.journal.begin_attempt(number)
        machine.journal.cancel_attempts([number])
        machine.boot()
    row = machine.journal.row(number)
    assert (row["attempts"], row["interrupted"]) == (0, 0)


def test_a_system_without_a_boot_id_counts_every_end(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "boot_id").unlink()
    number = machine.enter()
    for _ in range(MAX_ATTEMPTS):
        assert machine.journal.begin_attempt(number)
    assert not machine.journal.begin_attempt(number)
    assert machine.ended(number) == ("failed", "activation.crash_loop")


@given(st.lists(st.sampled_from(["crash", "boot", "stop"]), max_size=30))
def test_only_crashes_are_crashes(ends: list[str]) -> None:
    boots, attempts = 0, Attempts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appliance.core.attempts.boot_id", lambda: str(boots))
        for end in ends:
            attempts = attempts.since_boot().begin()
            attempts = attempts.take_back() if end == "stop" else attempts
            boots += end == "boot"
        attempts = attempts.since_boot()
    assert attempts[:2] == (ends.count("crash"), ends.count("boot"))


# -- on trial


def test_power_cuts_during_images_of_the_trial_are_no_crashes_until_there_are_too_many(machine: Machine) -> None:
    machine.put_to_work("1.0.0")
    number = machine.put_to_work("1.1.0")
    digest = machine.journal.row(number)["digest"]
    for _ in range(MAX_INTERRUPTED - 1):
        machine.boot()
        assert machine.journal.count_worker_crash({digest}) == []
    row = machine.journal.row(number)
    assert (row["attempts"], row["interrupted"]) == (0, MAX_INTERRUPTED - 1)
    machine.journal.record_statistics(number, {}, case_finished=True)
    machine.boot()
    assert machine.journal.count_worker_crash({digest}) == []  # an image was finished: it begins anew
    for _ in range(MAX_INTERRUPTED - 2):
        machine.boot()
        assert machine.journal.count_worker_crash({digest}) == []
    machine.boot()
    assert [row["id"] for row in machine.journal.count_worker_crash({digest})] == [number]


def test_crashes_of_the_worker_within_one_boot_count_as_before(machine: Machine) -> None:
    machine.put_to_work("1.0.0")
    number = machine.put_to_work("1.1.0")
    digest = machine.journal.row(number)["digest"]
    machine.boot()
    assert machine.journal.count_worker_crash(set()) == []  # an idle box
    for _ in range(MAX_ATTEMPTS - 1):
        assert machine.journal.count_worker_crash({digest}) == []
    assert [row["id"] for row in machine.journal.count_worker_crash({digest})] == [number]
    assert machine.journal.row(number)["interrupted"] == 0


# -- measuring again


def test_power_cuts_while_it_is_measured_again_are_no_crashes_until_there_are_too_many(machine: Machine) -> None:
    tunings = TuningRequests(machine.store.database)
    machine.put_to_work("1.0.0")
    asked = tunings.ask("100".zfill(64), LINE, "doctor")
    for _ in range(MAX_INTERRUPTED):
        asked = tunings.next()  # type: ignore[assignment]
        assert tunings.begin(asked)
        machine.boot()
    asked = tunings.next()  # type: ignore[assignment]
    assert asked.attempts == 1
    assert tunings.begin(asked) is None
    ended = tunings.of(asked.digest)
    assert ended is not None
    assert ended.reason == Note("activation.interrupted", "10 attempts")


# -- what an older version left


def test_an_activation_of_an_older_version_has_no_boot(tmp_path: Path, settings: Settings) -> None:
    """The migration: an attempt under way counts as before."""
    with closing(old_database(tmp_path / DATABASE_NAME, 10)) as raw:
        raw.execute(
            "INSERT INTO activations (name, version, digest, device, source, origin, state, attempts, actor, started_at, updated_at)"
            " VALUES ('cxr', '1.0.0', 'd', 'x', 'hand', '/o', 'building', 2, 'test', '', '')"
        )
        raw.commit()
    with closing(Store(settings.model_copy(update={"data_dir": tmp_path}))) as store:
        journal = Journal(store)
        row = journal.row(1)
        assert (row["attempts"], row["interrupted"], row["boot_id"]) == (2, 0, "")
        assert journal.begin_attempt(1)
        assert not journal.begin_attempt(1)
