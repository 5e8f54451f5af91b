"""Telling the worker at once that there is work: a FIFO in the data directory.

A lost wake-up costs a moment, never a job: the worker also looks by itself every half second.
"""

from __future__ import annotations

import errno
import os
import select
from contextlib import suppress
from pathlib import Path

from appliance.core.settings import Settings


def _path(settings: Settings) -> Path:
    return settings.data_dir / "run" / "worker.wake"


def wake(settings: Settings) -> None:
    """Wake the worker if one is there; never blocks and never fails for want of a worker."""
    try:
        fifo = os.open(_path(settings), os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):  # nobody listens: the worker looks for work when it starts
            return
        raise
    with suppress(BlockingIOError):  # full: it has been told often enough
        os.write(fifo, b"!")
    os.close(fifo)


class Bell:
    """The worker's end of the FIFO."""

    def __init__(self, settings: Settings) -> None:
        path = _path(settings)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Read and write, so that the last sender's closing does not make it readable for ever.
        self._fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def wait(self, timeout_s: float) -> None:
        """Sleep until somebody rings or the time is over."""
        ready, _, _ = select.select([self._fifo], [], [], timeout_s)
        if ready:
            os.read(self._fifo, 4096)

    def close(self) -> None:
        """Stop listening."""
        os.close(self._fifo)
