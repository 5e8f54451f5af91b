"""A series becomes a volume by where its slices are, whatever their order and orientation; what is no volume is refused by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset

from appliance.core.errors import PixelError, VolumeError
from appliance.imaging.volumes.geometry import Grid, reorient
from appliance.imaging.volumes.resampling import rectangular_grid, resample_linear, resample_nearest
from appliance.imaging.volumes.volume import crop_pad, prepare, read_series
from model_sync import messages
from model_sync.bundle import VolumeSpec
from tests.support import series as made_up
from tests.support import volume_bundle

PLAIN = [{"step": "clip", "low": -5000.0, "high": 5000.0}]


def spec(axes: str = "LIA", *, spacing: float = 2.0, **values: Any) -> VolumeSpec:
    steps = {"min_slices": 8, "apart": 6.0, "scale": PLAIN} | values
    return VolumeSpec.model_validate(volume_bundle.volume_input(64, axes=axes, spacing=(spacing,) * 3, **steps))


def read(made: list[FileDataset], **values: Any) -> Any:
    return read_series(made_up.sources(made), spec(**values))


def refused(made: list[FileDataset], **values: Any) -> str:
    with pytest.raises(VolumeError) as caught:
        read(made, **values)
    assert messages.text(caught.value.code, "zh") != messages.text(caught.value.code, "en")
    assert "P-1" not in str(caught.value) and "1.2.826" not in str(caught.value)
    return caught.value.code


def phantom_error(values: Any, grid: Grid, inset: float = 34.0) -> float:
    """The largest difference to the phantom well inside the ball, away from the mark."""
    points = grid.to_patient(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))
    near_mark = np.linalg.norm(points - [18, -14, 10], axis=-1) < 14
    inside = (np.linalg.norm(points, axis=-1) < inset) & ~near_mark
    assert inside.sum() > 500
    return float(np.abs(values - made_up.head(points))[inside].max())


# -- order and place -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [made_up.AXIAL, made_up.SAGITTAL, made_up.CORONAL, made_up.OBLIQUE])
def test_every_voxel_is_where_the_patient_has_it(orientation: Any) -> None:
    """The phantom is a function of the patient's coordinates: after turning and resampling it still is, so nothing is mirrored."""
    series = read(made_up.slices(30, rows=36, columns=40, orientation=orientation))
    assert phantom_error(series.values, series.grid) < 1
    prepared = prepare(series, spec())
    assert phantom_error(prepared.values, prepared.grid) < 2
    assert prepared.grid.axes == "LIA" and np.allclose(prepared.grid.spacing, 2.0)


@pytest.mark.parametrize("axes", ["LIA", "RAS", "LPS", "SPL", "PIL"])
def test_orientation_is_the_one_asked_for(axes: str) -> None:
    prepared = prepare(read(made_up.slices(30, rows=36, columns=40, orientation=made_up.OBLIQUE)), spec(axes))
    assert prepared.grid.axes == axes
    assert phantom_error(prepared.values, prepared.grid) < 2


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(20)), st.booleans())
def test_slices_in_any_order_give_the_same_volume(order: list[int], numbered: bool) -> None:
    """By position, not by Instance Number, which counts down here or says nothing at all."""
    made = made_up.slices(20, middle=(3, -2, 5))
    for one in made:
        one.InstanceNumber = one.InstanceNumber if numbered else 1
    straight = read(made)
    shuffled = read([made[place] for place in order])
    assert np.array_equal(straight.values, shuffled.values) and np.array_equal(straight.grid.affine, shuffled.grid.affine)
    assert [order[source] for source, _frame in shuffled.frames] == [source for source, _frame in straight.frames]


def test_slices_stored_from_the_other_end_give_the_same_volume() -> None:
    assert np.array_equal(read(made_up.slices()).values, read(made_up.slices()[::-1]).values)


def test_enhanced_multi_frame_image_is_the_same_volume() -> None:
    made = made_up.slices(orientation=made_up.OBLIQUE)
    frames = made_up.enhanced(made[10:] + made[:10])
    single, multi = read(made), read([frames])
    assert np.array_equal(single.values, multi.values) and np.allclose(single.grid.affine, multi.grid.affine, atol=1e-6)
    assert multi.frames[0] == (0, 10) and multi.frames[-1] == (0, 9)


def test_two_enhanced_images_are_one_volume() -> None:
    made = made_up.slices()
    both = read([made_up.enhanced(made[::2]), made_up.enhanced(made[1::2])])
    assert np.array_equal(both.values, read(made).values)


def test_oblique_stack_keeps_its_own_axes() -> None:
    series = read(made_up.slices(orientation=made_up.OBLIQUE))
    grid = rectangular_grid(series.grid, (2.0, 2.0, 2.0))
    assert np.allclose(grid.steps / grid.spacing, series.grid.steps / series.grid.spacing, atol=1e-6)


# -- what is no volume ---------------------------------------------------------------------------------------------------


def _without(keyword: str) -> Callable[[list[FileDataset]], None]:
    def change(made: list[FileDataset]) -> None:
        del made[3][keyword]

    return change


def _set(number: int, keyword: str, value: Any) -> Callable[[list[FileDataset]], None]:
    return lambda made: setattr(made[number], keyword, value)


def _nudge(number: int, by: tuple[float, float, float]) -> Callable[[list[FileDataset]], None]:
    def change(made: list[FileDataset]) -> None:
        made[number].ImagePositionPatient = [a + b for a, b in zip(map(float, made[number].ImagePositionPatient), by, strict=True)]

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param(_without("ImagePositionPatient"), "volume.no_position", id="no position"),
        pytest.param(_without("ImageOrientationPatient"), "volume.no_position", id="no orientation"),
        pytest.param(_without("PixelSpacing"), "volume.no_position", id="no spacing"),
        pytest.param(_set(3, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "volume.no_position", id="no right angle"),
        pytest.param(_set(3, "ImageOrientationPatient", [2, 0, 0, 0, 1, 0]), "volume.no_position", id="no unit vector"),
        pytest.param(_set(3, "PixelSpacing", [0, 2.5]), "volume.no_position", id="spacing of nothing"),
        pytest.param(_set(3, "ImagePositionPatient", [1e9, 0, 0]), "volume.no_position", id="absurd position"),
        pytest.param(lambda made: made.pop(9), "volume.missing_slices", id="one slice missing"),
        pytest.param(lambda made: [made.pop(4) for _ in range(3)], "volume.missing_slices", id="three slices missing"),
        pytest.param(lambda made: made.append(copy.deepcopy(made[5])), "volume.duplicate_slice", id="slice sent twice"),
        pytest.param(lambda made: made.extend(copy.deepcopy(made)), "volume.duplicate_slice", id="two echoes"),
        pytest.param(_nudge(7, (0, 0, 1.2)), "volume.uneven_spacing", id="uneven"),
        pytest.param(_nudge(7, (4.0, 0, 0)), "volume.scattered", id="off the line"),
        pytest.param(_set(3, "ImageOrientationPatient", [1, 0, 0, 0, 0, -1]), "volume.mixed_orientation", id="mixed orientation"),
        pytest.param(_set(3, "FrameOfReferenceUID", "1.2.3"), "volume.mixed_orientation", id="patient moved"),
        pytest.param(_set(3, "PixelSpacing", [3.0, 2.6]), "volume.mixed_size", id="mixed spacing"),
        pytest.param(_set(3, "ImageType", ["DERIVED", "SECONDARY", "MPR"]), "volume.mixed_kind", id="mixed kinds"),
        pytest.param(_set(3, "RescaleSlope", 2.0), "volume.mixed_units", id="one slice rescaled"),
        pytest.param(_set(3, "PhotometricInterpretation", "MONOCHROME1"), "volume.mixed_units", id="one slice inverted"),
        pytest.param(_set(3, "PhotometricInterpretation", "PALETTE COLOR"), "volume.mixed_units", id="one slice coloured"),
        pytest.param(lambda made: made.__delitem__(slice(7, None)), "volume.too_few_slices", id="too few"),
    ],
)  # fmt: skip
def test_series_that_is_no_volume_is_refused_with_its_reason(change: Callable[[list[FileDataset]], object], code: str) -> None:
    made = made_up.slices(20)
    change(made)
    assert refused(made) == code


def test_mixed_size_is_refused() -> None:
    made = made_up.slices()
    odd = made_up.slices(rows=26, FrameOfReferenceUID=made[0].FrameOfReferenceUID)[3]
    made[3] = odd
    assert refused(made) == "volume.mixed_size"


def test_slices_too_far_apart_are_refused() -> None:
    assert refused(made_up.slices(apart=7.0)) == "volume.too_coarse"


def test_volume_too_large_for_the_box_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_up.slices()
    monkeypatch.setattr("appliance.imaging.volumes.volume.MAX_STACK_BYTES", 20_000)
    assert refused(made) == "volume.too_large"
    monkeypatch.undo()
    series = read(made)
    monkeypatch.setattr("appliance.imaging.volumes.volume.MAX_VOXELS", 1000)
    with pytest.raises(VolumeError, match="voxels after"):
        prepare(series, spec())


@pytest.mark.parametrize(
    ("limit", "detail"),
    [({"MAX_STACK_BYTES": 20_000}, "slices of"), ({"MAX_VOXELS": 1000}, "voxels after resampling"), ({}, "said by whoever asked")],
)
def test_what_is_too_large_is_refused_by_its_headers_before_any_pixel_is_decoded(
    monkeypatch: pytest.MonkeyPatch, limit: dict[str, int], detail: str
) -> None:
    """The pixels of these slices are damaged: whoever decodes one says so."""
    made = made_up.slices()
    for one in made:
        one.PixelData = one.PixelData[:100]
    for name, value in limit.items():
        monkeypatch.setattr(f"appliance.imaging.volumes.volume.{name}", value)

    def fits(shape: tuple[int, int, int]) -> None:
        asked.append(shape)
        raise VolumeError("volume.too_large", "said by whoever asked")

    asked: list[tuple[int, int, int]] = []
    with pytest.raises(VolumeError, match=detail) as caught:
        read_series(made_up.sources(made), spec(), check_shape=fits)
    assert caught.value.code == "volume.too_large"
    assert len(asked) == (0 if limit else 1)


@pytest.mark.parametrize("orientation", [made_up.AXIAL, made_up.SAGITTAL, made_up.OBLIQUE])
@pytest.mark.parametrize("last", [[], [{"step": "crop_pad", "depth": 9, "height": 8, "width": 7, "fill": 0.0, "align": "center"}]])
def test_headers_tell_the_shape_that_the_prepared_volume_will_have(orientation: Any, last: list[dict[str, Any]]) -> None:
    steps = volume_bundle.volume_input(64, spacing=(2.0, 1.5, 3.0), min_slices=8, apart=6.0, scale=PLAIN)
    steps["pipeline"][-1:] = last or steps["pipeline"][-1:]
    if last:
        steps |= {"depth": 9, "height": 8, "width": 7}
    rule, asked = VolumeSpec.model_validate(steps), []
    series = read_series(made_up.sources(made_up.slices(30, rows=36, columns=40, orientation=orientation)), rule, check_shape=asked.append)
    assert asked == [prepare(series, rule).values.shape]


def test_damaged_slice_is_a_pixel_error() -> None:
    made = made_up.slices()
    made[4].PixelData = made[4].PixelData[:100]
    with pytest.raises(PixelError):
        read(made)


def test_blank_series_is_rejected_for_its_quality() -> None:
    made = made_up.slices()
    for one in made:
        one.PixelData = bytes(len(one.PixelData))
    with pytest.raises(VolumeError) as caught:
        prepare(read(made), spec())
    assert caught.value.code == "quality.blank"


def test_localizers_are_left_out_and_said() -> None:
    made = made_up.slices()
    scout = made_up.slices(1, orientation=made_up.CORONAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series = read([*scout, *made])
    assert len(series.values) == 20 and [(note.code, note.detail) for note in series.notes] == [("volume.localizer", "1")]
    assert refused(scout * 20) == "volume.too_few_slices"


def test_rounding_of_positions_is_no_gap() -> None:
    """Scanners write positions to a tenth of a millimetre."""
    made = made_up.slices(orientation=made_up.OBLIQUE, apart=5.03)
    for one in made:
        one.ImagePositionPatient = [round(float(value), 1) for value in one.ImagePositionPatient]
    assert phantom_error(read(made).values, read(made).grid, 30) < 3


# -- tilt ----------------------------------------------------------------------------------------------------------------


def tilted(degrees: float, header: float | None = None) -> list[FileDataset]:
    """A CT with its gantry tilted: planes lean, positions go along the table."""
    angle = math.radians(degrees)
    planes = ((1.0, 0.0, 0.0), (0.0, math.cos(angle), -math.sin(angle)))
    normal = np.cross(*planes)
    along = np.array([0, 0, 3.0 / math.cos(angle)]) - normal * 3.0
    return made_up.ct(
        made_up.slices(30, rows=36, columns=40, orientation=planes, shear=along, GantryDetectorTilt=degrees if header is None else header)
    )


@pytest.mark.parametrize("degrees", [-22.0, 18.5, 30.0])
def test_tilted_gantry_is_straightened(degrees: float) -> None:
    series = read(tilted(degrees))
    assert series.tilt == pytest.approx(abs(degrees), abs=0.01) and [note.code for note in series.notes] == ["volume.straightened"]
    prepared = prepare(series, spec("LPS"))
    assert np.allclose(prepared.grid.steps.T @ prepared.grid.steps, 4 * np.eye(3), atol=1e-9)
    assert phantom_error(prepared.values + 1024, prepared.grid, 30) < 4
    assert prepared.values.min() >= -1024 - 1e-3


def test_tilt_that_the_header_denies_is_refused() -> None:
    assert refused(tilted(0.0, header=20.0)) == "volume.tilt"


def test_reformatted_stack_may_carry_the_tilt_it_was_made_from() -> None:
    made = tilted(0.0, header=20.0)
    for one in made:
        one.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    assert read(made).tilt == 0


def test_tilt_beyond_any_gantry_is_refused() -> None:
    assert refused(tilted(50.0)) == "volume.tilt"


def test_mask_of_a_tilted_series_comes_back_on_its_slices() -> None:
    series = read(tilted(18.5))
    prepared = prepare(series, spec("LPS", spacing=1.0))
    mask = (prepared.values > 700 - 1024).astype(np.uint8)
    back = resample_nearest(mask, prepared.grid, series.grid)
    marked = series.values > 700
    assert (back[marked] == 1).mean() > 0.7 and (back[~marked] == 0).mean() > 0.99


# -- values --------------------------------------------------------------------------------------------------------------


def test_rescale_gives_hounsfield_units() -> None:
    series = read(made_up.ct(made_up.slices(30, rows=36, columns=40), 2.0, -1000.0))
    assert series.values.dtype == np.uint16 and (series.slope, series.intercept) == (2.0, -1000.0)
    prepared = prepare(series, spec())
    assert phantom_error((prepared.values + 1000) / 2, prepared.grid) < 2


def test_each_slice_has_its_own_rescale() -> None:
    """As PET and some CT write it: the slope differs from slice to slice, the values mean the same."""
    made = made_up.ct(made_up.slices(30, rows=36, columns=40), 1.0, 0.0)
    plain = read(made)
    for number, one in enumerate(made):
        one.RescaleSlope, one.RescaleIntercept = 1.0 + number % 3, float(number)
    scaled = read(made)
    assert scaled.values.dtype == np.float32 and (scaled.slope, scaled.intercept) == (1.0, 0.0)
    where = {source: place for place, (source, _frame) in enumerate(scaled.frames)}
    for number in (0, 7, 29):
        expected = plain.values[where[number]] * (1.0 + number % 3) + number
        assert np.allclose(scaled.values[where[number]], expected)


def test_modality_lut_is_applied() -> None:
    made = made_up.slices()
    item = made_up._group(ModalityLUTSequence={"LUTDescriptor": [1200, 0, 16], "LUTData": [3 * value for value in range(1200)]})
    for one in made:
        one.ModalityLUTSequence = item.ModalityLUTSequence
    assert np.allclose(read(made).values, 3.0 * read(made_up.slices()).values)


def test_monochrome1_of_mr_is_turned_round_and_of_ct_is_not() -> None:
    plain = read(made_up.slices()).values
    assert np.array_equal(read(made_up.slices(PhotometricInterpretation="MONOCHROME1")).values, 4095 - plain)
    assert np.array_equal(read(made_up.ct(made_up.slices(PhotometricInterpretation="MONOCHROME1"))).values, plain)


def test_padding_outside_the_field_of_view_is_no_tissue() -> None:
    made = made_up.ct(made_up.slices())
    for one in made:
        pixels = np.frombuffer(one.PixelData, "<u2").copy()
        pixels[:5] = 4095
        one.PixelData, one.PixelPaddingValue = pixels.tobytes(), 4095
    assert read(made).values.max() < 1000


def test_float_pixels_that_are_no_numbers_are_refused() -> None:
    made = made_up.slices()
    for one in made:
        values = np.frombuffer(one.PixelData, "<u2").astype("<f4")
        values[0] = np.nan
        del one.PixelData
        one.FloatPixelData, one.BitsAllocated = values.tobytes(), 32
    assert refused(made) == "volume.bad_values"


@pytest.mark.parametrize(
    ("steps", "low", "high"),
    [
        ([{"step": "clip", "low": 100.0, "high": 400.0}], 100, 400),
        ([{"step": "clip_quantile", "low": 0.0, "high": 0.9}, {"step": "min_max", "low": 0.0, "high": 255.0, "round": True}], 0, 255),
        ([{"step": "min_max", "low": -1.0, "high": 1.0, "round": False}], -1, 1),
        ([{"step": "scale", "divide_by": 900.0}], 0, 1),
        ([{"step": "clip", "low": 0.0, "high": 900.0}, {"step": "normalise", "mean": [450.0], "std": [450.0]}], -1, 1),
    ],
)
def test_values_are_scaled_as_the_manifest_says(steps: list[dict[str, Any]], low: float, high: float) -> None:
    values = prepare(read(made_up.slices(30, rows=36, columns=40)), spec(scale=steps)).values
    assert values.dtype == np.float32 and values.min() == pytest.approx(low, abs=0.02) and values.max() == pytest.approx(high, abs=0.02)


def test_quantile_scale_maps_the_quantiles_to_0_and_1() -> None:
    values = prepare(
        read(made_up.slices(30, rows=36, columns=40)), spec(scale=[{"step": "quantile_scale", "low": 0.05, "high": 0.95}])
    ).values
    assert np.quantile(values, (0.05, 0.95)) == pytest.approx([0, 1], abs=1e-3)


# -- grids ---------------------------------------------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any lattice: reorient, anisotropic, sheared a little, maybe left-handed."""
    number = st.floats(-1, 1).map(lambda value: round(value, 3))
    steps = np.array([[draw(number) for _ in range(3)] for _ in range(3)])
    q, _upper = np.linalg.qr(steps + 0.1 * np.eye(3))
    spacing = np.array([draw(st.sampled_from([0.5, 1.0, 2.5, 4.0])) for _ in range(3)])
    signs = np.array([draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)])
    affine = np.eye(4)
    affine[:3, :3] = q * signs * spacing
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    shape = tuple(draw(st.integers(2, 7)) for _ in range(3))
    return Grid((shape[0], shape[1], shape[2]), affine)


HALF_WAY = Grid((2, 2, 2), np.array([[0.5, 0.5, 0, 0], [0.5, -0.5, 0, 0], [0, 0, -0.5, 0], [0, 0, 0, 1]]) * [2**0.5, 2**0.5, 1, 1])


@settings(deadline=None)
@example(HALF_WAY, "ASR")
@given(grids(), st.sampled_from(["LIA", "RAS", "LPS", "ASR", "IPL"]))
def test_turning_and_turning_back_loses_nothing(grid: Grid, axes: str) -> None:
    values = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    there, at = reorient(values, grid, axes)
    assert at.axes == axes
    index = np.array([[1, 0, 1], [0, 1, 1]])
    for i in index:
        where = np.rint(grid.to_index(at.to_patient(i))).astype(int)
        assert there[tuple(i)] == values[tuple(where)]
    back, home = reorient(there, at, grid.axes)
    assert np.array_equal(back, values) and np.allclose(home.affine, grid.affine)


@settings(deadline=None)
@given(grids(), st.lists(st.floats(-50, 50), min_size=3, max_size=3))
def test_patient_and_index_are_each_others_inverse(grid: Grid, index: list[float]) -> None:
    assert np.allclose(grid.to_index(grid.to_patient(index)), index, atol=1e-6)
    assert grid.voxel_ml == pytest.approx(float(np.prod(grid.spacing)) / 1000, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(grids(), st.sampled_from(["LIA", "RAS", "IPL"]), st.randoms(use_true_random=False))
def test_mask_comes_back_exactly_from_any_orientation(grid: Grid, axes: str, random: Any) -> None:
    mask = np.array([random.randrange(3) for _ in range(int(np.prod(grid.shape)))], np.uint8).reshape(grid.shape)
    there, at = reorient(mask, grid, axes)
    assert np.array_equal(resample_nearest(np.ascontiguousarray(there), at, grid), mask)


@settings(deadline=None, max_examples=40)
@given(grids())
def test_both_ways_of_interpolating_agree(grid: Grid) -> None:
    """The quick way between parallel axes gives what the general one gives, and a linear function is kept."""
    points = grid.to_patient(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))
    values = points @ [1.0, -2.0, 0.5] + 7
    target = rectangular_grid(grid, (0.75, 1.0, 1.25))
    quick = resample_linear(values, grid, target, -1e6)
    from appliance.imaging.volumes.resampling import _general

    slow = _general(values, np.linalg.inv(grid.affine) @ target.affine, target.shape, -1e6)
    assert np.allclose(quick, slow, atol=1e-2)
    at = target.to_patient(np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), axis=-1))
    inner = ((grid.to_index(at) >= 0) & (grid.to_index(at) <= np.array(grid.shape) - 1)).all(axis=-1)
    assert np.allclose(quick[inner], (at @ [1.0, -2.0, 0.5] + 7)[inner], atol=1e-2)


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
def test_crop_and_pad_keep_every_voxel_where_it_is(have: tuple[int, int, int], want: tuple[int, int, int]) -> None:
    grid = Grid(have, np.diag([1.0, 2.0, 3.0, 1.0]))
    values = np.arange(1, np.prod(have) + 1, dtype=np.float32).reshape(have)
    cut, at = crop_pad(values, grid, want, 0.0)
    assert cut.shape == want == at.shape
    for index in np.argwhere(cut)[:20]:
        where = np.rint(grid.to_index(at.to_patient(index))).astype(int)
        assert values[tuple(where)] == cut[tuple(index)]
    kept = np.prod([min(a, b) for a, b in zip(have, want, strict=True)])
    assert np.count_nonzero(cut) == kept


def test_every_reason_has_both_languages_and_says_that_it_was_not_analysed() -> None:
    for code in (code for code in messages.codes("appliance") if code.startswith("volume.")):
        if code not in ("volume.localizer", "volume.straightened", "volume.incomplete"):
            assert "没有作体积分析" in messages.hint(code, "zh") and "not analysed" in messages.hint(code, "en")


def test_headers_tell_the_shape_after_the_last_crop() -> None:
    """A wide field first and the model's own after it: what memory has to hold is the last."""
    crops = [{"step": "crop_pad", "depth": side, "height": side, "width": side, "fill": 0.0, "align": "center"} for side in (200, 24)]
    told: list[tuple[int, int, int]] = []
    wanted = spec(scale=[crops[0], *PLAIN, crops[1]])
    series = read_series(made_up.sources(made_up.slices()), wanted, check_shape=told.append)
    assert told == [(24, 24, 24)] == [prepare(series, wanted).grid.shape]
