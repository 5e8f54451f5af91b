"""Read one image of a set from DICOM, PNG, JPEG or npz as the tensor that the model takes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from appliance.core.errors import ApplianceError
from appliance.imaging.pictures import grey_values
from appliance.imaging.pixels import frame_count
from appliance.imaging.preprocessing import from_display, to_tensor
from model_sync.bundle import InputSpec

SUFFIXES: Final = frozenset({".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".npz"})
_PICTURES: Final = frozenset({".png", ".jpg", ".jpeg"})
_MAGIC_AT: Final = 128


class UnreadableError(Exception):
    """An image cannot be read; the text gives the reason."""


@dataclass(frozen=True)
class LoadedImage:
    """One image as the model takes it.

    Attributes:
        tensor: float32 [1, channels, height, width].
        modality: of a DICOM file; None where the file has no such thing.
        patient: of a DICOM file, "" elsewhere. It never leaves this process.
        source: manufacturer and model of the device, "" elsewhere.
    """

    tensor: NDArray[np.float32]
    modality: str | None = None
    patient: str = ""
    source: str = ""


def find_image_files(directory: Path) -> Iterator[Path]:
    """Yield every picture file below ``directory``, by name; a file without a suffix counts when it is DICOM (PS3.10 7.1)."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and (path.suffix.lower() in SUFFIXES or (not path.suffix and _is_dicom(path))):
            yield path


def count_images(path: Path) -> int:
    """Return the number of images in a file.

    Raises:
        UnreadableError: it is no npz with pictures.
    """
    if path.suffix.lower() != ".npz":
        return 1
    pixels = _npz(path)
    return 1 if pixels.ndim == 2 else len(pixels)


def read_image(path: Path, index: int, spec: InputSpec) -> LoadedImage:
    """Read one image with the preprocessing of the box.

    Raises:
        UnreadableError: it is damaged, or nothing that a box reads.
    """
    pixels = _as_displayed(path, index)
    return _dicom(path, spec) if pixels is None else LoadedImage(from_display(pixels, spec).tensor)


def read_displayed(path: Path, index: int, spec: InputSpec) -> NDArray[np.uint8]:
    """Return one image as displayed, uint8 [rows, columns].

    Raises:
        UnreadableError: as :func:`read_image`.
    """
    pixels = _as_displayed(path, index)
    if pixels is not None:
        return pixels
    ds = _dataset(path)
    try:
        return to_tensor(ds, spec).display
    except ApplianceError as error:
        raise UnreadableError(error.code) from error


def _as_displayed(path: Path, index: int) -> NDArray[np.uint8] | None:
    """Return an image that is stored as displayed; None for DICOM."""
    suffix = path.suffix.lower()
    if suffix in _PICTURES:
        return _read_grey_file(path)
    if suffix != ".npz":
        return None
    pixels = _npz(path)
    return pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[index])


def _read_grey_file(path: Path) -> NDArray[np.uint8]:
    try:
        pixels = grey_values(path.read_bytes())
    except ApplianceError as error:
        raise UnreadableError(error.detail or error.code) from error
    if pixels.itemsize != 1:
        raise UnreadableError("16 bits without a window: give the DICOM file, or 8 bits as displayed")
    return pixels.astype(np.uint8, copy=False)


def _npz(path: Path) -> NDArray[np.uint8]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            pixels: NDArray[Any] = arrays["pixels"]
    except (KeyError, ValueError, EOFError, OSError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UnreadableError("an npz needs `pixels`") from error
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size:
        raise UnreadableError("`pixels` must be uint8 [rows, columns] or [n, rows, columns], as displayed")
    return pixels


def _dicom(path: Path, spec: InputSpec) -> LoadedImage:
    ds = _dataset(path)
    try:
        if (frames := frame_count(ds)) != 1:
            raise UnreadableError(f"{frames} frames; a set holds single pictures")
        tensor = to_tensor(ds, spec).tensor
        texts = [str(ds.get(name) or "").strip() for name in ("Modality", "PatientID", "Manufacturer", "ManufacturerModelName")]
    except ApplianceError as error:
        raise UnreadableError(error.code) from error
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:  # header values that pydicom cannot parse
        raise UnreadableError(f"the header makes no sense ({type(error).__name__})") from error
    return LoadedImage(tensor, texts[0], texts[1], " ".join(texts[2:]).strip())


def _dataset(path: Path) -> Dataset:
    try:
        return pydicom.dcmread(path)
    except InvalidDicomError as error:
        raise UnreadableError("no DICOM file") from error
    except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        raise UnreadableError(f"damaged ({type(error).__name__})") from error


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(_MAGIC_AT)
        return stream.read(4) == b"DICM"
