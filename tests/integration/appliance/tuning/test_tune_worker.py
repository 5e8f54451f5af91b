"""The worker runs what was chosen; where that cannot be it falls back for all to see and measures again, and nothing stops reading."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.core import device_profile
from appliance.core.domain import PENDING_STATES, Note, ScanState
from appliance.core.errors import ActivationError
from appliance.inference.model_session import ModelSession
from appliance.inference.worker import Worker
from appliance.lifecycle.model_control import activate, roll_back, tune
from appliance.runtime import Candidate
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests
from appliance.store.worklist import Worklist
from appliance.tuning.selection import Plan
from tests.support import activated
from tests.support.activation_box import Box, end_workers, finish_with, self_tests, watched, worker, write_settings
from tests.support.library_site import tiny_bundle
from tests.support.processes import wait_for
from tests.support.tune_box import add_variant, command, wrong
from tests.support.worker_box import prepared_worker, small_chest, take

LINE = "cxr-pneumonia"

# A busy machine may not have had the time for all of the table.
MEASURED = ("choice.measured", "choice.measured_part")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No worker, no proof."""
    yield
    end_workers()
    assert not self_tests()


@pytest.fixture
def digest(tmp_path: Path, store: Store) -> str:
    """A small model at work, untuned; its digest."""
    return activated.activate(store, tiny_bundle(tmp_path / "bundles", "1.0.0"))


def report_of(store: Store, digest: str) -> dict[str, Any]:
    """What is stored of how a model is run."""
    return dict(json.loads(store.model(digest)["self_test"]))


def chosen(store: Store, digest: str, table: list[dict[str, Any]] | None = None, **changes: Any) -> None:
    """Store another choice, as a measuring would."""
    tunings, report = TuningRequests(store.database), report_of(store, digest)
    report["choice"] |= changes
    report |= {"reason": {"code": "choice.measured", "detail": ""}, "table": table or []}
    tunings.done(tunings.ask(digest, LINE, "test"), report)


def process_of(store: Store) -> int:
    """Who holds the worker's lock."""
    path = store.settings.data_dir / "run" / "worker.lock"
    text = path.read_text() if path.exists() else ""
    return int(text) if text else 0


def without_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after its uninstallation: whoever imports it now is told that it is not there."""
    (tmp_path / "hole" / "openvino").mkdir(parents=True)
    (tmp_path / "hole" / "openvino" / "__init__.py").write_text("raise ModuleNotFoundError('No module named openvino')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hole"))


def test_the_result_says_what_ran_and_why(store: Store, digest: str) -> None:
    image = take(store, small_chest())
    assert prepared_worker(store).run_once()
    (job,) = Worklist(store).instance(image).jobs
    assert (job.runtime["runtime"], job.runtime["reason"]) == ("onnxruntime", {"code": "choice.untuned", "detail": ""})
    chosen(store, digest, threads=1)
    image = take(store, small_chest(2))
    assert prepared_worker(store).run_once()
    (job,) = Worklist(store).instance(image).jobs
    assert (job.runtime["threads"], job.runtime["reason"]["code"]) == (1, "choice.measured")


def test_a_runtime_that_is_gone_is_fallen_back_from_for_all_to_see(
    tmp_path: Path, store: Store, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(store, digest, runtime="openvino", provider="CPU")
    settings = write_settings(store.settings)
    image = take(store, small_chest())
    assert finish_with(settings) == 0
    (finding,) = Worklist(store).instance(image).findings
    assert finding.runtime.startswith("openvino")
    without_openvino(tmp_path, monkeypatch)
    image = take(store, small_chest(2))
    assert finish_with(settings) == 0
    view = Worklist(store).instance(image)
    assert view.state is ScanState.AI_READY
    assert view.findings[0].runtime.startswith("onnxruntime")
    assert view.jobs[0].runtime["reason"]["code"] == "choice.fallback"
    assert "openvino" in view.jobs[0].runtime["reason"]["detail"]
    fallback = report_of(store, digest)["fallback"]
    assert (fallback["code"], bool(fallback["at"])) == ("choice.fallback", True)
    audit = [json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit")]
    assert [entry["outcome"] for entry in audit if entry["detail"].get("code") == "choice.fallback"] == [4]  # once, not with every start
    monkeypatch.delenv("PYTHONPATH")
    take(store, small_chest(3))
    assert finish_with(settings) == 0
    assert "fallback" not in report_of(store, digest)  # it is back, and nobody is warned any more


@pytest.mark.timeout(900)
def test_after_a_fallback_the_box_measures_again_by_itself(
    tmp_path: Path, store: Store, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(store, digest, runtime="openvino", provider="CPU")
    settings = write_settings(store.settings, tune_at_activation=True, worker_threads=1, tune_measuring_s=3.0)
    without_openvino(tmp_path, monkeypatch)
    process = worker(settings)
    wait_for(lambda: (report_of(store, digest).get("reason") or {}).get("code") in MEASURED and report_of(store, digest)["table"])
    report = report_of(store, digest)
    assert report["choice"]["runtime"] == "onnxruntime"
    assert "fallback" not in report
    states = {row["candidate"]["runtime"]: row["state"] for row in report["table"]}
    assert states["openvino"] == "unavailable"
    image = take(store, small_chest())
    wait_for(lambda: Worklist(store).instance(image).state is ScanState.AI_READY)
    assert Worklist(store).instance(image).jobs[0].runtime["reason"]["code"] in MEASURED
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.mark.timeout(900)
def test_another_device_is_measured_again_once(store: Store, digest: str) -> None:
    settings = write_settings(store.settings, tune_at_activation=True, worker_threads=1, tune_measuring_s=3.0)
    tunings, report = TuningRequests(store.database), report_of(store, digest)
    measured = report | {"profile": "another processor", "reason": {"code": "choice.measured", "detail": ""}}
    tunings.done(tunings.ask(digest, LINE, "test"), measured)
    process = worker(settings)
    wait_for(lambda: report_of(store, digest)["profile"] == device_profile.profile())
    tuning = tunings.of(digest)
    assert tuning is not None
    assert (tuning.state, tuning.actor) == ("done", "worker")
    asked = tuning.asked_at
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    process = worker(settings)
    image = take(store, small_chest())
    wait_for(lambda: Worklist(store).instance(image).state is ScanState.AI_READY)  # it has looked what to measure before it reads
    again = tunings.of(digest)
    assert again is not None
    assert again.asked_at == asked
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.mark.timeout(900)
def test_tune_by_hand_while_the_box_reads_switches_in_one_step_and_is_no_new_version(tmp_path: Path, store: Store) -> None:
    box = Box(tmp_path, store)
    old = box.first()
    bundle = watched(add_variant(box.bundle("1.1.0"), "fp16", wrong).parent, max_score_drift=None, trial_cases=10_000)
    new = activate(store, bundle, "test")
    before = [(row["id"], row["state"], row["attempts"], row["trial"]) for row in box.journal.history()]
    settings = write_settings(store.settings, worker_threads=1, tune_measuring_s=3.0)
    process = worker(settings)
    wait_for(lambda: process_of(store) == process.pid)
    line = [sys.executable, "-m", "appliance", "tune", "--data-dir", str(settings.data_dir)]
    measuring = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"LC_ALL": "zh_CN.UTF-8"}
    )
    images: list[int] = []
    waits: list[float] = []
    while measuring.poll() is None:
        images.append(take(store, small_chest(len(images))))
        started = time.monotonic()
        wait_for(lambda: Worklist(store).instance(images[-1]).state not in PENDING_STATES)
        assert Worklist(store).instance(images[-1]).state is ScanState.AI_READY, Worklist(store).instance(images[-1])
        waits.append(time.monotonic() - started)
    said, progress = measuring.communicate()
    assert measuring.returncode == 0, progress
    assert max(waits) < 10  # it never stopped reading
    assert "标准病例的结果超出允许误差" in said
    assert "构建并核对标准病例" in progress
    report = report_of(store, new)
    assert report["reason"]["code"] in MEASURED
    assert store.model(new)["state"] == "active"
    assert store.model(old)["state"] == "previous"
    after = [(row["id"], row["state"], row["attempts"]) for row in box.journal.history()]
    assert after == [item[:3] for item in before]
    trial = json.loads(box.journal.history()[0]["trial"])
    assert (trial["since"], trial["after_job"]) == (json.loads(before[0][3])["since"], json.loads(before[0][3])["after_job"])
    image = take(store, small_chest(99))
    wait_for(lambda: Worklist(store).instance(image).state is ScanState.AI_READY)
    assert Worklist(store).instance(image).jobs[0].runtime["reason"]["code"] in MEASURED
    shown = json.loads(command(settings, "--show", "--json").stdout)
    assert [row["table"] for row in shown] == [report["table"]]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    store.database.verify_audit()


@pytest.mark.timeout(900)
def test_tune_without_a_worker_does_it_here(store: Store, digest: str) -> None:
    quick = Store(store.settings.model_copy(update={"worker_threads": 1, "tune_measuring_s": 3.0}))
    steps: list[str] = []
    assert tune(quick, None, "test", lambda tuning: steps.append(tuning.step)) == [digest]
    assert [step for index, step in enumerate(steps) if step and step not in steps[:index]] == ["staged", "building", "self-test"]
    assert report_of(quick, digest)["table"]
    with pytest.raises(ActivationError, match=r"model\.unknown"):
        tune(quick, "bone-age", "test")
    quick.close()


def test_a_measuring_that_fails_leaves_the_model_as_it_was(store: Store, digest: str) -> None:
    before = report_of(store, digest)
    model = store.settings.data_dir / "models" / digest / "model_fp32.onnx"
    whole = model.read_bytes()
    model.write_bytes(b"junk")
    with pytest.raises(ActivationError, match=r"model\.invalid"):
        tune(store, LINE, "test")
    assert report_of(store, digest) == before
    tuning = TuningRequests(store.database).of(digest)
    assert tuning is not None
    assert (tuning.state, tuning.reason.code if tuning.reason else "") == ("failed", "model.invalid")
    model.write_bytes(whole)


def test_a_measuring_that_keeps_dying_is_given_up(store: Store, digest: str) -> None:
    tunings = TuningRequests(store.database)
    tunings.ask(digest, LINE, "test")
    for _ in range(3):
        asked = tunings.next()
        assert asked is not None
        assert tunings.begin(asked)
    last = tunings.next()
    assert last is not None
    assert not tunings.begin(last)
    ended = tunings.of(digest)
    assert ended is not None
    assert (ended.state, ended.reason) == ("failed", Note("activation.crash_loop", "3 attempts"))


def test_one_that_makes_way_costs_no_attempt(store: Store, digest: str) -> None:
    tunings = TuningRequests(store.database)
    first = tunings.ask(digest, LINE, "test")
    assert tunings.begin(first)
    begun = tunings.of(digest)
    assert begun is not None
    tunings.pause(begun)
    assert tunings.next() == tunings.of(digest)
    assert (tunings.ask(digest, LINE, "other").actor, begun.attempts) == ("test", 1)
    paused = tunings.of(digest)
    assert isinstance(paused, TuningRequest)
    assert (paused.state, paused.attempts) == ("asked", 0)


def test_what_nobody_waits_for_lets_scans_go_first(store: Store, digest: str) -> None:
    tunings = TuningRequests(store.database)
    tunings.ask(digest, LINE, "worker")
    assert tunings.next()
    take(store, small_chest())
    assert tunings.next() is None
    tunings.ask(digest, LINE, "demo")  # a person waits for it
    assert tunings.next()


def test_a_plain_way_that_was_wrong_does_not_take_over(store: Store, digest: str) -> None:
    """Better no reading than a wrong one: the jobs fail with the reason."""
    plain = Candidate("onnxruntime", "model_fp32.onnx", "fp32").to_json()
    row = {"candidate": plain, "state": "wrong", "code": "tune.wrong", "detail": "off", "median_ms": None}
    chosen(store, digest, [row], runtime="triton", provider="127.0.0.1:1")
    image = take(store, small_chest())
    made = prepared_worker(store)
    while made.run_once():
        pass
    assert Worklist(store).instance(image).state is ScanState.FAILED


def test_a_worker_that_fell_over_the_chosen_way_loads_the_plain_one(store: Store, digest: str) -> None:
    chosen(store, digest, runtime="openvino", provider="CPU")
    made = Worker(store, lambda _seconds: None)
    made.models.skip_tuned_runtime([digest])
    made.prepare()
    image = take(store, small_chest())
    assert made.run_once()
    reason = Worklist(store).instance(image).jobs[0].runtime["reason"]
    assert (reason["code"], "the worker died while it loaded the model" in reason["detail"]) == ("choice.fallback", True)


def test_an_engine_measured_on_another_device_is_not_built_in_front_of_the_patients(store: Store, digest: str) -> None:
    candidate = Candidate("tensorrt", "model_fp32.onnx", "fp32", "GPU:0")
    loaded = ModelSession(store.settings, digest, Plan("fp32", candidate, Note("choice.measured"), None, "another GPU"))
    assert loaded.fallback is not None
    assert "choice.other_device" in loaded.fallback.detail
    assert loaded.describe()["runtime"] == "onnxruntime"
    loaded.close()


def test_what_is_shown_is_the_precision_of_the_file_whatever_was_stored(store: Store, digest: str) -> None:
    candidate = Candidate("onnxruntime", "model_fp32.onnx", "fp16")
    loaded = ModelSession(store.settings, digest, Plan("fp16", candidate, Note("choice.measured"), None, device_profile.profile()))
    assert (loaded.fallback, loaded.candidate.precision, loaded.describe()["precision"]) == (None, "fp32", "fp32")
    loaded.close()


def test_a_slower_way_after_a_fallback_is_not_held_against_a_trial(tmp_path: Path, store: Store) -> None:
    """What the box does to itself is no fault of the version: the latency allowed is that of the slowest way measured here."""
    box = Box(tmp_path, store)
    box.first()
    new = activate(store, box.bundle("1.1.0"), "test")
    rows = [{"candidate": Candidate("onnxruntime", "model_fp32.onnx", "fp32").to_json(), "state": "right", "code": "", "median_ms": 400.0}]
    chosen(store, new, rows, runtime="openvino", provider="CPU")
    TuningRequests(store.database).record_fallback(new, Note("choice.fallback", "openvino: gone"), {"runtime": "onnxruntime"})
    for number in range(6):
        box.scan(str(number))
        assert box.work(ms=450.0) == new
    activator = box.activator()
    for _ in range(20):
        activator.tick()
        time.sleep(0.1)
    assert box.active() == new


def test_what_it_took_to_read_the_old_way_is_not_held_against_the_new_one(tmp_path: Path, store: Store) -> None:
    box = Box(tmp_path, store)
    box.first()
    new = activate(store, box.bundle("1.1.0"), "test")

    def read(count: int, ms: float) -> float | None:
        for number in range(count):
            box.scan(f"{ms}-{number}")
            assert box.work(ms=ms) == new
        box.settle(box.activator())
        trial = json.loads(box.journal.history()[0]["trial"])
        assert trial["failures"] == 0
        return trial["latency_ms"]  # type: ignore[no-any-return]

    tunings = TuningRequests(store.database)
    assert read(4, 400.0) == 400.0
    tunings.done(tunings.ask(new, "cxr-pneumonia", "test"), report_of(store, new) | {"median_ms": 10.0})
    assert read(4, 61.0) is None  # four tell nothing yet
    assert read(1, 62.0) == 61.0
    assert (box.active(), json.loads(box.journal.history()[0]["trial"])["cases"]) == (new, 9)


@pytest.mark.timeout(900)
def test_going_back_by_hand_measures_what_it_goes_back_to(tmp_path: Path, store: Store) -> None:
    quick = Store(store.settings.model_copy(update={"worker_threads": 1, "tune_measuring_s": 3.0, "tune_at_activation": True}))
    box = Box(tmp_path, quick)
    old = box.first()
    activate(quick, box.bundle("1.1.0"), "test")
    assert roll_back(quick, None, "test") == old
    report = report_of(quick, old)
    assert (report["reason"]["code"] in MEASURED, bool(report["table"])) == (True, True)
    quick.close()
