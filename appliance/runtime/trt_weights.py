"""Rewrites int8 weights for TensorRT 8: float32 constants before a pair of QuantizeLinear and DequantizeLinear.

The quantizer of ONNX Runtime stores weights as int8 followed by DequantizeLinear, a fourth of the size. The parser of TensorRT 8 refuses
int8 constants ("invalid weights type of Int8", NVIDIA/TensorRT #3360, microsoft/onnxruntime #11535). So the file stays small and is
rewritten in memory for the parser: int8 times scale is float32, and quantizing that with the same scale gives the same int8 values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def with_float_weights(path: Path) -> bytes | None:
    """Replace int8 constants before a DequantizeLinear by float32 constants before a Q/DQ pair.

    Returns:
        The rewritten model, or None when the parser should read the file itself: nothing to rewrite, weights in another file, ``onnx``
        not installed, or no valid ONNX model, which the parser reports better.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        return None
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (OSError, DecodeError):
        return None
    constants = {item.name: item for item in model.graph.initializer}
    rewritten = [node for node in model.graph.node if _is_weight(node, constants)]
    if not rewritten or any(item.data_location == onnx.TensorProto.EXTERNAL for item in constants.values()):
        return None
    replaced: set[str] = set()
    for node in rewritten:
        if node.input[0] not in replaced:
            replaced.add(node.input[0])
            _rewrite(model.graph, node, constants)
    return bytes(model.SerializeToString())


def _is_weight(node: Any, constants: dict[str, Any]) -> bool:
    import onnx

    constant = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    return constant is not None and constant.data_type == onnx.TensorProto.INT8 and node.input[1] in constants


def _rewrite(graph: Any, node: Any, constants: dict[str, Any]) -> None:
    """Replace one int8 constant by a float32 constant and a QuantizeLinear whose output has the name of the int8 constant."""
    from onnx import helper, numpy_helper

    values: NDArray[np.int8] = numpy_helper.to_array(constants[node.input[0]])
    scale: NDArray[np.float32] = numpy_helper.to_array(constants[node.input[1]])
    axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
    shape = [-1 if dim == axis % values.ndim else 1 for dim in range(values.ndim)]
    broadcast = scale.reshape(shape if scale.size > 1 else ())
    name = f"{node.input[0]}_float"
    graph.initializer.append(numpy_helper.from_array((values * broadcast).astype(np.float32), name))
    graph.initializer.remove(constants[node.input[0]])
    quantize = helper.make_node("QuantizeLinear", [name, *node.input[1:]], [node.input[0]], name=f"{name}_quantize", axis=axis)
    graph.node.insert(0, quantize)
