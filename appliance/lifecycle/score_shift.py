"""A sequential test for a shift of a model's raw scores: against the box's own history, and against the manifest's histogram.

Each score becomes its rank interval in a comparison distribution. A shift by d standard deviations of the normal scores has the
likelihood ratio of that interval as its bet; the sums of products of the bets are Shiryaev-Roberts e-detectors (Shin, Ramdas, Rinaldo:
"E-detectors: a nonparametric framework for sequential change detection", 2023): whatever the distribution of the scores is, the expected
number of scores before a false alarm is at least the limit. The ranks among the earlier scores are those of conformal test martingales
(Vovk, "Testing randomness online", Statistical Science 2021).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import Final

from model_sync.bundle import OperatingPoint, ScoreHistogram

STUDIES_PER_YEAR: Final = 40 * 365
"""A clinic's usual number: one false alarm per box and year is allowed at it."""

HISTORY_LIMIT: Final = 2000
"""Scores of the box that later ones are compared with: the first ones, so that a slow shift cannot become usual."""

# Shifts to bet on, and the one that is still no shift (seasons, sampling), in standard deviations of the normal scores.
_SHIFTS: Final = (0.7, 1.1)
_TOLERANCE: Final = 0.05
_BETS: Final = tuple(sign * shift for sign in (1.0, -1.0) for shift in _SHIFTS)
# Of the one false alarm per year, the part of each of the two comparisons.
_OWN_SHARE: Final = 0.8
# A clinic may have any share of ill patients up to that of the reference or to this one, whichever is larger.
_MAX_PREVALENCE: Final = 0.5
# Jeffreys' prior: an empty bin is rare, not impossible.
_PRIOR: Final = 0.5
_NORMAL: Final = NormalDist()


def limits(labels: int) -> tuple[float, float]:
    """Return the limits of the two comparisons (own history, reference) of one of ``labels`` scores that a study gets on this box."""
    studies = STUDIES_PER_YEAR * max(1, labels)
    return studies / _OWN_SHARE, studies / (1.0 - _OWN_SHARE)


@dataclass(frozen=True)
class Reference:
    """The histogram of the manifest, as the range of distributions that a clinic may have.

    A clinic's share of ill patients differs from that of the test set. The scores of the ill are at most the top of the histogram, those
    of the others at least its bottom, so every distribution between ``lowest`` (nobody is ill) and ``highest`` is allowed.

    Attributes:
        edges: of the bins, n + 1.
        lowest: cumulative shares at the edges (0 to 1, n + 1).
        highest: likewise.
    """

    edges: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]

    @classmethod
    def of(cls, histogram: ScoreHistogram, point: OperatingPoint | None) -> Reference:
        """Make it from a label's histogram; the share of ill images is that of the operating point's sources."""
        total = sum(histogram.counts) + _PRIOR * len(histogram.counts)
        shares = [(count + _PRIOR) / total for count in histogram.counts]
        sources = point.per_source if point else []
        ill, others = sum(source.n_positive for source in sources), sum(source.n_negative for source in sources)
        prevalence = ill / (ill + others) if ill + others else _MAX_PREVALENCE
        highest = max(prevalence, _MAX_PREVALENCE)
        return cls(tuple(histogram.edges), _reweigh(shares, prevalence, 0.0), _reweigh(shares, prevalence, highest))

    def intervals(self, score: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the rank interval of a score's bin in ``lowest`` and in ``highest``; a score beyond the edges is in the outermost bin."""
        index = min(max(bisect.bisect_right(self.edges, score) - 1, 0), len(self.edges) - 2)
        return (self.lowest[index], self.lowest[index + 1]), (self.highest[index], self.highest[index + 1])


def _reweigh(shares: Sequence[float], prevalence: float, other: float) -> tuple[float, ...]:
    """Return the cumulative shares at another prevalence, if the ill had the highest scores: the most that prevalence can change."""
    cumulative, before = [0.0], 0.0
    for share in shares:
        before = min(1.0, before + share)
        healthy = min(before, 1.0 - prevalence)
        # A set of ill images alone says nothing of the others: their scores may be as low as any.
        value = healthy * (1.0 - other) / (1.0 - prevalence) if prevalence < 1.0 else 1.0 - other
        cumulative.append(min(1.0, value + ((before - healthy) * other / prevalence if prevalence > 0.0 else 0.0)))
    cumulative[-1] = 1.0
    return tuple(cumulative)


@dataclass
class ShiftEvidence:
    """What is known of the scores of one label of one model version.

    Attributes:
        history: the first scores, sorted; at most ``HISTORY_LIMIT``.
        own: the sums of the e-detectors against the history, one per bet.
        against_reference: likewise against the manifest's histogram.
    """

    history: list[float] = field(default_factory=list)
    own: tuple[float, ...] = (0.0,) * len(_BETS)
    against_reference: tuple[float, ...] = (0.0,) * len(_BETS)

    def add(self, score: float, reference: Reference | None) -> None:
        """Take the next score into account; ``reference`` None compares with the history alone."""
        less = bisect.bisect_left(self.history, score)
        size = len(self.history) + 1
        above = bisect.bisect_right(self.history, score) + 1
        self.own = _update(self.own, _bets_of_rank(less, above, size))
        if reference is not None:
            lowest, highest = reference.intervals(score)
            bets = (_bet(shift, *(highest if shift > 0 else lowest)) for shift in _BETS)
            self.against_reference = _update(self.against_reference, tuple(bets))
        if len(self.history) < HISTORY_LIMIT:
            bisect.insort(self.history, score)

    def exceeds(self, labels: int) -> bool:
        """Whether the evidence for a shift is beyond the limit, for a box whose studies get ``labels`` scores."""
        own, reference = limits(labels)
        return _mean(self.own) >= own or _mean(self.against_reference) >= reference

    def is_valid(self) -> bool:
        """Whether it can be what this version stored: all finite, the sums of the right number, the history sorted."""
        sums = (*self.own, *self.against_reference)
        is_whole = len(self.own) == len(self.against_reference) == len(_BETS) and len(self.history) <= HISTORY_LIMIT
        return is_whole and all(math.isfinite(value) for value in (*sums, *self.history)) and self.history == sorted(self.history)


def _update(sums: Sequence[float], bets: Sequence[float]) -> tuple[float, ...]:
    return tuple(bet * (value + 1.0) for value, bet in zip(sums, bets, strict=True))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@lru_cache(maxsize=1 << 16)
def _bets_of_rank(less: int, above: int, size: int) -> tuple[float, ...]:
    return tuple(_bet(shift, less / size, above / size) for shift in _BETS)


def _bet(shift: float, low: float, high: float) -> float:
    """Return the likelihood ratio of a rank interval: moved by ``shift`` against moved by no more than the tolerance.

    It rises with the rank for a positive shift and falls for a negative one, so its mean is at most 1 for every distribution that is
    moved less than the tolerance.
    """
    tolerated = math.copysign(_TOLERANCE, shift)
    if high <= low:  # no such score in the comparison: it lies at the end that speaks against a negative shift
        return 0.0
    bottom, top = _quantile(low), _quantile(high)
    return _mass(bottom - shift, top - shift) / _mass(bottom - tolerated, top - tolerated)


def _quantile(share: float) -> float:
    return -math.inf if share <= 0.0 else math.inf if share >= 1.0 else _NORMAL.inv_cdf(share)


def _mass(low: float, high: float) -> float:
    """Return the standard normal probability of an interval; precise in both tails."""
    if low > 0:
        low, high = -high, -low
    return 0.5 * (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2)))
