"""Body and background: what is dark and reaches the edge is background, lung fields never are."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from appliance.imaging.body_mask import body_mask, resample, shrink
from quantize.reference.anatomy import Grid, body_depth, lung_depth
from quantize.reference.phantom import Opacity, Phantom, display


def enlarged(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("rows", "cols"), [(512, 512), (640, 480), (420, 560), (1280, 1088)])
def test_a_phantom_keeps_its_lungs_and_loses_the_air_beside_it(rows: int, cols: int, seed: int) -> None:
    picture = display(Phantom(rows, cols, seed=seed, opacity=Opacity() if seed % 2 else None))
    body = enlarged(body_mask(picture), picture.shape)
    grid = Grid.of(rows, cols)
    assert body[lung_depth(grid) > 0.05].all()
    air = body_depth(grid) <= 0
    assert not air.any() or body[air].mean() < 0.15


def test_letters_in_the_background_are_no_body() -> None:
    """The phantom's R and PHANTOM are bright, in the upper left corner."""
    body = body_mask(display(Phantom(512, 512, seed=1)))
    height, width = body.shape
    assert not body[: height // 12, : width // 8].any()


def test_lung_fields_of_real_pictures_are_kept(shared: Path) -> None:
    """Of 90 pictures with a lung mask (made by a model; a sixth of them doubtful) at most two lose more than a hundredth."""
    folder = shared / "data" / "tasks" / "lungs"
    with (folder / "lungs.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    lost = []
    for row in rows:
        picture = np.asarray(Image.open(folder / row["file"]).convert("L"))
        lungs = np.asarray(Image.open(folder / row["mask"])) > 127
        lost.append(float((lungs & ~enlarged(body_mask(picture), picture.shape)).sum() / lungs.sum()))
    assert len(lost) >= 90
    assert sum(share > 0.01 for share in lost) <= 2
    assert max(lost) < 0.15


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_picture_of_one_value_is_all_body(value: int) -> None:
    assert body_mask(np.full((300, 200), value, np.uint8)).all()


def test_a_body_that_would_be_tiny_is_not_trusted() -> None:
    picture = np.zeros((400, 400), np.uint8)
    picture[180:220, 180:220] = 255
    assert body_mask(picture).all()


@given(rows=st.integers(1, 700), columns=st.integers(1, 700), seed=st.integers(0, 2**32 - 1), grain=st.sampled_from([1, 9, 60]))
def test_a_mask_always_covers_the_image_with_a_body_in_one_piece(rows: int, columns: int, seed: int, grain: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-rows // grain), -(-columns // grain)), dtype=np.uint8)
    body = body_mask(np.kron(coarse, np.ones((grain, grain), np.uint8))[:rows, :columns])
    assert body.dtype == np.bool_
    assert max(body.shape) <= 128
    assert body.mean() >= 0.2


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_resampling_never_adds_body(rows: int, columns: int, height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.8
    sampled = resample(mask, height, width)
    assert sampled.shape == (height, width)
    for row, column in zip(*np.nonzero(sampled), strict=True):
        top, bottom = row * rows // height, -(-(row + 1) * rows // height)
        left, right = column * columns // width, -(-(column + 1) * columns // width)
        assert mask[top:bottom, left:right].all()
    assert resample(np.ones((rows, columns), np.bool_), height, width).all()


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_shrunken_mask_keeps_its_distance(rows: int, columns: int, steps: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.95
    small = shrink(mask, steps)
    outside: list[Any] = list(zip(*np.nonzero(~mask), strict=True))
    for row, column in zip(*np.nonzero(small), strict=True):
        assert all(abs(row - r) + abs(column - c) > steps for r, c in outside)
    assert shrink(np.ones((rows, columns), np.bool_), steps).all()
