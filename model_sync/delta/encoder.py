"""The encoder of deltas (``model_sync.delta.codec`` has the format): used when the central team publishes, never on a box.

Measured and not used: a monotone mapping of floats to integers, so that -0 and +0 are neighbours (0.04 % of a delta).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model_sync.delta import format as fmt
from model_sync.delta.format import as_prefix, grouping, zstd
from model_sync.delta.onnx_tensors import MIN_TENSOR_BYTES, UNKNOWN, Pair, Tensor, View, pairs, tensors

_LEVEL = 19
_WINDOW_BYTES = 32  # the shortest run of bytes that is searched in the old file
_SAMPLE_BYTES = 2**18
_Parameter = zstd.CompressionParameter
# Almost no matches: Huffman codes in blocks. As small as level 19 for noise with a narrow spread, and 200 times as fast.
_ENTROPY_ONLY: dict[int, int] = {_Parameter.compression_level: 1, _Parameter.strategy: 1, _Parameter.min_match: 7, _Parameter.hash_log: 6}


def encode_prefix(old: bytes, new: bytes, level: int = _LEVEL) -> bytes:
    """Return the body of a delta in the ``zstd-prefix`` codec."""
    parts = []
    for start in range(0, len(new), fmt.SEGMENT_BYTES):
        piece = new[start : start + fmt.SEGMENT_BYTES]
        # The same position in the old file with a margin on both sides; the complete file when it fits.
        begin = max(0, min(start - (fmt.PREFIX_BYTES - fmt.SEGMENT_BYTES) // 2, len(old) - fmt.PREFIX_BYTES))
        prefix = old[begin : begin + fmt.PREFIX_BYTES]
        options: dict[int, int] = {
            _Parameter.compression_level: level,
            _Parameter.window_log: fmt.SEGMENT_WINDOW_LOG,
            _Parameter.enable_long_distance_matching: 1,
        }
        packer = zstd.ZstdCompressor(options=options, zstd_dict=as_prefix(prefix))
        packer.set_pledged_input_size(len(piece))
        frame = packer.compress(piece, zstd.ZstdCompressor.FLUSH_FRAME)
        parts += [fmt.SEGMENT.pack(begin, len(prefix), len(frame)), frame]
    return b"".join(parts)


def encode_tensor(old: bytes, new: bytes) -> bytes:
    """Return the body of a delta in the ``tensor`` codec."""
    old_tensors, new_tensors = tensors(old), tensors(new)
    plans = [plan for pair in pairs(old, new, old_tensors, new_tensors) if (plan := _plan(old, new, pair))]
    bodies = [_encode(old, new, old_tensors, plans)]
    if not new_tensors and len(old) == len(new) >= MIN_TENSOR_BYTES:  # raw weights, such as ONNX's external data
        weights = Tensor("", UNKNOWN, (), 0, len(new))
        if plan := _plan(old, new, Pair(weights, weights)):
            bodies.append(_encode(old, new, [weights], [plan]))
    return min(bodies, key=len)


class _Plan(NamedTuple):
    """A range of the new file built from the old file: a copy without a view, otherwise a difference."""

    start: int
    length: int
    offset: int
    view: View | None = None


def _plan(old: bytes, new: bytes, pair: Pair) -> _Plan | None:
    """Return the smallest way to write one tensor; None when its own bytes are smaller."""
    length = min(pair.old.length, pair.new.length)
    before = old[pair.old.offset : pair.old.offset + length]
    after = new[pair.new.offset : pair.new.offset + length]
    if before == after:
        return _Plan(pair.new.offset, length, pair.old.offset)
    cheapest, chosen = _entropy(after), None
    for view in pair.new.views:
        if length % view.width == 0 and (cost := sum(map(_entropy, _coded(before, after, view).values()))) < cheapest:
            cheapest, chosen = cost, _Plan(pair.new.offset, length, pair.old.offset, view)
    return chosen


def _coded(before: bytes, after: bytes, view: View) -> dict[int, bytes]:
    """Return the differences as the decoder reads them: the bytes of each stream."""
    dtype, signed = np.dtype(f"<u{view.width}"), np.dtype(f"<i{view.width}")
    olds = np.frombuffer(before, dtype)
    differences = (np.frombuffer(after, dtype) - olds).view(signed)
    zigzag = ((differences << 1) ^ (differences >> (8 * view.width - 1))).view(dtype)
    if view.bits < 8:
        return _narrow(zigzag, view.bits)
    if view.shift is not None:
        block = fmt.BLOCK_BYTES // view.width
        starts = range(0, len(olds), block)
        zigzag = np.concatenate([zigzag[at : at + block][grouping(olds[at : at + block], view.shift)] for at in starts])
    columns = zigzag.view(np.uint8).reshape(-1, view.width)
    return {fmt.FIRST_PLANE + view.width - 1 + place: columns[:, place].tobytes() for place in range(view.width)}


def _narrow(zigzag: NDArray[Any], bits: int) -> dict[int, bytes]:
    """Pack bytes into codes of ``bits`` bits: zstd's Huffman codes use at least one bit for each byte."""
    codes_in_byte, most = 8 // bits, (1 << bits) - 1
    codes = np.zeros(-(-len(zigzag) // codes_in_byte) * codes_in_byte, np.uint8)
    codes[: len(zigzag)] = np.minimum(zigzag, most)
    packed = np.bitwise_or.reduce(codes.reshape(-1, codes_in_byte) << np.arange(0, 8, bits, dtype=np.uint8), axis=1)
    escapes = zigzag[zigzag >= most] - most
    return {fmt.CODES[bits]: packed.astype(np.uint8).tobytes(), fmt.ESCAPES: escapes.astype(np.uint8).tobytes()}


def _encode(old: bytes, new: bytes, old_tensors: list[Tensor], plans: list[_Plan]) -> bytes:
    """Write the planned ranges, and between them copies found elsewhere in the old file, and literals."""
    index = _Index(old, old_tensors)
    shortest = _WINDOW_BYTES
    while True:
        writer = _Writer(old, new)
        done = 0
        for plan in [*plans, _Plan(len(new), 0, 0)]:
            for start, length, offset in index.matches(new, done, plan.start, shortest):
                writer.literal(done, start)
                writer.copy(offset, length)
                done = start + length
            writer.literal(done, plan.start)
            writer.plan(plan)
            done = plan.start + plan.length
        program = writer.program()
        if len(writer.operations) <= fmt.MAX_OPERATIONS and len(program) <= fmt.MAX_PROGRAM_BYTES:
            return writer.body(program)
        shortest *= 4  # fewer and longer copies


class _Index:
    """The positions of byte runs in the old file: a fine index between its tensors, a coarse one within them."""

    def __init__(self, old: bytes, old_tensors: list[Tensor]) -> None:
        self._old = old
        self._places: dict[bytes, int] = {}
        done = 0
        gaps = []
        for tensor in old_tensors:
            gaps.append((done, tensor.offset))
            done = tensor.offset + tensor.length
        gaps.append((done, len(old)))
        self._add(gaps, max(8, sum(end - start for start, end in gaps) >> 18))
        self._add([(tensor.offset, tensor.offset + tensor.length) for tensor in old_tensors], max(64, len(old) >> 18))

    def _add(self, ranges: list[tuple[int, int]], stride: int) -> None:
        for start, end in ranges:
            for at in range(start, end - _WINDOW_BYTES + 1, stride):
                self._places.setdefault(self._old[at : at + _WINDOW_BYTES], at)

    def matches(self, new: bytes, start: int, end: int, shortest: int) -> Iterator[tuple[int, int, int]]:
        """Yield (place in new, length, place in old) of runs of at least ``shortest`` bytes, from ``start`` to ``end``."""
        find = self._places.get
        at = start
        while at <= end - shortest:
            place = find(new[at : at + _WINDOW_BYTES])
            if place is None:
                at += 1
                continue
            back = 0
            while at - back > start and place > back and new[at - back - 1] == self._old[place - back - 1]:
                back += 1
            length = back + self._common(new, at, end, place)
            if length < shortest:
                at += 1
                continue
            yield at - back, length, place - back
            start = at = at - back + length

    def _common(self, new: bytes, at: int, end: int, place: int) -> int:
        """Return how many bytes from ``at`` in new, up to ``end``, equal those from ``place`` in old."""
        most = min(end - at, len(self._old) - place)
        same, step = 0, 64
        while step:
            step = min(step, most - same)
            if step and new[at + same : at + same + step] == self._old[place + same : place + same + step]:
                same += step
                step = min(2 * step, _SAMPLE_BYTES)
            else:
                step //= 2
        return same


class _Writer:
    """Collects instructions and streams; adjacent copies are joined."""

    def __init__(self, old: bytes, new: bytes) -> None:
        self._old, self._new = old, new
        self.operations: list[tuple[int, int, int, int | None]] = []  # kind, length, place in old, shift
        self._streams: defaultdict[int, bytearray] = defaultdict(bytearray)

    def copy(self, offset: int, length: int) -> None:
        """Add a copy of ``length`` bytes of the old file."""
        if self.operations:
            kind, before, at, _ = self.operations[-1]
            if kind == fmt.COPY and at + before == offset:
                self.operations[-1] = (fmt.COPY, before + length, at, None)
                return
        self.operations.append((fmt.COPY, length, offset, None))

    def literal(self, start: int, end: int) -> None:
        """Add the bytes of the new file from ``start`` to ``end``."""
        if end > start:
            self.operations.append((fmt.LITERAL, end - start, 0, None))
            self._streams[fmt.LITERALS] += self._new[start:end]

    def plan(self, plan: _Plan) -> None:
        """Add a planned range; an empty one is ignored."""
        if plan.view:
            width, shift, bits = plan.view
            kind = fmt.NARROW + bits if bits < 8 else (fmt.DIFFERENCE if shift is None else fmt.GROUPED) + width.bit_length() - 1
            self.operations.append((kind, plan.length // width, plan.offset, shift))
            before = self._old[plan.offset : plan.offset + plan.length]
            after = self._new[plan.start : plan.start + plan.length]
            for number, data in _coded(before, after, plan.view).items():
                self._streams[number] += data
        elif plan.length:
            self.copy(plan.offset, plan.length)

    def program(self) -> bytes:
        """Return the instructions as bytes."""
        program = bytearray()
        last = 0
        for kind, length, offset, shift in self.operations:
            program += bytes([kind]) + _varint(length)
            if shift is not None:
                program += _varint(shift)
            if kind != fmt.LITERAL:
                step = offset - last
                program += _varint(step << 1 if step >= 0 else (-step << 1) - 1)
                last = offset + length * (1 << (kind & 0x0F) if kind & 0xF0 in (fmt.DIFFERENCE, fmt.GROUPED) else 1)
        return bytes(program)

    def body(self, program: bytes) -> bytes:
        """Return the table of the streams, and the streams."""
        raw = {fmt.PROGRAM: program} | {number: bytes(self._streams[number]) for number in sorted(self._streams) if self._streams[number]}
        packed = {number: _pack(data, fmt.WINDOW_LOG[number]) for number, data in raw.items()}
        table = [fmt.STREAM.pack(number, len(data), len(packed[number])) for number, data in raw.items()]
        return b"".join([bytes([len(table)]), *table, *packed.values()])


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _entropy(data: bytes) -> int:
    return len(zstd.compress(data, options=_ENTROPY_ONLY))


def _pack(data: bytes, window_log: int) -> bytes:
    """Compress a stream as one frame; for a long one a sample decides the level, because the slowest is not always the best."""
    options: list[dict[int, int]] = [_ENTROPY_ONLY]
    options += [{_Parameter.compression_level: level, _Parameter.window_log: window_log} for level in (_LEVEL - 3, _LEVEL)]
    if len(data) > 8 * _SAMPLE_BYTES:
        quarters = [len(data) * part // 4 for part in range(4)]
        sample = b"".join(data[at : at + _SAMPLE_BYTES] for at in quarters)
        options = [min(options, key=lambda option: len(zstd.compress(sample, options=option)))]
        if options[0] is not _ENTROPY_ONLY:
            options[0][_Parameter.nb_workers] = 2
    return min((zstd.compress(data, options=option) for option in options), key=len)
