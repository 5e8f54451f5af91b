"""The only way for images into the box: parse, check limits, validate UIDs, store durably, or refuse with a reason.

``accept`` takes DICOM (PS3.10 files), ``accept_picture`` a PNG or JPEG that becomes a Secondary Capture. Both return only after the image
is durable, or raise an error with a code. A refusal is recorded, so that people can see what became of a file.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Final

from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian

from appliance.core.domain import Note, PictureForm, Scan, Source, StoredImage
from appliance.core.errors import ApplianceError, IngestError, PixelError, StoreError
from appliance.imaging.dicom_files import PARSE_ERRORS, accept_invalid_values
from appliance.imaging.pixels import check_structure
from appliance.ingest.description import describe
from appliance.ingest.repairs import PREAMBLE_BYTES, REPAIRED_PIXEL_DATA, UNCLOSED_PIXEL_DATA, meta_end, repair_pixel_data, repair_wrapping
from appliance.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydicom.dataset import FileDataset
    from pydicom.tag import BaseTag

logger = logging.getLogger(__name__)

MAX_ELEMENTS: Final = 50_000
MAX_ITEMS: Final = 200_000
_ITEM_TAGS: Final = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
_PIXEL_TAGS: Final = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10", b"\xe0\x7f\x08\x00", b"\xe0\x7f\x09\x00")


@dataclass(frozen=True)
class AcceptedScan:
    """An image that is stored durably: its row ids and its attributes."""

    stored: StoredImage
    scan: Scan


class Ingest:
    """Accepts images into the store of a box."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hashing = ThreadPoolExecutor(2, thread_name_prefix="hash")

    def accept(self, data: bytes, source: Source, started: float | None = None) -> AcceptedScan:
        """Accept one DICOM file.

        Args:
            data: the complete file (PS3.10: preamble, file meta group, data set).
            source: where it came from.
            started: ``time.perf_counter()`` when its last byte arrived; default now.

        Raises:
            IngestError: refused; only the refusal was recorded.
            StoreError: the store failed; nothing was acknowledged.
        """
        return self._accept(data, source, started, ())

    def accept_picture(self, data: bytes, form: PictureForm, source: Source) -> AcceptedScan:
        """Accept a PNG or JPEG as a Secondary Capture (PS3.3 A.8); the same file and form give the same UIDs.

        Raises:
            IngestError: ``ingest.unsupported_image``, ``ingest.decoder`` and the reasons of ``accept``.
            StoreError: as ``accept``.
        """
        from appliance.ingest.secondary_capture import secondary_capture  # large import that most boxes never need

        started = time.perf_counter()
        try:
            if len(data) > self._store.settings.max_upload_bytes:
                raise IngestError("ingest.too_large", f"{len(data) >> 20} MiB")
            encoded = secondary_capture(data, form)
        except MemoryError as error:
            busy = StoreError("ingest.memory")
            self.record_refusal(source, len(data), busy.code, "")
            raise busy from error
        except ApplianceError as error:
            self.record_refusal(source, len(data), error.code, error.detail)
            raise
        return self._accept(encoded, source, started, (Note("caution.view_from_form", form.view),) if form.view else ())

    def _accept(self, data: bytes, source: Source, started: float | None, notes: tuple[Note, ...]) -> AcceptedScan:
        started = time.perf_counter() if started is None else started
        try:
            data, repairs = repair_wrapping(data)
            dataset = self._parse(data)
            if (repaired := repair_pixel_data(dataset, data)) is not None:
                data, dataset, repairs = repaired, self._parse(repaired), (*repairs, REPAIRED_PIXEL_DATA)
            _check_complete(dataset, data)
            with _convert_parse_errors():
                scan = describe(dataset, (*notes, *repairs))
                _check_pixels(dataset)
            del dataset
            # Hashing releases the interpreter lock, so it runs while the file is written.
            digest = self._hashing.submit(content_digest, data, scan)
            return AcceptedScan(self._store.add_instance(scan, digest.result, data, source, started), scan)
        except MemoryError as error:  # the memory limit of the process: the image may be sent again later
            busy = StoreError("ingest.memory")
            self.record_refusal(source, len(data), busy.code, "")
            raise busy from error
        except ApplianceError as error:
            self.record_refusal(source, len(data), error.code, error.detail)
            raise

    def record_refusal(self, source: Source, size: int, code: str, detail: str) -> None:
        """Record a refusal, by this module or by the one that unpacked the file; never fails."""
        logger.warning("scan refused", extra={"code": code})
        try:
            self._store.add_rejection(source, size, code, detail)
        except StoreError:  # a full disk may refuse the record too; the sender still gets the reason
            logger.exception("refusal not recorded", extra={"code": code})

    def _parse(self, data: bytes) -> FileDataset:
        """Parse the complete file, within limits of size and number of elements."""
        if not data:
            raise IngestError("ingest.empty")
        if len(data) > self._store.settings.max_upload_bytes:
            raise IngestError("ingest.too_large", f"{len(data) >> 20} MiB")
        if data[128:132] != b"DICM":
            raise IngestError("ingest.truncated" if len(data) < PREAMBLE_BYTES and not data.strip(b"\0") else "ingest.not_dicom")
        if sum(data.count(tag) for tag in _ITEM_TAGS) > MAX_ITEMS:
            raise IngestError("ingest.unreadable", "too many sequence items")
        self._check_deflated(data, meta_end(data))
        accept_invalid_values()
        with _convert_parse_errors():
            return read_partial(BytesIO(data), stop_when=_element_counter())

    def _check_deflated(self, data: bytes, end: int) -> None:
        """Check that a deflated data set does not inflate beyond the size limit (wherever the file states the transfer syntax)."""
        if DeflatedExplicitVRLittleEndian.encode() not in data:
            return
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            unpacker.decompress(data[end:], self._store.settings.max_upload_bytes)
        except zlib.error:  # not deflated, or damaged: the parser reports which
            return
        if unpacker.unconsumed_tail:
            raise IngestError("ingest.too_large", "deflated")
        if not unpacker.eof:
            raise IngestError("ingest.truncated", "deflated")


@contextmanager
def _convert_parse_errors() -> Iterator[None]:
    """Convert what pydicom raises for a value that cannot be parsed: the file is unreadable."""
    try:
        yield
    except PARSE_ERRORS as error:
        raise IngestError("ingest.unreadable", type(error).__name__) from error


def _check_pixels(dataset: FileDataset) -> None:
    """Check the pixel data against the header; damage that is found here means that nothing was kept."""
    try:
        check_structure(dataset)
    except PixelError as error:
        raise IngestError("ingest.pixels" if error.code == "pixel.corrupt" else error.code, error.detail) from error


def _element_counter() -> Callable[[BaseTag, str | None, int], bool]:
    """Make a ``stop_when`` that refuses files with too many elements (each takes far more memory than its bytes)."""
    counter = itertools.count(1)

    def stop_when(_tag: BaseTag, _vr: str | None, _length: int) -> bool:
        if next(counter) > MAX_ELEMENTS:
            raise IngestError("ingest.unreadable", "too many elements")
        return False

    return stop_when


def _check_complete(dataset: FileDataset, data: bytes) -> None:
    """Find elements that extend beyond the end of the file: pydicom parses a truncated file without an error."""
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        is_truncated = "Rows" in dataset and any(tag in data for tag in _PIXEL_TAGS)
        if UNCLOSED_PIXEL_DATA in data:
            raise IngestError("ingest.not_closed")
        raise IngestError("ingest.truncated" if is_truncated else "ingest.no_pixel_data")
    if dataset.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return
    for element in dataset._dict.values():
        if isinstance(element, RawDataElement) and element.length != 0xFFFFFFFF and element.value_tell + element.length > len(data):
            raise IngestError("ingest.truncated", f"element {element.tag}")


def content_digest(data: bytes, scan: Scan) -> str:
    """SHA-256 of transfer syntax, SOP Instance UID and data set; independent of the rest of the file meta group."""
    digest = hashlib.sha256(f"{scan.transfer_syntax_uid}\0{scan.sop_instance_uid}\0".encode())
    digest.update(memoryview(data)[meta_end(data) :])
    return digest.hexdigest()
