"""On trial: what a new model does to real queues decides whether it stays; what it found is marked when it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.core.domain import Note, Source
from appliance.core.errors import ActivationError
from appliance.core.self_test_report import LATENCY_FLOOR_MS
from appliance.core.settings import Settings
from appliance.ingest.ingest import Ingest
from appliance.lifecycle.activation import Activator
from appliance.lifecycle.model_control import activate, roll_back
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from model_sync import messages
from tests.support.activation_box import LINE, Box, change_manifest, digest_of, wanted, watched
from tests.support.scans import scan_bytes


@pytest.fixture
def box(tmp_path: Path, store: Store) -> Iterator[Box]:
    """A box whose first model is at work."""
    made = Box(tmp_path, store)
    made.first()
    yield made
    store.database.verify_audit()


def on_trial(box: Box, **watch: Any) -> str:
    """A second version on trial under these bounds; its digest."""
    digest = activate(box.store, watched(box.bundle("1.1.0"), **watch), "test")
    assert box.last() == ("trial", "")
    return digest


def judge(box: Box) -> Activator:
    """One look at the trial, at once."""
    activator = box.activator()
    box.settle(activator)
    return activator


def alerts(box: Box, code: str) -> list[dict[str, Any]]:
    """Security alerts with this code."""
    entries = [json.loads(row["entry"]) for row in box.store.database.query("SELECT entry FROM audit")]
    return [entry for entry in entries if entry["event"] == "110113" and entry["detail"].get("code") == code]


def test_r31_a_trial_of_enough_cases_is_passed(box: Box) -> None:
    new = on_trial(box, trial_cases=4)
    for number in range(4):
        box.scan(str(number))
        judge(box)
        assert box.last() == ("trial", "")
        assert box.work() == new
    judge(box)
    assert box.last() == ("good", "")
    trial = json.loads(box.journal.history(1)[0]["trial"])
    assert (trial["cases"], trial["failures"], trial["latency_ms"]) == (4, 0, 1.0)


def test_a_trial_of_enough_hours_needs_a_case_all_the_same(box: Box) -> None:
    on_trial(box, trial_hours=1e-7)
    judge(box)
    assert box.last() == ("trial", "")
    box.scan()
    box.work()
    judge(box)
    assert box.last() == ("good", "")


def test_r31_too_many_failures_take_it_back_and_the_one_before_reads_what_failed(box: Box) -> None:
    old, new = box.active(), on_trial(box, max_failure_fraction=0.5)
    read = box.scan("read")
    assert box.work() == new
    failed = [box.scan(f"failed {n}") for n in range(3)]
    for _ in failed[:2]:
        box.fail()
    judge(box)
    assert box.last() == ("trial", "")  # two failures say nothing yet
    box.fail()
    judge(box)
    assert (box.last(), box.active()) == (("rolled-back", "activation.failures"), old)
    assert alerts(box, "activation.failures")
    assert box.store.model(new)["state"] == "retired"
    view = Worklist(box.store).instance(read)
    assert [note.code for note in view.jobs[0].notes][-1] == "activation.rolled_back"
    assert view.findings  # what it found stays, and says so
    assert [box.work() for _ in failed] == [old] * 3
    assert all(Worklist(box.store).instance(number).state.value == "ai_ready" for number in failed)
    assert box.journal.find_blocking_failure(new)


def test_r31_too_slow_takes_it_back(box: Box) -> None:
    old, new = box.active(), on_trial(box, max_latency_ratio=2.0)
    measured = max(json.loads(box.store.model(new)["self_test"])["median_ms"], LATENCY_FLOOR_MS)
    for number in range(5):
        box.scan(str(number))
        judge(box)
        assert box.last() == ("trial", "")
        box.work(ms=measured * 3)
    judge(box)
    assert (box.last(), box.active()) == (("rolled-back", "activation.latency"), old)


@pytest.mark.parametrize(("scores", "verdict"), [((0.5,) * 60, "rolled-back"), ((0.01, 0.99) * 30, "trial")])
def test_r31_scores_that_lost_their_shape_take_it_back(box: Box, scores: tuple[float, ...], verdict: str) -> None:
    on_trial(box)
    for number, score in enumerate(scores):
        box.scan(str(number))
        box.work(score)
    judge(box)
    assert box.last() == (verdict, "activation.drift" if verdict == "rolled-back" else "")
    assert json.loads(box.journal.history(1)[0]["trial"])["drift"] is not None


def test_what_the_one_before_did_is_not_held_against_it(box: Box) -> None:
    box.scan("old")
    box.fail()
    on_trial(box, max_failure_fraction=0.0)
    for number in range(2):
        box.scan(str(number))
        box.fail()
    judge(box)
    assert box.last() == ("trial", "")


def test_the_first_model_out_of_its_bounds_raises_the_alarm_and_goes_on(tmp_path: Path, store: Store) -> None:
    box = Box(tmp_path, store)
    digest = activate(store, watched(box.bundle("1.0.0"), max_failure_fraction=0.0), "test")
    for number in range(3):
        box.scan(str(number))
        box.fail()
    judge(box)
    assert (box.last(), box.active()) == (("good", "activation.failures"), digest)
    judge(box)
    assert len(alerts(box, "activation.failures")) == 1


def test_a_version_that_replaces_one_on_trial_falls_back_to_the_proven_one(box: Box) -> None:
    old = box.active()
    on_trial(box)
    third = activate(box.store, watched(box.bundle("1.2.0"), max_failure_fraction=0.0), "test")
    states = {row["version"]: (row["state"], row["reason"]) for row in box.journal.history()}
    assert states["1.1.0"][0] == "rolled-back"
    for number in range(3):
        box.scan(str(number))
        box.fail()
    judge(box)
    assert box.active() == old != third


def test_a_withdrawn_model_is_switched_off_and_its_pending_results_are_marked(box: Box) -> None:
    old, new = box.active(), on_trial(box)
    read, waiting, failed = box.scan("read"), box.scan("waiting"), box.scan("failed")
    assert box.work() == new
    with box.store.database.transaction() as tx:
        tx.execute("UPDATE jobs SET priority = 1 WHERE instance_id = ?", (failed,))
    box.fail()
    revision = Worklist(box.store).revision()
    assert box.journal.record_restrictions(LINE, "1.0.0", {"1.1.0": "把健康儿童判为患病"})
    activator = box.activator()
    activator.tick()
    assert activator.held == {new}
    assert box.store.queue.claim_job("test", 60, activator.held) is None  # from the first moment on it reads nothing more
    box.settle(activator)
    assert (box.last(), box.active(), activator.held) == (("withdrawn", "model.withdrawn"), old, set())
    view = Worklist(box.store).instance(read)
    assert view.jobs[0].notes[-1].code == "model.withdrawn"
    assert view.jobs[0].notes[-1].detail == "把健康儿童判为患病"
    assert Worklist(box.store).revision() > revision
    assert [row.recalled for row in Worklist(box.store).page() if row.id == Worklist(box.store).study_of(read)] == [True]
    assert {box.work(), box.work()} == {old}
    assert {Worklist(box.store).instance(number).state.value for number in (waiting, failed)} == {"ai_ready"}
    assert alerts(box, "model.withdrawn")


def test_a_withdrawn_model_with_nothing_before_it_leaves_images_not_analysed_and_a_new_one_reads_them(tmp_path: Path, store: Store) -> None:
    box = Box(tmp_path, store)
    box.first()
    waiting = box.scan()
    box.journal.record_restrictions(LINE, "1.0.0", {"1.0.0": "withdrawn for a test"})
    box.settle(box.activator())
    assert box.active() is None
    view = Worklist(store).instance(waiting)
    assert (view.state.value, view.reason.code if view.reason else "") == ("not_analysed", "model.withdrawn")
    later = box.scan("later")
    job = store.queue.claim_job("test", 60)
    assert job
    assert (job.instance_id, job.kind.value, job.scope_code) == (later, "check", "scope.no_model")
    store.queue.recover_jobs()
    new = activate(store, box.bundle("1.1.0"), "test")
    store.planner.close_series([row["id"] for row in store.database.query("SELECT id FROM series")])
    assert box.work() == new
    assert Worklist(store).instance(waiting).state.value == "ai_ready"


def test_an_older_model_that_is_withdrawn_is_never_fallen_back_to(box: Box) -> None:
    old, new = box.active(), on_trial(box, max_failure_fraction=0.0)
    waiting = [box.scan(str(number)) for number in range(3)]
    box.journal.record_restrictions(LINE, "1.0.0", {"1.0.0": "withdrawn"})
    judge(box)
    assert box.active() == new
    for _ in waiting:
        box.fail()
    judge(box)
    assert box.active() is None
    assert old
    assert box.store.model(old)["state"] == "retired"


def test_jobs_of_the_version_before_are_still_read_by_it(box: Box) -> None:
    old = box.active()
    box.scan()
    new = on_trial(box)
    box.scan("2")
    assert [box.work(), box.work()] == [old, new]


def test_thousands_of_findings_are_marked_in_pieces(box: Box) -> None:
    """No scan waits for it: the switch itself is one short transaction, the rest of the notes follow."""
    new = on_trial(box)
    number = box.scan()
    box.work()
    with box.store.database.transaction() as tx:
        tx.executemany(
            "INSERT INTO jobs (kind, instance_id, model_digest, state, created_at, outcome, notes)"
            " VALUES (?, ?, ?, 'done', '', 'ai_ready', '[]')",
            [(f"infer {n}", number, new) for n in range(1200)],
        )
    box.journal.record_restrictions(LINE, "1.0.0", {"1.1.0": "x"})
    activator = box.activator()
    box.step_until(activator, lambda: box.last()[0] == "withdrawn")
    assert box.journal.history(1)[0]["marked"] == 0
    box.settle(activator)
    unmarked = box.store.database.one("SELECT count(*) AS n FROM jobs WHERE model_digest = ? AND notes NOT LIKE '%withdrawn%'", new)
    assert unmarked
    assert (unmarked["n"], box.journal.history(1)[0]["marked"]) == (0, 1)


def test_a_restart_in_the_middle_of_a_withdrawal_ends_it(box: Box, settings: Settings) -> None:
    old, new = box.active(), on_trial(box)
    box.journal.record_restrictions(LINE, "1.0.0", {"1.1.0": "x"})
    assert box.active_digest_is(new)
    again = Box(settings.data_dir.parent, Store(settings))
    again.activator().recover()  # what a worker does before it loads any model
    assert again.active() == old


def test_a_reboot_loop_ends_the_trial(box: Box) -> None:
    old, new = box.active(), on_trial(box)
    for attempt in (1, 2):
        box.activator().recover([new])
        assert box.journal.history(1)[0]["attempts"] == attempt
    box.scan()
    assert box.work() == new
    box.activator().recover([new])  # a finished case in between: the worker lives with it
    assert box.journal.history(1)[0]["attempts"] == 1
    for _ in range(2):
        begun = box.activator()
        begun.recover()  # it fell while it was loading its models
    assert (box.last(), box.active()) == (("rolled-back", "activation.reboot_loop"), old)


def test_power_cuts_and_films_of_others_are_no_fault_of_a_model_on_trial(box: Box) -> None:
    new = on_trial(box)
    for at_work in ([], [""], ["f" * 64], []) * 2:
        activator = box.activator()
        activator.recover(at_work)
        activator.confirm_loaded()
    assert (box.last(), box.active()) == (("trial", ""), new)


def test_a_proof_that_is_broken_off_by_what_the_worker_reads_is_no_failed_attempt(box: Box) -> None:
    number = box.journal.start(wanted(box.bundle("1.1.0")))
    for _ in range(5):
        assert box.journal.begin_attempt(number)
        box.activator().recover([""])
    assert box.journal.row(number)["attempts"] == 0
    for _ in range(3):  # it may have been the proof
        assert box.journal.begin_attempt(number)
        box.activator().recover()
    assert not box.journal.begin_attempt(number)
    assert box.last() == ("failed", "activation.crash_loop")


def test_a_box_that_is_switched_off_in_order_every_night_is_no_reboot_loop(box: Box) -> None:
    on_trial(box)
    for _ in range(5):
        activator = box.activator()
        activator.recover()
        activator.confirm_loaded()
        activator.stop()
    assert box.last() == ("trial", "")


def test_every_code_of_an_activation_has_its_text_in_both_languages() -> None:
    from appliance.lifecycle.journal_queries import PERMANENT_FAILURES, REFUSALS

    for code in (
        PERMANENT_FAILURES | REFUSALS | {"activation.rolled_back", "activation.failed_before", "activation.ended", "model.disk_full"}
    ):
        for language in ("zh", "en"):
            assert messages.text(code, language)
            assert messages.hint(code, language)


def more_scans(box: Box, count: int) -> None:
    for number in range(count):
        names = {"SOPInstanceUID": f"1.2.3.{number}", "SeriesInstanceUID": f"1.2.4.{number}"}
        accepted = Ingest(box.store).accept(scan_bytes(**names), Source("upload", "test", "x"))
        box.store.planner.close_series([accepted.stored.series_id])


def test_films_that_fail_before_the_model_saw_them_are_no_fault_of_it(box: Box) -> None:
    new = on_trial(box)
    more_scans(box, 3)
    for _ in range(3 * box.store.settings.job_max_attempts):
        job = box.store.queue.claim_job("test", 60)
        assert job
        box.store.queue.fail_job(job, Note("job.memory_input"))
    box.settle(box.activator())
    assert (box.last(), box.active()) == (("trial", ""), new)
    assert json.loads(box.journal.history(1)[0]["trial"])["failures"] == 0


def test_a_person_overrules_only_a_wish_that_was_met(box: Box) -> None:
    old = box.active()
    on_trial(box)
    third = box.bundle("1.2.0")
    box.journal.record_refusal(wanted(third, source="library", actor="model-sync"), Note("trust.expired"))
    roll_back(box.store, None, "dr-li")
    assert box.active() == old
    assert not box.journal.is_overridden_by_user(LINE, digest_of(third))
    assert box.journal.is_overridden_by_user(LINE, digest_of(box.bundles / f"{LINE}-1.1.0")) is False  # it was by hand as well


def test_a_bundle_of_another_line_or_version_than_wanted_is_not_put_to_work(box: Box) -> None:
    kept, bundle = box.active(), box.bundle("1.1.0")
    for changes in ({"name": "bone-age"}, {"version": "1.2.0"}):
        number = box.journal.start(wanted(bundle, **changes))
        activator = box.activator()
        box.step_until(activator, lambda number=number: not box.under_way(number))
        activator.stop()
        assert (box.last(), box.active()) == (("failed", "model.mismatch"), kept)


def test_the_room_that_is_kept_for_scans_is_not_taken_by_a_model(box: Box) -> None:
    kept, bundle = box.active(), box.bundle("1.1.0")
    free = 2 * shutil.disk_usage(box.store.settings.data_dir).free  # other programs may free some space meanwhile
    tight = Box(box.bundles.parent, Store(box.store.settings.model_copy(update={"disk_reserve_bytes": free})))
    with pytest.raises(ActivationError, match=r"model\.disk_full"):
        activate(tight.store, bundle, "test")
    assert tight.active() == kept
    tight.store.close()


def test_what_a_withdrawn_version_left_waits_for_its_own_line(box: Box) -> None:
    image = box.scan()
    box.journal.record_restrictions(LINE, "0.0.1", {"1.0.0": "bad"})
    box.settle(box.activator())
    left = box.store.database.one("SELECT state, reason FROM instances WHERE id = ?", image)
    assert left
    assert "model.withdrawn" in left["reason"]

    def of_hands(manifest: dict[str, Any]) -> None:
        manifest["applies_to"].update(body_part=["HAND"], assumed_body_part="HAND")

    activate(box.store, change_manifest(box.bundle("3.0.0", line="hand"), of_hands), "test")
    box.store.planner.close_series([row["id"] for row in box.store.database.query("SELECT id FROM series WHERE open = 1")])
    assert box.store.database.one("SELECT state, reason FROM instances WHERE id = ?", image) == left  # another line says nothing of it
    new = activate(box.store, box.bundle("1.1.0"), "test")
    box.store.planner.close_series([row["id"] for row in box.store.database.query("SELECT id FROM series WHERE open = 1")])
    assert box.work() == new
