"""The labelled training pictures of the reference model, and how they are split by patient."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quantize.errors import QuantizeError
from quantize.gate.roc_statistics import Flags, Scored

SPLIT_SEED = 7
HELD_OUT_PART = 0.1


@dataclass(frozen=True)
class TrainingSet:
    """``cxr_train_224.npz``: JPEG pictures of 224 x 224, 8 bit, with a label, a source and a patient each.

    Attributes:
        blob: All JPEG files one after the other.
        offsets: Where each begins; one more than there are pictures.
        positive: Whether pneumonia is shown.
        source: Where each picture comes from.
        patient: A pseudonym of the patient.
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
            QuantizeError: the file does not exist.
        """
        if not path.is_file():
            raise QuantizeError(
                f"the training pictures are not at {path}",
                hint="point --shared to the directory that holds data/cxr_train_224.npz and models/cxr_pneumonia",
            )
        # The texts may be stored as objects. The file belongs to the project and only its developers read it.
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


def independent(directory: Path, score: Callable[[NDArray[np.uint8]], float]) -> Scored | None:
    """Score the frontal pictures of ``cxr_labels.csv``, whose patients took no part in training or validation.

    Returns None where the pictures do not exist. ``score`` takes one picture, uint8 [rows, columns].
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
