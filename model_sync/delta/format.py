"""The format shared by encoder and decoder of deltas, and two readers that check every length."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from model_sync.errors import ModelSyncError

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC = b"CEAD"
VERSION = 1
HEADER = struct.Struct("<4sBBQQ32s32s")
CODEC_NUMBERS: dict[str, int] = {"zstd-prefix": 1, "tensor": 2}

# zstd-prefix: bytes of one segment, the largest prefix, and the entry of a segment: old offset, old length, frame length.
SEGMENT_BYTES = 32 * 2**20
PREFIX_BYTES = 48 * 2**20
SEGMENT = struct.Struct("<QII")
SEGMENT_WINDOW_LOG = 25

# tensor: the program and its byte streams; an entry of the table is stream number, length, packed length.
STREAM = struct.Struct("<BQQ")
PROGRAM, LITERALS, FIRST_PLANE = 0, 1, 2
CODES = {4: 17, 2: 18}  # differences of that many bits
ESCAPES = 19  # the rest of differences that were too large
STREAM_COUNT = 20
COPY, LITERAL = 0x00, 0x01
DIFFERENCE, GROUPED, NARROW = 0x10, 0x20, 0x30  # the first two plus the binary logarithm of the width, the last plus the bits
BLOCK_BYTES = 2**20  # differences are grouped, and rebuilt, in blocks of this many bytes
MAX_PROGRAM_BYTES = 2 * 2**20
MAX_OPERATIONS = 2**16
WINDOW_LOG = {PROGRAM: 21, LITERALS: 23} | dict.fromkeys(range(FIRST_PLANE, STREAM_COUNT), 21)

PIECE_BYTES = 2**20
_INPUT_BYTES = 2**18


class DeltaError(ModelSyncError):
    """A delta is damaged, made for another file, or does not build what was signed: the full file is fetched instead."""

    default_code = "delta.invalid"


class Source:
    """A file with exact reads at offsets; unlike with a memory map, a file that became shorter is an error and no crash."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        self._file = file
        self.length = os.fstat(file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``."""
        if offset + length > self.length:
            raise DeltaError(f"{self._name}: {length} bytes at {offset} are beyond its end at {self.length}")
        pieces = []
        try:
            while length and (piece := os.pread(self._file.fileno(), length, offset)):
                pieces.append(piece)
                offset += len(piece)
                length -= len(piece)
        except OSError as error:
            raise DeltaError(f"{self._name}: {error.strerror}") from error
        if length:
            raise DeltaError(f"{self._name} became shorter while it was read")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pieces(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield ``length`` bytes from ``offset`` in chunks."""
        for start in range(0, length, PIECE_BYTES):
            yield self.read(offset + start, min(PIECE_BYTES, length - start))


@contextmanager
def source(path: Path) -> Iterator[Source]:
    """Open a file for reading; raise DeltaError when it cannot be opened."""
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise DeltaError(f"{path}: {error.strerror}") from error
    with file:
        yield Source(path.name, file)


class Stream:
    """One zstd frame inside the delta that decompresses to exactly ``length`` bytes, read in chunks."""

    def __init__(self, delta: Source, offset: int, packed: int, length: int, window_log: int, prefix: bytes = b"") -> None:
        if offset + packed > delta.length:
            raise DeltaError("the delta ends before its declared end")
        self._delta, self._offset, self._end, self._left = delta, offset, offset + packed, length
        self._unpack = zstd.ZstdDecompressor(
            zstd_dict=as_prefix(prefix),
            options={zstd.DecompressionParameter.window_log_max: window_log},
        )

    def read(self, length: int) -> bytes:
        """Return exactly ``length`` bytes; raise DeltaError when fewer are left."""
        if length > self._left:
            raise DeltaError("the delta's program asks for more than its data holds")
        self._left -= length
        pieces = []
        while length:
            piece = self._more(length)
            pieces.append(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_all(self) -> bytes:
        """Return everything that is left."""
        return self.read(self._left)

    def finish(self) -> None:
        """Check that no declared byte is unused and that there are no undeclared bytes."""
        if self._left:
            raise DeltaError("the delta holds data that its program never uses")
        while not self._unpack.eof:
            if self._more(1):
                raise DeltaError("the delta unpacks to more than it declares")
        if self._unpack.unused_data or self._offset != self._end:
            raise DeltaError("the delta has bytes after its end")

    def _more(self, limit: int) -> bytes:
        """Return at most ``limit`` bytes; may be empty before the end."""
        if self._unpack.eof:
            raise DeltaError("the delta unpacks to less than it declares")
        data = b""
        if self._unpack.needs_input:
            data = self._delta.read(self._offset, min(_INPUT_BYTES, self._end - self._offset))
            self._offset += len(data)
            if not data:
                raise DeltaError("the delta ends in the middle of its data")
        piece: bytes = self._unpack.decompress(data, max_length=limit)
        return piece


def as_prefix(content: bytes) -> Any:
    """Return ``content`` as a prefix for the ``zstd_dict`` parameter; None below eight bytes, which the module refuses."""
    return zstd.ZstdDict(content, is_raw=True).as_prefix if len(content) >= 8 else None


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of the program, and the position after it."""
    value = 0
    for place in range(9):
        if at + place >= len(data):
            break
        value |= (data[at + place] & 0x7F) << 7 * place
        if data[at + place] < 0x80:
            return value, at + place + 1
    raise DeltaError("the delta's program has a number that does not end")


def grouping(before: NDArray[Any], shift: int) -> NDArray[np.intp]:
    """Return the order in which the differences of a block are stored: by the eight bits of the old element above ``shift``.

    For a float those bits are its exponent, which determines the distance of neighbouring values. The sort is stable, so the
    order is the same on every machine.
    """
    import numpy as np

    return np.argsort((before >> shift).astype(np.uint8), kind="stable")
