"""A file that is encrypted while it grows: what is uploaded in pieces, and what a request is spooled to (requirement R13).

The file begins with ``CES1``; then come records, each with its length (4 bytes), a nonce (12 bytes), and up to 256 KiB by AES-256-GCM. The
context (which file it is) and the place of the record in the file are authenticated, so that records cannot be exchanged. A record that a
crash cut off at the end is not counted, and the next one replaces it.
"""

from __future__ import annotations

import errno
import hmac
import io
import os
import secrets
import struct
import tempfile
from bisect import bisect_right
from pathlib import Path
from typing import IO, Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC: Final = b"CES1"
RECORD_BYTES: Final = 256 << 10
_HEAD: Final = struct.Struct(">I12s")
_TAG_BYTES: Final = 16
DOCUMENT: Final = b"CED1"


FileState = tuple[int, int]
"""Size in bytes and time of the last change in ns; another content of a file has another state."""


def file_state(status: os.stat_result) -> FileState:
    """The state of a file."""
    return status.st_size, status.st_mtime_ns


class EncryptedStream(io.RawIOBase):
    """An encrypted file that is read at any place and written at its end.

    Args:
        file: unbuffered, open for reading, and for writing where it is written; it is closed with this object.
        key: 256 bits.
        context: which file it is; the same at every opening.

    Attributes:
        length: bytes that it holds, before encryption.
        opened: state of the file in which its records were counted.
    """

    def __init__(self, file: IO[bytes], key: bytes, context: str) -> None:
        super().__init__()
        self._file, self._cipher, self._context = file, AESGCM(key), context.encode()
        self._places: list[int] = []  # of the records in the file
        self._starts: list[int] = []  # of their content
        self._end = len(MAGIC)
        self.length = 0
        self._position = 0
        self._decrypted: tuple[int, bytes] = (-1, b"")
        self._find_records()

    def append(self, chunk: bytes) -> None:
        """Write at most 256 KiB at the end.

        Raises:
            OSError: nothing of it is kept.
        """
        if not chunk:
            return
        nonce = secrets.token_bytes(12)
        record = _HEAD.pack(len(chunk), nonce) + self._cipher.encrypt(nonce, chunk, self._place(self.length))
        try:
            if not self._places:
                self._write(0, MAGIC)
            if os.fstat(self.fileno()).st_size > self._end:  # a record that a crash cut off
                os.ftruncate(self.fileno(), self._end)
            self._write(self._end, record)
        except OSError:
            self.truncate_to(self._end)
            raise
        self._places.append(self._end)
        self._starts.append(self.length)
        self._end += len(record)
        self.length += len(chunk)

    def truncate_to(self, end: int) -> None:
        """Cut the file off where a record ended (:attr:`end`)."""
        while self._places and self._places[-1] >= end:
            self._places.pop()
            self.length = self._starts.pop()
        self._end = end
        self._decrypted = (-1, b"")
        os.ftruncate(self._file.fileno(), end if self._places else 0)

    @property
    def end(self) -> int:
        """Where the last complete record ends in the file."""
        return self._end

    def fileno(self) -> int:
        """The descriptor of the encrypted file, to flush it."""
        return self._file.fileno()

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read at any place."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the place of the next reading."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Read at most one record into the buffer; raises OSError where the file was changed."""
        if self._position >= self.length:
            return 0
        number = bisect_right(self._starts, self._position) - 1
        if self._decrypted[0] != number:
            self._decrypted = number, self._decrypt(number)
        start = self._position - self._starts[number]
        part = self._decrypted[1][start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()

    def _find_records(self) -> None:
        self.opened = file_state(os.fstat(self._file.fileno()))
        size = self.opened[0]
        if os.pread(self._file.fileno(), len(MAGIC), 0) != MAGIC:  # empty, or cut off within the first bytes
            return
        while self._end + _HEAD.size <= size:
            length, _ = _HEAD.unpack(os.pread(self._file.fileno(), _HEAD.size, self._end))
            after = self._end + _HEAD.size + length + _TAG_BYTES
            if not 0 < length <= RECORD_BYTES or after > size:
                break
            self._places.append(self._end)
            self._starts.append(self.length)
            self._end, self.length = after, self.length + length

    def _decrypt(self, number: int) -> bytes:
        place = self._places[number]
        end = self._places[number + 1] if number + 1 < len(self._places) else self._end
        record = os.pread(self._file.fileno(), end - place, place)
        try:
            return self._cipher.decrypt(record[4 : _HEAD.size], record[_HEAD.size :], self._place(self._starts[number]))
        except (InvalidTag, ValueError) as error:
            raise OSError(errno.EIO, "the encrypted file was changed") from error

    def _place(self, start: int) -> bytes:
        return self._context + start.to_bytes(8, "big")

    def _write(self, place: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, place)
            view, place = view[written:], place + written


class EncryptedSpool(io.RawIOBase):
    """A temporary file without a name whose key is in the memory of this process only: written once, then read.

    Args:
        directory: where its bytes are.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by close()
        self._stream = EncryptedStream(file, secrets.token_bytes(32), "spool")
        self._pending = bytearray()

    def write(self, data: Any, /) -> int:
        """Append to the end; raises OSError."""
        self._pending += data
        while len(self._pending) >= RECORD_BYTES:
            self._stream.append(bytes(self._pending[:RECORD_BYTES]))
            del self._pending[:RECORD_BYTES]
        return len(data)

    def readable(self) -> bool:
        """It can be read."""
        return True

    def writable(self) -> bool:
        """It can be written."""
        return True

    def seekable(self) -> bool:
        """It can be read at any place."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the place of the next reading."""
        self._append_pending()
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any, /) -> int:
        """Read at most 256 KiB."""
        self._append_pending()
        return self._stream.readinto(buffer)

    def close(self) -> None:
        """Delete it."""
        self._stream.close()
        super().close()

    def _append_pending(self) -> None:
        self._stream.append(bytes(self._pending))
        self._pending.clear()


def derive_key(root: bytes, context: str) -> bytes:
    """The key of one file, of a key for many (NIST SP 800-108, one block of HMAC-SHA256)."""
    return hmac.new(root, b"\1clinic box\0" + context.encode(), "sha256").digest()


def encrypt_document(key: bytes, context: str, data: bytes) -> bytes:
    """Encrypt a small file as a whole."""
    nonce = secrets.token_bytes(12)
    return DOCUMENT + nonce + AESGCM(key).encrypt(nonce, data, context.encode())


def decrypt_document(key: bytes, context: str, data: bytes) -> bytes:
    """Decrypt what :func:`encrypt_document` returned; raises ValueError where key, context or bytes do not fit."""
    try:
        if not data.startswith(DOCUMENT):
            raise ValueError("it is not encrypted")
        return AESGCM(key).decrypt(data[4:16], data[16:], context.encode())
    except InvalidTag as error:
        raise ValueError("the encrypted file was changed") from error
