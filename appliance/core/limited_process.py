"""A process that answers requests under limits of time and memory, and may crash, hang or be killed without harm to its parent.

Native code does all of that: decoders with hostile files, compilers of neural networks with some models. The parent kills the process
group of the child at the deadline of a call. The responses come through a pipe of their own; what native code prints goes through
another pipe, and its last line may become the reason of a crash. The child's side is :mod:`appliance.core.limited_child`.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from appliance.core.child_process import ENVIRONMENT, printable_text
from appliance.core.child_protocol import Message, ProtocolError, pack, receive
from appliance.core.shared_memory import SharedMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

End = Literal["crashed", "deadline", "memory", "killed"]
"""Why a process ended: it crashed or wrote no valid response; a call exceeded its deadline; it needed more memory than it may have; it was
killed from outside, as the kernel does when the machine is out of memory."""

_REAP_S: Final = 2.0
_PRINTED_BYTES: Final = 4096
_CHUNK_BYTES: Final = 1 << 16
_PIPE_BYTES: Final = 1 << 20
_LAST_LINE_CHARS: Final = 200
_EXIT_POLL_S: Final = 0.005
_OUT_OF_MEMORY: Final = ("bad_alloc", "cannot allocate memory", "out of memory", "memoryerror", "memory allocation")


class ProcessEndedError(Exception):
    """A limited process ended in a call, or had to be ended.

    Args:
        end: why.
        detail: technical particulars; a signal or an exit code when it crashed.
        printed: the last line that it printed, which may quote its input.
    """

    def __init__(self, end: End, detail: str, printed: str = "") -> None:
        self.end: End = end
        self.detail, self.printed = detail, printed
        super().__init__(f"{end}: {detail}")


class _ClosedError(Exception):
    """The child has closed its pipe."""


class _DeadlineError(Exception):
    """The deadline of a call has passed."""


class LimitedProcess:
    """A child process of this package, started at once, which dies at the latest with the thread that made it (PR_SET_PDEATHSIG).

    Args:
        module: what it runs, by :func:`appliance.core.limited_child.run`.
        memory_bytes: limit of its private memory; the limit of the parent holds too. None: only that one.
        shared_bytes: size of the memory by which arrays are exchanged, which takes only what the largest needs; 0: they go through the
            pipes, which is slower.
        environment: variables for the child alone.

    Raises:
        OSError: it could not be started.
    """

    def __init__(
        self, module: str, memory_bytes: int | None, shared_bytes: int = 0, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._printed = bytearray()
        self._is_print_closed = False
        self._deadline = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        (child_in, requests), (responses, child_out), (printed, child_print) = (os.pipe() for _ in range(3))
        self._pipes = [requests, responses, printed]
        for descriptor in self._pipes:
            os.set_blocking(descriptor, False)
        for descriptor in (requests, responses):
            with suppress(OSError):  # fewer switches between the processes where the system allows it
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._shared: SharedMemory | None = None
        try:
            self._shared = SharedMemory.create(shared_bytes) if shared_bytes else None
            passed = [child_in, child_out, *([self._shared.descriptor] if self._shared else [])]
            arguments = [child_in, child_out, os.getpid(), memory_bytes or 0, *passed[2:]]
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=child_print, stderr=child_print,
                pass_fds=passed, start_new_session=True,
                env=os.environ | ENVIRONMENT | dict(environment),
            )  # fmt: skip
        except OSError:
            self.close()
            raise
        finally:
            for descriptor in (child_in, child_out, child_print):
                os.close(descriptor)

    @property
    def pid(self) -> int | None:
        """Process number of the child; None after its end."""
        return self._process.pid if self._process is not None else None

    def call(
        self,
        header: dict[str, Any],
        arrays: dict[str, NDArray[Any]],
        deadline_s: float,
        on_progress: Callable[[object], object] | None = None,
    ) -> Message:
        """Send a request and wait for its response; ``on_progress`` gets the values of ``progress`` messages before it.

        Raises:
            ProcessEndedError: there is no response; the process has ended.
        """
        self._deadline = time.monotonic() + deadline_s
        try:
            return self._exchange(header, arrays, on_progress)
        except (_ClosedError, BrokenPipeError) as closed:
            raise self._crash() from closed
        except _DeadlineError as late:
            raise self._ended("deadline", f"more than {deadline_s:g} s") from late
        except ProtocolError as error:
            raise self._ended("crashed", f"invalid response: {error}") from error
        except BaseException:  # an interrupt, or on_progress failed: the stream is in the middle of a message
            self.close()
            raise

    def close(self) -> None:
        """End the child and every process that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # also after its end: a process that it started may still run
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # blocked in the kernel: it is reaped when it returns
                self._process.wait(_REAP_S)
            self._process = None
        for descriptor in self._pipes:
            os.close(descriptor)
        self._pipes = []
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()

    def _exchange(self, header: dict[str, Any], arrays: dict[str, NDArray[Any]], on_progress: Callable[[object], object] | None) -> Message:
        if not self._pipes:
            raise _ClosedError
        head, *payload = pack(header, arrays)
        if self._shared is not None:
            self._shared.write(payload)  # before the head, which tells the child that it is there
            payload = []
        self._write(head)
        for buffer in payload:
            self._write(buffer)
        while True:
            response = receive(self._read, self._shared.take if self._shared else None)
            if "progress" not in response.header:
                return response
            if on_progress is not None:
                on_progress(response.header["progress"])

    def _write(self, buffer: memoryview) -> None:
        while buffer:
            self._wait(self._pipes[0], select.POLLOUT)
            with suppress(BlockingIOError):
                buffer = buffer[os.write(self._pipes[0], buffer) :]

    def _read(self, buffer: memoryview) -> None:
        while buffer:
            self._wait(self._pipes[1], select.POLLIN)
            with suppress(BlockingIOError):
                got = os.readv(self._pipes[1], [buffer])
                if not got:
                    raise _ClosedError
                buffer = buffer[got:]

    def _wait(self, descriptor: int, event: int) -> None:
        """Wait until a pipe is ready, and read meanwhile what is printed, so that the child never blocks on printing."""
        poll = select.poll()
        poll.register(descriptor, event)
        if not self._is_print_closed:
            poll.register(self._pipes[2], select.POLLIN)
        while True:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise _DeadlineError
            ready = dict(poll.poll(left_s * 1000))
            if self._pipes[2] in ready:
                self._read_printed()
                if self._is_print_closed:
                    poll.unregister(self._pipes[2])
            if descriptor in ready:
                return

    def _read_printed(self) -> None:
        with suppress(BlockingIOError):
            printed = os.read(self._pipes[2], _CHUNK_BYTES)
            self._is_print_closed = not printed
            self._printed = (self._printed + printed)[-_PRINTED_BYTES:]

    def _crash(self) -> ProcessEndedError:
        ending = _wait_for_exit(self._process.pid) if self._process is not None else "closed"
        if ending is None:
            return self._ended("crashed", "closed its pipe")
        if self._pipes:
            self._read_printed()
        text = self._printed.decode("utf-8", "replace").strip()
        last = printable_text(text.rsplit("\n", 1)[-1].strip(), _LAST_LINE_CHARS)
        if ending == "SIGKILL":
            return self._ended("killed", ending, last)
        return self._ended("memory" if any(words in text.lower() for words in _OUT_OF_MEMORY) else "crashed", ending, last)

    def _ended(self, end: End, detail: str, printed: str = "") -> ProcessEndedError:
        self.close()
        return ProcessEndedError(end, detail, printed)


def _wait_for_exit(pid: int) -> str | None:
    """Wait for the exit of a child that closed its pipe; returns its signal or exit code. It is not reaped, so its number stays valid."""
    limit = time.monotonic() + _REAP_S
    while time.monotonic() < limit:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            time.sleep(_EXIT_POLL_S)
        elif ended.si_code == os.CLD_EXITED:
            return f"exit code {ended.si_status}"
        else:
            known = {int(name) for name in signal.Signals}
            return signal.Signals(ended.si_status).name if ended.si_status in known else f"signal {ended.si_status}"
    return None
