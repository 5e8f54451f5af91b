"""The fastest way to run a model that is still right is found by trying, with the real runtimes, in processes that may die of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from appliance.core.domain import Note
from appliance.core.errors import ActivationError, InferenceError
from appliance.core.self_test_report import SelfTestReport
from appliance.core.settings import Settings
from appliance.lifecycle.journal import Journal
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.lifecycle.self_test_child import SelfTestRequest, run_self_test
from appliance.runtime import CPU, Candidate
from appliance.runtime.availability import Availability, available
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequests
from appliance.tuning import idle_wait
from appliance.tuning.idle_wait import IdleWait
from appliance.tuning.selection import SAME_TIME, CandidateResult, Selection
from appliance.tuning.tuner import Limits, Subject, tune
from model_sync.bundle import ModelBundle
from tests.support import activated
from tests.support.activation_box import Box, nan_on_pictures, self_tests
from tests.support.library_site import tiny_bundle
from tests.support.processes import children_running
from tests.support.tune_box import add_junk, add_variant, brief, command, endless, not_a_number, not_on, slow, table_of, wrong
from tests.support.worker_box import prepared_worker

ORT = (Availability("onnxruntime", "1", (CPU,)),)
QUICK = Limits(seconds=150.0, measuring_s=90.0)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle with one float variant."""
    return tiny_bundle(tmp_path / "bundles", "1.0.0")


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Whatever was tried, its process is gone."""
    yield
    assert not children_running("candidate_child")


def measured(bundle: Path, precision: str | None = None, limits: Limits = QUICK, **options: Any) -> Selection:
    """Tune a bundle with one thread, so that there is less to try."""
    subject = Subject.of_bundle(ModelBundle.load(bundle), precision)
    return tune(subject, threads=1, limits=limits, **({"runtimes": ORT} | options))


def rows(choice: Selection) -> dict[tuple[str, str, int, int], tuple[str, str]]:
    """The table in brief."""
    return brief([row.to_json() for row in choice.table])


def test_a_slow_int8_and_a_wrong_fp16_are_both_rejected_for_the_right_reason(bundle: Path) -> None:
    add_variant(bundle, "fp16", wrong)
    add_variant(bundle, "int8", slow)
    choice = measured(bundle)
    table = rows(choice)
    assert choice.candidate.precision == "fp32"
    assert table["onnxruntime", "fp16", 1, 1] == ("wrong", "tune.wrong")
    assert table["onnxruntime", "int8", 1, 1] == ("right", "tune.slower_less_exact")
    (said,) = (row.detail for row in choice.table if row.state == "wrong")
    assert "off by" in said
    assert "allowed 0.01" in said


def test_half_precision_that_is_no_number_is_wrong_and_says_so(bundle: Path) -> None:
    add_variant(bundle, "fp16", not_a_number)
    choice = measured(bundle)
    assert choice.candidate.precision == "fp32"
    (row,) = (row for row in choice.table if row.candidate.precision == "fp16")
    assert row.state in ("wrong", "failed")  # in the warm-up already, or at the first golden case
    assert "no number" in row.detail


def test_what_the_makers_know_to_fail_is_not_tried(bundle: Path) -> None:
    add_junk(bundle, "int8")
    not_on(bundle, "int8", "onnxruntime")
    assert rows(measured(bundle))["onnxruntime", "int8", 1, 1] == ("unavailable", "tune.not_on")


def test_a_file_no_runtime_can_load_is_out_with_its_reason(bundle: Path) -> None:
    add_junk(bundle, "int8")
    choice = measured(bundle)
    (row,) = (row for row in choice.table if row.candidate.precision == "int8")
    assert (row.state, bool(row.detail)) == ("failed", True)


def test_a_runtime_that_cannot_run_here_says_why(bundle: Path) -> None:
    choice = measured(bundle, runtimes=(*ORT, Availability("tensorrt", "", (), "no GPU: no driver")))
    (row,) = (row for row in choice.table if row.candidate.runtime == "tensorrt")
    assert (row.state, row.code, row.detail) == ("unavailable", "runtime.unavailable", "no GPU: no driver")


def test_a_candidate_that_dies_is_out_and_the_others_go_on(bundle: Path) -> None:
    """Killed by a signal while it loads, as by a segmentation fault in a compiler."""
    file = add_variant(bundle, "int8", endless)
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set():
            for child in children_running("candidate_child"):
                with suppress(psutil.NoSuchProcess):
                    if time.time() - child.create_time() > 3.0 and child.cpu_times().user > 1.0:
                        child.send_signal(11)
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        choice = measured(bundle)
    finally:
        stop.set()
        killer.join()
    (row,) = (row for row in choice.table if row.candidate.file == file.name)
    assert (row.state, row.code) == ("failed", "runtime.crashed")
    assert "SIGSEGV" in row.detail
    assert choice.candidate.precision == "fp32"


def test_a_candidate_that_hangs_is_ended_and_what_is_right_so_far_is_taken(bundle: Path) -> None:
    add_variant(bundle, "fp16", endless)
    add_variant(bundle, "int8", slow)
    choice = measured(bundle, limits=Limits(seconds=150.0, measuring_s=3.0))
    table = rows(choice)
    assert table["onnxruntime", "fp16", 1, 1] == ("failed", "runtime.deadline")
    assert table["onnxruntime", "int8", 1, 1] == ("right", "tune.slower_less_exact")  # tried all the same
    assert choice.candidate.precision == "fp32"


def test_too_little_memory_is_that_candidates_end(bundle: Path) -> None:
    with pytest.raises(InferenceError) as caught:
        measured(bundle, limits=Limits(seconds=60.0, measuring_s=10.0, memory_bytes=8 << 20))
    assert caught.value.code in ("runtime.memory", "runtime.crashed")


def test_where_nothing_is_right_the_reason_is_that_of_the_plainest(bundle: Path) -> None:
    nan_on_pictures(bundle)
    with pytest.raises(InferenceError, match="no number"):
        measured(bundle)


def test_a_precision_asked_for_by_hand_leaves_no_other(bundle: Path) -> None:
    add_variant(bundle, "int8", slow)
    choice = measured(bundle, "int8", is_fixed_by_user=True)
    assert {row.candidate.precision for row in choice.table} == {"int8"}
    assert (choice.candidate.precision, choice.reason.code, choice.reason.detail) == ("int8", "choice.by_hand", "int8")


def test_threads_and_batches_are_tried(bundle: Path) -> None:
    choice = tune(Subject.of_bundle(ModelBundle.load(bundle)), runtimes=ORT, limits=QUICK)
    tried = {(row.candidate.threads, row.candidate.batch > 1) for row in choice.table}
    assert (0, False) in tried
    assert any(batched for _, batched in tried)
    assert (1, False) in tried or len(os.sched_getaffinity(0)) == 1


# -- at activation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path: Path, settings: Settings) -> Iterator[Store]:
    """The store of a box that measures."""
    store = Store(settings.model_copy(update={"tune_at_activation": True, "worker_threads": 1, "tune_measuring_s": 20.0}))
    yield store
    store.database.verify_audit()
    store.close()
    assert not self_tests()


def whole_or_part(table: list[dict[str, Any]]) -> str:
    """The reason of a choice from this table: a busy machine may not have had the time for all of it."""
    return "choice.measured_part" if any(row["code"] == "tune.no_time" for row in table) else "choice.measured"


@pytest.mark.timeout(900)
def test_activation_measures_every_runtime_and_keeps_the_table(tuned: Store) -> None:
    digest = activate(tuned, reference_bundle(), "test")
    row = tuned.model(digest)
    report = json.loads(row["self_test"])
    table = report["table"]
    (chosen,) = (item for item in table if item["state"] == "chosen")
    assert Candidate.from_json(report["choice"]) == Candidate.from_json(chosen["candidate"])
    assert (row["precision"], report["reason"]["code"]) == (chosen["candidate"]["precision"], whole_or_part(table))
    assert row["runtime"].split()[0] == chosen["candidate"]["runtime"]
    assert report["median_ms"] == chosen["median_ms"]
    alone = [item["median_ms"] for item in table if item["state"] == "right" and item["median_ms"] and item["candidate"]["batch"] == 1]
    assert chosen["median_ms"] <= SAME_TIME * min(alone, default=chosen["median_ms"])
    assert {item["candidate"]["runtime"] for item in table} == {item.runtime for item in available()}
    assert all(item["code"] for item in table)
    assert report["tuned_at"]
    assert report["profile"]
    assert report["max_difference"]


@pytest.mark.timeout(900)
def test_a_model_nothing_can_run_rightly_is_not_activated(tmp_path: Path, tuned: Store) -> None:
    box = Box(tmp_path, tuned)
    with pytest.raises(ActivationError, match=r"model\.self_test"):
        activate(tuned, nan_on_pictures(box.bundle("1.1.0")), "test")
    assert box.last() == ("failed", "model.self_test")


@pytest.mark.timeout(900)
def test_measuring_respects_the_deadline_of_the_whole_proof(tmp_path: Path, settings: Settings, bundle: Path) -> None:
    add_variant(bundle, "int8", endless)
    changes = {"tune_at_activation": True, "worker_threads": 1, "activation_deadline_s": 75.0, "tune_measuring_s": 5.0}
    store = Store(settings.model_copy(update=changes))
    digest = activate(store, bundle, "test")
    states = brief(table_of(store.model(digest)["self_test"]))
    assert ("failed", "runtime.deadline") in states.values()
    assert store.model(digest)["precision"] == "fp32"
    store.close()


def test_without_the_switch_nothing_is_measured_and_that_is_said(store: Store, bundle: Path) -> None:
    report = json.loads(store.model(activate(store, bundle, "test"))["self_test"])
    assert (report["reason"]["code"], report["table"]) == ("choice.untuned", [])
    assert Candidate.from_json(report["choice"]).runtime == "onnxruntime"


@pytest.mark.parametrize("text", ['{"digest":"', "[]", "null"])
def test_a_worker_goes_on_with_a_record_of_a_measuring_that_cannot_be_read(store: Store, bundle: Path, text: str) -> None:
    digest = activated.activate(store, bundle)
    with store.database.transaction() as tx:
        tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"tuning:{digest}", text))
    worker = prepared_worker(store)
    worker.step()
    assert TuningRequests(store.database).next() is None


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_wrong_use_of_tune_says_how(settings: Settings, store: Store, bundle: Path) -> None:
    none = command(settings)
    assert (none.returncode, "no model is active" in none.stderr, "hint:" in none.stderr) == (1, True, True)
    activated.activate(store, bundle)
    other = command(settings, "bone-age")
    assert (other.returncode, "active: cxr-pneumonia" in other.stderr) == (1, True)
    shown = command(settings, "--show")
    assert (shown.returncode, "appliance tune" in shown.stdout) == (0, True)
    assert command(settings, "--what").returncode == 2


@pytest.mark.parametrize(("language", "words"), [("C.UTF-8", "incomplete, 1 of 1 rows"), ("zh_CN.UTF-8", "表格不完整，1 行中 1 行未测量")])
def test_a_table_with_holes_is_called_incomplete(settings: Settings, store: Store, bundle: Path, language: str, words: str) -> None:
    digest = activated.activate(store, bundle)
    report = json.loads(store.model(digest)["self_test"])
    hole = CandidateResult(Candidate.from_json(report["choice"]), "unavailable", "tune.no_time").to_json()
    report |= {"table": [hole], "reason": {"code": "choice.measured_part", "detail": ""}}
    with store.database.transaction() as tx:
        tx.execute("UPDATE models SET self_test = ? WHERE digest = ?", (json.dumps(report), digest))
    shown = command(settings, "--show", language=language)
    assert (shown.returncode, words in shown.stdout) == (0, True)


@pytest.mark.parametrize(
    ("language", "words"),
    [("C.UTF-8", "WARNING: Other work was going on while it was measured"), ("zh_CN.UTF-8", "测量时本机有其他任务在运行")],
)
def test_a_table_measured_on_a_busy_box_says_so(settings: Settings, store: Store, bundle: Path, language: str, words: str) -> None:
    digest = activated.activate(store, bundle)
    report = json.loads(store.model(digest)["self_test"])
    row = CandidateResult(Candidate.from_json(report["choice"]), "chosen", "tune.fastest", median_ms=1.0).to_json()
    report |= {"table": [row], "reason": {"code": "choice.measured", "detail": ""}}
    for busy in (None, {"code": "tune.busy", "detail": "50 % > 15 % after 180 s"}):
        with store.database.transaction() as tx:
            tx.execute("UPDATE models SET self_test = ? WHERE digest = ?", (json.dumps(report | {"busy": busy}), digest))
        shown = command(settings, "--show", language=language)
        is_busy = busy is not None
        assert (shown.returncode, words in shown.stdout, "50 % > 15 %" in shown.stdout) == (0, is_busy, is_busy)


def _self_test(
    settings: Settings, bundle: Path, deadline_s: float, send: Callable[[dict[str, Any]], None] = lambda _message: None
) -> SelfTestReport:
    """Run the self-test with tuning, in this process."""
    request = SelfTestRequest(
        settings.data_dir, bundle, ModelBundle.load(bundle).digest, None, 1, settings.process_memory_max_bytes, [], os.getpid(),
        tune=True, deadline_s=deadline_s, measuring_s=3.0, idle_wait_s=180.0,
    )  # fmt: skip
    return run_self_test(request, send)


def test_measuring_begins_after_the_wait_for_an_idle_box_and_says_when_there_was_none(
    settings: Settings, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    busy = Note("tune.busy", "50 % > 15 % after 12 s")

    class Busy(IdleWait):
        def __init__(self, longest_s: float, has_worked: Callable[[], bool]) -> None:
            waits.append(longest_s)
            super().__init__(0, has_worked)

        def wait(self) -> float:
            self.note = busy
            return 0

    monkeypatch.setattr(idle_wait, "IdleWait", Busy)
    report = _self_test(settings, bundle, 120.0)
    assert SelfTestReport.from_json(json.dumps(report.to_json())).busy == busy.to_json()
    assert report.is_measured
    assert 0 < waits[0] <= 12.0  # a tenth of the deadline, which is less than the 180 s of the settings
    monkeypatch.setattr(Busy, "wait", lambda _self: 0)
    assert "busy" not in _self_test(settings, bundle, 120.0).to_json()


def test_measuring_waits_for_the_jobs_of_the_box_and_begins_again_with_those_that_come(
    settings: Settings, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process shows jobs as the worker does; the processor is injected as idle, and no time passes while it waits."""
    jobs = subprocess.Popen([sys.executable, "-c", _JOBS, str(settings.data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert jobs.stdin is not None and jobs.stdout is not None
    waits: list[str] = []

    class Wait(IdleWait):
        def __init__(self, longest_s: float, has_worked: Callable[[], bool]) -> None:
            super().__init__(longest_s, has_worked, lambda: None, lambda _seconds: self.let_jobs_end())

        def let_jobs_end(self) -> None:
            assert jobs.stdin is not None and jobs.stdout is not None
            waits.append("building" if "building" in seen else "before")
            jobs.stdin.write(b"end\n")
            jobs.stdin.flush()
            jobs.stdout.readline()

    def on_message(message: dict[str, Any]) -> None:
        assert jobs.stdin is not None and jobs.stdout is not None
        if message["state"] == "self-test" and "self-test" not in seen:  # jobs come while the candidates are compared
            jobs.stdin.write(b"begin\n")
            jobs.stdin.flush()
            jobs.stdout.readline()
        seen.append(message["state"])

    seen: list[str] = []
    monkeypatch.setattr(idle_wait, "IdleWait", Wait)
    try:
        jobs.stdin.write(b"begin\n")
        jobs.stdin.flush()
        jobs.stdout.readline()
        report = _self_test(settings, bundle, 600.0, on_message)
    finally:
        jobs.stdin.close()
        jobs.wait(10)
        jobs.stdout.close()
    assert (waits[0], set(waits)) == ("before", {"before", "building"})
    assert (report.busy, report.is_measured) == (None, True)


_JOBS = """
import sys
from pathlib import Path
from appliance.core.job_activity import JobActivity
activity = JobActivity(Path(sys.argv[1]))
for line in sys.stdin:
    getattr(activity, line.strip())()
    print("done", flush=True)
"""


def test_a_precision_by_hand_is_taken_whatever_is_faster_and_one_that_is_not_there_is_said(settings: Settings, bundle: Path) -> None:
    add_variant(bundle, "int8", slow)
    settings.data_dir.mkdir(parents=True)
    values = "disk_reserve_bytes = 0\nworker_threads = 1\ntune_measuring_s = 5.0\ntune_idle_wait_s = 0\n"
    (settings.data_dir / "box.toml").write_text(values)
    line = [sys.executable, "-m", "appliance", "models", "activate", str(bundle), "--data-dir", str(settings.data_dir), "--precision"]
    absent = subprocess.run([*line, "fp8"], capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert (absent.returncode, "has no fp8 variant, only int8, fp32" in absent.stderr) == (2, True)
    assert "The model bundle is not valid" not in absent.stderr
    assert subprocess.run([*line, "int8"], capture_output=True, check=False).returncode == 0
    report = json.loads(Store(settings).models()[0]["self_test"])
    assert (report["precision"], report["reason"]["code"]) == ("int8", "choice.by_hand")
    assert {row["candidate"]["precision"] for row in report["table"]} <= {"int8", ""}


def test_the_precision_that_runs_already_can_be_chosen_by_hand_and_that_can_be_taken_back(store: Store, bundle: Path) -> None:
    digest = activate(store, bundle, "test")

    def reason() -> str:
        return str(json.loads(store.model(digest)["self_test"])["reason"]["code"])

    assert reason() == "choice.untuned"
    assert activate(store, bundle, "test", "any") == digest
    assert len(Journal(store).history(limit=9)) == 1  # nothing was chosen, so nothing is taken back
    activate(store, bundle, "test", "fp32")
    assert reason() == "choice.by_hand"
    for _ in range(2):
        activate(store, bundle, "test", "fp32")
        activate(store, bundle, "test")  # says nothing of precisions, and changes none
    assert (reason(), len(Journal(store).history(limit=9))) == ("choice.by_hand", 2)
    activate(store, bundle, "test", "any")
    assert reason() == "choice.untuned"
