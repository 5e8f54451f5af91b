"""ONNX files written without the ``onnx`` package, which a bare GPU machine does not have: a small convolutional net in three precisions.

Only the fields of the protobuf that these nets need; ``tests/unit/test_tiny_onnx.py`` holds the files against ``onnx`` and ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CHANNELS, SIDE, FILTERS = 1, 32, 16
_FLOAT, _INT8, _FLOAT16 = 1, 3, 10
_TYPES = {np.dtype(np.float32): _FLOAT, np.dtype(np.int8): _INT8, np.dtype(np.float16): _FLOAT16}


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, value: np.ndarray[Any, Any]) -> bytes:
    dims = b"".join(_number(1, n) for n in value.shape)
    return _bytes(5, dims + _number(2, _TYPES[value.dtype]) + _bytes(8, name) + _bytes(9, value.tobytes()))


def _value(field: int, name: str, dims: list[int | str]) -> bytes:
    shape = b"".join(_bytes(1, _bytes(2, dim) if isinstance(dim, str) else _number(1, dim)) for dim in dims)
    return _bytes(field, _bytes(1, name) + _bytes(2, _bytes(1, _number(1, _FLOAT) + _bytes(2, shape))))


def _node(kind: str, inputs: list[str], output: str, **attributes: int | list[int]) -> bytes:
    node = b"".join(_bytes(1, name) for name in inputs) + _bytes(2, output) + _bytes(3, f"{kind}_{output}") + _bytes(4, kind)
    for name, value in attributes.items():
        if isinstance(value, int):
            node += _bytes(5, _bytes(1, name) + _number(3, value) + _number(20, 2))
        else:
            node += _bytes(5, _bytes(1, name) + b"".join(_number(8, item) for item in value) + _number(20, 7))
    return _bytes(1, node)


def _model(nodes: list[bytes], constants: dict[str, np.ndarray[Any, Any]], batch: int | str) -> bytes:
    graph = b"".join(nodes) + _bytes(2, "tiny") + b"".join(_tensor(name, value) for name, value in constants.items())
    graph += _value(11, "image", [batch, CHANNELS, SIDE, SIDE])
    graph += _value(12, "map", [batch, FILTERS, SIDE, SIDE]) + _value(12, "mean", [batch, FILTERS, 1, 1])
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, "") + _number(2, 17))


def weights() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The convolution's weights, float32 [16, 1, 3, 3], multiples of 1/127 of each filter's largest so that int8 holds them exactly."""
    whole = np.random.default_rng(0).integers(-127, 128, (FILTERS, CHANNELS, 3, 3))
    whole[:, 0, 0, 0] = 127
    return (whole / 127 / 4).astype(np.float32)


def write(path: Path, precision: str, batch: int | str = "n", operator: str = "Relu") -> Path:
    """Write ``map = relu(conv(image)), mean = mean over map`` in "fp32", "fp16" or "int8" (Q/DQ before the convolution)."""
    padded = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    end = [_node(operator, ["conv"], "map"), _node("GlobalAveragePool", ["map"], "mean")]
    w = weights()
    if precision == "fp32":
        nodes, constants = [_node("Conv", ["image", "w"], "conv", **padded), *end], {"w": w}
    elif precision == "fp16":
        nodes = [
            _node("Cast", ["image"], "half", to=_FLOAT16), _node("Conv", ["half", "w"], "conv_half", **padded),
            _node("Cast", ["conv_half"], "conv", to=_FLOAT), *end,
        ]  # fmt: skip
        constants = {"w": w.astype(np.float16)}
    else:
        scale = (np.abs(w).max(axis=(1, 2, 3)) / 127).astype(np.float32)
        constants = {
            "w32": w, "ws": scale, "wz": np.zeros(FILTERS, np.int8), "s": np.array(1 / 127, np.float32), "z": np.array(0, np.int8),
        }  # fmt: skip
        nodes = [  # weights as float32 before their Q/DQ: TensorRT 8.6 takes no int8 constants
            _node("QuantizeLinear", ["image", "s", "z"], "q"), _node("DequantizeLinear", ["q", "s", "z"], "dq"),
            _node("QuantizeLinear", ["w32", "ws", "wz"], "w8", axis=0), _node("DequantizeLinear", ["w8", "ws", "wz"], "w", axis=0),
            _node("Conv", ["dq", "w"], "conv", **padded), *end,
        ]  # fmt: skip
    path.write_bytes(_model(nodes, constants, batch))
    return path


def expected(images: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, np.ndarray[Any, Any]]:
    """What the float32 net gives, in float64.

    Args:
        images: float32 [n, 1, 32, 32].
    """
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    found = np.maximum(0, np.einsum("nchwij,fcij->nfhw", windows, weights().astype(np.float64)))
    return {"map": found, "mean": found.mean(axis=(2, 3), keepdims=True)}
