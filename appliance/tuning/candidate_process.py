"""A candidate in a process of its own, that may crash, hang or run out of memory without taking anybody along.

Compilers of neural networks do all of that: OpenVINO's ends with a segmentation fault on some Q/DQ graphs. The parent sets a limit to
every call and ends the child's whole process group when it is over. The child's answers come through a pipe of their own; whatever
native code prints goes through another one, of which the last lines are kept as the reason of a crash.
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

from appliance.core.child_process import ENVIRONMENT, plain
from appliance.core.errors import InferenceError
from appliance.runtime import Candidate, TensorSpec, Told
from appliance.tuning.child_protocol import Message, WireError, pack, receive
from model_sync import messages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

_REAP_S: Final = 2.0
_NOISE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 1 << 16
_DETAIL_CHARS: Final = 500
_LAST_LINE_CHARS: Final = 200
_LOOK_EVERY_S: Final = 0.005
_ABSURD: Final = 1e18
_OUT_OF_MEMORY: Final = ("bad_alloc", "cannot allocate memory", "out of memory", "memoryerror")


class _EndedError(Exception):
    """The child has closed its end."""


class _LateError(Exception):
    """The time for a call is over."""


class Attempt:
    """One candidate, loaded and run in a child; lives at most as long as the thread that loaded it (PR_SET_PDEATHSIG goes by threads).

    Args:
        model_path: the ONNX file.
        input_spec: what the model takes.
        candidate: how it is run.
        cache: directory for engines and compiled models.
        deadline_s: for each call: the load with its warm-up, an inference, a series of timed ones.
        memory_bytes: cap of the child's private memory; the parent's own cap holds too.
        told: called with the progress of a long load.

    Attributes:
        deadline_s: may be changed between calls.
        load_ms: how long loading and warming up took, without the start of Python.
        peak_rss_bytes: the most memory the child has had resident, as of its last answer.

    Every call raises InferenceError: ``runtime.crashed`` (the detail says by which signal and where), ``runtime.deadline``,
    ``runtime.memory`` or whatever the adapter said; after one of the first three the attempt is over.
    """

    module = "appliance.tuning.candidate_child"

    def __init__(
        self, model_path: Path, input_spec: TensorSpec, candidate: Candidate, *, cache: Path | None = None,
        deadline_s: float, memory_bytes: int | None = None, told: Told | None = None,
    ) -> None:  # fmt: skip
        self._order = {
            "ask": "load", "model_path": str(model_path), "input": {"name": input_spec.name, "shape": list(input_spec.shape)},
            "candidate": candidate.to_json(), "cache": None if cache is None else str(cache),
        }  # fmt: skip
        self._input = input_spec.name
        self.deadline_s, self._memory_bytes, self._told = deadline_s, memory_bytes, told
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: list[int] = []
        self._noise = bytearray()
        self._deaf = False  # whether nobody can print any more
        self._limit = 0.0
        self._over: tuple[str, str] | None = None
        self.load_ms = 0.0
        self.peak_rss_bytes = 0

    @property
    def pid(self) -> int | None:
        """The child's process number; None before ``load`` and after the end."""
        return self._process.pid if self._process is not None else None

    def load(self) -> dict[str, Any]:
        """Start the child, load the model there and warm it up; returns what the runtime says it runs."""
        if self._process is not None or self._over is not None:
            raise InferenceError("job.error", "an attempt is loaded once")
        answer = self._call("load", Message(self._order, {}))
        described = answer.header.get("describe")
        if not isinstance(described, dict):
            raise self._end("runtime.crashed", "spoke nonsense in load")
        self.load_ms = _number(answer.header.get("load_ms"))
        return described

    def infer(self, tensor: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run the model on a tensor [n, ...]; returns output name -> array [n, ...]."""
        return self._call("infer", Message({"ask": "infer"}, {self._input: tensor})).arrays

    def time(self, tensor: NDArray[np.float32], repeat: int) -> list[float]:
        """Milliseconds of ``repeat`` calls of ``Runtime.infer`` with one tensor, measured in the child: no pipe is in them."""
        answer = self._call("infer", Message({"ask": "time", "repeat": repeat}, {self._input: tensor}))
        values = answer.header.get("ms")
        if not isinstance(values, list) or len(values) != repeat or not all(isinstance(value, float) for value in values):
            raise self._end("runtime.crashed", "spoke nonsense in infer")
        return values

    def close(self) -> None:
        """End the child and everything it started."""
        if self._over is None:
            self._over = ("job.error", "the attempt is closed")
        self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self._kill()

    def _call(self, where: str, request: Message) -> Message:
        if self._over is not None:
            raise InferenceError(*self._over)
        self._limit = time.monotonic() + self.deadline_s
        try:
            if self._process is None:
                if where != "load":
                    raise InferenceError("job.error", "nothing is loaded")
                self._start()
            answer = self._exchange(request)
        except (_EndedError, BrokenPipeError) as ended:
            raise self._died(where) from ended
        except _LateError as late:
            raise self._end("runtime.deadline", f"more than {self.deadline_s:g} s in {where}") from late
        except WireError as error:
            raise self._end("runtime.crashed", f"spoke nonsense in {where}: {error}") from error
        except BaseException:  # an interrupt, or told() failed: the stream is in the middle of something
            self.close()
            raise
        self.peak_rss_bytes = int(_number(answer.header.get("peak_rss_bytes")))
        if "error" in answer.header:
            raise self._said(answer.header["error"], where)
        return answer

    def _said(self, error: object, where: str) -> InferenceError:
        code, detail = (error.get("code"), error.get("detail")) if isinstance(error, dict) else (None, None)
        if not isinstance(code, str) or not messages.is_known(code):
            return self._end("runtime.crashed", f"spoke nonsense in {where}")
        said = plain(detail or "", _DETAIL_CHARS)
        if where == "load" or code == "runtime.memory":  # what is half loaded is not used
            return self._end(code, said)
        return InferenceError(code, said)

    def _start(self) -> None:
        (their_requests, ours), (answers, theirs), (noise, printed) = (os.pipe() for _ in range(3))
        self._pipes = [ours, answers, noise]
        for descriptor in self._pipes:
            os.set_blocking(descriptor, False)
        arguments = [their_requests, theirs, os.getpid(), self._memory_bytes or 0]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
                pass_fds=(their_requests, theirs), start_new_session=True, env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        except OSError as error:
            raise InferenceError("runtime.crashed", f"no process could be started: {error.strerror}") from error
        finally:
            for descriptor in (their_requests, theirs, printed):
                os.close(descriptor)

    def _exchange(self, request: Message) -> Message:
        for buffer in pack(request.header, request.arrays):
            self._write(buffer)
        while True:
            answer = receive(self._read)
            if "progress" not in answer.header:
                return answer
            if self._told is not None:
                self._told(min(_number(answer.header["progress"]), 1.0))

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
                    raise _EndedError
                buffer = buffer[got:]

    def _wait(self, descriptor: int, event: int) -> None:
        """Wait until a pipe is ready, and take meanwhile what is printed, so that nothing blocks on printing."""
        poll = select.poll()
        poll.register(descriptor, event)
        if not self._deaf:
            poll.register(self._pipes[2], select.POLLIN)
        while True:
            left_s = self._limit - time.monotonic()
            if left_s <= 0:
                raise _LateError
            ready = dict(poll.poll(left_s * 1000))
            if self._pipes[2] in ready:
                self._listen()
                if self._deaf:
                    poll.unregister(self._pipes[2])
            if descriptor in ready:
                return

    def _listen(self) -> None:
        with suppress(BlockingIOError):
            printed = os.read(self._pipes[2], _CHUNK_BYTES)
            self._deaf = not printed
            self._noise = (self._noise + printed)[-_NOISE_BYTES:]

    def _died(self, where: str) -> InferenceError:
        assert self._process is not None
        ended = _how_it_ended(self._process.pid)
        if ended is None:
            return self._end("runtime.crashed", f"fell silent in {where}")
        self._listen()
        noise = self._noise.decode("utf-8", "replace").strip()
        last = plain(noise.rsplit("\n", 1)[-1].strip(), _LAST_LINE_CHARS)
        how = f"{ended} in {where}" + (f": {last}" if last else "")
        if ended == "SIGKILL":  # nobody here sent it: the kernel does, when memory runs out
            return self._end("runtime.memory", f"killed from outside, {how}")
        if any(text in noise.lower() for text in _OUT_OF_MEMORY):
            return self._end("runtime.memory", how)
        return self._end("runtime.crashed", how)

    def _end(self, code: str, detail: str) -> InferenceError:
        self._over = (code, detail)
        self._kill()
        return InferenceError(code, detail)

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # also when it has ended: something it started may live on
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel: it is reaped when it comes out
                self._process.wait(_REAP_S)
            self._process = None
        for descriptor in self._pipes:
            os.close(descriptor)
        self._pipes = []


def _how_it_ended(pid: int) -> str | None:
    """The signal or exit code of a child that has closed its pipe; it stays to be reaped, so that its number is nobody else's yet."""
    limit = time.monotonic() + _REAP_S
    while time.monotonic() < limit:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            time.sleep(_LOOK_EVERY_S)
        elif ended.si_code == os.CLD_EXITED:
            return f"exit code {ended.si_status}"
        else:
            known = {int(name) for name in signal.Signals}
            return signal.Signals(ended.si_status).name if ended.si_status in known else f"signal {ended.si_status}"
    return None


def _number(value: object) -> float:
    """A number that the child says; 0 when it is none."""
    return float(value) if isinstance(value, (int, float)) and 0 <= value < _ABSURD else 0.0
