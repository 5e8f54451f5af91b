"""The process in which :class:`appliance.tuning.candidate_process.Attempt` runs its candidate.

It dies with its parent, keeps under a memory cap, is the first that the kernel ends when memory is short, and leaves no core file
(one may hold a patient's image). Its arguments: the pipes that it reads and writes, and the process to die with.
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
from appliance.tuning.child_protocol import Message, WireError, pack, receive

_TELL_EVERY_S: Final = 0.2
_DETAIL_CHARS: Final = 500
_SHORT_BYTES: Final = 16 << 20
_PERHAPS_MEMORY: Final = ("job.error", "runtime.unavailable", "runtime.build")
_MOST_KILLABLE: Final = "1000"

Open = Callable[..., Runtime]


@dataclass(frozen=True)
class Input:
    """The part of a manifest's input that a runtime looks at: its name, and the shape of one image's tensor."""

    name: str
    shape: tuple[int, ...]


class Server:
    """Answers one request after the other until the parent closes the pipe.

    Args:
        requests: descriptor that requests are read from.
        answers: descriptor that answers are written to.
        opener: how a candidate is loaded.
    """

    def __init__(self, requests: int, answers: int, opener: Open = open_runtime) -> None:
        self._requests, self._answers, self._open = requests, answers, opener
        self._runtime: Runtime | None = None
        self._told_at = 0.0

    def serve(self) -> None:
        """Answer until there is nobody left to answer; raises EOFError, OSError or WireError then."""
        while True:
            request = receive(self._fill)
            try:
                answer = self._guarded(request)
            except InferenceError as error:
                answer = Message({"error": {"code": error.code, "detail": error.detail[:_DETAIL_CHARS]}}, {})
            self._send(Message(answer.header | {"peak_rss_bytes": peak_rss_bytes()}, answer.arrays))

    def _guarded(self, request: Message) -> Message:
        try:
            return self._answer(request)
        except InferenceError as error:
            if error.code in _PERHAPS_MEMORY and _short_of_memory():
                raise InferenceError("runtime.memory", error.detail) from error
            raise
        except MemoryError as error:
            raise InferenceError("runtime.memory", "no memory for an array") from error
        except Exception as error:  # port wrapper: whatever a runtime raises is told, and does not end this process
            code = "runtime.memory" if _short_of_memory() else "job.error"
            raise InferenceError(code, f"{type(error).__name__}: {error}") from error

    def _answer(self, request: Message) -> Message:
        ask = request.header.get("ask")
        if ask == "load":
            return self._load(request.header)
        if self._runtime is None:
            raise InferenceError("job.error", "nothing is loaded")
        (name, tensor), = request.arrays.items()  # fmt: skip
        if ask == "time":
            return Message({"ms": [self._time(name, tensor) for _ in range(request.header["repeat"])]}, {})
        return Message({}, dict(self._runtime.infer({name: tensor})))

    def _load(self, order: dict[str, Any]) -> Message:
        started = time.perf_counter()
        spec = Input(order["input"]["name"], tuple(order["input"]["shape"]))
        cache = Path(order["cache"]) if order["cache"] is not None else None
        candidate = Candidate.from_json(order["candidate"])
        self._runtime = self._open(Path(order["model_path"]), spec, candidate, cache=cache, told=self._told)
        load_ms = (time.perf_counter() - started) * 1000
        return Message({"describe": self._runtime.describe(), "load_ms": load_ms}, {})

    def _time(self, name: str, tensor: Any) -> float:
        assert self._runtime is not None
        started = time.perf_counter()
        self._runtime.infer({name: tensor})
        return (time.perf_counter() - started) * 1000

    def _told(self, done: float) -> None:
        if time.monotonic() >= self._told_at + _TELL_EVERY_S or done >= 1.0:
            self._told_at = time.monotonic()
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
                rest = rest[os.write(self._answers, rest) :]


def _short_of_memory() -> bool:
    """Whether hardly any is left under the cap: whatever failed then, with whatever words, failed for that."""
    try:
        bytearray(_SHORT_BYTES)
    except MemoryError:
        return True
    return False


def peak_rss_bytes() -> int:
    """The most memory this process has had resident (VmHWM; ru_maxrss would begin with the parent's); 0 where the kernel does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def run(arguments: list[str], opener: Open = open_runtime) -> int:
    """The life of the process; returns its exit code."""
    requests, answers, parent, memory_bytes = (int(argument) for argument in arguments)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before we could ask to die with it
        return 1
    for descriptor in (requests, answers):  # a compiler that we start must not hold them open
        os.set_inheritable(descriptor, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit_memory(memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_MOST_KILLABLE)
    with suppress(EOFError, OSError, WireError):
        Server(requests, answers, opener).serve()
    # Not by the interpreter's own way out: destructors of native runtimes have been seen to crash there, after all was said.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
