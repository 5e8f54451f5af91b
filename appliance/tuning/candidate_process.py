"""Runs a candidate in a process of its own, which may crash, hang or run out of memory without harm to the worker.

Compilers of neural networks do all of that: OpenVINO's has a segmentation fault with some Q/DQ graphs. Every call has a deadline, at
which the parent kills the process group of the child. The responses come through a pipe of their own; what native code prints goes
through another pipe, and its last line becomes the reason of a crash.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.core.child_process import ENVIRONMENT, printable_text
from appliance.core.errors import InferenceError
from appliance.runtime import Candidate, OnProgress, TensorSpec
from appliance.tuning.child_protocol import Message, ProtocolError, pack, receive
from model_sync import messages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

_REAP_S: Final = 2.0
_PRINTED_BYTES: Final = 4096
_CHUNK_BYTES: Final = 1 << 16
_DETAIL_CHARS: Final = 500
_LAST_LINE_CHARS: Final = 200
_EXIT_POLL_S: Final = 0.005
_MAX_NUMBER: Final = 1e18
_OUT_OF_MEMORY: Final = ("bad_alloc", "cannot allocate memory", "out of memory", "memoryerror")


class _ClosedError(Exception):
    """The child has closed its pipe."""


class _DeadlineError(Exception):
    """The deadline of a call has passed."""


class CandidateProcess:
    """One candidate, loaded and run in a child process, which dies at the latest with the thread that loaded it (PR_SET_PDEATHSIG).

    Args:
        model_path: the ONNX file.
        input_spec: what the model takes.
        cache: directory for engines and compiled models.
        deadline_s: for each call: the load with its warm-up, one inference, or a series of timed ones.
        memory_bytes: limit of the private memory of the child; the limit of the parent holds too.
        on_progress: called with the progress of a long load.

    Attributes:
        deadline_s: may be changed between calls.
        load_ms: time to load and warm up, without the start of Python.
        peak_rss_bytes: peak resident memory of the child, as of its last response.

    Every call raises InferenceError: ``runtime.crashed`` (the detail says by which signal and where), ``runtime.deadline``,
    ``runtime.memory`` or the code of the adapter; after one of the first three the process has ended.
    """

    module = "appliance.tuning.candidate_child"

    def __init__(
        self, model_path: Path, input_spec: TensorSpec, candidate: Candidate, *, cache: Path | None = None,
        deadline_s: float, memory_bytes: int | None = None, on_progress: OnProgress | None = None,
    ) -> None:  # fmt: skip
        self._load_request = {
            "ask": "load", "model_path": str(model_path), "input": {"name": input_spec.name, "shape": list(input_spec.shape)},
            "candidate": candidate.to_json(), "cache": None if cache is None else str(cache),
        }  # fmt: skip
        self._input = input_spec.name
        self.deadline_s, self._memory_bytes, self._on_progress = deadline_s, memory_bytes, on_progress
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: list[int] = []
        self._printed = bytearray()
        self._is_print_closed = False
        self._deadline = 0.0
        self._error: tuple[str, str] | None = None
        self.load_ms = 0.0
        self.peak_rss_bytes = 0

    @property
    def pid(self) -> int | None:
        """Process number of the child; None before ``load`` and after its end."""
        return self._process.pid if self._process is not None else None

    def load(self) -> dict[str, Any]:
        """Start the child, load the model there and warm it up; returns ``Runtime.describe``."""
        if self._process is not None or self._error is not None:
            raise InferenceError("job.error", "a candidate is loaded once")
        response = self._call("load", Message(self._load_request, {}))
        described = response.header.get("describe")
        if not isinstance(described, dict):
            raise self._end("runtime.crashed", "invalid response in load")
        self.load_ms = _number(response.header.get("load_ms"))
        return described

    def infer(self, tensor: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run the model on a tensor [n, ...]; returns output name -> array [n, ...]."""
        return self._call("infer", Message({"ask": "infer"}, {self._input: tensor})).arrays

    def time(self, tensor: NDArray[np.float32], repeat: int) -> list[float]:
        """Time ``repeat`` calls of ``Runtime.infer`` with one tensor; returns milliseconds measured in the child, without the pipes."""
        response = self._call("infer", Message({"ask": "time", "repeat": repeat}, {self._input: tensor}))
        values = response.header.get("ms")
        if not isinstance(values, list) or len(values) != repeat or not all(isinstance(value, float) for value in values):
            raise self._end("runtime.crashed", "invalid response in infer")
        return values

    def close(self) -> None:
        """End the child and every process that it started."""
        if self._error is None:
            self._error = ("job.error", "the candidate is closed")
        self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self._kill()

    def _call(self, where: str, request: Message) -> Message:
        if self._error is not None:
            raise InferenceError(*self._error)
        self._deadline = time.monotonic() + self.deadline_s
        try:
            if self._process is None:
                if where != "load":
                    raise InferenceError("job.error", "nothing is loaded")
                self._start()
            response = self._exchange(request)
        except (_ClosedError, BrokenPipeError) as ended:
            raise self._crash_error(where) from ended
        except _DeadlineError as late:
            raise self._end("runtime.deadline", f"more than {self.deadline_s:g} s in {where}") from late
        except ProtocolError as error:
            raise self._end("runtime.crashed", f"invalid response in {where}: {error}") from error
        except BaseException:  # an interrupt, or on_progress failed: the stream is in the middle of a message
            self.close()
            raise
        self.peak_rss_bytes = int(_number(response.header.get("peak_rss_bytes")))
        if "error" in response.header:
            raise self._reported_error(response.header["error"], where)
        return response

    def _reported_error(self, error: object, where: str) -> InferenceError:
        code, detail = (error.get("code"), error.get("detail")) if isinstance(error, dict) else (None, None)
        if not isinstance(code, str) or not messages.is_known(code):
            return self._end("runtime.crashed", f"invalid response in {where}")
        text = printable_text(detail or "", _DETAIL_CHARS)
        if where == "load" or code == "runtime.memory":  # a partly loaded model is not used
            return self._end(code, text)
        return InferenceError(code, text)

    def _start(self) -> None:
        (child_in, requests), (responses, child_out), (printed, child_print) = (os.pipe() for _ in range(3))
        self._pipes = [requests, responses, printed]
        for descriptor in self._pipes:
            os.set_blocking(descriptor, False)
        arguments = [child_in, child_out, os.getpid(), self._memory_bytes or 0]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=child_print, stderr=child_print,
                pass_fds=(child_in, child_out), start_new_session=True, env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        except OSError as error:
            raise InferenceError("runtime.crashed", f"no process could be started: {error.strerror}") from error
        finally:
            for descriptor in (child_in, child_out, child_print):
                os.close(descriptor)

    def _exchange(self, request: Message) -> Message:
        for buffer in pack(request.header, request.arrays):
            self._write(buffer)
        while True:
            response = receive(self._read)
            if "progress" not in response.header:
                return response
            if self._on_progress is not None:
                self._on_progress(min(_number(response.header["progress"]), 1.0))

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

    def _crash_error(self, where: str) -> InferenceError:
        assert self._process is not None
        ending = _wait_for_exit(self._process.pid)
        if ending is None:
            return self._end("runtime.crashed", f"closed its pipe in {where}")
        self._read_printed()
        text = self._printed.decode("utf-8", "replace").strip()
        last = printable_text(text.rsplit("\n", 1)[-1].strip(), _LAST_LINE_CHARS)
        detail = f"{ending} in {where}" + (f": {last}" if last else "")
        if ending == "SIGKILL":  # sent by the kernel when memory runs out
            return self._end("runtime.memory", f"killed from outside, {detail}")
        if any(words in text.lower() for words in _OUT_OF_MEMORY):
            return self._end("runtime.memory", detail)
        return self._end("runtime.crashed", detail)

    def _end(self, code: str, detail: str) -> InferenceError:
        self._error = (code, detail)
        self._kill()
        return InferenceError(code, detail)

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # also after its end: a process that it started may still run
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # blocked in the kernel: it is reaped when it returns
                self._process.wait(_REAP_S)
            self._process = None
        for descriptor in self._pipes:
            os.close(descriptor)
        self._pipes = []


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


def _number(value: object) -> float:
    """Return a number of a response; 0 when the value is no valid number."""
    return float(value) if isinstance(value, (int, float)) and 0 <= value < _MAX_NUMBER else 0.0
