"""Builds a TensorRT engine in a process of its own: it may take minutes and all of the memory, and it may crash.

``build`` starts ``python -m appliance.runtime.trt_build`` with a request on the command line and reads its JSON lines: progress, messages
of TensorRT, and the result. A build that exceeds its deadline is killed. A crash is reported with the last message of TensorRT. If the
memory of the GPU is too small, the build is tried once more with half the batch and a fourth of the scratch memory.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from appliance.core.child_process import Child, printable_text
from appliance.core.errors import ApplianceError, InferenceError
from appliance.core.process import die_with_parent, limit_memory
from appliance.runtime import OnProgress, engine_cache
from appliance.runtime.cuda import Cuda
from appliance.runtime.engine_cache import EngineProfile
from appliance.runtime.tensors import check_signature
from appliance.runtime.trt_compat import Messages, ParseError, TrtCompat, find

logger = logging.getLogger(__name__)

MAX_BATCH: Final = 16
DEADLINE_S: Final = 1200.0
LEVEL: Final = 2
_NICENESS: Final = 10
_POLL_S: Final = 0.1
_WORKSPACE_PART: Final = 0.5
_SMALLER_WORKSPACE: Final = 0.25
_MIN_WORKSPACE_BYTES: Final = 16 << 20
_MAX_WORKSPACE_BYTES: Final = 8 << 30
# Messages of TensorRT about insufficient memory of the GPU or of the process.
_OUT_OF_MEMORY: Final = re.compile(r"out\s?of\s?memory|MEM_ALLOC_FAILED|could not be allocated|bad_alloc|cudaErrorMemoryAllocation", re.I)
_NO_TACTIC: Final = re.compile(r"could not find any implementation", re.I)
_TACTIC_TOO_LARGE: Final = re.compile(r"insufficient (?:memory|to use tactic)|memory is insufficient|Device request: ", re.I)

_CODES: Final = ("job.error", "runtime.build", "runtime.memory", "runtime.unavailable")


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: the ONNX file.
        input_name: name of its input.
        profile: what to build the engine for; ``profile.batch`` is the largest batch, unless the file has a fixed one.
        cache: directory of engines and timings.
        gpu: index of the GPU.
        workspace_part: part of the free GPU memory that a layer may use as scratch memory.
        memory_bytes: limit of the private host memory of the builder; the limit of the parent when None.
        parent: the process to die with.
    """

    model: Path
    input_name: str
    profile: EngineProfile
    cache: Path
    gpu: int = 0
    workspace_part: float = _WORKSPACE_PART
    memory_bytes: int | None = None
    parent: int = 0

    def to_text(self) -> str:
        """The request as a command line argument."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_text(cls, text: str) -> BuildRequest:
        """Read what ``to_text`` wrote."""
        value = json.loads(text)
        paths = {"model": Path(value["model"]), "cache": Path(value["cache"])}
        return cls(**value | paths | {"profile": EngineProfile.from_json(value["profile"])})


def build(request: BuildRequest, *, deadline_s: float = DEADLINE_S, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Build an engine and store it in the cache.

    Args:
        request: what to build.
        deadline_s: time limit, with the second try.
        on_progress: called with the part (0 to 1) that is done. Without a progress monitor (TensorRT 8.6) that is the elapsed part of
            the time limit, and the notes say ``"progress": "elapsed"``.

    Returns:
        The notes that were stored with the engine: ``batch`` (the largest), ``dynamic`` (whether smaller ones are possible),
        ``build_s``, ``progress``, ``timings`` ("reused" or "new"), ``workspace_bytes``.

    Raises:
        InferenceError: ``runtime.build`` (an unsupported operator, or an internal error of TensorRT), ``runtime.memory``,
            ``runtime.crashed``, ``runtime.deadline``, ``runtime.unavailable``, ``job.error`` (the file has another input).
    """
    ends = time.monotonic() + deadline_s
    try:
        return _run_builder(request, ends, deadline_s, on_progress)
    except InferenceError as error:
        if error.code != "runtime.memory":
            raise
        profile = replace(request.profile, batch=max(1, request.profile.batch // 2))
        smaller = replace(request, profile=profile, workspace_part=request.workspace_part * _SMALLER_WORKSPACE)
        logger.warning("not enough memory to build with batch %d, trying %d", request.profile.batch, smaller.profile.batch)
        try:
            return _run_builder(smaller, ends, deadline_s, on_progress, keep_as=request.profile)
        except InferenceError as second:
            if second.code == "job.error":  # a fixed batch size cannot be reduced
                raise error from second
            if second.code != "runtime.memory":
                raise
            raise InferenceError("runtime.memory", f"{second.detail}; with batch {smaller.profile.batch} too") from second


def _run_builder(
    request: BuildRequest, ends: float, deadline_s: float, on_progress: OnProgress | None, keep_as: EngineProfile | None = None
) -> dict[str, Any]:
    """Run one builder process and store its engine in the cache under the profile ``keep_as``."""
    started = time.monotonic()
    with engine_cache.build_directory(request.cache) as directory:
        request = replace(request, parent=os.getpid())
        child = Child([__name__, request.to_text(), str(directory)], max(0.0, ends - started))
        try:
            notes = _wait_for_builder(child, started, deadline_s, on_progress)
        finally:
            child.end()
        notes["build_s"] = round(time.monotonic() - started, 1)
        try:
            engine_cache.write(request.cache, keep_as or request.profile, (directory / "engine").read_bytes(), notes)
        except OSError as error:
            raise InferenceError("runtime.build", f"the engine cannot be stored: {error.strerror}") from error
    return notes


def _wait_for_builder(child: Child, started: float, deadline_s: float, on_progress: OnProgress | None) -> dict[str, Any]:
    """Wait for a builder; returns its notes, or raises InferenceError."""
    messages = _BuilderMessages(on_progress)
    while True:
        ended = child.listen()
        *lines, child.output = child.output.split(b"\n")
        for line in lines:
            messages.handle(bytes(line))
        if messages.notes is not None:
            return messages.notes
        if ended:
            raise _crash_error(child, messages.last_message)
        if child.late():
            raise InferenceError("runtime.deadline", f"no engine after {deadline_s:.0f} s")
        if on_progress is not None and not messages.has_progress:
            on_progress(min(0.99, (time.monotonic() - started) / deadline_s))
        time.sleep(_POLL_S)


class _BuilderMessages:
    """Handles the messages of a builder."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self.has_progress = False
        self.last_message = ""
        self.notes: dict[str, Any] | None = None

    def handle(self, line: bytes) -> None:
        message = _parse(line)
        if isinstance(message.get("progress"), (int, float)):
            self.has_progress = True
            if self._on_progress is not None:
                self._on_progress(min(1.0, float(message["progress"])))
        elif isinstance(failed := message.get("failed"), dict) and failed.get("code") in _CODES:
            raise InferenceError(failed["code"], printable_text(failed.get("detail", ""), 500))
        elif isinstance(message.get("built"), dict):
            self.notes = message["built"]
        elif "said" in message:
            self.last_message = printable_text(message["said"], 300)


def _parse(line: bytes) -> dict[str, Any]:
    """Parse a line of a builder; empty when it is no JSON object: a library may have written to the pipe."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _crash_error(child: Child, last_message: str) -> InferenceError:
    for _ in range(20):  # the pipe may close a moment before the process ends
        if child.exit_code is not None:
            break
        time.sleep(_POLL_S)
    code = child.exit_code
    if code == -signal.SIGKILL:  # sent by the kernel when memory runs out
        return InferenceError("runtime.memory", "the builder was killed from outside, SIGKILL in build")
    ending = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    capped = "" if limit == resource.RLIM_INFINITY else f"; it may use {limit >> 20} MiB of memory"
    return InferenceError(
        "runtime.crashed", f"the builder died of {ending} in build{capped}" + (f"; last: {last_message}" if last_message else "")
    )


def main(arguments: list[str]) -> int:
    """Run as the builder with the arguments ``REQUEST DIRECTORY``; returns 0 once the result or the failure was sent."""
    request, directory = BuildRequest.from_text(arguments[0]), Path(arguments[1])
    die_with_parent(signal.SIGKILL)
    if os.getppid() != request.parent:
        return 1
    os.nice(_NICENESS)
    if request.memory_bytes is not None:
        limit_memory(request.memory_bytes)
    send = _redirect_output()
    try:
        send({"built": _build(request, directory, send)})
    except ApplianceError as error:
        send({"failed": {"code": error.code, "detail": error.detail}})
    except MemoryError:
        send({"failed": {"code": "runtime.memory", "detail": "not enough memory on the host"}})
    return 0


def _redirect_output() -> Callable[[dict[str, Any]], None]:
    """Reserve standard output for messages: what TensorRT prints there goes to standard error."""
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: dict[str, Any]) -> None:
        line = memoryview((json.dumps(message) + "\n").encode())
        while line:
            line = line[os.write(channel, line) :]

    return send


def _build(request: BuildRequest, directory: Path, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    cuda = Cuda()
    cuda.gpu(request.gpu)  # before TensorRT is used: 8.6 has a segmentation fault when there is no GPU
    free = cuda.free_bytes()
    workspace = max(_MIN_WORKSPACE_BYTES, min(_MAX_WORKSPACE_BYTES, int(free * request.workspace_part)))
    compat = find()
    messages = compat.messages()
    messages.on_message = lambda severity, text: send({"said": f"{severity}: {text}"})
    return construct(compat, request, directory, messages, workspace, lambda done: send({"progress": round(done, 3)}))


def construct(
    compat: TrtCompat, request: BuildRequest, directory: Path, messages: Messages, workspace: int, on_progress: OnProgress
) -> dict[str, Any]:
    """Build with the given TensorRT: parse, configure, build, write ``directory/engine`` and the timings; returns the notes."""
    trt = compat.trt
    builder = trt.Builder(messages)
    network = builder.create_network(compat.network_flags())
    parser = trt.OnnxParser(network, messages)
    if not compat.parse(parser, request.model):
        raise explain_parse([ParseError.of(parser.get_error(index)) for index in range(parser.num_errors)], messages)
    fixed = fixed_batch(network, request)
    config = builder.create_builder_config()
    compat.configure(config, request.profile.precision, workspace_bytes=workspace, level=request.profile.level)
    if -1 in tuple(network.get_input(0).shape):
        largest = fixed or request.profile.batch
        shapes = [(n, *request.profile.shape) for n in (fixed or 1, largest, largest)]
        profile = builder.create_optimization_profile()
        profile.set_shape(request.input_name, *shapes)
        config.add_optimization_profile(profile)
    monitor = compat.monitor(on_progress)  # referenced here: the configuration keeps only a raw pointer
    if monitor is not None:
        config.progress_monitor = monitor
    reused = compat.attach_timings(config, engine_cache.read_timings(request.cache, request.profile))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise explain_build(messages)
    _write(directory / "engine", engine)
    _store_timings(compat, config, request)
    return {
        "batch": fixed or request.profile.batch, "dynamic": fixed is None, "workspace_bytes": workspace,
        "progress": "elapsed" if monitor is None else "monitor", "timings": "reused" if reused else "new",
    }  # fmt: skip


def fixed_batch(network: Any, request: BuildRequest) -> int | None:
    """Return the fixed batch size of a file; None when it is dynamic.

    Raises:
        InferenceError: ``job.error``: the file has another input than the manifest.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shape = [None if n == -1 else int(n) for n in inputs[0].shape] if inputs else []
    profile = request.profile
    check_signature(", ".join(item.name for item in inputs), shape, "f32", request.input_name, profile.shape, profile.batch)
    return shape[0]


def explain_parse(errors: list[ParseError], messages: Messages) -> InferenceError:
    """Explain why an ONNX file could not be parsed, with the name of the unsupported operator if there is one."""
    for error in errors:
        if error.unsupported and error.operator:
            where = f" ({error.node})" if error.node else ""
            return InferenceError("runtime.build", f"TensorRT does not support the operator {error.operator}{where}: {error.text}"[:500])
    texts = [f"{error.operator} {error.text}".strip() for error in errors] or messages.errors()
    return InferenceError("runtime.build", f"TensorRT cannot read the model: {texts[0] if texts else 'it does not say why'}"[:500])


def explain_build(messages: Messages) -> InferenceError:
    """Explain why there is no engine from the messages of TensorRT: out of memory, or its own error text."""
    errors, everything = messages.errors(), [text for _, text in messages.entries]
    for text in reversed(errors):
        if _OUT_OF_MEMORY.search(text):
            return InferenceError("runtime.memory", text)
    if any(_NO_TACTIC.search(text) for text in errors) and any(_TACTIC_TOO_LARGE.search(text) for text in everything):
        return InferenceError("runtime.memory", errors[-1])
    first = next((text for text in errors if "assertion" in text.lower()), errors[-1] if errors else "it does not say why")
    return InferenceError("runtime.build", f"TensorRT: {first}")


def _write(path: Path, engine: Any) -> None:
    try:
        path.write_bytes(memoryview(engine))
    except OSError as error:
        raise InferenceError("runtime.build", f"the engine cannot be stored: {error.strerror}") from error


def _store_timings(compat: TrtCompat, config: Any, request: BuildRequest) -> None:
    """Merge the timings of this build into the stored ones; after a disk error the next build measures again."""
    try:
        with _locked(request.cache / "timings.lock"):
            others = engine_cache.read_timings(request.cache, request.profile)
            engine_cache.write_timings(request.cache, request.profile, compat.timings(config, others))
    except OSError as error:
        logger.warning("the timings of this build are not stored: %s", error.strerror)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
