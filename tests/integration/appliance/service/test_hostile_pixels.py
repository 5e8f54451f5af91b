"""A whole box gets images whose decoders crash, hang or eat memory: every program goes on, and so does the analysis of other images."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from appliance.core.settings import Settings
from appliance.lifecycle.model_control import reference_bundle
from appliance.service.supervisor import Supervisor, web_address
from appliance.store.store import Store
from tests.support import hostile_images
from tests.support.activated import activate
from tests.support.activation_box import worker
from tests.support.dicom_sender import send
from tests.support.processes import children_running, has_ended, wait_for
from tests.support.scans import dataset
from tests.support.web_box import Box, upload
from tests.support.worker_box import take

JOB_DEADLINE_S = 8.0


@pytest.fixture
def box(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store of a box with the reference model; programs that a test starts have hostile decoders."""
    settings.data_dir.mkdir(parents=True)
    values = {"web_port": 0, "dicom_port": 0, "disk_reserve_bytes": 0, "job_deadline_s": JOB_DEADLINE_S, "tune_at_activation": "false"}
    (settings.data_dir / "box.toml").write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hostile_images.DECODERS), os.environ.get("PYTHONPATH", "")]))
    store = Store(Settings.load(settings.data_dir))
    activate(store, reference_bundle(), "test")
    yield store
    store.close()


def states(store: Store) -> dict[int, tuple[str, str]]:
    """State and reason of each image."""
    rows = store.database.query("SELECT id, state, reason FROM instances ORDER BY id")
    return {row["id"]: (row["state"], row["reason"] or "") for row in rows}


def test_r45_hostile_pixels_end_neither_worker_nor_web_server_nor_receiver(box: Store, tmp_path: Path) -> None:
    supervisor = Supervisor(box.settings, tmp_path / "box.log")
    supervisor.start()
    try:
        wait_for(lambda: supervisor.tick() or supervisor.ready(), 60)
        address = web_address(box.settings)
        assert address is not None
        pages = Box(box.settings, f"http://127.0.0.1:{address['port']}", box)
        doctor = pages.person()
        programs = {child.name: child.process.pid for child in supervisor.children if child.process is not None}
        reasons = {"segfault": "crashed", "eat": "memory", "hang": "deadline", "abort": "crashed"}
        hostile = {
            upload(doctor, f"{action}.dcm", hostile_images.jpeg_chest(number, action))[0]["instance_id"]: f"pixel.decoder_{reason}"
            for number, (action, reason) in enumerate(reasons.items())
        }
        good = [upload(doctor, f"{number}.dcm", hostile_images.jpeg_chest(number))[0]["instance_id"] for number in (10, 11)]
        wait_for(lambda: supervisor.tick() or box.queue.pending_jobs() == 0, 120)
        outcome = states(box)
        assert {number: outcome[number][0] for number in good} == dict.fromkeys(good, "ai_ready")
        assert {number: outcome[number][0] for number in hostile} == dict.fromkeys(hostile, "not_analysed")
        assert all(code in outcome[number][1] for number, code in hostile.items()), outcome

        for number, code in hostile.items():  # the viewer decodes in the web server
            answer = doctor.get(f"/api/instances/{number}/pixels", timeout=60)
            assert (answer.status_code, answer.json()["code"]) == (422, code)
        assert doctor.get(f"/api/instances/{good[0]}/pixels").json()["rows"] == 512
        for action in ("segfault", "hang"):
            assert upload(doctor, f"{action}.png", hostile_images.png(action))[0]["code"] == "ingest.decoder"
        assert upload(doctor, "good.png", hostile_images.png(seed=5))[0]["instance_id"]

        port = int((box.settings.data_dir / "run" / "dicom.port").read_text())
        assert send(port, dataset(PatientID="after")) == [0x0000]
        supervisor.tick()
        assert {child.name: child.process.pid for child in supervisor.children if child.process is not None} == programs
        assert doctor.get("/healthz").ok
        decoders = [child for pid in programs.values() for child in children_running("decoder_child", pid)]
        assert decoders
    finally:
        supervisor.stop()
    wait_for(lambda: all(has_ended(child.pid) for child in decoders), 10)


def test_worker_that_is_killed_leaves_no_decoder_behind(box: Store) -> None:
    """Though native code holds the interpreter lock of the decoder, which therefore notices nothing by itself."""
    take(box, hostile_images.jpeg_chest(1, "hang"))
    process = worker(box.settings)
    try:
        found: list[Any] = wait_for(lambda: children_running("decoder_child", process.pid))
        decoder = found[0]
        wait_for(lambda: _is_asleep_in_decoder(decoder))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert has_ended(decoder.pid)


def _is_asleep_in_decoder(process: psutil.Process) -> bool:
    """Whether a process hangs as the image told it to: in pause(2)."""
    return Path(f"/proc/{process.pid}/syscall").read_text().split()[0] == "34"


def test_decoder_that_is_killed_from_outside_costs_an_image_nothing(box: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the kernel when memory is short: the first time only."""
    (tmp_path / "once").mkdir()
    monkeypatch.setenv("HOSTILE_ONCE", str(tmp_path / "once"))
    number = take(box, hostile_images.jpeg_chest(1, "once"))
    process = worker(box.settings, "--until-idle")
    assert process.wait(120) == 0
    assert states(box)[number][0] == "ai_ready"
    assert not (tmp_path / "once").exists()


def test_decoder_that_is_always_killed_fails_the_job_after_its_attempts_and_the_next_is_analysed(box: Store) -> None:
    bad = take(box, hostile_images.jpeg_chest(1, "killed"))
    good = take(box, hostile_images.jpeg_chest(2))
    process = worker(box.settings, "--until-idle")
    assert process.wait(180) == 0
    outcome = states(box)
    assert outcome[good][0] == "ai_ready"
    assert outcome[bad][0] == "failed" and "job.memory_input" in outcome[bad][1]
    assert box.database.query("SELECT attempts FROM jobs WHERE instance_id = ?", bad)[0]["attempts"] == box.settings.job_max_attempts
