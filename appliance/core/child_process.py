"""A child process of this package whose output is read without blocking.

Nothing runs between fork and exec, since threads of the worker may hold any lock at that moment; the child sets its own limits.
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
# The output is UTF-8 whatever the locale of the box (GB18030 is legal in China); what cannot be encoded becomes a question mark.
ENVIRONMENT: Final = {
    "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__", "PYTHONUTF8": "1",
    "PYTHONIOENCODING": "utf-8:replace",
}  # fmt: skip
_CONTROL: Final = dict.fromkeys([*range(32), *range(127, 160)], " ")


def printable_text(text: object, limit: int) -> str:
    """Sanitise a text of another process: valid characters, no control characters, at most ``limit`` of them."""
    return str(text)[:limit].encode("utf-8", "replace").decode().translate(_CONTROL)


class Child:
    """A process of this package whose standard output is read while it runs.

    Args:
        arguments: of ``python -m``.
        deadline_s: how long it may run; see :meth:`late`.
        limit_bytes: how much it may write; a process that writes more is killed.

    Attributes:
        output: what it has written; the reader removes what it has processed.
        exceeded_output: whether it was killed because it wrote too much.

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
        self._bytes_read = 0
        self.exceeded_output = False
        self.output = bytearray()
        with suppress(OSError):  # more than 64 KiB in one go where the system allows it
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, 16 * _CHUNK_BYTES)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def listen(self) -> bool:
        """Append new output to ``output``, at most 4 MiB at a time; returns whether the process has ended and all output was read."""
        if self._process.stdout is None or self._process.stdout.closed:
            return True
        ended = self._process.poll() is not None  # checked before reading: its last output is in the pipe then
        for _ in range(_READS_AT_ONCE):
            try:
                data = os.read(self._fd, _CHUNK_BYTES)
            except BlockingIOError:
                return ended
            if not data:
                return ended
            self._bytes_read += len(data)
            self.output += data
            if self._bytes_read > self._limit_bytes:  # no program of this package writes so much
                self.exceeded_output = True
                self.end()
                return True
        return False

    def text(self) -> str:
        """The output as text; invalid UTF-8 is replaced."""
        return self.output.decode("utf-8", "replace")

    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self._limit

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative the signal that ended it; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Kill the process and everything it started, and reap it; its unfinished files are removed later."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # blocked in the kernel by a disk that hangs: it is reaped when that ends
                self._process.wait(_REAP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __del__(self) -> None:
        """Kill a process that nothing references any more."""
        if self._process.poll() is None:
            self.end()
