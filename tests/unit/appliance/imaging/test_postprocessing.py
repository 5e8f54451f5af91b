"""Scores against thresholds, and the activation map in the image's own pixels."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from appliance.core.errors import InferenceError
from appliance.imaging.orientation import Orientation
from appliance.imaging.postprocessing import HEATMAP_SIDE, Localisation, classify, contour_levels, localise
from appliance.imaging.preprocessing import Geometry, from_display
from appliance.runtime import Candidate, open_runtime
from model_sync.bundle import InputSpec, Manifest
from tests.support.scans import to_image

SIZES = [(500, 2000), (2000, 500), (2048, 2048), (1059, 1404), (300, 2999), (224, 224), (1, 1), (3, 700)]


def letterboxed(rows: int, columns: int) -> Geometry:
    side = max(rows, columns)
    scale = 224 / side
    return Geometry(rows, columns, scale, scale, (side - columns) // 2 * scale, (side - rows) // 2 * scale, 224, 224)


def heat(place: Localisation) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(place.heatmap_png)))


def hottest(place: Localisation, geometry: Geometry) -> tuple[float, float]:
    """The centre of the heat map's brightest pixels, in image pixels."""
    picture = heat(place)
    rows, columns = np.nonzero(picture == picture.max())
    return (float(columns.mean()) + 0.5) / picture.shape[1] * geometry.columns, (float(rows.mean()) + 0.5) / picture.shape[
        0
    ] * geometry.rows


def one_hot(row: int, column: int, background: float = -1.0, cells: int = 7) -> np.ndarray[Any, Any]:
    cam = np.full((cells, cells), background, np.float32)
    cam[row, column] = 5.0
    return cam


@pytest.mark.parametrize(("rows", "columns"), SIZES[:6])
def test_peak_is_the_centre_of_the_strongest_cell_in_image_pixels(rows: int, columns: int) -> None:
    geometry = letterboxed(rows, columns)
    for row, column in [(3, 3), (3, 2), (3, 4), (2, 3), (4, 3)]:
        x, y = to_image(geometry, (column + 0.5) * 32, (row + 0.5) * 32)
        if not (0 <= x <= columns and 0 <= y <= rows):
            continue
        place = localise(one_hot(row, column), geometry, 0.9, 0.5)
        assert place.peak == pytest.approx((x, y), abs=0.01)
        cell = 32 / geometry.scale_x
        assert hottest(place, geometry) == pytest.approx((x, y), abs=cell / 2)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_heat_map_covers_exactly_the_image(rows: int, columns: int) -> None:
    geometry = letterboxed(rows, columns)
    picture = heat(localise(one_hot(3, 3), geometry, 0.9, 0.5))
    assert max(picture.shape) == HEATMAP_SIDE
    assert picture.shape[0] / picture.shape[1] == pytest.approx(rows / columns, rel=0.01, abs=1 / HEATMAP_SIDE)
    assert picture.dtype == np.uint8


def test_cells_in_the_padding_do_not_count() -> None:
    """500 x 2000: the image covers the rows 84 to 140 of the input, so the topmost cells hold padding alone."""
    geometry = letterboxed(500, 2000)
    cam = one_hot(0, 3)
    cam[4, 5] = 2.0
    place = localise(cam, geometry, 0.9, 0.5)
    assert place.peak == pytest.approx(((5.5 * 32) / geometry.scale_x, 500))  # its centre, row 144, lies 4 below the image
    assert heat(place).max() >= 240
    assert hottest(place, geometry)[0] == pytest.approx(place.peak[0], abs=20)


CAMS = arrays.arrays(np.float32, (7, 7), elements=st.floats(-20, 20, width=32))


@settings(deadline=None)
@given(cam=CAMS, size=st.sampled_from(SIZES[:5]), score=st.floats(0.001, 1))
def test_heat_map_agrees_with_the_map(cam: np.ndarray[Any, Any], size: tuple[int, int], score: float) -> None:
    """The brightest spot lies within a cell of one that is (nearly) the strongest; everything lies on the image."""
    geometry = letterboxed(*size)
    place = localise(cam, geometry, score, 0.5)
    x, y = place.peak
    assert 0 <= x <= geometry.columns
    assert 0 <= y <= geometry.rows
    for polygon in place.outline:
        assert polygon[0] == polygon[-1]
        assert all(0 <= px <= geometry.columns and 0 <= py <= geometry.rows for px, py in polygon)
    picture = heat(place)
    if np.ptp(cam) < 1 or not picture.any():
        return
    rows, columns = np.nonzero(picture == picture.max())
    middle = geometry.to_input((columns[0] + 0.5) / picture.shape[1] * geometry.columns, (rows[0] + 0.5) / picture.shape[0] * geometry.rows)
    column, row = int(middle[0] // 32), int(middle[1] // 32)
    near = cam[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    left, top = geometry.to_input(0, 0)
    seen = cam[int(top // 32) : int(np.ceil((224 - top) / 32)), int(left // 32) : int(np.ceil((224 - left) / 32))]
    span = float(seen.max()) - (0.0 if seen.max() > 0 else float(seen.min()))
    assert near.max() >= float(seen.max()) - 0.05 * span


def inside(point: tuple[float, float], polygon: tuple[tuple[float, float], ...]) -> bool:
    x, y = point
    crossings = 0
    for (x0, y0), (x1, y1) in pairwise(polygon):
        crossings += (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0)
    return crossings % 2 == 1


@pytest.mark.parametrize(("row", "column"), [(3, 3), (0, 0), (6, 6), (2, 5)])
def test_outline_encloses_the_peak(row: int, column: int) -> None:
    geometry = letterboxed(1000, 1000)
    place = localise(one_hot(row, column, 0.0), geometry, 0.9, 0.5)
    assert len(place.outline) == 1
    assert inside(place.peak, place.outline[0])
    cell = 1000 / 7
    xs, ys = np.array(place.outline[0]).T
    # from the peak the value falls to nothing within a cell: half of it after half a cell
    reach = cell * (1 - contour_levels(one_hot(row, column, 0.0))[0])
    for values, centre in ((xs, place.peak[0]), (ys, place.peak[1])):
        assert values.min() == pytest.approx(max(0, centre - reach), abs=0.15 * cell) or centre < cell
        assert values.max() == pytest.approx(min(1000, centre + reach), abs=0.15 * cell) or centre > 1000 - cell


def test_two_regions_have_two_outlines() -> None:
    cam = one_hot(1, 1)
    cam[5, 5] = 4.5
    place = localise(cam, letterboxed(700, 700), 0.9, 0.5)
    assert len(place.outline) == 2


def test_negative_findings_have_no_outline_and_a_faint_map() -> None:
    geometry = letterboxed(700, 700)
    positive, negative = (localise(one_hot(2, 2), geometry, score, 0.5) for score in (0.5, 0.49))
    assert positive.outline
    assert not negative.outline
    assert positive.peak == negative.peak
    assert heat(negative).max() == pytest.approx(heat(positive).max() / 2, abs=1)


def test_map_without_evidence_still_has_its_peak() -> None:
    cam = one_hot(2, 4, -9.0)
    cam[2, 4] = -0.5
    place = localise(cam, letterboxed(700, 700), 0.9, 0.5)
    assert place.peak == pytest.approx((450, 250))
    assert not place.outline
    assert hottest(place, letterboxed(700, 700)) == pytest.approx((450, 250), abs=5)
    flat = localise(np.zeros((7, 7), np.float32), letterboxed(700, 700), 0.9, 0.5)
    assert not heat(flat).any()


def area(polygons: Sequence[Sequence[tuple[float, float]]]) -> float:
    """In square pixels; a polygon inside another is a hole."""
    total = 0.0
    for polygon in polygons:
        xs, ys = np.array(polygon).T
        total += float(np.sum(xs[:-1] * ys[1:] - xs[1:] * ys[:-1])) / 2
    return abs(total)


@settings(deadline=None)
@given(cam=arrays.arrays(np.float32, (14, 14), elements=st.floats(-20, 20, width=32)), size=st.sampled_from(SIZES[:5]))
def test_inner_contours_lie_one_in_the_other(cam: np.ndarray[Any, Any], size: tuple[int, int]) -> None:
    place = localise(cam, letterboxed(*size), 0.9, 0.5)
    assert [contour.level for contour in place.inner_contours] == list(contour_levels(cam)[1:])[: len(place.inner_contours)]
    areas = [area(polygons) for polygons in (place.outline, *(contour.polygons for contour in place.inner_contours))]
    assert all(inner <= outer + 1 for outer, inner in pairwise(areas))


def test_negative_findings_have_no_inner_contours() -> None:
    assert localise(one_hot(2, 2), letterboxed(700, 700), 0.9, 0.5).inner_contours
    assert not localise(one_hot(2, 2), letterboxed(700, 700), 0.4, 0.5).inner_contours


@settings(deadline=None)
@given(
    cam=arrays.arrays(np.float32, st.sampled_from([(7, 7), (14, 14)]), elements=st.floats(-20, 20, width=32)),
    size=st.sampled_from(SIZES[:5]),
    seed=st.integers(0, 2**32 - 1),
    cells=st.integers(1, 6),
)
def test_nothing_is_marked_outside_the_body(cam: np.ndarray[Any, Any], size: tuple[int, int], seed: int, cells: int) -> None:
    """Whatever the map says: each point of each contour, and the peak, lies on the body; where there is none, anywhere."""
    coarse = np.random.default_rng(seed).random((cells, cells)) < 0.6
    body = np.kron(coarse, np.ones((10, 10), np.bool_))
    if not coarse.any():
        return
    geometry = letterboxed(*size)
    place = localise(cam, geometry, 0.9, 0.5, body)
    height, width = body.shape
    points = [place.peak]
    for polygons in (place.outline, *(contour.polygons for contour in place.inner_contours)):
        points += [point for polygon in polygons for point in polygon]
    for x, y in points:
        # Coordinates are rounded to a tenth of a pixel.
        columns = {min(max(int((x + d) / geometry.columns * width), 0), width - 1) for d in (-0.06, 0, 0.06)}
        rows = {min(max(int((y + d) / geometry.rows * height), 0), height - 1) for d in (-0.06, 0, 0.06)}
        assert any(body[row, column] for row in rows for column in columns)


def test_evidence_outside_the_body_is_shown_and_said() -> None:
    """The strongest cell lies on a marker: the outline follows the strongest evidence on the body, the heat map hides nothing."""
    geometry = letterboxed(700, 700)
    cam = one_hot(0, 0)
    cam[4, 4] = 3.0
    body = np.zeros((70, 70), np.bool_)
    body[20:, :] = True
    place = localise(cam, geometry, 0.9, 0.5, body)
    assert place.outside_body
    assert place.peak == pytest.approx((450, 450), abs=4)
    assert len(place.outline) == 1
    assert inside(place.peak, place.outline[0])
    assert hottest(place, geometry) == pytest.approx((50, 50), abs=40)
    assert not localise(cam, geometry, 0.9, 0.5).outside_body
    cam[0, 0] = 3.5
    assert not localise(cam, geometry, 0.9, 0.5, body).outside_body


# --- classify ---------------------------------------------------------------------------------------------------------------


def fake_manifest(*, explain: bool = True) -> Manifest:
    thresholds = {"pneumonia": 0.4, "effusion": 0.6}
    output = SimpleNamespace
    made = SimpleNamespace(
        labels=[SimpleNamespace(name=name) for name in thresholds],
        outputs=[output(name="cam", kind="cam"), output(name="probability", kind="probability")],
        explain=SimpleNamespace(output="cam") if explain else None,
        operating_point=lambda label: SimpleNamespace(threshold=thresholds[label]),
    )
    return cast(Manifest, made)


def outputs(first: float = 0.4, second: float = 0.59) -> dict[str, Any]:
    cams = np.stack([one_hot(1, 1), one_hot(5, 5)])[None]
    return {"probability": np.array([[first, second]], np.float32), "cam": cams}


def test_classify_cuts_each_label_at_its_own_threshold() -> None:
    geometry = letterboxed(700, 700)
    first, second = classify(outputs(0.4000001), fake_manifest(), geometry)
    assert (first.label, first.positive, first.threshold) == ("pneumonia", True, 0.4)
    assert (second.label, second.positive) == ("effusion", False)
    assert first.score == pytest.approx(0.4)
    assert first.localisation is not None
    assert second.localisation is not None
    assert first.localisation.peak == pytest.approx((150, 150))
    assert second.localisation.peak == pytest.approx((550, 550))


def test_classify_at_exactly_the_threshold_is_positive() -> None:
    half = fake_manifest()
    object.__setattr__(half, "operating_point", lambda _: SimpleNamespace(threshold=0.5))
    assert classify(outputs(0.5), half, letterboxed(700, 700))[0].positive


def test_classify_without_a_map() -> None:
    made = outputs()
    del made["cam"]
    assert [label.localisation for label in classify(made, fake_manifest(explain=False), letterboxed(9, 9))] == [None, None]


@pytest.mark.parametrize(
    "changed",
    [
        {"probability": None},
        {"cam": None},
        {"probability": np.zeros((1, 3), np.float32)},
        {"probability": np.zeros((2, 2), np.float32)},
        {"probability": np.full((1, 2), 1.5, np.float32)},
        {"probability": np.full((1, 2), -0.1, np.float32)},
        {"cam": np.zeros((1, 1, 7, 7), np.float32)},
        {"cam": np.zeros((1, 2, 49), np.float32)},
    ],
)
def test_outputs_that_are_not_the_manifests_are_an_error(changed: dict[str, Any]) -> None:
    made = {name: value for name, value in (outputs() | changed).items() if value is not None}
    with pytest.raises(InferenceError) as caught:
        classify(made, fake_manifest(), letterboxed(700, 700))
    assert caught.value.code == "job.error"


def test_heat_map_agrees_with_the_map_on_real_pictures(shared: Path) -> None:
    """In original pixels, within a cell; a maximum that lies wholly in the padding has no place in the image."""
    steps = [{"step": "modality_lut"}, {"step": "voi", "default": "percentile"}, {"step": "monochrome2"}, {"step": "to_uint8"}]
    steps += [
        {"step": "letterbox", "fill": 0, "align": "center"},
        {"step": "resize", "height": 224, "width": 224, "filter": "antialias_bilinear"},
        {"step": "scale", "divide_by": 255.0},
    ]
    layout = {"name": "image", "layout": "NCHW", "dtype": "float32", "channels": 1, "height": 224, "width": 224}
    spec = InputSpec.model_validate(layout | {"pipeline": steps})
    runtime = open_runtime(shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx", spec, Candidate("onnxruntime", "", "fp32"))
    elsewhere = 0
    for path in sorted((shared / "data" / "cxr").glob("*.png")):
        prepared = from_display(np.asarray(Image.open(path).convert("L")), spec)
        outputs = runtime.infer({"image": prepared.tensor})
        cam, geometry = outputs["cam"][0, 0], prepared.geometry
        place = localise(cam, geometry, float(outputs["probability"][0, 0]), 0.5)
        row, column = np.unravel_index(int(np.argmax(cam)), cam.shape)
        x, y = to_image(geometry, (float(column) + 0.5) * 32, (float(row) + 0.5) * 32)
        cell = 32 / geometry.scale_x
        picture = heat(place)
        down, across = np.unravel_index(int(picture.argmax()), picture.shape)
        found = ((across + 0.5) * geometry.columns / picture.shape[1], (down + 0.5) * geometry.rows / picture.shape[0])
        agrees = abs(found[0] - x) <= cell and abs(found[1] - y) <= cell
        in_padding = not (-cell / 2 < x < geometry.columns + cell / 2 and -cell / 2 < y < geometry.rows + cell / 2)
        assert agrees or in_padding, path.name
        elsewhere += not agrees
    assert elsewhere <= 1


@pytest.mark.parametrize("orientation", [Orientation(*flags) for flags in itertools.product((False, True), repeat=3)])
def test_a_turned_image_keeps_the_coordinates_of_its_file(orientation: Orientation) -> None:
    cam = np.full((7, 7), -1.0, np.float32)
    cam[1, 2] = 3.0
    upright = letterboxed(300, 200)
    turned = replace(upright, orientation=orientation)
    straight, found = localise(cam, upright, 0.9, 0.5), localise(cam, turned, 0.9, 0.5)
    assert found.peak == pytest.approx(orientation.restore_point(*straight.peak, 300, 200))
    expected = [orientation.restore_point(*point, 300, 200) for point in straight.outline[0]]
    assert np.allclose(found.outline[0], expected, atol=0.1)
    assert np.array_equal(orientation.restore(heat(straight)), heat(found))
