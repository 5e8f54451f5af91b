"""The messages between a limited process and its parent: a JSON header and raw arrays (no I/O of its own).

A message is ``RT01``, the header's length (uint32) and the payload's (uint64), big-endian, the header as UTF-8 JSON, the payload.
The header's ``"arrays"`` lists name, dtype and shape in the order of the payload; each array begins at a multiple of 64 bytes. Not
pickle: pickle executes what it reads, and the writing process may have been corrupted by native code. numpy is imported with the first
message: the web process mostly reads headers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC: Final = b"RT01"
_HEAD: Final = struct.Struct(">4sIQ")
_ALIGN: Final = 64
_MAX_NDIM: Final = 8
MAX_HEADER_BYTES: Final = 1 << 20
MAX_PAYLOAD_BYTES: Final = 1 << 30
_DTYPES: Final = ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


class ProtocolError(Exception):
    """The bytes are not a valid message."""


class Message(NamedTuple):
    """One message: a header of JSON types, and arrays by name."""

    header: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def pack(header: dict[str, Any], arrays: dict[str, NDArray[Any]] | None = None) -> list[memoryview]:
    """Encode a message as buffers to write one after the other; contiguous arrays are not copied.

    Raises:
        ProtocolError: an array has an unsupported dtype or too many dimensions, or the message is too large.
    """
    import numpy as np

    entries, buffers, length = [], [], 0
    for name, value in (arrays or {}).items():
        if value.dtype.name not in _DTYPES or value.ndim > _MAX_NDIM:
            raise ProtocolError(f"{name!r} is {value.dtype} of {value.ndim} dimensions")
        entries.append({"name": name, "dtype": value.dtype.name, "shape": list(value.shape)})
        contiguous = np.ascontiguousarray(value)
        buffers += [contiguous.reshape(-1).view(np.uint8).data, memoryview(bytes(-contiguous.nbytes % _ALIGN))]
        length += contiguous.nbytes + -contiguous.nbytes % _ALIGN
    text = json.dumps(header | {"arrays": entries}, allow_nan=False).encode()
    if len(text) > MAX_HEADER_BYTES or length > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a message of {len(text)} + {length} bytes is too large")
    return [buffer for buffer in (memoryview(_HEAD.pack(_MAGIC, len(text), length) + text), *buffers) if buffer.nbytes]


def receive(fill: Callable[[memoryview], None], take: Callable[[int], bytearray] | None = None) -> Message:
    """Read one message.

    Args:
        fill: fills a buffer with the next bytes of the stream, or raises.
        take: returns a copy of a payload of so many bytes, where that does not come by the stream.

    Raises:
        ProtocolError: the bytes are not a valid message.
    """
    import numpy as np

    head = bytearray(_HEAD.size)
    fill(memoryview(head))
    magic, header_bytes, payload_bytes = _HEAD.unpack(head)
    if magic != _MAGIC or header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError("no message begins here")
    text = bytearray(header_bytes)
    fill(memoryview(text))
    header, entries = _read_header(text)
    lengths = [_nbytes(entry) for entry in entries]
    if sum(length + -length % _ALIGN for length in lengths) != payload_bytes:  # before anything of that size is allocated
        raise ProtocolError("the arrays and the payload differ in size")
    if take is None:
        payload = bytearray(payload_bytes)
        fill(memoryview(payload))
    else:
        payload = take(payload_bytes)
    arrays: dict[str, NDArray[Any]] = {}
    offset = 0
    for entry, length in zip(entries, lengths, strict=True):
        flat = np.frombuffer(payload, np.uint8, length, offset) if length else np.empty(0, np.uint8)
        arrays[entry["name"]] = flat.view(entry["dtype"]).reshape(entry["shape"])
        offset += length + -length % _ALIGN
    return Message(header, arrays)


def _read_header(text: bytearray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the header is no JSON") from error
    entries = header.pop("arrays", None) if isinstance(header, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and set(entry) == {"name", "dtype", "shape"} for entry in entries):
        raise ProtocolError("the header lists no arrays")
    names = [entry["name"] for entry in entries]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ProtocolError("two arrays have one name, or one has none")
    return header, entries


def _nbytes(entry: dict[str, Any]) -> int:
    import numpy as np

    dtype, shape = entry["dtype"], entry["shape"]
    is_valid = isinstance(shape, list) and len(shape) <= _MAX_NDIM and all(type(n) is int and 0 <= n <= MAX_PAYLOAD_BYTES for n in shape)
    if dtype not in _DTYPES or not is_valid:
        raise ProtocolError("an array of no known kind or shape")
    length = int(np.dtype(dtype).itemsize)
    for n in shape:
        length *= n
    return length
