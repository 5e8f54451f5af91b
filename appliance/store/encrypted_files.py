"""Images on disk: one AES-256-GCM file each, durable before it is acknowledged.

A file is written under ``incoming/``, flushed to the disk, and renamed to its place under ``content/``; a crash leaves either nothing or
a complete file. Its name is the digest of the image, so that a repeated write gives the same file. The name is also encrypted at the end
of the file, so that files cannot be exchanged for one another.

A file begins with ``CEA2``, the id of its key (8 bytes) and the nonce (12 bytes). Files of older versions begin with ``CEA1`` and the
nonce; they do not say their key.

The key of new files can be exchanged while several processes write (:mod:`appliance.store.key_rotation`): a writer holds a shared lock on
``content`` and looks whether the key file changed; the exchange takes the lock exclusively, for a moment.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from appliance.core.errors import StoreError
from appliance.store.database import store_error
from appliance.store.keys import CONTENT_KEY, Keys
from model_sync import atomic_files

_MAGIC: Final = b"CEA2"
_MAGIC_1: Final = b"CEA1"
_KEY_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_NAME_BYTES: Final = 32
_CHUNK_BYTES: Final = 1 << 20
_ABANDONED_S: Final = 3600.0
# Of a box that recorded no key: so many files may be damaged before its key counts as the wrong one.
_SAMPLES: Final = 32
_CONTENT: Final = "content"
_ANY_FILE: Final = "??/*"


def has_content(data_dir: Path) -> bool:
    """Whether there are encrypted files below a data directory."""
    return any((data_dir / _CONTENT).glob(_ANY_FILE))


class EncryptedFiles:
    """The encrypted files below one data directory; ``incoming`` and ``content`` are created in it.

    Args:
        data_dir: the data directory.
        keys: its keys; the key of the images is created with the first box.
        recorded: returns the ids of keys that the database says the images are encrypted with.
        record: writes them to the database.

    Raises:
        StoreError: ``key.missing`` or ``key.wrong``: there are images which these keys do not decrypt; nothing was changed.
    """

    def __init__(self, data_dir: Path, keys: Keys, recorded: Callable[[], Collection[str]], record: Callable[[list[str]], None]) -> None:
        self._key_files = keys
        self._incoming = data_dir / "incoming"
        self._content = data_dir / _CONTENT
        try:
            if not (self._content / "ff").is_dir():
                for directory in (self._incoming, self._content, *(self._content / f"{i:02x}" for i in range(256))):
                    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                atomic_files.sync_directory(self._content)
                atomic_files.sync_directory(data_dir)
            with self.locked():  # an exchange destroys no key between loading and recording
                known = recorded()
                self._keys = keys.content_keys(known, lambda: has_content(data_dir))
                self._version = self._key_version()
                if not known and not keys.recorded(CONTENT_KEY) and not self._decrypts_samples():
                    raise StoreError("key.wrong", CONTENT_KEY)
                keys.record(CONTENT_KEY, self.key_ids)
                record(self.key_ids)
        except OSError as error:
            raise store_error(error) from error

    @property
    def key_ids(self) -> list[str]:
        """Ids of the keys that are loaded; new files are encrypted with the first."""
        return list(self._keys)

    @contextmanager
    def locked(self, *, is_exclusive: bool = False) -> Iterator[None]:
        """Hold the lock on the exchange of the key: shared for a writer, exclusive for the exchange. Raises OSError."""
        descriptor = os.open(self._content, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if is_exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    def write(self, data: bytes, digest: Callable[[], str]) -> str:
        """Make ``data`` durable and return its name.

        Args:
            data: the content.
            digest: returns the name, 64 hex digits; called only after the data is written, so that hashing can run in parallel.

        Raises:
            StoreError: nothing was stored; code ``ingest.disk_full`` when the disk is full.
        """
        try:
            with self.locked():
                self.load_new_keys()
                return self._write(data, digest, is_replacing=False)
        except OSError as error:
            raise store_error(error) from error

    def encrypt_again(self, name: str) -> bool:
        """Encrypt a file with the key of new files, where it is not; returns whether it is now.

        Raises:
            StoreError: it cannot be written; the file is as before.
        """
        if self.key_of(name) == self.key_ids[0]:
            return True
        try:
            data = self.read(name)
        except StoreError:  # damaged: whoever looks for what is left of it needs its key
            return False
        try:
            with self.locked():
                self._write(data, lambda: name, is_replacing=True)
        except OSError as error:
            raise store_error(error) from error
        return True

    def names(self) -> Iterator[str]:
        """The names of all files."""
        return (path.name for path in self._content.glob(_ANY_FILE))

    def key_of(self, name: str) -> str:
        """The id of the key that a file names; empty where it names none. Raises StoreError ``store.missing``."""
        try:
            with open(self._path(name), "rb") as file:
                head = file.read(len(_MAGIC) + _KEY_ID_BYTES)
        except OSError as error:
            raise StoreError("store.missing", str(error)) from error
        return head[len(_MAGIC) :].hex() if head.startswith(_MAGIC) else ""

    def load_new_keys(self) -> bool:
        """Load the keys again where another process exchanged them; the caller holds the lock. Returns whether they were exchanged.

        Raises StoreError and OSError.
        """
        version = self._key_version()
        if version == self._version:
            return False
        self._keys = self._key_files.content_keys((), lambda: True)
        self._version = version
        return True

    def forget_old_keys(self) -> None:
        """Keep only the key of new files in this process."""
        self._keys = dict([next(iter(self._keys.items()))])

    def _key_version(self) -> tuple[int, int]:
        stat = (self._key_files.directory / CONTENT_KEY).stat()
        return stat.st_ino, stat.st_mtime_ns

    def _write(self, data: bytes, digest: Callable[[], str], *, is_replacing: bool) -> str:
        """Write a file, flush it, and rename it to its place; raises OSError."""
        temporary = self._incoming / f"{secrets.token_hex(8)}.part"
        try:
            with open(temporary, "xb") as file:
                current, key = next(iter(self._keys.items()))
                header = _MAGIC + bytes.fromhex(current) + (nonce := secrets.token_bytes(_NONCE_BYTES))
                encryptor = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
                encryptor.authenticate_additional_data(header)
                file.write(header)
                view = memoryview(data)
                for start in range(0, len(view), _CHUNK_BYTES):  # in chunks, so that a large image is not in memory twice
                    file.write(encryptor.update(view[start : start + _CHUNK_BYTES]))
                name = digest()
                file.write(encryptor.update(bytes.fromhex(name)) + encryptor.finalize() + encryptor.tag)
                atomic_files.flush(file)
            if not is_replacing and self.holds(name):  # an acknowledged file is never replaced
                temporary.unlink()
            else:
                atomic_files.move(temporary, self._path(name))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
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
        for _ in range(2):
            try:
                blob = memoryview(self._path(name).read_bytes())
            except OSError as error:
                raise StoreError("store.missing", str(error)) from error
            for key, start in self._candidates(blob):
                with suppress(InvalidTag, ValueError):
                    return _decrypt(blob, start, key, name)
            try:
                # Another process encrypted it with a new key, or the key went while it was read: then it is looked at once more.
                with self.locked():
                    is_exchanged = self.load_new_keys()
                if not is_exchanged and self.key_of(name) in ("", bytes(blob[len(_MAGIC) :][:_KEY_ID_BYTES]).hex()):
                    break
            except OSError as error:
                raise store_error(error) from error
        raise StoreError("store.tampered", f"content {name[:12]}")

    def _candidates(self, blob: memoryview) -> list[tuple[bytes, int]]:
        """The keys that may decrypt a file, with the place of its nonce."""
        if bytes(blob[:4]) != _MAGIC:
            return [(key, 4) for key in self._keys.values()]
        known = self._keys.get(bytes(blob[4 : 4 + _KEY_ID_BYTES]).hex())
        return [(known, 4 + _KEY_ID_BYTES)] if known else []

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

    def _decrypts_samples(self) -> bool:
        """Whether the keys decrypt one of the first files at least, or there is none."""
        names = [path.name for path in islice(self._content.glob(_ANY_FILE), _SAMPLES)]
        return not names or any(self.holds(name) for name in names)

    def _path(self, name: str) -> Path:
        return self._content / name[:2] / name


def _decrypt(blob: memoryview, start: int, key: bytes, name: str) -> bytes:
    """Decrypt a file whose nonce begins at ``start``; raises InvalidTag or ValueError where key, name or content do not fit."""
    nonce, body, tag = blob[start : start + _NONCE_BYTES], blob[start + _NONCE_BYTES : -_TAG_BYTES], blob[-_TAG_BYTES:]
    decryptor = Cipher(algorithms.AES(key), modes.GCM(bytes(nonce), bytes(tag))).decryptor()
    if bytes(blob[:4]) != _MAGIC_1:
        decryptor.authenticate_additional_data(bytes(blob[: start + _NONCE_BYTES]))
    plain = decryptor.update(body[:-_NAME_BYTES])
    sealed_name = decryptor.update(body[-_NAME_BYTES:]) + decryptor.finalize()
    if sealed_name.hex() != name:
        raise ValueError("the file belongs to another name")
    return plain
