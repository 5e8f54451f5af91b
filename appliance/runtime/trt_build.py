"""Building a TensorRT engine, in a process of its own: it may take minutes, all of the memory, or its life.

``build`` starts ``python -m appliance.runtime.trt_build``, hands it an order on the command line, and listens: JSON lines of progress,
of what TensorRT complains of, and at last of what became of it. A build that runs into its limit is killed; one that dies is a crash
with TensorRT's last words; one that the GPU's memory is too small for is tried once more with half the batch and a fourth of the
scratch memory. Engine and timings go to the cache (:mod:`appliance.runtime.engine_cache`); timings are merged under a lock.
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

from appliance.core.child_process import Child, plain
from appliance.core.errors import ApplianceError, InferenceError
from appliance.core.process import die_with_parent, limit_memory
from appliance.runtime import engine_cache
from appliance.runtime.cuda import Cuda
from appliance.runtime.engine_cache import DeviceProfile
from appliance.runtime.trt_compat import Messages, ParseError, TrtSeam, find

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
# TensorRT's own words when the memory of the GPU, or of the process, was not enough.
_OUT_OF_MEMORY: Final = re.compile(r"out\s?of\s?memory|MEM_ALLOC_FAILED|could not be allocated|bad_alloc|cudaErrorMemoryAllocation", re.I)
_NO_TACTIC: Final = re.compile(r"could not find any implementation", re.I)
_TACTIC_TOO_LARGE: Final = re.compile(r"insufficient (?:memory|to use tactic)|memory is insufficient|Device request: ", re.I)

_CODES: Final = ("job.error", "runtime.build", "runtime.memory", "runtime.unavailable")

Told = Callable[[float], None]


@dataclass(frozen=True)
class Order:
    """What to build.

    Attributes:
        model: the ONNX file.
        input_name: its input.
        profile: what the engine is for; ``profile.batch`` is the largest batch of a file whose batch is not fixed.
        cache: directory of engines and timings.
        gpu: index of the GPU.
        workspace_part: how much of the GPU's free memory a layer may use as scratch memory.
        memory_bytes: cap of the builder's private memory on the host; the parent's own cap when None.
        parent: the process to die with.
    """

    model: Path
    input_name: str
    profile: DeviceProfile
    cache: Path
    gpu: int = 0
    workspace_part: float = _WORKSPACE_PART
    memory_bytes: int | None = None
    parent: int = 0

    def to_text(self) -> str:
        """As given to the builder."""
        value = asdict(self) | {"model": str(self.model), "cache": str(self.cache), "profile": self.profile.to_json()}
        return json.dumps(value)

    @classmethod
    def from_text(cls, text: str) -> Order:
        """Read what ``to_text`` wrote."""
        value = json.loads(text)
        paths = {"model": Path(value["model"]), "cache": Path(value["cache"])}
        return cls(**value | paths | {"profile": DeviceProfile.from_json(value["profile"])})


def build(order: Order, *, deadline_s: float = DEADLINE_S, told: Told | None = None) -> dict[str, Any]:
    """Build an engine and put it into the cache.

    Args:
        order: what to build.
        deadline_s: how long the building may take, the second try included.
        told: called with the part (0 to 1) that is done. Where TensorRT has no progress monitor (8.6) that is the part of the time
            limit that is over, and the notes say ``"progress": "elapsed"``.

    Returns:
        The notes that were kept with the engine: ``batch`` (the largest it takes), ``dynamic`` (whether smaller ones go too),
        ``build_s``, ``progress``, ``timings`` ("reused" or "new"), ``workspace_bytes``.

    Raises:
        InferenceError: ``runtime.build`` (an operator that TensorRT does not know, or an error of its own), ``runtime.memory``,
            ``runtime.crashed``, ``runtime.deadline``, ``runtime.unavailable``, ``job.error`` (the file does not take that input).
    """
    ends = time.monotonic() + deadline_s
    try:
        return _attempt(order, ends, deadline_s, told)
    except InferenceError as error:
        if error.code != "runtime.memory":
            raise
        smaller = _smaller(order)
        logger.warning("not enough memory to build with batch %d, trying %d", order.profile.batch, smaller.profile.batch)
        try:
            return _attempt(smaller, ends, deadline_s, told, keep_as=order.profile)
        except InferenceError as second:
            if second.code == "job.error":  # a file of a fixed batch cannot be built for less
                raise error from second
            if second.code != "runtime.memory":
                raise
            raise InferenceError("runtime.memory", f"{second.detail}; with batch {smaller.profile.batch} too") from second


def _smaller(order: Order) -> Order:
    profile = replace(order.profile, batch=max(1, order.profile.batch // 2))
    return replace(order, profile=profile, workspace_part=order.workspace_part * _SMALLER_WORKSPACE)


def _attempt(order: Order, ends: float, deadline_s: float, told: Told | None, keep_as: DeviceProfile | None = None) -> dict[str, Any]:
    """One builder process, listened to until it ends; its engine goes into the cache under ``keep_as``."""
    started = time.monotonic()
    with engine_cache.workplace(order.cache) as own:
        given = replace(order, parent=os.getpid())
        child = Child([__name__, given.to_text(), str(own)], max(0.0, ends - started))
        try:
            notes = _listen(child, started, deadline_s, told)
        finally:
            child.end()
        notes["build_s"] = round(time.monotonic() - started, 1)
        try:
            engine_cache.write(order.cache, keep_as or order.profile, (own / "engine").read_bytes(), notes)
        except OSError as error:
            raise InferenceError("runtime.build", f"the engine cannot be kept: {error.strerror}") from error
    return notes


def _listen(child: Child, started: float, deadline_s: float, told: Told | None) -> dict[str, Any]:
    """Wait for a builder; returns its notes or raises what became of it."""
    hears = _Ear(told)
    while True:
        ended = child.listen()
        *lines, child.output = child.output.split(b"\n")
        for line in lines:
            hears.line(bytes(line))
        if hears.notes is not None:
            return hears.notes
        if ended:
            raise _crash(child, hears.last_words)
        if child.late():
            raise InferenceError("runtime.deadline", f"no engine after {deadline_s:.0f} s")
        if told is not None and not hears.monitored:
            told(min(0.99, (time.monotonic() - started) / deadline_s))
        time.sleep(_POLL_S)


class _Ear:
    """Understands what a builder says."""

    def __init__(self, told: Told | None) -> None:
        self._told = told
        self.monitored = False
        self.last_words = ""
        self.notes: dict[str, Any] | None = None

    def line(self, line: bytes) -> None:
        message = _message(line)
        if isinstance(message.get("progress"), (int, float)):
            self.monitored = True
            if self._told is not None:
                self._told(min(1.0, float(message["progress"])))
        elif isinstance(failed := message.get("failed"), dict) and failed.get("code") in _CODES:
            raise InferenceError(failed["code"], plain(failed.get("detail", ""), 500))
        elif isinstance(message.get("built"), dict):
            self.notes = message["built"]
        elif "said" in message:
            self.last_words = plain(message["said"], 300)


def _message(line: bytes) -> dict[str, Any]:
    """A line of the builder's; empty when it is none: a library may have written there before it died."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _crash(child: Child, last_words: str) -> InferenceError:
    for _ in range(20):  # its pipe may close a moment before it has ended
        if child.exit_code is not None:
            break
        time.sleep(_POLL_S)
    code = child.exit_code
    if code == -signal.SIGKILL:  # nobody here sent it: the kernel does, when memory runs out
        return InferenceError("runtime.memory", "the builder was killed from outside, SIGKILL in build")
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    capped = "" if limit == resource.RLIM_INFINITY else f"; it may use {limit >> 20} MiB of memory"
    return InferenceError(
        "runtime.crashed", f"the builder died of {how} in build{capped}" + (f"; last: {last_words}" if last_words else "")
    )


def main(arguments: list[str]) -> int:
    """The builder's life: ``ORDER DIRECTORY``; returns its exit code: 0 once it has said how it ended."""
    order, own = Order.from_text(arguments[0]), Path(arguments[1])
    die_with_parent(signal.SIGKILL)
    if os.getppid() != order.parent:
        return 1
    os.nice(_NICENESS)
    if order.memory_bytes is not None:
        limit_memory(order.memory_bytes)
    tell = _private_output()
    try:
        tell({"built": _build(order, own, tell)})
    except ApplianceError as error:
        tell({"failed": {"code": error.code, "detail": error.detail}})
    except MemoryError:
        tell({"failed": {"code": "runtime.memory", "detail": "not enough memory on the host"}})
    return 0


def _private_output() -> Callable[[dict[str, Any]], None]:
    """Standard output for the messages alone; what TensorRT prints there goes to standard error."""
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: dict[str, Any]) -> None:
        line = memoryview((json.dumps(message) + "\n").encode())
        while line:
            line = line[os.write(channel, line) :]

    return tell


def _build(order: Order, own: Path, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    cuda = Cuda()
    cuda.gpu(order.gpu)  # before TensorRT is touched: 8.6 dies of a segmentation fault where there is no GPU
    free = cuda.free_bytes()
    workspace = max(_MIN_WORKSPACE_BYTES, min(_MAX_WORKSPACE_BYTES, int(free * order.workspace_part)))
    seam = find()
    messages = seam.messages()
    messages.told = lambda severity, text: tell({"said": f"{severity}: {text}"})
    return construct(seam, order, own, messages, workspace, lambda done: tell({"progress": round(done, 3)}))


def construct(seam: TrtSeam, order: Order, own: Path, messages: Messages, workspace: int, told: Told) -> dict[str, Any]:
    """Build with a TensorRT at hand: parse, configure, build, write ``own/engine`` and the timings; returns the notes."""
    trt = seam.trt
    builder = trt.Builder(messages)
    network = builder.create_network(seam.network_flags())
    parser = trt.OnnxParser(network, messages)
    if not seam.parse(parser, order.model):
        raise explain_parse(seam.parse_errors(parser), messages)
    fixed = fixed_batch(network, order)
    config = builder.create_builder_config()
    seam.configure(config, order.profile.precision, workspace_bytes=workspace, level=order.profile.level)
    if -1 in tuple(network.get_input(0).shape):
        largest = fixed or order.profile.batch
        shapes = [(n, *order.profile.shape) for n in (fixed or 1, largest, largest)]
        profile = builder.create_optimization_profile()
        profile.set_shape(order.input_name, *shapes)
        config.add_optimization_profile(profile)
    monitor = seam.monitor(told)  # held here: the configuration keeps a bare pointer to it
    if monitor is not None:
        config.progress_monitor = monitor
    reused = seam.attach_timings(config, engine_cache.read_timings(order.cache, order.profile))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise explain_build(messages)
    _write(own / "engine", engine)
    _keep_timings(seam, config, order)
    return {
        "batch": fixed or order.profile.batch, "dynamic": fixed is None, "workspace_bytes": workspace,
        "progress": "elapsed" if monitor is None else "monitor", "timings": "reused" if reused else "new",
    }  # fmt: skip


def fixed_batch(network: Any, order: Order) -> int | None:
    """The batch that a file is fixed to; None when it takes any.

    Raises:
        InferenceError: ``job.error``: it does not take the input that the manifest says.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    names = [item.name for item in inputs]
    if names != [order.input_name]:
        raise InferenceError("job.error", f"the model's inputs are {names}, the manifest says {order.input_name!r}")
    shape = tuple(inputs[0].shape)
    wanted = order.profile.shape
    fits = len(shape) == 1 + len(wanted) and all(n in (-1, m) for n, m in zip(shape[1:], wanted, strict=True))
    if not fits:
        raise InferenceError("job.error", f"the model takes {list(shape)}, the manifest says {[-1, *wanted]}")
    if shape[0] not in (-1, order.profile.batch):
        raise InferenceError("job.error", f"the model reads {shape[0]} image at once, not {order.profile.batch}")
    return None if shape[0] == -1 else int(shape[0])


def explain_parse(errors: list[ParseError], messages: Messages) -> InferenceError:
    """Why an ONNX file was not understood: the operator by its name where there is one."""
    for error in errors:
        if error.unsupported and error.operator:
            where = f" ({error.node})" if error.node else ""
            return InferenceError("runtime.build", f"TensorRT does not support the operator {error.operator}{where}: {error.text}"[:500])
    said = [f"{error.operator} {error.text}".strip() for error in errors] or messages.errors()
    return InferenceError("runtime.build", f"TensorRT cannot read the model: {said[0] if said else 'it does not say why'}"[:500])


def explain_build(messages: Messages) -> InferenceError:
    """Why there is no engine, from what TensorRT said: out of memory, or an error of its own, word for word."""
    errors, everything = messages.errors(), [text for _, text in messages.said]
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
        raise InferenceError("runtime.build", f"the engine cannot be kept: {error.strerror}") from error


def _keep_timings(seam: TrtSeam, config: Any, order: Order) -> None:
    """Merge this build's timings into those on the disk; without a place for them the next build measures again."""
    try:
        with _locked(order.cache / "timings.lock"):
            others = engine_cache.read_timings(order.cache, order.profile)
            engine_cache.write_timings(order.cache, order.profile, seam.timings(config, others))
    except OSError as error:
        logger.warning("the timings of this build are not kept: %s", error.strerror)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
