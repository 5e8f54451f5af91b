"""Convert the outputs of a model to findings: probability, threshold, and location in the image.

The class activation map (CAM) is the logit before the sigmoid, cell by cell: the logit of the probability is formed from its cells, as
their mean plus a bias or as the logarithm of the mean of their exponentials. Values above zero are evidence for the label. A cell covers
``input / cells`` pixels of the model's input, and its value belongs to the centre of that square; enlarging the map and mapping it to the
image take that into account.

Outlines and the peak lie on the body only. The heat map is not cut: it shows what the model used, on the body or not.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import numpy as np
from PIL import Image

from appliance.core.domain import Contour
from appliance.core.errors import InferenceError
from appliance.imaging.body_mask import resample, shrink

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.imaging.preprocessing import Geometry
    from model_sync.bundle import Manifest

    Map: TypeAlias = NDArray[np.float32]
    Flags: TypeAlias = NDArray[np.bool_]
    Point: TypeAlias = tuple[float, float]
    Polygons: TypeAlias = tuple[tuple[Point, ...], ...]
    Box: TypeAlias = tuple[float, float, float, float]

HEATMAP_SIDE: Final = 256
# The outline encloses the area where the map is above the first of these shares of its maximum, the inner contours that above the others.
# Chosen by measurement: on a map of 7 x 7 half of the maximum encloses 36 % of the picture, three quarters 14 % (ADR 0037); on one of
# 14 x 14 a third covers most of a drawn opacity and 7 % of a real positive picture, three quarters not even 1 % (ADR 0052).
COARSE_LEVELS: Final = (0.75, 0.9)
FINE_LEVELS: Final = (0.3, 0.6, 0.9)
_FINE_CELLS: Final = 14
# A finer grid would only make the outlines longer: one cell of a map of 14 x 14 spans 9 of these steps.
_OUTLINE_SIDE: Final = 128
# The map of a negative finding is fainter, so that it never looks like a mark; 128 levels still show its maximum.
_NEGATIVE_STRENGTH: Final = 0.5
_ROUNDING: Final = 1e-9
# The strongest evidence counts as outside the body where the strongest on the body is below this share of it.
_OUTSIDE_SHARE: Final = 0.8


@dataclass(frozen=True)
class Localisation:
    """The location in the image that a score is based on.

    Coordinates are (x, y) in pixels of the image as the file has it, the origin at its top left corner; the centre of the first pixel is
    (0.5, 0.5).

    Attributes:
        peak: the centre of the strongest cell of the map, clipped to the image where the cell extends into the padding; where that is
            not on the body, the strongest place on the body.
        outline: closed polygons around the area of the body above the first of the map's levels (:func:`contour_levels`), in shares of the
            maximum there; empty for a negative finding.
        inner_contours: the same for each of the other levels.
        heatmap_png: 8-bit grey PNG, longest side ``HEATMAP_SIDE``, covering exactly the image; 0 is no evidence, the maximum is 255 for
            a positive finding and 128 for a negative one.
        outside_body: whether the strongest evidence lies outside the body, so that the score rests on something that is no anatomy.
    """

    peak: Point
    outline: Polygons
    heatmap_png: bytes
    inner_contours: tuple[Contour, ...] = ()
    outside_body: bool = False


@dataclass(frozen=True)
class ScoredLabel:
    """The probability of one label at its operating point."""

    label: str
    score: float
    threshold: float
    positive: bool
    localisation: Localisation | None


def classify(
    outputs: dict[str, NDArray[np.float32]], manifest: Manifest, geometry: Geometry, body: Flags | None = None
) -> list[ScoredLabel]:
    """Turn the outputs for one image into one scored label each, in the manifest's order.

    Args:
        outputs: output name -> array with a batch of one, probabilities [1, labels], CAM [1, labels, h, w].
        manifest: names the outputs, the labels and their thresholds; a score of exactly the threshold is positive.
        geometry: maps the image to the model's input.
        body: see :func:`localise`.

    Raises:
        InferenceError: ``job.error``: an output is missing or contradicts the manifest.
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
        location = None if cams is None else localise(cams[index], geometry, score, threshold, body)
        result.append(ScoredLabel(label.name, score, threshold, score >= threshold, location))
    return result


def _output(outputs: dict[str, NDArray[np.float32]], name: str, shape: tuple[int | None, ...]) -> NDArray[np.float32]:
    value = outputs.get(name)
    if value is None:
        raise InferenceError("job.error", f"the model has no output {name!r}")
    if len(value.shape) != len(shape) or any(want not in (None, have) for want, have in zip(shape, value.shape, strict=True)):
        raise InferenceError("job.error", f"output {name!r} has the shape {value.shape}")
    return value


def localise(cam: Map, geometry: Geometry, score: float, threshold: float, body: Flags | None = None) -> Localisation:
    """Locate the evidence for a score.

    Args:
        cam: float [h, w].
        geometry: maps the image to the model's input.
        score: of the label.
        threshold: a score of exactly the threshold is positive.
        body: bool [h, w] that covers the upright image, see ``appliance.imaging.body_mask``; None: everything counts as body.
    """
    part, box = _on_image(cam, geometry)
    positive = score >= threshold
    evidence = _evidence(part)
    strength = 1.0 if positive else _NEGATIVE_STRENGTH
    heat_map = geometry.orientation.restore(_enlarged(evidence, geometry, box, HEATMAP_SIDE))
    whole = _enlarged(evidence, geometry, box, _OUTLINE_SIDE)
    inside = _inside(body, whole.shape)
    shown = np.where(inside, whole, np.float32(0))
    levels = contour_levels(cam)
    outlines: list[Polygons] = [() for _ in levels]
    if positive and part.max() > 0 and shown.max() > 0:
        outlines = [_outline(shown, geometry, level) for level in levels]
    contours = tuple(Contour(level, lines) for level, lines in zip(levels[1:], outlines[1:], strict=True) if lines)
    outside = bool(shown.max() < _OUTSIDE_SHARE * whole.max())
    peak = geometry.to_file(*_peak(part, geometry, box, shown, inside))
    return Localisation(peak, outlines[0], _png(np.asarray(heat_map * strength, np.float32)), contours, outside)


def contour_levels(cam: Map) -> tuple[float, ...]:
    """Return the levels of the outline and of the inner contours of a map [h, w], in shares of its maximum."""
    return FINE_LEVELS if min(cam.shape) >= _FINE_CELLS else COARSE_LEVELS


def _inside(body: Flags | None, shape: tuple[int, ...]) -> Flags:
    """The body on the grid of the outlines, one step smaller all around, so that a contour between two points stays on it."""
    if body is None:
        return np.ones(shape, np.bool_)
    inside = shrink(resample(body, *shape))
    return inside if inside.any() else np.ones(shape, np.bool_)


def _on_image(cam: Map, geometry: Geometry) -> tuple[Map, Box]:
    """Return the cells that overlap the image, and the extent of the image (left, top, right, bottom) in units of these cells."""
    cell_w, cell_h = geometry.input_w / cam.shape[1], geometry.input_h / cam.shape[0]
    left, top = geometry.to_input(0, 0)
    right, bottom = geometry.to_input(geometry.columns, geometry.rows)
    x0, x1 = _cells(left / cell_w, right / cell_w, cam.shape[1])
    y0, y1 = _cells(top / cell_h, bottom / cell_h, cam.shape[0])
    box = (left / cell_w - x0, top / cell_h - y0, min(right / cell_w, x1) - x0, min(bottom / cell_h, y1) - y0)
    return cam[y0:y1, x0:x1], box


def _cells(start: float, end: float, count: int) -> tuple[int, int]:
    """The range of whole cells that covers an extent; differences up to a billionth of a cell are rounding errors."""
    first = min(max(math.floor(start + _ROUNDING), 0), count - 1)
    return first, min(max(math.ceil(end - _ROUNDING), first + 1), count)


def _evidence(cam: Map) -> Map:
    """Scale the map to 0..1. Without evidence for the label the least evidence against it is scaled."""
    low = 0.0 if cam.max() > 0 else float(cam.min())
    span = float(cam.max()) - low
    return np.asarray(np.clip(cam - low, 0.0, None) / (span or 1.0), np.float32)


def _enlarged(evidence: Map, geometry: Geometry, box: Box, side: int) -> Map:
    """Enlarge the map to the extent of the image: [h, w], the longer of them ``side``, by linear interpolation.

    Linear interpolation keeps the maximum at its cell; cubic interpolation overshoots between two lower cells.
    """
    longest = max(geometry.columns, geometry.rows)
    width, height = (max(1, round(side * length / longest)) for length in (geometry.columns, geometry.rows))
    across = _weights(width, box[0], box[2], evidence.shape[1])
    down = _weights(height, box[1], box[3], evidence.shape[0])
    return np.asarray(down @ evidence @ across.T, np.float32)


def _nodes(start: float, end: float, cells: int) -> NDArray[np.float64]:
    """Coordinates of the values of a row of cells: their centres, clipped to the image."""
    return np.clip(np.arange(cells) + 0.5, start, end)


def _weights(pixels: int, start: float, end: float, cells: int) -> NDArray[np.float64]:
    """The weight of each cell for each pixel: [pixels, cells]."""
    at = start + (np.arange(pixels) + 0.5) * (end - start) / pixels
    nodes = _nodes(start, end, cells)
    return np.stack([np.interp(at, nodes, own) for own in np.eye(cells)], axis=1)


def _peak(cam: Map, geometry: Geometry, box: Box, shown: Map, inside: Flags) -> Point:
    """The strongest evidence on the body, in pixels of the upright image; ``shown`` is the map on the grid of the outlines."""
    row, column = np.unravel_index(int(np.argmax(cam)), cam.shape)
    x = (_nodes(box[0], box[2], cam.shape[1])[column] - box[0]) / (box[2] - box[0])
    y = (_nodes(box[1], box[3], cam.shape[0])[row] - box[1]) / (box[3] - box[1])
    height, width = shown.shape
    if not inside[min(int(y * height), height - 1), min(int(x * width), width - 1)]:
        down, across = np.unravel_index(int(np.argmax(np.where(inside, shown, -1))), shown.shape)
        x, y = (float(across) + 0.5) / width, (float(down) + 0.5) / height
    return float(x) * geometry.columns, float(y) * geometry.rows


def _outline(shown: Map, geometry: Geometry, fraction: float) -> Polygons:
    """Closed polygons in pixels of the file's image; a region that reaches the image's edge is closed along it."""
    from contourpy import contour_generator

    height, width = shown.shape
    framed = np.zeros((height + 2, width + 2))
    framed[1:-1, 1:-1] = shown
    x = np.concatenate(([0.0], (np.arange(width) + 0.5) * geometry.columns / width, [geometry.columns]))
    y = np.concatenate(([0.0], (np.arange(height) + 0.5) * geometry.rows / height, [geometry.rows]))
    generator = contour_generator(x, y, framed, name="serial", line_type="Separate")
    lines = cast("list[NDArray[np.float64]]", generator.lines(fraction * float(shown.max())))
    polygons = [[geometry.to_file(float(px), float(py)) for px, py in line] for line in lines if len(line) > 3]
    return tuple(tuple((round(px, 1), round(py, 1)) for px, py in polygon) for polygon in polygons)


def _png(shown: Map) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.rint(shown * 255).astype(np.uint8)).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
