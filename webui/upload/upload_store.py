"""Unfinished uploads: every acknowledged byte is on the disk, and so is every outcome that a browser may ask for again.

One upload is a few files under ``incoming/uploads``, named by a random id::

    <id>.json       account, file name and length (written once, when it is created)
    <id>.data       the bytes received; their number is the offset
    <id>.tries      one byte for each attempt to ingest it
    <id>.outcome    the result (written once, before <id>.data is deleted)

All but the attempts are encrypted from the first byte, each file with a key of its own
(:mod:`appliance.store.encrypted_stream`); the plain files of an older appliance are encrypted at its first start.

A crash at any point leaves an upload that can be continued, a complete one that waits for ingest, or one with an outcome. The protocol
(tus 1.0) is in :mod:`webui.upload.tus`.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from appliance.core.errors import IngestError, StoreError
from appliance.core.settings import Settings
from appliance.store import encrypted_stream, plain_files
from appliance.store.database import store_error
from appliance.store.encrypted_stream import RECORD_BYTES, EncryptedStream
from model_sync import atomic_files

logger = logging.getLogger(__name__)

ABANDONED_AFTER_S: Final = 24 * 3600.0
_OUTCOME_DAMAGED: Final = "store.outcome_damaged"
_SWEEP_EVERY_S: Final = 3600.0
_ID_BYTES: Final = 16
_SUFFIXES: Final = ("data", "tries", "outcome", "json")
_ENCRYPTED: Final = {".data": encrypted_stream.MAGIC, ".json": encrypted_stream.DOCUMENT, ".outcome": encrypted_stream.DOCUMENT}


class BusyError(Exception):
    """Another request is writing to the same upload."""


@dataclass(frozen=True)
class Upload:
    """One file that is being uploaded.

    ``form`` holds the fields of ``PictureForm`` if the person filled it in; ``name`` is the file's name on their computer.
    """

    id: str
    owner: int
    actor: str
    name: str
    length: int
    form: dict[str, Any] | None
    created_at: float


class UploadStore:
    """The unfinished uploads of one box.

    Args:
        settings: the data directory, and the caps on sizes and numbers.
        key: 256 bits, from which the keys of the uploads are derived.
        check_space: raises StoreError ``ingest.disk_full`` when that many more bytes would not fit.
    """

    def __init__(self, settings: Settings, key: bytes, check_space: Callable[[int], None]) -> None:
        self._settings = settings
        self._key = key
        self._check_space = check_space
        self.directory = settings.data_dir / "incoming" / "uploads"
        self._guard = threading.Lock()
        self._swept_at = 0.0
        self._known: dict[str, Upload] = {}
        self._offsets: dict[str, tuple[encrypted_stream.FileState, int]] = {}
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._encrypt_plain()
        except OSError as error:
            raise store_error(error) from error

    # -- one upload --------------------------------------------------------------------------------------------------

    def create(self, owner: int, actor: str, name: str, length: int, form: dict[str, Any] | None) -> Upload:
        """Create an upload; it is durable when this returns.

        Raises:
            IngestError: ``ingest.too_large`` or ``ingest.too_many_files``.
            StoreError: ``ingest.disk_full``, or the disk failed.
        """
        self._sweep_if_due()
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
        """The upload with this id, if it belongs to this account."""
        upload = self._read(upload_id)
        return upload if upload is not None and upload.owner == owner else None

    def offset(self, upload: Upload) -> int:
        """How many bytes are stored; the full length once the outcome is known."""
        try:
            state = encrypted_stream.file_state((self.directory / f"{upload.id}.data").stat())
            known = self._offsets.get(upload.id)
            if known is None or known[0] != state:
                with self._open(upload, "rb") as stream:
                    known = self._offsets[upload.id] = stream.opened, stream.length
        except FileNotFoundError:  # perhaps deleted since: the outcome is known
            return upload.length
        except OSError as error:
            raise store_error(error) from error
        return known[1]

    def append(self, upload: Upload, offset: int, read: Callable[[int], bytes]) -> int:
        """Write the bytes received from ``offset`` on, until the body ends or the connection breaks. Returns the new, durable offset.

        Args:
            upload: the upload to write to.
            offset: the offset that the sender states; nothing is written when it is wrong.
            read: returns at most that many bytes, ``b""`` at the end; after an OSError (broken connection) the received bytes are kept.

        Raises:
            BusyError: another request writes to it.
            ValueError: ``offset`` is not the length of the stored part.
            StoreError: the disk failed or is full; what is durable is kept, and the upload can be continued later.
        """
        with self.lock(upload):
            if self.offset(upload) != offset:
                raise ValueError("offset")
            if offset == upload.length:  # complete, and perhaps ingested already
                return offset
            return self._copy(upload, read)

    def _copy(self, upload: Upload, read: Callable[[int], bytes]) -> int:
        failure = None
        with self._stream(upload, "r+b") as stream:
            first = stream.end
            while stream.length < upload.length and failure is None:
                try:
                    chunk = read(min(RECORD_BYTES, upload.length - stream.length))
                except OSError:  # broken connection or timeout: what was received before is kept
                    break
                if not chunk:
                    break
                try:
                    self._check_space(len(chunk))
                    stream.append(chunk)
                except StoreError as error:
                    failure = error
                except OSError as error:
                    failure = store_error(error)
            _make_durable(stream, first)
            offset = stream.length
        if failure is not None:
            raise failure
        return offset

    def is_complete(self, upload: Upload) -> bool:
        """Whether all bytes have been received."""
        return self.offset(upload) >= upload.length

    def open(self, upload: Upload) -> IO[bytes]:
        """The bytes, as long as there is no outcome; raises StoreError."""
        return io.BufferedReader(self._stream(upload, "rb"), RECORD_BYTES)

    def finish(self, upload: Upload, outcome: list[dict[str, Any]]) -> None:
        """Make the outcome durable, then delete the bytes: ingest has stored or refused each file."""
        self._write(f"{upload.id}.outcome", outcome)
        self._offsets.pop(upload.id, None)
        for suffix in ("data", "tries"):
            (self.directory / f"{upload.id}.{suffix}").unlink(missing_ok=True)

    def outcome(self, upload: Upload) -> list[dict[str, Any]] | None:
        """The result of each file of the upload; None while it is not known.

        Raises:
            StoreError: ``store.outcome_damaged``: it was damaged, and the bytes are deleted, so that they cannot be ingested again.
        """
        try:
            known: list[dict[str, Any]] = self._load(f"{upload.id}.outcome")
        except FileNotFoundError:
            return None
        except ValueError as error:
            if (self.directory / f"{upload.id}.data").exists():
                return None
            raise StoreError(_OUTCOME_DAMAGED) from error
        except OSError as error:
            raise store_error(error) from error
        return known

    def remove(self, upload: Upload) -> None:
        """Delete a cancelled upload."""
        self._known.pop(upload.id, None)
        self._offsets.pop(upload.id, None)
        for suffix in _SUFFIXES:
            (self.directory / f"{upload.id}.{suffix}").unlink(missing_ok=True)

    # -- lists -------------------------------------------------------------------------------------------------------

    def unfinished(self, owner: int | None = None) -> Iterator[Upload]:
        """Uploads without an outcome, of one account or of all, oldest first."""
        with os.scandir(self.directory) as entries:
            names = [entry.name.removesuffix(".data") for entry in entries if entry.name.endswith(".data")]
        waiting = []
        for name in names:
            try:
                waiting += [upload] if (upload := self._read(name)) else []
            except StoreError as error:
                logger.error("upload not listed", extra={"code": error.code})
        for upload in sorted(waiting, key=lambda item: item.created_at):
            if owner is None or upload.owner == owner:
                yield upload

    def _sweep_if_due(self) -> None:
        with self._guard:
            due = time.time() - self._swept_at > _SWEEP_EVERY_S
            if due:
                self._swept_at = time.time()
        if due:
            self.sweep()

    def sweep(self) -> None:
        """Delete uploads that nobody continued for a day, and files that a crash left behind.

        A complete upload without an outcome is never deleted: it was acknowledged.
        """
        limit = time.time() - ABANDONED_AFTER_S
        for path in list(self.directory.iterdir()):
            try:
                self._sweep_file(path, limit)
            except StoreError as error:  # the disk does not say what it is: it is kept
                logger.warning("upload not swept", extra={"code": error.code})

    def _sweep_file(self, path: Path, limit: float) -> None:
        upload = self._read(path.stem)
        touched = [mtime for suffix in _SUFFIXES if (mtime := _mtime(self.directory / f"{path.stem}.{suffix}"))] if upload else []
        if max(touched, default=_mtime(path)) > limit:
            return
        if upload is None:
            path.unlink(missing_ok=True)
        elif not self._waits_for_ingest(upload):
            self.remove(upload)

    def _waits_for_ingest(self, upload: Upload) -> bool:
        try:
            return self.outcome(upload) is None and self.is_complete(upload)
        except StoreError as error:
            if error.code != _OUTCOME_DAMAGED:
                raise
            return False

    def count_attempt(self, upload: Upload) -> int:
        """Count an attempt to ingest the upload, before it starts; returns its number, from 1."""
        with open(self.directory / f"{upload.id}.tries", "ab") as file:
            file.write(b".")
            return file.tell()

    def reset_attempts(self, upload: Upload) -> None:
        """Set the number of attempts to 0: the disk failed, not the upload."""
        (self.directory / f"{upload.id}.tries").unlink(missing_ok=True)

    # -- files -------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, upload: Upload, *, wait: bool = False) -> Iterator[None]:
        """Hold the lock of an upload.

        It is a kernel lock on its file, because a killed server and its successor may run at the same time for a moment.

        Raises:
            BusyError: somebody else holds it, and ``wait`` is not set.
            StoreError: ``store.missing``, the upload was cancelled.
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
        """The upload with an id; cached, since it never changes and a list of uploads reads all of them."""
        if len(upload_id) != 2 * _ID_BYTES or not all(char in "0123456789abcdef" for char in upload_id):
            return None
        path = self.directory / f"{upload_id}.json"
        if upload_id in self._known and path.exists():
            return self._known[upload_id]
        try:
            upload = Upload(**self._load(path.name))
        except (FileNotFoundError, ValueError, TypeError):
            self._known.pop(upload_id, None)
            return None
        except OSError as error:
            raise store_error(error) from error
        return self._known.setdefault(upload_id, upload)

    def _write(self, name: str, value: object) -> None:
        """Write a small JSON file atomically, durably and encrypted."""
        text = json.dumps(value, ensure_ascii=False).encode()
        atomic_files.write(self.directory / name, encrypted_stream.encrypt_document(self._key_of(name), name, text), mode=0o600)

    def _load(self, name: str) -> Any:
        """Load a small JSON file; raises ValueError where it was changed, and OSError."""
        return json.loads(encrypted_stream.decrypt_document(self._key_of(name), name, (self.directory / name).read_bytes()))

    def _key_of(self, name: str) -> bytes:
        return encrypted_stream.derive_key(self._key, f"upload {name}")

    def _stream(self, upload: Upload, mode: str) -> EncryptedStream:
        """Open the bytes of an upload; raises StoreError."""
        try:
            return self._open(upload, mode)
        except OSError as error:
            raise store_error(error) from error

    def _open(self, upload: Upload, mode: str) -> EncryptedStream:
        name = f"{upload.id}.data"
        return EncryptedStream(open(self.directory / name, mode, buffering=0), self._key_of(name), name)

    def _encrypt_plain(self) -> None:
        """Encrypt the uploads of an older appliance; what a crash leaves is finished at the next start.

        The plain ``.json`` shows that an upload is of an older appliance, so it is encrypted last: bytes beside an encrypted one that
        do not begin like an encrypted file are what a power cut left, and count as nothing received.
        """
        for path in list(self.directory.iterdir()):
            if path.name.endswith(plain_files.SUFFIX):
                plain_files.finish(path.with_name(path.name.removesuffix(plain_files.SUFFIX)))
        for path in list(self.directory.glob("*.json")):
            if _head(path) in (b"", encrypted_stream.DOCUMENT):
                continue
            for part in (path.with_suffix(".data"), path.with_suffix(".outcome"), path):
                if part.exists() and _head(part) not in (b"", _ENCRYPTED[part.suffix]):
                    self._encrypt_file(part)

    def _encrypt_file(self, path: Path) -> None:
        fresh = path.with_name(f"{path.name}.encrypting")
        with open(path, "rb") as plain, open(fresh, "w+b", buffering=0, opener=_private) as file:
            if path.suffix == ".data":
                stream = EncryptedStream(file, self._key_of(path.name), path.name)
                while chunk := plain.read(RECORD_BYTES):
                    stream.append(chunk)
            else:
                file.write(encrypted_stream.encrypt_document(self._key_of(path.name), path.name, plain.read()))
        plain_files.replace(path, fresh)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(encrypted_stream.MAGIC))


def _make_durable(stream: EncryptedStream, first: int) -> None:
    """Fsync the written records, or remove them: after a failed fsync the content beyond ``first`` is unknown."""
    try:
        os.fsync(stream.fileno())
    except OSError as error:
        stream.truncate_to(first)
        raise store_error(error) from error


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
