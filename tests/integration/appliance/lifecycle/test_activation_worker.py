"""The worker as a process while a new model comes: killed in every state, under load, dying of the model, asked by hand."""

from __future__ import annotations

import io
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from appliance.core.domain import ScanState, Source
from appliance.core.process import Lock, is_held_by_another
from appliance.core.settings import Settings
from appliance.core.wakeup import wake
from appliance.inference.model_pool import ModelPool
from appliance.inference.worker import Worker
from appliance.ingest.ingest import Ingest
from appliance.lifecycle.background_loader import Loading
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from quantize.reference.phantom import Phantom, dataset
from tests.support.activation_box import (
    ENDLESS,
    Box,
    command,
    digest_of,
    end_workers,
    looping,
    self_tests,
    wanted,
    watched,
    worker,
    write_settings,
)
from tests.support.processes import wait_for


@pytest.fixture
def box(tmp_path: Path, settings: Settings) -> Iterator[Box]:
    """A box with settings of its own on the disk, whose first model is at work."""
    made = Box(tmp_path, Store(write_settings(settings)))
    made.first()
    yield made
    end_workers()
    made.store.database.verify_audit()
    made.store.close()


def scan(box: Box, seed: int, columns: int = 512) -> int:
    """A phantom at the door; a narrow one lies in much black and is dark on the whole."""
    made = dataset(Phantom(rows=512, cols=columns, seed=seed), name=f"t-{seed}")
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    accepted = Ingest(box.store).accept(buffer.getvalue(), Source("upload", "test"))
    box.store.planner.close_series([accepted.stored.series_id])
    wake(box.store.settings)
    return accepted.stored.instance_id


def finish(box: Box) -> None:
    """A worker that does everything there is to do."""
    process = worker(box.store.settings, "--until-idle")
    assert process.wait(120) == 0


def state_of(box: Box, instance: int) -> ScanState:
    return Worklist(box.store).instance(instance).state


SLOW = {"empty": 60_000, "picture": 20_000}


@pytest.mark.parametrize(
    "moment", ["building", "proved", pytest.param("staged", marks=pytest.mark.long), pytest.param("self-test", marks=pytest.mark.long)]
)
def test_kill_9_of_the_worker_in_every_state_leaves_a_working_model(box: Box, moment: str) -> None:
    """R27: the old one reads on, the proof dies too, and the next start goes on to the end."""
    old, bundle = box.active(), looping(box.bundle("1.1.0"), **SLOW)
    number = box.journal.start(wanted(bundle))
    process = worker(box.store.settings)

    def reached() -> object:
        row = box.journal.row(number)
        if moment == "proved":
            return row["self_test"] is not None
        return row["attempts"] == 1 and row["state"] == moment and self_tests(process)

    wait_for(reached, 60)
    children = self_tests(process)
    process.kill()
    process.wait()
    for child in children:
        child.wait(10)
    assert box.active() in (old, digest_of(bundle))
    waiting = scan(box, seed=1)
    finish(box)
    assert box.state(number) == "trial"
    assert box.active() == digest_of(bundle)
    assert state_of(box, waiting) is ScanState.AI_READY


def test_kill_9_on_trial_and_in_a_rollback_leaves_a_working_model(box: Box) -> None:
    old = box.active()
    number = box.journal.start(wanted(watched(box.bundle("1.1.0"), max_failure_fraction=0.0)))
    finish(box)
    assert box.state(number) == "trial"
    for seed in range(3):
        scan(box, seed)
        box.fail()
    codes = set()
    while box.state(number) == "trial":  # killed as soon as it begins, later and later
        process = worker(box.store.settings)
        time.sleep(0.2 * 1.25 ** len(codes))
        process.kill()
        process.wait()
        codes.add(len(codes))
        assert box.active() in (old, box.journal.row(number)["digest"])
        assert len(codes) < 20
    assert box.state(number) == "rolled-back"
    assert box.active() == old
    finish(box)
    assert {state_of(box, n + 1) for n in range(3)} == {ScanState.AI_READY}


def test_a_worker_that_is_killed_with_every_attempt_gives_the_model_up(box: Box) -> None:
    old, bundle = box.active(), looping(box.bundle("1.1.0"), empty=ENDLESS)
    number = box.journal.start(wanted(bundle))
    for attempt in (1, 2, 3):
        process = worker(box.store.settings)
        wait_for(lambda attempt=attempt: box.journal.row(number)["attempts"] == attempt and box.state(number) == "building", 60)
        process.kill()
        process.wait()
    finish(box)
    assert (box.last(), box.active()) == (("failed", "activation.crash_loop"), old)


def test_a_model_the_worker_dies_of_is_taken_back(tmp_path: Path, settings: Settings, request: pytest.FixtureRequest) -> None:
    """It answers every golden case and hangs on dark films: the kernel's alarm ends the worker each time, until the loop is broken."""
    box = Box(tmp_path, Store(write_settings(settings, job_deadline_s=1.5, job_max_attempts=10)))
    request.addfinalizer(end_workers)
    old = box.first()
    number = box.journal.start(wanted(looping(box.bundle("1.1.0"), dark=ENDLESS, dark_below=0.3)))
    finish(box)
    assert box.state(number) == "trial"
    dark = scan(box, seed=1, columns=160)
    codes = [worker(box.store.settings, "--until-idle").wait(60) for _ in range(4)]
    print("exit codes of the worker:", codes)
    assert codes[:2] == [-signal.SIGALRM] * 2
    assert codes[-1] == 0
    assert (box.last(), box.active()) == (("rolled-back", "activation.reboot_loop"), old)
    assert state_of(box, dark) is ScanState.AI_READY
    finding = Worklist(box.store).instance(dark).findings[0]
    assert finding.model_digest == old


_LOAD_HANGS = """
import pathlib, sys, time
from appliance.core.settings import Settings
from appliance.inference import model_session, worker

worker.LOAD_DEADLINE_S = 2.0
model_session.open_runtime = lambda *_, **__: time.sleep(600)
worker.run(Settings.load(pathlib.Path(sys.argv[1])), until_idle=True)
"""


def test_a_load_that_hangs_at_the_start_ends_the_worker_and_the_next_analyses(
    tmp_path: Path, settings: Settings, request: pytest.FixtureRequest
) -> None:
    """As after an update of a driver: nobody would notice a worker that waits for ever."""
    box = Box(tmp_path, Store(write_settings(settings)))
    request.addfinalizer(end_workers)
    box.first()
    film = scan(box, seed=1)
    done = subprocess.run([sys.executable, "-c", _LOAD_HANGS, str(box.store.settings.data_dir)], check=False, timeout=120)
    assert done.returncode == -signal.SIGALRM
    assert worker(box.store.settings, "--until-idle").wait(120) == 0
    assert state_of(box, film) is ScanState.AI_READY


def test_switch_under_load_keeps_no_scan_waiting(box: Box) -> None:
    """Scans come in without a pause while a model is proven and switched; figures are printed, what is asserted is structure."""
    old, bundle = box.active(), box.bundle("1.1.0")
    process = worker(box.store.settings)
    stop, taken = threading.Event(), []

    def send() -> None:
        store = Store(box.store.settings)
        sender = Box(box.bundles.parent, store)
        while not stop.is_set():
            taken.append(scan(sender, seed=len(taken)))
        store.close()

    wait_for(lambda: is_held_by_another(box.store.settings.data_dir, "worker"), 60)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        wait_for(lambda: len(taken) > 5, 60)
        done = command(box.store.settings, "activate", bundle)
        assert done.returncode == 0, done.stderr
        at_switch = len(taken)
        wait_for(lambda: len(taken) > at_switch + 10, 60)
    finally:
        stop.set()
        thread.join()
    wait_for(lambda: box.store.queue.pending_jobs() == 0, 120)
    process.terminate()
    assert process.wait(30) == 0
    jobs = box.store.database.query("SELECT * FROM jobs ORDER BY finished_at")
    assert {row["outcome"] for row in jobs} == {"ai_ready"}
    assert [row["attempts"] for row in jobs] == [1] * len(jobs)
    assert {row["model_digest"] for row in jobs} == {old, digest_of(bundle)}
    moments = [datetime.fromisoformat(row["finished_at"]).timestamp() for row in jobs]
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    print(f"{len(jobs)} scans; between two results: median {statistics.median(gaps) * 1000:.0f} ms, longest {max(gaps) * 1000:.0f} ms")


def worker_here(box: Box) -> Worker:
    """A worker in this process, without an alarm."""
    made = Worker(box.store, set_deadline=lambda _seconds: None)
    made.prepare()
    return made


def read_all(here: Worker, count: int) -> None:
    for _ in range(count):
        here.step()
        assert here.run_once()


def test_scans_are_read_while_the_proof_stands_still(box: Box) -> None:
    """The loop waits for nothing: the proof is stopped for good, and scan after scan is read."""
    number = box.journal.start(wanted(box.bundle("1.1.0")))
    here = worker_here(box)
    wait_for(lambda: here.step() or here.activator.self_test_pid, 60)
    assert here.activator.self_test_pid
    os.kill(here.activator.self_test_pid, signal.SIGSTOP)
    for seed in range(5):
        scan(box, seed)
    read_all(here, 5)
    assert box.under_way(number)
    here.activator.stop()
    assert box.journal.row(number)["attempts"] == 0  # stopped in order: no failed attempt
    assert not self_tests()


def test_scans_are_read_while_the_new_model_is_loaded_beside(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loading stands still in its thread, and scan after scan is read by the old one."""
    go, old = threading.Event(), box.active()
    begin = Loading._run

    def wait_first(self: Loading, *arguments: object) -> None:
        assert go.wait(60)
        begin(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Loading, "_run", wait_first)
    number = box.journal.start(wanted(box.bundle("1.1.0")))
    here = worker_here(box)
    wait_for(lambda: here.step() or box.journal.row(number)["self_test"], 60)
    for seed in range(5):
        scan(box, seed)
    read_all(here, 5)
    assert box.state(number) == "self-test"
    go.set()
    last = scan(box, seed=6)
    wait_for(lambda: here.step() or box.state(number) == "trial", 60)
    assert here.run_once()  # planned before the switch: still read by the one before
    assert Worklist(box.store).instance(last).findings[0].model_digest == old
    here.activator.stop()


def test_the_old_model_is_let_go_when_no_job_names_it(box: Box) -> None:
    old = box.active()
    here = worker_here(box)
    number = box.journal.start(wanted(box.bundle("1.1.0")))
    wait_for(lambda: here.step() or box.journal.row(number)["self_test"], 60)
    scan(box, seed=1)
    wait_for(lambda: here.step() or box.state(number) == "trial", 60)
    new = box.active()
    assert old is not None and new is not None
    assert set(here.models.sessions) == {old, new}
    here.models._next_drop = 0.0
    here.step()
    assert old in here.models.sessions
    assert here.run_once()
    here.models._next_drop = 0.0
    here.step()
    assert set(here.models.sessions) == {new}
    here.activator.stop()


def test_a_withdrawn_model_reads_nothing_more_though_its_successor_hangs(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    old = box.active()
    number = box.journal.start(wanted(box.bundle("1.1.0")))
    finish(box)
    assert box.state(number) == "trial"
    waiting = scan(box, seed=1)
    box.journal.record_restrictions("cxr-pneumonia", "1.0.0", {"1.1.0": "x"})
    go = threading.Event()
    load, asked = ModelPool.load_successor, list[str]()
    monkeypatch.setattr(ModelPool, "load_successor", lambda self, *which: (asked.append(which[0]), go.wait(120)) and load(self, *which))
    here = worker_here(box)
    wait_for(lambda: here.step() or asked, 60)  # the successor is being loaded now
    for _ in range(3):
        here.step()
        assert not here.run_once()
    assert (asked, box.state(number)) == ([old], "trial")
    assert state_of(box, waiting) is ScanState.QUEUED
    go.set()
    wait_for(lambda: here.step() or box.state(number) == "withdrawn", 60)
    assert here.run_once()
    assert Worklist(box.store).instance(waiting).findings[0].model_digest == old
    here.activator.stop()


def test_by_hand_beside_a_running_worker(box: Box) -> None:
    """The command asks the worker, shows how far it is, and ends when the model is at work."""
    old = box.active()
    process = worker(box.store.settings)
    wait_for(lambda: is_held_by_another(box.store.settings.data_dir, "worker"), 60)
    settings = box.store.settings
    done = command(settings, "activate", looping(box.bundle("1.1.0"), **SLOW))
    assert (done.returncode, "active: cxr-pneumonia 1.1.0" in done.stdout) == (0, True), done.stderr
    assert "self-test" in done.stderr
    bad = command(settings, "activate", looping(box.bundle("1.2.0", good=False)))
    assert bad.returncode == 1
    assert "self-test" in bad.stderr
    assert "hint:" in bad.stderr
    back = command(settings, "rollback")
    assert (back.returncode, box.active()) == (0, old), back.stderr
    process.terminate()
    assert process.wait(30) == 0


def test_by_hand_beside_a_box_whose_worker_is_just_down_waits_for_it(box: Box) -> None:
    """A command must not take the lock that the supervisor's next worker needs: scans would wait for the whole proof."""
    settings = box.store.settings
    lock = Lock(settings.data_dir, "supervisor")
    line = [sys.executable, "-m", "appliance", "models", "activate", str(box.bundle("1.1.0")), "--data-dir", str(settings.data_dir)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as asking:
        wait_for(lambda: box.journal.pending() is not None, 60)
        assert not is_held_by_another(settings.data_dir, "worker")
        finish(box)
        assert asking.wait(30) == 0
    lock.release()
    assert box.last() == ("trial", "")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("activate",), "reference"),
        (("list", "x"), "models list"),
        (("rollback", "--again"), "activate"),
        (("activate", "9.9.9"), "models list"),
        (("rollback",), "models list"),
        (("rollback", "no-such-line"), "models list"),
    ],
)
def test_wrong_use_says_what_to_do(box: Box, arguments: tuple[str, ...], hint: str) -> None:
    done = command(box.store.settings, *arguments)
    assert done.returncode in (1, 2)
    assert "hint:" in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def test_list_and_history_are_tables_for_people_and_json_for_programs(box: Box) -> None:
    settings = box.store.settings
    assert command(settings, "activate", box.bundle("1.1.0", good=False)).returncode == 1
    listed, history = command(settings, "list"), command(settings, "history")
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:]] == [["active", "cxr-pneumonia", "1.0.0"]]
    assert [line.split()[1:4] for line in history.stdout.splitlines()[1:]] == [
        ["failed", "cxr-pneumonia", "1.1.0"],
        ["good", "cxr-pneumonia", "1.0.0"],
    ]
    assert "failed its self-test" in history.stdout
    entries = json.loads(command(settings, "history", "--json").stdout)
    assert [(entry["state"], entry["code"]) for entry in entries] == [("failed", "model.self_test"), ("good", None)]
    assert entries[1]["self_test"]["details"]["provider"] == "CPUExecutionProvider"
    assert json.loads(command(settings, "list", "--json").stdout)[0]["digest"] == box.active()
    chinese = subprocess.run(
        [sys.executable, "-m", "appliance", "models", "history", "--data-dir", str(settings.data_dir)],
        capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "zh_CN.UTF-8", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert "模型自检未通过" in chinese.stdout


def test_a_prover_is_started_by_the_box_alone(box: Box, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "appliance", "prove", "--data-dir", str(tmp_path), "--origin", str(tmp_path), "--digest", "a" * 64]
    for parent, code in (("1", 2), (str(os.getppid()), 1)):
        done = subprocess.run([*line, "--memory-bytes", "1000000000", "--parent", parent], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, "")
