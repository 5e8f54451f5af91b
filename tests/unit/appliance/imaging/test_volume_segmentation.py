"""Sliding windows give what one pass gives, masks come back into the patient, and millilitres are what geometry says."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from appliance.core.domain import Plane
from appliance.core.errors import InferenceError
from appliance.imaging.volumes.geometry import Grid
from appliance.imaging.volumes.key_images import draw_key_images
from appliance.imaging.volumes.segmentation import classify_voxels, dice, golden_tensor, segment, volumes_ml
from appliance.imaging.volumes.sliding_window import crop, pad, slide, starts, weights, windows
from appliance.imaging.volumes.volume import prepare, read_series
from appliance.store.volume_results import COLOURS
from model_sync.bundle import Manifest
from tests.support import series as made_up
from tests.support import volume_bundle
from tests.support.brightness_bundle import golden_volume

SIDES = st.integers(1, 12)
FILES = {"model_fp32.onnx": b"", "golden/a.npz": b"", "MODEL_CARD.md": b"", "gate.json": b""}


def box_blur(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A fully convolutional net of reach 1, zeros around it as ONNX's Conv pads; two classes."""
    framed = np.pad(batch[:, 0], ((0, 0), (1, 1), (1, 1), (1, 1)))
    total = sum(
        np.roll(framed, (a, b, c), axis=(1, 2, 3)) * (1 + a + 2 * b + 4 * c) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)
    )
    inner = np.asarray(total)[:, 1:-1, 1:-1, 1:-1]
    return np.stack([inner, 1 - inner], axis=1).astype(np.float32)


@given(st.integers(1, 300), st.integers(1, 64), st.floats(0, 0.9))
def test_windows_cover_an_axis_and_overlap_as_asked(size: int, window: int, overlap: float) -> None:
    begin = starts(size, window, overlap)
    assert begin[0] == 0 and begin == sorted(set(begin)) and begin[-1] == max(0, size - window)
    steps = np.diff(begin)
    assert len(steps) == 0 or steps.max() <= max(1, math.floor(window * (1 - overlap)))


@settings(deadline=None, max_examples=40)
@given(st.tuples(SIDES, SIDES, SIDES), st.tuples(*[st.integers(1, 8)] * 3), st.sampled_from(["gaussian", "linear"]), st.integers(1, 4))
def test_constant_answers_stay_constant(shape: Any, window: Any, weight: Any, batch: int) -> None:
    """Blending is a weighted mean: what every window agrees on comes out as it went in, for any size."""
    volume = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    answer = slide(volume, window, lambda given: np.concatenate([given, 2 * given], 1), classes=2, overlap=0.5, weight=weight, batch=batch)
    assert answer.shape == (2, *shape) and np.allclose(answer[0], volume, atol=1e-5) and np.allclose(answer[1], 2 * volume, atol=1e-5)


@pytest.mark.parametrize("weight", ["gaussian", "linear"])
def test_windows_equal_one_pass_where_no_rim_reaches(weight: Any) -> None:
    """Window 8, reach 1: a voxel that is at least one from every rim of every window that covers it is that of one pass exactly."""
    volume = np.random.default_rng(2).normal(size=(20, 17, 11)).astype(np.float32)
    whole = box_blur(volume[None, None])[0]
    window = (8, 8, 8)
    slid = slide(volume, window, box_blur, classes=2, overlap=0.5, weight=weight, batch=3)
    clean = np.ones(volume.shape, bool)
    for place in windows(volume.shape, window, 0.5):
        for axis in range(3):
            rim = np.zeros(volume.shape, bool)
            part = [slice(start, start + 8) for start in place]
            for edge in (place[axis], place[axis] + 7):
                if edge not in (0, volume.shape[axis] - 1):  # at the volume's own edge both see the same zeros
                    part[axis] = slice(edge, edge + 1)
                    rim[tuple(part)] = True
            clean &= ~rim
    assert clean.sum() > 300 and np.allclose(slid[:, clean], whole[:, clean], atol=1e-4)


def test_one_window_is_one_pass() -> None:
    volume = np.random.default_rng(3).normal(size=(8, 8, 8)).astype(np.float32)
    assert np.allclose(slide(volume, (8, 8, 8), box_blur, classes=2), box_blur(volume[None, None])[0], atol=1e-4)


def test_windows_come_in_batches_and_progress_is_told() -> None:
    sizes, told = [], []

    def infer(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        sizes.append(len(batch))
        return np.repeat(batch, 2, axis=1)

    slide(np.zeros((16, 16, 16), np.float32), (8, 8, 8), infer, classes=2, overlap=0.0, batch=3, on_progress=told.append)
    assert sizes == [3, 3, 2] and told == [3 / 8, 6 / 8, 1.0]


def test_weights_are_greatest_in_the_middle_and_never_nothing() -> None:
    for kind in ("gaussian", "linear"):
        bell = weights((9, 5, 7), kind)  # type: ignore[arg-type]
        assert bell.shape == (9, 5, 7) and bell.max() == bell[4, 2, 3] == 1 and bell.min() > 0
        assert np.array_equal(bell, bell[::-1, ::-1, ::-1])


@given(st.tuples(SIDES, SIDES, SIDES), st.tuples(SIDES, SIDES, SIDES))
def test_padding_comes_off_again(shape: Any, window: Any) -> None:
    volume = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    assert np.array_equal(crop(pad(volume, window, 0.0)[None], shape)[0], volume)


def test_answer_of_another_shape_is_refused() -> None:
    with pytest.raises(InferenceError, match="shape"):
        slide(np.zeros((8, 8, 8), np.float32), (8, 8, 8), lambda given: given, classes=2)


# -- masks ---------------------------------------------------------------------------------------------------------------


def manifest(side: int = 24, **steps: Any) -> Manifest:
    plain = {"scale": [{"step": "clip", "low": 0.0, "high": 5000.0}], "min_slices": 8, "spacing": (2.0, 2.0, 2.0), "apart": 6.0}
    return Manifest.parse(json.dumps(volume_bundle.manifest_of(FILES, input=volume_bundle.volume_input(side, **(plain | steps)))).encode())


def by_brightness(inputs: dict[str, Any]) -> dict[str, Any]:
    """A model that calls the mark (above 620) white matter and the rest of the ball (above 100) grey matter."""
    volume = inputs["volume"]
    return {"logits": np.concatenate([np.full_like(volume, 0.5), (volume > 620) * 2.0, (volume > 100) * 1.0], 1).astype(np.float32)}


@pytest.mark.parametrize("orientation", [made_up.AXIAL, made_up.SAGITTAL, made_up.CORONAL, made_up.OBLIQUE])
def test_mask_lies_where_the_mark_is_and_measures_it(orientation: Any) -> None:
    """A ball of 8 mm at the left front, high up: found there (and not at the right), with its millilitres."""
    made = made_up.slices(60, rows=70, columns=84, spacing=(1.5, 1.25), apart=1.5, orientation=orientation)
    series = read_series(made_up.sources(made), manifest().volume_input)
    found = segment(prepare(series, manifest().volume_input), series.grid, manifest(), by_brightness, batch=4)
    centre = series.grid.to_patient(np.argwhere(found.mask == 1)).mean(axis=0)
    assert np.allclose(centre, [18, -14, 10], atol=0.6)
    assert found.volumes_ml["white_matter"] == pytest.approx(4 / 3 * math.pi * 0.8**3, rel=0.15)
    assert found.volumes_ml["grey_matter"] == pytest.approx(4 / 3 * math.pi * 4**3 - 2.1, rel=0.05)
    ball = series.grid.to_patient(np.stack(np.meshgrid(*map(np.arange, series.grid.shape), indexing="ij"), axis=-1)) - [18, -14, 10]
    assert dice((np.linalg.norm(ball, axis=-1) < 8).astype(np.uint8), (found.mask == 1).astype(np.uint8), 1) > 0.9


def test_millilitres_are_counted_by_the_determinant() -> None:
    """A sheared voxel has the volume of its determinant, not the product of its edges."""
    affine = np.array([[2.0, 0.0, 1.0, 0], [0, 3.0, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 1.0]])
    mask = np.array([0, 1, 1, 2, 2, 2], np.uint8).reshape(1, 2, 3)
    output = manifest().outputs[0]
    assert volumes_ml(mask, Grid((1, 2, 3), affine), output) == pytest.approx({"white_matter": 0.048, "grey_matter": 0.072})


def everywhere(inputs: dict[str, Any]) -> dict[str, Any]:
    """A model that calls every voxel white matter, what is beside the scan too."""
    volume = inputs["volume"]
    return {"logits": np.concatenate([volume * 0, volume * 0 + 1, volume * 0], 1)}


@pytest.mark.parametrize("shear", [(0.0, 0.0, 0.0), (0.0, 0.5, 0.0)], ids=["straight", "tilted by 26 degrees"])
@pytest.mark.parametrize("side", [None, 48], ids=["windows", "crop_pad"])
def test_millilitres_are_those_of_the_scan_however_far_the_model_sees(shear: Any, side: int | None) -> None:
    """20 slices of 30 x 30 mm, a millimetre apart, are 18 ml: neither padding nor the corners beside a tilted stack are counted."""
    made = made_up.slices(20, rows=30, columns=30, spacing=(1.0, 1.0), apart=1.0, shear=shear, BodyPartExamined="HEAD")
    steps = volume_bundle.volume_input(side or 24, scale=[{"step": "clip", "low": 0.0, "high": 5000.0}])
    if side is not None:
        steps["pipeline"][-1] = {"step": "crop_pad", "depth": side, "height": side, "width": side, "fill": 0.0, "align": "center"}
    model = Manifest.parse(json.dumps(volume_bundle.manifest_of(FILES, input=steps)).encode())
    series = read_series(made_up.sources(made), model.volume_input)
    found = segment(prepare(series, model.volume_input), series.grid, model, everywhere)
    assert found.volumes_ml["white_matter"] == pytest.approx(18.0)
    assert found.volumes_ml["white_matter"] == pytest.approx(int((found.mask == 1).sum()) * series.grid.voxel_ml)


def test_dice() -> None:
    a, b = np.array([1, 1, 0, 0], np.uint8), np.array([1, 0, 1, 0], np.uint8)
    assert dice(a, b, 1) == 0.5 and dice(a, a, 1) == 1.0 and dice(a, b, 7) == 1.0


@pytest.mark.parametrize("outputs", [{}, {"logits": np.zeros((1, 2, 24, 24, 24), np.float32)}, {"logits": np.zeros((1, 3), np.float32)}])
def test_model_that_gives_something_else_is_an_error(outputs: Any) -> None:
    series = read_series(made_up.sources(made_up.slices()), manifest().volume_input)
    with pytest.raises(InferenceError, match="logits"):
        classify_voxels(prepare(series, manifest().volume_input), manifest(), lambda _given: outputs)


def test_golden_volume_is_answered_in_one_window() -> None:
    tensor, difference = golden_tensor(golden_volume(), manifest())
    assert tensor.shape == (1, 1, 24, 24, 24)
    assert difference(by_brightness({"volume": tensor})) == 0.0
    wrong = by_brightness({"volume": tensor})["logits"]
    assert difference({"logits": wrong[:, [0, 2, 1]]}) > 0.5
    assert math.isnan(difference({"logits": wrong * np.nan}))
    with pytest.raises(InferenceError, match="larger than one window"):
        golden_tensor(golden_volume((60, 60, 60)), manifest())


# -- pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plane", "right", "down"),
    [("axial", (1, 0, 0), (0, 1, 0)), ("coronal", (1, 0, 0), (0, 0, -1)), ("sagittal", (0, 1, 0), (0, 0, -1))],
)  # fmt: skip
def test_key_pictures_lie_as_a_doctor_is_used_to(plane: Plane, right: Any, down: Any) -> None:
    """The mark at the left front, high up: right of the middle in an axial picture, and above it; nothing is mirrored."""
    series = read_series(made_up.sources(made_up.slices(60, rows=70, columns=84, spacing=(1.5, 1.25), apart=1.5)), manifest().volume_input)
    prepared = prepare(series, manifest().volume_input)
    found = segment(prepared, series.grid, manifest(), by_brightness)
    only_mark = np.where(found.voxel_classes == 1, found.voxel_classes, 0).astype(np.uint8)
    picture = Image.open(io.BytesIO(draw_key_images(prepared.values, only_mark, prepared.grid)[plane]))
    assert max(picture.size) == 480 and picture.mode == "RGB"
    colour = [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    y, x = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    assert len(x) > 20
    mark = np.array([18, -14, 10])
    millimetres = 480 / max(np.array(prepared.grid.shape) * prepared.grid.spacing)
    assert (x.mean() - picture.width / 2) * float(mark @ right) > 0 and (y.mean() - picture.height / 2) * float(mark @ down) > 0
    assert np.ptp(x) == pytest.approx(16 * millimetres, rel=0.5)


def test_pictures_of_an_empty_mask_show_the_middle() -> None:
    values = np.random.default_rng(4).normal(size=(6, 7, 8)).astype(np.float32)
    pictures = draw_key_images(values, np.zeros(values.shape, np.uint8), Grid((6, 7, 8), np.eye(4)))
    assert set(pictures) == {"axial", "coronal", "sagittal"}
