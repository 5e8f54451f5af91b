"""One parent for the box's processes: worker, DICOM receiver, web page. Starts them, starts them again, stops them cleanly.

It imports little and does nothing else, so that it has no reason of its own to fall.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from appliance.core.process import Lock, die_with_parent
from appliance.core.settings import Settings

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S: Final = 0.2
_LONGEST_BACKOFF_S: Final = 10.0
_STEADY_S: Final = 30.0
_STOP_S: Final = 15.0
_TICK_S: Final = 0.1
# A small box: two malloc arenas a process instead of eight a core, freed memory given back, no BLAS threads, which nothing needs.
# And no telemetry: the box speaks to nobody unasked.
_SMALL: Final = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


@dataclass
class Child:
    """One process of the box and how often it fell lately."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    backoff_s: float = _FIRST_BACKOFF_S
    next_start_at: float = 0.0
    restarts: int = field(default=0)


class Supervisor:
    """Runs the box.

    Args:
        settings: the box's settings.
        log: where the children's standard error goes; the supervisor's own when None.
        given: the settings file or data directory as it was given, which the children load; the data directory when None.
        lock: the supervisor's lock where the caller holds it already; taken when None.

    Raises:
        ApplianceError: ``box.busy`` when the box runs already.
    """

    def __init__(self, settings: Settings, log: Path | None = None, *, given: Path | None = None, lock: Lock | None = None) -> None:
        self._settings = settings
        self._log = log
        self._lock = lock or Lock(settings.data_dir, "supervisor")
        data = ["--data-dir", str(given or settings.data_dir)]
        box = [sys.executable, "-m", "appliance"]
        self.children = [
            Child("worker", [*box, "worker", *data]),
            Child("receiver", [*box, "receive", *data]),
            Child("web", [sys.executable, "-m", "webui", *data]),
        ]

    def start(self) -> None:
        """Start every process; does not wait for them to be ready."""
        for name in ("web.json", "dicom.port"):  # what the last run left says nothing about this one
            (self._settings.data_dir / "run" / name).unlink(missing_ok=True)
        for child in self.children:
            self._spawn(child)

    def tick(self) -> None:
        """Look after the children once: whoever fell is started again, later and later while it keeps falling."""
        now = time.monotonic()
        for child in self.children:
            if child.process is not None and (code := child.process.poll()) is not None:
                logger.error("process fell", extra={"role": child.name, "exit_code": code})
                steady = now - child.started_at > _STEADY_S
                child.backoff_s = _FIRST_BACKOFF_S if steady else min(child.backoff_s * 2, _LONGEST_BACKOFF_S)
                child.next_start_at, child.process = now + child.backoff_s, None
                child.restarts += 1
            if child.process is None and now >= child.next_start_at:
                self._spawn(child)

    def run(self, until: Callable[[], bool]) -> None:
        """Look after the children until ``until()`` says stop."""
        while not until():
            self.tick()
            time.sleep(_TICK_S)

    def ready(self) -> bool:
        """Whether the page answers, the receiver listens and the worker holds its lock."""
        run = self._settings.data_dir / "run"
        return web_address(self._settings) is not None and (run / "dicom.port").exists() and bool((run / "worker.lock").exists())

    def stop(self) -> None:
        """Stop every process, at the latest after 15 seconds by force; what was acknowledged is on the disk in any case."""
        living = [child.process for child in self.children if child.process is not None and child.process.poll() is None]
        for process in living:
            process.send_signal(signal.SIGTERM)
        limit = time.monotonic() + _STOP_S
        for process in living:
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._lock.release()

    def _spawn(self, child: Child) -> None:
        cap = self._settings.process_memory_max_bytes
        output = open(self._log, "ab") if self._log else None  # noqa: SIM115 - closed below, the child keeps its own copy
        child.process = subprocess.Popen(
            child.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=_SMALL | os.environ,
        )  # own session: Ctrl-C reaches the supervisor alone, which stops the children in order
        resource.prlimit(child.process.pid, resource.RLIMIT_DATA, (cap, cap))
        if output:
            output.close()
        child.started_at = time.monotonic()


def web_address(settings: Settings) -> dict[str, Any] | None:
    """What the web process says of itself once it listens (``port``, ``scheme``), when it answers; else None."""
    path = settings.data_dir / "run" / "web.json"
    try:
        address: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    # Our own page on our own loopback, asked only whether it lives: its certificate may be any.
    context = ssl._create_unverified_context()  # noqa: S323
    try:
        with urllib.request.urlopen(f"{address['scheme']}://127.0.0.1:{address['port']}/healthz", timeout=5, context=context) as answer:  # noqa: S310
            return address if answer.status == 200 else None
    except OSError:
        return None


def serve(given: Path) -> None:
    """The supervisor's life, on a data directory or a settings file: until SIGTERM or Ctrl-C."""
    asked: list[bool] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    supervisor = Supervisor(Settings.load(given), given=given)
    supervisor.start()
    try:
        supervisor.run(lambda: bool(asked))
    finally:
        supervisor.stop()
