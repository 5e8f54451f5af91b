"""Thousands of damaged deltas, and a few that are meant to eat the box: a DeltaError or the right file, within bounds.

Both run in a process of their own, whose peak memory (``VmHWM``) is what this delta took and not what pytest had before.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from model_sync.delta.codec import DeltaError, encode_with
from model_sync.delta.format import COPY, GROUPED, HEADER, LITERAL, LITERALS, MAX_PROGRAM_BYTES, PROGRAM
from tests.unit.delta_parts import body, header, program, rebuilt, segment, step, varint, wide_window_frame, zeros_frame

ROOT = Path(__file__).resolve().parents[2]
CODECS = ("zstd-prefix", "tensor")
CASES = 3000
_LIMIT_BYTES = 200 * 10**6


def _models() -> tuple[bytes, bytes]:
    """Two small models whose delta has every kind of instruction."""
    rng = np.random.default_rng(1)
    whole, halves, doubles = rng.integers(-100, 100, 900).astype(np.int8), rng.normal(0, 1, 900).astype(np.float16), np.arange(200.0)

    def model(remark: str, tensors: dict[str, np.ndarray]) -> bytes:
        held = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [], held, doc_string=remark)
        data: bytes = helper.make_model(graph).SerializeToString()
        return data

    steps = rng.choice(np.array([0, 0, 0, 0, 1, -1, 90], np.int8), 900)  # narrow, with escapes
    moved = {"c": doubles, "a": whole + steps, "b": (halves * 1.01).astype(np.float16)}
    return model("the old one", {"a": whole, "b": halves, "c": doubles}), model("the new one, and what is new in it", moved)


def damaged(delta: bytes, rng: random.Random) -> bytes:
    """Return the delta with one to three kinds of damage; half of it near the start, where the lengths are."""
    data = bytearray(delta)
    for _ in range(rng.randint(1, 3)):
        start = HEADER.size + rng.randrange(120) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
        place = min(start, max(0, len(data) - 1))
        size = rng.choice((1, 1, 2, 8, 40))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + size] = rng.randbytes(size)
        elif kind == 2:
            del data[place : len(data) if rng.random() < 0.3 else place + size]
        elif kind == 3:
            data[place:place] = rng.randbytes(size)
        elif kind == 4:
            data[place:place] = data[place : place + size]
        elif kind == 5:  # two lengths change places
            other = HEADER.size + rng.randrange(120)
            data[place : place + 8], data[other : other + 8] = data[other : other + 8], data[place : place + 8]
        else:
            data[place : place + 8] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)


def damaged_program(old: bytes, new: bytes, delta: bytes, rng: random.Random) -> bytes:
    """Return a tensor delta whose frames are all good and whose program is damaged: no checksum of zstd stands before it."""
    from model_sync.delta.format import STREAM, zstd

    place = HEADER.size + 1 + STREAM.size * delta[HEADER.size]
    streams = {}
    for number, _length, packed in STREAM.iter_unpack(delta[HEADER.size + 1 : place]):
        streams[number] = zstd.decompress(delta[place : place + packed])
        place += packed
    chosen = PROGRAM if rng.random() < 0.8 else rng.choice(list(streams))
    data = bytearray(streams[chosen])
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3)) or bytes([rng.choice((0, 1, 0x10, 0x21, 0x80, 0xFF))])
    return header("tensor", old, new) + body(streams | {chosen: bytes(data)})


def fuzz(codec: str) -> dict[str, int]:
    """Apply every damaged delta; any exception but DeltaError, and any wrong file, ends the process."""
    old, new = _models()
    delta = encode_with(codec, old, new)  # type: ignore[arg-type]
    counts = {"refused": 0, "right": 0}
    with tempfile.TemporaryDirectory() as directory:
        assert rebuilt(Path(directory), codec, old, delta, new) == new
        for case in range(CASES):
            rng = random.Random(case)
            bad = damaged_program(old, new, delta, rng) if codec == "tensor" and case % 2 else damaged(delta, rng)
            try:
                assert rebuilt(Path(directory), codec, old, bad, new) == new, case
                counts["right"] += 1
            except DeltaError:
                counts["refused"] += 1
    return counts


def bombs() -> Iterator[tuple[str, str, bytes, bytes, bytes]]:
    """Yield name, codec, old, delta and new of deltas that want a gigabyte, or all the time there is."""
    old, new = bytes(range(256)) * 40, bytes(3 * 2**20)
    giga = zeros_frame(2**30)
    take = bytes([LITERAL]) + varint(len(new))
    tensor, prefix = header("tensor", old, new), header("zstd-prefix", old, new)
    streams = program(take) | {LITERALS: new}
    yield "literals unpack to 1 GiB", "tensor", old, tensor + body(streams, packed={LITERALS: giga}), new
    yield "literals declare 1 GiB", "tensor", old, tensor + body(streams, {LITERALS: 2**30}, {LITERALS: giga}), new
    yield "program unpacks to 1 GiB", "tensor", old, tensor + body(streams, {PROGRAM: MAX_PROGRAM_BYTES}, {PROGRAM: giga}), new
    yield "program declares 1 GiB", "tensor", old, tensor + body(streams, {PROGRAM: 2**30}, {PROGRAM: giga}), new
    yield "segment unpacks to 1 GiB", "zstd-prefix", old, prefix + segment(0, 0, giga), new
    wide = wide_window_frame(new[:1000])
    yield "window of 2 GiB", "tensor", old, tensor + body(streams, packed={LITERALS: wide}), new
    yield "segment with a window of 2 GiB", "zstd-prefix", old, prefix + segment(0, len(old), wide), new
    yield "prefix of 4 GiB", "zstd-prefix", old, prefix + segment(0, 2**32 - 1, giga), new
    many = program(bytes([COPY]) + varint(1) + step(0), (bytes([COPY]) + varint(1) + step(-1)) * (MAX_PROGRAM_BYTES // 3 - 1))
    yield "700,000 copies of a byte", "tensor", old, tensor + body(many), new
    huge = program(bytes([GROUPED]) + varint(2**62) + varint(0) + b"\0")
    yield "4 EiB of differences", "tensor", old, tensor + body(huge | {2: new}, packed={2: giga}), new
    every = program(take) | {LITERALS: new} | dict.fromkeys(range(2, 20), new)
    yield "a bomb in every stream", "tensor", old, tensor + body(every, packed=dict.fromkeys(range(1, 20), giga)), new


def blow() -> dict[str, str]:
    """Apply every bomb with at most 2 GiB of address space, and say what was answered."""
    import resource

    made = list(bombs())
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    answers = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, codec, old, delta, new in made:
            try:
                rebuilt(Path(directory), codec, old, delta, new)
                answers[name] = "accepted"
            except DeltaError as error:
                answers[name] = error.message
    return answers


def _alone(what: str) -> tuple[dict[str, int | str], int]:
    """Run ``what`` in a fresh interpreter; return its answer and its peak resident memory in bytes."""
    code = (
        "import json, re, pathlib\n"
        "from tests.unit.test_delta_fuzz import fuzz, blow\n"
        f"answer = {what}\n"
        "peak, = re.findall(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())\n"
        "print(json.dumps([answer, int(peak) * 1024]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer, peak = json.loads(done.stdout)
    return answer, peak


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_deltas_are_refused_or_build_the_right_file(codec: str) -> None:
    counts, peak = _alone(f"fuzz({codec!r})")
    assert sum(map(int, counts.values())) == CASES
    assert int(counts["refused"]) > 0.8 * CASES
    assert peak < _LIMIT_BYTES


def test_bombs_are_refused_within_the_memory_of_any_delta() -> None:
    answers, peak = _alone("blow()")
    assert len(answers) == 11
    assert "accepted" not in answers.values()
    assert not [name for name, answer in answers.items() if "more memory than there is" in str(answer)]  # refused for what they are
    assert peak < _LIMIT_BYTES


def test_a_box_without_memory_falls_back_to_the_full_file() -> None:
    """An old file of 40 MB as prefix does not fit into what this process may have: that too is no crash."""
    code = (
        "import pathlib, resource, sys, tempfile, re\n"
        "from tests.unit.delta_parts import header, rebuilt, segment, zeros_frame\n"
        "from model_sync.delta.codec import DeltaError\n"
        "old, new = bytes(40 * 2**20), bytes(30 * 2**20)\n"
        "delta = header('zstd-prefix', old, new) + segment(0, len(old), zeros_frame(len(new)))\n"
        "with tempfile.TemporaryDirectory() as directory:\n"
        "    assert rebuilt(pathlib.Path(directory), 'zstd-prefix', old, delta, new) == new\n"
        "    size, = re.findall(r'VmSize:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (int(size) * 1024 + 2**23,) * 2)\n"
        "    try:\n"
        "        rebuilt(pathlib.Path(directory), 'zstd-prefix', old, delta, new)\n"
        "    except DeltaError as error:\n"
        "        sys.exit(f'refused: {error.message}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "refused: the delta needs more memory than there is"
