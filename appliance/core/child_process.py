"""A child process of our own package whose output is read without ever waiting for it.

Nothing runs between fork and exec (threads of the worker may hold any lock at that moment); the child sets its own limits.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

_CHUNK_BYTES: Final = 1 << 16
_MAX_OUTPUT_BYTES: Final = 4 << 20
_READS_AT_ONCE: Final = 64
_REAP_S: Final = 1.0
# Whatever the box's locale (GB18030 is legal in China): what it says is UTF-8, and a character that is none becomes a question mark.
ENVIRONMENT: Final = {
    "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:replace",
}  # fmt: skip
_CONTROL: Final = dict.fromkeys([*range(32), *range(127, 160)], " ")


def printable_text(text: object, limit: int) -> str:
    """A text of another process as it may be kept and shown: whole characters, none that controls anything, no more than ``limit``."""
    return str(text)[:limit].encode("utf-8", "replace").decode().translate(_CONTROL)


class Child:
    """A process of our own package whose standard output is read as it comes.

    Args:
        arguments: of ``python -m``.
        deadline_s: how long it may run; see :meth:`late`.
        limit_bytes: how much it may say; one that says more is ended.

    Attributes:
        output: what it has said, as far as nobody took it.
        babbled: whether it was ended for saying too much.

    Raises:
        OSError: it could not be started.
    """

    def __init__(self, arguments: Sequence[str], deadline_s: float, limit_bytes: int = _MAX_OUTPUT_BYTES) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._fd = self._process.stdout.fileno()
        os.set_blocking(self._fd, False)
        self._limit = time.monotonic() + deadline_s
        self._limit_bytes = limit_bytes
        self._said = 0
        self.babbled = False
        self.output = bytearray()
        with suppress(OSError):  # more than 64 KiB in one go where the system allows it
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, 16 * _CHUNK_BYTES)

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def listen(self) -> bool:
        """Take what it has said since, at most 4 MiB at a time; returns whether it has ended and said everything."""
        if self._process.stdout is None or self._process.stdout.closed:
            return True
        ended = self._process.poll() is not None  # before the reading: what it said last is in the pipe then
        for _ in range(_READS_AT_ONCE):
            try:
                data = os.read(self._fd, _CHUNK_BYTES)
            except BlockingIOError:
                return ended
            if not data:
                return ended
            self._said += len(data)
            self.output += data
            if self._said > self._limit_bytes:  # nothing of ours says so much
                self.babbled = True
                self.end()
                return True
        return False

    def text(self) -> str:
        """What it has said, as text; what is no UTF-8 is replaced."""
        return self.output.decode("utf-8", "replace")

    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self._limit

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative the signal that ended it; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Kill it and everything it started, and take back its number; what it was writing is swept later."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel, on a disk that hangs: it is reaped when it comes out
                self._process.wait(_REAP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __del__(self) -> None:
        """A child that nobody listens to any more does not go on."""
        if self._process.poll() is None:
            self.end()
