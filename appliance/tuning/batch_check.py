"""Several images at once: whether each gets its own answer, and how long an image takes then.

A runtime that answers for a batch may mix up its rows, be right for a full batch and wrong for one that is not, or let one image's
values into another's. So every row is held against what the same image gets alone, with images that differ, at the full size and at an
odd one below it: a mixed-up batch is a mixed-up patient.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from appliance.core.errors import InferenceError
from appliance.tuning.measurement import NO_TIME, Entry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from appliance.imaging.golden_cases import Case
    from appliance.tuning.budget import Budget

_ROUNDS: Final = 7
_LEAST_ROUNDS: Final = 3
_TURN_MS: Final = 25.0
_MOST_PER_TURN: Final = 20
# Two images whose answers are nearer than this part of the tolerance cannot be told apart by them.
_APART: Final = 0.1
_NOISE_SHARE: Final = 0.1


def repeats(expected_ms: float) -> int:
    """How often something is run in one turn."""
    return max(1, min(_MOST_PER_TURN, round(_TURN_MS / max(expected_ms, 0.01))))


@dataclass(frozen=True)
class _Known:
    """An image and the answer it gets alone."""

    image: NDArray[np.float32]
    alone: Mapping[str, NDArray[np.float32]]
    case: Case | None


class Together:
    """Batches of one candidate, held against it.

    Args:
        base: the candidate that reads one image at a time, open and right.
        cases: the golden cases.
        budget: the time.
    """

    def __init__(self, base: Entry, cases: Sequence[Case], budget: Budget) -> None:
        self._base, self._cases, self._budget = base, cases, budget
        self._allowed = min(case.tolerance[base.row.candidate.precision] for case in cases)
        self._known: list[_Known] = []
        self._made = 0

    def wrong(self, entry: Entry) -> str:
        """Why a loaded batch candidate is wrong with several images at once; empty when it is right.

        Raises:
            InferenceError: it does not run.
        """
        batch = entry.row.candidate.batch
        for start in range(0, len(self._cases), batch):
            if why := self._wrong_at(entry, batch, start):
                return why
        odd = (batch - 2) | 1
        return self._wrong_at(entry, odd, 1) if 1 < odd < batch else ""

    def know(self, count: int) -> bool:
        """Let the base answer so many images alone; returns whether their answers can be told apart.

        Raises:
            InferenceError: the base does not run.
        """
        for image, case in self._images(max(count, len(self._cases))):
            try:
                self._known.append(_Known(image, self._base.infer(image), case))
            except InferenceError as error:
                if error.code != "job.error":  # else: no answer to a picture of no patient, so nothing can be held against it
                    raise
        return any(
            self._distance(one.alone, other.alone) > _APART * self._allowed
            for index, one in enumerate(self._known) for other in self._known[:index]
        )  # fmt: skip

    def _images(self, count: int) -> list[tuple[NDArray[np.float32], Case | None]]:
        """What is not yet known of the golden cases and, after them, of as many pictures made of them as are needed."""
        images: list[tuple[NDArray[np.float32], Case | None]] = []
        for number in range(self._made, count):
            golden = self._cases[number] if number < len(self._cases) else None
            images.append((golden.tensor if golden is not None else self._picture(number), golden))
        self._made = max(self._made, count)
        return images

    def _picture(self, number: int) -> NDArray[np.float32]:
        """A golden image mirrored, in another contrast and brightness, with noise, within the values the golden cases have."""
        import numpy as np

        random = np.random.default_rng(number)
        low = min(float(case.tensor.min()) for case in self._cases)
        span = max(float(case.tensor.max()) for case in self._cases) - low or 1.0
        mirrored = np.flip(self._cases[number % len(self._cases)].tensor, -1)
        noise = _NOISE_SHARE * span * random.standard_normal(mirrored.shape)
        changed = low + (mirrored - low) * random.uniform(0.3, 1.0) + span * random.uniform(0.0, 0.6) + noise
        return np.clip(changed, low, low + span).astype(np.float32)

    def _wrong_at(self, entry: Entry, n: int, start: int) -> str:
        import numpy as np

        taken = [self._known[(start + row) % len(self._known)] for row in range(n)]
        outputs = entry.infer(np.concatenate([known.image for known in taken]))
        for row, known in enumerate(taken):
            answer = {name: value[row : row + 1] for name, value in outputs.items()}
            if why := self._wrong_row(answer, known, taken):
                return f"image {row + 1} of {n} at once: {why}"
        return ""

    def _wrong_row(self, answer: Mapping[str, NDArray[np.float32]], known: _Known, taken: Sequence[_Known]) -> str:
        off = self._distance(answer, known.alone)
        if not off <= self._allowed:
            return f"off by {off:.4g} from the same image alone, allowed {self._allowed:g}"
        for other in taken:
            apart = self._distance(known.alone, other.alone) > _APART * self._allowed
            if apart and self._distance(answer, other.alone) < off:
                return "the answer is that of another image"
        if known.case is None:
            return ""
        golden, allowed = known.case.difference(lambda _tensor: dict(answer)), known.case.tolerance[self._base.row.candidate.precision]
        return "" if golden <= allowed else f"{known.case.name} off by {golden:.4g}, allowed {allowed:g}"

    def _distance(self, one: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]]) -> float:
        """The largest difference of any output, as a part of the largest value that it has for any image alone."""
        import numpy as np

        if set(one) != set(other) or any(one[name].shape != other[name].shape for name in one):
            return float("inf")
        worst = 0.0
        for name, value in one.items():
            scale = max(float(np.max(np.abs(known.alone[name]), initial=0.0)) for known in self._known) if self._known else 0.0
            worst = max(worst, float(np.max(np.abs(value - other[name]), initial=0.0)) / (scale or 1.0))
        return worst

    # -- how long it takes -------------------------------------------------------------------------------------------

    def time(self, entry: Entry) -> None:
        """Time one image and a full batch by turns with the base; what the base takes in the same minute is what counts.

        The entry's row gets ``per_image_ms`` and its spread between rounds, or is ended; a base that fails is ended in its own name.
        """
        import numpy as np

        batch, sample, base = entry.row.candidate.batch, self._cases[0].tensor, self._base
        stacked = np.concatenate([self._known[row % len(self._known)].image for row in range(batch)])
        one: list[float] = []
        alone: list[float] = []
        of_batch: list[float] = []
        each, together = repeats(base.first_ms), repeats(base.first_ms * batch)
        try:
            entry.time(stacked, 1, base.first_ms * batch)
            while len(of_batch) < _ROUNDS and not self._budget.spent():
                try:
                    one.append(statistics.median(base.time(sample, each, base.first_ms)))
                except InferenceError as error:
                    base.fail(error)
                    break
                alone.append(statistics.median(entry.time(sample, each, base.first_ms)))
                of_batch.append(statistics.median(entry.time(stacked, together, base.first_ms * batch)))
        except InferenceError as error:
            entry.fail(error)
        if entry.row.state == "right":
            self._note(entry, one, alone, of_batch)

    def _note(self, entry: Entry, one: Sequence[float], alone: Sequence[float], of_batch: Sequence[float]) -> None:
        if len(of_batch) < _LEAST_ROUNDS:
            entry.ended("unavailable", NO_TIME if self._base.row.state == "right" else self._base.row.code, self._base.row.detail)
            return
        base_ms, batch = self._base.median_ms, entry.row.candidate.batch
        parts = [both / batch / single for both, single in zip(of_batch, one, strict=False)]
        quarters = statistics.quantiles(parts, n=4)
        middle = statistics.median(parts)
        entry.medians = [base_ms * statistics.median(mine / single for mine, single in zip(alone, one, strict=False))]
        entry.worst_ms = base_ms / statistics.median(one) * max(alone)
        entry.row = replace(entry.row, per_image_ms=base_ms * middle, noise=(quarters[2] - quarters[0]) / middle)
        entry.close()
