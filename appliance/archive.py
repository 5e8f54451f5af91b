"""What people drop: a DICOM file, a picture, a ZIP of them, a folder. One outcome for every file, none skipped in silence.

An entry is read into memory under the caps of the settings and handed to the door; nothing of an archive is ever written to
the disk by its own name, so a path in it can do no harm (it is refused all the same, and said).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from appliance.domain import Source
from appliance.errors import ApplianceError, IngestError
from appliance.ingest import Accepted, Ingest, PictureForm
from appliance.settings import Settings

_ZIP_MAGIC: Final = (b"PK\x03\x04", b"PK\x05\x06")
_PICTURE_MAGIC: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_IGNORED_NAMES: Final = {"dicomdir", "thumbs.db", "desktop.ini", "autorun.inf", "lockfile", "version"}
_IGNORED_SUFFIXES: Final = {".txt", ".pdf", ".xml", ".json", ".csv", ".html", ".htm", ".exe", ".dll", ".ini", ".inf", ".md", ".log", ".ico"}
_ENCRYPTED_FLAG: Final = 0x1
_UTF8_FLAG: Final = 0x800


@dataclass(frozen=True)
class Outcome:
    """What became of one file: the durable scan, or the coded reason why not."""

    name: str
    accepted: Accepted | None
    code: str = ""
    detail: str = ""


def files_below(path: Path) -> list[Path]:
    """The file itself, or every file below a folder in a stable order (links to elsewhere are not followed)."""
    if path.is_dir():
        return sorted(item for item in path.rglob("*") if item.is_file() and not item.is_symlink())
    return [path]


def accept_file(
    ingest: Ingest, settings: Settings, path: Path, name: str, source: Source, form: PictureForm | None = None
) -> Iterator[Outcome]:
    """Take one file of any kind that people bring.

    Args:
        ingest: the door.
        settings: its caps.
        path: where the bytes are.
        name: the name the person knows it by.
        source: who brought it; its name is replaced by the entry's.
        form: what was said about pictures; pictures without a form are taken for frontal chest films, and that is stated.

    Yields:
        One outcome for the file, or one per entry of an archive.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
        if magic.startswith(_ZIP_MAGIC):
            yield from _accept_archive(ingest, settings, path, name, source, form)
            return
        if path.stat().st_size > settings.max_upload_bytes:
            raise IngestError("ingest.too_large", f"{path.stat().st_size >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        yield Outcome(name, None, "ingest.unreadable", error.strerror or type(error).__name__)
        return
    except IngestError as error:
        yield Outcome(name, None, error.code, error.detail)
        return
    yield _accept_bytes(ingest, data, name, source, form)


def _accept_bytes(ingest: Ingest, data: bytes, name: str, source: Source, form: PictureForm | None) -> Outcome:
    inner = PurePosixPath(name.replace("\\", "/"))
    foreign = inner.suffix.lower() in _IGNORED_SUFFIXES and data[128:132] != b"DICM"
    if inner.name.startswith(".") or inner.name.lower() in _IGNORED_NAMES or foreign:
        return Outcome(name, None, "ingest.skipped")
    named = Source(source.kind, source.actor, name)
    try:
        if data.startswith(_PICTURE_MAGIC):
            return Outcome(name, ingest.accept_picture(data, form or PictureForm(), named))
        return Outcome(name, ingest.accept(data, named))
    except ApplianceError as error:
        return Outcome(name, None, error.code, error.detail)


def _accept_archive(
    ingest: Ingest, settings: Settings, path: Path, name: str, source: Source, form: PictureForm | None
) -> Iterator[Outcome]:
    """Each entry by itself: a bad one never stops the rest, but a bomb stops the archive."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        yield Outcome(name, None, "ingest.archive_corrupt", type(error).__name__)
        return
    with archive:
        entries = [info for info in archive.infolist() if not info.is_dir()]
        if len(entries) > settings.max_archive_files:
            yield Outcome(name, None, "ingest.too_many_files", f"{len(entries)} > {settings.max_archive_files}")
            return
        if not entries:
            yield Outcome(name, None, "ingest.skipped", "empty archive")
        unpacked = 0
        for info in entries:
            label = f"{name}!/{_entry_name(info)}"
            try:
                data = _read_entry(archive, info, settings, settings.max_archive_bytes - unpacked)
            except IngestError as error:
                yield Outcome(label, None, error.code, error.detail)
                if error.code == "ingest.archive_bomb":
                    return
                continue
            unpacked += len(data)
            if data.startswith(_ZIP_MAGIC):
                yield Outcome(label, None, "ingest.skipped", "archive inside an archive")
            else:
                yield _accept_bytes(ingest, data, label, source, form)


def _entry_name(info: zipfile.ZipInfo) -> str:
    """The entry's name as its maker typed it: Chinese Windows writes GBK without saying so, and zipfile reads that as CP437."""
    if info.flag_bits & _UTF8_FLAG:
        return info.filename
    return info.filename.encode("cp437", "replace").decode("gb18030", "replace")


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, settings: Settings, budget_bytes: int) -> bytes:
    """One entry's bytes, never more than the caps whatever its header says."""
    parts = PurePosixPath(info.filename.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0] or "\0" in info.filename:
        raise IngestError("ingest.archive_unsafe")
    if info.flag_bits & _ENCRYPTED_FLAG:
        raise IngestError("ingest.archive_encrypted")
    limit = min(settings.max_upload_bytes, budget_bytes)
    try:
        with archive.open(info) as entry:
            data = entry.read(limit + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError, MemoryError) as error:
        raise IngestError("ingest.archive_corrupt", type(error).__name__) from error
    if len(data) > limit:
        raise IngestError("ingest.archive_bomb" if limit == budget_bytes else "ingest.too_large", f"> {limit >> 20} MiB")
    return data
