"""``make demo`` below make: a whole box from an empty folder, its log without patients, TLS on the network, a clean end."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import requests

from appliance.cli import demo
from appliance.core.process import LOG_FIELDS
from appliance.core.settings import Settings
from appliance.service.supervisor import Supervisor
from appliance.store.store import Store
from model_sync.json_logging import JsonFormatter
from quantize.reference.phantom import write_samples
from tests.support.activated import reference_box
from tests.support.dicom_sender import send
from tests.support.paths import ROOT
from tests.support.processes import run_here, wait_for
from tests.support.scans import dataset, scan_bytes

_POPEN = subprocess.Popen


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's sample scans."""
    directory = tmp_path_factory.mktemp("samples")
    write_samples(directory)
    return directory


def command(box: Path, samples: Path, *more: str) -> list[str]:
    """The command that make runs."""
    return [sys.executable, "-m", "appliance", "demo", "--data-dir", str(box), "--samples", str(samples), *more]


def test_once_finds_something_and_a_second_start_keeps_it(tmp_path: Path, samples: Path) -> None:
    first = subprocess.run(command(tmp_path / "box", samples, "--once"), capture_output=True, text=True, timeout=120, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "above threshold" in first.stdout
    assert re.search(r"Page +http://127\.0\.0\.1:\d+/", first.stdout)
    password = re.search(r"Login +demo / (\S+) +\(one-time password\)", first.stdout)
    assert password
    assert re.search(r"AE title CLINICBOX, 127\.0\.0\.1 port \d+", first.stdout)
    second = subprocess.run(command(tmp_path / "box", samples, "--once"), capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 0
    assert password[1] not in second.stdout


def test_own_scans_come_first_and_a_taken_port_is_no_obstacle(tmp_path: Path, samples: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.dcm").write_bytes(scan_bytes(Modality="CT"))
    line = command(reference_box(tmp_path / "box"), samples, "--once", "--data", str(own))
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        except OSError as somebody_has_it_already:
            assert somebody_has_it_already.errno
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert done.stdout.index("mine.dcm: out of scope") < done.stdout.index("01-normal.dcm")
    assert "127.0.0.1:8080" not in done.stdout


@pytest.fixture
def running(tmp_path: Path, samples: Path) -> Iterator[tuple[subprocess.Popen[str], list[str], Path]]:
    """A demo box on the network, up and through its samples; its process, what it printed, its data directory."""
    box = tmp_path / "box"
    process = subprocess.Popen(command(box, samples, "--lan"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert process.stdout
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    reader.start()
    try:
        wait_for(lambda: any("Ctrl-C" in line for line in lines) or process.poll() is not None, 180)
        assert process.poll() is None, "".join(lines)
        yield process, lines, box
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def test_r14_on_the_network_only_tls_and_ctrl_c_stops_everything(
    running: tuple[subprocess.Popen[str], list[str], Path], tmp_path: Path
) -> None:
    process, lines, box = running
    page = re.search(r"Page +https://([^:]+):(\d+)/", "".join(lines))
    assert page, "".join(lines)
    port = int(page[2])
    answer = requests.get(f"https://localhost:{port}/login", verify=str(box / "keys" / "web.crt"), timeout=20)
    assert answer.status_code == 200
    session = next(cookie for cookie in answer.cookies if cookie.name == "clinicbox")  # holds the form's token before a login
    assert session.secure
    assert session.has_nonstandard_attr("HttpOnly")
    assert [path.name for path in (box / "box.log", *box.glob("box.sqlite3*"), box) if path.stat().st_mode & 0o077] == []
    again = subprocess.run(command(box, tmp_path), capture_output=True, text=True, timeout=60, check=False)
    assert (again.returncode, "already running" in again.stderr, f":{port}/" in again.stderr) == (2, True, True), again.stderr
    assert f"web_port = {port}" in (box / "box.toml").read_text()
    with pytest.raises(requests.RequestException):
        requests.get(f"http://localhost:{port}/login", timeout=5)
    assert (box / "keys" / "web.pem").stat().st_mode & 0o077 == 0
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    wait_for(lambda: _closed(port))
    assert "Traceback" not in "".join(lines)
    assert "Traceback" not in (box / "box.log").read_text()


def _closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_r18_no_patient_data_in_the_log(running: tuple[subprocess.Popen[str], list[str], Path]) -> None:
    _, lines, box = running
    port = int((box / "run" / "dicom.port").read_text())
    canary = {"PatientName": "CANARY^NAME", "PatientID": "CANARY-ID", "AccessionNumber": "CANARY-ACC", "PatientBirthDate": "19330303"}
    good, broken = dataset(**canary, SOPInstanceUID="1.2.3.777.1"), dataset(**canary, PixelData=None, StudyDescription="CANARY DESC")
    odd = dataset(**canary, Rows=60000, Columns=60000, PixelData=b"\0\0")
    assert send(port, good, broken, odd)[0] == 0
    store = Store(Settings.load(box))
    wait_for(lambda: store.queue.pending_jobs() == 0, 120)
    store.close()
    log = (box / "box.log").read_text()
    assert "refused" in log
    for canary_text in ("CANARY", "19330303", "1.2.3.777", good.StudyInstanceUID, good.SeriesInstanceUID, "演示", "DEMO-00"):
        assert canary_text not in log
    assert "CANARY" not in "".join(lines)


def test_the_log_drops_what_an_exception_says() -> None:
    try:
        raise ValueError("CANARY^NAME")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "job failed", None, sys.exc_info())
    record.job, record.patient = 7, "CANARY"
    line = JsonFormatter(LOG_FIELDS).format(record)
    assert "CANARY" not in line
    assert json.loads(line) | {"at": ""} == {
        "at": "", "level": "ERROR", "logger": "x", "message": "job failed", "job": 7, "exception": "ValueError",
        "where": json.loads(line)["where"],
    }  # fmt: skip


def test_once_without_anything_to_find_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    box = reference_box(tmp_path / "box")
    done = subprocess.run(command(box, tmp_path / "empty", "--once"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4, done.stderr
    assert "Nothing was found" in done.stdout


class Watched:
    """A supervisor that only counts how often it looked."""

    ticks = 0

    def tick(self) -> None:
        self.ticks += 1


def test_reading_is_supervised_and_ends_when_asked(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.sys, "executable", "/bin/sh")
    monkeypatch.setattr(demo.subprocess, "Popen", lambda _, **more: _POPEN(["/bin/sh", "-c", "sleep 60"], **more))
    watched = Watched()
    started = time.monotonic()
    code = demo._analyse_scans(cast(Supervisor, watched), settings, [tmp_path, tmp_path], lambda: watched.ticks >= 3)
    assert (code, watched.ticks) == (0, 3)
    assert time.monotonic() - started < 10


def test_ctrl_c_during_the_reading_ends_cleanly(tmp_path: Path, samples: Path) -> None:
    pipe = tmp_path / "in"
    pipe.mkdir()
    for number in range(400):
        (pipe / f"{number}.dcm").write_bytes(scan_bytes())
    process = subprocess.Popen(
        command(reference_box(tmp_path / "box"), samples, "--data", str(pipe)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if line.startswith("Analysing"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the whole group
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "has stopped" in out
    assert "Traceback" not in errors


def test_children_get_the_settings_file_that_was_given(tmp_path: Path) -> None:
    file = tmp_path / "clinic.toml"
    file.write_text('data_dir = "box"\nae_title = "OTHER"\n')
    supervisor = Supervisor(Settings.load(file), given=file)
    assert all(child.command[-2:] == ["--data-dir", str(file)] for child in supervisor.children)
    supervisor.stop()


def scripts(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the console scripts, by the function its entry point names."""
    module, function, *rest = arguments
    return run_here(getattr(importlib.import_module(module), function), *rest)


@pytest.mark.parametrize(("module", "function"), [("model_sync.agent.cli", "main"), ("model_sync.fleet.cli", "main")])
def test_a_bundle_can_be_verified_by_hand(module: str, function: str, tmp_path: Path) -> None:
    good = scripts(module, function, "verify", str(ROOT / "appliance/bundles/cxr-pneumonia"))
    assert good.returncode == 0
    assert "intact" in good.stdout
    bad = scripts(module, function, "verify", str(tmp_path))
    assert bad.returncode == 1
    assert "hint:" in bad.stderr
    assert scripts(module, function, "nonsense").returncode == 2


def test_quantize_draws_phantoms(tmp_path: Path) -> None:
    done = scripts("quantize.cli", "main", "draw-phantoms", str(tmp_path))
    assert done.returncode == 0
    assert len(list(tmp_path.iterdir())) == 5
    assert scripts("quantize.cli", "main", "build-reference").returncode == 2


def test_readme_names_every_command_that_exists() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`make ([a-z-]+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"appliance ([a-z]+) ", readme):
        assert subprocess.run([sys.executable, "-m", "appliance", name, "--help"], capture_output=True, check=False).returncode == 0, name
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
