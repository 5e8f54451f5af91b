"""A hub runs a model while it is configured and answers; what it was measured on, elsewhere or before, is proven here before it reads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.main import main
from appliance.core import device_profile
from appliance.core.domain import ScanState, Source
from appliance.core.errors import InferenceError
from appliance.core.run_summary import RuntimeStatus
from appliance.core.self_test_report import SelfTestReport
from appliance.inference import model_pool, model_session, remote_runtime
from appliance.inference.model_session import ModelSession
from appliance.inference.worker import Worker
from appliance.ingest.ingest import Ingest
from appliance.lifecycle import trial_monitor
from appliance.lifecycle.exchange import box_report
from appliance.lifecycle.retuning import Retuner
from appliance.runtime import Candidate
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests
from appliance.store.worklist import JobView, Worklist
from appliance.tuning.selection import Plan
from model_sync.agent.report import BoxReport
from model_sync.bundle import Manifest
from tests.support import series as made_up
from tests.support.activated import activate
from tests.support.brightness_bundle import write_bundle
from tests.support.kserve_server import KserveServer
from tests.support.library_site import tiny_bundle
from tests.support.processes import wait_for
from tests.support.scans import encode
from tests.support.tune_box import add_variant, wrong
from tests.support.worker_box import small_chest, take

LINE = "cxr-pneumonia"


def reader(store: Store, wait_s: float = 60.0) -> Worker:
    """A worker in this process that at its start gives a hub on a busy machine all the time it needs."""
    made = Worker(store, lambda _seconds: None, wait_s=wait_s)
    made.prepare()
    settle(made)
    return made


def settle(made: Worker) -> None:
    """Between jobs, until nothing is loaded beside the reading."""
    wait_for(lambda: made.step() or not made.models.is_loading)


@pytest.fixture
def hub() -> Iterator[KserveServer]:
    """A hub."""
    made = KserveServer()
    yield made
    made.close()


def set_up(store: Store, hub: str) -> Store:
    """The same box with that hub in its settings, measuring on its own account."""
    return Store(store.settings.model_copy(update={"triton_url": hub, "tune_at_activation": True}))


def select(
    store: Store, digest: str, table: list[dict[str, Any]] | None = None, profile: str = "", line: str = LINE, **changes: Any
) -> None:
    """Store a choice, as a measuring on a device would."""
    tunings, report = TuningRequests(store.database), json.loads(store.model(digest)["self_test"])
    report["choice"] |= changes
    report |= {"reason": {"code": "choice.measured", "detail": ""}, "table": table or [], "profile": profile or device_profile.profile()}
    tunings.done(tunings.ask(digest, line, "test"), report)


@pytest.fixture
def digest(tmp_path: Path, store: Store, hub: KserveServer) -> str:
    """A small model that was measured to be fastest on the hub; its digest."""
    made = activate(store, tiny_bundle(tmp_path / "bundles", "1.0.0"), "test")
    select(store, made, runtime="triton", provider=hub.address)
    return made


def job_of(store: Store, image: int) -> JobView:
    """The one job of an image."""
    (job,) = Worklist(store).instance(image).jobs
    return job


def reason_of(store: Store, image: int) -> dict[str, str]:
    """Why it was run the way it was."""
    return dict(job_of(store, image).runtime["reason"])


def told_centre(store: Store) -> tuple[str, str]:
    """Runtime and precision of the one model in the report to the centre, which its schema lets through."""
    report = BoxReport.model_validate_json(json.dumps(box_report(store)))
    (model,) = report.models
    return model.runtime, model.precision


def attempts(store: Store) -> set[int]:
    """How often any job was begun."""
    return {row["attempts"] for row in store.database.query("SELECT attempts FROM jobs")}


def read_all(made: Worker) -> None:
    """Until nothing is left, and nothing waits for a model that is being loaded."""
    while made.run_once() or made.models.is_loading:
        settle(made)


def requested_tuning(made: Worker, store: Store, digest: str) -> TuningRequest:
    """The measuring of a model that was requested. An idle worker starts it at once: it is stopped, and returns to the queue, before."""
    made.activator.stop()
    tuning = TuningRequests(store.database).of(digest)
    assert tuning is not None
    return tuning


def step_until_reached(made: Worker, digest: str) -> None:
    """Between jobs, until the hub runs the model again."""
    limit = time.monotonic() + 60
    while made.models.sessions[digest].fallback is not None:
        assert time.monotonic() < limit
        made.step()
        time.sleep(0.02)


@pytest.mark.parametrize("now", ["", "127.0.0.1:1"])
def test_a_hub_that_is_configured_no_more_is_sent_nothing(store: Store, digest: str, hub: KserveServer, now: str) -> None:
    box = set_up(store, now)
    image = take(box, small_chest())
    made = reader(box)
    read_all(made)
    assert hub.seen == []
    assert Worklist(box).instance(image).state is ScanState.AI_READY
    reason = reason_of(box, image)
    assert (reason["code"], "configured" in reason["detail"]) == ("choice.fallback", True)
    asked = requested_tuning(made, box, digest)
    assert (asked.state, asked.actor) == ("asked", "worker")
    assert not made.models.sessions[digest].is_remote  # nothing is reached for
    box.close()


def test_a_choice_with_no_address_at_all_is_no_hub(store: Store, digest: str) -> None:
    select(store, digest, runtime="triton", provider="")
    loaded = ModelSession(store.settings, digest, Plan.of(None, SelfTestReport.from_json(store.model(digest)["self_test"])))
    assert loaded.fallback is not None
    assert "not configured any more" in loaded.fallback.detail
    loaded.close()


def test_where_the_plain_way_is_wrong_a_hub_that_is_gone_means_no_reading_but_a_measuring(store: Store, digest: str) -> None:
    plain = Candidate("onnxruntime", "model_fp32.onnx", "fp32").to_json()
    rows = [{"candidate": plain, "state": "wrong", "code": "tune.wrong", "detail": "off", "median_ms": None}]
    select(store, digest, rows, runtime="triton")
    box = set_up(store, "")
    image = take(box, small_chest())
    made = reader(box)
    read_all(made)
    view = Worklist(box).instance(image)
    assert (view.state, view.reason.code if view.reason else "") == (ScanState.FAILED, "runtime.unavailable")
    assert requested_tuning(made, box, digest).state == "asked"
    runs = json.loads(box.model(digest)["self_test"])["runs"]
    assert (runs["runtime"], runs["reason"]["code"]) == ("", "runtime.unavailable")  # nothing does
    said = [json.loads(row["entry"]) for row in box.database.query("SELECT entry FROM audit")]
    assert len([entry for entry in said if entry["detail"].get("code") == "runtime.unavailable"]) == 1  # not with every scan
    box.close()


def test_a_hub_that_is_configured_anew_is_measured(store: Store, digest: str, hub: KserveServer) -> None:
    select(store, digest, runtime="onnxruntime", provider="CPUExecutionProvider")
    for address, state in (("", "done"), (hub.address, "asked")):
        box = set_up(store, address)
        made = Worker(box, lambda _seconds: None)
        retuner: Retuner = made.activator.retuner
        retuner.request_outdated()
        known = retuner.tunings.of(digest)
        assert known is not None
        assert known.state == state
        box.close()


def test_a_hub_that_goes_down_costs_no_scan_and_reads_again_when_it_is_back(
    store: Store, digest: str, hub: KserveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_session, "RETRY_S", 0.1)
    box = set_up(store, hub.address)
    made = reader(box)
    first = take(box, small_chest(1))
    read_all(made)
    assert job_of(box, first).runtime["leaves_box"] is True
    hub.close()
    later = [take(box, small_chest(seed)) for seed in (2, 3)]
    started = time.monotonic()
    read_all(made)
    assert time.monotonic() - started < 20  # no time limit of a request was waited for
    for image in later:
        assert Worklist(box).instance(image).state is ScanState.AI_READY
        assert reason_of(box, image)["code"] == "choice.fallback"
        assert "runtime.unavailable" in reason_of(box, image)["detail"]
        assert job_of(box, image).runtime["runtime"] == "onnxruntime"
    assert attempts(box) == {1}
    assert json.loads(box.model(digest)["self_test"])["fallback"]["code"] == "choice.fallback"
    known = TuningRequests(box.database).of(digest)
    assert known is not None
    assert known.state == "done"  # it is waited for, not replaced
    again = KserveServer(int(hub.address.rpartition(":")[2]))
    try:
        step_until_reached(made, digest)
        image = take(box, small_chest(4))
        read_all(made)
        assert job_of(box, image).runtime["runtime"] == "triton"
        assert reason_of(box, image) == {"code": "choice.measured", "detail": ""}
        assert "fallback" not in json.loads(box.model(digest)["self_test"])
    finally:
        made.models.sessions[digest].close()
        again.close()
    box.close()


@pytest.mark.parametrize("how", ["started anew", "unloaded"])
def test_a_hub_that_lost_the_model_answers_the_golden_cases_before_it_reads_again(
    store: Store, digest: str, hub: KserveServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What runs there now may answer otherwise: this box reads that scan itself, at once."""
    monkeypatch.setattr(model_session, "RETRY_S", 0.1)
    box = set_up(store, hub.address)
    made = reader(box)
    if how == "started anew":
        hub.close()
        now = KserveServer(int(hub.address.rpartition(":")[2]))
    else:
        now = hub
        now.models.clear()
    try:
        now.seen.clear()
        now.fault = "lies"
        image = take(box, small_chest(2))
        read_all(made)
        job = job_of(box, image)
        assert (job.outcome, job.runtime["runtime"]) == (ScanState.AI_READY, "onnxruntime")
        assert reason_of(box, image)["code"] == "choice.fallback"
        assert "does not have the model" in reason_of(box, image)["detail"]
        assert not any(path.endswith("/load") for _, path, _, _ in now.seen)
        wait_for(lambda: made.step() or any(path.endswith("/unload") for _, path, _, _ in now.seen))  # its golden cases are wrong
        assert made.models.sessions[digest].fallback is not None
        now.fault = ""
        step_until_reached(made, digest)
        later = take(box, small_chest(3))
        read_all(made)
        assert job_of(box, later).runtime["runtime"] == "triton"
    finally:
        made.models.sessions[digest].close()
        now.close()
    box.close()


def test_a_hub_that_is_down_at_the_start_is_waited_for(
    store: Store, digest: str, hub: KserveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_session, "RETRY_S", 0.1)
    box = set_up(store, hub.address)
    hub.close()
    made = reader(box)
    image = take(box, small_chest())
    read_all(made)
    assert reason_of(box, image)["code"] == "choice.fallback"
    runs = json.loads(box.model(digest)["self_test"])["runs"]
    assert (runs["runtime"], runs["reason"]) == ("onnxruntime", reason_of(box, image))
    assert told_centre(box) == (f"onnxruntime {runs['version']}", "fp32")
    again = KserveServer(int(hub.address.rpartition(":")[2]))
    try:
        step_until_reached(made, digest)
        runs = json.loads(box.model(digest)["self_test"])["runs"]
        assert (runs["runtime"], runs["provider"], runs["reason"]["code"]) == ("triton", again.address, "choice.measured")
        assert told_centre(box) == ("triton", "fp32")
    finally:
        made.models.sessions[digest].close()
        again.close()
    box.close()


def test_a_hub_that_stays_away_has_the_box_measure_what_it_has_of_its_own(
    store: Store, digest: str, hub: KserveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_session, "RETRY_S", 0.05)
    monkeypatch.setattr(model_pool, "MEASURE_AFTER_S", 0.1)
    box = set_up(store, hub.address)
    hub.close()
    made = reader(box)
    take(box, small_chest())  # a scan waits: what is asked for is not begun yet
    limit = time.monotonic() + 60
    while (known := TuningRequests(box.database).of(digest)) is None or known.state != "asked":
        assert time.monotonic() < limit
        made.step()
        time.sleep(0.02)
    assert known.actor == "worker"
    made.models.sessions[digest].close()
    box.close()


def test_a_hub_that_takes_the_line_and_hangs_holds_no_scan_at_the_start(store: Store, digest: str, hub: KserveServer) -> None:
    """The plain way reads what waits, and says so; the hub is reached for meanwhile, and takes over as soon as it speaks."""
    box = set_up(store, hub.address)
    hub.fault = "silent"
    image = take(box, small_chest())
    made = reader(box, wait_s=0.2)
    read_all(made)
    wait_for(lambda: hub.silent == 1)  # still the first question: nobody gave up, and nobody asked twice
    assert Worklist(box).instance(image).state is ScanState.AI_READY
    reason = reason_of(box, image)
    assert (reason["code"], "runtime.deadline" in reason["detail"], "no connection within" in reason["detail"]) == (
        "choice.fallback",
        True,
        True,
    )
    assert json.loads(box.model(digest)["self_test"])["runs"]["reason"] == reason
    assert attempts(box) == {1}
    made.step()
    assert made.models.sessions[digest].fallback is not None
    hub.speak()
    step_until_reached(made, digest)
    later = take(box, small_chest(2))
    read_all(made)
    assert job_of(box, later).runtime["runtime"] == "triton"
    made.models.sessions[digest].close()
    box.close()


@pytest.mark.parametrize("barred", [True, False])
def test_a_hub_that_hangs_holds_no_scan_of_another_model_and_loses_none_of_its_own(
    tmp_path: Path, store: Store, digest: str, hub: KserveServer, barred: bool
) -> None:
    plain = Candidate("onnxruntime", "model_fp32.onnx", "fp32").to_json()
    rows = [{"candidate": plain, "state": "wrong", "code": "tune.wrong", "detail": "off"}] if barred else []
    select(store, digest, rows, runtime="triton")
    local = activate(store, tiny_bundle(tmp_path / "local", "1.0.0", line="local"), "test")
    box = set_up(store, hub.address)
    hub.fault = "silent"
    image = take(box, small_chest())
    made = Worker(box, lambda _seconds: None, wait_s=60)
    made.prepare()
    while made.run_once():
        made.step()
    states = {row["model_digest"]: row["state"] for row in box.database.query("SELECT model_digest, state FROM jobs")}
    assert states == {local: "done", digest: "queued"}
    wait_for(lambda: hub.silent == 1)
    made.prepare()
    hub.speak()
    read_all(made)
    loaded = made.models.sessions[digest]
    assert (loaded.fallback, loaded.describe()["runtime"]) == (None, "triton")
    assert Worklist(box).instance(image).state is ScanState.AI_READY
    assert attempts(box) == {1}
    loaded.close()
    box.close()


def test_hubs_that_hang_share_one_waiting_time(tmp_path: Path, store: Store, digest: str, hub: KserveServer) -> None:
    more = [activate(store, tiny_bundle(tmp_path / "more", "1.0.0", seed=n, line=f"more-{n}"), "test") for n in (1, 2)]
    for n, other in enumerate(more, 1):
        select(store, other, line=f"more-{n}", runtime="triton", provider=hub.address)
    box = set_up(store, hub.address)
    hub.fault = "silent"
    made = Worker(box, lambda _seconds: None, wait_s=0.5)
    made.prepare()
    wait_for(lambda: hub.silent == 3)  # none waits for another
    settle(made)
    assert {loaded.describe()["runtime"] for loaded in made.models.sessions.values()} == {"onnxruntime"}
    hub.speak()
    for loaded in made.models.sessions.values():
        loaded.close()
    box.close()


def test_where_the_plain_way_is_wrong_a_hub_that_dies_is_said_and_reached_for_until_it_is_back(
    store: Store, digest: str, hub: KserveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Candidate("onnxruntime", "model_fp32.onnx", "fp32").to_json()
    select(store, digest, [{"candidate": plain, "state": "wrong", "code": "tune.wrong", "detail": "off"}], runtime="triton")
    box = set_up(store, hub.address)
    made = reader(box)
    take(box, small_chest(1))
    read_all(made)
    hub.close()
    image = take(box, small_chest(2))
    assert made.run_once()
    running = RuntimeStatus.of(box.model(digest)["self_test"])
    assert (running.now, running.stopped.code if running.stopped else "") == (None, "runtime.unavailable")
    assert told_centre(box)[0] == "none"
    read_all(made)
    assert Worklist(box).instance(image).state is ScanState.FAILED
    known = requested_tuning(made, box, digest)
    assert (known.state, known.actor) == ("asked", "worker")  # perhaps there is another way
    failures = made.models._failures
    failures[digest] = replace(failures[digest], retry_at=0.0)  # the minute is over
    again = KserveServer(int(hub.address.rpartition(":")[2]))
    try:
        wait_for(lambda: made.step() or digest in made.models.sessions)  # with no scan that asks for it
        running = RuntimeStatus.of(box.model(digest)["self_test"])
        assert (running.now.runtime if running.now else "", running.stopped) == ("Triton", None)
        later = take(box, small_chest(3))
        read_all(made)
        assert job_of(box, later).runtime["runtime"] == "triton"
    finally:
        made.activator.stop()
        made.models.sessions[digest].close()
        again.close()
    box.close()


def test_where_the_plain_way_is_wrong_a_hub_that_was_started_anew_loses_no_scan(store: Store, digest: str, hub: KserveServer) -> None:
    plain = Candidate("onnxruntime", "model_fp32.onnx", "fp32").to_json()
    select(store, digest, [{"candidate": plain, "state": "wrong", "code": "tune.wrong", "detail": "off"}], runtime="triton")
    box = set_up(store, hub.address)
    made = reader(box)
    hub.models.clear()
    images = [take(box, small_chest(seed)) for seed in range(3)]
    read_all(made)
    assert {job_of(box, image).runtime["runtime"] for image in images} == {"triton"}
    made.models.sessions[digest].close()
    assert not hub.models
    box.close()


def test_a_hub_whose_last_warming_up_fails_is_left_nothing(store: Store, digest: str, hub: KserveServer) -> None:
    box = set_up(store, hub.address)
    made = reader(box)
    asked = hub.inferences
    made.models.sessions[digest].close()
    hub.dies_at = 2 * asked
    made = reader(box)
    assert hub.inferences == 2 * asked
    assert made.models.sessions[digest].fallback is not None
    wait_for(lambda: not hub.models)
    made.models.sessions[digest].close()
    box.close()


def test_a_model_that_was_replaced_while_its_hub_hung_leaves_nothing_there(store: Store, digest: str, hub: KserveServer) -> None:
    box = set_up(store, hub.address)
    hub.fault = "silent"
    made = reader(box, wait_s=0.2)
    loaded = made.models.sessions[digest]
    loaded.close()  # as when another took its place: nobody waits for the hub
    wait_for(lambda: hub.silent == 1)
    hub.speak()
    wait_for(lambda: any(path.endswith("/unload") for _, path, _, _ in hub.seen) and not hub.models)
    box.close()


def test_a_version_that_takes_over_where_nothing_reads_does_not_wait_for_its_hub(store: Store, digest: str, hub: KserveServer) -> None:
    box = set_up(store, hub.address)
    hub.fault = "silent"
    made = Worker(box, lambda _seconds: None, wait_s=0.2)
    loaded = made.models.load_successor(digest, Plan.of(None, SelfTestReport.from_json(box.model(digest)["self_test"])))
    assert loaded.describe()["runtime"] == "onnxruntime"
    wait_for(lambda: hub.silent == 1)
    made.models.use(loaded)
    hub.speak()
    step_until_reached(made, digest)
    loaded.close()
    box.close()


def test_a_version_measured_anew_waits_for_its_hub_while_the_one_before_reads(store: Store, digest: str, hub: KserveServer) -> None:
    box = set_up(store, hub.address)
    made = reader(box)
    hub.fault = "silent"
    done: list[ModelSession] = []
    plan = Plan.of(None, SelfTestReport.from_json(json.loads(box.model(digest)["self_test"]) | {"profile": "another device"}))
    beside = threading.Thread(target=lambda: done.append(made.models.load(digest, plan)))
    beside.start()
    wait_for(lambda: hub.silent == 1)
    image = take(box, small_chest())
    hub.speak()
    beside.join(60)
    read_all(made)
    assert (done[0].fallback, job_of(box, image).runtime["runtime"]) == (None, "triton")
    for loaded in (done[0], made.models.sessions[digest]):
        loaded.close()
    box.close()


@pytest.mark.parametrize("fault", ["500", "nonsense", "cut", "no number", "short data", "answers for another"])
def test_a_hub_that_answers_badly_is_read_without(store: Store, digest: str, hub: KserveServer, fault: str) -> None:
    box = set_up(store, hub.address)
    made = reader(box)
    hub.fault = fault
    image = take(box, small_chest())
    read_all(made)
    assert Worklist(box).instance(image).state is ScanState.AI_READY
    assert reason_of(box, image)["code"] == "choice.fallback"
    assert attempts(box) == {1}
    hub.fault = ""
    made.models.sessions[digest].close()
    box.close()


def test_a_hub_that_says_nothing_at_all_is_given_up_soon(
    store: Store, digest: str, hub: KserveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its power fails or the line is cut: no connection is refused, and nothing ever comes."""
    monkeypatch.setattr(remote_runtime, "MIN_ANSWER_S", 0.5)
    box = set_up(store, hub.address)
    made = reader(box)
    hub.fault, hub.slow_s = "slow", 25.0
    images = [take(box, small_chest(seed)) for seed in range(2)]
    started = time.monotonic()
    read_all(made)
    assert time.monotonic() - started < hub.slow_s
    for image in images:
        reason = reason_of(box, image)
        assert (reason["code"], "runtime.deadline" in reason["detail"]) == ("choice.fallback", True)
    hub.fault = ""
    made.models.sessions[digest].close()
    box.close()


def test_a_batch_that_the_hub_does_not_answer_is_read_here_image_by_image(store: Store, digest: str, hub: KserveServer) -> None:
    select(store, digest, runtime="triton", batch=4)
    box = set_up(store, hub.address)
    made = reader(box)
    images = [take(box, small_chest(seed)) for seed in range(4)]
    hub.close()
    read_all(made)
    for image in images:
        job = job_of(box, image)
        assert (job.outcome, job.runtime.get("together", 1)) == (ScanState.AI_READY, 1)
    assert attempts(box) == {1}
    assert made.models.sessions[digest].candidate.batch == 1
    box.close()


def test_results_of_a_batch_say_what_answered_it_and_not_what_runs_the_model_by_now(store: Store, digest: str, hub: KserveServer) -> None:
    """An urgent image finds the hub gone between the answer and the results."""
    select(store, digest, runtime="triton", batch=4)
    box = set_up(store, hub.address)
    images, urgent, before = list[int](), list[int](), 0

    def cut(seconds: float) -> None:
        answered = sum(path.endswith("/infer") for _, path, _, _ in hub.seen) > before
        if seconds and images and answered and not urgent:  # at the first result
            urgent.append(take(box, small_chest(9)))
            box.queue.make_urgent(Worklist(box).study_of(urgent[0]), "wang")
            hub.close()

    made = Worker(box, cut, wait_s=60)
    made.prepare()
    settle(made)
    before = sum(path.endswith("/infer") for _, path, _, _ in hub.seen)
    images += [take(box, small_chest(seed)) for seed in range(4)]
    read_all(made)
    for image in images:
        ran = job_of(box, image).runtime
        assert (ran["runtime"], ran["reason"]["code"], ran["leaves_box"], ran["together"]) == ("triton", "choice.measured", True, 4)
        assert Worklist(box).instance(image).findings[0].runtime.startswith("triton ")
    assert (job_of(box, urgent[0]).runtime["runtime"], job_of(box, urgent[0]).runtime["leaves_box"]) == ("onnxruntime", True)  # it was sent
    box.close()


def test_a_series_is_read_whole_by_one_way_and_says_that_it_left_the_box(
    tmp_path: Path, store: Store, hub: KserveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub dies after some of its windows, which nothing of the result comes from: they were wrong."""
    bundle = write_bundle(tmp_path / "volume")
    made = activate(store, bundle.directory, "test")
    select(store, made, line=bundle.manifest.name, runtime="triton", provider=hub.address)
    box = set_up(store, hub.address)
    here = reader(box)
    for dies in (False, True):
        if dies:
            hub.fault, hub.dies_at = "lies", hub.inferences + 4
        stored = [Ingest(box).accept(encode(item), Source("cli", "test")).stored for item in made_up.slices(20)]
        box.planner.close_series({image.series_id for image in stored})
        read_all(here)
    jobs = [dict(row) for row in box.database.query("SELECT runtime, outcome FROM jobs WHERE kind = 'volume' ORDER BY id")]
    ran = [json.loads(job["runtime"]) for job in jobs]
    assert [job["outcome"] for job in jobs] == ["ai_ready", "ai_ready"]
    assert [(one["runtime"], one["reason"]["code"]) for one in ran] == [("triton", "choice.measured"), ("onnxruntime", "choice.fallback")]
    assert [one["leaves_box"] for one in ran] == [True, True]
    whole, again = (dict(row) for row in box.database.query("SELECT runtime, mask FROM volumes ORDER BY job_id"))
    assert (whole["runtime"].split()[0], again["runtime"].split()[0]) == ("triton", "onnxruntime")
    assert whole["mask"] == again["mask"]
    hub.fault = ""
    here.models.sessions[made].close()
    box.close()


def test_a_hub_is_never_held_against_the_version(store: Store, digest: str, hub: KserveServer) -> None:
    """Neither that it is down where the plain way must not take over, nor how long the line takes."""
    plain = Candidate("onnxruntime", "model_fp32.onnx", "fp32").to_json()
    rows = [{"candidate": plain, "state": "wrong", "code": "tune.wrong", "detail": "off", "median_ms": None}]
    select(store, digest, rows, runtime="triton")
    box = set_up(store, hub.address)
    made = reader(box)
    read = take(box, small_chest(1))
    read_all(made)
    assert Worklist(box).instance(read).state is ScanState.AI_READY
    hub.close()
    failed = [take(box, small_chest(seed)) for seed in (2, 3, 4)]
    read_all(made)
    assert {Worklist(box).instance(image).state for image in failed} == {ScanState.FAILED}
    seen = trial_monitor.measure(box.database, digest, Manifest.model_validate_json(box.model(digest)["manifest"]), 0)
    assert (seen.cases, seen.failures, seen.latency_ms) == (1, 0, None)
    box.close()


def test_a_hub_whose_golden_cases_come_out_wrong_does_not_read(tmp_path: Path, store: Store, hub: KserveServer) -> None:
    """Nobody on this box knows what was changed there since it was measured."""
    made = activate(store, add_variant(tiny_bundle(tmp_path / "bundles", "1.0.0"), "fp16", wrong).parent, "test")
    select(store, made, runtime="triton", provider=hub.address, file="model_fp16.onnx", precision="fp16")
    box = set_up(store, hub.address)
    image = take(box, small_chest())
    read_all(reader(box))
    reason = reason_of(box, image)
    assert (reason["code"], "tune.wrong" in reason["detail"]) == ("choice.fallback", True)
    box.close()


def test_what_was_measured_on_another_device_answers_the_golden_cases_before_it_reads_and_says_so(
    store: Store, digest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    select(store, digest, profile="Some Xeon with VNNI; openvino 2021.1", runtime="openvino", provider="CPU", batch=4)
    made = reader(store)
    image = take(store, small_chest())
    read_all(made)
    reason = reason_of(store, image)
    assert (reason["code"], "Some Xeon" in reason["detail"]) == ("choice.other_device", True)
    assert job_of(store, image).runtime["runtime"] == "openvino"
    assert made.models.sessions[digest].candidate.batch == 1  # no batch has been proven on this device
    runs = json.loads(store.model(digest)["self_test"])["runs"]
    assert (runs["runtime"], runs["reason"]) == ("openvino", reason)  # as the result says, for the status page
    assert main(["tune", "--show", "--data-dir", str(store.settings.data_dir)]) == 0
    assert "Some Xeon" in capsys.readouterr().out
    at = runs["at"]
    reader(store)
    assert json.loads(store.model(digest)["self_test"])["runs"]["at"] == at  # since then, not since the last start
    select(store, digest, runtime="openvino", provider="CPU")
    reader(store)
    assert json.loads(store.model(digest)["self_test"])["runs"]["reason"] == {"code": "choice.measured", "detail": ""}


def test_what_is_wrong_on_this_device_is_fallen_back_from(tmp_path: Path, store: Store) -> None:
    made = activate(store, add_variant(tiny_bundle(tmp_path / "bundles", "1.0.0"), "fp16", wrong).parent, "test")
    select(store, made, profile="another device", file="model_fp16.onnx", precision="fp16")
    image = take(store, small_chest())
    read_all(reader(store))
    reason = reason_of(store, image)
    assert (reason["code"], "tune.wrong" in reason["detail"]) == ("choice.fallback", True)
    assert job_of(store, image).runtime["precision"] == "fp32"


def test_on_another_device_the_plain_way_is_held_against_the_golden_cases_too(tmp_path: Path, store: Store) -> None:
    made = activate(store, tiny_bundle(tmp_path / "bundles", "1.0.0"), "test")
    report = json.loads(store.model(made)["self_test"])
    lying = ModelSession._check_golden_cases

    def off(self: ModelSession, runtime: Any, precision: str) -> None:
        raise InferenceError("tune.wrong", "golden-1: off by 1")

    ModelSession._check_golden_cases = off  # type: ignore[method-assign]
    try:
        with pytest.raises(InferenceError, match=r"tune\.wrong"):
            ModelSession(store.settings, made, Plan.of(None, SelfTestReport.from_json(report | {"profile": "another device"})))
        ModelSession(store.settings, made, Plan.of(None, SelfTestReport.from_json(report))).close()  # measured here: not asked again
    finally:
        ModelSession._check_golden_cases = lying  # type: ignore[method-assign]
