"""From the model's outputs to findings: probability against threshold, and where in the image it comes from.

The class activation map (CAM) is the logit before the sigmoid, cell by cell: its mean plus a bias is the logit of the
probability. What is above zero in it speaks for the label. A cell covers ``input / cells`` pixels of the model's input, so its
value belongs to the middle of that square; maps are enlarged and mapped back to the image with that in mind.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import numpy as np
from PIL import Image

from appliance.core.errors import InferenceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.imaging.preprocessing import Geometry
    from model_sync.bundle import Manifest

    Map: TypeAlias = NDArray[np.float32]
    Point: TypeAlias = tuple[float, float]
    Box: TypeAlias = tuple[float, float, float, float]

HEATMAP_SIDE: Final = 256
# The outline encloses where the map is above this share of its maximum.
OUTLINE_FRACTION: Final = 0.5
# Finer outlines would only be longer: a cell of the map spans 9 of these steps or more.
_OUTLINE_SIDE: Final = 64
# The map of a negative finding is fainter, so that it never looks like a mark; 128 levels still show where its maximum is.
_NEGATIVE_STRENGTH: Final = 0.5
_ROUNDING: Final = 1e-9


@dataclass(frozen=True)
class Localisation:
    """Where in the image a score comes from.

    Coordinates are (x, y) in pixels of the image, the origin at its top left corner; the centre of the first pixel is
    (0.5, 0.5).

    Attributes:
        peak: the centre of the map's strongest cell, moved to the image's edge where the cell reaches into the padding.
        outline: closed polygons around what is above ``OUTLINE_FRACTION`` of the map's maximum; empty for a negative finding.
        heatmap_png: 8-bit grey PNG, longest side ``HEATMAP_SIDE``, of exactly the image's extent; 0 is nothing, the
            maximum is 255 for a positive finding and 128 for a negative one.
    """

    peak: Point
    outline: tuple[tuple[Point, ...], ...]
    heatmap_png: bytes


@dataclass(frozen=True)
class ScoredLabel:
    """One label's probability against its operating point."""

    label: str
    score: float
    threshold: float
    positive: bool
    localisation: Localisation | None


def classify(outputs: dict[str, NDArray[np.float32]], manifest: Manifest, geometry: Geometry) -> list[ScoredLabel]:
    """Turn the outputs for one image into one scored label each, in the manifest's order.

    Args:
        outputs: output name -> array with a batch of one, probabilities [1, labels], CAM [1, labels, h, w].
        manifest: names the outputs, the labels and their thresholds; a score of exactly the threshold is positive.
        geometry: how the image lies in the model's input.

    Raises:
        InferenceError: ``job.error``: an output is missing, or not what the manifest says.
    """
    labels = len(manifest.labels)
    name = next((output.name for output in manifest.outputs if output.kind == "probability"), "")
    scores = _output(outputs, name, (1, labels))[0]
    if scores.min() < 0 or scores.max() > 1:
        raise InferenceError("job.error", f"output {name!r} is no probability: {scores.min():.3g} to {scores.max():.3g}")
    cams = _output(outputs, manifest.explain.output, (1, labels, None, None))[0] if manifest.explain is not None else None
    result = []
    for index, label in enumerate(manifest.labels):
        score, threshold = float(scores[index]), manifest.operating_point(label.name).threshold
        place = None if cams is None else localise(cams[index], geometry, score, threshold)
        result.append(ScoredLabel(label.name, score, threshold, score >= threshold, place))
    return result


def _output(outputs: dict[str, NDArray[np.float32]], name: str, shape: tuple[int | None, ...]) -> NDArray[np.float32]:
    value = outputs.get(name)
    if value is None:
        raise InferenceError("job.error", f"the model has no output {name!r}")
    if len(value.shape) != len(shape) or any(want not in (None, have) for want, have in zip(shape, value.shape, strict=True)):
        raise InferenceError("job.error", f"output {name!r} has the shape {value.shape}")
    return value


def localise(cam: Map, geometry: Geometry, score: float, threshold: float) -> Localisation:
    """Find where a score comes from; ``cam`` is float [h, w]."""
    part, box = _on_image(cam, geometry)
    positive = score >= threshold
    evidence = _evidence(part)
    strength = 1.0 if positive else _NEGATIVE_STRENGTH
    outline = _outline(_enlarged(evidence, geometry, box, _OUTLINE_SIDE), geometry) if positive and part.max() > 0 else ()
    return Localisation(_peak(part, geometry, box), outline, _png(_enlarged(evidence, geometry, box, HEATMAP_SIDE) * strength))


def _on_image(cam: Map, geometry: Geometry) -> tuple[Map, Box]:
    """The cells that have a part of the image in them, and the image's extent (left, top, right, bottom) in those cells."""
    cell_w, cell_h = geometry.input_w / cam.shape[1], geometry.input_h / cam.shape[0]
    left, top = geometry.to_input(0, 0)
    right, bottom = geometry.to_input(geometry.columns, geometry.rows)
    x0, x1 = _cells(left / cell_w, right / cell_w, cam.shape[1])
    y0, y1 = _cells(top / cell_h, bottom / cell_h, cam.shape[0])
    box = (left / cell_w - x0, top / cell_h - y0, min(right / cell_w, x1) - x0, min(bottom / cell_h, y1) - y0)
    return cam[y0:y1, x0:x1], box


def _cells(start: float, end: float, count: int) -> tuple[int, int]:
    """The range of whole cells around an extent; a billionth of a cell is rounding, not image."""
    first = min(max(math.floor(start + _ROUNDING), 0), count - 1)
    return first, min(max(math.ceil(end - _ROUNDING), first + 1), count)


def _evidence(cam: Map) -> Map:
    """The map from 0 to 1. Where nothing speaks for the label it shows what speaks against it least."""
    low = 0.0 if cam.max() > 0 else float(cam.min())
    span = float(cam.max()) - low
    return np.asarray(np.clip(cam - low, 0.0, None) / (span or 1.0), np.float32)


def _enlarged(evidence: Map, geometry: Geometry, box: Box, side: int) -> Map:
    """The map on the image's extent: [h, w] with the longer one ``side``, interpolated linearly between the cells' nodes.

    Linear, because that has its maximum where the cells have theirs; cubic interpolation overshoots between two lesser cells.
    """
    longest = max(geometry.columns, geometry.rows)
    width, height = (max(1, round(side * length / longest)) for length in (geometry.columns, geometry.rows))
    across = _weights(width, box[0], box[2], evidence.shape[1])
    down = _weights(height, box[1], box[3], evidence.shape[0])
    return np.asarray(down @ evidence @ across.T, np.float32)


def _nodes(start: float, end: float, cells: int) -> NDArray[np.float64]:
    """Where the values of a row of cells belong: their middle, or the image's edge where that lies in the padding."""
    return np.clip(np.arange(cells) + 0.5, start, end)


def _weights(pixels: int, start: float, end: float, cells: int) -> NDArray[np.float64]:
    """What each cell contributes to each pixel: [pixels, cells]."""
    at = start + (np.arange(pixels) + 0.5) * (end - start) / pixels
    nodes = _nodes(start, end, cells)
    return np.stack([np.interp(at, nodes, own) for own in np.eye(cells)], axis=1)


def _peak(cam: Map, geometry: Geometry, box: Box) -> Point:
    """The node of the strongest cell in image pixels."""
    row, column = np.unravel_index(int(np.argmax(cam)), cam.shape)
    x = (_nodes(box[0], box[2], cam.shape[1])[column] - box[0]) / (box[2] - box[0]) * geometry.columns
    y = (_nodes(box[1], box[3], cam.shape[0])[row] - box[1]) / (box[3] - box[1]) * geometry.rows
    return float(x), float(y)


def _outline(shown: Map, geometry: Geometry) -> tuple[tuple[Point, ...], ...]:
    """Closed polygons in image pixels; a region that reaches the image's edge is closed along it."""
    from contourpy import contour_generator

    height, width = shown.shape
    framed = np.zeros((height + 2, width + 2))
    framed[1:-1, 1:-1] = shown
    x = np.concatenate(([0.0], (np.arange(width) + 0.5) * geometry.columns / width, [geometry.columns]))
    y = np.concatenate(([0.0], (np.arange(height) + 0.5) * geometry.rows / height, [geometry.rows]))
    generator = contour_generator(x, y, framed, name="serial", line_type="Separate")
    lines = cast("list[NDArray[np.float64]]", generator.lines(OUTLINE_FRACTION * float(shown.max())))
    return tuple(tuple((round(float(px), 1), round(float(py), 1)) for px, py in line) for line in lines if len(line) > 3)


def _png(shown: Map) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.rint(shown * 255).astype(np.uint8)).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
