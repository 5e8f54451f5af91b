"""A frame as the viewer gets it."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from appliance.core.errors import PixelError
from appliance.imaging.display_frame import display_frame
from appliance.imaging.greyscale import Window
from tests.support.scans import dataset


def test_grey_frame_keeps_its_stored_values() -> None:
    ds = dataset(
        PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=-5, WindowCenter=[9, 8], WindowWidth=[7, 6],
        PixelSpacing=[0.2, 0.1],
    )  # fmt: skip
    frame = display_frame(ds)
    assert frame.pixels.dtype == np.uint16
    assert frame.pixels.tobytes() == ds.PixelData
    assert (frame.photometric, frame.slope, frame.intercept, frame.bits_stored, frame.signed) == ("MONOCHROME1", 2, -5, 12, False)
    assert frame.windows == (Window(9, 7), Window(8, 6))
    assert frame.spacing == (0.2, 0.1)
    assert (frame.minimum, frame.maximum) == (frame.pixels.min(), frame.pixels.max())


def test_frame_without_a_window_gets_one() -> None:
    frame = display_frame(dataset(PixelSpacing=[0, 0]))
    low, high = np.percentile(frame.pixels, (1, 99))
    assert frame.windows == (Window((low + high) / 2, high - low, "LINEAR_EXACT"),)
    assert frame.spacing is None
    bits = dataset(BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=b"\xaa" * (64 * 48 // 8))
    assert display_frame(bits).windows == (Window(0.5, 1.0, "LINEAR_EXACT"),)


def lut(keyword: str) -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 16], (np.arange(4096) * 2 + 1).tolist()
    return dataset(**{keyword: Sequence([item])})


def test_luts() -> None:
    stored = display_frame(dataset()).pixels
    voi = display_frame(lut("VOILUTSequence"))
    assert voi.windows == (Window(65535 / 2, 65535, "LINEAR_EXACT"),)
    assert np.array_equal(voi.pixels, np.rint(65535 * (stored * 2.0 + 1) / 8191))
    modality = display_frame(lut("ModalityLUTSequence"))
    assert np.array_equal(modality.pixels, stored * 2.0 + 1)
    assert modality.pixels.dtype == np.float32
    assert (modality.slope, modality.intercept) == (1, 0)


def test_colour_and_palette_are_rgb() -> None:
    rgb = np.random.default_rng(0).integers(0, 4096, (64, 48, 3)).astype("<u2")
    ds = dataset(SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB", PixelData=rgb.tobytes())
    frame = display_frame(ds)
    assert (frame.photometric, frame.windows, frame.bits_stored) == ("RGB", (), 8)
    assert np.array_equal(frame.pixels, rgb >> 4)
    index = np.arange(64 * 48, dtype=np.uint8).reshape(64, 48)
    palette = dataset(BitsAllocated=8, BitsStored=8, HighBit=7, PhotometricInterpretation="PALETTE COLOR", PixelData=index.tobytes())
    with pytest.raises(PixelError):
        display_frame(palette)
    for name in ("Red", "Green", "Blue"):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(palette, f"{name}PaletteColorLookupTableData", struct.pack("<256H", *(np.arange(256) * 257).tolist()))
    assert np.array_equal(display_frame(palette).pixels, np.repeat(index[:, :, None], 3, axis=2))


def test_floats_that_are_no_numbers() -> None:
    values = np.full((64, 48), np.nan, np.float32)
    header = {"PixelData": None, "BitsAllocated": 32, "BitsStored": None, "HighBit": None, "PixelRepresentation": None}
    frame = display_frame(dataset(FloatPixelData=values.tobytes(), **header))
    assert (frame.minimum, frame.maximum) == (0, 0)
    values[0, :2] = [-1, 3]
    frame = display_frame(dataset(FloatPixelData=values.tobytes(), **header))
    assert (frame.minimum, frame.maximum) == (-1, 3)


def test_every_real_scan_can_be_shown(shared: Path) -> None:
    for path in sorted((shared / "data" / "dicom").glob("*.dcm")):
        if path.name.startswith("bad_"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frame = display_frame(pydicom.dcmread(path))
        assert frame.pixels.dtype.name in ("uint8", "int8", "uint16", "int16", "float32"), path.name
        assert frame.maximum > frame.minimum or path.name.startswith("SM_file"), path.name
        assert bool(frame.windows) == (frame.photometric != "RGB"), path.name
