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
    element plus a wrapping difference, zigzag coded, one zstd stream per byte plane. Differences of floats may be grouped
    by the old element's exponent; those of bytes may be packed into 2 or 4 bits, where the code of all ones goes on in a
    stream of escapes. Good when every weight moved a little, which no general tool can see. The decoder knows nothing of
    ONNX: the encoder finds the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model_sync.delta.format import (
    BLOCK_BYTES,
    CODEC_NUMBERS,
    CODES,
    COPY,
    DIFFERENCE,
    ESCAPES,
    FIRST_PLANE,
    GROUPED,
    HEADER,
    LITERAL,
    LITERALS,
    MAGIC,
    MAX_OPERATIONS,
    MAX_PROGRAM_BYTES,
    NARROW,
    PIECE_BYTES,
    PREFIX_BYTES,
    PROGRAM,
    SEGMENT,
    SEGMENT_BYTES,
    SEGMENT_WINDOW_LOG,
    STREAM,
    STREAM_COUNT,
    VERSION,
    WINDOW_LOG,
    DeltaError,
    Source,
    Stream,
    grouping,
    read_varint,
    source,
    zstd,
)
from model_sync.trust.documents import Codec

__all__ = ["MAX_RATIO", "DeltaError", "Encoded", "apply", "best", "encode_with", "worth_publishing"]

MAX_RATIO = 0.7
_SMALL_BYTES = 2**20  # both codecs are tried below this
Write = Callable[[bytes], object]


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

    Level 19 with a prefix takes about a second per megabyte, so for large files it is tried only where a fast level, which
    comes within 30 %, says that it could still win. 30 MB take up to half a minute.
    """
    from model_sync.delta import encoder as delta_encoder  # with numpy: only where deltas are made

    old_bytes, new_bytes = old.read_bytes(), new.read_bytes()
    tensor = encode_with("tensor", old_bytes, new_bytes)
    if len(new_bytes) > _SMALL_BYTES and len(delta_encoder.encode_prefix(old_bytes, new_bytes, level=3)) > 1.3 * len(tensor):
        return Encoded("tensor", tensor)
    prefix = encode_with("zstd-prefix", old_bytes, new_bytes)
    return Encoded("tensor", tensor) if len(tensor) <= len(prefix) else Encoded("zstd-prefix", prefix)


def encode_with(codec: Codec, old: bytes, new: bytes) -> bytes:
    """Return the delta from ``old`` to ``new`` in one codec, however large it comes out; any two byte strings have one.

    Raises:
        DeltaError: the codec is unknown.
    """
    from model_sync.delta import encoder as delta_encoder

    if codec not in CODEC_NUMBERS:
        raise DeltaError(f"there is no delta codec {codec!r}")
    digests = hashlib.sha256(old).digest(), hashlib.sha256(new).digest()
    header = HEADER.pack(MAGIC, VERSION, CODEC_NUMBERS[codec], len(old), len(new), *digests)
    return header + (delta_encoder.encode_prefix(old, new) if codec == "zstd-prefix" else delta_encoder.encode_tensor(old, new))


def apply(codec: str, old: Path, delta: Path, out: Path, *, to_sha256: str, to_length: int) -> None:
    """Rebuild into ``out`` the file of ``to_length`` bytes whose SHA-256 is ``to_sha256``; memory stays bounded.

    Files are read and written in pieces; ``out`` is not synced to disk, that is the caller's. A file that lies there is
    replaced, and when anything fails there is none.

    Raises:
        DeltaError: the delta is damaged, of an unknown codec or version, made for another file than ``old``, does not
            build the expected file, or ``old`` or ``delta`` cannot be read.
        OSError: ``out`` cannot be written, such as on a full disk: that is not the delta's fault.
    """
    if out.exists() and any(path.exists() and out.samefile(path) for path in (old, delta)):
        raise DeltaError(f"{out} is one of the files that it would be made of")
    out.unlink(missing_ok=True)  # never written through a link
    try:
        with source(old) as old_file, source(delta) as delta_file:
            decode = _checked_header(codec, old_file, delta_file, to_sha256, to_length)
            with out.open("xb") as target:
                _build(decode, old_file, delta_file, target, to_sha256, to_length)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


Decode = Callable[[Source, Source, int, Write], None]


def _checked_header(codec: str, old: Source, delta: Source, to_sha256: str, to_length: int) -> Decode:
    """Check every field of the header, the old file's digest last because it costs a read; return the codec's decoder."""
    if codec not in _DECODERS:
        raise DeltaError(f"there is no delta codec {codec!r}")
    magic, version, *rest = HEADER.unpack(delta.read(0, HEADER.size))
    if magic != MAGIC:
        raise DeltaError("the file is not a delta")
    if version != VERSION:
        raise DeltaError(f"a delta of version {version}; this version of the agent knows {VERSION}")
    actual_codec, from_length, actual_to_length, from_sha256, actual_to_sha256 = rest
    if actual_codec != CODEC_NUMBERS.get(codec):
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
    place = HEADER.size
    for start in range(0, to_length, SEGMENT_BYTES):
        begin, length, packed = SEGMENT.unpack(delta.read(place, SEGMENT.size))
        place += SEGMENT.size
        if length > PREFIX_BYTES:
            raise DeltaError(f"the delta looks back on {length} bytes, more than the {PREFIX_BYTES} allowed")
        segment = min(SEGMENT_BYTES, to_length - start)
        stream = Stream(delta, place, packed, segment, SEGMENT_WINDOW_LOG, old.read(begin, length))
        for done in range(0, segment, PIECE_BYTES):
            write(stream.read(min(PIECE_BYTES, segment - done)))
        stream.finish()
        place += packed
    if place != delta.length:
        raise DeltaError("the delta has bytes after its end")


def _decode_tensor(old: Source, delta: Source, to_length: int, write: Write) -> None:
    streams = _open_streams(delta, to_length)
    for kind, length, offset, shift in _operations(streams[PROGRAM].read_all()):
        if kind == COPY:
            for piece in old.pieces(offset, length):
                write(piece)
        elif kind == LITERAL:
            for start in range(0, length, PIECE_BYTES):
                write(_stream(streams, LITERALS).read(min(PIECE_BYTES, length - start)))
        elif kind & 0xF0 == NARROW:
            for start in range(0, length, BLOCK_BYTES):
                block = min(BLOCK_BYTES, length - start)
                write(_add(old.read(offset + start, block), [_narrow(streams, kind & 0x0F, block)], None))
        else:
            width = 1 << (kind & 0x0F)
            planes = [_stream(streams, FIRST_PLANE + width - 1 + place) for place in range(width)]
            for start in range(0, length * width, BLOCK_BYTES):
                block = min(BLOCK_BYTES, length * width - start)
                write(_add(old.read(offset + start, block), [plane.read(block // width) for plane in planes], shift))
    for stream in streams.values():
        stream.finish()


def _open_streams(delta: Source, to_length: int) -> dict[int, Stream]:
    """Read the table of streams: in order, none longer than the file to build, and together all that the delta holds."""
    (count,) = delta.read(HEADER.size, 1)
    table = delta.read(HEADER.size + 1, count * STREAM.size)
    place = HEADER.size + 1 + len(table)
    streams: dict[int, Stream] = {}
    for number, length, packed in STREAM.iter_unpack(table):
        if number >= STREAM_COUNT or number <= max(streams, default=-1):
            raise DeltaError("the delta's table of streams is out of order")
        if length > (MAX_PROGRAM_BYTES if number == PROGRAM else to_length):
            raise DeltaError(f"stream {number} of the delta is larger than the file to build")
        streams[number] = Stream(delta, place, packed, length, WINDOW_LOG[number])
        place += packed
    if PROGRAM not in streams or place != delta.length:
        raise DeltaError("the delta's streams are not all of it")
    return streams


def _stream(streams: dict[int, Stream], number: int) -> Stream:
    if number not in streams:
        raise DeltaError(f"the delta lacks stream {number} that its program asks for")
    return streams[number]


def _operations(program: bytes) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield kind, length (bytes, or elements of a difference), offset in the old file, and the shift that groups."""
    at = offset = 0
    for _ in range(MAX_OPERATIONS):
        if at == len(program):
            return
        kind = program[at]
        length, at = read_varint(program, at + 1)
        width, shift = 1, None
        if kind & 0xF0 in (DIFFERENCE, GROUPED) and kind & 0x0F <= 3:
            width = 1 << (kind & 0x0F)
            if kind & 0xF0 == GROUPED:
                shift, at = read_varint(program, at)
        elif kind not in (COPY, LITERAL, *(NARROW + bits for bits in CODES)):
            raise DeltaError(f"the delta has an unknown instruction {kind:#x}")
        if length == 0 or (shift or 0) >= 8 * width:
            raise DeltaError("the delta has an instruction that makes no sense")
        if kind == LITERAL:
            yield kind, length, 0, None
            continue
        step, at = read_varint(program, at)
        offset += step >> 1 ^ -(step & 1)  # counted from the end of the last range used
        if offset < 0:
            raise DeltaError("the delta looks before the start of the old file")
        yield kind, length, offset, shift
        offset += length * width
    if at != len(program):
        raise DeltaError(f"the delta has more than {MAX_OPERATIONS} instructions")


def _narrow(streams: dict[int, Stream], bits: int, count: int) -> bytes:
    """Return ``count`` zigzag differences that were packed into ``bits`` bits, the first in the lowest."""
    import numpy as np

    codes_in_byte, most = 8 // bits, (1 << bits) - 1
    packed = np.frombuffer(_stream(streams, CODES[bits]).read(-(-count // codes_in_byte)), np.uint8)
    spread = np.empty((len(packed), codes_in_byte), np.uint8)
    for place in range(codes_in_byte):
        spread[:, place] = packed >> bits * place & most
    codes = spread.ravel()[:count]
    large = np.flatnonzero(codes == most)
    if len(large):
        codes[large] += np.frombuffer(_stream(streams, ESCAPES).read(len(large)), np.uint8)
    return codes.tobytes()


def _add(old: bytes, planes: list[bytes], shift: int | None) -> bytes:
    """Return the old elements plus the differences given as byte planes, grouped by the old elements where shift is given."""
    import numpy as np  # the agent needs it for these deltas only

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
