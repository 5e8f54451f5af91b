"""Messages between a candidate's process and its parent: what goes in comes out, and no bytes at all are a danger to who reads them."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from appliance.core.child_protocol import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, Message, ProtocolError, pack, receive

KINDS = ["bool", "float16", "float32", "float64", "int8", "int32", "int64", "uint8"]
JSON = st.recursive(st.none() | st.booleans() | st.integers(-10, 10) | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))
ARRAYS = st.dictionaries(
    st.text(max_size=8),
    st.sampled_from(KINDS).flatmap(
        lambda kind: npst.arrays(np.dtype(kind), npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
    ),
    max_size=4,
)


def read(data: bytes) -> tuple[Message, int]:
    place = 0

    def fill(buffer: memoryview) -> None:
        nonlocal place
        part = data[place : place + len(buffer)]
        if len(part) < len(buffer):
            raise EOFError
        buffer[:] = part
        place += len(buffer)

    return receive(fill), place


def raw(header: Any, payload: bytes = b"", *, claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">4sIQ", b"RT01", len(text), len(payload) if claimed is None else claimed) + text + payload


@given(st.dictionaries(st.text(max_size=5).filter(lambda key: key != "arrays"), JSON, max_size=3), ARRAYS)
def test_what_goes_in_comes_out(header: dict[str, Any], arrays: dict[str, Any]) -> None:
    data = b"".join(pack(header, arrays))
    message, length = read(data)
    assert length == len(data)
    assert message.header == header
    assert list(message.arrays) == list(arrays)
    for name, array in arrays.items():
        assert message.arrays[name].dtype == array.dtype and message.arrays[name].shape == array.shape
        assert np.array_equal(message.arrays[name], array, equal_nan=array.dtype.kind == "f")
        assert message.arrays[name].flags.writeable and message.arrays[name].flags.aligned


def test_array_that_is_not_contiguous() -> None:
    array = np.arange(24.0).reshape(2, 3, 4)[:, ::2, ::-1]
    assert np.array_equal(read(b"".join(pack({}, {"x": array})))[0].arrays["x"], array)


def test_contiguous_arrays_are_not_copied() -> None:
    array = np.zeros((4, 4), np.float32)
    assert any(np.shares_memory(np.frombuffer(buffer, np.uint8), array) for buffer in pack({}, {"x": array}))


@given(st.binary(max_size=200))
@example(b"")
@example(b"RT01" + b"\xff" * 12)
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        read(data)
    except (ProtocolError, EOFError):
        return


@given(ARRAYS, st.data())
def test_a_changed_message_is_a_message_or_refused(arrays: dict[str, Any], draw: st.DataObject) -> None:
    data = bytearray(b"".join(pack({"n": 1}, arrays)))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        read(bytes(data))
    except (ProtocolError, EOFError):
        return


@pytest.mark.parametrize(
    "data",
    [
        raw(b"{"), raw(b"[]"), raw(b"null"), raw({}), raw({"arrays": 1}), raw({"arrays": [1]}), raw(b"[" * 5000), raw(b"\xff\xfe"),
        raw({"arrays": [{"name": "x", "dtype": "object", "shape": [1]}]}, b" " * 64),
        raw({"arrays": [{"name": "x", "dtype": ["float32"], "shape": [1]}]}, b" " * 64),
        raw({"arrays": [{"name": "x", "dtype": "float32", "shape": [-1]}]}, b" " * 64),
        raw({"arrays": [{"name": "x", "dtype": "float32", "shape": [1.0]}]}, b" " * 64),
        raw({"arrays": [{"name": "x", "dtype": "float32", "shape": [True]}]}, b" " * 64),
        raw({"arrays": [{"name": "x", "dtype": "float32", "shape": [1] * 9}]}, b" " * 64),
        raw({"arrays": [{"name": "x", "dtype": "float32", "shape": [1 << 40, 0]}]}),
        raw({"arrays": [{"name": "x", "dtype": "float32", "shape": [1 << 30] * 8}]}, claimed=64),
        raw({"arrays": [{"name": "x", "dtype": "float32", "shape": [2]}]}, b" " * 63),
        raw({"arrays": [{"name": 1, "dtype": "float32", "shape": [1]}]}, b" " * 64),
        raw({"arrays": [{"name": "x", "dtype": "uint8", "shape": [1]}] * 2}, b" " * 128),
        raw({"arrays": []}, b"left over"), raw({"arrays": []}, claimed=MAX_PAYLOAD_BYTES + 1),
        struct.pack(">4sIQ", b"RT01", MAX_HEADER_BYTES + 1, 0), struct.pack(">4sIQ", b"RT02", 2, 0) + b"{}",
    ],
)  # fmt: skip
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(data)


def test_nothing_is_allocated_for_a_size_that_does_not_fit() -> None:
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ProtocolError):
        read(raw({"arrays": []}, claimed=MAX_PAYLOAD_BYTES))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None], dtype=object), np.zeros([1] * 9), np.zeros(3, np.complex64)])
def test_arrays_that_are_not_sent(array: Any) -> None:
    with pytest.raises(ProtocolError):
        pack({}, {"x": array})


def test_header_too_large() -> None:
    with pytest.raises(ProtocolError):
        pack({"text": "x" * MAX_HEADER_BYTES})
