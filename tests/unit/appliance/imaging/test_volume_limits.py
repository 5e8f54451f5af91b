"""Before a model is asked about a volume: whether its answer fits into memory, and whether tissue was cut off."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from appliance.core.domain import Note
from appliance.core.errors import VolumeError
from appliance.imaging.volumes.geometry import Grid
from appliance.imaging.volumes.limits import check_memory, cropped_tissue_note, needed_bytes
from appliance.imaging.volumes.volume import Series, prepare
from model_sync.bundle import Manifest
from tests.support import volume_bundle

FILES = {"model_fp32.onnx": b"", "golden/a.npz": b"", "MODEL_CARD.md": b"", "gate.json": b""}
CAP = 1400 * 2**20


def manifest(classes: int = 3, side: int = 64, cut: int | None = None) -> Manifest:
    labels = [volume_bundle.label(f"l{number}", "标", "L", str(1000000 + number)) for number in range(classes - 1)]
    steps = volume_bundle.volume_input(cut or side, scale=[{"step": "clip", "low": -5000.0, "high": 5000.0}])
    if cut is not None:
        steps["pipeline"][-1] = {"step": "crop_pad", "depth": cut, "height": cut, "width": cut, "fill": 0.0, "align": "center"}
    return Manifest.parse(json.dumps(volume_bundle.manifest_of(FILES, labels=labels, input=steps)).encode())


@pytest.mark.parametrize(
    ("shape", "classes", "fits"),
    [
        ((256, 256, 256), 3, True),
        ((288, 288, 288), 3, True),
        ((160, 256, 240), 3, True),
        ((160, 256, 240), 50, False),
        ((256, 256, 256), 14, False),
        ((64, 64, 64), 256, True),
    ],
)
def test_a_volume_with_more_classes_than_memory_holds_is_refused(shape: tuple[int, int, int], classes: int, fits: bool) -> None:
    if fits:
        check_memory(shape, manifest(classes), 1, CAP)
        return
    with pytest.raises(VolumeError) as caught:
        check_memory(shape, manifest(classes), 1, CAP)
    assert caught.value.code == "volume.too_large" and f"{classes} classes" in caught.value.detail


def test_memory_needed_grows_with_voxels_classes_and_batch() -> None:
    least = needed_bytes((96, 96, 96), manifest(3), 1)
    assert least >= 96**3 * 4 * 5
    assert all(more > least for more in (needed_bytes((97, 96, 96), manifest(3), 1), needed_bytes((96, 96, 96), manifest(4), 1)))
    assert needed_bytes((96, 96, 96), manifest(3), 4) - least == 3 * 64**3 * 4 * 4
    assert needed_bytes((8, 8, 8), manifest(3, side=64), 1) == needed_bytes((64, 64, 64), manifest(3, side=64), 1)
    assert needed_bytes((32, 32, 32), manifest(3, cut=32), 1) == 32**3 * (5 + 16)


def scanned(values: np.ndarray[Any, Any], slope: float = 1.0) -> Series:
    grid = Grid((40, 40, 40), np.array([[0, 0, 1.0, -20], [0, 1.0, 0, -20], [1.0, 0, 0, -20], [0, 0, 0, 1]]))
    return Series(values, slope, 0.0, grid, ())


def body(high: float = 1000.0) -> np.ndarray[Any, Any]:
    """A cube of 20 mm in the middle, noise around it."""
    values = np.random.default_rng(5).integers(0, 40, (40, 40, 40)).astype(np.int16)
    values[10:30, 10:30, 10:30] = high
    return values


@pytest.mark.parametrize("slope", [1.0, -1.0])
@pytest.mark.parametrize(("cut", "note"), [(48, None), (40, None), (24, None), (10, Note("caution.cropped", "7.0 ml"))])
def test_only_tissue_that_was_cut_off_is_said(cut: int, note: Note | None, slope: float) -> None:
    """8 ml of tissue: a field of 10 mm takes one of them, one of 24 mm cuts nothing but noise."""
    series = scanned((body() * slope).astype(np.int16), slope)
    model = manifest(cut=cut)
    assert cropped_tissue_note(series, prepare(series, model.volume_input), model.volume_input) == note


def test_a_pipeline_that_cuts_nothing_off_has_nothing_to_say() -> None:
    series, model = scanned(body()), manifest(side=8)
    assert cropped_tissue_note(series, prepare(series, model.volume_input), model.volume_input) is None
