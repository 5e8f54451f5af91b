"""Images on disk: one AES-256-GCM file each, durable before it is acknowledged.

A file is written under ``incoming/``, flushed to the disk, and renamed to its place under ``content/``; a crash leaves either nothing or
a complete file. Its name is the digest of the image, so that a repeated write gives the same file. The name is also encrypted at the end
of the file, so that files cannot be exchanged for one another.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from appliance.core.errors import StoreError
from appliance.store.database import store_error
from model_sync import atomic_files

_MAGIC: Final = b"CEA1"
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_NAME_BYTES: Final = 32
_CHUNK_BYTES: Final = 1 << 20
_ABANDONED_S: Final = 3600.0


class EncryptedFiles:
    """The encrypted files below one data directory; ``keys``, ``incoming`` and ``content`` are created in it."""

    def __init__(self, data_dir: Path) -> None:
        self._incoming = data_dir / "incoming"
        self._content = data_dir / "content"
        try:
            if not (self._content / "ff").is_dir():
                for directory in (self._incoming, self._content, *(self._content / f"{i:02x}" for i in range(256))):
                    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                atomic_files.sync_directory(self._content)
                atomic_files.sync_directory(data_dir)
            self._key = load_key(data_dir / "keys", "content.key")
        except OSError as error:
            raise store_error(error) from error

    def write(self, data: bytes, digest: Callable[[], str]) -> str:
        """Make ``data`` durable and return its name.

        Args:
            data: the content.
            digest: returns the name, 64 hex digits; called only after the data is written, so that hashing can run in parallel.

        Raises:
            StoreError: nothing was stored; code ``ingest.disk_full`` when the disk is full.
        """
        temporary = self._incoming / f"{secrets.token_hex(8)}.part"
        try:
            with open(temporary, "xb") as file:
                nonce = secrets.token_bytes(_NONCE_BYTES)
                encryptor = Cipher(algorithms.AES(self._key), modes.GCM(nonce)).encryptor()
                file.write(_MAGIC + nonce)
                view = memoryview(data)
                for start in range(0, len(view), _CHUNK_BYTES):  # in chunks, so that a large image is not in memory twice
                    file.write(encryptor.update(view[start : start + _CHUNK_BYTES]))
                name = digest()
                file.write(encryptor.update(bytes.fromhex(name)) + encryptor.finalize() + encryptor.tag)
                atomic_files.flush(file)
            if self.holds(name):  # an acknowledged file is never replaced
                temporary.unlink()
            else:
                atomic_files.move(temporary, self._path(name))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise store_error(error) from error
        return name

    def holds(self, name: str) -> bool:
        """Whether the file of that name exists and is intact."""
        if not self._path(name).exists():
            return False
        try:
            self.read(name)
        except StoreError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """Decrypt a file.

        Raises:
            StoreError: ``store.missing``, or ``store.tampered`` where the file was changed on disk or belongs to another name.
        """
        try:
            blob = memoryview(self._path(name).read_bytes())
        except OSError as error:
            raise StoreError("store.missing", str(error)) from error
        nonce, body, tag = blob[4 : 4 + _NONCE_BYTES], blob[4 + _NONCE_BYTES : -_TAG_BYTES], blob[-_TAG_BYTES:]
        try:
            decryptor = Cipher(algorithms.AES(self._key), modes.GCM(bytes(nonce), bytes(tag))).decryptor()
            plain = decryptor.update(body[:-_NAME_BYTES])
            sealed_name = decryptor.update(body[-_NAME_BYTES:]) + decryptor.finalize()
        except (InvalidTag, ValueError) as error:
            raise StoreError("store.tampered", f"content {name[:12]}") from error
        if sealed_name.hex() != name:
            raise StoreError("store.tampered", f"content {name[:12]}")
        return plain

    def sweep(self) -> int:
        """Remove incomplete files that a crash left under ``incoming/``; they were never acknowledged. Returns how many.

        Only files older than an hour: another process may be writing a younger one.
        """
        removed = 0
        for part in self._incoming.glob("*.part"):
            with suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > _ABANDONED_S:
                    part.unlink()
                    removed += 1
        return removed

    def _path(self, name: str) -> Path:
        return self._content / name[:2] / name


def load_key(directory: Path, name: str) -> bytes:
    """Load a 256-bit key of the box, which is created on first use and readable by its owner only."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / name
    if not path.exists():
        fresh = directory / f"{name}.{secrets.token_hex(4)}"
        atomic_files.create(fresh, secrets.token_bytes(32), 0o600)
        try:
            with suppress(FileExistsError):  # another process was first: its key is used
                path.hardlink_to(fresh)
        finally:
            fresh.unlink()
        atomic_files.sync_directory(directory)
    return path.read_bytes()
