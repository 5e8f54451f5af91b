"""The tensors of two ONNX files, each paired with its other version, for the encoder of the ``tensor`` codec.

The protobuf is parsed here because the offsets of the tensors' bytes are needed, and no library returns them. A delta is exact even
when this module is wrong about ONNX: a missed tensor or a wrong pair only makes it larger. Never used on a box.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

MIN_TENSOR_BYTES = 64  # below, an instruction of its own costs more than it saves
_MAX_DEPTH = 32  # graphs within nodes within graphs

# onnx.proto: TensorProto.DataType -> bytes per element; shift that leaves the exponent (and the sign) of a float.
_WIDTH = {1: 4, 4: 2, 5: 2, 6: 4, 7: 8, 10: 2, 11: 8, 12: 4, 13: 8, 14: 4, 15: 8, 16: 2}
_EXPONENT_SHIFT = {1: 23, 10: 10, 11: 52, 14: 23, 15: 52, 16: 7}
UNKNOWN = -1


class View(NamedTuple):
    """An interpretation of bytes as integers: bytes per element, the shift that groups floats by exponent, bits per difference."""

    width: int
    shift: int | None = None
    bits: int = 8


_BYTES = (View(1), View(1, bits=4), View(1, bits=2))
# All interpretations of bytes of unknown type: integers, float16, bfloat16 and float32.
_UNKNOWN = (*_BYTES, View(2), View(4), View(2, 10), View(2, 7), View(4, 23))


@dataclass(frozen=True)
class Tensor:
    """One tensor and the range of its bytes in the file; ``dtype`` is ONNX's number, or ``UNKNOWN``."""

    name: str
    dtype: int
    dims: tuple[int, ...]
    offset: int
    length: int

    @property
    def views(self) -> tuple[View, ...]:
        """The interpretations of its elements that are worth trying."""
        if self.dtype == UNKNOWN:
            return tuple(view for view in _UNKNOWN if self.length % view.width == 0)
        width = _WIDTH.get(self.dtype, 1)
        if width == 1 or self.length % width:
            return _BYTES
        shift = _EXPONENT_SHIFT.get(self.dtype)
        return (View(width),) if shift is None else (View(width), View(width, shift))


class _NotProtobufError(ValueError):
    pass


def tensors(data: bytes) -> list[Tensor]:
    """Return the tensors of an ONNX model in the order of their bytes; an empty list when ``data`` is no ONNX model."""
    collected: list[Tensor] = []
    try:
        for number, wire, start, end in _fields(data, 0, len(data)):
            if (number, wire) == (7, 2):  # ModelProto.graph
                _walk_graph(data, start, end, collected, _MAX_DEPTH)
            elif (number, wire) == (25, 2):  # ModelProto.functions
                for inner, inner_wire, node, node_end in _fields(data, start, end):
                    if (inner, inner_wire) == (7, 2):  # FunctionProto.node
                        _walk_node(data, node, node_end, collected, _MAX_DEPTH)
    except _NotProtobufError:
        return []
    return sorted((tensor for tensor in collected if tensor.length >= MIN_TENSOR_BYTES), key=lambda tensor: tensor.offset)


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise _NotProtobufError


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield field number, wire type, start and end of the value; for a varint the value itself instead of the start."""
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise _NotProtobufError
        if wire == 0:
            value, at = _varint(data, at, end)
            yield number, wire, value, at
            continue
        length = {1: 8, 5: 4}.get(wire, 0)
        if wire == 2:
            length, at = _varint(data, at, end)
        if at + length > end:
            raise _NotProtobufError
        yield number, wire, at, at + length
        at += length


def _walk_graph(data: bytes, start: int, end: int, collected: list[Tensor], depth: int) -> None:
    if not depth:
        raise _NotProtobufError
    for number, wire, inner, inner_end in _fields(data, start, end):
        if (number, wire) == (1, 2):  # GraphProto.node
            _walk_node(data, inner, inner_end, collected, depth)
        elif (number, wire) == (5, 2):  # GraphProto.initializer
            collected += _tensor(data, inner, inner_end)
        elif (number, wire) == (15, 2):  # GraphProto.sparse_initializer
            collected += _sparse(data, inner, inner_end)


def _walk_node(data: bytes, start: int, end: int, collected: list[Tensor], depth: int) -> None:
    outputs, attributes = [], []
    for number, wire, inner, inner_end in _fields(data, start, end):
        if (number, wire) == (2, 2):
            outputs.append(data[inner:inner_end])
        elif (number, wire) == (5, 2):
            attributes.append((inner, inner_end))
    name = outputs[0].decode("utf-8", "replace") if outputs else ""
    for begin, attribute_end in attributes:
        for number, wire, inner, inner_end in _fields(data, begin, attribute_end):
            if wire == 2 and number in (5, 10):  # AttributeProto.t, .tensors
                collected += _tensor(data, inner, inner_end, name)
            elif wire == 2 and number in (6, 11):  # AttributeProto.g, .graphs
                _walk_graph(data, inner, inner_end, collected, depth - 1)
            elif (number, wire) == (22, 2):  # AttributeProto.sparse_tensor
                collected += _sparse(data, inner, inner_end)


def _sparse(data: bytes, start: int, end: int) -> Iterator[Tensor]:
    for number, wire, inner, inner_end in _fields(data, start, end):
        if wire == 2 and number in (1, 2):  # SparseTensorProto.values, .indices
            yield from _tensor(data, inner, inner_end)


def _tensor(data: bytes, start: int, end: int, owner: str = "") -> Iterator[Tensor]:
    """Yield the tensor when its elements are contiguous in the file: raw_data, or packed floats."""
    dims, dtype, name, payload = [], 0, owner, (0, 0)
    for number, wire, inner, inner_end in _fields(data, start, end):
        if number == 1 and wire == 0:
            dims.append(inner)
        elif number == 1 and wire == 2:
            at = inner
            while at < inner_end:
                dim, at = _varint(data, at, inner_end)
                dims.append(dim)
        elif (number, wire) == (2, 0):
            dtype = inner
        elif (number, wire) == (8, 2):
            name = data[inner:inner_end].decode("utf-8", "replace") or owner
        elif wire == 2 and number in (4, 9, 10):  # float_data, raw_data, double_data
            payload = (inner, inner_end)
    yield Tensor(name, dtype, tuple(dims), payload[0], payload[1] - payload[0])


class Pair(NamedTuple):
    """A tensor of the new file, and the tensor of the old file against which its difference is written."""

    old: Tensor
    new: Tensor


def pairs(old: bytes, new: bytes, old_tensors: list[Tensor], new_tensors: list[Tensor]) -> list[Pair]:
    """Pair each new tensor with an old one, the most certain match first; tensors without a match are left out."""
    pairing = _Pairing(old_tensors, new_tensors)
    pairing.match(lambda tensor: (tensor.name, tensor.dtype, tensor.dims))
    pairing.match(lambda tensor: (tensor.name, tensor.dtype, tensor.length))  # reshaped
    contents = {_content(old, tensor): tensor for tensor in reversed(old_tensors)}
    for tensor in pairing.left():  # renamed and unchanged; several may be copies of one tensor
        if (same := contents.get(_content(new, tensor))) is not None:
            pairing.add(same, tensor)
    pairing.match(lambda tensor: (tensor.dtype, tensor.dims))  # renamed and changed
    pairing.match(lambda tensor: (tensor.name, tensor.dtype, tensor.dims[1:]))  # rows were added or removed
    return pairing.done()


class _Pairing:
    def __init__(self, old: list[Tensor], new: list[Tensor]) -> None:
        self._old, self._new = old, new
        self._found: dict[int, Pair] = {}  # by the new tensor's offset
        self._taken: set[int] = set()  # the old tensors' offsets

    def left(self) -> list[Tensor]:
        """Return the new tensors without a partner."""
        return [tensor for tensor in self._new if tensor.offset not in self._found]

    def add(self, old: Tensor, new: Tensor) -> None:
        """Add one pair."""
        self._found[new.offset] = Pair(old, new)
        self._taken.add(old.offset)

    def match(self, key: Callable[[Tensor], Hashable]) -> None:
        """Pair the remaining tensors that have the same key, in the order of the files."""
        waiting: defaultdict[Hashable, list[Tensor]] = defaultdict(list)
        for tensor in reversed(self._old):
            if tensor.offset not in self._taken:
                waiting[key(tensor)].append(tensor)
        for tensor in self.left():
            if candidates := waiting[key(tensor)]:
                self.add(candidates.pop(), tensor)

    def done(self) -> list[Pair]:
        """Return the pairs in the order of the new file."""
        return [self._found[tensor.offset] for tensor in self._new if tensor.offset in self._found]


def _content(data: bytes, tensor: Tensor) -> bytes:
    return hashlib.sha256(data[tensor.offset : tensor.offset + tensor.length]).digest()
