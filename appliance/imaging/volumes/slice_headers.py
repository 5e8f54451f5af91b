"""The headers of the slices of a series, and whether they belong to one volume: position, meaning of the values, and acquisition.

Positions alone do not distinguish a second echo, a scan after contrast or another reconstruction from further slices of the same volume.
So every attribute that changes the meaning of a grey value must be the same in all slices. Attributes that vary within normal series
(tube current, acquisition number, window, trigger time) are ignored.
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
from appliance.imaging.greyscale import GreyHeader, Lut, frame_type, frame_value, grey_header, numbers, rescale, words
from appliance.imaging.pixel_checks import VALUE_ERRORS
from appliance.imaging.pixels import frame_count
from appliance.imaging.volumes.geometry import Plane, plane_of

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Numbers: TypeAlias = tuple[float, ...]

MAX_FRAMES: Final = 4096
# A table of 65,536 entries takes half a megabyte.
_MAX_LUTS: Final = 128
# Image counts and numbers above this are not plausible; neither are gaps larger than the number of images present.
_MAX_NUMBER: Final = 64_000

_RESCALE: Final = "PixelValueTransformationSequence"
# Modalities whose values have a unit however they are displayed: HU, activity, counts. PET is usually displayed black on white.
_WITH_UNIT: Final = frozenset({"CT", "PT", "NM"})
# Rescale Slope and Intercept are type 1 in both (PS3.3 C.8.2.1, C.8.9.4): without them the stored values are not HU or Bq/ml.
_RESCALED: Final = frozenset({"CT", "PT"})
_NO_UNIT: Final = frozenset({"", "US", "UNSPECIFIED", "NORMALIZED", "NONE", "1"})

# Texts that must be the same: keyword, and its functional group in enhanced images (PS3.3 C.7.6.16, C.8.13, C.8.15).
_TEXTS: Final = (
    ("EchoNumbers", ""),
    ("ContrastBolusAgent", ""),
    ("ContrastBolusAgentAdministered", "ContrastBolusUsageSequence"),
    ("ContrastBolusAgentPhase", "ContrastBolusUsageSequence"),
    ("ConvolutionKernel", "CTReconstructionSequence"),
    ("AcquisitionContrast", "MRImageFrameTypeSequence"),
    ("ComplexImageComponent", "MRImageFrameTypeSequence"),
)
# Numbers that must be the same within a relative or an absolute tolerance (ms, s/mm2): scanners round, and a repetition time that the
# heart or the breath triggers varies a little.
_NUMBERS: Final = (
    ("EchoTime", "", 0.02, 0.05),
    ("EffectiveEchoTime", "MREchoSequence", 0.02, 0.05),
    ("RepetitionTime", "MRTimingAndRelatedParametersSequence", 0.1, 1.0),
    ("InversionTime", "", 0.05, 5.0),
    ("InversionTimes", "MRModifierSequence", 0.05, 5.0),
    ("DiffusionBValue", "MRDiffusionSequence", 0.05, 5.0),
)
# Values of Image Type from the fourth on that define what a pixel shows; scanners write filters there too.
_SHOWS: Final = frozenset({
    "WATER", "FAT", "W", "F", "IP", "OP", "IN_PHASE", "OUT_PHASE", "OPP_PHASE", "OPPOSED_PHASE", "FAT_FRACTION", "WATER_FAT", "M", "P",
    "R", "I", "MAGNITUDE", "PHASE", "PHASE MAP", "REAL", "IMAGINARY", "ADC", "EADC", "FA", "TRACEW", "TRACE", "DIFFUSION", "T1 MAP",
    "T2 MAP", "T2_STAR MAP", "MIP", "MINIP", "MPR", "SUB", "SUBTRACTION", "PERFUSION", "CBF", "CBV", "MTT", "TTP", "VMI",
    "MAT_SPECIFIC", "MAT_REMOVED", "MAT_FRACTIONAL", "MAT_VALUE_BASED", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY",
})  # fmt: skip


@dataclass(frozen=True)
class Units:
    """The meaning of stored values, which must be the same for all slices of a volume.

    Attributes:
        slope: whether there is a Rescale Slope.
        intercept: whether there is a Rescale Intercept.
        lut: whether there is a Modality LUT.
        unit: Rescale Type, Modality LUT Type, Units (PET) or the unit of the Real World Value Mapping; empty where there is none.
        photometric: Photometric Interpretation.
        inverse: low values are displayed white.
        signed: Pixel Representation is 1.
        inverted_bits: Bits Stored where the values have to be inverted in that range; 0 where they have a unit or are not inverse.
    """

    slope: bool
    intercept: bool
    lut: bool
    unit: str
    photometric: str
    inverse: bool
    signed: bool
    inverted_bits: int

    def named(self) -> dict[str, object]:
        """The attributes by the names of the standard."""
        return {
            "Rescale Slope": self.slope, "Rescale Intercept": self.intercept, "Modality LUT": self.lut, "Rescale Type": self.unit,
            "Photometric Interpretation": self.photometric, "Presentation LUT Shape": self.inverse, "Pixel Representation": self.signed,
            "Bits Stored": self.inverted_bits,
        }  # fmt: skip


@dataclass(frozen=True)
class SliceHeader:
    """The header of one frame.

    Attributes:
        frame: index of its image, and of the frame in that.
        plane: its position.
        grey: rescale, padding and Modality LUT, without display attributes.
        units: the meaning of its values.
        modality: Modality.
        shows: the values of Image Type from the fourth on that define what a pixel shows.
        texts: values of the attributes of ``_TEXTS``.
        figures: values of the attributes of ``_NUMBERS``.
        least_bytes: minimum size of one decoded pixel.
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
class ImageCount:
    """Instance Number of an image (0: none), the number of images that its header states, and its number of frames."""

    number: int
    stated: int
    frames: int


def slice_headers(number: int, ds: Dataset, luts: dict[bytes, Lut]) -> list[SliceHeader]:
    """Read the headers of the frames of the image with this number in the series; its pixels are not read.

    ``luts`` are the Modality LUTs of the series so far, which its images share; those of this image are added.

    Raises:
        VolumeError: ``volume.mixed_units``: the image is not grey; ``volume.too_large``; ``volume.no_position``.
        PixelError: ``ingest.pixel_attributes``.
    """
    if int(ds.get("SamplesPerPixel") or 1) != 1 or not str(ds.get("PhotometricInterpretation") or "").startswith("MONOCHROME"):
        raise VolumeError("volume.mixed_units", "an image is not grey")
    frames = frame_count(ds)
    if frames > MAX_FRAMES:
        raise VolumeError("volume.too_large", f"{frames} frames")
    grey = replace(grey_header(ds), windows=(), voi_lut=None)  # display attributes are large and not needed
    if grey.modality_lut is not None:
        grey = replace(grey, modality_lut=_one_of(luts, grey.modality_lut))
    modality = _text(ds.get("Modality"))
    return [_header((number, frame), ds, grey, modality) for frame in range(frames)]


def _one_of(luts: dict[bytes, Lut], lut: Lut) -> Lut:
    """Return the equal table of an earlier image, so that it is in memory once."""
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
    """The size of floating-point pixels, else that of Bits Stored, since a decoder may drop the other bits."""
    bits = next((bits for bits, keyword in ((32, "FloatPixelData"), (64, "DoubleFloatPixelData")) if keyword in ds), 0)
    return next(size for size in (1, 2, 4, 8) if 8 * size >= min(64, bits or int(ds.get("BitsStored") or 1)))


def _text(value: Any) -> str:
    """Convert a value of any multiplicity to one text; absent and empty are the same."""
    return "\\".join(words(value))


def _figures(ds: Dataset, keyword: str, frame: int = 0, group: str = "") -> Numbers:
    """The numbers of an attribute; an unreadable value counts as absent."""
    try:
        return tuple(filter(math.isfinite, numbers(frame_value(ds, frame, group, keyword))))
    except VALUE_ERRORS:
        return ()


def _shows(ds: Dataset, frame: int) -> frozenset[str]:
    """The value 4 of Frame Type (PS3.3 C.8.16.1.4), else the known values of Image Type, where scanners write anything."""
    kind = frame_type(ds, frame)
    return frozenset(kind[3:4]) if kind else frozenset(words(ds.get("ImageType"))[3:]) & _SHOWS


def _units(ds: Dataset, frame: int, grey: GreyHeader, modality: str) -> Units:
    """Read the meaning of the values of a frame."""
    slope, intercept = (bool(_figures(ds, name, frame, _RESCALE)) for name in ("RescaleSlope", "RescaleIntercept"))
    unit = _unit(ds, frame, modality)
    is_inverted = grey.inverse and not unit and modality not in _WITH_UNIT
    return Units(
        slope, intercept, grey.modality_lut is not None, unit, _text(ds.get("PhotometricInterpretation")), grey.inverse,
        ds.get("PixelRepresentation") == 1, int(ds.get("BitsStored") or ds.get("BitsAllocated") or 16) if is_inverted else 0,
    )  # fmt: skip


def _unit(ds: Dataset, frame: int, modality: str) -> str:
    """The unit in the header; empty where there is none."""
    named = [
        frame_value(ds, frame, _RESCALE, "RescaleType"),
        next((item.get("ModalityLUTType") for item in (ds.get("ModalityLUTSequence") or [])[:1]), None),
        ds.get("Units"),
    ]
    if modality not in _WITH_UNIT:  # with a unit such a mapping is an additional one
        group = "RealWorldValueMappingSequence"
        codes = frame_value(ds, frame, group, "MeasurementUnitsCodeSequence")
        codes = codes or next((item.get("MeasurementUnitsCodeSequence") for item in (ds.get(group) or [])[:1]), None)
        named += [item.get("CodeValue") for item in (codes or [])[:1]]
    for value in map(_text, named):
        if value not in _NO_UNIT and "UNITLESS" not in value:
            return "HU" if value.startswith("HOUNSFIELD") else value
    return ""


def check_contrast(slices: Sequence[SliceHeader]) -> None:
    """Check that all slices have the same modality and acquisition; done before positions, since its errors say more.

    Raises:
        VolumeError: ``volume.mixed_kind`` or ``volume.mixed_acquisition``; the detail names attributes, and only numbers as values.
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


def _check_same(keyword: str, different: set[Numbers], share: float, least: float) -> None:
    if len({len(values) for values in different}) > 1:
        raise VolumeError("volume.mixed_acquisition", f"some slices have no {keyword}, or not as many values")
    for values in zip(*different, strict=True):
        low, high = min(values), max(values)
        if high - low > max(share * abs(low), least):
            raise VolumeError("volume.mixed_acquisition", f"{keyword} from {low:g} to {high:g}")


def check_units(slices: Sequence[SliceHeader]) -> None:
    """Check that stored values have the same meaning in all slices, apart from the rescale numbers, and the unit of their modality.

    Raises:
        VolumeError: ``volume.no_units``: a CT or PET without Rescale Slope or Intercept, or a CT in another unit than HU; or
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


def image_count(ds: Dataset) -> ImageCount:
    """Read Instance Number, Images in Acquisition and Number of Slices (PET)."""
    stated = (number for key in ("ImagesInAcquisition", "NumberOfSlices") for number in _figures(ds, key) if number <= _MAX_NUMBER)
    numbered = (number for number in _figures(ds, "InstanceNumber") if number <= _MAX_NUMBER)
    return ImageCount(int(next(numbered, 0.0)), int(max(stated, default=0.0)), frame_count(ds))


def missing_images_note(images: Sequence[ImageCount]) -> Note | None:
    """Return a note where images seem to be missing. It is not certain, so the series is not refused.

    Positions do not show a missing slice at either end. Where Instance Numbers are unique, gaps in them count as missing, and so do
    numbers before the first, unless these would be at least as many as the images: scanners number phases and echoes consecutively.
    """
    have = sum(image.frames for image in images)
    expected = max(image.stated for image in images)
    numbered = sorted({image.number for image in images})
    if have == len(images) == len(numbered) > 1 and numbered[0] > 0:
        stride = math.gcd(*(later - earlier for earlier, later in pairwise(numbered)))
        span, before = (numbered[-1] - numbered[0]) // stride + 1, (numbered[0] - 1) // stride
        for more in (span - have, before):
            expected = max(expected, have + more if more < have else 0)
    return Note("volume.incomplete", f"{have} / {expected}") if expected > have else None
