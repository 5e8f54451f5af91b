"""What the headers of a series' slices say, and whether they speak of one volume: place, values, and how the values came about.

Positions alone cannot tell a second echo, a scan after contrast or another reconstruction from more slices of the same one, and a
volume of both looks like one. So everything that changes what a grey value means has to be the same in every slice. What healthy
series vary (tube current, acquisition number, window, trigger time) is not looked at.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from appliance.core.domain import Note
from appliance.core.errors import VolumeError
from appliance.imaging.greyscale import GreyHeader, Lut, frame_value, grey_header, numbers, rescale
from appliance.imaging.pixel_checks import VALUE_ERRORS
from appliance.imaging.pixels import frame_count
from appliance.imaging.volumes.geometry import Plane, plane_of

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Numbers: TypeAlias = tuple[float, ...]

MAX_FRAMES: Final = 4096
# A table of 65,536 entries takes half a megabyte.
_MAX_LUTS: Final = 128
# Of 64,000 images no number is believed; nor are holes that would be more than what is there.
_MAX_NUMBER: Final = 64_000

_RESCALE: Final = "PixelValueTransformationSequence"
# Values of these mean something however they are to be displayed: HU, activity, counts. PET is customarily shown black on white.
_WITH_UNIT: Final = frozenset({"CT", "PT", "NM"})
# Rescale Slope and Intercept are type 1 in both (PS3.3 C.8.2.1, C.8.9.4): without them the stored values are no HU and no Bq/ml.
_RESCALED: Final = frozenset({"CT", "PT"})
_NO_UNIT: Final = frozenset({"", "US", "UNSPECIFIED", "NORMALIZED", "NONE", "1"})

# Text that has to be the same: keyword, and the functional group that holds it in enhanced images (PS3.3 C.7.6.16, C.8.13, C.8.15).
_TEXTS: Final = (
    ("EchoNumbers", ""),
    ("ContrastBolusAgent", ""),
    ("ContrastBolusAgentAdministered", "ContrastBolusUsageSequence"),
    ("ContrastBolusAgentPhase", "ContrastBolusUsageSequence"),
    ("ConvolutionKernel", "CTReconstructionSequence"),
    ("AcquisitionContrast", "MRImageFrameTypeSequence"),
    ("ComplexImageComponent", "MRImageFrameTypeSequence"),
)
# Numbers that have to be the same up to a share of them or an absolute difference (ms, s/mm2): scanners round, and a repetition that
# waits for heart or breath varies a little.
_NUMBERS: Final = (
    ("EchoTime", "", 0.02, 0.05),
    ("EffectiveEchoTime", "MREchoSequence", 0.02, 0.05),
    ("RepetitionTime", "MRTimingAndRelatedParametersSequence", 0.1, 1.0),
    ("InversionTime", "", 0.05, 5.0),
    ("InversionTimes", "MRModifierSequence", 0.05, 5.0),
    ("DiffusionBValue", "MRDiffusionSequence", 0.05, 5.0),
)
# Of Image Type from its fourth value on, the words that say what a pixel shows; scanners write filters and the like there too.
_SHOWS: Final = frozenset({
    "WATER", "FAT", "W", "F", "IP", "OP", "IN_PHASE", "OUT_PHASE", "OPP_PHASE", "OPPOSED_PHASE", "FAT_FRACTION", "WATER_FAT", "M", "P",
    "R", "I", "MAGNITUDE", "PHASE", "PHASE MAP", "REAL", "IMAGINARY", "ADC", "EADC", "FA", "TRACEW", "TRACE", "DIFFUSION", "T1 MAP",
    "T2 MAP", "T2_STAR MAP", "MIP", "MINIP", "MPR", "SUB", "SUBTRACTION", "PERFUSION", "CBF", "CBV", "MTT", "TTP", "VMI",
    "MAT_SPECIFIC", "MAT_REMOVED", "MAT_FRACTIONAL", "MAT_VALUE_BASED", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY",
})  # fmt: skip


@dataclass(frozen=True)
class Units:
    """What a stored value means: the same for all slices of a volume.

    Attributes:
        slope: whether there is a Rescale Slope.
        intercept: whether there is a Rescale Intercept.
        lut: whether there is a Modality LUT.
        unit: Rescale Type, Modality LUT Type, Units (PET) or the unit of the Real World Value Mapping; empty where it is none.
        photometric: Photometric Interpretation.
        inverse: low values are displayed white.
        signed: Pixel Representation is 1.
        turned_in: Bits Stored, in whose range the values are turned round; 0 where they are not, which have a unit or are not inverse.
    """

    slope: bool
    intercept: bool
    lut: bool
    unit: str
    photometric: str
    inverse: bool
    signed: bool
    turned_in: int

    def named(self) -> dict[str, object]:
        """Each by the standard's name."""
        return {
            "Rescale Slope": self.slope, "Rescale Intercept": self.intercept, "Modality LUT": self.lut, "Rescale Type": self.unit,
            "Photometric Interpretation": self.photometric, "Presentation LUT Shape": self.inverse, "Pixel Representation": self.signed,
            "Bits Stored": self.turned_in,
        }  # fmt: skip


@dataclass(frozen=True)
class SliceHeader:
    """One frame.

    Attributes:
        frame: which of the images it is in, and which frame of that.
        plane: where it lies.
        grey: rescale, padding and Modality LUT; nothing of how it is displayed.
        units: what its values mean.
        modality: Modality.
        shows: the words of Image Type from its fourth value on that say what a pixel shows.
        texts: values of the attributes of ``_TEXTS``.
        figures: values of the attributes of ``_NUMBERS``.
        least_bytes: what one of its pixels takes once it is decoded, at the least.
    """

    frame: tuple[int, int]
    plane: Plane
    grey: GreyHeader
    units: Units
    modality: str
    shows: frozenset[str]
    texts: tuple[str, ...]
    figures: tuple[Numbers, ...]
    least_bytes: int


@dataclass(frozen=True)
class Counted:
    """What an image says of how many there are: its Instance Number (0: none), and the greatest number of images named; its frames."""

    number: int
    said: int
    frames: int


def slice_headers(number: int, ds: Dataset, luts: dict[bytes, Lut]) -> list[SliceHeader]:
    """The headers of an image's frames.

    Args:
        number: which of the images it is.
        ds: the image; its pixels are not looked at.
        luts: the Modality LUTs of the series so far, which images share; changed.

    Raises:
        VolumeError: ``volume.mixed_units``: it is not grey; ``volume.too_large``; ``volume.no_position``.
        PixelError: ``ingest.pixel_attributes``.
    """
    if int(ds.get("SamplesPerPixel") or 1) != 1 or not str(ds.get("PhotometricInterpretation") or "").startswith("MONOCHROME"):
        raise VolumeError("volume.mixed_units", "an image is not grey")
    frames = frame_count(ds)
    if frames > MAX_FRAMES:
        raise VolumeError("volume.too_large", f"{frames} frames")
    grey = replace(grey_header(ds), windows=(), voi_lut=None)  # what only serves display is large and not needed
    if grey.modality_lut is not None:
        grey = replace(grey, modality_lut=_one_of(luts, grey.modality_lut))
    modality = _text(ds.get("Modality"))
    return [_header((number, frame), ds, grey, modality) for frame in range(frames)]


def _one_of(luts: dict[bytes, Lut], lut: Lut) -> Lut:
    """The same table, held once."""
    key = hashlib.sha256(lut.first.to_bytes(8, "little", signed=True) + lut.entries.tobytes()).digest()
    if len(luts) >= _MAX_LUTS and key not in luts:
        raise VolumeError("volume.too_large", f"more than {_MAX_LUTS} look-up tables")
    return luts.setdefault(key, lut)


def _header(frame: tuple[int, int], ds: Dataset, shared: GreyHeader, modality: str) -> SliceHeader:
    slope, intercept = rescale(ds, frame[1])
    return SliceHeader(
        frame, plane_of(ds, frame[1]), replace(shared, slope=slope, intercept=intercept), _units(ds, frame[1], shared, modality), modality,
        _shows(ds, frame[1]), tuple(_text(frame_value(ds, frame[1], group, keyword)) for keyword, group in _TEXTS),
        tuple(_figures(ds, keyword, frame[1], group) for keyword, group, _share, _least in _NUMBERS),
        _least_bytes(ds),
    )  # fmt: skip


def _least_bytes(ds: Dataset) -> int:
    """Of floating-point pixels their own size; else that of the bits stored, for a decoder may leave out those that are not."""
    bits = next((bits for bits, keyword in ((32, "FloatPixelData"), (64, "DoubleFloatPixelData")) if keyword in ds), 0)
    return next(size for size in (1, 2, 4, 8) if 8 * size >= min(64, bits or int(ds.get("BitsStored") or 1)))


def _text(value: Any) -> str:
    """A value of any multiplicity as one text; absent and empty are the same."""
    values = [value] if value is None or isinstance(value, (str, int, float)) else list(value)
    return "\\".join("" if item is None else str(item).strip().upper() for item in values)


def _figures(ds: Dataset, keyword: str, frame: int = 0, group: str = "") -> Numbers:
    """The numbers of an attribute; what cannot be read is as if it were absent."""
    try:
        found = numbers(frame_value(ds, frame, group, keyword))
    except VALUE_ERRORS:
        return ()
    return tuple(number for number in found if math.isfinite(number))


def _shows(ds: Dataset, frame: int) -> frozenset[str]:
    """Frame Type of enhanced images defines its fourth value (PS3.3 C.8.16.1.4); in Image Type anything may stand there."""
    for group in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"):
        if value := frame_value(ds, frame, group, "FrameType"):
            return frozenset(_text(value).split("\\")[3:4])
    return frozenset(_text(ds.get("ImageType")).split("\\")[3:]) & _SHOWS


def _units(ds: Dataset, frame: int, grey: GreyHeader, modality: str) -> Units:
    """What the values mean."""
    slope, intercept = (bool(_figures(ds, name, frame, _RESCALE)) for name in ("RescaleSlope", "RescaleIntercept"))
    unit = _unit(ds, frame, modality)
    turned = grey.inverse and not unit and modality not in _WITH_UNIT
    return Units(
        slope, intercept, grey.modality_lut is not None, unit, _text(ds.get("PhotometricInterpretation")), grey.inverse,
        ds.get("PixelRepresentation") == 1, int(ds.get("BitsStored") or ds.get("BitsAllocated") or 16) if turned else 0,
    )  # fmt: skip


def _unit(ds: Dataset, frame: int, modality: str) -> str:
    """The unit that the header names; empty where it names none, or says that there is none."""
    named = [
        frame_value(ds, frame, _RESCALE, "RescaleType"),
        next((item.get("ModalityLUTType") for item in (ds.get("ModalityLUTSequence") or [])[:1]), None),
        ds.get("Units"),
    ]
    if modality not in _WITH_UNIT:  # elsewhere a mapping goes beside the unit that the values have anyway
        group = "RealWorldValueMappingSequence"
        codes = frame_value(ds, frame, group, "MeasurementUnitsCodeSequence")
        codes = codes or next((item.get("MeasurementUnitsCodeSequence") for item in (ds.get(group) or [])[:1]), None)
        named += [item.get("CodeValue") for item in (codes or [])[:1]]
    for value in map(_text, named):
        if value not in _NO_UNIT and "UNITLESS" not in value:
            return "HU" if value.startswith("HOUNSFIELD") else value
    return ""


def check_contrast(slices: Sequence[SliceHeader]) -> None:
    """Every slice is of the same modality and came about in the same way; asked before positions, for it says more than they do.

    Raises:
        VolumeError: ``volume.mixed_kind`` or ``volume.mixed_acquisition``; the detail names attributes, and of values numbers only.
    """
    if len({item.modality for item in slices}) > 1:
        raise VolumeError("volume.mixed_kind", "slices differ in Modality")
    if len({item.shows for item in slices}) > 1:
        raise VolumeError("volume.mixed_kind", "slices differ in Image Type, value 4")
    for place, (keyword, _group) in enumerate(_TEXTS):
        if len({item.texts[place] for item in slices}) > 1:
            raise VolumeError("volume.mixed_acquisition", f"slices differ in {keyword}")
    for place, (keyword, _group, share, least) in enumerate(_NUMBERS):
        _check_same(keyword, {item.figures[place] for item in slices}, share, least)


def _check_same(keyword: str, found: set[Numbers], share: float, least: float) -> None:
    if len({len(values) for values in found}) > 1:
        raise VolumeError("volume.mixed_acquisition", f"some slices have no {keyword}, or not as many values")
    for values in zip(*found, strict=True):
        low, high = min(values), max(values)
        if high - low > max(share * abs(low), least):
            raise VolumeError("volume.mixed_acquisition", f"{keyword} from {low:g} to {high:g}")


def check_units(slices: Sequence[SliceHeader]) -> None:
    """Stored values mean the same in every slice, up to the figures of the rescale, and have the unit that their modality stands for.

    Raises:
        VolumeError: ``volume.no_units``: a CT or PET without both halves of its rescale, or a CT in another unit than HU; or
            ``volume.mixed_units``.
    """
    first = slices[0].units
    for item in slices:
        _check_unit(item.modality, item.units)
        if item.units != first:
            names = [name for name, value in item.units.named().items() if first.named()[name] != value]
            raise VolumeError("volume.mixed_units", f"slices differ in {', '.join(names)}")


def _check_unit(modality: str, units: Units) -> None:
    known = units.unit == "HU" if units.lut else units.slope and units.intercept
    if (modality in _RESCALED or units.unit == "HU") and not known:
        raise VolumeError("volume.no_units", f"no Rescale {'Intercept' if units.slope else 'Slope'}")
    if modality == "CT" and units.unit not in ("", "HU"):
        raise VolumeError("volume.no_units", "a CT that is not in HU")


def counted(ds: Dataset) -> Counted:
    """What an image says of how many there are: Instance Number, Images in Acquisition, and Number of Slices (PET)."""
    said = (number for key in ("ImagesInAcquisition", "NumberOfSlices") for number in _figures(ds, key) if number <= _MAX_NUMBER)
    numbered = (number for number in _figures(ds, "InstanceNumber") if number <= _MAX_NUMBER)
    return Counted(int(next(numbered, 0.0)), int(max(said, default=0.0)), frame_count(ds))


def incomplete(images: Sequence[Counted]) -> Note | None:
    """A note that images seem to be missing, which positions cannot tell of a slice at either end; no proof, hence no refusal.

    Instance Numbers count when no two images share one: holes among them, and a beginning above 1 that is less than the number of
    images. A series that begins higher is a later part of something longer, as scanners number phases and echoes.
    """
    have = sum(image.frames for image in images)
    expected = max(image.said for image in images)
    numbered = sorted({image.number for image in images})
    if have == len(images) == len(numbered) > 1 and numbered[0] > 0:
        stride = math.gcd(*(later - earlier for earlier, later in pairwise(numbered)))
        span, before = (numbered[-1] - numbered[0]) // stride + 1, (numbered[0] - 1) // stride
        for more in (span - have, before):
            expected = max(expected, have + more if more < have else 0)
    return Note("volume.incomplete", f"{have} / {expected}") if expected > have else None
