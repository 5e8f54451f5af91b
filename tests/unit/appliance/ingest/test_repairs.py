"""Files that break the format but hold their complete pixels are repaired with a caution; others are refused with the true reason."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from appliance.core.domain import Source
from appliance.core.errors import ApplianceError
from appliance.imaging.dicom_files import read_dataset
from appliance.imaging.pixels import decode_frame
from appliance.ingest.archive import accept_file
from appliance.ingest.ingest import Ingest
from appliance.store.store import Store
from tests.support.scans import scan_bytes

SOURCE = Source("cli", "test")
DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"


def parts(data: bytes) -> tuple[bytes, bytes]:
    """The file before its data set, and the data set."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    end = 132 + 12 + int(dataset.file_meta.FileMetaInformationGroupLength)
    return data[:end], data[end:]


def pixels(store: Store, ingest: Ingest, data: bytes) -> tuple[np.ndarray, set[str]]:
    """The stored pixels of an accepted file, and the codes of its notes."""
    accepted = ingest.accept(data, SOURCE)
    stored = read_dataset(store.read_instance(accepted.stored.instance_id))
    return decode_frame(stored), {note.code for note in accepted.scan.notes}


@pytest.fixture
def ingest(store: Store) -> Ingest:
    return Ingest(store)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("cut", ["preamble", "preamble and meta group"])
def test_no_preamble(store: Store, ingest: Ingest, syntax: str, cut: str) -> None:
    data = scan_bytes(transfer_syntax_uid=syntax)
    expected = decode_frame(read_dataset(data))
    shown, notes = pixels(store, ingest, data[132:] if cut == "preamble" else parts(data)[1])
    assert np.array_equal(shown, expected)
    assert notes >= {"caution.repaired"}


def test_native_pixels_under_a_compressed_label(store: Store, ingest: Ingest) -> None:
    data = scan_bytes()
    shown, notes = pixels(store, ingest, relabelled(data, JPEG2000Lossless))
    assert np.array_equal(shown, decode_frame(read_dataset(data)))
    assert notes >= {"caution.repaired"}


def relabelled(data: bytes, syntax: str) -> bytes:
    """The file with another transfer syntax in its meta group and the same data set."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = pydicom.filebase.DicomBytesIO()
    pydicom.filewriter.write_file_meta_info(buffer, dataset.file_meta)
    return data[:132] + buffer.getvalue() + parts(data)[1]


def test_native_pixels_that_are_too_short_under_a_compressed_label(ingest: Ingest) -> None:
    data = relabelled(scan_bytes(PixelData=b"\0\0" * 8), JPEG2000Lossless)
    with pytest.raises(ApplianceError) as caught:
        ingest.accept(data, SOURCE)
    assert caught.value.code == "ingest.pixels"


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not closed": (lambda data: data[: -len(DELIMITER)], ""),
    "closed by zeros": (lambda data: data[: -len(DELIMITER)] + bytes(8), ""),
    "cut in its last fragment": (lambda data: data[:-5000], "ingest.not_closed"),
    "cut, then closed": (lambda data: data[:-5000] + DELIMITER, "ingest.truncated"),
    "not closed, and something else behind it": (lambda data: data[: -len(DELIMITER)] + b"garbage!", "ingest.not_closed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_compressed_image_that_is_not_closed(shared: Path, store: Store, ingest: Ingest, damage: str) -> None:
    data = (shared / "data" / "field" / "j2k_not_closed.dcm").read_bytes() + DELIMITER
    change, code = DAMAGE[damage]
    if code:
        with pytest.raises(ApplianceError) as caught:
            ingest.accept(change(data), SOURCE)
        assert caught.value.code == code
        return
    shown, notes = pixels(store, ingest, change(data))
    assert np.array_equal(shown, decode_frame(read_dataset(data)))
    assert notes >= {"caution.repaired"}
    again = ingest.accept(change(data), SOURCE)
    assert again.stored.outcome == "duplicate"


@pytest.mark.parametrize("kind", ["zip in zip", "gzip in zip", "gzip"])
def test_what_is_not_unpacked_is_refused_by_name(store: Store, ingest: Ingest, tmp_path: Path, kind: str) -> None:
    data = scan_bytes()
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a.dcm", data)
    path = tmp_path / "file"
    if kind == "gzip":
        path.write_bytes(gzip.compress(data))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inner", inner.getvalue() if kind == "zip in zip" else gzip.compress(data))
    (outcome,) = accept_file(ingest, store.settings, path, "name", SOURCE)
    assert (outcome.name, outcome.code) == ("name" if kind == "gzip" else "name!/inner", "ingest.nested_archive")
    assert store.database.one("SELECT code FROM rejections") is not None
