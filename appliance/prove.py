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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance import copies
from appliance.errors import ActivationError, ApplianceError, InferenceError
from appliance.process import die_with_parent, limit_memory
from model_sync.errors import BundleError

if TYPE_CHECKING:
    from appliance.runtime import Runtime
    from model_sync.bundle import GoldenCase, ModelBundle, Variant

NICENESS: Final = 10
_TIMINGS: Final = 5
_REPORT_EVERY_S: Final = 0.2

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
    """Copy a bundle to the box, build it and run its golden cases.

    Returns:
        ``precision``, ``runtime``, ``details`` (what the runtime says it runs on), ``max_difference`` per golden case, and what was
        measured: ``median_ms`` and ``worst_ms`` of an inference, ``peak_rss_bytes``, ``load_ms``.

    Raises:
        ActivationError: why this model may not read patients on this box.
    """
    copies.sweep(order.data_dir, [*order.keep, order.digest])
    bundle = copies.install(order.data_dir, order.origin, order.digest, _Progress("staged", tell), order.reserve_bytes)
    try:
        return _measure(bundle, bundle.variant(order.precision), order.threads, tell)
    except InferenceError as error:
        raise ActivationError("model.self_test", error.detail) from error
    except BundleError as error:
        raise ActivationError("model.invalid", error.message, hint=error.hint) from error


class _Progress:
    """Tells how far a state is, a few times a second at most."""

    def __init__(self, state: str, tell: Tell) -> None:
        self._state, self._tell, self._next = state, tell, 0.0
        self(0.0)

    def __call__(self, done: float) -> None:
        if time.monotonic() >= self._next or done >= 1.0:
            self._tell({"state": self._state, "progress": round(done, 3)})
            self._next = time.monotonic() + _REPORT_EVERY_S


def _measure(bundle: ModelBundle, variant: Variant, threads: int, tell: Tell) -> dict[str, Any]:
    import numpy as np

    from appliance.runtime import open_runtime, plain_candidate

    _Progress("building", tell)
    started = time.perf_counter()
    runtime = open_runtime(bundle.path(variant.file), bundle.manifest.input, plain_candidate(variant, threads))
    load_ms = (time.perf_counter() - started) * 1000
    try:
        progress, latencies = _Progress("self-test", tell), []
        differences: dict[str, float] = {}
        for case in bundle.golden_cases():
            difference, latency_ms = _try_case(runtime, bundle, case, repeat=max(1, _TIMINGS // len(bundle.manifest.golden)))
            allowed = case.tolerance[variant.precision]
            if not difference <= allowed:  # also true for NaN
                raise ActivationError("model.self_test", f"{case.name}: off by {difference:.4g}, allowed {allowed:g}")
            differences[case.name] = difference
            latencies += latency_ms
            progress(len(differences) / len(bundle.manifest.golden))
        return {
            "precision": variant.precision, "runtime": f"{runtime.name} {runtime.version}", "details": runtime.describe(),
            "max_difference": differences, "median_ms": float(np.median(latencies)), "worst_ms": max(latencies), "load_ms": load_ms,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }  # fmt: skip
    finally:
        runtime.close()


def _try_case(runtime: Runtime, bundle: ModelBundle, case: GoldenCase, repeat: int) -> tuple[float, list[float]]:
    """One golden case the real way (resize, infer, classify).

    Returns:
        The largest difference: of its probabilities, and of its activation map relative to the map's range; and the times (ms).
    """
    import numpy as np

    from appliance.postprocess import classify
    from appliance.preprocess import from_display

    manifest = bundle.manifest
    prepared = from_display(case.pixels, manifest.image_input)
    latencies = []
    for _ in range(repeat):
        started = time.perf_counter()
        outputs = runtime.infer({manifest.input.name: prepared.tensor})
        latencies.append((time.perf_counter() - started) * 1000)
    scored = {label.label: label.score for label in classify(outputs, manifest, prepared.geometry)}
    worst = max(abs(scored[label] - expected) for label, expected in case.expected.items())
    if manifest.explain is not None and case.cam is not None:
        cam = outputs[manifest.explain.output]
        span = float(np.ptp(case.cam)) or 1.0
        worst = max(worst, float(np.max(np.abs(cam - case.cam))) / span)
    return worst, latencies
