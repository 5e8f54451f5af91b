"""What the reference model is measured with: the labelled pictures, the split by patient, and the statistics.

All of it is plain numpy, so that an operating point can be reproduced without a training framework.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_sync.bundle import Interval, SourceMeasure
from quantize.errors import QuantizeError

Scores: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]

SPLIT_SEED = 7
HELD_OUT_PART = 0.1
# Two-sided 95 %.
_Z = 1.959963984540054


@dataclass(frozen=True)
class TrainingSet:
    """``cxr_train_224.npz``: JPEG pictures of 224 x 224, 8 bit, with a label, a source and a patient each.

    Attributes:
        blob: All JPEG files one after the other.
        offsets: Where each begins; one more than there are pictures.
        positive: Whether pneumonia is shown.
        source: Where each picture comes from.
        patient: Whose it is.
    """

    blob: bytes
    offsets: NDArray[np.int64]
    positive: Flags
    source: NDArray[np.str_]
    patient: NDArray[np.str_]

    @classmethod
    def load(cls, path: Path) -> TrainingSet:
        """Read the set.

        Raises:
            QuantizeError: The file is not there.
        """
        if not path.is_file():
            raise QuantizeError(
                f"the training pictures are not at {path}",
                hint="point --shared to the directory that holds data/cxr_train_224.npz and models/cxr_pneumonia",
            )
        # The texts may be stored as objects. The file comes with the project and is read by its makers only.
        with np.load(path, allow_pickle=True) as arrays:
            return cls(
                arrays["blob"].tobytes(),
                arrays["off"].astype(np.int64),
                arrays["y"] > 0,
                arrays["src"].astype(np.str_),
                arrays["pat"].astype(np.str_),
            )

    def held_out(self) -> Flags:
        """Return which pictures training never saw: those of a tenth of the patients, drawn by a fixed seed."""
        patients = np.unique(self.patient)
        drawn = np.random.default_rng(SPLIT_SEED).choice(patients, int(HELD_OUT_PART * len(patients)), replace=False)
        return np.isin(self.patient, drawn)

    def picture(self, index: int) -> NDArray[np.uint8]:
        """Decode one picture: uint8 [224, 224]."""
        raw = self.blob[self.offsets[index] : self.offsets[index + 1]]
        return np.asarray(Image.open(io.BytesIO(raw)).convert("L"), dtype=np.uint8)

    def batches(self, chosen: Flags, size: int = 32) -> Iterator[NDArray[np.uint8]]:
        """Yield the chosen pictures in their order, uint8 [up to ``size``, 224, 224]."""
        indices = np.flatnonzero(chosen)
        for start in range(0, len(indices), size):
            yield np.stack([self.picture(int(index)) for index in indices[start : start + size]])


@dataclass(frozen=True)
class Scored:
    """Pictures with their label, source and score."""

    positive: Flags
    source: NDArray[np.str_]
    score: Scores


def independent(directory: Path, score: Callable[[NDArray[np.uint8]], float]) -> Scored | None:
    """Score the frontal pictures of ``cxr_labels.csv``, whose patients took no part in training or validation.

    Returns None where the pictures are not there. ``score`` takes one picture, uint8 [rows, columns].
    """
    table = directory / "cxr_labels.csv"
    if not table.is_file():
        return None
    with table.open(encoding="utf-8", newline="") as stream:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(stream) if row["view"] != "L"]
    scores = []
    for row in rows:
        with Image.open(directory / row["file"]) as picture:
            scores.append(score(np.asarray(picture.convert("L"), dtype=np.uint8)))
    positive = np.array([row["pneumonia"] == "1" for row in rows])
    return Scored(positive, np.array([row["source"] for row in rows]), np.array(scores))


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
    found = np.sort(score[positive])
    allowed_misses = len(found) - math.ceil(sensitivity * len(found))
    # Cut, not rounded: rounding up could miss the very picture that decides.
    return math.floor(float(found[allowed_misses]) * 1e4) / 1e4


def sensitivity_of(scored: Scored, threshold: float) -> Interval | None:
    """Return the share of positives at or above ``threshold``."""
    found = scored.score[scored.positive] >= threshold
    return wilson(int(found.sum()), len(found)) if len(found) else None


def specificity_of(scored: Scored, threshold: float) -> Interval | None:
    """Return the share of negatives below ``threshold``."""
    quiet = scored.score[~scored.positive] < threshold
    return wilson(int(quiet.sum()), len(quiet)) if len(quiet) else None


def per_source(scored: Scored, threshold: float) -> list[SourceMeasure]:
    """Measure within each source by itself: across sources a model can win by telling the sources apart."""
    measures = []
    for name in np.unique(scored.source):
        here = scored.source == name
        part = Scored(scored.positive[here], scored.source[here], scored.score[here])
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
