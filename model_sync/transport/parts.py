"""The part of a file that has arrived, beside a note that says which file it is of: what makes a download survive a power cut.

``<name>.part`` holds the bytes, ``<name>.part.json`` the note. Bytes that were synced to the disk are there after any power cut;
bytes that were not are trusted only as long as the kernel that wrote them runs (its boot id is in the note), since after a power
cut a file may have its length but not its content.
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
from model_sync.transport.errors import DiskFull, Unreachable

SYNC_BYTES = 1024 * 1024
SYNC_S = 2.0
# A part that nobody went on with for so long is of a version that is no longer wanted.
KEEP_S = 30 * 86400.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_DIGEST = re.compile(r"^[0-9a-f]{64,128}\.")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Note:
    """What is known of a part.

    Attributes:
        path: The file's path in the library, the same on every mirror.
        length: Its full length in bytes, as signed.
        validator: The strong ETag or the Last-Modified that came with it; empty when the server gave none.
        host: The server whose validator that is.
        synced_bytes: How many bytes are surely on the disk.
        boot_id: The run of the kernel that wrote the rest.
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
        size: Bytes that are there.
        length: Bytes that the file will have.
        restarts: How often bytes that were there had to be thrown away.
    """

    def __init__(self, file: Path, note: Note, clock: Callable[[], float]) -> None:
        self._file = file
        self._note_file = file.with_name(file.name + ".json")
        self._clock = clock
        self._boot_id = boot_id()
        self._note = self._usable(note)
        self.length = note.length
        self.restarts = 0
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self.stream: IO[bytes] = open(descriptor, "r+b", buffering=0)  # noqa: SIM115  (closed by `open_part`)
        self.size = os.fstat(descriptor).st_size
        self._trim()
        self._synced_at = clock()

    @property
    def note(self) -> Note:
        """What is known of the part."""
        return self._note

    @property
    def name(self) -> str:
        """The file's name for people, without the digest that consistent snapshots put before it."""
        return _DIGEST.sub("", self._note.path.rsplit("/", 1)[-1])

    @property
    def complete(self) -> bool:
        """Whether every byte is there."""
        return self.size == self.length

    @property
    def hashed(self) -> bool:
        """Whether the file's name holds its digest: then a file of that name is that file, on every mirror."""
        return self.name != self._note.path.rsplit("/", 1)[-1]

    def _usable(self, fresh: Note) -> Note:
        """Return the note on the disk when it speaks of the same file, otherwise drop the part and begin anew."""
        kept = _read_note(self._note_file)
        if kept is not None and (kept.path, kept.length) == (fresh.path, fresh.length) and not self._file.is_symlink():
            return kept
        for file in (self._file, self._note_file):
            file.unlink(missing_ok=True)
        return fresh

    def _trim(self) -> None:
        """Keep what can be trusted: nothing of a part that is too long, only what was synced when the machine went down."""
        keep = 0 if self.size > self.length else self.size
        if self._note.boot_id != self._boot_id or not self._boot_id:
            keep = min(keep, self._note.synced_bytes)
        if keep != self.size:
            self.stream.truncate(keep)
            self.size = keep
        self._note = replace(self._note, synced_bytes=min(self._note.synced_bytes, keep), boot_id=self._boot_id)

    def begin(self, *, validator: str, host: str, at: int) -> None:
        """An answer comes that starts at byte ``at``: cut there, and remember whose validator it carries.

        Raises:
            DiskFull, Unreachable: the part cannot be written.
        """
        self.restarts += at < self.size
        with _disk_errors(self._file):
            self.stream.truncate(at)
            self.stream.seek(at)
            self.size = at
            self._note = replace(
                self._note, validator=validator, host=host, synced_bytes=min(at, self._note.synced_bytes), boot_id=self._boot_id
            )
            self._write_note()
            atomic_files.sync_directory(self._file.parent)

    def write(self, chunk: bytes) -> None:
        """Append bytes; now and then they are synced.

        Raises:
            DiskFull: no room; what fitted is kept.
            Unreachable: the disk failed.
        """
        with _disk_errors(self._file):
            view = memoryview(chunk)
            while view:
                written = self.stream.write(view)
                self.size += written
                view = view[written:]
        if self.size - self._note.synced_bytes >= SYNC_BYTES or self._clock() - self._synced_at >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Bring all bytes to the disk, then the note that says so."""
        if self.size > self._note.synced_bytes:
            with _disk_errors(self._file):
                os.fdatasync(self.stream.fileno())
                self._note = replace(self._note, synced_bytes=self.size)
                self._write_note()
        self._synced_at = self._clock()

    def _write_note(self) -> None:
        new = self._note_file.with_name(self._note_file.name + ".new")
        with new.open("wb") as stream:
            stream.write(json.dumps(asdict(self._note)).encode())
            stream.flush()
            os.fdatasync(stream.fileno())
        os.replace(new, self._note_file)

    def drop(self) -> None:
        """Forget the part: its bytes are the caller's now, or are wrong and must not be gone on with."""
        with _disk_errors(self._file):
            for file in (self._file, self._note_file):
                file.unlink(missing_ok=True)


@contextmanager
def open_part(directory: Path, path: str, length: int, clock: Callable[[], float]) -> Iterator[Part]:
    """Open the part of the library's file ``path``, with as many bytes as can be gone on with; it is synced and closed at the end.

    Raises:
        DiskFull, Unreachable: the directory or the part cannot be written.
    """
    file = directory / part_name(path)
    with _disk_errors(file):
        directory.mkdir(parents=True, exist_ok=True)
        _drop_old(directory, file)
        part = Part(file, Note(path, length), clock)
    with part.stream:
        try:
            yield part
        finally:
            if file.exists():
                with contextlib.suppress(DiskFull, Unreachable):  # the error that led here is the one to tell
                    part.sync()


def _drop_old(directory: Path, keep: Path) -> None:
    """Remove the parts that nobody goes on with; a clock that was set back removes nothing."""
    limit = time.time() - KEEP_S
    for file in directory.glob("*.part*"):
        if not file.name.startswith(keep.name) and file.lstat().st_mtime < limit:
            file.unlink(missing_ok=True)


def check_room(directory: Path, needed: int, reserve: int) -> None:
    """Say before anything is received that a file will not fit.

    Args:
        directory: Where the part lies.
        needed: Bytes still to come.
        reserve: Bytes that have to stay free.

    Raises:
        DiskFull: with the number of bytes that are missing.
    """
    with _disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    if missing := max(0, needed + reserve - free):
        raise DiskFull(f"{missing} bytes of disk space are missing: {needed} are to come and {reserve} have to stay free", missing)


def part_name(path: str) -> str:
    """Return the name of a part: legal on every file system, one for each path in the library."""
    tail = re.sub(r"[^A-Za-z0-9._-]", "_", path.rsplit("/", 1)[-1])[-80:]
    return f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{tail}.part"


def boot_id() -> str:
    """Return the name of this run of the kernel, or an empty string where there is none."""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""


def _read_note(file: Path) -> Note | None:
    """A missing or damaged note is none: the part is then dropped."""
    try:
        note = Note(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    texts = (note.path, note.validator, note.host, note.boot_id)
    numbers = (note.length, note.synced_bytes)
    valid = all(isinstance(item, str) for item in texts) and all(type(item) is int and item >= 0 for item in numbers)
    return note if valid else None


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(f"the disk is full: {file.name} cannot grow") from error
        raise Unreachable(
            f"{file}: {error.strerror or error}",
            hint="check the disk, and that the agent's account may write there",
            code="sync.disk",
            final=True,
        ) from error
