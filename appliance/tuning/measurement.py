"""One candidate under way: its process, what it answered, what was measured, and what became of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.core.errors import InferenceError
from appliance.runtime.candidate import CPU, Candidate
from appliance.tuning.budget import Budget
from appliance.tuning.candidate_process import Attempt
from appliance.tuning.selection import Row
from appliance.tuning.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ON_CPU: Final = ("onnxruntime", "openvino")
DEADLINE: Final = "runtime.deadline"
NO_TIME: Final = "tune.no_time"


def on_cpu(runtime: str, provider: str) -> bool:
    """Whether it runs on the processor, builds no engine, and can be given fewer threads."""
    return runtime in _ON_CPU and provider in (CPU, "CPU")


class Entry:
    """One candidate under way; every call raises InferenceError as :class:`Attempt` does.

    Args:
        candidate: what is tried.
        subject: the model.
        budget: what its calls may take.
        allowed_s: for its load, and at least for each call after it.

    Attributes:
        row: its line of the table; ``right`` until something else is found.
        details: what the runtime says it runs.
        differences: golden case -> difference.
        first_ms: the quick timing every candidate gets; 0 before it.
        medians: of each round of the finals.
        worst_ms: the longest single run.
        load_s: how long its load took here, the start of its process included.
    """

    def __init__(self, candidate: Candidate, subject: Subject, budget: Budget, allowed_s: float) -> None:
        self.row = Row(candidate, "right", "")
        self._subject, self._budget, self.allowed_s = subject, budget, allowed_s
        self._attempt: Attempt | None = None
        self.details: dict[str, Any] = {}
        self.differences: dict[str, float] = {}
        self.first_ms = 0.0
        self.medians: list[float] = []
        self.worst_ms = 0.0
        self.load_s = 0.0

    @property
    def open(self) -> bool:
        """Whether its process runs and it is right so far."""
        return self._attempt is not None and self.row.state == "right"

    @property
    def median_ms(self) -> float:
        """Of one image."""
        return statistics.median(self.medians) if self.medians else self.first_ms

    @property
    def held_bytes(self) -> int:
        """What its process holds."""
        return self._attempt.peak_rss_bytes if self._attempt is not None else 0

    def load(self, cache: Path | None, told: Callable[[float], None]) -> None:
        """Start its process and load the model there."""
        candidate, started = self.row.candidate, time.monotonic()
        self._attempt = Attempt(
            self._subject.path(candidate.file), self._subject.input, candidate, cache=cache,
            deadline_s=self._budget.call_s(self.allowed_s), memory_bytes=self._budget.memory_bytes, told=told,
        )  # fmt: skip
        try:
            self.details = self._attempt.load()
        finally:
            self.load_s = time.monotonic() - started
            if not on_cpu(candidate.runtime, candidate.provider):
                self._budget.built(self.load_s)
        layers = self.details.get("layers")
        self.row = replace(self.row, load_ms=self._attempt.load_ms, layers=dict(layers) if isinstance(layers, dict) else {})

    def infer(self, tensor: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """What it answers to images [n, ...]."""
        attempt = self._running()
        attempt.deadline_s = self._budget.call_s(self.allowed_s, self.first_ms * len(tensor) / 1000)
        return attempt.infer(tensor)

    def time(self, tensor: NDArray[np.float32], repeat: int, expected_ms: float = 0.0) -> list[float]:
        """Milliseconds of each of some runs, of which one should take about so long."""
        attempt = self._running()
        attempt.deadline_s = self._budget.call_s(self.allowed_s, expected_ms * repeat / 1000)
        times = attempt.time(tensor, repeat)
        self.row = replace(self.row, peak_rss_bytes=attempt.peak_rss_bytes)
        return times

    def _running(self) -> Attempt:
        if self._attempt is None:
            raise InferenceError("job.error", "the candidate is closed")
        return self._attempt

    def judge(self) -> bool:
        """Hold it against every golden case, one image at a time; returns whether it is right."""
        precision = self.row.candidate.precision
        for case in self._subject.cases:
            allowed = case.tolerance[precision]
            try:
                difference = case.difference(self.infer)
            except InferenceError as error:
                if error.code == "job.error":  # no number at all, or none that is a probability, is as wrong as can be
                    self.ended("wrong", "tune.wrong", f"{case.name}: {error.detail}")
                else:
                    self.fail(error, case.name)
                return False
            self.differences[case.name] = difference
            self._worst_difference()
            if not difference <= allowed:  # also true for NaN
                self.ended("wrong", "tune.wrong", f"{case.name}: off by {difference:.4g}, allowed {allowed:g}")
                return False
        return True

    def _worst_difference(self) -> None:
        worst = max(self.differences.values(), key=lambda value: (value != value, value))
        self.row = replace(self.row, max_difference=None if worst != worst else worst, peak_rss_bytes=self.held_bytes)

    def fail(self, error: InferenceError, where: str = "") -> None:
        """A call went wrong: it is out, unless all that was wrong is that the time for everything is over."""
        detail = f"{where}: {error.detail}" if where else error.detail
        if error.code == DEADLINE and self._budget.over():
            if self.first_ms:
                self.close()
            else:
                self.ended("unavailable", NO_TIME, detail)
        else:
            self.ended("unavailable" if error.code == "runtime.unavailable" else "failed", error.code, detail)

    def ended(self, state: Any, code: str, detail: str = "") -> None:
        """It is out."""
        self.close()
        self.row = replace(self.row, state=state, code=code, detail=detail)

    def close(self) -> None:
        """End its process."""
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None

    def final(self) -> Row:
        """Its row with what was measured."""
        if self.row.state != "right" or not (self.medians or self.first_ms):
            return self.row
        return replace(self.row, median_ms=self.median_ms, worst_ms=self.worst_ms or None)


def fastest(entries: Sequence[Entry]) -> Entry | None:
    """Of those that were timed."""
    return min((entry for entry in entries if entry.first_ms), key=lambda entry: entry.first_ms, default=None)
