from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from appliance.service import supervisor
from appliance.service.supervisor import Supervisor

# A process that ignores SIGTERM, as nginx may while a client reads, and one that it started.
_MASTER = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    " quiet = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)';"
    " child = subprocess.Popen([sys.executable, '-c', quiet]);"
    " open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(60)"
)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_killed_process_started_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_STOP_S", 0.5)
    (tmp_path / "box").mkdir()
    watched = Supervisor(Settings.parse({"data_dir": tmp_path / "box"}))
    started = tmp_path / "pid"
    watched.children = [supervisor.ManagedProcess("proxy", [sys.executable, "-c", _MASTER, str(started)])]
    watched.start()
    limit = time.monotonic() + 30
    while not (started.exists() and started.read_text()) and time.monotonic() < limit:
        time.sleep(0.05)
    pid = int(started.read_text())
    assert is_running(pid)
    watched.stop()
    while is_running(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not is_running(pid)
    assert not os.path.exists(f"/proc/{watched.children[0].process.pid}")  # type: ignore[union-attr]
