"""Images on disk: one AES-256-GCM file each, durable before it is acknowledged.

A file is written under ``incoming/``, flushed to the disk, and renamed to its place under ``content/``; a crash leaves either nothing or
a complete file. Its name is the digest of the image, so that a repeated write gives the same file. The name is also encrypted at the end
of the file, so that files cannot be exchanged for one another.

A file begins with ``CEA2``, the id of its key (8 bytes) and the nonce (12 bytes). Files of older versions begin with ``CEA1`` and the
nonce; they do not say their key.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection
from contextlib import suppress
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
_ANY_FILE: Final = "??/*"


class EncryptedFiles:
    """The encrypted files below one data directory; ``incoming`` and ``content`` are created in it.

    Args:
        data_dir: the data directory.
        keys: its keys; the key of the images is created with the first box.
        recorded: ids of keys that the database says the images are encrypted with.

    Attributes:
        key_ids: ids of the keys that are loaded.

    Raises:
        StoreError: ``key.missing`` or ``key.wrong``: there are images which these keys do not decrypt; nothing was changed.
    """

    def __init__(self, data_dir: Path, keys: Keys, recorded: Collection[str] = ()) -> None:
        self._incoming = data_dir / "incoming"
        self._content = data_dir / "content"
        try:
            if not (self._content / "ff").is_dir():
                for directory in (self._incoming, self._content, *(self._content / f"{i:02x}" for i in range(256))):
                    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                atomic_files.sync_directory(self._content)
                atomic_files.sync_directory(data_dir)
            self._keys = keys.content_keys(recorded, lambda: any(self._content.glob(_ANY_FILE)))
            self.key_ids = list(self._keys)
            if not recorded and not keys.recorded(CONTENT_KEY) and not self._decrypts_samples():
                raise StoreError("key.wrong", CONTENT_KEY)
            keys.record(CONTENT_KEY, self.key_ids)
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
                current = self.key_ids[0]
                header = _MAGIC + bytes.fromhex(current) + (nonce := secrets.token_bytes(_NONCE_BYTES))
                encryptor = Cipher(algorithms.AES(self._keys[current]), modes.GCM(nonce)).encryptor()
                encryptor.authenticate_additional_data(header)
                file.write(header)
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
        if bytes(blob[:4]) == _MAGIC:
            known = self._keys.get(bytes(blob[4 : 4 + _KEY_ID_BYTES]).hex())
            keys, start = [known] if known else [], 4 + _KEY_ID_BYTES
        else:
            keys, start = list(self._keys.values()), 4
        for key in keys:
            with suppress(InvalidTag, ValueError):
                return _decrypt(blob, start, key, name)
        raise StoreError("store.tampered", f"content {name[:12]}")

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
