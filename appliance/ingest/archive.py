"""Accept files of any kind: a DICOM file, a PNG or JPEG, a ZIP of them, a folder. Every file gets one outcome.

An archive entry is read into memory within the limits of the settings and given to :mod:`appliance.ingest.ingest`. Nothing of an archive
is written to the disk under its own name, so a path in it can do no harm; an unsafe path is refused anyway.
"""

from __future__ import annotations

import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

from appliance.core.domain import PictureForm, Source
from appliance.core.errors import ApplianceError, IngestError
from appliance.core.settings import Settings
from appliance.ingest.ingest import AcceptedScan, Ingest
from appliance.ingest.text_encoding import decode_file_name

_ZIP_MAGIC: Final = (b"PK\x03\x04", b"PK\x05\x06")
_PICTURE_MAGIC: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
# gzip, 7z, RAR, bzip2, xz: packed files that are not unpacked here.
_PACKED_MAGIC: Final = (b"\x1f\x8b\x08", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"BZh", b"\xfd7zXZ\0")
_MEDIA_DIRECTORY: Final = b"1.2.840.10008.1.3.10"
_IGNORED_NAMES: Final = {"dicomdir", "thumbs.db", "desktop.ini", "autorun.inf", "lockfile", "version"}
_IGNORED_SUFFIXES: Final = {".txt", ".pdf", ".xml", ".json", ".csv", ".html", ".htm", ".exe", ".dll", ".ini", ".inf", ".md", ".log", ".ico"}
_ENCRYPTED_FLAG: Final = 0x1
_UTF8_FLAG: Final = 0x800
# What zipfile and its decompressors are known to raise on hostile bytes.
_ZIP_ERRORS: Final = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError, IndexError, OverflowError, RuntimeError,
    NotImplementedError,
)  # fmt: skip
_END: Final = struct.Struct("<4s4H2LH")  # end of central directory record (APPNOTE 4.3.16)
_END_MAGIC: Final = b"PK\x05\x06"
_END64: Final = struct.Struct("<4sQ2H2L4Q")  # its Zip64 form (4.3.14), followed by a locator of 20 bytes
_END64_MAGIC: Final = b"PK\x06\x06"
_LOCATOR_BYTES: Final = 20
_LONGEST_COMMENT: Final = 0xFFFF
_LARGEST_SIZE: Final = 2**63 - 1
# An entry takes 46 bytes plus its name in the central directory; a directory far larger than that states a wrong count.
_DIRECTORY_BYTES_PER_FILE: Final = 1024


@dataclass(frozen=True)
class Outcome:
    """The outcome of one file: the stored image, or the code of the refusal."""

    name: str
    accepted: AcceptedScan | None
    code: str = ""
    detail: str = ""


def shown_name(path: str | Path) -> str:
    """Decode a file name as a person typed it: UTF-8, else GBK as written by Chinese Windows and on old USB sticks.

    Python represents invalid UTF-8 as lone surrogates, which no database, JSON file or terminal accepts.
    """
    try:
        return decode_file_name(os.fsencode(path))
    except UnicodeEncodeError:  # surrogates that represent no byte: not from a file system
        return str(path).encode("utf-8", "replace").decode()


def files_below(path: Path) -> list[tuple[Path, str]]:
    """List the file itself, or all files below a folder in a stable order, each with the code of its refusal or ``""``.

    Links are not followed: they may lead out of the folder or form a loop.
    """
    if not path.is_dir():
        return [(path, "")]
    files: list[tuple[Path, str]] = []
    folders = [path]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    else:
                        files.append((Path(entry.path), "ingest.skipped" if entry.is_symlink() else ""))
        except OSError:
            files.append((folder, "ingest.unreadable"))
    return sorted(files)


def accept_below(ingest: Ingest, settings: Settings, path: Path, source: Source, form: PictureForm | None = None) -> Iterator[Outcome]:
    """Accept the file, or every file below the folder; arguments as for :func:`accept_file`. Yields one outcome for each."""
    for item, code in files_below(path):
        if code:
            detail = "link" if code == "ingest.skipped" else "folder"
            yield _refusal(ingest, source, shown_name(item), 0, code, detail)
        else:
            yield from accept_file(ingest, settings, item, shown_name(item), source, form)


def accept_file(
    ingest: Ingest, settings: Settings, path: Path, name: str, source: Source, form: PictureForm | None = None
) -> Iterator[Outcome]:
    """Accept one file of any kind; arguments as for :func:`accept_stream`. Yields one outcome, or one per entry of an archive."""
    name = shown_name(name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device may have no end
            raise IngestError("ingest.skipped", "not a regular file")
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        yield _refusal(ingest, source, name, 0, "ingest.unreadable", error.strerror or type(error).__name__)
    except IngestError as error:
        yield _refusal(ingest, source, name, 0, error.code, error.detail)
    else:
        with file:
            yield from accept_stream(ingest, settings, file, status.st_size, name, source, form)


def accept_stream(
    ingest: Ingest, settings: Settings, file: IO[bytes], size: int, name: str, source: Source, form: PictureForm | None = None
) -> Iterator[Outcome]:
    """Accept an open file of any kind.

    Args:
        ingest: accepts the images.
        settings: the limits.
        file: open for reading at any place.
        size: its length in bytes.
        name: the file name as the person knows it.
        source: where it came from; its name is replaced by that of the entry.
        form: what was entered about a PNG or JPEG; without it a frontal chest image is assumed, which is stated.

    Yields:
        One outcome for the file, or one per entry of an archive.
    """
    name = shown_name(name)
    try:
        file.seek(0)
        magic = file.read(8)
        if magic.startswith(_ZIP_MAGIC):
            yield from _accept_archive(ingest, settings, file, size, name, source, form)
            return
        if size > settings.max_upload_bytes:
            raise IngestError("ingest.too_large", f"{size >> 20} MiB")
        data = magic + file.read()
    except OSError as error:
        yield _refusal(ingest, source, name, size, "ingest.unreadable", error.strerror or type(error).__name__)
    except MemoryError:
        yield _refusal(ingest, source, name, size, "ingest.too_large", "not enough memory")
    except IngestError as error:
        yield _refusal(ingest, source, name, size, error.code, error.detail)
    else:
        yield _accept_bytes(ingest, data, name, source, form)


def _refusal(ingest: Ingest, source: Source, name: str, size: int, code: str, detail: str) -> Outcome:
    """Refuse a file before ingest parses it, and record that, unless it is not an image at all."""
    if code != "ingest.skipped":
        # The size may come from a hostile header, and a column holds 63 bits.
        ingest.record_refusal(Source(source.kind, source.actor, name), min(size, _LARGEST_SIZE), code, detail)
    return Outcome(name, None, code, detail)


def _accept_bytes(ingest: Ingest, data: bytes, name: str, source: Source, form: PictureForm | None) -> Outcome:
    if _is_foreign(data, name):
        return Outcome(name, None, "ingest.skipped")
    named = Source(source.kind, source.actor, name)
    if data.startswith(_PACKED_MAGIC) and data[128:132] != b"DICM":
        return _refusal(ingest, source, name, len(data), "ingest.nested_archive", "packed file")
    try:
        if data.startswith(_PICTURE_MAGIC):
            return Outcome(name, ingest.accept_picture(data, form or PictureForm(), named))
        return Outcome(name, ingest.accept(data, named))
    except ApplianceError as error:
        return Outcome(name, None, error.code, error.detail)
    except MemoryError:
        return _refusal(ingest, source, name, len(data), "ingest.too_large", "not enough memory")


def _is_foreign(data: bytes, name: str) -> bool:
    """Whether a file only accompanies images on a disc. Content counts before the name: an image may be called ``version``."""
    if data[128:132] == b"DICM":
        return _MEDIA_DIRECTORY in data[132:512]  # a DICOMDIR is DICOM, but a table of contents
    inner = PurePosixPath(name.replace("\\", "/"))
    return inner.name.startswith(".") or inner.name.lower() in _IGNORED_NAMES or inner.suffix.lower() in _IGNORED_SUFFIXES


def _accept_archive(
    ingest: Ingest, settings: Settings, file: IO[bytes], size: int, name: str, source: Source, form: PictureForm | None
) -> Iterator[Outcome]:
    """Accept each entry by itself: a bad one does not stop the others; after an archive bomb the rest is refused unread."""
    try:
        _check_directory(file, size, settings)
        archive = zipfile.ZipFile(file)
    except IngestError as error:
        yield _refusal(ingest, source, name, size, error.code, error.detail)
        return
    except (*_ZIP_ERRORS, MemoryError) as error:
        yield _refusal(ingest, source, name, size, "ingest.archive_corrupt", type(error).__name__)
        return
    with archive:
        entries = [info for info in archive.infolist() if not info.is_dir()]
        if len(entries) > settings.max_archive_files:
            yield _refusal(ingest, source, name, size, "ingest.too_many_files", f"{len(entries)} > {settings.max_archive_files}")
            return
        if not entries:
            yield Outcome(name, None, "ingest.skipped", "empty archive")
        unpacked, bomb = 0, ""
        for info in entries:
            label = f"{name}!/{_entry_name(info)}"
            if bomb:
                yield _refusal(ingest, source, label, info.file_size, "ingest.archive_bomb", bomb)
                continue
            try:
                data = _read_entry(archive, info, settings, max(0, settings.max_archive_bytes - unpacked))
            except IngestError as error:
                if error.code == "ingest.archive_bomb":
                    bomb = error.detail
                unpacked += _unpacked_bytes(error.code, info, settings)
                yield _refusal(ingest, source, label, info.file_size, error.code, error.detail)
                continue
            unpacked += len(data)
            if data.startswith(_ZIP_MAGIC) and data[128:132] != b"DICM":
                yield _refusal(ingest, source, label, len(data), "ingest.nested_archive", "archive inside an archive")
            else:
                yield _accept_bytes(ingest, data, label, source, form)


def _unpacked_bytes(code: str, info: zipfile.ZipInfo, settings: Settings) -> int:
    """Bytes that were unpacked of a failed entry, at most; 0 where it was refused unread."""
    if code == "ingest.too_large":
        return settings.max_upload_bytes
    return min(info.file_size, settings.max_upload_bytes) if code == "ingest.archive_corrupt" else 0


def _check_directory(file: IO[bytes], size: int, settings: Settings) -> None:
    """Refuse a huge central directory by the record at the end of the archive, before zipfile makes an object of each entry."""
    file.seek(max(0, size - _END.size - _LONGEST_COMMENT - _LOCATOR_BYTES - _END64.size))
    tail = file.read()
    last = tail[-_END.size :]
    at = len(tail) - _END.size if last.startswith(_END_MAGIC) and last.endswith(b"\0\0") else tail.rfind(_END_MAGIC)
    if at < 0 or len(tail) - at < _END.size:
        raise IngestError("ingest.archive_corrupt", "no end record")
    _, _, _, _, count, length, _, _ = _END.unpack_from(tail, at)
    at64 = at - _LOCATOR_BYTES - _END64.size
    if at64 >= 0 and tail.startswith(_END64_MAGIC, at64):
        # zipfile uses this record wherever it stands, and so must the check.
        count, length = _END64.unpack_from(tail, at64)[7:9]
    if count > settings.max_archive_files or length > _LONGEST_COMMENT + settings.max_archive_files * _DIRECTORY_BYTES_PER_FILE:
        raise IngestError("ingest.too_many_files", f"{count} > {settings.max_archive_files}")


def _entry_name(info: zipfile.ZipInfo) -> str:
    """Decode the name of an entry: Chinese Windows writes GBK without a flag, which zipfile decodes as CP437."""
    if info.flag_bits & _UTF8_FLAG:
        return shown_name(info.filename)
    try:
        return decode_file_name(info.filename.encode("cp437"))
    except UnicodeEncodeError:  # zipfile took the name from a Unicode extra field
        return shown_name(info.filename)


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, settings: Settings, budget_bytes: int) -> bytes:
    """Read one entry, never more than the limits, whatever its header says."""
    parts = PurePosixPath(info.filename.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in "".join(parts.parts[:1]) or "\0" in info.filename:
        raise IngestError("ingest.archive_unsafe")
    if info.flag_bits & _ENCRYPTED_FLAG:
        raise IngestError("ingest.archive_encrypted")
    limit = min(settings.max_upload_bytes, budget_bytes)
    try:
        with archive.open(info) as entry:
            data = entry.read(limit + 1)
    except MemoryError as error:
        raise IngestError("ingest.too_large", "not enough memory") from error
    except _ZIP_ERRORS as error:
        raise IngestError("ingest.archive_corrupt", type(error).__name__) from error
    if len(data) > limit:
        raise IngestError("ingest.archive_bomb" if limit == budget_bytes else "ingest.too_large", f"> {limit >> 20} MiB")
    return data
