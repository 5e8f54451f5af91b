"""From stored values to the tensor: every step of the greyscale pipeline, and the geometry both ways."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRBigEndian

from appliance.core.domain import Note
from appliance.core.errors import InferenceError, PixelError
from appliance.imaging.dicom_files import accept_invalid_values
from appliance.imaging.greyscale import Window, grey_header, numbers, pixel_aspect, pixel_spacing
from appliance.imaging.pixels import decode_frame
from appliance.imaging.preprocessing import PreparedInput, check_quality, from_display, to_tensor
from model_sync.bundle import (
    InputSpec,
    Letterbox,
    ModalityLut,
    Monochrome2,
    Normalise,
    Resize,
    Scale,
    Step,
    ToUint8,
    Voi,
)
from tests.support.scans import dataset, to_image

DISPLAY: list[Step] = [
    ModalityLut(step="modality_lut"),
    Voi(step="voi", default="minmax"),
    Monochrome2(step="monochrome2"),
    ToUint8(step="to_uint8"),
]
LETTERBOX = Letterbox(step="letterbox", fill=0, align="center")
RESIZE = Resize(step="resize", height=224, width=224, filter="antialias_bilinear")
SCALE = Scale(step="scale", divide_by=255.0)


def make_spec(*steps: Step, channels: int = 1, display: list[Step] = DISPLAY) -> InputSpec:
    return InputSpec.model_validate(
        {
            "name": "image", "layout": "NCHW", "dtype": "float32", "channels": channels, "height": 224, "width": 224,
            "pipeline": [*display, *(steps or (LETTERBOX, RESIZE, SCALE))],
        }
    )  # fmt: skip


SPEC = make_spec()
PERCENTILE = make_spec(display=[DISPLAY[0], Voi(step="voi", default="percentile"), *DISPLAY[2:]])
# 64 x 48: every value from 0 to 3071 once, then on to 4095 in the last rows
RAMP = np.arange(64 * 48, dtype=np.int64).reshape(64, 48)


def shown(values: np.ndarray[Any, Any] = RAMP, spec: InputSpec = SPEC, **changes: Any) -> np.ndarray[Any, Any]:
    """The display picture of a data set with these stored values."""
    signed = changes.get("PixelRepresentation") == 1
    item = changes.get("BitsAllocated", 16) // 8
    data = values.astype(f"<{'i' if signed else 'u'}{item}").tobytes()
    defaults = {"Rows": values.shape[0], "Columns": values.shape[1], "BitsStored": 16, "HighBit": 15, "PixelData": data}
    return to_tensor(dataset(**(defaults | changes)), spec).display


def expected(unit: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.rint(255 * np.clip(unit, 0, 1)).astype(np.uint8)


def test_linear_window() -> None:
    picture = shown(WindowCenter=1000, WindowWidth=501)
    assert np.array_equal(picture, expected((RAMP - 999.5) / 500 + 0.5))


def test_first_of_several_windows() -> None:
    assert np.array_equal(shown(WindowCenter=[1000, 5], WindowWidth=[501, 7]), shown(WindowCenter=1000, WindowWidth=501))


def test_linear_exact_and_sigmoid() -> None:
    exact = shown(WindowCenter=1000, WindowWidth=500, VOILUTFunction="LINEAR_EXACT")
    assert np.array_equal(exact, expected((RAMP - 1000) / 500 + 0.5))
    sigmoid = shown(WindowCenter=1000, WindowWidth=500, VOILUTFunction="SIGMOID")
    assert np.array_equal(sigmoid, expected(1 / (1 + np.exp(-4 * (RAMP - 1000) / 500))))


def test_window_of_width_one_is_a_step() -> None:
    assert np.array_equal(shown(WindowCenter=1000, WindowWidth=1), expected(RAMP > 999.5))


@pytest.mark.parametrize(("center", "width"), [(100, 0), ("nan", 10), (100, None), (None, 10), ("", "")])
def test_senseless_window_counts_as_none_and_is_noted(center: Any, width: Any) -> None:
    ds = dataset(WindowCenter=None if center == "nan" else center, WindowWidth=width)
    if center == "nan":
        ds.WindowCenter = float("nan")
    header = grey_header(ds)
    assert header.windows == ()
    assert [note.code for note in header.notes] == ([] if center == "" else ["caution.window"])


@pytest.mark.parametrize(("photometric", "is_inverse"), [("MONOCHROME2", True), ("MONOCHROME1", False)])
def test_a_negative_width_inverts(photometric: str, is_inverse: bool) -> None:
    header = grey_header(dataset(WindowCenter=100, WindowWidth=-5, PhotometricInterpretation=photometric))
    assert (header.windows, header.inverse) == ((Window(100, 5),), is_inverse)
    assert header.notes == (Note("caution.window", "100/-5"),)


@pytest.mark.parametrize("center", [-30000, 60000])
def test_a_window_beside_all_values_is_replaced_and_noted(center: int) -> None:
    prepared = to_tensor(dataset(WindowCenter=center, WindowWidth=100), SPEC)
    assert np.array_equal(prepared.display, to_tensor(dataset(), SPEC).display)
    assert [note.code for note in prepared.notes] == ["caution.window"]


def test_of_several_windows_the_first_usable_one_counts() -> None:
    prepared = to_tensor(dataset(WindowCenter=[60000, 1000], WindowWidth=[10, 500]), SPEC)
    assert np.array_equal(prepared.display, to_tensor(dataset(WindowCenter=1000, WindowWidth=500), SPEC).display)


@pytest.mark.parametrize("keyword", ["WindowCenter", "PixelSpacing", "ImagerPixelSpacing"])
def test_a_decimal_comma_is_read_and_noted(keyword: str) -> None:
    values = {"WindowCenter": "1000,5", "PixelSpacing": ["0,2", "0,1"], "ImagerPixelSpacing": ["0,2", "0,1"]}[keyword]
    extra = {"WindowWidth": 500} if keyword == "WindowCenter" else {}
    accept_invalid_values()
    ds = dataset(**extra)
    raw = "\\".join([values] if isinstance(values, str) else values).encode()
    ds[keyword] = RawDataElement(Tag(keyword), "DS", len(raw), raw, 0, False, True)
    prepared = to_tensor(ds, SPEC)
    assert prepared.notes == (Note("caution.decimal_comma", keyword),)
    assert numbers(ds.get(keyword)) == ([1000.5] if keyword == "WindowCenter" else [0.2, 0.1])


@pytest.mark.parametrize(("missing", "is_refused"), [(1, False), (40, False), (100, True), (2048, True)])
def test_a_lut_that_is_a_little_short_is_completed(missing: int, is_refused: bool) -> None:
    entries = np.arange(4096, dtype="<u2")
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 12], entries[: 4096 - missing].tobytes()
    ds = dataset(VOILUTSequence=[item])
    if is_refused:
        with pytest.raises(PixelError):
            to_tensor(ds, SPEC)
        return
    prepared = to_tensor(ds, SPEC)
    item.LUTData = np.minimum(entries, 4095 - missing).tobytes()
    assert np.array_equal(prepared.display, to_tensor(ds, SPEC).display)
    assert [note.code for note in prepared.notes] == ["caution.lut_short"]


def test_lut_entries_of_8_bits_in_words_or_packed() -> None:
    entries = np.repeat(np.arange(256), 16)
    pictures = []
    for kind in ("<u2", "u1"):
        item = Dataset()
        item.LUTDescriptor, item.LUTData = [4096, 0, 8], entries.astype(kind).tobytes()
        pictures.append(to_tensor(dataset(VOILUTSequence=[item]), SPEC).display)
    assert np.array_equal(*pictures)


def test_rescale_before_the_window() -> None:
    picture = shown(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=501)
    assert np.array_equal(picture, expected((RAMP * 2 - 1000 - 999.5) / 500 + 0.5))


@pytest.mark.parametrize(("slope", "intercept"), [(0, 0), ("1e999", 0)])
def test_senseless_rescale_is_an_error(slope: Any, intercept: Any) -> None:
    ds = dataset(RescaleIntercept=intercept)
    ds.RescaleSlope = float(slope)
    with pytest.raises(PixelError) as caught:
        to_tensor(ds, SPEC)
    assert caught.value.code == "ingest.pixel_attributes"


def test_signed_values() -> None:
    picture = shown(RAMP - 1000, PixelRepresentation=1, WindowCenter=0, WindowWidth=501)
    assert np.array_equal(picture, expected((RAMP - 1000 + 0.5) / 500 + 0.5))


def test_without_window_the_whole_range_is_shown() -> None:
    assert np.array_equal(shown(RAMP + 500), expected(RAMP / RAMP.max()))
    assert np.array_equal(shown(RAMP + 500, RescaleSlope=-1, RescaleIntercept=0), expected(1 - RAMP / RAMP.max()))


def test_percentile_default_leaves_outliers_out() -> None:
    values = RAMP.copy()
    values[0, 0] = 60_000
    low, high = np.percentile(values, (1, 99))
    assert np.array_equal(shown(values, PERCENTILE), expected((values - low) / (high - low)))


def test_eight_bits_without_window_are_shown_as_they_are() -> None:
    values = (RAMP % 200 + 20).astype(np.uint8)
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    assert np.array_equal(shown(values, **eight), values)
    assert np.array_equal(shown(values, PERCENTILE, **eight), values)
    assert np.array_equal(shown(values // 2, BitsAllocated=8, BitsStored=7, HighBit=6), expected(values // 2 / 127))


@pytest.mark.parametrize("shape", [None, "INVERSE", "IDENTITY"])
def test_monochrome1_is_inverted_exactly_once(shape: str | None) -> None:
    plain = shown(WindowCenter=1000, WindowWidth=501)
    inverted = shown(WindowCenter=1000, WindowWidth=501, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape=shape)
    assert np.array_equal(inverted, 255 - plain)


def test_inverse_presentation_lut() -> None:
    plain = shown(WindowCenter=1000, WindowWidth=501)
    assert np.array_equal(shown(WindowCenter=1000, WindowWidth=501, PresentationLUTShape="IDENTITY"), plain)
    assert np.array_equal(shown(WindowCenter=1000, WindowWidth=501, PresentationLUTShape="INVERSE"), 255 - plain)


def test_padding_is_black_and_does_not_count() -> None:
    values = RAMP + 500
    values[:5] = 63_536
    clean = shown(values[5:])
    picture = shown(values, PixelPaddingValue=63_536)
    assert not picture[:5].any()
    assert np.array_equal(picture[5:], clean)
    inverted = shown(values, PixelPaddingValue=63_536, PhotometricInterpretation="MONOCHROME1")
    assert not inverted[:5].any()
    ranged = shown(values, PixelPaddingValue=60_000, PixelPaddingRangeLimit=65_000)
    assert np.array_equal(ranged, picture)


def test_signed_padding_written_unsigned() -> None:
    values = RAMP.copy()
    values[:5] = -2000
    ds = dataset(PixelRepresentation=1, BitsStored=16, HighBit=15, PixelData=values.astype("<i2").tobytes())
    ds.add_new("PixelPaddingValue", "US", 63_536)
    assert not to_tensor(ds, SPEC).display[:5].any()


def test_nothing_but_padding_is_black() -> None:
    picture = shown(np.full((64, 48), 7), PixelPaddingValue=7)
    assert not picture.any()
    assert check_quality(np.zeros((200, 200), np.uint8)).code == "quality.blank"


def lut_item(count: int, first: int, bits: int, data: Any, vr: str = "US") -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [count, first, bits]
    item.add_new("LUTData", vr, data)
    return item


@pytest.mark.parametrize("form", ["US", "OW", "big endian", "bytes"])
def test_voi_lut_goes_before_the_window(form: str) -> None:
    entries = (np.arange(256)[::-1] ** 2 // 255).tolist()
    changes: dict[str, Any] = {}
    if form == "US":
        item = lut_item(256, 1000, 12, entries)
    elif form == "bytes":
        item = lut_item(256, 1000, 8, bytes(entries), "OW")
    else:
        order = ">" if form == "big endian" else "<"
        item = lut_item(256, 1000, 8, struct.pack(f"{order}256H", *entries), "OW")
        if form == "big endian":
            changes = {"transfer_syntax_uid": ExplicitVRBigEndian, "PixelData": RAMP.astype(">u2").tobytes()}
    ds = dataset(
        BitsStored=16, HighBit=15, WindowCenter=5, WindowWidth=5, VOILUTSequence=Sequence([item]),
        **({"PixelData": RAMP.astype("<u2").tobytes()} | changes),
    )  # fmt: skip
    ds["PixelData"].VR = "OW"
    index = np.clip(RAMP - 1000, 0, 255)
    assert np.array_equal(to_tensor(ds, SPEC).display, expected(np.array(entries)[index] / 255))


def test_voi_lut_with_65536_entries_and_negative_first_value() -> None:
    item = lut_item(0, 65_536 - 100, 16, list(range(65_536)))
    header = grey_header(dataset(PixelRepresentation=1, VOILUTSequence=Sequence([item])))
    assert header.voi_lut is not None
    assert header.voi_lut.apply(np.array([-100.0, 0.0, 70_000.0, np.nan])).tolist() == [0, 100, 65_535, 100]


def test_modality_lut_replaces_the_rescale() -> None:
    item = lut_item(4096, 0, 16, (np.arange(4096) * 3 + 7).tolist())
    changes: dict[str, Any] = {"ModalityLUTSequence": Sequence([item]), "RescaleSlope": 9}
    picture = shown(WindowCenter=3000, WindowWidth=501, **changes)
    assert np.array_equal(picture, expected((RAMP * 3 + 7 - 2999.5) / 500 + 0.5))
    assert np.array_equal(shown(**changes), expected(RAMP / RAMP.max()))


@pytest.mark.parametrize("item", [Dataset(), lut_item(10, 0, 16, [1, 2]), lut_item(2, 0, 16, b"\0", "OW")])
def test_unreadable_lut_is_an_error(item: Dataset) -> None:
    with pytest.raises(PixelError):
        to_tensor(dataset(VOILUTSequence=Sequence([item])), SPEC)


def test_values_of_32_bits_and_floats() -> None:
    whole = shown(RAMP * 100_000, BitsAllocated=32, BitsStored=32, HighBit=31)
    assert np.array_equal(whole, expected(RAMP / RAMP.max()))
    values = (RAMP / RAMP.max()).astype(np.float32)
    values[0, :3] = [np.nan, np.inf, -np.inf]
    ds = dataset(PixelData=None, FloatPixelData=values.tobytes(), BitsAllocated=32, BitsStored=None, HighBit=None, PixelRepresentation=None)
    picture = to_tensor(ds, SPEC).display
    assert picture[0, :3].tolist() == [0, 0, 0]
    assert np.array_equal(picture[1:], expected((values[1:] - values[0, 3]) / (1 - values[0, 3])))


def test_enhanced_images_keep_their_windows_per_frame() -> None:
    def voi(center: float) -> Dataset:
        inner, group = Dataset(), Dataset()
        inner.WindowCenter, inner.WindowWidth = center, 100
        group.FrameVOILUTSequence = Sequence([inner])
        return group

    rescale, spacing, shared = Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, spacing.PixelSpacing = 2, 5, [0.5, 0.5]
    shared.PixelValueTransformationSequence, shared.PixelMeasuresSequence = Sequence([rescale]), Sequence([spacing])
    ds = dataset(
        NumberOfFrames=2, PerFrameFunctionalGroupsSequence=Sequence([voi(10), voi(20)]), SharedFunctionalGroupsSequence=Sequence([shared]),
    )  # fmt: skip
    header = grey_header(ds, 1)
    assert header.windows == (Window(20, 100),)
    assert (header.slope, header.intercept) == (2, 5)
    assert pixel_spacing(ds, 1) == (0.5, 0.5)


def test_colour_becomes_luminance() -> None:
    rgb = np.zeros((120, 110, 3), np.uint8)
    rgb[..., 0], rgb[..., 1], rgb[..., 2] = 200, 100, 50
    colour: dict[str, Any] = {
        "SamplesPerPixel": 3,
        "PlanarConfiguration": 0,
        "PhotometricInterpretation": "RGB",
        "Rows": 120,
        "Columns": 110,
    }
    eight = dataset(BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=rgb.tobytes(), **colour)
    luminance = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert np.all(to_tensor(eight, SPEC).display == luminance)
    sixteen = dataset(BitsStored=12, PixelData=(rgb.astype("<u2") << 4).tobytes(), **colour)
    assert np.all(to_tensor(sixteen, SPEC).display == luminance)


def test_palette_becomes_luminance() -> None:
    ds = dataset(BitsAllocated=8, BitsStored=8, HighBit=7, PhotometricInterpretation="PALETTE COLOR", PixelData=bytes(64 * 48))
    with pytest.raises(PixelError) as caught:
        to_tensor(ds, SPEC)
    assert caught.value.code == "ingest.pixel_attributes"
    for name, value in (("Red", 200), ("Green", 100), ("Blue", 50)):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{name}PaletteColorLookupTableData", struct.pack("<256H", *[value << 8] * 256))
    assert np.all(to_tensor(ds, SPEC).display == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50))


# --- geometry ---------------------------------------------------------------------------------------------------------------


def plain(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The model card's preprocessing, word by word."""
    height, width = picture.shape
    side = max(height, width)
    square = Image.new("L", (side, side), 0)
    square.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((224, 224), Image.Resampling.BILINEAR), np.float32)[None, None] / np.float32(255)


@pytest.mark.parametrize("size", [(500, 2000), (2000, 500), (224, 224), (301, 299), (100, 1000), (7, 5)])
def test_same_numbers_as_the_plain_way(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    prepared = from_display(picture, SPEC)
    assert prepared.tensor.dtype == np.float32
    assert np.array_equal(prepared.tensor, plain(picture))
    assert prepared.tensor.flags.c_contiguous


def test_same_scores_as_the_plain_way_on_real_pictures(shared: Path) -> None:
    """Through the DICOM header and through the golden cases' entrance: the very numbers of the card's preprocessing."""
    for path in sorted((shared / "data" / "cxr").glob("*.png")):
        picture = np.asarray(Image.open(path).convert("L"))
        rows, columns = picture.shape
        eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": picture.tobytes() + b"\0" * (picture.size % 2)}
        scan = dataset(Rows=rows, Columns=columns, **eight)
        assert np.array_equal(to_tensor(scan, PERCENTILE).tensor, plain(picture)), path.name
        assert np.array_equal(from_display(picture, PERCENTILE).tensor, plain(picture)), path.name


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.floats(0.25, 4), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_geometry_there_and_back(rows: int, columns: int, aspect: float, across: float, down: float) -> None:
    rows, columns = 1 + rows % 300, 1 + columns % 300
    prepared = prepared_blank(rows, columns, aspect)
    geometry = prepared.geometry
    x, y = across * columns, down * rows
    there = geometry.to_input(x, y)
    assert to_image(geometry, *there) == pytest.approx((x, y), abs=1e-6)
    assert -1e-6 <= there[0] <= geometry.input_w + 1e-6
    assert -1e-6 <= there[1] <= geometry.input_h + 1e-6


def prepared_blank(rows: int, columns: int, aspect: float = 1.0) -> PreparedInput:
    values = np.full((rows, columns), 200, np.uint8)
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelSpacing": [aspect, 1.0]}
    return to_tensor(dataset(Rows=rows, Columns=columns, PixelData=values.tobytes(), **eight), SPEC, pixels=values)


@pytest.mark.parametrize("size", [(500, 2000), (2000, 500), (300, 300), (301, 200)])
def test_a_dot_lands_where_the_geometry_says(size: tuple[int, int]) -> None:
    rows, columns = size
    picture = np.zeros(size, np.uint8)
    y, x = rows // 3, columns // 4
    picture[y - 10 : y + 10, x - 10 : x + 10] = 255
    prepared = from_display(picture, SPEC)
    weights = prepared.tensor[0, 0]
    at_y, at_x = (np.sum(weights * grid) / weights.sum() for grid in np.mgrid[0.5:224.5, 0.5:224.5])
    assert to_image(prepared.geometry, float(at_x), float(at_y)) == pytest.approx((x, y), abs=0.1)


@pytest.mark.parametrize(
    ("attributes", "aspect"),
    [
        ({"PixelSpacing": [0.2, 0.1]}, 2.0),
        ({"ImagerPixelSpacing": [0.1, 0.2]}, 0.5),
        ({"NominalScannedPixelSpacing": [0.3, 0.1]}, 3.0),
        ({"PixelAspectRatio": [4, 3]}, 4 / 3),
        ({"PixelSpacing": [0, 0], "PixelAspectRatio": [2, 1]}, 2.0),
        ({"PixelSpacing": [0, 0]}, 1.0),
        ({"PixelSpacing": [-1, 2]}, 1.0),
        ({"PixelSpacing": [0.1]}, 1.0),
        ({"PixelSpacing": [0.1, 20.0]}, 1.0),
        ({"PixelAspectRatio": [1, 0]}, 1.0),
        ({}, 1.0),
    ],
)
def test_pixel_aspect(attributes: dict[str, Any], aspect: float) -> None:
    assert pixel_aspect(dataset(**attributes)) == pytest.approx(aspect)


def test_spacing_that_is_no_number() -> None:
    ds = dataset()
    ds.add_new("PixelSpacing", "LO", ["wide", "high"])
    assert pixel_spacing(ds) is None


def test_pixels_that_are_not_square_keep_the_shape_of_the_chest() -> None:
    """300 x 200 pixels twice as high as wide are a picture of 600 x 200."""
    geometry = prepared_blank(300, 200, 2.0).geometry
    assert geometry.scale_y == pytest.approx(2 * geometry.scale_x, rel=1e-3)
    left, top = geometry.to_input(0, 0)
    right, bottom = geometry.to_input(200, 300)
    assert (top, bottom) == pytest.approx((0, 224))
    assert (right - left, left + right) == pytest.approx((224 / 3, 224), abs=0.5)
    nearly = prepared_blank(300, 200, 1.005).geometry
    assert nearly.scale_x == nearly.scale_y


def test_spacing_of_zero_is_no_spacing(shared: Path) -> None:
    ds = pydicom.dcmread(shared / "data" / "dicom" / "CR_RG1_J2KI.dcm")
    assert pixel_spacing(ds) is None
    assert pixel_aspect(ds) == 1.0


# --- the manifest's steps ---------------------------------------------------------------------------------------------------


def test_channels_and_normalisation() -> None:
    normalise = Normalise(step="normalise", mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])
    prepared = from_display(np.full((300, 300), 255, np.uint8), make_spec(LETTERBOX, RESIZE, SCALE, normalise, channels=3))
    assert prepared.tensor.shape == (1, 3, 224, 224)
    assert prepared.tensor[0, :, 100, 100] == pytest.approx([1.8, 0.8, 0.35])
    grey = from_display(np.full((300, 300), 255, np.uint8), make_spec(LETTERBOX, RESIZE, SCALE, channels=3))
    assert np.all(grey.tensor == 1.0)


def test_fill_and_filters() -> None:
    bright = Letterbox(step="letterbox", fill=255, align="center")
    picture = np.zeros((100, 300), np.uint8)
    assert from_display(picture, make_spec(bright, RESIZE, SCALE)).tensor[0, 0, 0, 0] == 1.0
    results = []
    for name in ("antialias_bilinear", "antialias_bicubic", "area"):
        resize = Resize.model_validate({"step": "resize", "height": 224, "width": 224, "filter": name})
        results.append(from_display(np.random.default_rng(0).integers(0, 256, (500, 500), dtype=np.uint8), make_spec(resize, SCALE)).tensor)
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_steps_are_recorded() -> None:
    steps = to_tensor(dataset(PhotometricInterpretation="MONOCHROME1", WindowCenter=9, WindowWidth=7, PixelSpacing=[2, 1]), SPEC).steps
    assert steps[:3] == ("rescale 1 0", "window 9/7 LINEAR", "inverted")
    assert "2 times as high as wide" in steps[3]
    assert steps[4:] == ("resize 224x224 antialias_bilinear", "scale")


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(display=DISPLAY[1:]),
        make_spec(display=DISPLAY[::-1]),
        make_spec(RESIZE, ToUint8(step="to_uint8")),
        make_spec(Normalise(step="normalise", mean=[0.5], std=[0.5]), RESIZE),
        make_spec(Normalise(step="normalise", mean=[0.5], std=[0.5]), LETTERBOX, RESIZE),
    ],
)
def test_pipeline_that_would_be_read_wrongly_is_refused(spec: InputSpec) -> None:
    with pytest.raises(InferenceError):
        from_display(np.zeros((100, 100), np.uint8), spec)


# --- the input gate ---------------------------------------------------------------------------------------------------------


def test_real_pictures_pass_the_gate(shared: Path) -> None:
    for path in sorted((shared / "data" / "cxr").glob("*.png")):
        assert check_quality(np.asarray(Image.open(path).convert("L"))).ok, path.name
    scans = sorted((shared / "data" / "dicom").glob("CR_*.dcm"))
    assert len(scans) == 3
    for path in scans:
        ds = pydicom.dcmread(path)
        verdict = check_quality(to_tensor(ds, PERCENTILE, pixels=decode_frame(ds)).display)
        assert verdict.ok, (path.name, verdict)


def noise(size: int) -> np.ndarray[Any, Any]:
    return np.clip(np.random.default_rng(0).normal(128, 40, (size, size)), 0, 255).astype(np.uint8)


def mostly(value: int, share: float = 0.97) -> np.ndarray[Any, Any]:
    picture = np.full((400, 400), value, np.uint8)
    picture[: int(400 * (1 - share))] = 128
    return picture


@pytest.mark.parametrize(
    ("picture", "code"),
    [
        (np.zeros((400, 300), np.uint8), "quality.blank"),
        (np.full((400, 300), 255, np.uint8), "quality.blank"),
        (np.full((400, 300), 77, np.uint8), "quality.blank"),
        (noise(1500), "quality.blank"),
        (noise(200), "quality.blank"),
        (np.linspace(100, 115, 400 * 400).reshape(400, 400).astype(np.uint8), "quality.blank"),
        (mostly(255), "quality.saturated"),
        (mostly(0), "quality.saturated"),
        (np.repeat([0, 255], 80_000).reshape(400, 400).astype(np.uint8), "quality.saturated"),
        (np.tile(np.arange(80, dtype=np.uint8), (500, 1)), "quality.too_small"),
        (np.zeros((1, 1), np.uint8), "quality.too_small"),
    ],
)
def test_unreadable_pictures_do_not_pass_the_gate(picture: np.ndarray[Any, Any], code: str) -> None:
    verdict = check_quality(picture)
    assert (verdict.ok, verdict.code) == (False, code)


def test_raw_noise_stretched_to_the_full_range_is_blank() -> None:
    """A detector read out without exposure: min-max stretching makes it look busy."""
    values = np.random.default_rng(1).normal(300, 4, (600, 600)).astype(np.int64)
    assert check_quality(shown(values)).code == "quality.blank"
