"""Several scans of one model read at once where that is faster: the same results, STAT first, nobody pays for another's fault."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from appliance.core.domain import JobKind, ScanState, Source
from appliance.imaging.pixels import decode_frame
from appliance.imaging.preprocessing import to_tensor
from appliance.inference.worker import Worker
from appliance.ingest.ingest import Ingest
from appliance.lifecycle.model_control import reference_bundle
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequests
from appliance.store.worklist import Worklist
from tests.support import activation_box
from tests.support.activated import activate
from tests.support.activation_box import _constant, end_workers, finish_with, looping, rewire, worker, write_settings
from tests.support.library_site import tiny_bundle
from tests.support.scans import scan_bytes
from tests.support.worker_box import prepared_worker, small_chest, take


def in_batches(store: Store, digest: str, size: int) -> None:
    """Have a model run in batches, as a measuring would that found it faster."""
    tunings, report = TuningRequests(store.database), json.loads(store.model(digest)["self_test"])
    report["choice"] |= {"batch": size}
    tunings.done(tunings.ask(digest, "cxr-pneumonia", "test"), report | {"reason": {"code": "choice.measured", "detail": ""}})


def together(store: Store, image: int) -> int:
    """How many images the model read at once when it read this one."""
    (job,) = (job for job in Worklist(store).instance(image).jobs if job.model_digest)
    return int(job.runtime.get("together", 1))


def order(store: Store) -> list[int]:
    """Images in the order their jobs were done."""
    rows = store.database.query("SELECT entry FROM audit ORDER BY seq")
    entries = [json.loads(row["entry"]) for row in rows]
    done = [int(item["object"].removeprefix("job:")) for item in entries if "outcome_state" in item["detail"]]
    images = {row["id"]: row["instance_id"] for row in store.database.query("SELECT id, instance_id FROM jobs")}
    return [images[number] for number in done]


@pytest.fixture
def tiny(tmp_path: Path, store: Store) -> str:
    """A small model at work in batches of four; its digest."""
    digest = activate(store, tiny_bundle(tmp_path / "bundles", "1.0.0"), "test")
    in_batches(store, digest, 4)
    return digest


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    """Also after a failure."""
    yield
    end_workers()


def test_a_batch_says_what_each_image_says_alone(store: Store) -> None:
    digest = activate(store, reference_bundle(), "test")
    scans = [small_chest(seed) for seed in range(6)]
    first = take(store, scans[0])
    assert prepared_worker(store).run_once()
    alone = Worklist(store).instance(first).findings[0]
    in_batches(store, digest, 4)
    rest = [take(store, data) for data in scans[1:]]
    again = prepared_worker(store)
    assert again.run_once()
    assert [together(store, image) for image in rest[:4]] == [4] * 4
    assert not Worklist(store).instance(rest[4]).findings
    assert again.run_once()
    assert together(store, rest[4]) == 1
    single = reader_of_one(store, digest)
    spec = single.manifest.image_input
    for image, data in zip(rest, scans[1:], strict=True):
        made = pydicom.dcmread(BytesIO(data))
        outputs = single.runtime.infer({spec.name: to_tensor(made, spec, pixels=decode_frame(made, 0)).tensor})
        (finding,) = Worklist(store).instance(image).findings
        assert abs(finding.score - float(outputs["probability"][0, 0])) < 1e-5
        assert finding.runtime == alone.runtime
        assert finding.peak
        job = Worklist(store).instance(image).jobs[0]
        assert set(job.timing_ms) == {"decode", "preprocess", "input_check", "infer", "postprocess", "store", "total"}
        assert job.runtime["reason"]["code"] == "choice.measured"


def reader_of_one(store: Store, digest: str) -> Any:
    """The model as it runs without batches."""
    from appliance.inference.model_session import ModelSession
    from appliance.tuning.selection import Plan

    return ModelSession(store.settings, digest, Plan("fp32"))


def test_stat_goes_before_the_queue_alone_and_keeps_no_company(store: Store, tiny: str) -> None:
    images = [take(store, small_chest(seed)) for seed in range(6)]
    study = Worklist(store).study_of(images[4])
    assert store.queue.make_urgent(study, "demo") == 1
    assert store.queue.make_urgent(study, "demo") == 0
    made = prepared_worker(store)
    assert made.run_once()
    assert order(store) == [images[4]]
    assert together(store, images[4]) == 1
    assert made.run_once()
    assert order(store)[1:] == [images[number] for number in (0, 1, 2, 3)]


def test_stat_that_comes_in_the_middle_of_a_batch_does_not_wait_for_its_end(store: Store, tiny: str) -> None:
    steps = 0
    urgent: list[int] = []

    def comes(seconds: float) -> None:
        nonlocal steps
        steps += bool(seconds)
        if steps == 3 and not urgent:  # the third image of the batch is being decoded
            urgent.append(take(store, small_chest(9)))
            store.queue.make_urgent(Worklist(store).study_of(urgent[0]), "demo")

    images = [take(store, small_chest(seed)) for seed in range(4)]
    assert prepared_worker(store, comes).run_once()
    assert order(store) == [*urgent, *images]
    assert together(store, urgent[0]) == 1
    assert [together(store, image) for image in images] == [4] * 4


def test_stat_of_a_sender_that_keeps_its_association_open_does_not_wait_for_the_batch_either(store: Store, tiny: str) -> None:
    """Nobody says that its series is complete; it has been silent for long enough when the batch is under way."""
    steps = 0
    stat: list[int] = []

    def comes(seconds: float) -> None:
        nonlocal steps
        steps += bool(seconds)
        if steps == 3 and not stat:
            made = pydicom.dcmread(BytesIO(small_chest(9)))
            made.RequestedProcedurePriority = "STAT"
            buffer = BytesIO()
            made.save_as(buffer, enforce_file_format=True)
            stat.append(Ingest(store).accept(buffer.getvalue(), Source("dimse", "ER_CR")).stored.instance_id)
            with store.database.transaction() as tx:
                tx.execute("UPDATE series SET last_received_at = last_received_at - 1000 WHERE open = 1")

    images = [take(store, small_chest(seed)) for seed in range(4)]
    assert prepared_worker(store, comes).run_once()
    assert order(store) == [*stat, *images]
    assert [together(store, image) for image in [*stat, *images]] == [1, 4, 4, 4, 4]


def test_a_sender_that_marks_everything_has_everything_read_in_its_order(store: Store, tiny: str) -> None:
    images = []
    for seed in range(6):
        made = pydicom.dcmread(BytesIO(small_chest(seed)))
        made.RequestedProcedurePriority = "STAT"
        buffer = BytesIO()
        made.save_as(buffer, enforce_file_format=True)
        images.append(take(store, buffer.getvalue()))
    made_reader = prepared_worker(store)
    while made_reader.run_once():
        pass
    assert order(store) == images
    assert [Worklist(store).instance(image).state for image in images] == [ScanState.AI_READY] * 6


def test_an_image_of_the_batch_that_becomes_urgent_before_its_turn_is_brought_forward(store: Store, tiny: str) -> None:
    images = [take(store, small_chest(seed)) for seed in range(4)]
    said: list[int] = []
    steps = 0

    def comes(seconds: float) -> None:
        nonlocal steps
        steps += bool(seconds)
        if steps == 1 and not said:  # the first image of the batch is being decoded, the last is leased and waits
            said.append(store.queue.make_urgent(Worklist(store).study_of(images[3]), "demo"))

    assert prepared_worker(store, comes).run_once()
    assert said == [1]
    assert order(store) == [images[3], *images[:3]]
    assert [together(store, image) for image in images] == [3, 3, 3, 1]
    assert {row["attempts"] for row in store.database.query("SELECT attempts FROM jobs")} == {1}


@pytest.mark.parametrize("step", [2, 4, 5, 6])
def test_one_that_becomes_urgent_when_it_is_prepared_or_answered_comes_next(store: Store, tiny: str, step: int) -> None:
    """Two is the decoding of the second image, five the model, six the first result."""
    images = [take(store, small_chest(seed)) for seed in range(4)]
    steps = 0

    def comes(seconds: float) -> None:
        nonlocal steps
        steps += bool(seconds)
        if seconds and steps == step:
            assert store.queue.make_urgent(Worklist(store).study_of(images[1]), "demo") == 1

    assert prepared_worker(store, comes).run_once()
    assert order(store) == ([images[1], images[0], *images[2:]] if step < 6 else images)
    assert together(store, images[1]) == (1 if step < 5 else 4)
    assert [Worklist(store).instance(image).state for image in images] == [ScanState.AI_READY] * 4


def test_an_urgent_one_that_cannot_be_decoded_costs_the_batch_nothing(store: Store, tiny: str) -> None:
    images = [take(store, small_chest(seed)) for seed in range(3)]
    blank = take(store, scan_bytes(Rows=600, Columns=600, PixelData=bytes(2 * 600 * 600)))
    asked: list[int] = []

    def comes(seconds: float) -> None:
        if seconds and not asked:
            asked.append(store.queue.make_urgent(Worklist(store).study_of(blank), "demo"))

    assert prepared_worker(store, comes).run_once()
    assert asked == [1]
    assert order(store) == [blank, *images]
    assert [together(store, image) for image in images] == [3] * 3


def stat(seed: int) -> bytes:
    """A phantom whose sender says STAT."""
    made, buffer = pydicom.dcmread(BytesIO(small_chest(seed))), BytesIO()
    made.RequestedProcedurePriority = "STAT"
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def untouched(store: Store, images: list[int]) -> bool:
    """Whether these are in the queue as if nobody had ever taken them."""
    rows = store.database.query("SELECT * FROM jobs WHERE instance_id IN (SELECT value FROM json_each(?))", json.dumps(images))
    states = [Worklist(store).instance(image).state for image in images]
    told = [(row["state"], row["attempts"], row["reason"], row["lease_owner"]) for row in rows]
    return told == [("queued", 0, None, "")] * len(images) and states == [ScanState.QUEUED] * len(images)


def test_a_batch_gives_way_to_a_burst_and_all_of_it_is_read_afterwards(store: Store, tiny: str) -> None:
    """What the worker does between two jobs cannot wait for the end of a burst."""
    images = [take(store, small_chest(seed)) for seed in range(4)]
    burst: list[int] = []

    def comes(seconds: float) -> None:
        if seconds and not burst:
            burst.extend(take(store, stat(100 + number)) for number in range(10))

    made = prepared_worker(store, comes)
    assert made.run_once()
    assert order(store) == burst[:4]
    assert untouched(store, images)
    while made.run_once():
        pass
    assert order(store) == [*burst, *images]
    assert [together(store, image) for image in images] == [4] * 4
    assert {row["attempts"] for row in store.database.query("SELECT attempts FROM jobs")} == {1}


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_worker_that_is_to_stop_gives_the_batch_back(store: Store, tiny: str, at: int) -> None:
    """One is the decoding of the first image, three that of the second of the burst, five that of the second of the batch."""
    images = [take(store, small_chest(seed)) for seed in range(4)]
    burst: list[int] = []
    steps: list[float] = []

    def comes(seconds: float) -> None:
        if not seconds:
            return
        steps.append(seconds)
        if len(steps) == 1:
            burst.extend(take(store, stat(100 + number)) for number in range(3))

    made = Worker(store, comes, is_stopping=lambda: len(steps) >= at)
    made.prepare()
    assert made.run_once()
    assert len(steps) == at
    assert order(store) == burst[: at - 1]
    assert untouched(store, images)


def test_a_version_that_is_withdrawn_in_the_middle_of_a_burst_reads_nothing_more(tmp_path: Path, store: Store) -> None:
    box = activation_box.Box(tmp_path, store)
    in_batches(store, box.first(), 4)
    images = [take(store, small_chest(seed)) for seed in range(4)]
    burst: list[int] = []
    steps: list[float] = []

    def comes(seconds: float) -> None:
        if not seconds:
            return
        steps.append(seconds)
        if len(steps) == 1:
            burst.extend(take(store, stat(100 + number)) for number in range(6))
        if len(steps) == 3:  # the second of the burst is being read
            box.journal.record_restrictions("cxr-pneumonia", "9.0.0", {"1.0.0": "x"})

    made = prepared_worker(store, comes)
    assert made.run_once()
    assert order(store) == burst[:2]
    assert untouched(store, images)
    assert not made.run_once()  # what waits for it waits for whoever takes over
    while made.activator.held:
        made.activator.tick()
    assert {Worklist(store).instance(image).state for image in (*images, *burst[2:])} == {ScanState.NOT_ANALYSED}


def test_a_lost_lease_is_not_given_back(store: Store, tiny: str) -> None:
    image = take(store, small_chest())
    first = store.queue.claim_job("first", -1.0)
    second = store.queue.claim_job("second", 60)
    assert first
    assert second
    store.queue.return_jobs([first])
    assert Worklist(store).instance(image).state is ScanState.RUNNING
    store.queue.return_jobs([second])
    assert Worklist(store).instance(image).state is ScanState.QUEUED


def of_study(number: int, patient: str = "U") -> bytes:
    """One more image, in a series of its own, of a study that others belong to."""
    return scan_bytes(SOPInstanceUID=f"1.9.{number}", SeriesInstanceUID=f"1.9.1{number}", StudyInstanceUID="1.9.100", PatientID=patient)


def test_images_of_an_urgent_study_that_come_later_are_urgent_too(store: Store, tiny: str) -> None:
    waiting = [take(store, small_chest(seed)) for seed in range(3)]
    first = take(store, of_study(1))
    assert store.queue.make_urgent(Worklist(store).study_of(first), "demo") == 1
    made = prepared_worker(store)
    assert made.run_once()
    assert order(store) == [first]
    later = [take(store, of_study(2)), take(store, of_study(3))]
    stranger = take(store, of_study(4, patient="V"))  # the same Study Instance UID by mistake: another patient's
    while made.run_once():
        pass
    assert order(store)[:3] == [first, *later]
    assert set(order(store)[3:]) == {*waiting, stranger}


def test_a_study_that_was_read_already_makes_what_comes_urgent_and_says_that_nothing_waits(store: Store, tiny: str) -> None:
    first = take(store, of_study(1))
    made = prepared_worker(store)
    assert made.run_once()
    assert store.queue.make_urgent(Worklist(store).study_of(first), "demo") == 0
    take(store, small_chest())
    later = take(store, of_study(2))
    assert made.run_once()
    assert order(store) == [first, later]


def test_while_stat_waits_nobody_gathers_company(store: Store, tiny: str) -> None:
    images = [take(store, small_chest(seed)) for seed in range(3)]
    job = store.queue.claim_job("test", 60)
    assert job is not None
    store.queue.make_urgent(Worklist(store).study_of(images[2]), "demo")
    assert store.queue.claim_batch(job, 3, 60) == []
    assert store.queue.claim_job("test", 60, urgent=True)
    assert store.queue.claim_job("test", 60, urgent=True) is None
    assert [item.instance_id for item in store.queue.claim_batch(job, 3, 60)] == [images[1]]


def test_what_was_tried_before_is_read_alone(store: Store, tiny: str) -> None:
    images = [take(store, small_chest(seed)) for seed in range(4)]
    job = store.queue.claim_job("test", -1.0)  # a lease that is over at once: the worker fell
    assert job is not None
    made = prepared_worker(store)
    assert made.run_once()
    assert [together(store, image) for image in order(store)] == [1]
    assert order(store) == [images[0]]
    assert made.run_once()
    assert order(store)[1:] == images[1:]


def test_one_attempt_only_means_no_company(store: Store, tiny: str) -> None:
    """Where a job has but one attempt, who reads it in company could lose it through another's fault."""
    once = Store(store.settings.model_copy(update={"job_max_attempts": 1}))
    for seed in range(3):
        take(once, small_chest(seed))
    job = once.queue.claim_job("test", 60)
    assert job is not None
    assert job.kind is JobKind.INFER
    assert once.queue.claim_batch(job, 3, 60) == []
    once.close()


def test_an_image_that_cannot_be_decoded_costs_the_others_nothing(store: Store, tiny: str) -> None:
    whole = [take(store, small_chest(seed)) for seed in range(2)]
    blank = take(store, scan_bytes(Rows=600, Columns=600, PixelData=bytes(2 * 600 * 600)))
    lost = take(store, small_chest(7))
    row = store.database.one("SELECT content_sha256 FROM instances WHERE id = ?", lost)
    assert row
    (store.settings.data_dir / "content" / row["content_sha256"][:2] / row["content_sha256"]).unlink()
    assert prepared_worker(store).run_once()
    states = [Worklist(store).instance(image).state for image in (*whole, blank, lost)]
    assert states == [ScanState.AI_READY, ScanState.AI_READY, ScanState.QUALITY_REJECTED, ScanState.NOT_ANALYSED]
    assert [together(store, image) for image in whole] == [2, 2]


def breaks_on_dark(bundle: Path, limit: float) -> Path:
    """A model that gives no number for a picture darker than this: in a batch the whole answer is refused."""
    from onnx import helper

    return rewire(
        bundle,
        lambda graph: [
            helper.make_node("ReduceMean", ["image"], ["each"], axes=[1, 2, 3], keepdims=1),
            helper.make_node("Sub", ["each", _constant(graph, "limit", np.float32(limit))], ["above"]),
            helper.make_node("Mul", ["each", "above"], ["empty_passes"]),
            helper.make_node("Sqrt", ["empty_passes"], ["root"]),
            helper.make_node("Sub", ["root", "root"], ["extra"]),
        ],
    )


def test_one_that_breaks_the_model_fails_alone(tmp_path: Path, store: Store) -> None:
    bundle = tiny_bundle(tmp_path / "bundles", "1.0.0")
    digest = activate(store, breaks_on_dark(bundle, 0.33), "test")
    in_batches(store, digest, 4)
    poison = take(store, small_chest(1, columns=120))
    good = [take(store, small_chest(seed)) for seed in range(3)]
    made = prepared_worker(store)
    while made.run_once():
        pass
    worklist = Worklist(store)
    assert worklist.instance(poison).state is ScanState.FAILED
    assert [worklist.instance(image).state for image in good] == [ScanState.AI_READY] * 3
    rows = store.database.query("SELECT attempts FROM jobs WHERE instance_id IN (SELECT value FROM json_each(?))", json.dumps(good))
    assert {row["attempts"] for row in rows} == {1}  # read one by one at once, not after a failure


@pytest.mark.timeout(900)
def test_a_worker_killed_in_the_middle_of_a_batch_gives_every_job_back_once_and_poisons_none(tmp_path: Path, store: Store) -> None:
    settings = write_settings(store.settings, job_max_attempts=2)
    digest = activate(store, looping(tiny_bundle(tmp_path / "bundles", "1.0.0"), picture=600_000), "test")
    in_batches(store, digest, 4)
    images = [take(store, small_chest(seed)) for seed in range(4)]
    process = worker(settings)
    limit = time.monotonic() + 60
    while len(running := store.database.query("SELECT * FROM jobs WHERE state = 'running'")) < 4:
        assert time.monotonic() < limit, running
        time.sleep(0.005)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rows = store.database.query("SELECT state, attempts FROM jobs")
    assert [(row["state"], row["attempts"]) for row in rows] == [("running", 1)] * 4
    assert finish_with(settings) == 0
    worklist = Worklist(store)
    assert [worklist.instance(image).state for image in images] == [ScanState.AI_READY] * 4
    assert [len(worklist.instance(image).findings) for image in images] == [1] * 4
    rows = store.database.query("SELECT state, attempts FROM jobs")
    assert [(row["state"], row["attempts"]) for row in rows] == [("done", 2)] * 4
    assert [together(store, image) for image in images] == [1] * 4  # whoever ended the worker, the others did not read with it again
    store.database.verify_audit()


def test_urgent_by_command_says_how_many_and_knows_no_strangers(store: Store, tiny: str) -> None:
    settings = write_settings(store.settings)
    images = [take(store, small_chest(seed)) for seed in range(2)]
    line = [sys.executable, "-m", "appliance", "urgent", "--data-dir", str(settings.data_dir)]
    study = str(Worklist(store).study_of(images[1]))
    done = subprocess.run([*line, study], capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stdout.strip()) == (0, "1 will be analysed first")
    assert prepared_worker(store).run_once()
    assert order(store) == [images[1]]
    unknown = subprocess.run([*line, "no-such-study"], capture_output=True, text=True, check=False)
    assert (unknown.returncode, "hint:" in unknown.stderr) == (1, True)
