"""The model that is measured, and the measurement of one candidate: its process, its results, its times, and what became of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.core.errors import InferenceError
from appliance.core.states import CandidateState
from appliance.runtime.candidate import CPU, Candidate
from appliance.tuning.budget import Budget
from appliance.tuning.candidate_process import CandidateProcess
from appliance.tuning.selection import CandidateResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from appliance.imaging.golden_cases import Case
    from appliance.runtime import TensorSpec
    from model_sync.bundle import ModelBundle, Variant

_ON_CPU: Final = ("onnxruntime", "openvino")
DEADLINE: Final = "runtime.deadline"
NO_TIME: Final = "tune.no_time"
BATCHES: Final = (2, 4, 8, 16)


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    Attributes:
        input: the input's name and shape.
        variants: the files with their precisions.
        path: returns the path of a variant's file.
        cases: the golden cases, at least one; the times are measured with the tensor of the first.
        batches: batch sizes to try; none when the model takes one image at a time.
    """

    input: TensorSpec
    variants: Sequence[Variant]
    path: Callable[[str], Path]
    cases: Sequence[Case]
    batches: Sequence[int] = BATCHES

    @classmethod
    def of_bundle(cls, bundle: ModelBundle, precision: str | None = None) -> Subject:
        """Use a bundle, or only its variants of one precision; raises BundleError when it has none."""
        from appliance.imaging.golden_cases import cases
        from model_sync.bundle import InputSpec

        variants = [variant for variant in bundle.manifest.variants if precision in (None, variant.precision)]
        if not variants:
            bundle.variant(precision)  # raises an error that lists the existing ones
        batches = BATCHES if isinstance(bundle.manifest.input, InputSpec) else ()
        return cls(bundle.manifest.input, variants, bundle.path, cases(bundle), batches)


def runs_on_cpu(candidate: Candidate) -> bool:
    """Whether a candidate runs on the CPU: it builds no engine, and its number of threads can be set."""
    return candidate.runtime in _ON_CPU and candidate.provider in (CPU, "CPU")


class Measurement:
    """The measurement of one candidate; every call raises InferenceError as :class:`CandidateProcess` does.

    Args:
        allowed_s: time limit of the load, and lower bound of the limit of each later call.

    Attributes:
        row: its row of the table; the state is CORRECT until an error occurs.
        details: ``Runtime.describe``.
        differences: golden case -> largest difference.
        first_ms: the quick timing that every candidate gets; 0 before it.
        medians: the median of each round of the final comparison.
        worst_ms: the longest single inference.
        load_s: time of the load, with the start of the process.
    """

    def __init__(self, candidate: Candidate, subject: Subject, budget: Budget, allowed_s: float) -> None:
        self.row = CandidateResult(candidate, CandidateState.CORRECT, "")
        self._subject, self._budget, self.allowed_s = subject, budget, allowed_s
        self._process: CandidateProcess | None = None
        self.details: dict[str, Any] = {}
        self.differences: dict[str, float] = {}
        self.first_ms = 0.0
        self.medians: list[float] = []
        self.worst_ms = 0.0
        self.load_s = 0.0

    @property
    def is_open(self) -> bool:
        """Whether its process runs and it is correct so far."""
        return self._process is not None and self.row.state == CandidateState.CORRECT

    @property
    def median_ms(self) -> float:
        """The median time of one image."""
        return statistics.median(self.medians) if self.medians else self.first_ms

    @property
    def held_bytes(self) -> int:
        """The peak resident memory of its process; 0 when it is closed."""
        return self._process.peak_rss_bytes if self._process is not None else 0

    def load(self, cache: Path | None, on_progress: Callable[[float], None]) -> None:
        """Start its process and load the model there."""
        candidate, started = self.row.candidate, time.monotonic()
        self._process = CandidateProcess(
            self._subject.path(candidate.file), self._subject.input, candidate, cache=cache,
            deadline_s=self._budget.call_deadline_s(self.allowed_s), memory_bytes=self._budget.memory_bytes, on_progress=on_progress,
        )  # fmt: skip
        try:
            self.details = self._process.load()
        finally:
            self.load_s = time.monotonic() - started
            if not runs_on_cpu(candidate):
                self._budget.add_build_time(self.load_s)
        layers = self.details.get("layers")
        self.row = replace(self.row, load_ms=self._process.load_ms, layers=dict(layers) if isinstance(layers, dict) else {})

    def infer(self, tensor: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run images [n, ...]; returns output name -> array [n, ...]."""
        return self._running(self.first_ms * len(tensor)).infer(tensor)

    def time(self, tensor: NDArray[np.float32], repeat: int, expected_ms: float = 0.0) -> list[float]:
        """Time ``repeat`` inferences, each of which should take about ``expected_ms``; returns milliseconds."""
        process = self._running(expected_ms * repeat)
        times = process.time(tensor, repeat)
        self.row = replace(self.row, peak_rss_bytes=process.peak_rss_bytes)
        return times

    def _running(self, expected_ms: float) -> CandidateProcess:
        """Return the process with the time limit of its next call."""
        if self._process is None:
            raise InferenceError("job.error", "the candidate is closed")
        self._process.deadline_s = self._budget.call_deadline_s(self.allowed_s, expected_ms / 1000)
        return self._process

    def check_golden_cases(self) -> bool:
        """Run every golden case, one image at a time; returns whether all are within the tolerance."""
        precision = self.row.candidate.precision
        for case in self._subject.cases:
            allowed = case.tolerance[precision]
            try:
                difference = case.difference(self.infer)
            except InferenceError as error:
                if error.code == "job.error":  # an invalid output (NaN, no probability) is a wrong result
                    self.end(CandidateState.WRONG, "tune.wrong", f"{case.name}: {error.detail}")
                else:
                    self.fail(error, case.name)
                return False
            self.differences[case.name] = difference
            worst = max(self.differences.values(), key=lambda value: (value != value, value))
            self.row = replace(self.row, max_difference=None if worst != worst else worst, peak_rss_bytes=self.held_bytes)
            if not difference <= allowed:  # also true for NaN
                self.end(CandidateState.WRONG, "tune.wrong", f"{case.name}: off by {difference:.4g}, allowed {allowed:g}")
                return False
        return True

    def fail(self, error: InferenceError, where: str = "") -> None:
        """Exclude the candidate after a failed call; a timed one stays in when the only reason is the end of the total time."""
        detail = f"{where}: {error.detail}" if where else error.detail
        if error.code == DEADLINE and self._budget.is_over():
            if self.first_ms:
                self.close()
            else:
                self.end(CandidateState.UNAVAILABLE, NO_TIME, detail)
        else:
            self.end(CandidateState.UNAVAILABLE if error.code == "runtime.unavailable" else CandidateState.FAILED, error.code, detail)

    def end(self, state: CandidateState, code: str, detail: str = "") -> None:
        """Exclude the candidate and end its process."""
        self.close()
        self.row = replace(self.row, state=state, code=code, detail=detail)

    def close(self) -> None:
        """End its process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def result(self) -> CandidateResult:
        """Return its row with the measured times."""
        if self.row.state != CandidateState.CORRECT or not (self.medians or self.first_ms):
            return self.row
        return replace(self.row, median_ms=self.median_ms, worst_ms=self.worst_ms or None)
