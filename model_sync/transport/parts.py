"""The received part of a file, with a description: a download survives a power cut.

``<name>.part`` contains the bytes, ``<name>.part.json`` the description. After a power cut a file may have its length but not its
content, so bytes that were not flushed are used only while the kernel that wrote them runs (its boot id is stored).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from model_sync import atomic_files
from model_sync.errors import Action
from model_sync.transport.errors import DiskFull, Unreachable

SYNC_BYTES = 1024 * 1024
SYNC_S = 2.0
# A part that was not continued for so long belongs to a version that is no longer wanted.
MAX_PART_AGE_S = 30 * 86400.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_DIGEST = re.compile(r"^[0-9a-f]{64,128}\.")


@dataclass(frozen=True)
class PartInfo:
    """The description of a part.

    Attributes:
        path: The file's path in the library, the same on every mirror.
        length: Its full length in bytes, as signed.
        validator: The strong ETag or the Last-Modified of the response; empty when there was none.
        host: The server that sent the validator.
        synced_bytes: The number of bytes flushed to the disk.
        boot_id: The boot id of the kernel that wrote the rest.
    """

    path: str
    length: int
    validator: str = ""
    host: str = ""
    synced_bytes: int = 0
    boot_id: str = ""


class Part:
    """One file being received. Open it with :func:`open_part`.

    Attributes:
        info: The description of the part.
        size: Received bytes.
        length: Bytes of the complete file.
        restarts: How often received bytes had to be discarded.
    """

    def __init__(self, file: Path, info: PartInfo, clock: Callable[[], float]) -> None:
        self._file = file
        self._info_file = file.with_name(file.name + ".json")
        self._clock = clock
        self._boot_id = atomic_files.boot_id()
        self.info = self._usable(info)
        self.length = info.length
        self.restarts = 0
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self.stream: IO[bytes] = open(descriptor, "r+b", buffering=0)  # noqa: SIM115  (closed by `open_part`)
        self.size = os.fstat(descriptor).st_size
        self._trim()
        self._synced_at = clock()

    @property
    def name(self) -> str:
        """The file's name for people, without the digest that consistent snapshots put before it."""
        return _DIGEST.sub("", self.info.path.rsplit("/", 1)[-1])

    @property
    def is_complete(self) -> bool:
        """Whether every byte was received."""
        return self.size == self.length

    @property
    def is_content_addressed(self) -> bool:
        """Whether the file name contains the digest: then it is the same file on every mirror."""
        return self.name != self.info.path.rsplit("/", 1)[-1]

    def _usable(self, fresh: PartInfo) -> PartInfo:
        """Return the stored description when it is of the same file, otherwise delete the part."""
        stored = _read_info(self._info_file)
        if stored is not None and (stored.path, stored.length) == (fresh.path, fresh.length) and not self._file.is_symlink():
            return stored
        for file in (self._file, self._info_file):
            file.unlink(missing_ok=True)
        return fresh

    def _trim(self) -> None:
        """Keep the usable bytes: none of a part that is too long, only the flushed ones after a power cut."""
        keep = 0 if self.size > self.length else self.size
        if self.info.boot_id != self._boot_id or not self._boot_id:
            keep = min(keep, self.info.synced_bytes)
        if keep != self.size:
            self.stream.truncate(keep)
            self.size = keep
        self.info = replace(self.info, synced_bytes=min(self.info.synced_bytes, keep), boot_id=self._boot_id)

    def start_at(self, *, validator: str, host: str, at: int) -> None:
        """Prepare for a response that starts at byte ``at``: truncate there, and store the validator.

        Raises:
            DiskFull, Unreachable: the part cannot be written.
        """
        self.restarts += at < self.size
        with _disk_errors(self._file):
            self.stream.truncate(at)
            self.stream.seek(at)
            self.size = at
            self.info = replace(
                self.info, validator=validator, host=host, synced_bytes=min(at, self.info.synced_bytes), boot_id=self._boot_id
            )
            self._write_info()
            atomic_files.sync_directory(self._file.parent)

    def write(self, chunk: bytes) -> None:
        """Append bytes; they are flushed from time to time.

        Raises:
            DiskFull: too little disk space; the bytes that fitted are kept.
            Unreachable: the disk failed.
        """
        with _disk_errors(self._file):
            view = memoryview(chunk)
            while view:
                written = self.stream.write(view)
                self.size += written
                view = view[written:]
        if self.size - self.info.synced_bytes >= SYNC_BYTES or self._clock() - self._synced_at >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Flush all bytes to the disk, then write the description."""
        if self.size > self.info.synced_bytes:
            with _disk_errors(self._file):
                os.fdatasync(self.stream.fileno())
                self.info = replace(self.info, synced_bytes=self.size)
                self._write_info()
        self._synced_at = self._clock()

    def _write_info(self) -> None:
        """Replace the description; its directory is not flushed: after a power cut the older one only counts fewer bytes."""
        new = self._info_file.with_name(self._info_file.name + ".new")
        with new.open("wb") as stream:
            stream.write(json.dumps(asdict(self.info)).encode())
            atomic_files.flush(stream)
        new.replace(self._info_file)

    def delete(self) -> None:
        """Delete the part: the caller has its bytes, or they are wrong."""
        with _disk_errors(self._file):
            for file in (self._file, self._info_file):
                file.unlink(missing_ok=True)


@contextmanager
def open_part(directory: Path, path: str, length: int, clock: Callable[[], float]) -> Iterator[Part]:
    """Open the part of the library's file ``path`` with its usable bytes; it is flushed and closed at the end.

    Raises:
        DiskFull, Unreachable: the directory or the part cannot be written.
    """
    file = directory / part_name(path)
    with _disk_errors(file):
        directory.mkdir(parents=True, exist_ok=True)
        _remove_old_parts(directory, file)
        part = Part(file, PartInfo(path, length), clock)
    with part.stream:
        try:
            yield part
        finally:
            if file.exists():
                with contextlib.suppress(DiskFull, Unreachable):  # the first error is the one to report
                    part.sync()


def _remove_old_parts(directory: Path, keep: Path) -> None:
    """Remove parts that were not continued for a long time; a clock that was set back removes nothing."""
    limit = time.time() - MAX_PART_AGE_S
    for file in directory.glob("*.part*"):
        if not file.name.startswith(keep.name) and file.lstat().st_mtime < limit:
            file.unlink(missing_ok=True)


def require_free_space(directory: Path, needed: int, reserve: int) -> None:
    """Raise before anything is received when a file will not fit.

    Args:
        directory: The directory of the part.
        needed: Bytes still to come.
        reserve: Bytes that have to stay free.

    Raises:
        DiskFull: it will not fit; the message has the number of missing bytes.
    """
    with _disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    if missing := max(0, needed + reserve - free):
        raise DiskFull(f"{missing} bytes of disk space are missing: {needed} are to come and {reserve} have to stay free")


def part_name(path: str) -> str:
    """Return the file name of a part: valid on every file system, unique for each path in the library."""
    tail = re.sub(r"[^A-Za-z0-9._-]", "_", path.rsplit("/", 1)[-1])[-80:]
    return f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{tail}.part"


def _read_info(file: Path) -> PartInfo | None:
    """Return a stored description, or None when it is missing or damaged."""
    try:
        info = PartInfo(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    texts = (info.path, info.validator, info.host, info.boot_id)
    numbers = (info.length, info.synced_bytes)
    valid = all(isinstance(item, str) for item in texts) and all(type(item) is int and item >= 0 for item in numbers)
    return info if valid else None


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(f"the disk is full: {file.name} cannot grow") from error
        raise Unreachable(f"{file}: {error.strerror or error}", code="sync.disk", action=Action.OPERATOR, final=True) from error
