"""The store: durable, idempotent, one job per image and model, leases, poison, audit chain, full disk."""

from __future__ import annotations

import gc
import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from sqlcipher3 import dbapi2 as sqlcipher

from appliance.core.applicable_accuracy import Accuracy, AccuracyBasis
from appliance.core.domain import Contour, Finding, Job, JobResult, Note, Patient, ScanState, Source
from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.store import database
from appliance.store.database import APPLICATION_ACTIVITY, Database
from appliance.store.store import DATABASE_NAME, Store
from appliance.store.worklist import Worklist
from model_sync.bundle import Group, Interval
from tests.support.box_database import TEST_KEY, raw_connection
from tests.support.old_database import old_database
from tests.support.paths import ROOT
from tests.support.stored_scans import RULE, add_scan, scan

SOURCE = Source("upload", "demo", "a.dcm")
FINDING = Finding(
    label="pneumonia", code="SCT:233604007", title_zh="肺炎", title_en="Pneumonia", score=0.9, threshold=0.4, positive=True,
    sensitivity=(0.95, 0.93, 0.97), specificity=(0.8, 0.7, 0.9), measured_on="x", model="m", model_version="1.0.0", model_digest="d" * 64,
    precision="fp32", runtime="onnxruntime", peak=(1.5, 2.5), outline=(((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)),), heatmap_png=b"png",
    inner_contours=(Contour(0.9, (((0.0, 0.0), (0.5, 0.0), (0.5, 0.5)),)),),
)  # fmt: skip


def put_model(store: Store, digest: str = "d" * 64) -> None:
    """An active model that reads chest CR (planning only; nothing here runs it)."""
    from appliance.lifecycle.model_control import reference_bundle

    manifest = json.loads((reference_bundle() / "manifest.json").read_text("utf-8"))
    manifest["applies_to"] = json.loads(RULE.model_dump_json())
    values = {
        "digest": digest, "name": "m", "version": "1.0.0", "directory": "models/m", "manifest": json.dumps(manifest),
        "precision": "fp32", "runtime": "onnxruntime", "self_test": "{}",
    }  # fmt: skip
    with store.database.transaction() as tx:
        store.switch_within(tx, values, "test")


def test_scan_reads_back_byte_for_byte(store: Store) -> None:
    stored = add_scan(store)
    assert store.read_instance(stored.instance_id) == b"DICM" * 100


def test_the_same_scan_again_is_one_scan(store: Store) -> None:
    first, again = add_scan(store), add_scan(store)
    assert (first.outcome, again.outcome) == ("stored", "duplicate")
    assert first.instance_id == again.instance_id
    assert Worklist(store).count() == 1


def test_same_uid_other_content_is_kept_beside_and_flagged(store: Store) -> None:
    first = add_scan(store)
    image = scan(sop_instance_uid="1.1", study_instance_uid="1.9", series_instance_uid="1.8")
    other = store.add_instance(image, lambda: "f" * 64, b"other", SOURCE, time.perf_counter())
    assert other.outcome == "conflict"
    assert store.read_instance(first.instance_id) == b"DICM" * 100
    assert store.read_instance(other.instance_id) == b"other"
    view = Worklist(store).instance(other.instance_id)
    assert view.state is ScanState.WAITING
    for number in (first.instance_id, other.instance_id):
        assert Note("ingest.conflict") in Worklist(store).instance(number).notes


def test_two_patients_under_one_study_uid_stay_apart(store: Store) -> None:
    one = add_scan(store, 1, patient=Patient("P1", "A"))
    two = add_scan(store, 2, patient=Patient("P2", "B"))
    assert one.study_id != two.study_id
    rows = Worklist(store).page()
    assert [row.patient_mismatch for row in rows] == [True, True]
    assert {row.patient_name for row in rows} == {"A", "B"}


def test_no_plain_name_or_pixel_in_a_content_file(store: Store, settings: Settings) -> None:
    image = scan(sop_instance_uid="1.1")
    store.add_instance(image, lambda: "a" * 64, b"CANARY-NAME" * 50, SOURCE, time.perf_counter())
    files = [path for path in (settings.data_dir / "content").rglob("*") if path.is_file()]
    assert len(files) == 1
    assert b"CANARY" not in files[0].read_bytes()


def test_a_changed_content_file_is_found(store: Store, settings: Settings) -> None:
    stored = add_scan(store)
    path = settings.data_dir / "content" / "00" / f"{1:064x}"
    blob = bytearray(path.read_bytes())
    blob[40] ^= 1
    path.write_bytes(blob)
    with pytest.raises(StoreError, match=r"store\.tampered"):
        store.read_instance(stored.instance_id)
    path.write_bytes(b"x")
    with pytest.raises(StoreError, match=r"store\.tampered"):
        store.read_instance(stored.instance_id)
    path.unlink()
    with pytest.raises(StoreError, match=r"store\.missing"):
        store.read_instance(stored.instance_id)


def test_unknown_numbers_are_missing(store: Store) -> None:
    worklist = Worklist(store)
    for look in (store.read_instance, worklist.study, worklist.instance, worklist.study_of, worklist.heatmap):
        with pytest.raises(StoreError, match=r"store\.missing"):
            look(99)
    with pytest.raises(StoreError, match=r"model\.unknown"):
        store.model("x")


def test_disk_reserve_refuses_before_anything_is_written(settings: Settings) -> None:
    tight = Store(settings.model_copy(update={"disk_reserve_bytes": 1 << 60}))
    with pytest.raises(StoreError, match=r"ingest\.disk_full"):
        add_scan(tight)
    assert Worklist(tight).count() == 0
    assert not [path for path in (settings.data_dir / "content").rglob("*") if path.is_file()]


FILL = """
import sys, time
from pathlib import Path
from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.store.store import Store
from tests.support.stored_scans import add_scan
box = Path(sys.argv[1])
store = Store(Settings.parse({"data_dir": box, "disk_reserve_bytes": 0}))
add_scan(store, 1)
# Fill the disk but for a few blocks, then send scans until one is refused; make room again and send that one again.
ballast = open(box / "ballast", "wb", buffering=0)
try:
    while ballast.write(bytes(4096)): pass
except OSError:
    ballast.truncate(ballast.tell() - int(sys.argv[2]))
number = 1
try:
    while number < 1000:
        number += 1
        add_scan(store, number)
except StoreError as error:
    print(error.code)
ballast.close()
(box / "ballast").unlink()
stored = [row["sop_instance_uid"] for row in store.database.query("SELECT sop_instance_uid FROM instances ORDER BY id")]
print(stored == [f"1.{n}" for n in range(1, number)], store.read_instance(1) == b"DICM" * 100)
print(len(list((box / "incoming").glob("*.part"))), add_scan(store, number).outcome, store.database.verify_audit() == number)
"""


@pytest.mark.parametrize("room_bytes", [0, 4096, 20_000, 60_000])
def test_disk_full_at_any_write_keeps_nothing_half_written(tmp_path: Path, room_bytes: int) -> None:
    """A real file system of 4 MiB that fills up: the scan file, the database's log or its checkpoint is what does not fit."""
    script = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1" "$4"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, FILL, str(room_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("this kernel lets no user mount a file system of its own")
    assert done.stdout.split() == ["ingest.disk_full", "True", "True", "0", "stored", "True"], done.stderr


def test_planning_one_job_per_image_and_model_however_often(store: Store) -> None:
    put_model(store)
    stored = [add_scan(store, number) for number in range(3)]
    assert store.planner.close_series([stored[0].series_id]) == 3
    assert store.planner.close_series([stored[0].series_id]) == 0
    assert store.queue.pending_jobs() == 3


def test_a_late_image_of_a_closed_series_is_planned_too(store: Store) -> None:
    put_model(store)
    store.planner.close_series([add_scan(store, 1).series_id])
    assert store.planner.close_series([add_scan(store, 2).series_id]) == 1


def test_idle_series_are_planned_without_anybody_saying_so(settings: Settings) -> None:
    store = Store(settings.model_copy(update={"series_idle_s": 0.05}))
    add_scan(store)
    assert store.planner.close_idle_series() == 0
    time.sleep(0.1)
    assert store.planner.close_idle_series() == 1
    assert store.planner.close_idle_series() == 0


def test_a_series_from_the_future_is_not_kept_waiting(store: Store) -> None:
    """The clock was set back after the image came: the series must not wait for years."""
    add_scan(store)
    with store.database.transaction() as tx:
        tx.execute("UPDATE series SET last_received_at = ?", (time.time() + 1e6,))
    assert store.planner.close_idle_series() == 1


def claimed(store: Store, owner: str = "w", lease_s: float = 60.0) -> Job:
    """Claim a job that must be there."""
    job = store.queue.claim_job(owner, lease_s)
    assert job is not None
    return job


def test_job_from_claim_to_finding(store: Store) -> None:
    put_model(store)
    stored = add_scan(store)
    store.planner.close_series([stored.series_id])
    worklist = Worklist(store)
    assert worklist.page()[0].position == 1
    job = claimed(store)
    assert worklist.page()[0].state is ScanState.RUNNING
    assert store.queue.claim_job("w", 60) is None
    assert store.queue.finish_job(
        job, JobResult(ScanState.AI_READY, None, (FINDING,), (Note("caution.age_unknown"),), {"infer": 1.0}, {"name": "x"})
    )
    store.queue.record_store_time(job, {"infer": 1.0, "store": 2.0})
    view = worklist.study(stored.study_id)
    assert view.row.state is ScanState.AI_READY
    assert view.row.positive == (("肺炎", "Pneumonia", 0.9),)
    finding = view.instances[0].findings[0]
    assert replace(finding, id=0, job_id=0, heatmap_png=b"png") == FINDING
    assert worklist.heatmap(finding.id) == b"png"
    assert view.instances[0].jobs[0].timing_ms["store"] == 2.0
    assert view.instances[0].jobs[0].notes == (Note("caution.age_unknown"),)
    assert not store.queue.finish_job(job, JobResult(ScanState.AI_READY, None, (FINDING,)))


def test_nothing_is_kept_of_a_job_whose_lease_was_lost(store: Store) -> None:
    put_model(store)
    store.planner.close_series([add_scan(store).series_id])
    slow = claimed(store, "slow", -1.0)
    quick = claimed(store, "quick")
    assert quick.id == slow.id
    assert not store.queue.finish_job(slow, JobResult(ScanState.AI_READY, None, (FINDING,)))
    store.queue.fail_job(slow, Note("job.error"))
    assert store.queue.finish_job(quick, JobResult(ScanState.AI_READY, None, (FINDING,)))
    assert len(Worklist(store).instance(1).findings) == 1


def test_a_job_that_keeps_failing_is_poisoned_and_the_next_goes_on(store: Store) -> None:
    put_model(store)
    store.planner.close_series([add_scan(store, 1).series_id])
    store.planner.close_series([add_scan(store, 2).series_id])
    seen = []
    for _ in range(6):
        job = store.queue.claim_job("w", 60)
        if job is None:
            break
        seen.append(job.instance_id)
        if job.instance_id == 1:
            store.queue.fail_job(job, Note("job.error", "ValueError"))
        else:
            store.queue.finish_job(job, JobResult(ScanState.AI_READY, None, (FINDING,)))
    assert seen == [1, 1, 1, 2]
    view = Worklist(store).instance(1)
    assert (view.state, view.reason, view.status) == (ScanState.FAILED, Note("job.error", "ValueError"), "failed")
    assert store.queue.retry(1, "demo")
    assert not store.queue.retry(2, "demo")
    assert Worklist(store).instance(1).state is ScanState.QUEUED
    assert claimed(store).attempts == 1


def test_recovery_tells_a_deadline_from_a_crash(settings: Settings) -> None:
    store = Store(settings.model_copy(update={"job_deadline_s": 0.05, "job_max_attempts": 1}))
    put_model(store)
    for number, wait_s in ((1, 0.0), (2, 0.1)):
        store.planner.close_series([add_scan(store, number).series_id])
        claimed(store)
        time.sleep(wait_s)
        assert store.queue.recover_jobs() == 1
    assert store.queue.recover_jobs() == 0
    reasons = [view.reason.code for view in Worklist(store).study(1).instances if view.reason]
    assert reasons == ["job.crashed", "job.deadline"]


def test_search_and_pages(store: Store) -> None:
    for number in range(5):
        image = scan(sop_instance_uid=f"1.{number}", study_instance_uid=f"2.{number}", patient=Patient(f"ID_{number}", f"张^{number}"))
        store.add_instance(image, f"{number:064x}".__str__, b"x", SOURCE, time.perf_counter())
    worklist = Worklist(store)
    assert [row.id for row in worklist.page(limit=2)] == [5, 4]
    assert [row.id for row in worklist.page(before=4, limit=2)] == [3, 2]
    assert [row.patient_id for row in worklist.page(search="张^3")] == ["ID_3"]
    assert [row.patient_id for row in worklist.page(search="D_3")] == ["ID_3"]
    assert worklist.page(search="%") == []
    assert [row.id for row in worklist.page(search="_", before=3)] == [2, 1]  # searched literally, on a further page
    assert worklist.page(search="'; DROP TABLE studies; --") == []
    assert [row.id for row in worklist.page() if row.revision == worklist.revision()] == [5]
    assert worklist.queue_length() == 0


def test_refusals_are_listed(store: Store) -> None:
    store.add_rejection(SOURCE, 12, "ingest.not_dicom", "x")
    assert [(row["name"], row["code"]) for row in Worklist(store).rejections()] == [("a.dcm", "ingest.not_dicom")]


def test_r10_audit_chain_finds_any_edit_or_deletion(store: Store) -> None:
    for number in range(5):
        store.record(APPLICATION_ACTIVITY, "t", "E", f"x:{number}")
    assert store.database.verify_audit() == 5
    with pytest.raises(StoreError, match="append-only"), store.database.transaction() as tx:
        tx.execute("UPDATE audit SET entry = '{}' WHERE seq = 2")
    with pytest.raises(StoreError, match="append-only"), store.database.transaction() as tx:
        tx.execute("DELETE FROM audit WHERE seq = 5")


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE audit SET entry = replace(entry, 'x:2', 'x:9')",
        "DELETE FROM audit WHERE seq = 3",
        "DELETE FROM audit WHERE seq > 3",
        "DELETE FROM audit",
        "DELETE FROM meta WHERE key = 'audit_head'",
    ],
)
def test_r10_somebody_with_the_file_and_without_our_rules_is_found_out(store: Store, damage: str) -> None:
    for number in range(5):
        store.record(APPLICATION_ACTIVITY, "t", "E", f"x:{number}")
    with closing(raw_connection(store.settings.data_dir)) as raw:
        raw.execute("DROP TRIGGER audit_no_update")
        raw.execute("DROP TRIGGER audit_no_delete")
        raw.execute(damage)
    with pytest.raises(StoreError, match=r"audit\.broken"):
        store.database.verify_audit()


def test_two_senders_of_one_scan_never_replace_what_was_acknowledged(store: Store, settings: Settings) -> None:
    first = store.content.write(b"one", lambda: "a" * 64)
    again = store.content.write(b"one", lambda: "a" * 64)
    assert first == again
    assert store.content.read(first) == b"one"
    (settings.data_dir / "content" / "aa" / ("a" * 64)).write_bytes(b"damaged")
    store.content.write(b"one", lambda: "a" * 64)
    assert store.content.read(first) == b"one"


def test_a_lost_file_comes_back_when_the_scan_is_sent_again(store: Store, settings: Settings) -> None:
    stored = add_scan(store)
    (settings.data_dir / "content" / "00" / f"{1:064x}").unlink()
    assert add_scan(store).outcome == "duplicate"
    assert store.read_instance(stored.instance_id) == b"DICM" * 100


def test_sweeping_leaves_what_another_process_is_writing(store: Store, settings: Settings) -> None:
    young, old = (settings.data_dir / "incoming" / name for name in ("young.part", "old.part"))
    for path in (young, old):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert store.content.sweep() == 1
    assert young.exists()


def test_a_model_that_comes_later_reads_what_waited_for_one(store: Store) -> None:
    stored = add_scan(store)
    store.planner.close_series([stored.series_id])
    store.queue.finish_job(claimed(store), JobResult(ScanState.NOT_ANALYSED, Note("scope.no_model")))
    put_model(store)
    assert Worklist(store).instance(stored.instance_id).state is ScanState.WAITING
    store.planner.close_series([stored.series_id])
    assert claimed(store).model_digest == "d" * 64


@pytest.mark.parametrize("other", [Patient("0", "李^四", "19700101"), Patient("0", "张^三", "19800101")])
def test_one_id_for_everybody_does_not_mix_patients(store: Store, other: Patient) -> None:
    one = add_scan(store, 1, patient=Patient("0", "张^三", "19700101"))
    same = add_scan(store, 2, patient=Patient("0", "张三", "19700101"))
    two = add_scan(store, 3, patient=other)
    assert one.study_id == same.study_id != two.study_id


def test_change_and_audit_entry_share_one_transaction(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise sqlcipher.OperationalError("no audit")

    monkeypatch.setattr(Database, "audit", staticmethod(broken))
    with pytest.raises(StoreError):
        add_scan(store)
    monkeypatch.undo()
    assert Worklist(store).count() == 0
    assert add_scan(store).outcome == "stored"


def test_a_newer_database_is_refused(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite3"
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 999")
    raw.close()
    with pytest.raises(StoreError, match="newer"):
        Database(path, b"key", TEST_KEY)


def test_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "junk.sqlite3"
    path.write_bytes(b"junk" * 1000)
    with pytest.raises(StoreError, match=r"store\.failed"):
        Database(path, b"key", TEST_KEY)


def test_migrations_are_numbered_in_order() -> None:
    numbers = [number for number, _ in database.migrations()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_no_memory_before_the_model_ran_gets_its_own_code(tmp_path: Path) -> None:
    """Migration 5: ``job.memory`` had two meanings, which only its detail told apart."""
    raw = old_database(tmp_path / "old.sqlite3", 4)
    raw.execute("INSERT INTO studies VALUES (1, '1.1', 'k', '', '', '', '', NULL, '', '', '', '', '', 0, 1, NULL, NULL)")
    raw.execute("INSERT INTO series VALUES (1, 1, '1', 'CR', '', 0, 0)")
    before, during = '{"code": "job.memory", "detail": "before the model"}', '{"code": "job.memory", "detail": ""}'
    other = '{"code": "job.crashed", "detail": ""}'
    for number, reason in enumerate((before, during, other, None), start=1):
        raw.execute(
            "INSERT INTO instances VALUES"
            " (?, 1, ?, '1', '1', ?, 1, 'CR', '', '', 1, 1, 1, NULL, 'cli', '', '', 0, 'failed', ?, '[]', 0, '')",
            (number, f"1.{number}", str(number), reason),
        )
        raw.execute(
            "INSERT INTO jobs (kind, instance_id, model_digest, state, created_at, notes, reason)"
            " VALUES ('infer', ?, '', 'failed', '', '[]', ?)",
            (number, reason),
        )
    raw.commit()
    raw.close()
    migrated = Database(tmp_path / "old.sqlite3", b"key", TEST_KEY)
    for query in ("SELECT reason FROM jobs ORDER BY id", "SELECT reason FROM instances ORDER BY id"):
        reasons = [Note.parse(row["reason"]) for row in migrated.query(query)]
        assert reasons == [Note("job.memory_input"), Note("job.memory"), Note("job.crashed"), None]
    migrated.close()


def test_nothing_was_decided_about_the_images_of_an_older_version(tmp_path: Path) -> None:
    """Migration 6: a person's decision about an image that the input check doubts."""
    raw = old_database(tmp_path / "old.sqlite3", 5)
    raw.execute("INSERT INTO studies VALUES (1, '1.1', 'k', '', '', '', '', NULL, '', '', '', '', '', 0, 1, NULL, NULL)")
    raw.execute("INSERT INTO series VALUES (1, 1, '1', 'CR', '', 0, 0)")
    raw.execute(
        "INSERT INTO instances VALUES (1, 1, '1.1', '1', '1', '1', 1, 'CR', '', '', 1, 1, 1, NULL, 'cli', '', '', 0, 'failed', NULL,"
        " '[]', 0, '')"
    )
    raw.commit()
    raw.close()
    migrated = Database(tmp_path / "old.sqlite3", b"key", TEST_KEY)
    assert [row["correction"] for row in migrated.query("SELECT correction FROM instances")] == [""]
    migrated.close()


def test_findings_of_older_versions_stay_readable_and_their_accuracy_is_not_verified(settings: Settings) -> None:
    """Migration 7: until then nobody compared the gate record with the weights and the threshold."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    raw = old_database(settings.data_dir / "box.sqlite3", 6)
    raw.execute("INSERT INTO studies VALUES (1, '1.1', 'k', '', '', '', '', NULL, '', '', '', '', '', 0, 1, NULL, NULL)")
    raw.execute("INSERT INTO series VALUES (1, 1, '1', 'CR', '', 0, 0)")
    raw.execute(
        "INSERT INTO instances VALUES (1, 1, '1.1', '1', '1', '1', 1, 'CR', '', '', 1, 1, 1, NULL, 'cli', '', '', 0, 'ai_ready', NULL,"
        " '[]', 0, '', '')"
    )
    raw.execute("INSERT INTO jobs (kind, instance_id, model_digest, state, created_at, notes) VALUES ('infer', 1, 'd', 'done', '', '[]')")
    raw.execute(
        "INSERT INTO findings VALUES (1, 1, 1, 'pneumonia', 'SCT:233604007', '肺炎', 'Pneumonia', 0.9, 0.4, 1,"
        " '[0.95, 0.93, 0.97]', '[0.8, 0.7, 0.9]', 'x', 'm', '1.0.0', 'd', 'fp32', 'onnxruntime', NULL, '[]', x'00')"
    )
    raw.commit()
    raw.close()
    store = Store(settings)
    (finding,) = Worklist(store).instance(1).findings
    assert (finding.sensitivity, finding.has_verified_accuracy) == ((0.95, 0.93, 0.97), False)
    assert finding.to_json()["sensitivity"] is None
    store.close()


def test_findings_of_an_older_version_keep_their_outline(tmp_path: Path) -> None:
    """The migration adds contours inside the outline: a finding that has none stays as it is."""
    number = next(number for number, statements in database.migrations() if any("inner_contours" in text for text in statements))
    raw = old_database(tmp_path / "old.sqlite3", number - 1)
    raw.execute("PRAGMA foreign_keys = OFF")
    raw.execute(
        "INSERT INTO findings (job_id, instance_id, label, code, title_zh, title_en, score, threshold, positive, sensitivity, specificity,"
        " measured_on, model, model_version, model_digest, precision, runtime, peak, outline, heatmap_png)"
        " VALUES (1, 1, 'pneumonia', '', '', '', 0.9, 0.5, 1, '[]', '[]', '', '', '', '', '', '', '[1, 2]', '[[[0, 0], [1, 0]]]', x'')"
    )
    raw.commit()
    raw.close()
    migrated = Database(tmp_path / "old.sqlite3", b"key", TEST_KEY)
    row = migrated.query("SELECT outline, inner_contours FROM findings")[0]
    assert (row["outline"], row["inner_contours"]) == ("[[[0, 0], [1, 0]]]", "[]")
    migrated.close()


@pytest.mark.parametrize(
    ("age", "basis"), [(4.0, AccuracyBasis.MIXED), (72.0, AccuracyBasis.NOT_MEASURED), (None, AccuracyBasis.AGE_UNKNOWN)]
)
def test_a_finding_of_an_earlier_version_is_read_with_the_accuracy_that_applies(
    tmp_path: Path, age: float | None, basis: AccuracyBasis
) -> None:
    """Migration 10: an old row has no accuracy; the stored manifest and the patient's age say which figures apply."""
    raw = old_database(tmp_path / DATABASE_NAME, 5)
    manifest = (ROOT / "appliance" / "bundles" / "cxr-pneumonia" / "manifest.json").read_text("utf-8")
    points = [point | {"groups": []} for point in json.loads(manifest)["operating_points"]]
    manifest = json.dumps(json.loads(manifest) | {"operating_points": points})
    raw.execute("INSERT INTO studies VALUES (1, '1.1', 'k', '', '', '', '', ?, '', '', '', '', '', 0, 1, NULL, NULL)", (age,))
    raw.execute("INSERT INTO series VALUES (1, 1, '1', 'CR', '', 0, 0)")
    raw.execute(
        "INSERT INTO instances VALUES"
        " (1, 1, '1.1', '1', '1', 'f', 1, 'CR', '', '', 1, 1, 1, ?, 'cli', '', '', 0, 'ai_ready', NULL, '[]', 0, '')",
        (age,),
    )
    raw.execute("INSERT INTO models VALUES ('d', 'm', '1.0.0', 'x', ?, 'fp32', 'onnxruntime', 'active', '{}', '')", (manifest,))
    raw.execute(
        "INSERT INTO jobs (id, kind, instance_id, model_digest, state, created_at, notes) VALUES (1, 'infer', 1, 'd', 'done', '', '[]')"
    )
    raw.execute(
        "INSERT INTO findings VALUES (1, 1, 1, 'pneumonia', 'c', '肺炎', 'Pneumonia', 0.9, 0.4, 1, '[0.95, 0.93, 0.97]', '[0.8, 0.7, 0.9]',"
        " 'x', 'm', '1.0.0', 'd', 'fp32', 'onnxruntime', NULL, '[]', x'')"
    )
    raw.commit()
    raw.close()
    store = Store(Settings.parse({"data_dir": tmp_path}))
    (finding,) = Worklist(store).instance(1).findings
    store.close()
    assert finding.accuracy.basis is basis
    assert finding.sensitivity == (0.95, 0.93, 0.97)
    assert finding.own_rates == (None, None)  # never verified either
    rates = replace(finding, has_verified_accuracy=True).own_rates
    assert rates == ((finding.sensitivity, finding.specificity) if age == 4.0 else (None, None))


def test_the_accuracy_of_a_finding_is_stored_with_it(store: Store) -> None:
    group = Group(
        population="adult", min_years=18, max_years=120, sources=["A"], n_positive=1, n_negative=0,
        sensitivity=Interval(value=1, low=0.2, high=1), specificity=None,
    )  # fmt: skip
    accuracy = Accuracy(basis=AccuracyBasis.GROUP, group=group)
    put_model(store)
    stored = add_scan(store, patient_age_years=72.0)
    store.planner.close_series([stored.series_id])
    job = store.queue.claim_job("w", 60)
    assert job is not None
    assert job.patient_age_years == 72.0
    assert store.queue.finish_job(
        job, JobResult(ScanState.AI_READY, None, (replace(FINDING, accuracy=accuracy, has_verified_accuracy=True),))
    )
    (finding,) = Worklist(store).instance(stored.instance_id).findings
    assert finding.accuracy == accuracy
    assert finding.own_rates == ((1, 0.2, 1), None)


def test_a_bad_query_is_a_store_error(store: Store) -> None:
    with pytest.raises(StoreError):
        store.database.query("SELECT * FROM nothing")


def test_a_data_dir_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        Store(Settings.parse({"data_dir": tmp_path / "file" / "box"}))


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, claims, results, failures, lost leases and restarts: each image ends with one finding per model."""

    jobs: Bundle[Job] = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Settings.parse({"data_dir": self.folder.name, "disk_reserve_bytes": 0, "job_max_attempts": 1000}))
        put_model(self.store)
        self.images = 0

    @rule(again=st.booleans())
    def arrive(self, again: bool) -> None:
        self.images += 0 if again and self.images else 1
        self.store.planner.close_series([add_scan(self.store, self.images).series_id])

    @rule(target=jobs)
    def claim(self) -> Any:
        return self.store.queue.claim_job("w", 60)

    @rule(target=jobs)
    def claim_with_a_lease_that_is_over(self) -> Any:
        return self.store.queue.claim_job("w", -1)

    @rule(job=jobs)
    def finish(self, job: Job | None) -> None:
        if job:
            self.store.queue.finish_job(job, JobResult(ScanState.AI_READY, None, (FINDING,)))

    @rule(job=consumes(jobs))
    def fail(self, job: Job | None) -> None:
        if job:
            self.store.queue.fail_job(job, Note("job.error"))

    @rule()
    def restart(self) -> None:
        self.store.queue.recover_jobs()

    @invariant()
    def never_two_findings(self) -> None:
        assert not self.store.database.query("SELECT 1 FROM findings GROUP BY instance_id, model_digest HAVING count(*) > 1")

    def teardown(self) -> None:
        self.store.queue.recover_jobs()
        while job := self.store.queue.claim_job("last", 60):
            assert self.store.queue.finish_job(job, JobResult(ScanState.AI_READY, None, (FINDING,)))
        rows = self.store.database.query("SELECT count(*) AS n FROM findings")
        assert rows[0]["n"] == self.images
        self.store.database.verify_audit()
        self.store.close()
        self.folder.cleanup()


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = hypothesis_settings(max_examples=15, stateful_step_count=20, deadline=None)


def test_a_store_that_nobody_holds_leaves_no_file_open(settings: Settings) -> None:
    def open_files() -> int:
        return sum(file.path.startswith(str(settings.data_dir)) for file in psutil.Process().open_files())

    for _ in range(5):
        assert Store(settings).queue.pending_jobs() == 0
    gc.collect()
    assert open_files() == 0
