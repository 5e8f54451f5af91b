"""Slices make one volume only when their values mean the same and came about in the same way; what positions cannot tell, headers do."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileDataset
from pydicom.filebase import DicomBytesIO
from pydicom.sequence import Sequence as Items

from appliance.core.errors import VolumeError
from appliance.imaging.volumes.geometry import reorient
from appliance.imaging.volumes.resampling import rectangular_grid
from appliance.imaging.volumes.slice_headers import ImageCount, missing_images_note
from appliance.imaging.volumes.volume import Series, prepare, read_series
from model_sync import messages
from model_sync.bundle import VolumeSpec
from tests.support import series as made_up
from tests.support import volume_bundle

AS_THEY_ARE = [{"step": "scale", "divide_by": 1.0}]


def spec(scale: Any = AS_THEY_ARE, axes: str = "LIA") -> VolumeSpec:
    return VolumeSpec.model_validate(volume_bundle.volume_input(64, axes=axes, spacing=(2.0,) * 3, min_slices=8, apart=6.0, scale=scale))


def read(made: list[FileDataset]) -> Series:
    return read_series(made_up.sources(made), spec())


def refused(made: list[FileDataset]) -> str:
    with pytest.raises(VolumeError) as caught:
        read(made)
    assert messages.text(caught.value.code, "zh") != messages.text(caught.value.code, "en")
    assert "P-1" not in str(caught.value) and "Gadovist" not in str(caught.value)
    return caught.value.code


def each(made: list[FileDataset], **values: Any) -> list[FileDataset]:
    """Set attributes of every slice; a function is asked with the slice's number."""
    for number, one in enumerate(made):
        for keyword, value in values.items():
            setattr(one, keyword, value(number) if callable(value) else value)
    return made


def padded(made: list[FileDataset], rows: int, value: int) -> list[FileDataset]:
    """The first rows of every slice are padding."""
    for one in made:
        pixels = np.frombuffer(one.PixelData, "<u2").reshape(one.Rows, one.Columns).copy()
        pixels[:rows] = value
        one.PixelData, one.PixelPaddingValue = pixels.tobytes(), value
    return made


# -- units ---------------------------------------------------------------------------------------------------------------


def _cut(keyword: str, numbers: range = range(20), value: Any = "absent") -> Callable[[list[FileDataset]], None]:
    def change(made: list[FileDataset]) -> None:
        for number in numbers:
            if value == "absent":
                del made[number][keyword]
            else:
                setattr(made[number], keyword, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda made: [_cut(name)(made) for name in ("RescaleSlope", "RescaleIntercept")], id="no rescale"),
        pytest.param(_cut("RescaleIntercept"), id="no intercept"),
        pytest.param(_cut("RescaleSlope"), id="no slope"),
        pytest.param(_cut("RescaleIntercept", range(5, 6)), id="one slice without intercept"),
        pytest.param(_cut("RescaleIntercept", range(5, 6), ""), id="one slice with an empty intercept"),
        pytest.param(_cut("RescaleType", value="Z_EFF"), id="another unit"),
    ],
)
@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_values_that_should_have_a_unit_and_have_none_are_refused(change: Callable[[list[FileDataset]], object], modality: str) -> None:
    """A CT without its intercept would be read 1,024 HU too high."""
    made = each(made_up.ct(made_up.slices()), Modality=modality)
    change(made)
    if modality == "PT" and made[0].get("RescaleType") == "Z_EFF":
        assert read(made)
    else:
        assert refused(made) == "volume.no_units"


def test_hounsfield_units_need_their_rescale_whatever_the_modality_says() -> None:
    made = each(made_up.ct(made_up.slices()), Modality="")
    assert read(made).intercept == -1024
    _cut("RescaleIntercept")(made)
    assert refused(made) == "volume.no_units"


@pytest.mark.parametrize("unit", ["HU", "Hounsfield units", "US", ""])
def test_ct_is_read_under_the_names_that_scanners_give_its_unit(unit: str) -> None:
    assert read(each(made_up.ct(made_up.slices()), RescaleType=unit)).intercept == -1024


@pytest.mark.parametrize(
    ("plain", "changed"),
    [
        ({}, {"PresentationLUTShape": "INVERSE"}),
        ({"PhotometricInterpretation": "MONOCHROME1"}, {"BitsStored": 11, "HighBit": 10}),
        ({}, {"PixelRepresentation": 1}),
        ({}, {"RescaleIntercept": 0}),
        ({"RescaleSlope": 1, "RescaleIntercept": 0}, {"RescaleType": "HU"}),
    ],
)
def test_one_slice_whose_values_mean_something_else_is_refused(plain: dict[str, Any], changed: dict[str, Any]) -> None:
    made = each(made_up.slices(), **plain)
    assert len(read(made).values) == 20
    for keyword, value in changed.items():
        setattr(made[4], keyword, value)
    assert refused(made) == "volume.mixed_units"


def test_bits_stored_matters_only_where_values_are_turned_round() -> None:
    made = made_up.slices()
    expected = read(made).values
    made[4].BitsStored, made[4].HighBit = 11, 10
    assert np.array_equal(read(made).values, expected)


@pytest.mark.parametrize(
    "values",
    [
        {"Modality": "PT", "Units": "BQML", "RescaleSlope": 2, "RescaleIntercept": 0},
        {"Modality": "MR", "RescaleType": "10^-6 mm^2/s", "RescaleSlope": 2, "RescaleIntercept": 0},
        {"Modality": "", "RescaleType": "HU", "RescaleSlope": 1, "RescaleIntercept": -1024},
        {"Modality": "NM", "Units": "CNTS"},
        {"Modality": "MR", "RealWorldValueMappingSequence": Items([
            made_up._group(MeasurementUnitsCodeSequence={"CodeValue": "ms", "CodingSchemeDesignator": "UCUM"})])},
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", [{"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}])
def test_values_with_a_unit_are_never_turned_round(values: dict[str, Any], how: dict[str, str]) -> None:
    """PET is customarily shown black on white: its activity is no higher where it is darker."""
    assert np.array_equal(read(each(made_up.slices(), **values, **how)).values, read(made_up.slices()).values)


@pytest.mark.parametrize("unit", ["US", "SIGNAL INTENSITY (UNITLESS)", "normalized", ""])
def test_signal_without_a_unit_is_turned_round(unit: str) -> None:
    made = each(made_up.slices(PhotometricInterpretation="MONOCHROME1"), RescaleSlope=1, RescaleIntercept=0, RescaleType=unit)
    assert np.array_equal(read(made).values, 4095 - read(made_up.slices()).values)


# -- padding and what a rescale does to values ---------------------------------------------------------------------------


def test_padding_is_dark_in_monochrome1() -> None:
    made = padded(made_up.slices(PhotometricInterpretation="MONOCHROME1"), 5, 0)
    values = read(made).values
    # The phantom's air is 0 too and so padding here; the least signal that is left is the brightest stored value.
    assert (values[10, :5] == values[10, 5:].min()).all() and values[10, :5].max() < 4095 - 300


def test_padding_is_dark_under_a_negative_slope() -> None:
    series = read(padded(made_up.ct(made_up.slices(), -1.0, 0.0), 5, 4000))
    assert (series.values[10, :5] == series.values[10, 5:].max()).all() and series.slope == -1


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_slice_of_padding_only_holds_the_least_value_of_the_others(slope: float) -> None:
    made = each(made_up.ct(made_up.slices(), slope, 0.0), PixelPaddingValue=4000)
    made[0].PixelData = np.full(made[0].Rows * made[0].Columns, 4000, "<u2").tobytes()
    series = read(made)
    place = [source for source, _frame in series.frames].index(0)
    others = np.delete(series.values, place, 0)
    assert (series.values[place] == (others.min() if slope > 0 else others.max())).all()


def test_series_of_padding_only_is_blank() -> None:
    assert refused_blank(padded(made_up.ct(made_up.slices()), 24, 4000)) == "quality.blank"


def refused_blank(made: list[FileDataset]) -> str:
    with pytest.raises(VolumeError) as caught:
        read(made)
    return caught.value.code


@pytest.mark.parametrize(
    ("slope", "intercept"), [("1e300", "0"), ("1e38", "0"), ("1e-300", "0"), ("1", "1e300"), ("-1e38", "1e38"), ("1e-9", "1e9")]
)
@pytest.mark.parametrize("scale", [AS_THEY_ARE, [{"step": "clip", "low": -100.0, "high": 300.0}]])
def test_rescale_that_leaves_no_usable_values_is_refused(slope: str, intercept: str, scale: Any) -> None:
    series = read(made_up.ct(made_up.slices(), slope, intercept))  # type: ignore[arg-type]
    with pytest.raises(VolumeError) as caught:
        prepare(series, spec(scale))
    assert caught.value.code == "volume.bad_values"


def test_absurd_rescale_of_one_slice_is_refused() -> None:
    made = made_up.ct(made_up.slices())
    made[4].RescaleSlope = "1e300"
    assert refused(made) == "volume.bad_values"


# -- how the images came about -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "usual", "other", "code"),
    [
        ("EchoTime", "10", "90", "volume.mixed_acquisition"),
        ("EchoTime", "1.15", "2.3", "volume.mixed_acquisition"),
        ("RepetitionTime", "500", "4000", "volume.mixed_acquisition"),
        ("InversionTime", "900", "2500", "volume.mixed_acquisition"),
        ("InversionTime", "900", None, "volume.mixed_acquisition"),
        ("EchoNumbers", 1, 2, "volume.mixed_acquisition"),
        ("ContrastBolusAgent", None, "Gadovist", "volume.mixed_acquisition"),
        ("DiffusionBValue", 0.0, 1000.0, "volume.mixed_acquisition"),
        ("ConvolutionKernel", "H31s", "H60s", "volume.mixed_acquisition"),
        ("Modality", "MR", "CT", "volume.mixed_kind"),
        ("ImageType", ["ORIGINAL", "PRIMARY", "M", "WATER"], ["ORIGINAL", "PRIMARY", "M", "FAT"], "volume.mixed_kind"),
    ],
)
@pytest.mark.parametrize("mixed", ["interleaved", "one after the other", "one slice"])
def test_two_acquisitions_in_one_series_are_refused(keyword: str, usual: Any, other: Any, code: str, mixed: str) -> None:
    """Evenly spaced together, and yet no volume."""
    second = {"interleaved": range(1, 20, 2), "one after the other": range(10, 20), "one slice": range(7, 8)}[mixed]
    made = each(made_up.slices(), **{keyword: usual})
    assert len(read(made).values) == 20
    for number in second:
        setattr(made[number], keyword, other)
    assert refused(made) == code


def test_two_echoes_at_the_same_places_are_named_as_such() -> None:
    assert refused(each(made_up.slices(), EchoTime=10) + each(made_up.slices(), EchoTime=90)) == "volume.mixed_acquisition"


def _frames(group: str, keyword: str, values: Callable[[int], Any]) -> list[FileDataset]:
    image = made_up.enhanced(made_up.slices())
    for number, frame in enumerate(image.PerFrameFunctionalGroupsSequence):
        setattr(frame, group, getattr(made_up._group(**{group: {keyword: values(number)}}), group))
    return [image]


@pytest.mark.parametrize(
    ("group", "keyword", "first", "second"),
    [
        ("MREchoSequence", "EffectiveEchoTime", 90.0, 10.0),
        ("MRTimingAndRelatedParametersSequence", "RepetitionTime", 500.0, 2500.0),
        ("MRModifierSequence", "InversionTimes", [900.0], [2500.0]),
        ("MRDiffusionSequence", "DiffusionBValue", 0.0, 1000.0),
        ("ContrastBolusUsageSequence", "ContrastBolusAgentAdministered", "NO", "YES"),
        ("CTReconstructionSequence", "ConvolutionKernel", "soft", "sharp"),
        ("MRImageFrameTypeSequence", "FrameType", ["ORIGINAL", "PRIMARY", "M", "NONE"], ["ORIGINAL", "PRIMARY", "M", "DIXON"]),
        ("MRImageFrameTypeSequence", "ComplexImageComponent", "MAGNITUDE", "PHASE"),
    ],
)  # fmt: skip
def test_two_acquisitions_in_one_multi_frame_image_are_refused(group: str, keyword: str, first: Any, second: Any) -> None:
    assert len(read(_frames(group, keyword, lambda _number: first)).values) == 20
    expected = "volume.mixed_kind" if keyword == "FrameType" else "volume.mixed_acquisition"
    assert refused(_frames(group, keyword, lambda number: second if number % 2 else first)) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"EchoTime": lambda n: ["22", "22.0", "22.01", "21.99"][n % 4]},
        {"RepetitionTime": lambda n: 2300 + n % 5, "InversionTime": lambda n: 750 + n % 3},
        {"AcquisitionNumber": lambda n: n, "XRayTubeCurrent": lambda n: 160 + n, "ContentTime": lambda n: f"1200{n:02d}"},
        {"ImageType": lambda n: ["ORIGINAL", "PRIMARY", "AXIAL", "ADD"] if n < 10 else ["ORIGINAL", "PRIMARY", "AXIAL"]},
        {"ImageType": lambda n: ["ORIGINAL", "PRIMARY", "M", "NORM", f"FM{n}"], "ContrastBolusAgent": lambda n: "" if n % 2 else None},
        {"TriggerTime": lambda n: 30.0 * n, "WindowCenter": lambda n: 40 + n, "WindowWidth": 80},
        {"EchoTime": "", "EchoNumbers": None, "InversionTime": None},
    ],
)
def test_healthy_series_are_read_though_their_headers_vary(values: dict[str, Any]) -> None:
    assert len(read(each(made_up.slices(), **values)).values) == 20


# -- look-up tables ------------------------------------------------------------------------------------------------------


def _table(values: Any) -> Items:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [0, 0, 16], np.asarray(values, "<u2").tobytes()
    return Items([item])


@pytest.mark.parametrize("keyword", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("multi", [True, False])
def test_look_up_tables_are_held_once(keyword: str, multi: bool) -> None:
    made = made_up.slices(120, rows=4, columns=4, apart=1.0)
    for one in made:
        setattr(one, keyword, _table(np.arange(65536)))
    made = [made_up.enhanced(made)] if multi else made
    tracemalloc.start()
    try:
        read(made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * 2**20  # one for each frame would be 63 MB


def test_each_slice_with_a_look_up_table_of_its_own_is_too_large() -> None:
    made = made_up.slices(140, rows=4, columns=4, apart=1.0)
    for number, one in enumerate(made):
        one.ModalityLUTSequence = _table(np.roll(np.arange(65536), number))
    assert refused(made) == "volume.too_large"


def test_frames_of_all_images_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.imaging.volumes.volume.MAX_FRAMES", 25)
    made = made_up.slices(30)
    assert refused([made_up.enhanced(made[:15]), made_up.enhanced(made[15:])]) == "volume.too_large"


# -- which axis is the slices' -------------------------------------------------------------------------------------------


@given(st.floats(5, 25), st.tuples(*[st.floats(-0.2, 0.2)] * 3), st.sampled_from(["SPL", "LIA", "RAS", "PIL"]))
def test_tilted_and_oblique_stack_keeps_the_plane_of_its_slices(degrees: float, turn: tuple[float, float, float], axes: str) -> None:
    """Under a tilted gantry rows are at right angles to columns and to the table: rounding must not choose between the two."""
    x, y, z = turn
    oblique, _upper = np.linalg.qr(np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
    oblique *= np.sign(np.diag(oblique))
    angle = np.radians(degrees)
    row, column, table = np.array([1, 0, 0]), np.array([0, np.cos(angle), -np.sin(angle)]), np.array([0, 0, 3.0])
    planes = (oblique @ row, oblique @ column)
    shear = oblique @ table - np.cross(*planes) * 3.0
    made = made_up.slices(10, rows=8, columns=8, orientation=planes, shear=shear)
    series = read(made)
    _values, grid = reorient(series.values, series.grid, axes)
    straight = rectangular_grid(grid, (2.0, 2.0, 2.0))
    directions = straight.steps / straight.spacing
    assert np.abs(directions.T @ np.cross(*planes)).max() == pytest.approx(1, abs=1e-4)
    assert straight.through == grid.through and abs(directions[:, grid.through] @ np.cross(*planes)) == pytest.approx(1, abs=1e-4)


# -- slices that may be missing at an end --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kept", "detail"),
    [
        ({"ImagesInAcquisition": 20}, slice(17), "17 / 20"),
        ({"NumberOfSlices": 20}, slice(3, None), "17 / 20"),
        ({"InstanceNumber": lambda n: n + 1}, slice(3, None), "17 / 20"),
        ({"InstanceNumber": lambda n: 2 * (n % 10) + n // 10 + 1}, slice(17), "17 / 19"),
        ({"ImagesInAcquisition": 20}, slice(None), None),
        ({"ImagesInAcquisition": 1}, slice(None), None),
        ({"ImagesInAcquisition": 1_000_000}, slice(None), None),
        ({"InstanceNumber": lambda n: 2 * n + 2}, slice(None), None),
        ({"InstanceNumber": lambda n: 21 + n}, slice(None), None),
        ({"InstanceNumber": lambda n: 1 + n + 100 * (n // 10)}, slice(None), None),
        ({"InstanceNumber": 1}, slice(None), None),
        ({"InstanceNumber": None}, slice(None), None),
    ],
)
def test_images_that_seem_to_be_missing_are_noted(values: dict[str, Any], kept: slice, detail: str | None) -> None:
    notes = [(note.code, note.detail) for note in read(each(made_up.slices(), **values)[kept]).notes]
    assert notes == ([("volume.incomplete", detail)] if detail else [])
    assert "not analysed" not in messages.hint("volume.incomplete", "en")


@given(st.lists(st.builds(ImageCount, st.integers(-5, 10**6), st.integers(-5, 64_000), st.integers(1, 5)), min_size=1, max_size=40))
def test_whatever_headers_count_is_at_most_a_note(images: list[ImageCount]) -> None:
    note = missing_images_note(images)
    have = sum(image.frames for image in images)
    assert note is None or int(note.detail.split(" / ")[1]) > have


def test_reading_tells_of_every_frame() -> None:
    """Hundreds of compressed frames take longer than one step of a job may, in one image too."""
    told: list[int] = []
    read_series(made_up.sources([made_up.enhanced(made_up.slices())]), spec(), lambda: told.append(1))
    assert len(told) == 20


@pytest.mark.parametrize("raw", [b"inf ", b"ab  ", b"1\\xx", b"\xff\x00\xfe\x01", b"1.5 "])
def test_numbers_that_cannot_be_read_say_nothing(raw: bytes) -> None:
    made = each(made_up.slices(), EchoTime="1000", InstanceNumber=1234)
    for place, one in enumerate(made):
        buffer = DicomBytesIO()
        one.save_as(buffer, enforce_file_format=True)
        written = buffer.getvalue().replace(b"DS\x04\x001000", b"DS\x04\x00" + raw).replace(b"IS\x04\x001234", b"IS\x04\x00" + raw)
        made[place] = pydicom.dcmread(DicomBytesIO(written))
    series = read(made)
    assert len(series.values) == 20 and not series.notes
