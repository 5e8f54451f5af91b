"""The process in which :class:`appliance.tuning.candidate_process.CandidateProcess` runs its candidate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.core import limited_child
from appliance.core.child_protocol import Message
from appliance.core.errors import InferenceError
from appliance.core.limited_child import Channel
from appliance.runtime import Candidate, Runtime, open_runtime

_PROGRESS_EVERY_S: Final = 0.2
_DETAIL_CHARS: Final = 500
_SHORT_BYTES: Final = 16 << 20
_MAYBE_MEMORY: Final = ("job.error", "runtime.unavailable", "runtime.build")

OpenRuntime = Callable[..., Runtime]


@dataclass(frozen=True)
class ModelInput:
    """The input of a model as a runtime needs it: its name, and the shape of one image's tensor."""

    name: str
    shape: tuple[int, ...]


class Server:
    """Handles one request after the other until the parent closes the pipe.

    Args:
        channel: to the parent.
        opener: loads a candidate.
    """

    def __init__(self, channel: Channel, opener: OpenRuntime = open_runtime) -> None:
        self._channel, self._open = channel, opener
        self._runtime: Runtime | None = None
        self._progress_at = 0.0

    def serve(self) -> None:
        """Handle requests until the pipe is closed or broken; raises EOFError, OSError or ProtocolError then."""
        while True:
            request = self._channel.receive()
            try:
                response = self._handle_errors(request)
            except InferenceError as error:
                response = Message({"error": {"code": error.code, "detail": error.detail[:_DETAIL_CHARS]}}, {})
            self._channel.send(Message(response.header | {"peak_rss_bytes": peak_rss_bytes()}, response.arrays))

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
            self._channel.send(Message({"progress": round(float(done), 4)}, {}))


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
    return limited_child.run(arguments, lambda channel: Server(channel, opener).serve())


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
