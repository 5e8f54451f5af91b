"""Deltas between two versions of one file, so that a slow link carries the changes and not the complete model.

A delta is an ordinary signed target; the file that it rebuilds must match its own signed digest, so a bad delta can waste a download but
never change a model. The decoder checks every length against the signed length of the new file and against the old file before it is
used, and decompresses nothing beyond the declared length.

Two codecs share one header (little-endian): magic ``CEAD``, version, codec, lengths and SHA-256 of the old and the new file.

``zstd-prefix``
    The new file in segments of 32 MiB, each a zstd frame with a range of the old file as its prefix. For files in which ranges of
    bytes moved or did not change.
``tensor``
    A program of copies from the old file, literal bytes and differences: n elements of 1, 2, 4 or 8 bytes, each the old
    element plus a wrapping difference, zigzag coded, one zstd stream per byte plane. Differences of floats may be grouped
    by the old element's exponent; those of bytes may be packed into 2 or 4 bits, where the code of all ones continues in a
    stream of escapes. For models in which every weight changed a little. The decoder does not parse ONNX: the encoder finds the
    tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model_sync.delta import format as fmt
from model_sync.delta.format import DeltaError, Source, Stream, grouping, read_varint, source, zstd
from model_sync.trust.documents import Codec

__all__ = ["MAX_RATIO", "DeltaError", "Encoded", "apply", "best", "encode_with", "is_worth_publishing"]

MAX_RATIO = 0.7
_SMALL_BYTES = 2**20  # both codecs are tried below this
Write = Callable[[bytes], object]


@dataclass(frozen=True)
class Encoded:
    """A finished delta: ``data`` is the file to publish, ``codec`` the name that ``apply`` needs."""

    codec: Codec
    data: bytes


def is_worth_publishing(delta_length: int, plain_length: int) -> bool:
    """Return whether a delta saves enough against a full download: it must be under 70 % of it."""
    return delta_length < MAX_RATIO * plain_length


def best(old: Path, new: Path) -> Encoded:
    """Return the smallest delta that builds ``new`` from ``old``; both are read into memory (central side only).

    Level 19 with a prefix takes about a second per megabyte, so for large files it is tried only when a fast level, whose result
    is within 30 %, shows that it could be smaller. 30 MB take up to half a minute.
    """
    from model_sync.delta import encoder as delta_encoder  # needs numpy: imported only where deltas are made

    old_bytes, new_bytes = old.read_bytes(), new.read_bytes()
    tensor = encode_with("tensor", old_bytes, new_bytes)
    if len(new_bytes) > _SMALL_BYTES and len(delta_encoder.encode_prefix(old_bytes, new_bytes, level=3)) > 1.3 * len(tensor):
        return Encoded("tensor", tensor)
    prefix = encode_with("zstd-prefix", old_bytes, new_bytes)
    return Encoded("tensor", tensor) if len(tensor) <= len(prefix) else Encoded("zstd-prefix", prefix)


def encode_with(codec: Codec, old: bytes, new: bytes) -> bytes:
    """Return the delta from ``old`` to ``new`` in one codec, of any size; any two byte strings have one.

    Raises:
        DeltaError: the codec is unknown.
    """
    from model_sync.delta import encoder as delta_encoder

    if codec not in fmt.CODEC_NUMBERS:
        raise DeltaError(f"there is no delta codec {codec!r}")
    digests = hashlib.sha256(old).digest(), hashlib.sha256(new).digest()
    header = fmt.HEADER.pack(fmt.MAGIC, fmt.VERSION, fmt.CODEC_NUMBERS[codec], len(old), len(new), *digests)
    return header + (delta_encoder.encode_prefix(old, new) if codec == "zstd-prefix" else delta_encoder.encode_tensor(old, new))


def apply(codec: str, old: Path, delta: Path, out: Path, *, to_sha256: str, to_length: int) -> None:
    """Rebuild into ``out`` the file of ``to_length`` bytes whose SHA-256 is ``to_sha256``; memory stays bounded.

    Files are read and written in chunks; the caller flushes ``out``. An existing ``out`` is replaced; after an error there is none.

    Raises:
        DeltaError: the delta is damaged, of an unknown codec or version, made for another file than ``old``, does not
            build the expected file, or ``old`` or ``delta`` cannot be read.
        OSError: ``out`` cannot be written, such as on a full disk.
    """
    if out.exists() and any(path.exists() and out.samefile(path) for path in (old, delta)):
        raise DeltaError(f"{out} is one of the input files")
    out.unlink(missing_ok=True)  # never written through a link
    try:
        with source(old) as old_file, source(delta) as delta_file:
            decode = _check_header(codec, old_file, delta_file, to_sha256, to_length)
            with out.open("xb") as target:
                _build(decode, old_file, delta_file, target, to_sha256, to_length)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


Decode = Callable[[Source, Source, int, Write], None]


def _check_header(codec: str, old: Source, delta: Source, to_sha256: str, to_length: int) -> Decode:
    """Check every field of the header, the old file's digest last because that reads the file; return the decoder."""
    if codec not in _DECODERS:
        raise DeltaError(f"there is no delta codec {codec!r}")
    magic, version, *rest = fmt.HEADER.unpack(delta.read(0, fmt.HEADER.size))
    if magic != fmt.MAGIC:
        raise DeltaError("the file is not a delta")
    if version != fmt.VERSION:
        raise DeltaError(f"a delta of version {version}; this version of the agent knows {fmt.VERSION}")
    actual_codec, from_length, actual_to_length, from_sha256, actual_to_sha256 = rest
    if actual_codec != fmt.CODEC_NUMBERS.get(codec):
        raise DeltaError(f"the delta is not in the codec {codec}")
    if (actual_to_length, actual_to_sha256.hex()) != (to_length, to_sha256.lower()):
        raise DeltaError("the delta builds another file than the one asked for")
    digest = hashlib.sha256()
    if from_length == old.length:
        for piece in old.pieces(0, old.length):
            digest.update(piece)
    if from_length != old.length or digest.digest() != from_sha256:
        raise DeltaError("the delta was made for another file than the one on this box")
    return _DECODERS[codec]


def _build(decode: Decode, old: Source, delta: Source, target: BinaryIO, to_sha256: str, to_length: int) -> None:
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


def _decode_prefix(old: Source, delta: Source, to_length: int, write: Write) -> None:
    place = fmt.HEADER.size
    for start in range(0, to_length, fmt.SEGMENT_BYTES):
        begin, length, packed = fmt.SEGMENT.unpack(delta.read(place, fmt.SEGMENT.size))
        place += fmt.SEGMENT.size
        if length > fmt.PREFIX_BYTES:
            raise DeltaError(f"the delta uses a prefix of {length} bytes, more than the {fmt.PREFIX_BYTES} allowed")
        segment = min(fmt.SEGMENT_BYTES, to_length - start)
        stream = Stream(delta, place, packed, segment, fmt.SEGMENT_WINDOW_LOG, old.read(begin, length))
        for done in range(0, segment, fmt.PIECE_BYTES):
            write(stream.read(min(fmt.PIECE_BYTES, segment - done)))
        stream.finish()
        place += packed
    if place != delta.length:
        raise DeltaError("the delta has bytes after its end")


def _decode_tensor(old: Source, delta: Source, to_length: int, write: Write) -> None:
    streams = _open_streams(delta, to_length)
    for kind, length, offset, shift in _operations(streams[fmt.PROGRAM].read_all()):
        if kind == fmt.COPY:
            for piece in old.pieces(offset, length):
                write(piece)
        elif kind == fmt.LITERAL:
            for start in range(0, length, fmt.PIECE_BYTES):
                write(_stream(streams, fmt.LITERALS).read(min(fmt.PIECE_BYTES, length - start)))
        elif kind & 0xF0 == fmt.NARROW:
            for start in range(0, length, fmt.BLOCK_BYTES):
                block = min(fmt.BLOCK_BYTES, length - start)
                write(_add(old.read(offset + start, block), [_narrow(streams, kind & 0x0F, block)], None))
        else:
            width = 1 << (kind & 0x0F)
            planes = [_stream(streams, fmt.FIRST_PLANE + width - 1 + place) for place in range(width)]
            for start in range(0, length * width, fmt.BLOCK_BYTES):
                block = min(fmt.BLOCK_BYTES, length * width - start)
                write(_add(old.read(offset + start, block), [plane.read(block // width) for plane in planes], shift))
    for stream in streams.values():
        stream.finish()


def _open_streams(delta: Source, to_length: int) -> dict[int, Stream]:
    """Read the table of streams: they are in order, none is longer than the new file, and they fill the delta."""
    (count,) = delta.read(fmt.HEADER.size, 1)
    table = delta.read(fmt.HEADER.size + 1, count * fmt.STREAM.size)
    place = fmt.HEADER.size + 1 + len(table)
    streams: dict[int, Stream] = {}
    for number, length, packed in fmt.STREAM.iter_unpack(table):
        if number >= fmt.STREAM_COUNT or number <= max(streams, default=-1):
            raise DeltaError("the delta's table of streams is out of order")
        if length > (fmt.MAX_PROGRAM_BYTES if number == fmt.PROGRAM else to_length):
            raise DeltaError(f"stream {number} of the delta is larger than the file to build")
        streams[number] = Stream(delta, place, packed, length, fmt.WINDOW_LOG[number])
        place += packed
    if fmt.PROGRAM not in streams or place != delta.length:
        raise DeltaError("the delta does not end with its last stream")
    return streams


def _stream(streams: dict[int, Stream], number: int) -> Stream:
    if number not in streams:
        raise DeltaError(f"the delta lacks stream {number} that its program asks for")
    return streams[number]


def _operations(program: bytes) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield kind, length (bytes, or elements of a difference), offset in the old file, and the shift that groups."""
    at = offset = 0
    for _ in range(fmt.MAX_OPERATIONS):
        if at == len(program):
            return
        kind = program[at]
        length, at = read_varint(program, at + 1)
        width, shift = 1, None
        if kind & 0xF0 in (fmt.DIFFERENCE, fmt.GROUPED) and kind & 0x0F <= 3:
            width = 1 << (kind & 0x0F)
            if kind & 0xF0 == fmt.GROUPED:
                shift, at = read_varint(program, at)
        elif kind not in (fmt.COPY, fmt.LITERAL, *(fmt.NARROW + bits for bits in fmt.CODES)):
            raise DeltaError(f"the delta has an unknown instruction {kind:#x}")
        if length == 0 or (shift or 0) >= 8 * width:
            raise DeltaError("the delta has an invalid instruction")
        if kind == fmt.LITERAL:
            yield kind, length, 0, None
            continue
        step, at = read_varint(program, at)
        offset += step >> 1 ^ -(step & 1)  # relative to the end of the last range used
        if offset < 0:
            raise DeltaError("the delta has an offset before the start of the old file")
        yield kind, length, offset, shift
        offset += length * width
    if at != len(program):
        raise DeltaError(f"the delta has more than {fmt.MAX_OPERATIONS} instructions")


def _narrow(streams: dict[int, Stream], bits: int, count: int) -> bytes:
    """Return ``count`` zigzag differences that were packed into ``bits`` bits, the first in the lowest."""
    import numpy as np

    codes_in_byte, most = 8 // bits, (1 << bits) - 1
    packed = np.frombuffer(_stream(streams, fmt.CODES[bits]).read(-(-count // codes_in_byte)), np.uint8)
    spread = np.empty((len(packed), codes_in_byte), np.uint8)
    for place in range(codes_in_byte):
        spread[:, place] = packed >> bits * place & most
    codes = spread.ravel()[:count]
    large = np.flatnonzero(codes == most)
    if len(large):
        codes[large] += np.frombuffer(_stream(streams, fmt.ESCAPES).read(len(large)), np.uint8)
    return codes.tobytes()


def _add(old: bytes, planes: list[bytes], shift: int | None) -> bytes:
    """Return the old elements plus the differences given as byte planes, grouped by the old elements where shift is given."""
    import numpy as np  # the agent needs numpy for these deltas only

    width = len(planes)
    packed = np.empty((len(planes[0]), width), np.uint8)
    for place, plane in enumerate(planes):
        packed[:, place] = np.frombuffer(plane, np.uint8)
    before = np.frombuffer(old, f"<u{width}")
    difference = packed.view(before.dtype)[:, 0]
    difference = (difference >> 1) ^ (~(difference & 1) + 1)
    if shift is not None:
        ungrouped = np.empty_like(difference)
        ungrouped[grouping(before, shift)] = difference
        difference = ungrouped
    rebuilt: bytes = (before + difference).tobytes()
    return rebuilt


_DECODERS: dict[str, Decode] = {"zstd-prefix": _decode_prefix, "tensor": _decode_tensor}
