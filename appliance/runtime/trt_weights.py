"""int8 weights as TensorRT 8 reads them: float32 constants before a pair of QuantizeLinear and DequantizeLinear.

ONNX Runtime's quantizer stores weights as int8 with a DequantizeLinear behind them, a fourth of the size; TensorRT 8's parser refuses int8
constants ("invalid weights type of Int8", NVIDIA/TensorRT #3360, microsoft/onnxruntime #11535). So the file stays small, and is rewritten
for the parser alone: int8 times scale is float32, and quantizing that with the same scale gives the same int8 back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def with_float_weights(path: Path) -> bytes | None:
    """The model with float32 constants before a Q/DQ pair where it has int8 ones before a DequantizeLinear.

    Returns:
        The model, or None when it is to be read as it is: nothing to rewrite, weights in another file, no ``onnx`` on this machine to
        rewrite it with, or no ONNX model at all, which the parser says better.
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
    done: set[str] = set()
    for node in rewritten:
        if node.input[0] not in done:
            done.add(node.input[0])
            _rewrite(model.graph, node, constants)
    return bytes(model.SerializeToString())


def _is_weight(node: Any, constants: dict[str, Any]) -> bool:
    import onnx

    given = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    return given is not None and given.data_type == onnx.TensorProto.INT8 and node.input[1] in constants


def _rewrite(graph: Any, node: Any, constants: dict[str, Any]) -> None:
    """Put the float32 constant and its QuantizeLinear in the place of one int8 constant, under the int8 one's name."""
    from onnx import helper, numpy_helper

    whole: NDArray[np.int8] = numpy_helper.to_array(constants[node.input[0]])
    scale: NDArray[np.float32] = numpy_helper.to_array(constants[node.input[1]])
    axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
    along = [-1 if dim == axis % whole.ndim else 1 for dim in range(whole.ndim)]
    spread = scale.reshape(along if scale.size > 1 else ())
    name = f"{node.input[0]}_float"
    graph.initializer.append(numpy_helper.from_array((whole * spread).astype(np.float32), name))
    graph.initializer.remove(constants[node.input[0]])
    quantize = helper.make_node("QuantizeLinear", [name, *node.input[1:]], [node.input[0]], name=f"{name}_quantize", axis=axis)
    graph.node.insert(0, quantize)
