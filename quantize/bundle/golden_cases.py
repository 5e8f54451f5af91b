"""Golden cases: a few images with the float model's outputs. Every box compares each candidate with them in its self-test.

They are shipped to every box, so no picture of a patient may be among them. Where no phantoms are given, each case is the average of
many evaluation pictures with neighbouring scores, in which no patient can be recognised.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_sync.bundle import InputSpec, Precision
from quantize.errors import QuantizeError
from quantize.gate.image_files import UnreadableError, find_image_files, read_displayed
from quantize.gate.image_sets import ImageSet
from quantize.gate.predictions import Predictions
from quantize.messages import Code

CASES: Final = 6
AVERAGED: Final = 12
# Least tolerance per precision: runtimes and processors that were not available differ by so much. fp32 differs in the sixth digit,
# and in the third where a GPU computes in TF32.
FLOOR: Final[dict[Precision, float]] = {"fp32": 0.002, "fp16": 0.01, "mixed": 0.05, "int8": 0.05}
MARGIN: Final = 2.0
_DIGITS: Final = 5
_MAP_DIGITS: Final = 4


def read_golden_images(directory: Path, spec: InputSpec) -> dict[str, NDArray[np.uint8]]:
    """Read the given golden images, uint8 [rows, columns] by name.

    Raises:
        QuantizeError: ``golden.empty``, ``golden.unreadable``.
    """
    result = {}
    for path in find_image_files(directory):
        try:
            result[path.stem.lower()] = read_displayed(path, 0, spec)
        except UnreadableError as error:
            raise QuantizeError(f"the golden picture {path.name} cannot be read: {error}", code=Code.GOLDEN_UNREADABLE) from error
    if not result:
        raise QuantizeError(f"there is no picture in {directory}", code=Code.GOLDEN_EMPTY)
    return result


def average_images(images: ImageSet, score: NDArray[np.float64], spec: InputSpec) -> dict[str, NDArray[np.uint8]]:
    """Make golden pictures of a set: averages of pictures with neighbouring scores.

    Args:
        images: the evaluation set.
        score: of each of its pictures, [n].
        spec: the model's input; the pictures come in its size.
    """
    order = np.argsort(score, kind="stable")
    result = {}
    for number, part in enumerate(np.array_split(order, CASES)):
        if not len(part):
            continue
        chosen = part[np.linspace(0, len(part) - 1, min(AVERAGED, len(part))).astype(int)]
        total = np.zeros((spec.height, spec.width), np.float64)
        for index in chosen:
            row = images.rows[int(index)]
            image = Image.fromarray(read_displayed(row.path, row.index, spec))
            total += np.asarray(image.resize((spec.width, spec.height), Image.Resampling.BILINEAR), np.float64)
        result[f"average-{number}"] = np.rint(total / len(chosen)).astype(np.uint8)
    return result


def case_file(pixels: NDArray[np.uint8], predictions: Predictions) -> tuple[bytes, list[float]]:
    """Return the npz of one case and its probabilities, of the predictions on one picture.

    Probabilities and map are rounded where float noise between processors begins.
    """
    buffer = io.BytesIO()
    probability = np.round(predictions.score, _DIGITS).astype(np.float32)
    arrays = {"pixels": pixels, "probability": probability}
    if predictions.cam is not None:
        arrays["cam"] = np.round(predictions.cam, _MAP_DIGITS)
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # its stub takes no keywords of mixed dtype
    return buffer.getvalue(), [round(float(value), _DIGITS) for value in probability[0]]


def tolerance(precision: Precision, measured: Iterable[float]) -> float:
    """The tolerance of a precision: twice the largest difference measured on any runtime here, and at least the floor.

    Args:
        precision: the variant's.
        measured: differences of its golden cases, as the box computes them (``appliance.imaging.golden_cases``).
    """
    wanted = MARGIN * max(measured, default=0.0)
    # Cut up to two digits after the point, so that noise in the sixth does not change the bundle.
    return max(FLOOR[precision], math.ceil(wanted * 100 - 1e-6) / 100 if wanted > FLOOR[precision] else 0.0)
