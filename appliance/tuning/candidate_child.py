"""The process in which :class:`appliance.tuning.candidate_process.CandidateProcess` runs its candidate.

It dies with its parent, has a memory limit, is the first process that the kernel kills when memory is short, and writes no core file
(which could contain a patient's image). Its arguments: the pipes that it reads and writes, the process to die with, the memory limit.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.core.errors import InferenceError
from appliance.core.process import die_with_parent, limit_memory
from appliance.runtime import Candidate, Runtime, open_runtime
from appliance.tuning.child_protocol import Message, ProtocolError, pack, receive

_PROGRESS_EVERY_S: Final = 0.2
_DETAIL_CHARS: Final = 500
_SHORT_BYTES: Final = 16 << 20
_MAYBE_MEMORY: Final = ("job.error", "runtime.unavailable", "runtime.build")
_MOST_KILLABLE: Final = "1000"

OpenRuntime = Callable[..., Runtime]


@dataclass(frozen=True)
class ModelInput:
    """The input of a model as a runtime needs it: its name, and the shape of one image's tensor."""

    name: str
    shape: tuple[int, ...]


class Server:
    """Handles one request after the other until the parent closes the pipe.

    Args:
        requests: file descriptor to read requests from.
        responses: file descriptor to write responses to.
        opener: loads a candidate.
    """

    def __init__(self, requests: int, responses: int, opener: OpenRuntime = open_runtime) -> None:
        self._requests, self._responses, self._open = requests, responses, opener
        self._runtime: Runtime | None = None
        self._progress_at = 0.0

    def serve(self) -> None:
        """Handle requests until the pipe is closed or broken; raises EOFError, OSError or ProtocolError then."""
        while True:
            request = receive(self._fill)
            try:
                response = self._handle_errors(request)
            except InferenceError as error:
                response = Message({"error": {"code": error.code, "detail": error.detail[:_DETAIL_CHARS]}}, {})
            self._send(Message(response.header | {"peak_rss_bytes": peak_rss_bytes()}, response.arrays))

    def _handle_errors(self, request: Message) -> Message:
        try:
            return self._handle(request)
        except InferenceError as error:
            if error.code in _MAYBE_MEMORY and _short_of_memory():
                raise InferenceError("runtime.memory", error.detail) from error
            raise
        except MemoryError as error:
            raise InferenceError("runtime.memory", "no memory for an array") from error
        except Exception as error:  # whatever a runtime raises is reported and does not end this process
            code = "runtime.memory" if _short_of_memory() else "job.error"
            raise InferenceError(code, f"{type(error).__name__}: {error}") from error

    def _handle(self, request: Message) -> Message:
        action = request.header.get("ask")
        if action == "load":
            return self._load(request.header)
        if self._runtime is None:
            raise InferenceError("job.error", "nothing is loaded")
        (name, tensor), = request.arrays.items()  # fmt: skip
        if action == "time":
            return Message({"ms": [self._time(name, tensor) for _ in range(request.header["repeat"])]}, {})
        return Message({}, dict(self._runtime.infer({name: tensor})))

    def _load(self, request: dict[str, Any]) -> Message:
        started = time.perf_counter()
        spec = ModelInput(request["input"]["name"], tuple(request["input"]["shape"]))
        cache = Path(request["cache"]) if request["cache"] is not None else None
        candidate = Candidate.from_json(request["candidate"])
        self._runtime = self._open(Path(request["model_path"]), spec, candidate, cache=cache, on_progress=self._send_progress)
        load_ms = (time.perf_counter() - started) * 1000
        return Message({"describe": self._runtime.describe(), "load_ms": load_ms}, {})

    def _time(self, name: str, tensor: Any) -> float:
        assert self._runtime is not None
        started = time.perf_counter()
        self._runtime.infer({name: tensor})
        return (time.perf_counter() - started) * 1000

    def _send_progress(self, done: float) -> None:
        if time.monotonic() >= self._progress_at + _PROGRESS_EVERY_S or done >= 1.0:
            self._progress_at = time.monotonic()
            self._send(Message({"progress": round(float(done), 4)}, {}))

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            got = os.readv(self._requests, [buffer])
            if not got:
                raise EOFError("the parent has closed the pipe")
            buffer = buffer[got:]

    def _send(self, message: Message) -> None:
        for buffer in pack(message.header, message.arrays):
            rest = buffer
            while rest:
                rest = rest[os.write(self._responses, rest) :]


def _short_of_memory() -> bool:
    """Whether hardly any memory is left under the limit: then a failure is due to memory, whatever its message says."""
    try:
        bytearray(_SHORT_BYTES)
    except MemoryError:
        return True
    return False


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process (VmHWM; ru_maxrss includes that of the parent); 0 when it is unknown."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def run(arguments: list[str], opener: OpenRuntime = open_runtime) -> int:
    """Run as the child process; returns the exit code."""
    requests, responses, parent, memory_bytes = (int(argument) for argument in arguments)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        return 1
    for descriptor in (requests, responses):  # a compiler that this process starts must not keep them open
        os.set_inheritable(descriptor, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit_memory(memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_MOST_KILLABLE)
    with suppress(EOFError, OSError, ProtocolError):
        Server(requests, responses, opener).serve()
    # Skip the normal exit of the interpreter: destructors of some native runtimes crash there.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
