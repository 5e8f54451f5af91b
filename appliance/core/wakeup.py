"""Wake the worker when there is work: a FIFO in the data directory.

A lost wakeup delays a job and never loses it: the worker also polls the queue every half second.
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
    """Wake the worker if one is running; never blocks, and does nothing where no worker runs."""
    try:
        fifo = os.open(_path(settings), os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):  # no worker: it polls the queue when it starts
            return
        raise
    with suppress(BlockingIOError):  # full: enough wakeups are pending
        os.write(fifo, b"!")
    os.close(fifo)


class Wakeup:
    """The worker's end of the FIFO."""

    def __init__(self, settings: Settings) -> None:
        path = _path(settings)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Opened for writing too: else the FIFO would stay readable at its end after the last sender closed it.
        self._fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def wait(self, timeout_s: float) -> None:
        """Sleep until :func:`wake` is called or the timeout is over."""
        if select.select([self._fifo], [], [], timeout_s)[0]:
            os.read(self._fifo, 4096)

    def close(self) -> None:
        """Close the FIFO."""
        os.close(self._fifo)
