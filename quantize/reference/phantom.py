"""Synthetic chest X-rays: as arrays, as DICOM files, and as the small sample set that the demo and the tests read.

``python -m quantize.reference.phantom OUT_DIR`` writes the sample set: a normal chest, one with an opacity, a lateral
view (out of scope), a blank exposure (rejected for its quality) and a PNG. The same seed gives the same picture and the
same UIDs, so a second import of the set is recognised. The names are made up and the marker PHANTOM is in the picture.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from quantize.errors import DONE, run_command
from quantize.reference import anatomy
from quantize.reference.anatomy import Opacity

__all__ = ["SAMPLES", "Opacity", "Phantom", "Sample", "dataset", "display", "drawn_opacity", "main", "stored", "uid", "write_samples"]

# A fixed name space: PS3.5 B.2 makes a UID of a UUID, and a version 5 UUID makes the UUID of a name.
_NAMESPACE = uuid.UUID("5c1f1c5e-2f0a-5f0e-9d2c-0b6c1d0f7a11")
_FILM_HEIGHT_MM = 430.0
_DRAWN_ROWS = 1024
# Attenuation that is shown black, and the span up to white.
_BLACK, _SPAN = 0.02, 1.12


@dataclass(frozen=True)
class Phantom:
    """What to draw.

    Attributes:
        rows: Height in pixels.
        cols: Width in pixels; a picture narrower than high is cut at the sides.
        seed: Another seed gives other vessels, other noise and another shape of the opacity.
        view: PA, a lateral LL, or ``blank``: an exposure with nothing before the plate.
        opacity: A consolidation, or None for a normal chest.
    """

    rows: int = 1280
    cols: int = 1088
    seed: int = 1
    view: Literal["PA", "LL", "blank"] = "PA"
    opacity: Opacity | None = None


@dataclass(frozen=True)
class Sample:
    """One file of the sample set; ``name`` ends in .dcm or .png."""

    name: str
    phantom: Phantom
    patient_name: str
    patient_id: str
    age: str


# Devices write Chinese names in two ways: with a phonetic group and without.
SAMPLES: tuple[Sample, ...] = (
    Sample("01-normal.dcm", Phantom(seed=1), "Yanshi^Yi=演示^一", "DEMO-0001", "004Y"),
    Sample("02-opacity.dcm", Phantom(seed=2, opacity=Opacity()), "演示^二", "DEMO-0002", "045Y"),
    Sample("03-lateral.dcm", Phantom(seed=3, view="LL"), "Yanshi^San=演示^三", "DEMO-0003", "004Y"),
    Sample("04-blank.dcm", Phantom(seed=4, view="blank"), "演示^四", "DEMO-0004", "004Y"),
    Sample("05-film.png", Phantom(seed=6, opacity=Opacity(x=-0.20, y=0.42, size=0.12, strength=0.9)), "演示^五", "DEMO-0005", ""),
)


def intensity(phantom: Phantom) -> NDArray[np.float32]:
    """Draw ``phantom``: float32 [rows, cols], 0 black to 1 white, with the grain of the detector."""
    rng = np.random.default_rng(phantom.seed)
    shape = (phantom.rows, phantom.cols)
    if phantom.view == "blank":
        return np.asarray(0.06 + 0.0008 * rng.standard_normal(shape, dtype=np.float32), dtype=np.float32)
    # Anatomy is smooth: it is drawn at half size where the picture is large, the grain always at full size.
    factor = max(1, round(phantom.rows / _DRAWN_ROWS))
    rows, cols = -(-phantom.rows // factor), -(-phantom.cols // factor)
    lateral = phantom.view == "LL"
    tau = anatomy.lateral(rows, cols, rng) if lateral else anatomy.frontal(rows, cols, rng, phantom.opacity)
    picture = np.clip((tau - _BLACK) / _SPAN, 0, 1)
    picture = np.maximum(picture, _marker(rows, cols))
    if factor > 1:
        enlarged = Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BILINEAR)
        picture = np.asarray(enlarged, dtype=np.float32)
    grain = rng.standard_normal(shape, dtype=np.float32)
    # Fewer quanta arrive behind dense tissue, so the grain is coarser there.
    return np.asarray(np.clip(0.02 + 0.96 * picture + (0.004 + 0.008 * picture) * grain, 0, 1), dtype=np.float32)


def display(phantom: Phantom) -> NDArray[np.uint8]:
    """Draw ``phantom`` as displayed: uint8 [rows, cols], MONOCHROME2."""
    return np.asarray(np.rint(intensity(phantom) * 255), dtype=np.uint8)


def drawn_opacity(phantom: Phantom) -> NDArray[np.float32]:
    """Return what the opacity of a frontal ``phantom`` adds to the attenuation: float32 [rows, cols], 0 where there is none.

    Raises:
        ValueError: the phantom is larger than what is drawn at full size, or not frontal.
    """
    if phantom.view != "PA" or phantom.rows > _DRAWN_ROWS:
        raise ValueError(f"no opacity of a {phantom.view} phantom of {phantom.rows} rows can be returned")
    rng = np.random.default_rng(phantom.seed)
    return np.asarray(anatomy.frontal_parts(phantom.rows, phantom.cols, rng, phantom.opacity)[1], np.float32)


def stored(phantom: Phantom, bits: int = 12) -> NDArray[np.uint16]:
    """Draw ``phantom`` as a detector stores it: uint16 [rows, cols] of ``bits`` bits, high is dense.

    The window that shows it is the middle nine tenths of the range: see ``dataset``.
    """
    full = (1 << bits) - 1
    return np.asarray(np.rint(intensity(phantom) * (0.9 * full) + 0.05 * full), dtype=np.uint16)


def uid(*names: str | int) -> UID:
    """Return the UID of a name: below 2.25, always the same for the same name."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(map(str, names))).int}")


def dataset(
    phantom: Phantom,
    *,
    name: str,
    patient_name: str = "Yanshi^Ceshi=演示^测试",
    patient_id: str = "DEMO-9999",
    age: str = "004Y",
    bits: int = 12,
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = "MONOCHROME2",
) -> Dataset:
    """Return a complete CR image (PS3.3 A.2), Explicit VR Little Endian; ``name`` decides its UIDs."""
    pixels = stored(phantom, bits)
    if photometric == "MONOCHROME1":
        pixels = ((1 << bits) - 1 - pixels).astype(np.uint16)
    ds = Dataset()
    ds.SpecificCharacterSet = "GB18030"
    _identify(ds, name, patient_name, patient_id, age)
    _acquire(ds, phantom)
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = photometric
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    ds.PixelRepresentation = 0
    # One half more than the middle value: PS3.3 C.11.2.1.2 maps (c - 0.5) to the middle of the shown range.
    ds.WindowCenter, ds.WindowWidth = f"{(1 << bits) / 2:.1f}", f"{0.9 * ((1 << bits) - 1) + 1:.1f}"
    ds.PixelData = pixels.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    return ds


def write_samples(directory: Path, samples: Sequence[Sample] = SAMPLES) -> list[Path]:
    """Write the sample set into ``directory``, created if absent, and return the files in the order of the set."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for sample in samples:
        path = directory / sample.name
        if path.suffix == ".png":
            Image.fromarray(display(sample.phantom)).save(path, optimize=False)
        else:
            ds = dataset(
                sample.phantom,
                name=path.stem,
                patient_name=sample.patient_name,
                patient_id=sample.patient_id,
                age=sample.age,
            )
            ds.save_as(path, enforce_file_format=True)
        written.append(path)
    return written


def _identify(ds: Dataset, name: str, patient_name: str, patient_id: str, age: str) -> None:
    """Fill the SOP common, patient, study and series modules and the file meta information."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = uid("implementation")
    ds.file_meta.ImplementationVersionName = "PHANTOM_1"
    ds.SOPClassUID = ComputedRadiographyImageStorage
    ds.SOPInstanceUID = uid(name, "instance")
    ds.StudyInstanceUID = uid(name, "study")
    ds.SeriesInstanceUID = uid(name, "series")
    ds.PatientName, ds.PatientID = patient_name, patient_id
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "", "O", age
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20250106"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "083000"
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.StudyID = "", "", "1"
    ds.StudyDescription, ds.SeriesDescription = "合成胸部体模（演示）", "Synthetic chest phantom"
    ds.SeriesNumber, ds.InstanceNumber = 1, 1


def _acquire(ds: Dataset, phantom: Phantom) -> None:
    """Fill the CR series, equipment, general image and CR image modules."""
    ds.Modality, ds.BodyPartExamined = "CR", "CHEST"
    ds.ViewPosition = "LL" if phantom.view == "LL" else "PA"
    ds.Manufacturer, ds.ManufacturerModelName = "Synthetic", "Chest phantom"
    ds.InstitutionName, ds.SoftwareVersions = "演示诊所", "1"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.PatientOrientation = ["A", "F"] if phantom.view == "LL" else ["L", "F"]
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    pitch = f"{_FILM_HEIGHT_MM / phantom.rows:.6f}"
    ds.ImagerPixelSpacing = [pitch, pitch]


def _marker(rows: int, cols: int) -> NDArray[np.float32]:
    """Return lead letters in the corner, so that nobody takes the picture for a patient's."""
    picture = Image.new("L", (cols, rows))
    draw = ImageDraw.Draw(picture)
    at = cols * 0.04, rows * 0.03
    draw.text(at, "R", fill=235, font=ImageFont.load_default(rows * 0.035))
    draw.text((at[0], at[1] + rows * 0.042), "PHANTOM", fill=215, font=ImageFont.load_default(rows * 0.015))
    return np.asarray(np.asarray(picture) / 255, dtype=np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sample set and print the paths of its files."""
    parser = argparse.ArgumentParser(prog="python -m quantize.reference.phantom", description=main.__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory to write into; created if absent")
    options = parser.parse_args(argv)
    return run_command(lambda: _print_paths(write_samples(options.out)))


def _print_paths(paths: Sequence[Path]) -> int:
    print(*paths, sep="\n")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
