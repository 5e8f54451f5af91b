"""Checks batches of several images: whether each image gets its own result, and how long an image takes then.

A runtime may exchange the rows of a batch, be wrong for a batch that is not full, or mix values of different images. So every row is
compared with the result of the same image alone, with different images, at the full batch size and at an odd size below it: exchanged
rows would be exchanged patients.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from appliance.core.errors import InferenceError
from appliance.core.states import CandidateState
from appliance.tuning.measurement import NO_TIME, Measurement

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from appliance.imaging.golden_cases import Case
    from appliance.tuning.budget import Budget

_ROUNDS: Final = 7
_MIN_ROUNDS: Final = 3
_TURN_MS: Final = 25.0
_MAX_PER_TURN: Final = 20
# Results that differ by less than this part of the tolerance do not distinguish two images.
_MIN_DISTANCE: Final = 0.1
_NOISE_SHARE: Final = 0.1


def repeats(expected_ms: float) -> int:
    """Compute how many inferences are timed in one turn."""
    return max(1, min(_MAX_PER_TURN, round(_TURN_MS / max(expected_ms, 0.01))))


@dataclass(frozen=True)
class _Reference:
    """An image, its result in a batch of one, and its golden case (None for a derived image)."""

    image: NDArray[np.float32]
    alone: Mapping[str, NDArray[np.float32]]
    case: Case | None


class BatchCheck:
    """Compares batches of one candidate with single images.

    Args:
        base: the same candidate with batch size 1, loaded and correct.
    """

    def __init__(self, base: Measurement, cases: Sequence[Case], budget: Budget) -> None:
        self._base, self._cases, self._budget = base, cases, budget
        self._allowed = min(case.tolerance[base.row.candidate.precision] for case in cases)
        self._references: list[_Reference] = []
        self._made = 0

    def find_error(self, entry: Measurement) -> str:
        """Find why the results of a loaded batch candidate are wrong; empty when they are correct.

        Raises:
            InferenceError: the candidate does not run.
        """
        batch = entry.row.candidate.batch
        for start in range(0, len(self._cases), batch):
            if error := self._check_batch(entry, batch, start):
                return error
        odd = (batch - 2) | 1
        return self._check_batch(entry, odd, 1) if 1 < odd < batch else ""

    def add_references(self, count: int) -> bool:
        """Run the base on ``count`` single images: the golden cases, then derived images; returns whether the results distinguish them.

        Raises:
            InferenceError: the base does not run.
        """
        count = max(count, len(self._cases))
        for number in range(self._made, count):
            golden = self._cases[number] if number < len(self._cases) else None
            image = golden.tensor if golden is not None else self._derive_image(number)
            try:
                self._references.append(_Reference(image, self._base.infer(image), golden))
            except InferenceError as error:
                if error.code != "job.error":  # else a derived image has no valid result, and cannot be a reference
                    raise
        self._made = max(self._made, count)
        return any(
            self._distance(one.alone, other.alone) > _MIN_DISTANCE * self._allowed
            for index, one in enumerate(self._references) for other in self._references[:index]
        )  # fmt: skip

    def _derive_image(self, number: int) -> NDArray[np.float32]:
        """Mirror a golden image, change contrast and brightness, and add noise; the range of values stays that of the golden cases."""
        import numpy as np

        random = np.random.default_rng(number)
        low = min(float(case.tensor.min()) for case in self._cases)
        span = max(float(case.tensor.max()) for case in self._cases) - low or 1.0
        mirrored = np.flip(self._cases[number % len(self._cases)].tensor, -1)
        noise = _NOISE_SHARE * span * random.standard_normal(mirrored.shape)
        changed = low + (mirrored - low) * random.uniform(0.3, 1.0) + span * random.uniform(0.0, 0.6) + noise
        return np.clip(changed, low, low + span).astype(np.float32)

    def _check_batch(self, entry: Measurement, n: int, start: int) -> str:
        import numpy as np

        references = [self._references[(start + row) % len(self._references)] for row in range(n)]
        outputs = entry.infer(np.concatenate([reference.image for reference in references]))
        for row, reference in enumerate(references):
            result = {name: value[row : row + 1] for name, value in outputs.items()}
            if error := self._check_row(result, reference, references):
                return f"image {row + 1} of {n} at once: {error}"
        return ""

    def _check_row(self, result: Mapping[str, NDArray[np.float32]], own: _Reference, references: Sequence[_Reference]) -> str:
        off = self._distance(result, own.alone)
        if not off <= self._allowed:
            return f"off by {off:.4g} from the same image alone, allowed {self._allowed:g}"
        for other in references:
            differs = self._distance(own.alone, other.alone) > _MIN_DISTANCE * self._allowed
            if differs and self._distance(result, other.alone) < off:
                return "the answer is that of another image"
        if own.case is None:
            return ""
        golden, allowed = own.case.difference(lambda _tensor: dict(result)), own.case.tolerance[self._base.row.candidate.precision]
        return "" if golden <= allowed else f"{own.case.name} off by {golden:.4g}, allowed {allowed:g}"

    def _distance(self, one: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]]) -> float:
        """Compute the largest difference of any output, relative to the largest value of that output for any single image."""
        import numpy as np

        if set(one) != set(other) or any(one[name].shape != other[name].shape for name in one):
            return float("inf")
        worst = 0.0
        for name, value in one.items():
            scale = (
                max(float(np.max(np.abs(reference.alone[name]), initial=0.0)) for reference in self._references)
                if self._references
                else 0.0
            )
            worst = max(worst, float(np.max(np.abs(value - other[name]), initial=0.0)) / (scale or 1.0))
        return worst

    def time(self, entry: Measurement) -> None:
        """Time one image and a full batch in turns with the base, so that both are timed under the same load of the box.

        The result of the candidate gets ``per_image_ms`` and its variation between rounds, or an error; a base that fails gets its own
        error.
        """
        import numpy as np

        batch, sample, base = entry.row.candidate.batch, self._cases[0].tensor, self._base
        stacked = np.concatenate([self._references[row % len(self._references)].image for row in range(batch)])
        one: list[float] = []
        alone: list[float] = []
        of_batch: list[float] = []
        single_repeats, batch_repeats = repeats(base.first_ms), repeats(base.first_ms * batch)
        try:
            entry.time(stacked, 1, base.first_ms * batch)
            self._budget.begin_timing()
            while len(of_batch) < _ROUNDS and not self._budget.is_measuring_over():
                try:
                    single = base.time(sample, single_repeats, base.first_ms)
                except InferenceError as error:
                    base.fail(error)
                    break
                row = entry.time(sample, single_repeats, base.first_ms)
                full = entry.time(stacked, batch_repeats, base.first_ms * batch)
                if not self._budget.was_disturbed():
                    for times, turn in ((one, single), (alone, row), (of_batch, full)):
                        times.append(statistics.median(turn))
        except InferenceError as error:
            entry.fail(error)
        if entry.row.state == CandidateState.CORRECT:
            self._store_times(entry, one, alone, of_batch)

    def _store_times(self, entry: Measurement, one: Sequence[float], alone: Sequence[float], of_batch: Sequence[float]) -> None:
        if len(of_batch) < _MIN_ROUNDS:
            code = NO_TIME if self._base.row.state == CandidateState.CORRECT else self._base.row.code
            entry.end(CandidateState.UNAVAILABLE, code, self._base.row.detail)
            return
        base_ms, batch = self._base.median_ms, entry.row.candidate.batch
        ratios = [full / batch / single for full, single in zip(of_batch, one, strict=False)]
        quarters = statistics.quantiles(ratios, n=4)
        median = statistics.median(ratios)
        entry.medians = [base_ms * statistics.median(mine / single for mine, single in zip(alone, one, strict=False))]
        entry.worst_ms = base_ms / statistics.median(one) * max(alone)
        entry.row = replace(entry.row, per_image_ms=base_ms * median, noise=(quarters[2] - quarters[0]) / median)
        entry.close()
