"""The self-test of a model, in a process of its own that may crash: copy, verify, build, golden cases (``appliance self-test``).

It writes JSON lines to standard output: ``{"state", "progress"}`` while it runs, then one of ``{"result"}`` and ``{"failed"}``. The parent
records them, kills the process at its deadline, and counts an end without a result as a crash. The process runs with low priority and
under the memory limit of the box, uses no database, and dies with its parent.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.core import device_profile
from appliance.core.domain import Note, utc_now
from appliance.core.errors import ActivationError, ApplianceError, InferenceError
from appliance.core.process import die_with_parent, limit_memory
from appliance.core.self_test_report import FIXED_BY_USER, NOT_MEASURED, SelfTestReport
from appliance.core.states import ActivationState
from appliance.lifecycle import model_files
from model_sync.errors import BundleError

if TYPE_CHECKING:
    from model_sync.bundle import ModelBundle

NICENESS: Final = 10
_TIMINGS: Final = 5
_REPORT_EVERY_S: Final = 0.2
# The measurement gets this share of the deadline, so that its best result so far is used before the self-test exceeds the deadline.
_MEASURING_SHARE: Final = 0.9
# Waiting for an idle box gets at most this share of it.
_WAITING_SHARE: Final = 0.1
# The codes where every candidate exceeds the same limit; any other code means that the self-test was not passed.
_CODES: Final = {"runtime.deadline": "activation.deadline", "runtime.memory": "activation.memory"}

Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class SelfTestRequest:
    """What to test: the arguments of ``appliance self-test``, whose help explains each."""

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
    established: str = ""
    idle_wait_s: float = 0.0


def run(request: SelfTestRequest) -> int:
    """Run as the child process; returns the exit code: 0 once the result or the failure was sent."""
    die_with_parent(signal.SIGKILL)
    if os.getppid() != request.parent:  # the parent died before the line above
        return 1
    os.nice(NICENESS)
    limit_memory(request.memory_bytes)
    send = _redirect_output()
    try:
        send({"result": run_self_test(request, send).to_json()})
    except ApplianceError as error:
        send({"failed": {"code": error.code, "detail": error.detail[:500]}})
    except MemoryError:
        send({"failed": {"code": "activation.memory", "detail": f"more than {request.memory_bytes >> 20} MiB"}})
    return 0


def _redirect_output() -> Send:
    """Reserve standard output for messages: what a runtime prints there goes to standard error."""
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: dict[str, Any]) -> None:
        rest = memoryview((json.dumps(message) + "\n").encode())
        while rest:
            rest = rest[os.write(channel, rest) :]

    return send


def run_self_test(request: SelfTestRequest, send: Send) -> SelfTestReport:
    """Copy a bundle to the box, build it, run its golden cases, and measure which candidate runs it best.

    Raises:
        ActivationError: why this model must not analyse scans on this box.
    """
    limit = time.monotonic() + request.deadline_s
    model_files.sweep(request.data_dir, [*request.keep, request.digest])
    progress = _Progress(send)
    on_copied = partial(progress, ActivationState.STAGED)
    on_copied(0.0)
    bundle = model_files.install(request.data_dir, request.origin, request.digest, on_copied, request.reserve_bytes)
    _sweep_engines(request)
    try:
        _test_input_check(bundle)
        report = _test_candidates(bundle, request, limit, progress) if request.tune else _test_baseline(bundle, request, progress)
    except InferenceError as error:
        detail = error.detail if error.code in ("job.error", "tune.wrong", *_CODES) else f"{error.code}: {error.detail}"
        raise ActivationError(_CODES.get(error.code, "model.self_test") if request.tune else "model.self_test", detail) from error
    except BundleError as error:
        raise ActivationError("model.invalid", error.message, hint=error.hint) from error
    return replace(report, tuned_at=utc_now(), profile=device_profile.profile(), hub=request.triton_url)


def _test_input_check(bundle: ModelBundle) -> None:
    """Run the input check over the golden cases: it must work on this box and stop none of them.

    Raises:
        ActivationError: ``model.self_test``: it stops a golden case.
        InferenceError: it cannot be run.
    """
    from appliance.runtime.input_check import InputChecker

    checker = InputChecker.open(bundle)
    if checker is None:
        return
    try:
        for golden in bundle.golden_cases():
            doubt = checker.doubt(golden.pixels)
            if doubt is not None:
                detail = f"the input check stops the golden case {golden.name}: {doubt.code} {doubt.detail}"
                raise ActivationError("model.self_test", detail)
    finally:
        checker.close()


def _sweep_engines(request: SelfTestRequest) -> None:
    """Remove the engines of models that are not on this box any more."""
    from appliance.runtime import engine_cache

    installed: list[str] = []
    for digest in {*request.keep, request.digest}:
        with suppress(ActivationError):  # a damaged copy: its engines are built again once it is repaired
            bundle = model_files.load(model_files.model_dir(request.data_dir, digest))
            installed += [variant.sha256 for variant in bundle.manifest.variants]
    engine_cache.sweep(model_files.engine_dir(request.data_dir), installed)


class _Progress:
    """Sends the progress of the self-test, a few times a second at most."""

    def __init__(self, send: Send) -> None:
        self._send, self._next, self._phase = send, 0.0, ""

    def __call__(self, phase: ActivationState, done: float) -> None:
        if phase.value != self._phase or time.monotonic() >= self._next or done >= 1.0:
            self._phase, self._next = phase.value, time.monotonic() + _REPORT_EVERY_S
            self._send({"state": phase.value, "progress": round(done, 3)})


def _test_candidates(bundle: ModelBundle, request: SelfTestRequest, limit: float, progress: _Progress) -> SelfTestReport:
    """Wait until the box is idle, within bounds; then measure every candidate and take the fastest correct one.

    What is timed while jobs of the box run is timed again after them, as long as the waiting time lasts.
    """
    from appliance.core.job_activity import JobWatch
    from appliance.runtime.availability import available
    from appliance.tuning.idle_wait import IdleWait
    from appliance.tuning.tuner import Limits, Subject, tune

    longest_s = min(request.idle_wait_s, _WAITING_SHARE * (limit - time.monotonic()))
    idle = IdleWait(longest_s, JobWatch(request.data_dir).has_worked)
    idle.wait()
    progress(ActivationState.BUILDING, 0.0)
    limits = Limits(_MEASURING_SHARE * (limit - time.monotonic()), request.measuring_s, request.memory_bytes)
    selection = tune(
        Subject.of_bundle(bundle, request.precision), threads=request.threads, runtimes=available(request.triton_url or None),
        cache=model_files.engine_dir(request.data_dir), limits=limits, on_progress=progress,
        is_fixed_by_user=request.precision is not None, established=_established(request.established), idle=idle,
    )  # fmt: skip
    row, details = selection.chosen, selection.details
    assert row.median_ms is not None
    return SelfTestReport(
        precision=selection.candidate.precision, runtime=f"{details.get('runtime')} {details.get('version')}", details=dict(details),
        max_difference=dict(selection.differences), median_ms=row.median_ms, worst_ms=row.worst_ms or row.median_ms,
        load_ms=row.load_ms, peak_rss_bytes=row.peak_rss_bytes, choice=selection.candidate.to_json(), reason=selection.reason,
        table=tuple(item.to_json() for item in selection.table), busy=idle.note.to_json() if idle.note else None,
    )  # fmt: skip


def _established(text: str) -> tuple[str, str] | None:
    """Read runtime and precision, separated by a colon, of the candidate that ran the model line before."""
    runtime, _, precision = text.partition(":")
    return (runtime, precision) if runtime and precision else None


def _test_baseline(bundle: ModelBundle, request: SelfTestRequest, progress: _Progress) -> SelfTestReport:
    """Test the baseline candidate, which every box can run, in this process."""
    import numpy as np

    from appliance.runtime import baseline_candidate, open_runtime
    from appliance.tuning.selection import baseline_variant

    progress(ActivationState.BUILDING, 0.0)
    variant = baseline_variant(bundle, request.precision)
    candidate = baseline_candidate(variant, request.threads)
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
        differences = _run_golden_cases(bundle, variant.precision, infer, progress)
        return SelfTestReport(
            precision=variant.precision, runtime=f"{runtime.name} {runtime.version}", details=runtime.describe(),
            max_difference=differences, median_ms=float(np.median(latencies)), worst_ms=max(latencies), load_ms=load_ms,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, choice=candidate.to_json(),
            reason=Note(FIXED_BY_USER, request.precision) if request.precision else Note(NOT_MEASURED),
        )  # fmt: skip
    finally:
        runtime.close()


def _run_golden_cases(bundle: ModelBundle, precision: str, infer: Callable[[Any], Any], progress: _Progress) -> dict[str, float]:
    """Run every golden case, some of them several times for the timing; returns case -> largest difference."""
    from appliance.imaging.golden_cases import cases

    golden, differences = cases(bundle), dict[str, float]()
    progress(ActivationState.SELF_TEST, 0.0)
    for case in golden:
        difference, allowed = case.difference(infer), case.tolerance[precision]
        if not difference <= allowed:  # also true for NaN
            raise ActivationError("model.self_test", f"{case.name}: off by {difference:.4g}, allowed {allowed:g}")
        for _ in range(_TIMINGS // len(golden) - 1):
            infer(case.tensor)
        differences[case.name] = difference
        progress(ActivationState.SELF_TEST, len(differences) / len(golden))
    return differences
