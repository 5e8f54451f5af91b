"""Deltas between two versions of one file, so that a slow line carries what changed and not the model.

A delta is an ordinary signed target; the file it rebuilds must still match its own signed digest, so a delta can waste a
download and never change a model. Even so the decoder trusts no number in it: every length is checked against the signed
length of the file to build and against the old file before it is used, and nothing is unpacked beyond what was declared.

Two codecs share one header (little-endian): magic ``CEAD``, version, codec, lengths and SHA-256 of the old and the new file.

``zstd-prefix``
    The new file in segments of 32 MiB, each a zstd frame that has a range of the old file as its prefix. Good when
    stretches of bytes moved or stayed.
``tensor``
    A program of copies from the old file, literal bytes and differences: n elements of 1, 2, 4 or 8 bytes, each the old
    element plus a wrapping difference, zigzag coded, one zstd stream per byte plane. Good when every weight moved a
    little, which no general tool can see. The decoder knows nothing of ONNX: ``delta_onnx`` finds the tensors.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model_sync.documents import Codec
from model_sync.errors import ModelSyncError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["MAX_RATIO", "DeltaError", "Encoded", "apply", "best", "encode_with", "worth_publishing"]

MAX_RATIO = 0.7
MAGIC = b"CEAD"
VERSION = 1
HEADER = struct.Struct("<4sBBQQ32s32s")
CODEC_NUMBERS: dict[Codec, int] = {"zstd-prefix": 1, "tensor": 2}

# zstd-prefix: what one segment builds, the most it may look back on, and its entry: old offset, old length, frame length.
SEGMENT_BYTES = 32 * 2**20
PREFIX_BYTES = 48 * 2**20
SEGMENT = struct.Struct("<QII")
_SEGMENT_WINDOW_LOG = 25

# tensor: the program and the byte streams it draws on; an entry of the table is stream number, length, packed length.
STREAM = struct.Struct("<BQQ")
PROGRAM, LITERALS, FIRST_PLANE = 0, 1, 2
STREAM_COUNT = 17
COPY, LITERAL, DIFFERENCE, ORDERED = 0x00, 0x01, 0x10, 0x20
MAX_PROGRAM_BYTES = 2 * 2**20
MAX_OPERATIONS = 2**16
WINDOW_LOG = {PROGRAM: 21, LITERALS: 23} | dict.fromkeys(range(FIRST_PLANE, STREAM_COUNT), 21)

_PIECE_BYTES = 2**20
_INPUT_BYTES = 2**18
_HINT = "nothing was changed; the full file is fetched instead"

Write = Callable[[bytes], object]


class DeltaError(ModelSyncError):
    """A delta is damaged, made for another file, or does not build what was signed: the full file is fetched instead."""

    def __init__(self, message: str, *, hint: str = _HINT) -> None:
        """Take the sentence; what to do is always the same."""
        super().__init__(message, hint=hint)


@dataclass(frozen=True)
class Encoded:
    """A finished delta: ``data`` is the file to publish, ``codec`` the name that ``apply`` needs."""

    codec: Codec
    data: bytes


def worth_publishing(delta_length: int, plain_length: int) -> bool:
    """Say whether a delta of ``delta_length`` bytes saves enough against a plain download: under 70 % of it."""
    return delta_length < MAX_RATIO * plain_length


def best(old: Path, new: Path) -> Encoded:
    """Return the smallest delta that makes ``new`` out of ``old``; both are read into memory (central side only).

    Level 19 with a prefix takes about a second per megabyte.
    """
    return Encoded("zstd-prefix", encode_with("zstd-prefix", old.read_bytes(), new.read_bytes()))


def encode_with(codec: Codec, old: bytes, new: bytes) -> bytes:
    """Return the delta from ``old`` to ``new`` in one codec, whatever it costs; any two byte strings have one.

    Raises:
        DeltaError: the codec is unknown.
    """
    if codec == "zstd-prefix":
        return _encode_prefix(old, new, level=19)
    raise DeltaError(f"there is no delta codec {codec!r}")


def header(codec: Codec, old: bytes, new: bytes) -> bytes:
    """Return the header of a delta from ``old`` to ``new``."""
    digests = hashlib.sha256(old).digest(), hashlib.sha256(new).digest()
    return HEADER.pack(MAGIC, VERSION, CODEC_NUMBERS[codec], len(old), len(new), *digests)


def apply(codec: str, old: Path, delta: Path, out: Path, *, to_sha256: str, to_length: int) -> None:
    """Rebuild into ``out`` the file of ``to_length`` bytes whose SHA-256 is ``to_sha256``; memory stays bounded.

    Files are read and written in pieces; ``out`` is not synced to disk, that is the caller's. When anything fails ``out``
    is removed.

    Raises:
        DeltaError: the delta is damaged, of an unknown codec or version, made for another file than ``old``, does not
            build the expected file, or ``old`` or ``delta`` cannot be read.
        OSError: ``out`` cannot be written, such as on a full disk: that is not the delta's fault.
    """
    with ExitStack() as stack:
        old_file = stack.enter_context(_source(old))
        delta_file = stack.enter_context(_source(delta))
        if out.exists() and any(out.samefile(path) for path in (old, delta)):
            raise DeltaError(f"{out} is one of the files that it would be made of")
        decode = _checked_header(codec, old_file, delta_file, to_sha256, to_length)
        out.unlink(missing_ok=True)  # never written through a link
        try:
            with out.open("xb") as target:
                _build(decode, old_file, delta_file, target, to_sha256, to_length)
        except BaseException:
            out.unlink(missing_ok=True)
            raise


class _Source:
    """A file read at explicit places, every read exact: a file cut short is an error and never a crash, as a mapping's is."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        self._file = file
        self.length = os.fstat(file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``."""
        if offset + length > self.length:
            raise DeltaError(f"{self._name}: {length} bytes at {offset} lie beyond its end at {self.length}")
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
        """Yield ``length`` bytes from ``offset`` in pieces."""
        for start in range(0, length, _PIECE_BYTES):
            yield self.read(offset + start, min(_PIECE_BYTES, length - start))


@contextmanager
def _source(path: Path) -> Iterator[_Source]:
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise DeltaError(f"{path}: {error.strerror}") from error
    with file:
        yield _Source(path.name, file)


Decode = Callable[[_Source, _Source, int, Write], None]


def _checked_header(codec: str, old: _Source, delta: _Source, to_sha256: str, to_length: int) -> Decode:
    """Check every field of the header, the old file's digest last because it costs a read; return the codec's decoder."""
    if codec not in _DECODERS:
        raise DeltaError(f"there is no delta codec {codec!r}")
    number, decode = _DECODERS[codec]
    magic, version, *rest = HEADER.unpack(delta.read(0, HEADER.size))
    if magic != MAGIC:
        raise DeltaError("the file is not a delta")
    if version != VERSION:
        raise DeltaError(f"a delta of version {version}; this version of the agent knows {VERSION}")
    actual_codec, from_length, actual_to_length, from_sha256, actual_to_sha256 = rest
    if actual_codec != number:
        raise DeltaError(f"the delta is not in the codec {codec}")
    if (actual_to_length, actual_to_sha256.hex()) != (to_length, to_sha256.lower()):
        raise DeltaError("the delta builds another file than the one asked for")
    digest = hashlib.sha256()
    if from_length == old.length:
        for piece in old.pieces(0, old.length):
            digest.update(piece)
    if from_length != old.length or digest.digest() != from_sha256:
        raise DeltaError("the delta was made for another file than the one on this box")
    return decode


def _build(decode: Decode, old: _Source, delta: _Source, target: BinaryIO, to_sha256: str, to_length: int) -> None:
    digest = hashlib.sha256()
    written = 0

    def write(piece: bytes) -> None:
        nonlocal written
        written += len(piece)
        if written > to_length:
            raise DeltaError(f"the delta builds more than the {to_length} bytes expected")
        digest.update(piece)
        target.write(piece)

    try:
        decode(old, delta, to_length, write)
    except zstd.ZstdError as error:
        raise DeltaError(f"the delta is damaged: {error}") from error
    except MemoryError as error:
        raise DeltaError("the delta needs more memory than there is") from error
    if written != to_length or digest.hexdigest() != to_sha256.lower():
        raise DeltaError("the rebuilt file is not the one expected")


class _Stream:
    """One zstd frame inside the delta that unpacks to exactly ``length`` bytes, drawn piece by piece."""

    def __init__(self, delta: _Source, offset: int, packed: int, length: int, window_log: int, prefix: bytes = b"") -> None:
        if offset + packed > delta.length:
            raise DeltaError("the delta ends before its declared end")
        self._delta, self._offset, self._end, self._left = delta, offset, offset + packed, length
        self._unpack = zstd.ZstdDecompressor(
            zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix if prefix else None,
            options={zstd.DecompressionParameter.window_log_max: window_log},
        )

    def read(self, length: int) -> bytes:
        """Return exactly ``length`` bytes, which must not be more than are left."""
        if length > self._left:
            raise DeltaError("the delta's program asks for more than its data holds")
        self._left -= length
        pieces = []
        while length:
            piece = self._more(length)
            pieces.append(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def finish(self) -> None:
        """Make sure that nothing is left over, neither declared bytes nor undeclared ones."""
        if self._left:
            raise DeltaError("the delta holds data that its program never uses")
        while not self._unpack.eof:
            if self._more(1):
                raise DeltaError("the delta unpacks to more than it declares")
        if self._unpack.unused_data or self._offset != self._end:
            raise DeltaError("the delta has bytes after its end")

    def _more(self, limit: int) -> bytes:
        """Return at most ``limit`` bytes; may be empty although there is more to come."""
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


def _encode_prefix(old: bytes, new: bytes, *, level: int) -> bytes:
    parts = [header("zstd-prefix", old, new)]
    for start in range(0, len(new), SEGMENT_BYTES):
        piece = new[start : start + SEGMENT_BYTES]
        # The same place in the old file, with the slack on both sides; all of it where it fits.
        begin = max(0, min(start - (PREFIX_BYTES - SEGMENT_BYTES) // 2, len(old) - PREFIX_BYTES))
        prefix = old[begin : begin + PREFIX_BYTES]
        packer = zstd.ZstdCompressor(
            options={
                zstd.CompressionParameter.compression_level: level,
                zstd.CompressionParameter.window_log: _SEGMENT_WINDOW_LOG,
                zstd.CompressionParameter.enable_long_distance_matching: 1,
            },
            zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix if prefix else None,
        )
        packer.set_pledged_input_size(len(piece))
        frame = packer.compress(piece, zstd.ZstdCompressor.FLUSH_FRAME)
        parts += [SEGMENT.pack(begin, len(prefix), len(frame)), frame]
    return b"".join(parts)


def _decode_prefix(old: _Source, delta: _Source, to_length: int, write: Write) -> None:
    place = HEADER.size
    for start in range(0, to_length, SEGMENT_BYTES):
        begin, length, packed = SEGMENT.unpack(delta.read(place, SEGMENT.size))
        place += SEGMENT.size
        if length > PREFIX_BYTES:
            raise DeltaError(f"the delta looks back on {length} bytes, more than the {PREFIX_BYTES} allowed")
        segment = min(SEGMENT_BYTES, to_length - start)
        stream = _Stream(delta, place, packed, segment, _SEGMENT_WINDOW_LOG, old.read(begin, length))
        for done in range(0, segment, _PIECE_BYTES):
            write(stream.read(min(_PIECE_BYTES, segment - done)))
        stream.finish()
        place += packed
    if place != delta.length:
        raise DeltaError("the delta has bytes after its end")


_DECODERS: dict[str, tuple[int, Decode]] = {
    "zstd-prefix": (CODEC_NUMBERS["zstd-prefix"], _decode_prefix),
}
