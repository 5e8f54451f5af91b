"""The statistics of the gate and of the operating points: computed with numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from model_sync.bundle import Group, Interval, SourceMeasure
from quantize.draft import Population

Scores: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]

# Two-sided 95 %.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Scored:
    """Pictures with their label, source and score."""

    positive: Flags
    source: NDArray[np.str_]
    score: Scores


def wilson(hits: int, total: int) -> Interval:
    """Return ``hits / total`` with Wilson's 95 % interval, rounded to four digits so that low <= value <= high.

    Pictures of one patient are counted as if they were independent, so the interval is somewhat too narrow.
    """
    share = hits / total
    denominator = 1 + _Z**2 / total
    centre = (share + _Z**2 / (2 * total)) / denominator
    reach = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)) / denominator
    value = round(share, 4)
    low, high = min(value, round(max(0.0, centre - reach), 4)), max(value, round(min(1.0, centre + reach), 4))
    return Interval(value=value, low=low, high=high)


def auc(positive: Flags, score: Scores) -> float | None:
    """Return the area under the ROC curve, ties counted half; None where a class is missing."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    above = float(rank[positive].sum()) - n_positive * (n_positive + 1) / 2
    return round(above / (n_positive * n_negative), 4)


def threshold_for(positive: Flags, score: Scores, sensitivity: float) -> float:
    """Return the highest threshold, cut to four digits, that finds at least ``sensitivity`` of the positives."""
    result = np.sort(score[positive])
    allowed_misses = len(result) - math.ceil(sensitivity * len(result))
    # Cut, not rounded: rounding up could miss the very picture that decides.
    return math.floor(float(result[allowed_misses]) * 1e4) / 1e4


def sensitivity_of(scored: Scored, threshold: float) -> Interval | None:
    """Return the share of positives at or above ``threshold``."""
    result = scored.score[scored.positive] >= threshold
    return wilson(int(result.sum()), len(result)) if len(result) else None


def specificity_of(scored: Scored, threshold: float) -> Interval | None:
    """Return the share of negatives below ``threshold``."""
    quiet = scored.score[~scored.positive] < threshold
    return wilson(int(quiet.sum()), len(quiet)) if len(quiet) else None


def per_source(scored: Scored, threshold: float) -> list[SourceMeasure]:
    """Measure within each source by itself: across sources a model can win by telling the sources apart."""
    measures = []
    for name in np.unique(scored.source):
        targets = scored.source == name
        part = Scored(scored.positive[targets], scored.source[targets], scored.score[targets])
        measures.append(
            SourceMeasure(
                source=str(name),
                n_positive=int(part.positive.sum()),
                n_negative=int((~part.positive).sum()),
                sensitivity=sensitivity_of(part, threshold),
                specificity=specificity_of(part, threshold),
                auc=auc(part.positive, part.score),
            )
        )
    return measures


def per_population(scored: Scored, threshold: float, populations: Sequence[Population]) -> list[Group]:
    """Measure on the images of each population that has any; an image whose source belongs to none is in no group."""
    groups = []
    for population in populations:
        sources = [str(name) for name in np.unique(scored.source) if population.includes_source(str(name))]
        if not sources:
            continue
        targets = np.isin(scored.source, sources)
        part = Scored(scored.positive[targets], scored.source[targets], scored.score[targets])
        groups.append(
            Group(
                population=population.population,
                min_years=population.min_years,
                max_years=population.max_years,
                sources=sources,
                n_positive=int(part.positive.sum()),
                n_negative=int((~part.positive).sum()),
                sensitivity=sensitivity_of(part, threshold),
                specificity=specificity_of(part, threshold),
            )
        )
    return groups


def roc(positive: Flags, score: Scores) -> tuple[Scores, Scores]:
    """Return the ROC curve as false positive and true positive fractions, both from 0 to 1, one point per distinct score."""
    order = np.argsort(-score, kind="stable")
    ill = positive[order]
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    result, alarms = np.cumsum(ill)[last], np.cumsum(~ill)[last]
    return (
        np.concatenate([[0.0], alarms / max(1, int((~positive).sum()))]),
        np.concatenate([[0.0], result / max(1, int(positive.sum()))]),
    )


def dice(one: NDArray[np.integer], other: NDArray[np.integer], value: int) -> float | None:
    """Return Dice's coefficient of two label maps for one label: 2 |A and B| / (|A| + |B|); None where neither has it."""
    a, b = one == value, other == value
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else None
