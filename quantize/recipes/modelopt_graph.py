"""Check the model that nvidia-modelopt wrote, and store its weights in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import Model, Node, attribute, drop_unused, initializers, replace_all, sort_nodes
from quantize.messages import Code

_PAIR = ("QuantizeLinear", "DequantizeLinear")


def load_quantized(path: Path, source: Model) -> Model:
    """Read the quantized form of ``source``; returns it with 8-bit weights, as every recipe writes them.

    nvidia-modelopt writes float weights with a QuantizeLinear behind each: the file is four times as large, and ONNX Runtime quantizes
    the weights again for every picture.

    Raises:
        QuantizeError: the file is no model, or no int8 form of ``source`` with symmetric activations.
    """
    try:
        model = onnx.load(path)
        _check(model, source)
        if not _shrink_weights(model):
            raise _wrong("a model with no weights in 8 bits: its rules leave narrow convolutions in float")
        model.ir_version = source.ir_version
        sort_nodes(model)
        drop_unused(model)
        onnx.checker.check_model(model, full_check=True)
    except (OSError, DecodeError) as error:
        raise _wrong("no model that can be read") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, IndexError, KeyError, ValueError) as error:
        raise _wrong(f"no valid model: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}") from error
    return model


def _check(model: Model, source: Model) -> None:
    if _signature(model) != _signature(source):
        raise _wrong("a model with other inputs or outputs")
    if _opsets(model) - _opsets(source):
        wanted, got = (", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in sorted(_opsets(one))) for one in (source, model))
        raise _wrong(f"opset {got} where the float model has {wanted}")
    constants = initializers(model)
    pairs = [node for node in model.graph.node if node.op_type in _PAIR]
    if not pairs:
        raise _wrong("a model without Q/DQ: it found nothing to quantize")
    for node in pairs:
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.dtype != np.int8 or zero.any():
            raise _wrong(f"activations or weights that are not symmetric int8, at {node.name}")


def _signature(model: Model) -> list[list[tuple[str, int, list[Any]]]]:
    return [
        [
            (
                str(value.name),
                int(value.type.tensor_type.elem_type),
                [axis.dim_value or axis.dim_param for axis in value.type.tensor_type.shape.dim],
            )
            for value in values
        ]
        for values in (model.graph.input, model.graph.output)
    ]


def _opsets(model: Model) -> set[tuple[str, int]]:
    used = {node.domain for node in model.graph.node}
    return {(entry.domain, entry.version) for entry in model.opset_import if entry.domain in used | {""}}


def _shrink_weights(model: Model) -> int:
    """Compute each QuantizeLinear of a weight (ONNX: round half to even, then saturate), so that only its DequantizeLinear stays.

    Returns:
        How many weights there were.
    """
    constants = initializers(model)
    remaining: list[Node] = []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in constants:
            remaining.append(node)
            continue
        weight, scale = constants[node.input[0]], constants[node.input[1]]
        axis = attribute(node, "axis", 1)
        shape = [-1 if number == axis % weight.ndim else 1 for number in range(weight.ndim)] if scale.ndim else []
        rounded: NDArray[np.float32] = np.rint(weight / scale.reshape(shape))
        model.graph.initializer.append(numpy_helper.from_array(np.clip(rounded, -128, 127).astype(np.int8), node.output[0]))
    count = len(model.graph.node) - len(remaining)
    replace_all(model.graph.node, remaining)
    return count


def _wrong(words: str) -> QuantizeError:
    return QuantizeError(f"nvidia-modelopt wrote {words}", code=Code.MODELOPT_WROTE)
