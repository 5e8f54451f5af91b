"""The proof of a model, in a process of its own that may die of it: copy, hash, build, self-test (``appliance prove``).

It speaks JSON lines on standard output: ``{"state", "progress"}`` as it goes, then one of ``{"result"}`` and ``{"failed"}``.
Whoever started it journals what it says, kills it when it takes too long, and counts a silent end as a crash. It runs below
everybody else's priority, under the box's memory cap, touches no database, and dies with its parent.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.core import device_profile
from appliance.core.domain import Note, utc_now
from appliance.core.errors import ActivationError, ApplianceError, InferenceError
from appliance.core.process import die_with_parent, limit_memory
from appliance.lifecycle import model_files
from model_sync.errors import BundleError

if TYPE_CHECKING:
    from model_sync.bundle import ModelBundle

NICENESS: Final = 10
_TIMINGS: Final = 5
_REPORT_EVERY_S: Final = 0.2
# Of the time for the whole proof, so much is for measuring: what is over when it ends is taken, before the proof itself is late.
_MEASURING_SHARE: Final = 0.9
# What ends every candidate's try in the same way is the proof's own end; all else is a self-test that was not passed.
_CODES: Final = {"runtime.deadline": "activation.deadline", "runtime.memory": "activation.memory"}

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Order:
    """What to prove.

    Attributes:
        data_dir: the box's data directory; the copy goes to ``models/<digest>``.
        origin: the directory of the bundle.
        digest: which model it has to be.
        precision: the variant; the most exact when None.
        threads: of one inference; all cores when 0.
        memory_bytes: cap of this process's private memory.
        keep: digests whose copies stay on the disk.
        parent: the process to die with.
        reserve_bytes: what stays free on the disk, for the scans that come in.
        tune: measure every way this box has of running it; the plain one is taken when not.
        deadline_s: for the whole proof.
        measuring_s: of that for measuring, engine builds apart.
        triton_url: address of the Triton server of the place; none when empty.
    """

    data_dir: Path
    origin: Path
    digest: str
    precision: str | None
    threads: int
    memory_bytes: int
    keep: list[str]
    parent: int
    reserve_bytes: int = 0
    tune: bool = False
    deadline_s: float = 1800.0
    measuring_s: float = 60.0
    triton_url: str = ""


def run(order: Order) -> int:
    """The life of the process; returns its exit code: 0 once it has said how it ended."""
    die_with_parent(signal.SIGKILL)
    if os.getppid() != order.parent:  # it died before we could ask to die with it
        return 1
    os.nice(NICENESS)
    limit_memory(order.memory_bytes)
    tell = _private_output()
    try:
        tell({"result": prove(order, tell)})
    except ApplianceError as error:
        tell({"failed": {"code": error.code, "detail": error.detail[:500]}})
    except MemoryError:
        tell({"failed": {"code": "activation.memory", "detail": f"more than {order.memory_bytes >> 20} MiB"}})
    return 0


def _private_output() -> Tell:
    """Standard output for the messages alone: whatever a runtime prints there goes to standard error."""
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: dict[str, Any]) -> None:
        line = memoryview((json.dumps(message) + "\n").encode())
        while line:
            line = line[os.write(channel, line) :]

    return tell


def prove(order: Order, tell: Tell) -> dict[str, Any]:
    """Copy a bundle to the box, build it, run its golden cases, and measure how it runs best.

    Returns:
        ``precision``, ``runtime``, ``details`` (what the runtime says it runs on), ``max_difference`` per golden case, what was
        measured (``median_ms`` and ``worst_ms`` of an inference, ``peak_rss_bytes``, ``load_ms``), and how it came to be run that way:
        ``choice`` (the candidate), ``reason``, ``table`` (all that was tried), ``tuned_at``, the device's ``profile`` and
        the ``hub`` that was configured.

    Raises:
        ActivationError: why this model may not read patients on this box.
    """
    limit = time.monotonic() + order.deadline_s
    model_files.sweep(order.data_dir, [*order.keep, order.digest])
    bundle = model_files.install(order.data_dir, order.origin, order.digest, _Progress("staged", tell), order.reserve_bytes)
    _sweep_engines(order)
    try:
        report = _tuned(bundle, order, limit, tell) if order.tune else _plain(bundle, order, tell)
    except InferenceError as error:
        what = error.detail if error.code in ("job.error", "tune.wrong", *_CODES) else f"{error.code}: {error.detail}"
        raise ActivationError(_CODES.get(error.code, "model.self_test") if order.tune else "model.self_test", what) from error
    except BundleError as error:
        raise ActivationError("model.invalid", error.message, hint=error.hint) from error
    return report | {"tuned_at": utc_now(), "profile": device_profile.profile(), "hub": order.triton_url}


def _sweep_engines(order: Order) -> None:
    """Remove what was built for models that are not on this box any more."""
    from appliance.runtime import engine_cache

    kept: list[str] = []
    for digest in {*order.keep, order.digest}:
        with suppress(ActivationError):  # damaged: its engines are built again when it is whole
            kept += [variant.sha256 for variant in model_files.load(model_files.place(order.data_dir, digest)).manifest.variants]
    engine_cache.sweep(model_files.engines(order.data_dir), kept)


class _Progress:
    """Tells how far a state is, a few times a second at most."""

    def __init__(self, state: str, tell: Tell) -> None:
        self._state, self._tell, self._next = state, tell, 0.0
        self(0.0)

    def __call__(self, done: float) -> None:
        if time.monotonic() >= self._next or done >= 1.0:
            self._tell({"state": self._state, "progress": round(done, 3)})
            self._next = time.monotonic() + _REPORT_EVERY_S


def _tuned(bundle: ModelBundle, order: Order, limit: float, tell: Tell) -> dict[str, Any]:
    """Everything measured, the fastest that is right taken."""
    from appliance.runtime.availability import available
    from appliance.tuning.tuner import Limits, Subject, tune

    progress: dict[str, _Progress] = {}

    def told(state: str, done: float) -> None:
        if state not in progress:
            progress[state] = _Progress(state, tell)
        progress[state](done)

    told("building", 0.0)
    limits = Limits(_MEASURING_SHARE * (limit - time.monotonic()), order.measuring_s, order.memory_bytes)
    choice = tune(
        Subject.of_bundle(bundle, order.precision), threads=order.threads, runtimes=available(order.triton_url or None),
        cache=model_files.engines(order.data_dir), limits=limits, told=told, by_hand=order.precision is not None,
    )  # fmt: skip
    row, details = choice.chosen, choice.details
    return {
        "precision": choice.candidate.precision, "runtime": f"{details.get('runtime')} {details.get('version')}", "details": dict(details),
        "max_difference": dict(choice.differences), "median_ms": row.median_ms, "worst_ms": row.worst_ms or row.median_ms,
        "load_ms": row.load_ms, "peak_rss_bytes": row.peak_rss_bytes, "choice": choice.candidate.to_json(),
        "reason": choice.reason.to_json(), "table": [item.to_json() for item in choice.table],
    }  # fmt: skip


def _plain(bundle: ModelBundle, order: Order, tell: Tell) -> dict[str, Any]:
    """Nothing but the plain candidate, in this very process: every box can do that."""
    import numpy as np

    from appliance.imaging.golden_cases import cases
    from appliance.runtime import open_runtime, plain_candidate
    from appliance.tuning.selection import plain_variant

    _Progress("building", tell)
    variant = plain_variant(bundle, order.precision)
    candidate = plain_candidate(variant, order.threads)
    started = time.perf_counter()
    runtime = open_runtime(bundle.path(variant.file), bundle.manifest.input, candidate)
    load_ms = (time.perf_counter() - started) * 1000
    latencies: list[float] = []

    def infer(tensor: Any) -> Any:
        begun = time.perf_counter()
        outputs = runtime.infer({bundle.manifest.input.name: tensor})
        latencies.append((time.perf_counter() - begun) * 1000)
        return outputs

    try:
        progress, golden = _Progress("self-test", tell), cases(bundle)
        differences: dict[str, float] = {}
        for case in golden:
            difference, allowed = case.difference(infer), case.tolerance[variant.precision]
            if not difference <= allowed:  # also true for NaN
                raise ActivationError("model.self_test", f"{case.name}: off by {difference:.4g}, allowed {allowed:g}")
            for _ in range(_TIMINGS // len(golden) - 1):
                infer(case.tensor)
            differences[case.name] = difference
            progress(len(differences) / len(golden))
        return {
            "precision": variant.precision, "runtime": f"{runtime.name} {runtime.version}", "details": runtime.describe(),
            "max_difference": differences, "median_ms": float(np.median(latencies)), "worst_ms": max(latencies), "load_ms": load_ms,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "choice": candidate.to_json(),
            "reason": Note("choice.by_hand", order.precision or "").to_json() if order.precision else Note("choice.untuned").to_json(),
            "table": [],
        }  # fmt: skip
    finally:
        runtime.close()
