"""Shows other processes whether the worker analyses images: what measures time must not take its timings meanwhile.

The worker holds a shared lock on ``run/jobs.lock`` from its first job until none is left to claim, and changes the time of that file
whenever such a period begins. The kernel releases the lock of a process that ends, so nothing waits for a worker that was killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import Final

from appliance.core.process import is_held_by_another

logger = logging.getLogger(__name__)

_ROLE: Final = "jobs"


class JobActivity:
    """What the worker shows of itself. A disk that refuses it is logged and stops no analysis."""

    def __init__(self, data_dir: Path) -> None:
        self._path = _file(data_dir)
        self._held: int | None = None

    def begin(self) -> None:
        """Show that jobs run, until :meth:`end`; safe to repeat."""
        if self._held is not None:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.utime(self._held)
            fcntl.flock(self._held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            self.end()
            logger.warning("other processes cannot see that images are analysed", extra={"status": error.errno})

    def end(self) -> None:
        """Show that no job runs; safe to repeat."""
        held, self._held = self._held, None
        if held is not None:
            os.close(held)

    __del__ = end


class JobWatch:
    """What another process sees of it."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir, self._path = data_dir, _file(data_dir)
        self._seen = self._begun_at()

    def has_worked(self) -> bool:
        """Whether the worker analyses images now, or began to since the last call."""
        before, self._seen = self._seen, self._begun_at()
        return self._seen != before or is_held_by_another(self._data_dir, _ROLE)

    def _begun_at(self) -> int:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:  # no job ran since the box was made
            return 0


def _file(data_dir: Path) -> Path:
    return data_dir / "run" / f"{_ROLE}.lock"
