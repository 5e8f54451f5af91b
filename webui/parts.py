"""Uploads on their way: every acknowledged byte is on the disk, and so is every outcome a browser may ask for again.

One upload is a few files under ``incoming/uploads``, named by a random id::

    <id>.json       who brings what, how long it will be (written once, at its creation)
    <id>.data       the bytes so far; its length is the offset
    <id>.tries      one byte for each try to bring it through the door
    <id>.outcome    what became of it (written once, before <id>.data goes)

A crash at any point leaves an upload that can be continued, one that is complete and waits for the door, or one whose
outcome is known. The protocol spoken over it (tus 1.0) is in :mod:`webui.tus`.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from appliance.core.errors import IngestError, StoreError
from appliance.core.files import fsync_directory
from appliance.core.settings import Settings
from appliance.store.database import store_error

ABANDONED_AFTER_S: Final = 24 * 3600.0
_SWEEP_EVERY_S: Final = 3600.0
_CHUNK_BYTES: Final = 256 << 10
_ID_BYTES: Final = 16
_SUFFIXES: Final = ("data", "tries", "outcome", "json")


class BusyError(Exception):
    """Another request is writing to the same upload."""


@dataclass(frozen=True)
class Upload:
    """One file on its way.

    ``form`` holds the fields of ``PictureForm`` when the person filled it in; ``name`` is the name they know the file by.
    """

    id: str
    owner: int
    actor: str
    name: str
    length: int
    form: dict[str, Any] | None
    created_at: float


class Parts:
    """The uploads of one box.

    Args:
        settings: the data directory, and the caps on sizes and numbers.
        check_space: raises StoreError ``ingest.disk_full`` when that many more bytes would not fit.
    """

    def __init__(self, settings: Settings, check_space: Callable[[int], None]) -> None:
        self._settings = settings
        self._check_space = check_space
        self.directory = settings.data_dir / "incoming" / "uploads"
        self._guard = threading.Lock()
        self._swept_at = 0.0
        self._known: dict[str, Upload] = {}
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise store_error(error) from error

    # -- the life of an upload ---------------------------------------------------------------------------------------

    def create(self, owner: int, actor: str, name: str, length: int, form: dict[str, Any] | None) -> Upload:
        """Begin an upload; durable when it returns.

        Raises:
            IngestError: ``ingest.too_large`` or ``ingest.too_many_files``.
            StoreError: ``ingest.disk_full`` and other trouble with the disk.
        """
        self._sweep_sometimes()
        cap = self._settings.max_archive_bytes if name.lower().endswith(".zip") else self._settings.max_upload_bytes
        if length > cap:
            raise IngestError("ingest.too_large", f"{length >> 20} MiB > {cap >> 20} MiB")
        if sum(1 for _ in self.unfinished(owner)) >= self._settings.max_archive_files:
            raise IngestError("ingest.too_many_files")
        self._check_space(length)
        upload = Upload(secrets.token_hex(_ID_BYTES), owner, actor, name, length, form, time.time())
        try:
            (self.directory / f"{upload.id}.data").touch(mode=0o600)
            self._write(f"{upload.id}.json", asdict(upload))
        except OSError as error:
            self.remove(upload)
            raise store_error(error) from error
        return upload

    def find(self, upload_id: str, owner: int) -> Upload | None:
        """The upload of that id if it is this person's."""
        upload = self._read(upload_id)
        return upload if upload is not None and upload.owner == owner else None

    def offset(self, upload: Upload) -> int:
        """How many bytes are safe here; the whole length once the outcome is known."""
        try:
            return (self.directory / f"{upload.id}.data").stat().st_size
        except FileNotFoundError:
            return upload.length

    def append(self, upload: Upload, offset: int, read: Callable[[int], bytes]) -> int:
        """Write what the line brings from ``offset`` on, until it ends or breaks. Returns the new, durable offset.

        Args:
            upload: where to.
            offset: where the sender believes to be; nothing is written when that is wrong.
            read: gives at most that many bytes, ``b""`` at the end; an OSError means that the line broke, what came is kept.

        Raises:
            BusyError: another request writes to it.
            ValueError: ``offset`` is not where the upload stands.
            StoreError: the disk failed or is full; what is durable stays, and the upload goes on when there is room again.
        """
        with self.exclusive(upload):
            if self.offset(upload) != offset:
                raise ValueError("offset")
            if offset == upload.length:  # complete, and perhaps gone through the door already
                return offset
            return self._copy(upload, offset, read)

    def _copy(self, upload: Upload, start: int, read: Callable[[int], bytes]) -> int:
        offset, failure = start, None
        with _open_part(self.directory / f"{upload.id}.data") as descriptor:
            while offset < upload.length and failure is None:
                try:
                    chunk = read(min(_CHUNK_BYTES, upload.length - offset))
                except OSError:  # the line broke (a timeout included): what came before is kept
                    break
                if not chunk:
                    break
                try:
                    self._check_space(len(chunk))
                    _write_all(descriptor, chunk)
                except StoreError as error:
                    failure = error
                except OSError as error:
                    failure = store_error(error)
                    os.ftruncate(descriptor, offset)  # of a chunk that went in by half nobody knows how much
                else:
                    offset += len(chunk)
            _make_durable(descriptor, start)
        if failure is not None:
            raise failure
        return offset

    def complete(self, upload: Upload) -> bool:
        """Whether every byte is here."""
        return self.offset(upload) >= upload.length

    def path(self, upload: Upload) -> Path:
        """Where the bytes are while there is no outcome."""
        return self.directory / f"{upload.id}.data"

    def finish(self, upload: Upload, outcome: list[dict[str, Any]]) -> None:
        """Make the outcome durable, then let the bytes go: the door has kept or refused every one of them."""
        self._write(f"{upload.id}.outcome", outcome)
        for suffix in ("data", "tries"):
            (self.directory / f"{upload.id}.{suffix}").unlink(missing_ok=True)

    def outcome(self, upload: Upload) -> list[dict[str, Any]] | None:
        """What became of the upload; None while that is not known."""
        try:
            known: list[dict[str, Any]] = json.loads((self.directory / f"{upload.id}.outcome").read_bytes())
        except FileNotFoundError:
            return None
        return known

    def remove(self, upload: Upload) -> None:
        """Forget an upload that was called off."""
        self._known.pop(upload.id, None)
        for suffix in _SUFFIXES:
            (self.directory / f"{upload.id}.{suffix}").unlink(missing_ok=True)

    # -- lists -------------------------------------------------------------------------------------------------------

    def unfinished(self, owner: int | None = None) -> Iterator[Upload]:
        """Uploads without an outcome, of one person or of all, oldest first."""
        with os.scandir(self.directory) as entries:
            names = [entry.name.removesuffix(".data") for entry in entries if entry.name.endswith(".data")]
        waiting = [upload for name in names if (upload := self._read(name)) is not None]
        for upload in sorted(waiting, key=lambda item: item.created_at):
            if owner is None or upload.owner == owner:
                yield upload

    def _sweep_sometimes(self) -> None:
        with self._guard:
            due = time.time() - self._swept_at > _SWEEP_EVERY_S
            if due:
                self._swept_at = time.time()
        if due:
            self.sweep()

    def sweep(self) -> None:
        """Let go of what nobody came back for in a day, and of what a crash left without a name.

        A complete upload without an outcome is never touched: it was acknowledged.
        """
        limit = time.time() - ABANDONED_AFTER_S
        for path in list(self.directory.iterdir()):
            upload = self._read(path.stem)
            touched = [mtime for suffix in _SUFFIXES if (mtime := _mtime(self.directory / f"{path.stem}.{suffix}"))] if upload else []
            if max(touched, default=_mtime(path)) > limit:
                continue
            if upload is None:
                path.unlink(missing_ok=True)
            elif self.outcome(upload) is not None or not self.complete(upload):
                self.remove(upload)

    def attempt(self, upload: Upload) -> int:
        """Count one try to bring the upload through the door, before it is made; returns which one it is."""
        with open(self.directory / f"{upload.id}.tries", "ab") as file:
            file.write(b".")
            return file.tell()

    def forgive(self, upload: Upload) -> None:
        """Forget the tries: what failed was the disk, which says nothing against the upload."""
        (self.directory / f"{upload.id}.tries").unlink(missing_ok=True)

    # -- files -------------------------------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self, upload: Upload, *, wait: bool = False) -> Iterator[None]:
        """Be the only one who touches an upload.

        A lock of the kernel's on its file, since a killed server's threads may outlive it for a moment beside the next one.

        Raises:
            BusyError: somebody else does, and ``wait`` is not set.
            StoreError: ``store.missing``, the upload was called off.
        """
        try:
            descriptor = os.open(self.directory / f"{upload.id}.json", os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreError("store.missing", "upload") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        except BlockingIOError as error:
            raise BusyError(upload.id) from error
        finally:
            os.close(descriptor)

    def _read(self, upload_id: str) -> Upload | None:
        """The upload of an id. What was read once is kept, since it never changes and a list of uploads asks for all of them."""
        if len(upload_id) != 2 * _ID_BYTES or not all(char in "0123456789abcdef" for char in upload_id):
            return None
        path = self.directory / f"{upload_id}.json"
        if upload_id in self._known and path.exists():
            return self._known[upload_id]
        try:
            upload = Upload(**json.loads(path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            self._known.pop(upload_id, None)
            return None
        return self._known.setdefault(upload_id, upload)

    def _write(self, name: str, value: object) -> None:
        """A small JSON file, whole or not at all."""
        fresh = self.directory / f"{name}.{secrets.token_hex(4)}.new"
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(json.dumps(value, ensure_ascii=False).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.directory / name)
            fsync_directory(self.directory)
        finally:
            fresh.unlink(missing_ok=True)


@contextmanager
def _open_part(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise store_error(error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_durable(descriptor: int, start: int) -> None:
    """Put what was written on the disk, or take it back: after a failed fsync nobody knows what is there beyond ``start``."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, start)
        raise store_error(error) from error


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]
