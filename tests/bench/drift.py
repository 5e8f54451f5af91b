"""How soon the alarm for shifted scores comes, and how often without a reason: Monte Carlo with fixed seeds (``--only drift``).

Scores are logistic-normal: their logit is normal. The shift moves the median from 0.34 to 0.61 and keeps the spread. Nothing is timed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, Final

from appliance.lifecycle.score_shift import STUDIES_PER_YEAR, Reference, ShiftEvidence
from appliance.lifecycle.trial_monitor import DRIFT_FROM, stability_index
from model_sync.bundle import ScoreHistogram, Watch

BEFORE: Final = 0.34
AFTER: Final = 0.61
WITHIN: Final = 50
_SPREADS: Final = (0.8, 1.0, 1.25, 1.5)
_HISTORIES: Final = (100, 500)
_REFERENCE_IMAGES: Final = 1000
_BINS: Final = 20


def sample(rng: random.Random, median: float, count: int, spread: float = 1.0) -> list[float]:
    """Draw scores with a median; ``spread`` is the standard deviation of their logits."""
    centre = math.log(median / (1.0 - median))
    return [1.0 / (1.0 + math.exp(-rng.gauss(centre, spread))) for _ in range(count)]


def histogram_of(scores: Sequence[float]) -> ScoreHistogram:
    """Return the histogram that a manifest would have."""
    counts = [0] * _BINS
    for score in scores:
        counts[min(_BINS - 1, int(score * _BINS))] += 1
    return ScoreHistogram(label="x", edges=[number / _BINS for number in range(_BINS + 1)], counts=counts, measured_on="simulation")


def reference_of(rng: random.Random, median: float, spread: float = 1.0) -> Reference:
    """Return the reference of a manifest whose test set has these scores, with an unknown share of ill images."""
    return Reference.of(histogram_of(sample(rng, median, _REFERENCE_IMAGES, spread)), None)


def find_alarm(scores: Iterable[float], reference: Reference | None = None, labels: int = 1) -> int | None:
    """Return the index of the score that raises the alarm; None when none does."""
    evidence = ShiftEvidence()
    for index, score in enumerate(scores):
        evidence.add(score, reference)
        if evidence.exceeds(labels):
            return index
    return None


def detection(rng: random.Random, spread: float, history: int, runs: int, labels: int = 1) -> float:
    """Return the share of runs in which the shift is found within 50 studies; ``history`` 0: from the first image on, by the reference.

    A run with an alarm before the shift does not count.
    """
    found = counted = 0
    for _ in range(runs):
        reference = None if history else reference_of(rng, BEFORE, spread)
        scores = [*sample(rng, BEFORE, history, spread), *sample(rng, AFTER, WITHIN, spread)]
        alarm = find_alarm(scores, reference, labels)
        if alarm is None or alarm >= history:
            counted += 1
            found += alarm is not None
    return found / counted


def loose_bound(rng: random.Random, spread: float, runs: int) -> float:
    """Return the share of runs in which the bound that rolls back finds the shift in 50 studies."""
    allowed = Watch().max_score_drift
    assert allowed is not None
    found = 0
    for _ in range(runs):
        histogram = histogram_of(sample(rng, BEFORE, _REFERENCE_IMAGES, spread))
        index = stability_index(sample(rng, AFTER, DRIFT_FROM, spread), histogram) - (_BINS - 1) / DRIFT_FROM
        found += index > allowed
    return found / runs


def false_alarms(rng: random.Random, years: int, *, seasons: bool = False) -> float:
    """Return the false alarms per box and year of one label; after an alarm the box begins anew, as after its acknowledgement.

    With ``seasons`` the share of ill patients, whose scores are higher, goes from 4 % in summer to 20 % in winter.
    """
    alarms = 0
    for _ in range(years):
        evidence = ShiftEvidence()
        for day in range(STUDIES_PER_YEAR):
            ill = 0.12 + 0.08 * math.sin(2.0 * math.pi * day / STUDIES_PER_YEAR) if seasons else 0.0
            evidence.add(rng.gauss(2.5 if rng.random() < ill else 0.0, 1.0), None)
            if evidence.exceeds(1):
                alarms, evidence = alarms + 1, ShiftEvidence()
    return alarms / years


def run(runs: int = 1000, years: int = 100) -> list[dict[str, Any]]:
    """Simulate; returns one row per figure, with its target and its Monte Carlo count."""
    rng = random.Random(44)
    rows = [
        _row(f"found within {WITHIN} studies, spread {spread:g}, {_since(history)}", detection(rng, spread, history, runs), f"{runs} runs")
        for spread in _SPREADS for history in (*_HISTORIES, 0)
    ]  # fmt: skip
    rows.append(_row("the same, spread 1, after 500 studies, 14 labels", detection(rng, 1.0, 500, runs, labels=14), f"{runs} runs"))
    rows.append(_row("found by the bound that rolls back (PSI 3.0), spread 1", loose_bound(rng, 1.0, runs), f"{runs} runs"))
    rows.append(_row("false alarms per box and year, 40 studies a day", false_alarms(rng, years), f"{years} years"))
    rows.append(_row("the same, ill patients 4 % to 20 % by season", false_alarms(rng, years, seasons=True), f"{years} years"))
    return rows


def _row(name: str, measured: float, count: str) -> dict[str, Any]:
    return {"name": name, "measured": measured, "count": count}


def _since(history: int) -> str:
    return f"after {history} studies" if history else "from the first study on, against the reference"


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the simulations as a Markdown table."""
    print("\n| shifted scores | measured | simulated |\n|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['measured']:.3f} | {row['count']} |")
