"""The grey levels of the viewer and of the model against dcm2pnm (DCMTK), which implements PS3.3 C.11 on its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from appliance.core.errors import ApplianceError
from appliance.imaging.dicom_files import PARSE_ERRORS, read_dataset
from appliance.imaging.display_frame import DisplayFrame, display_frame
from appliance.imaging.greyscale import GreyHeader, display_grey, grey_header, without_windows_outside
from appliance.imaging.pixels import decode_frame
from tests.conftest import SHARED

# DCMTK shows a window of negative width like none.
NOT_COMPARED = {"window_width_negative_pos.dcm"}
_JPEG = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"}
_JPEG_LS = {"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"}


def files() -> list[Path]:
    folders = (SHARED / "data" / "dicom", SHARED / "data" / "field")
    return [path for folder in folders for path in sorted(folder.glob("*.dcm")) if path.name not in NOT_COMPARED]


def read(path: Path) -> tuple[Dataset | None, DisplayFrame | None, GreyHeader | None]:
    """The file, its first frame for the viewer, and its grey header; None for what is refused or coloured."""
    try:
        ds = read_dataset(path.read_bytes())
        frame = display_frame(ds)
        return ds, frame, None if frame.photometric == "RGB" else grey_header(ds)
    except (*PARSE_ERRORS, ApplianceError):
        return None, None, None


def dcmtk_levels(path: Path, ds: Dataset, option: str, picture: Path) -> np.ndarray | None:
    """The first frame as dcm2pnm draws it; None where it cannot."""
    syntax = str(ds.file_meta.TransferSyntaxUID)
    tool = "dcmj2pnm" if syntax in _JPEG else "dcml2pnm" if syntax in _JPEG_LS else "dcm2pnm"
    done = subprocess.run([tool, option, "1", "-O", "+on", "--frame", "1", str(path), str(picture)], capture_output=True, check=False)
    return np.asarray(Image.open(picture).convert("L")).astype(int) if done.returncode == 0 and picture.is_file() else None


def test_grey_levels_are_within_one_of_dcm2pnm(shared: Path, tmp_path: Path) -> None:
    assert shared
    wrong, compared, luts = [], 0, 0
    for path in files():
        ds, frame, header = read(path)
        if ds is None or frame is None or header is None or not frame.orientation.is_upright or not (header.voi_lut or header.windows):
            continue
        expected = dcmtk_levels(path, ds, "+Wl" if header.voi_lut else "+Wi", tmp_path / f"{path.stem}.png")
        if expected is None:
            continue
        unit = frame.windows[0].apply(frame.pixels.astype(np.float64) * frame.slope + frame.intercept)
        viewer = np.rint(255 * (1 - unit if frame.photometric == "MONOCHROME1" else unit))
        pixels = decode_frame(ds)
        model, _ = display_grey(pixels, without_windows_outside(header, pixels), "minmax", int(ds.BitsStored))
        hidden = (model == 0) & (viewer != 0) if header.padding else np.zeros(model.shape, bool)  # padding is black for the model only
        if np.abs(viewer - expected).max() > 1 or np.abs(model.astype(int) - expected)[~hidden].max() > 1:
            wrong.append(path.name)
        compared, luts = compared + 1, luts + bool(header.voi_lut)
    assert wrong == []
    assert compared >= 30
    assert luts >= 3
