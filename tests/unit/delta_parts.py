"""Deltas made by hand, byte by byte, so that each can lie in one place; and the one way the tests apply them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from backports import zstd

from model_sync.delta.codec import apply
from model_sync.delta.format import CODEC_NUMBERS, HEADER, MAGIC, PROGRAM, SEGMENT, STREAM, VERSION


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rebuilt(directory: Path, codec: str, old: bytes, delta: bytes, new: bytes) -> bytes:
    """Apply a delta as a box does, and return what came out; after an error make sure that nothing did."""
    (directory / "old").write_bytes(old)
    (directory / "delta").write_bytes(delta)
    out = directory / "out"
    try:
        apply(codec, directory / "old", directory / "delta", out, to_sha256=sha256(new), to_length=len(new))
    except BaseException:
        assert not out.exists()
        raise
    return out.read_bytes()


def header(codec: str, old: bytes, new: bytes, *, version: int = VERSION, number: int | None = None, magic: bytes = MAGIC) -> bytes:
    digests = hashlib.sha256(old).digest(), hashlib.sha256(new).digest()
    return HEADER.pack(magic, version, CODEC_NUMBERS[codec] if number is None else number, len(old), len(new), *digests)


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def step(value: int) -> bytes:
    """A signed distance, as programs have it."""
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def body(streams: dict[int, bytes], declared: dict[int, int] | None = None, packed: dict[int, bytes] | None = None) -> bytes:
    """The body of a tensor delta; ``declared`` and ``packed`` replace what is true of a stream."""
    frames = {number: zstd.compress(data) for number, data in streams.items()} | (packed or {})
    lengths = {number: len(data) for number, data in streams.items()} | (declared or {})
    table = b"".join(STREAM.pack(number, lengths[number], len(frame)) for number, frame in frames.items())
    return bytes([len(frames)]) + table + b"".join(frames.values())


def program(*instructions: bytes) -> dict[int, bytes]:
    return {PROGRAM: b"".join(instructions)}


def segment(begin: int, length: int, frame: bytes, *, packed: int | None = None) -> bytes:
    """One segment of a zstd-prefix delta."""
    return SEGMENT.pack(begin, length, len(frame) if packed is None else packed) + frame


def zeros_frame(length: int) -> bytes:
    """A zstd frame of a few kilobytes that unpacks to ``length`` zeros, a whole number of megabytes, and does not say so."""
    packer = zstd.ZstdCompressor(1)
    megabyte = bytes(2**20)
    return b"".join(packer.compress(megabyte) for _ in range(length // 2**20)) + packer.flush()


def wide_window_frame(data: bytes) -> bytes:
    """A zstd frame (RFC 8878) whose header asks for a window of 2 GiB, with one raw block."""
    assert len(data) < 2**17
    return b"\x28\xb5\x2f\xfd" + bytes([0x00, (31 - 10) << 3]) + (1 | len(data) << 3).to_bytes(3, "little") + data
