"""The files of a library: paths, writes that are safe at a power cut, and the lock.

::

    LIB/library.json        validity of each role's metadata, and the names of key holders
    LIB/public/             what is served: metadata/ and targets/
    LIB/staged/<role>.json  metadata that waits for signatures; LIB/staged/targets/: its files, not yet public
    LIB/online/             the encrypted keys of snapshot and timestamp
    LIB/scratch/            temporary files; emptied at the next start
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from tuf.api.metadata import Metadata, TargetFile
from tuf.api.serialization import DeserializationError

from model_sync import atomic_files
from model_sync.errors import PublishError, SettingsError
from model_sync.field_types import Strict

CONFIG_NAME = "library.json"
DUE_DAYS = 10.0
_DUE_SHARE = 0.1  # five weeks for a root of one year
_CHUNK_BYTES = 1 << 20
_LOCK_POLL_S = 0.05
Days = Annotated[float, Field(gt=0, le=3650)]


class Expiry(Strict):
    """The validity of each role's metadata, in days from its signing."""

    root: Days = 365.0
    targets: Days = 180.0
    lines: Days = 180.0
    rollout: Days = 30.0
    snapshot: Days = 14.0
    timestamp: Days = 7.0

    def days(self, role: str) -> float:
        """Return the days of ``role``; ``lines`` for every model line."""
        return float(getattr(self, role)) if role in Expiry.model_fields else self.lines


def due_days(validity_days: float) -> float:
    """Return how many days before its expiry a role is due: a tenth of its validity, at least ten days, at most half of it.

    The timestamp is valid for a week, so ten days before its expiry would be always.
    """
    longest = validity_days / 2 if validity_days <= DUE_DAYS else validity_days
    return min(longest, max(DUE_DAYS, validity_days * _DUE_SHARE))


class LibraryConfig(Strict):
    """``library.json``: settings that are not secret and that no box sees."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    expiry_days: Expiry = Expiry()
    holders: dict[str, str] = Field(default_factory=dict)

    def name(self, keyid: str) -> str:
        """Return the name of a key holder, or the beginning of the key id."""
        return self.holders.get(keyid, keyid[:8])


class LibraryFiles:
    """Reads and writes below one library directory."""

    def __init__(self, directory: Path, lock_timeout_s: float = 30.0) -> None:
        self.directory = directory
        self.public = directory / "public"
        self.staged = directory / "staged"
        self.online = directory / "online"
        self.scratch = directory / "scratch"
        self._lock_timeout_s = lock_timeout_s
        self._depth = 0

    def create(self) -> None:
        """Create the empty directories; only its owner may read ``online``."""
        try:
            for path in (self.public / "metadata", self.public / "targets", self.staged / "targets", self.scratch):
                path.mkdir(parents=True, exist_ok=True)
            for path in (self.public, self.public / "metadata", self.public / "targets"):
                path.chmod(0o755)
            self.online.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"{self.directory}: {error.strerror}", code="library.disk") from error

    def config(self) -> LibraryConfig:
        """Read ``library.json``; raise SettingsError when this is no library or the file is not valid."""
        path = self.directory / CONFIG_NAME
        try:
            return LibraryConfig.model_validate_json(path.read_bytes())
        except OSError as error:
            raise SettingsError(f"{self.directory} is no library: {CONFIG_NAME}: {error.strerror}", code="library.absent") from error
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False))
            raise SettingsError(f"{path}: {what}", hint="correct the file; nothing was changed", code="library.absent") from error

    def write_config(self, config: LibraryConfig) -> None:
        """Replace ``library.json``."""
        document = json.dumps(config.model_dump(mode="json", by_alias=True), ensure_ascii=False, indent=2, sort_keys=True)
        self.write(self.directory / CONFIG_NAME, (document + "\n").encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the library; the same object may enter it several times.

        Raises:
            PublishError: another command holds it for longer than the timeout.
            SettingsError: this is no library.
        """
        if self._depth == 0:
            self.config()
            descriptor = self._acquire()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                os.close(descriptor)

    def _acquire(self) -> int:
        descriptor = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise PublishError("another model-library command uses this library", code="library.busy") from error
                time.sleep(_LOCK_POLL_S)
                continue
            try:
                shutil.rmtree(self.scratch, ignore_errors=True)  # left by a killed command
                self.scratch.mkdir(exist_ok=True)
            except OSError as error:
                os.close(descriptor)  # releases the lock
                raise PublishError(f"{self.scratch}: {error.strerror}; nothing was changed", code="library.disk") from error
            return descriptor

    def write(self, path: Path, data: bytes) -> None:
        """Replace a file atomically by ``data``."""
        part = self.scratch / f"{os.getpid()}.part"
        with part.open("wb") as stream:
            stream.write(data)
            atomic_files.flush(stream)
        self._place(part, path)

    def copy(self, source: Path, path: Path, sha256: str) -> int:
        """Copy a file atomically in bounded memory and return its length; raise PublishError when its digest differs."""
        part, digest = self.scratch / f"{os.getpid()}.part", hashlib.sha256()
        with source.open("rb") as reader, part.open("wb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
            atomic_files.flush(writer)
            length = writer.tell()
        if digest.hexdigest() != sha256:
            raise PublishError(f"{source.name} changed while it was being published", code="library.bundle")
        self._place(part, path)
        return length

    def move(self, source: Path, path: Path) -> None:
        """Move a flushed file to another directory of the library."""
        self._place(source, path)
        atomic_files.sync_directory(source.parent)

    def _place(self, source: Path, path: Path) -> None:
        """Rename a flushed file to its final path; below ``public`` other accounts may read it, whatever the umask is."""
        public = path.is_relative_to(self.public)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            for parent in path.parents:
                if parent == self.directory:
                    break
                if public and parent != self.public:
                    parent.chmod(0o755)
                atomic_files.sync_directory(parent.parent)
        if public:
            source.chmod(0o644)
        source.replace(path)
        atomic_files.sync_directory(path.parent)

    def metadata_path(self, role: str, version: int | None = None) -> Path:
        """Return the path of a role's published metadata; timestamp has no version."""
        return self.public / "metadata" / (f"{role}.json" if version is None else f"{version}.{role}.json")

    def staged_path(self, role: str) -> Path:
        """Return the path of metadata that waits for signatures."""
        return self.staged / f"{role}.json"

    def find_target(self, target: TargetFile) -> Path | None:
        """Return the path of a target's file, public or staged; None when it is missing."""
        return next((path for path in (self.public_target(target), self.staged_target(target)) if path.is_file()), None)

    def public_target(self, target: TargetFile) -> Path:
        """Return the public path of a target's file; its name begins with its hash (consistent snapshots)."""
        return self.public / "targets" / target.get_prefixed_paths()[0]

    def staged_target(self, target: TargetFile) -> Path:
        """Return the path of a target's file until it is signed."""
        return self.staged / "targets" / target.get_prefixed_paths()[0]


def read_metadata(path: Path) -> Metadata[Any]:
    """Read one metadata file.

    Raises:
        PublishError: it cannot be read, or is no TUF metadata.
    """
    try:
        return Metadata.from_bytes(path.read_bytes())
    except OSError as error:
        raise PublishError(f"{path}: {error.strerror}", code="library.disk") from error
    except DeserializationError as error:
        raise PublishError(f"{path} is no TUF metadata", code="library.refused") from error
