"""Deltas: what goes in comes out, and what lies is refused, by name."""

from __future__ import annotations

import os
import random
import resource
import tempfile
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model_sync.delta import codec as delta_module
from model_sync.delta.codec import DeltaError, Encoded, apply, best, encode_with, is_worth_publishing
from model_sync.delta.format import (
    CODES,
    COPY,
    DIFFERENCE,
    ESCAPES,
    FIRST_PLANE,
    GROUPED,
    LITERAL,
    LITERALS,
    MAX_OPERATIONS,
    MAX_PROGRAM_BYTES,
    NARROW,
    PREFIX_BYTES,
    PROGRAM,
    SEGMENT_BYTES,
)
from model_sync.errors import ModelSyncError
from tests.support.delta_parts import body, header, program, rebuilt, segment, sha256, step, varint, wide_window_frame

CODECS = ("zstd-prefix", "tensor")
OLD = random.Random(1).randbytes(5000)
NEW = OLD[:2000] + b"something else" + OLD[2500:]


def _round_trip(codec: str, old: bytes, new: bytes) -> int:
    with tempfile.TemporaryDirectory() as directory:
        delta = encode_with(codec, old, new)
        assert rebuilt(Path(directory), codec, old, delta, new) == new
    return len(delta)


# --- what goes in comes out -----------------------------------------------------------------------------------------------

_edit = st.tuples(st.integers(0, 3000), st.integers(0, 400), st.binary(max_size=300))


@given(codec=st.sampled_from(CODECS), old=st.binary(max_size=3000), edits=st.lists(_edit, max_size=6), repeat=st.integers(1, 5))
@example(codec="tensor", old=b"", edits=[], repeat=1)
@example(codec="zstd-prefix", old=b"", edits=[], repeat=1)
@settings(max_examples=300, deadline=None)
def test_any_edit_of_any_bytes_comes_back(codec: str, old: bytes, edits: list[tuple[int, int, bytes]], repeat: int) -> None:
    old *= repeat
    new = old
    for place, gone, put in edits:
        new = new[:place] + put + new[place + gone :]
    _round_trip(codec, old, new)


@given(codec=st.sampled_from(CODECS), old=st.binary(max_size=2000), new=st.binary(max_size=2000))
@settings(max_examples=200, deadline=None)
def test_unrelated_files_come_back(codec: str, old: bytes, new: bytes) -> None:
    _round_trip(codec, old, new)


@given(codec=st.sampled_from(CODECS), seed=st.integers(0, 2**32), size=st.integers(0, 40_000), width=st.sampled_from((1, 2, 3, 4, 8)))
@settings(max_examples=60, deadline=None)
def test_files_that_changed_a_little_everywhere_come_back(codec: str, seed: int, size: int, width: int) -> None:
    rng = random.Random(seed)
    old = rng.randbytes(size)
    new = bytearray(old)
    for place in range(0, size, width):
        new[place] = (new[place] + rng.randrange(-2, 3)) % 256
    _round_trip(codec, old, bytes(new))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("old", "new"), [(b"", b""), (b"", OLD), (OLD, b""), (b"", b"x"), (b"x", b"")], ids=len)
def test_empty_files(codec: str, old: bytes, new: bytes) -> None:
    _round_trip(codec, old, new)


@pytest.mark.parametrize("codec", CODECS)
def test_an_old_file_that_begins_like_a_zstd_dictionary(codec: str) -> None:
    old = b"\x37\xa4\x30\xec" + OLD
    assert _round_trip(codec, old, old[::2] + old) < 2 * len(OLD)


@pytest.mark.parametrize("codec", CODECS)
def test_an_identical_file_costs_next_to_nothing(codec: str) -> None:
    assert _round_trip(codec, OLD * 20, OLD * 20) < 200


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_put_in_and_taken_out_cost_only_themselves(codec: str) -> None:
    assert _round_trip(codec, OLD, NEW) < 250


def test_more_than_one_segment_and_more_old_file_than_a_segment_looks_back_on() -> None:
    old = random.Random(2).randbytes(PREFIX_BYTES + 2**20)
    new = old[: SEGMENT_BYTES - 100] + b"put in" + old[SEGMENT_BYTES - 100 :]
    delta = zstd_fast(old, new)
    with tempfile.TemporaryDirectory() as directory:
        assert rebuilt(Path(directory), "zstd-prefix", old, delta, new) == new
    assert len(delta) < 0.01 * len(new)


def zstd_fast(old: bytes, new: bytes) -> bytes:
    """A zstd-prefix delta at a level that does not take a minute for 50 MB."""
    from model_sync.delta.encoder import encode_prefix

    return header("zstd-prefix", old, new) + encode_prefix(old, new, level=3)


def test_a_program_of_too_many_copies_is_written_with_fewer_and_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_sync.delta.format.MAX_OPERATIONS", 50)
    old = random.Random(3).randbytes(20_000)
    rng = random.Random(4)
    pieces = [old[at : at + rng.choice((50, 600))] + rng.randbytes(9) for at in range(0, 20_000, 200)]
    new = b"".join(pieces)
    assert _round_trip("tensor", old, new) < len(new)


def test_best_takes_the_smaller(tmp_path: Path) -> None:
    rng = random.Random(5)
    moved = bytes((byte + rng.randrange(-1, 2)) % 256 for byte in OLD)
    words = [rng.randbytes(12) for _ in range(400)]
    shuffled = words.copy()
    rng.shuffle(shuffled)
    for old, new, codec in ((OLD, moved, "tensor"), (b"".join(words), b"".join(shuffled), "zstd-prefix")):
        (tmp_path / "a").write_bytes(old)
        (tmp_path / "b").write_bytes(new)
        encoded = best(tmp_path / "a", tmp_path / "b")
        assert encoded == Encoded(codec, min((encode_with(name, old, new) for name in CODECS), key=len))  # type: ignore[arg-type]
        assert rebuilt(tmp_path, encoded.codec, old, encoded.data, new) == new


def test_best_does_not_try_the_slow_codec_where_it_cannot_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = random.Random(6).randbytes(2**20 + 1)
    (tmp_path / "a").write_bytes(old)
    (tmp_path / "b").write_bytes(bytes((byte + 1) % 256 for byte in old))
    tried = []
    encode = delta_module.encode_with
    monkeypatch.setattr(delta_module, "encode_with", lambda codec, *files: tried.append(codec) or encode(codec, *files))
    assert best(tmp_path / "a", tmp_path / "b").codec == "tensor"
    assert tried == ["tensor"]


def test_the_same_two_files_give_the_same_delta() -> None:
    assert all(encode_with(codec, OLD, NEW) == encode_with(codec, OLD, NEW) for codec in CODECS)  # type: ignore[arg-type]


def test_worth_publishing_is_below_70_percent() -> None:
    assert is_worth_publishing(699, 1000)
    assert not is_worth_publishing(700, 1000)
    assert not is_worth_publishing(0, 0)


def test_importing_the_decoder_loads_neither_numpy_nor_onnx() -> None:
    import subprocess
    import sys

    code = "import sys, model_sync.delta.codec; sys.exit(bool({'numpy', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what lies is refused -------------------------------------------------------------------------------------------------


def _refused(tmp_path: Path, codec: str, delta: bytes, says: str, *, old: bytes = OLD, new: bytes = NEW) -> None:
    with pytest.raises(DeltaError, match=says) as caught:
        rebuilt(tmp_path, codec, old, delta, new)
    assert isinstance(caught.value, ModelSyncError)
    assert "complete file" in caught.value.hint


def test_the_parts_made_by_hand_make_a_good_delta(tmp_path: Path) -> None:
    """Otherwise the refusals below could have the wrong reason."""
    old, new = bytes(range(100)), bytes(range(10, 60)) + b"abc" + bytes([1, 1]) + bytes([9, 12, 9, 12])
    streams = program(
        bytes([COPY]) + varint(50) + step(10),
        bytes([LITERAL]) + varint(3),
        bytes([DIFFERENCE]) + varint(2) + step(-60),  # at 0: (0, 1) + (1, 0)
        bytes([GROUPED + 1]) + varint(2) + varint(0) + step(6),  # at 8: 0x0908, 0x0b0a + 0x0301, 0x00ff: both grouped by the low byte
    )
    streams |= {LITERALS: b"abc", FIRST_PLANE: bytes([2, 0]), FIRST_PLANE + 1: bytes([2, 254]), FIRST_PLANE + 2: bytes([6, 1])}
    new = new[:-4] + bytes([9, 12, 9, 12])
    assert rebuilt(tmp_path, "tensor", old, header("tensor", old, new) + body(streams), new) == new
    narrow = bytes([NARROW + 2]) + varint(5) + step(0)  # -1, 0, 1, and 3 + 4 = -4, 3 + 0 = -2, from the lowest bits up
    streams = program(narrow) | {CODES[2]: bytes([0b11_10_00_01, 0b11]), ESCAPES: bytes([4, 0])}
    shifted = bytes([255, 1, 3, 255, 2])
    assert rebuilt(tmp_path, "tensor", old, header("tensor", old, shifted) + body(streams), shifted) == shifted
    missing_on_server_error = header("tensor", old, shifted) + body({number: data for number, data in streams.items() if number != ESCAPES})
    _refused(tmp_path, "tensor", missing_on_server_error, "lacks stream 19", old=old, new=shifted)
    frame = zstd.compress(NEW)
    assert rebuilt(tmp_path, "zstd-prefix", OLD, header("zstd-prefix", OLD, NEW) + segment(0, 0, frame), NEW) == NEW


@pytest.mark.parametrize("codec", CODECS)
def test_empty_delta(tmp_path: Path, codec: str) -> None:
    _refused(tmp_path, codec, b"", "are beyond its end")


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation(tmp_path: Path, codec: str) -> None:
    delta = encode_with(codec, OLD, NEW)  # type: ignore[arg-type]
    for length in range(len(delta)):
        _refused(tmp_path, codec, delta[:length], ".")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("garbage", [b"\0", b"garbage", zstd.compress(b"more"), b"\x50\x2a\x4d\x18\0\0\0\0"], ids=len)
def test_trailing_garbage(tmp_path: Path, codec: str, garbage: bytes) -> None:
    """A second frame and a skippable one included."""
    _refused(tmp_path, codec, encode_with(codec, OLD, NEW) + garbage, "after its end|does not end with")  # type: ignore[arg-type]


def test_unknown_codec(tmp_path: Path) -> None:
    delta = encode_with("tensor", OLD, NEW)
    _refused(tmp_path, "bsdiff", delta, "no delta codec 'bsdiff'")
    _refused(tmp_path, "zstd-prefix", delta, "not in the codec zstd-prefix")
    _refused(tmp_path, "tensor", header("tensor", OLD, NEW, number=7) + delta[len(header("tensor", OLD, NEW)) :], "not in the codec")
    with pytest.raises(DeltaError, match="no delta codec"):
        encode_with("bsdiff", OLD, NEW)  # type: ignore[arg-type]


def test_unknown_version_and_magic(tmp_path: Path) -> None:
    rest = encode_with("tensor", OLD, NEW)[len(header("tensor", OLD, NEW)) :]
    _refused(tmp_path, "tensor", header("tensor", OLD, NEW, version=2) + rest, "version 2")
    _refused(tmp_path, "tensor", header("tensor", OLD, NEW, magic=b"PK\3\4") + rest, "not a delta")
    _refused(tmp_path, "tensor", b"<html>" + bytes(200), "not a delta")


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_from_file(tmp_path: Path, codec: str) -> None:
    delta = encode_with(codec, OLD, NEW)  # type: ignore[arg-type]
    for other in (OLD[:-1] + b"?", OLD + b"?", OLD[:-1], b"", NEW):
        _refused(tmp_path, codec, delta, "another file than the one on this box", old=other)


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_to_digest_in_the_header_and_in_the_request(tmp_path: Path, codec: str) -> None:
    delta = encode_with(codec, OLD, NEW)  # type: ignore[arg-type]
    other = NEW[:-1] + b"?"
    _refused(tmp_path, codec, delta, "another file than the one asked for", new=other)
    _refused(tmp_path, codec, header(codec, OLD, other) + delta[len(header(codec, OLD, NEW)) :], "not the one expected", new=other)


@pytest.mark.parametrize("codec", CODECS)
def test_length_mismatch(tmp_path: Path, codec: str) -> None:
    body_bytes = encode_with(codec, OLD, NEW)[len(header(codec, OLD, NEW)) :]  # type: ignore[arg-type]
    for other in (NEW + b"?", NEW[:-1]):
        _refused(tmp_path, codec, header(codec, OLD, NEW) + body_bytes, "another file than the one asked for", new=other)
        _refused(tmp_path, codec, header(codec, OLD, other) + body_bytes, ".", new=other)


def _tensor(streams: dict[int, bytes], *, new: bytes = NEW, **lies: dict[int, int] | dict[int, bytes]) -> bytes:
    return header("tensor", OLD, new) + body(streams, **lies)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("instruction", "says"),
    [
        (bytes([COPY]) + varint(10) + step(len(OLD) - 9), "beyond its end"),
        (bytes([COPY]) + varint(10) + step(2**61), "beyond its end"),
        (bytes([COPY]) + varint(2**62) + step(0), "more than the|beyond its end"),
        (bytes([COPY]) + varint(10) + step(-1), "before the start"),
        (bytes([COPY]) + varint(10) + step(-(2**60)), "before the start"),
        (bytes([DIFFERENCE + 3]) + varint(625) + step(1), "beyond its end"),
        (bytes([DIFFERENCE]) + varint(2**62) + step(0), "asks for more|beyond its end"),
        (bytes([LITERAL]) + varint(2**62), "asks for more"),
        (bytes([LITERAL]) + b"\xff" * 9 + b"\x01", "number that does not end"),
        (bytes([LITERAL]) + b"\xff" * 4, "number that does not end"),
        (bytes([COPY]) + varint(5), "number that does not end"),
        (bytes([LITERAL]) + varint(0), "an invalid instruction"),
        (bytes([COPY]) + varint(0) + step(0), "an invalid instruction"),
        (bytes([GROUPED + 1]) + varint(2) + varint(16) + step(0), "an invalid instruction"),
        (bytes([DIFFERENCE + 4]) + varint(2) + step(0), "unknown instruction 0x14"),
        (bytes([0x02]) + varint(2) + step(0), "unknown instruction 0x2"),
        (bytes([NARROW + 3]) + varint(2) + step(0), "unknown instruction 0x33"),
        (bytes([NARROW + 8]) + varint(2) + step(0), "unknown instruction 0x38"),
        (bytes([NARROW + 4]) + varint(3 * len(NEW)) + step(0), "beyond its end"),
        (bytes([NARROW + 2]) + varint(2**62) + step(1), "beyond its end"),
        (bytes([0xFF]), "unknown instruction|does not end"),
    ],
)
def test_instructions_that_lie(tmp_path: Path, instruction: bytes, says: str) -> None:
    """Offsets beyond and before the old file, negative and huge numbers, empty and unknown instructions."""
    streams = program(instruction) | {LITERALS: NEW} | {FIRST_PLANE + place: NEW for place in range(18)}
    _refused(tmp_path, "tensor", _tensor(streams), says)


def test_counts_that_overlap(tmp_path: Path) -> None:
    """Two instructions that both want the last literal, and one more byte than the file is to have."""
    take = bytes([LITERAL]) + varint(len(NEW) - 1)
    _refused(tmp_path, "tensor", _tensor(program(take, take) | {LITERALS: NEW}), "asks for more than its data holds")
    copy = bytes([COPY]) + varint(3000) + step(0) + bytes([COPY]) + varint(3000) + step(-3000)
    _refused(tmp_path, "tensor", _tensor(program(copy)), "more than the 4514 bytes expected")


def test_data_that_no_instruction_uses(tmp_path: Path) -> None:
    take = program(bytes([LITERAL]) + varint(len(NEW)))
    assert rebuilt(tmp_path, "tensor", OLD, _tensor(take | {LITERALS: NEW}), NEW) == NEW
    _refused(tmp_path, "tensor", _tensor(take | {LITERALS: NEW, FIRST_PLANE: b"x"}), "never uses")
    _refused(tmp_path, "tensor", _tensor(program() | {LITERALS: NEW}), "never uses")


def test_streams_that_lie_about_their_length(tmp_path: Path) -> None:
    streams = program(bytes([LITERAL]) + varint(len(NEW))) | {LITERALS: NEW}
    _refused(tmp_path, "tensor", _tensor(streams, declared={LITERALS: len(NEW) + 1}), "larger than the file to build")
    _refused(tmp_path, "tensor", _tensor(streams, declared={LITERALS: len(NEW) - 1}), "asks for more")
    _refused(tmp_path, "tensor", _tensor(streams, declared={LITERALS: 2**64 - 1}), "larger than the file")
    _refused(tmp_path, "tensor", _tensor(streams, declared={PROGRAM: MAX_PROGRAM_BYTES + 1}), "larger than the file")
    _refused(tmp_path, "tensor", _tensor(streams, packed={LITERALS: zstd.compress(NEW + b"!")}), "more than it declares")
    _refused(tmp_path, "tensor", _tensor(streams, packed={LITERALS: zstd.compress(NEW[:-1])}), "less than it declares")
    _refused(tmp_path, "tensor", _tensor(streams, packed={LITERALS: b""}), "in the middle of its data")
    _refused(tmp_path, "tensor", _tensor(streams, packed={LITERALS: b"not zstd at all"}), "damaged")
    _refused(tmp_path, "tensor", _tensor(streams, packed={LITERALS: b"\x50\x2a\x4d\x18\0\0\0\0"}), "less than it declares")


def test_tables_that_lie(tmp_path: Path) -> None:
    streams = program(bytes([LITERAL]) + varint(len(NEW))) | {LITERALS: NEW}
    _refused(tmp_path, "tensor", _tensor({LITERALS: NEW}), "does not end with its last stream")
    _refused(tmp_path, "tensor", _tensor({}), "does not end with its last stream")
    _refused(tmp_path, "tensor", _tensor(dict(reversed(streams.items()))), "out of order")
    _refused(tmp_path, "tensor", _tensor(streams | {20: b"x"}), "out of order")
    _refused(tmp_path, "tensor", _tensor(program(streams[PROGRAM])), "lacks stream 1")
    _refused(tmp_path, "tensor", header("tensor", OLD, NEW) + b"\xff" + bytes(100), "are beyond its end")
    twice = body(streams)
    _refused(tmp_path, "tensor", header("tensor", OLD, NEW) + twice[:1] + twice[1:18] * 2 + twice[35:], "out of order")


def test_more_instructions_than_allowed(tmp_path: Path) -> None:
    new = bytes(MAX_OPERATIONS + 1)
    streams = program((bytes([LITERAL]) + varint(1)) * len(new)) | {LITERALS: new}
    _refused(tmp_path, "tensor", _tensor(streams, new=new), "more than 65536 instructions", new=new)
    new = new[:-1]
    streams = program((bytes([LITERAL]) + varint(1)) * len(new)) | {LITERALS: new}
    assert rebuilt(tmp_path, "tensor", OLD, _tensor(streams, new=new), new) == new


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (segment(0, len(OLD) + 1, zstd.compress(NEW)), "beyond its end"),
        (segment(2**64 - 1, 2**32 - 1, zstd.compress(NEW)), "uses a prefix of"),
        (segment(0, 7, zstd.compress(NEW[:-1])), "less than it declares"),  # zstd itself refuses so short a prefix
        (segment(0, PREFIX_BYTES + 1, zstd.compress(NEW)), "uses a prefix of"),
        (segment(0, 0, zstd.compress(NEW), packed=2**32 - 1), "before its declared end"),
        (segment(0, 0, zstd.compress(NEW), packed=3), "in the middle"),
        (segment(0, 0, zstd.compress(NEW + b"!")), "more than it declares"),
        (segment(0, 0, zstd.compress(NEW[:-1])), "less than it declares"),
        (segment(0, 0, zstd.compress(NEW)) * 2, "after its end"),
        (segment(0, 0, wide_window_frame(NEW)), "damaged"),
        (segment(0, 0, b"not zstd at all"), "damaged"),
    ],
)
def test_segments_that_lie(tmp_path: Path, parts: bytes, says: str) -> None:
    _refused(tmp_path, "zstd-prefix", header("zstd-prefix", OLD, NEW) + parts, says)


# --- files ----------------------------------------------------------------------------------------------------------------


def _files(tmp_path: Path) -> tuple[Path, Path, Path]:
    old, delta, out = tmp_path / "old", tmp_path / "delta", tmp_path / "out"
    old.write_bytes(OLD)
    delta.write_bytes(encode_with("tensor", OLD, NEW))
    return old, delta, out


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    old, delta, out = _files(tmp_path)
    for bad_old, bad_delta in ((tmp_path / "none", delta), (old, tmp_path / "none"), (tmp_path, delta), (old, tmp_path)):
        out.write_bytes(b"left by an earlier attempt")
        with pytest.raises(DeltaError):
            apply("tensor", bad_old, bad_delta, out, to_sha256=sha256(NEW), to_length=len(NEW))
        assert not out.exists()


def test_a_left_over_and_a_link_in_its_place_are_replaced(tmp_path: Path) -> None:
    old, delta, out = _files(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    out.symlink_to(elsewhere)
    for _ in range(2):
        apply("tensor", old, delta, out, to_sha256=sha256(NEW).upper(), to_length=len(NEW))
        assert out.read_bytes() == NEW
        assert not out.is_symlink()
    assert elsewhere.read_bytes() == b"precious"


def test_the_old_file_is_never_written_over(tmp_path: Path) -> None:
    old, delta, out = _files(tmp_path)
    os.link(old, out)
    for target in (old, delta, out):
        with pytest.raises(DeltaError, match="one of the input files"):
            apply("tensor", old, delta, target, to_sha256=sha256(NEW), to_length=len(NEW))
    assert old.read_bytes() == OLD


def test_an_old_file_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file would kill the process here (SIGBUS)."""
    old, delta, out = _files(tmp_path)
    build = delta_module._build

    def cut_then_build(*arguments: object) -> None:
        os.truncate(old, 100)
        build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(delta_module, "_build", cut_then_build)
    with pytest.raises(DeltaError, match="shorter while it was read"):
        apply("tensor", old, delta, out, to_sha256=sha256(NEW), to_length=len(NEW))
    assert not out.exists()


def test_an_old_file_changed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, delta, out = _files(tmp_path)
    build = delta_module._build

    def change_then_build(*arguments: object) -> None:
        old.write_bytes(OLD[::-1])
        build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(delta_module, "_build", change_then_build)
    with pytest.raises(DeltaError, match="not the one expected"):
        apply("tensor", old, delta, out, to_sha256=sha256(NEW), to_length=len(NEW))
    assert not out.exists()


def test_a_full_disk_is_not_the_deltas_fault(tmp_path: Path) -> None:
    old, delta, out = _files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            apply("tensor", old, delta, out, to_sha256=sha256(NEW), to_length=len(NEW))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
