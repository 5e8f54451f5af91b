"""The worker as a process: real model, real scans, hangs, kills, memory, poison; the supervisor that starts it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom

from appliance.core.domain import ScanState
from appliance.core.errors import ApplianceError
from appliance.core.process import Lock
from appliance.core.settings import Settings
from appliance.core.wakeup import wake
from appliance.lifecycle.model_control import reference_bundle
from appliance.service.supervisor import Supervisor, web_address
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from tests.support.activated import activate
from tests.support.processes import wait_for
from tests.support.scans import encode, scan_bytes
from tests.support.worker_box import chest, prepared_worker, take


def box(settings: Settings, **changes: Any) -> tuple[Settings, Store]:
    """A box with the reference model at work and its settings written down."""
    values = {"web_port": 0, "dicom_port": 0, "disk_reserve_bytes": 0, "tune_at_activation": "false"} | changes
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    (settings.data_dir / "box.toml").write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
    store = Store(Settings.load(settings.data_dir))
    activate(store, reference_bundle(), "test")
    return store.settings, store


def work(settings: Settings) -> int:
    """Run a worker until nothing is left; its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "appliance", "worker", "--until-idle", "--data-dir", str(settings.data_dir)], check=False
    ).returncode


def test_from_door_to_localised_finding(settings: Settings) -> None:
    settings, store = box(settings)
    number = take(store, chest(seed=1))
    assert work(settings) == 0
    view = Worklist(store).instance(number)
    assert view.state is ScanState.AI_READY
    (finding,) = view.findings
    assert 0 <= finding.score <= 1
    assert finding.positive == (finding.score >= finding.threshold)
    assert finding.runtime.startswith("onnxruntime")
    assert "CPU" in finding.runtime
    assert finding.peak
    assert 0 <= finding.peak[0] <= 512
    assert Worklist(store).heatmap(finding.id).startswith(b"\x89PNG")
    assert set(view.jobs[0].timing_ms) == {"decode", "preprocess", "input_check", "infer", "postprocess", "store", "total"}
    store.database.verify_audit()


def test_a_scan_that_hangs_the_worker_is_stopped_and_poisoned_and_the_next_is_read(settings: Settings) -> None:
    """The disk hangs under one scan's file (a FIFO nobody writes to): the kernel's alarm ends the worker, not a thread of ours."""
    settings, store = box(settings, job_deadline_s=1.5, job_max_attempts=2)
    hung, good = take(store, chest(seed=1)), take(store, chest(seed=2))
    row = store.database.one("SELECT content_sha256 FROM instances WHERE id = ?", hung)
    assert row
    path = settings.data_dir / "content" / row["content_sha256"][:2] / row["content_sha256"]
    path.rename(path.with_suffix(".whole"))
    os.mkfifo(path)
    codes = [work(settings), work(settings), work(settings)]
    assert codes == [-signal.SIGALRM, -signal.SIGALRM, 0]
    worklist = Worklist(store)
    view = worklist.instance(hung)
    assert (view.state, view.reason.code if view.reason else "") == (ScanState.FAILED, "job.deadline")
    assert worklist.instance(good).state is ScanState.AI_READY
    path.unlink()
    path.with_suffix(".whole").rename(path)
    assert store.queue.retry(hung, "demo")
    assert work(settings) == 0
    assert worklist.instance(hung).state is ScanState.AI_READY


def test_too_little_memory_fails_the_job_not_the_box(settings: Settings) -> None:
    settings, store = box(settings, process_memory_max_bytes=2**28)
    big = take(store, scan_bytes(Rows=7000, Columns=7000, PixelData=os.urandom(98_000) * 1000, BitsStored=16, HighBit=15))
    small = take(store, chest(seed=1))
    for _ in range(4):
        work(settings)
    worklist = Worklist(store)
    assert worklist.instance(small).state is ScanState.AI_READY
    view = worklist.instance(big)
    assert view.state is ScanState.FAILED
    assert view.reason
    assert view.reason.code in ("job.memory", "job.memory_input", "job.crashed")


def test_blank_saturated_lateral_and_other_modalities_are_told_apart(settings: Settings) -> None:
    settings, store = box(settings)
    white = (4095).to_bytes(2, "little") * (600 * 600)
    cases = {
        take(store, scan_bytes(Rows=600, Columns=600, PixelData=bytes(2 * 600 * 600))): (ScanState.QUALITY_REJECTED, "quality.blank"),
        take(store, scan_bytes(Rows=600, Columns=600, PixelData=white)): (ScanState.QUALITY_REJECTED, "quality."),
        take(store, scan_bytes(ViewPosition="LL")): (ScanState.OUT_OF_SCOPE, "scope.view"),
        take(store, scan_bytes(Modality="MR")): (ScanState.OUT_OF_SCOPE, "scope.modality"),
        take(store, scan_bytes(BodyPartExamined="HAND")): (ScanState.OUT_OF_SCOPE, "scope.body_part"),
    }
    assert work(settings) == 0
    for number, (state, code) in cases.items():
        view = Worklist(store).instance(number)
        assert view.state is state
        assert view.reason
        assert view.reason.code.startswith(code)
        assert not view.findings


def test_what_is_assumed_stands_in_the_result(settings: Settings) -> None:
    settings, store = box(settings)
    made = pydicom.dcmread(BytesIO(chest(seed=1)))
    stated = ("BodyPartExamined", "ViewPosition", "PatientAge", "PatientBirthDate", "PatientOrientation")
    for name in (*stated, "StudyDescription", "SeriesDescription", "ProtocolName"):
        if name in made:
            delattr(made, name)
    number = take(store, encode(made))
    work(settings)
    codes = {note.code for note in Worklist(store).instance(number).jobs[0].notes}
    assert {"assume.body_part", "assume.view", "caution.age_unknown"} <= codes


def test_without_a_model_nothing_looks_negative(settings: Settings) -> None:
    store = Store(settings)
    number = take(store, scan_bytes())
    (settings.data_dir / "box.toml").write_text("disk_reserve_bytes = 0\n")
    work(settings)
    view = Worklist(store).instance(number)
    assert (view.state, view.reason.code if view.reason else "") == (ScanState.NOT_ANALYSED, "scope.no_model")


def test_one_worker_per_data_directory(settings: Settings) -> None:
    settings, _ = box(settings)
    lock = Lock(settings.data_dir, "worker")
    assert work(settings) == 2
    lock.release()
    assert work(settings) == 0


def test_waking_nobody_is_no_error(settings: Settings) -> None:
    wake(settings)
    Store(settings)
    (settings.data_dir / "run").mkdir()
    os.mkfifo(settings.data_dir / "run" / "worker.wake")
    wake(settings)


def test_the_supervisor_starts_what_falls_and_stops_what_runs(settings: Settings, tmp_path: Path) -> None:
    settings, store = box(settings)
    supervisor = Supervisor(settings, tmp_path / "box.log")
    supervisor.start()
    try:
        wait_for(lambda: supervisor.tick() or supervisor.ready(), 60)
        worker = supervisor.children[0]
        assert worker.process
        first = worker.process.pid
        wait_for(lambda: supervisor.tick() or _holds(settings, first))
        worker.process.kill()
        wait_for(lambda: supervisor.tick() or (worker.process is not None and worker.process.pid != first), 60)
        number = take(store, chest(seed=1))
        wake(settings)
        wait_for(lambda: supervisor.tick() or Worklist(store).instance(number).state is ScanState.AI_READY, 60)
        assert web_address(settings)
    finally:
        started = time.monotonic()
        supervisor.stop()
    assert time.monotonic() - started < 15
    assert all(child.process is None or child.process.poll() is not None for child in supervisor.children)
    assert web_address(settings) is None
    Lock(settings.data_dir, "supervisor").release()


def _holds(settings: Settings, pid: int) -> bool:
    path = settings.data_dir / "run" / "worker.lock"
    return path.exists() and path.read_text() == str(pid)


def test_a_killed_supervisor_leaves_no_orphans(settings: Settings) -> None:
    settings, _ = box(settings)
    parent = subprocess.Popen([sys.executable, "-m", "appliance", "serve", "--data-dir", str(settings.data_dir)], stderr=subprocess.DEVNULL)
    wait_for(lambda: web_address(settings), 60)
    parent.kill()
    parent.wait()
    wait_for(lambda: web_address(settings) is None, 60)
    for role in ("worker", "receiver"):
        wait_for(lambda role=role: _free(settings, role), 60)


def _free(settings: Settings, role: str) -> bool:
    try:
        Lock(settings.data_dir, role).release()
    except ApplianceError:
        return False
    return True


def test_a_damaged_model_fails_its_jobs_with_the_reason_and_does_not_stop_the_worker(settings: Settings) -> None:
    settings, store = box(settings)
    number = take(store, chest(seed=1))
    weights = next((settings.data_dir / "models").glob("*/*.onnx"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert work(settings) == 0
    view = Worklist(store).instance(number)
    assert (view.state, view.reason.code if view.reason else "") == (ScanState.FAILED, "model.invalid")
    weights.write_bytes(whole)
    assert store.queue.retry(number, "demo")
    assert work(settings) == 0
    assert Worklist(store).instance(number).state is ScanState.AI_READY


def test_a_scan_lost_from_the_disk_is_said_to_be_lost(settings: Settings) -> None:
    settings, store = box(settings)
    number = take(store, chest(seed=1))
    for path in (settings.data_dir / "content").rglob("*"):
        if path.is_file():
            path.unlink()
    assert work(settings) == 0
    view = Worklist(store).instance(number)
    assert (view.state, view.reason.code if view.reason else "") == (ScanState.NOT_ANALYSED, "store.missing")


def test_a_picture_no_film_could_have_the_shape_of_is_refused_before_it_costs_memory(settings: Settings) -> None:
    settings, store = box(settings)
    number = take(store, scan_bytes(Rows=20000, Columns=70, PixelData=os.urandom(2800) * 1000))
    assert work(settings) == 0
    view = Worklist(store).instance(number)
    assert (view.state, view.reason.code if view.reason else "") == (ScanState.QUALITY_REJECTED, "quality.shape")


def test_r40_nothing_reports_home(settings: Settings, tmp_path: Path) -> None:
    """ONNX Runtime keeps its telemetry's device id in the home directory as soon as it may report: it must not."""
    settings, store = box(settings)
    take(store, chest(seed=1))
    command = [sys.executable, "-m", "appliance", "worker", "--until-idle", "--data-dir", str(settings.data_dir)]
    subprocess.run(command, check=True, env=os.environ | {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert not list(tmp_path.glob("home/**/*onnxruntime*"))
    assert not list(tmp_path.glob("cache/**/*onnxruntime*"))


def test_other_processes_see_that_jobs_run_until_none_is_left(settings: Settings) -> None:
    """What measures time waits for them (appliance/tuning/idle_wait.py)."""
    settings, store = box(settings)
    code = "import sys, pathlib, appliance.core.job_activity as it; print(it.JobWatch(pathlib.Path(sys.argv[1])).has_worked())"

    def has_worked() -> bool:
        done = subprocess.run([sys.executable, "-c", code, str(settings.data_dir)], capture_output=True, text=True, check=True)
        return done.stdout == "True\n"

    here = prepared_worker(store)
    assert not has_worked()
    take(store, chest(seed=1))
    assert here.run_once()
    assert has_worked()  # the next job may follow at once
    assert not here.run_once()
    assert not has_worked()
