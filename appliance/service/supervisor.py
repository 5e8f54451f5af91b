"""The supervisor: starts the processes of the box (worker, receiver, web server, nginx, audit sender), restarts what crashed, stops them.

nginx runs only where the page has a certificate; a signal makes it load a new one. The supervisor imports little, so that it has no
reason to crash.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.core.certificates import Renewal
from appliance.core.process import Lock, bracketed, die_with_parent, own_address, stop_on_signal
from appliance.core.settings import Settings
from appliance.store.store import Store

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S: Final = 0.2
_LONGEST_BACKOFF_S: Final = 10.0
_STABLE_S: Final = 30.0
_STOP_S: Final = 15.0
_TICK_S: Final = 0.1
_CHECK_FILES_S: Final = 2.0
# Saves memory on a small box: two malloc arenas per process instead of eight per core, early release of freed memory, no BLAS threads.
# And no telemetry: the box contacts only configured destinations.
_ENVIRONMENT: Final = {
    "MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072", "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1",
}  # fmt: skip


@dataclass
class ManagedProcess:
    """One process of the box."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    backoff_s: float = _FIRST_BACKOFF_S
    next_start_at: float = 0.0


class Supervisor:
    """Runs the processes of one box.

    Args:
        log: file for the output of the processes; that of the supervisor when None.
        given: the settings file or data directory from the command line, which the processes load; the data directory when None.
        lock: the supervisor's lock if the caller holds it already; acquired when None.

    Raises:
        ApplianceError: ``box.busy``: the box runs already.
    """

    def __init__(self, settings: Settings, log: Path | None = None, *, given: Path | None = None, lock: Lock | None = None) -> None:
        self._settings, self._log = settings, log
        self._lock = lock or Lock(settings.data_dir, "supervisor")
        data = ["--data-dir", str(given or settings.data_dir)]
        box = [sys.executable, "-m", "appliance"]
        self.children = [
            ManagedProcess("worker", [*box, "worker", *data]),
            ManagedProcess("receiver", [*box, "receive", *data]),
            ManagedProcess("web", [sys.executable, "-m", "webui", *data]),
        ]
        self._reload: list[str] = []
        self._reloading: subprocess.Popen[bytes] | None = None
        self._renewal, self._checked_at = Renewal((settings.tls_certificate, settings.tls_key)), 0.0
        if settings.tls_certificate is not None:
            proxy = [sys.executable, "-m", "webui.server.proxy", *data]
            self.children.append(ManagedProcess("proxy", proxy))
            self._reload = [*proxy, "--reload"]
        if settings.audit_syslog:
            self.children.append(ManagedProcess("audit-sender", [*box, "send-audit", *data]))

    def start(self) -> None:
        """Start every process; does not wait until they are ready."""
        for name in ("web.json", "dicom.port", "dicom-tls.port"):  # files of the last run
            (self._settings.data_dir / "run" / name).unlink(missing_ok=True)
        for child in self.children:
            self._spawn(child)

    def tick(self) -> None:
        """Restart the processes that crashed, with a growing delay while they crash again."""
        now = time.monotonic()
        for child in self.children:
            if child.process is not None and (code := child.process.poll()) is not None:
                logger.error("process crashed", extra={"role": child.name, "exit_code": code})
                _end_group(child.process.pid)
                was_stable = now - child.started_at > _STABLE_S
                child.backoff_s = _FIRST_BACKOFF_S if was_stable else min(child.backoff_s * 2, _LONGEST_BACKOFF_S)
                child.next_start_at, child.process = now + child.backoff_s, None
            if child.process is None and now >= child.next_start_at:
                self._spawn(child)
        if self._reload and now - self._checked_at > _CHECK_FILES_S:
            self._checked_at = now
            self._take_certificate()

    def _take_certificate(self) -> None:
        """Let nginx load the certificate when it or its key was replaced; one that is not taken is in the log and on the status page."""
        if self._reloading is not None:
            code = self._reloading.poll()
            if code is None:
                return
            if code == 0:
                self._renewal.confirm()
            self._reloading = None
        if self._renewal.is_due():
            logger.info("certificate changed", extra={"role": "proxy"})
            self._reloading = self._launch(self._reload)

    def run(self, until: Callable[[], bool]) -> None:
        """Restart crashed processes until ``until()`` returns True."""
        while not until():
            self.tick()
            time.sleep(_TICK_S)

    def ready(self) -> bool:
        """Whether the web server answers, the receiver listens and the worker has created its lock."""
        run = self._settings.data_dir / "run"
        return web_address(self._settings) is not None and (run / "dicom.port").exists() and (run / "worker.lock").exists()

    def stop(self) -> None:
        """Stop every process, after 15 seconds by SIGKILL; acknowledged scans are on the disk in any case."""
        started = [*(child.process for child in self.children), self._reloading]
        running = [process for process in started if process is not None and process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        limit = time.monotonic() + _STOP_S
        for process in running:
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _end_group(process.pid)
        self._lock.release()

    def _spawn(self, child: ManagedProcess) -> None:
        child.process = self._launch(child.command)
        child.started_at = time.monotonic()

    def _launch(self, command: list[str]) -> subprocess.Popen[bytes]:
        cap = self._settings.process_memory_max_bytes
        output = open(self._log, "ab") if self._log else None  # noqa: SIM115 - closed below, the process has its own copy
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=_ENVIRONMENT | os.environ,
        )  # fmt: skip  (own session: Ctrl-C reaches only the supervisor, which stops the processes in order)
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (cap, cap))
        if output:
            output.close()
        return process


def _end_group(pid: int) -> None:
    """End what a process that ended has left: workers of nginx go on without their master and would hold its port."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # nothing is left


def web_address(settings: Settings) -> dict[str, Any] | None:
    """Return ``port`` and ``scheme`` of the web server if it answers; else None."""
    path = settings.data_dir / "run" / "web.json"
    try:
        address: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    # A health check of the box's own server at its own address: any certificate is accepted.
    context = ssl._create_unverified_context()  # noqa: S323
    url = f"{address['scheme']}://{bracketed(own_address(settings.web_host))}:{address['port']}/healthz"
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:  # noqa: S310
            return address if answer.status == 200 else None
    except OSError:
        return None


def serve(given: Path) -> None:
    """Run the supervisor of a data directory or settings file until SIGTERM or Ctrl-C.

    Raises:
        ApplianceError: ``box.busy``; the box cannot be opened, as with a lost key: nothing is started, where it would only crash.
    """
    is_stopping = stop_on_signal()
    settings = Settings.load(given)
    supervisor = Supervisor(settings, given=given)
    Store(settings).close()
    supervisor.start()
    try:
        supervisor.run(is_stopping)
    finally:
        supervisor.stop()
