"""A quantized graph rewritten in float: the same rounding and clipping, no product in 8 bits, so that no sum can be clipped.

It is what the exact 8-bit sums give, on a processor whose own 8-bit sums are not exact. Integers keep their values and become float32;
sums of products stay exact up to 2**24, beyond which float32 rounds them by far less than a step of any activation.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import Model, Node, attribute, copy_of, drop_unused, initializers, replace_all

_LIMITS: Final = {np.dtype(np.uint8): (0.0, 255.0), np.dtype(np.int8): (-128.0, 127.0)}


def simulate_in_float(model: Model) -> Model:
    """Return a float model that computes what ``model`` defines by its QuantizeLinear and DequantizeLinear nodes.

    Constants before a DequantizeLinear become float constants; a QuantizeLinear becomes a division, a rounding to even (ONNX,
    QuantizeLinear), a shift and a clip; a DequantizeLinear of a computed tensor becomes a shift and a product.

    Raises:
        QuantizeError: A computed tensor is quantized per channel, or to another type than 8 bits.
    """
    simulated = copy_of(model)
    constants = initializers(simulated)
    nodes: list[Node] = []
    for node in simulated.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            simulated.graph.initializer.append(numpy_helper.from_array(_dequantized(node, constants), node.output[0]))
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            nodes += _in_steps(simulated, node, constants)
        else:
            nodes.append(node)
    replace_all(simulated.graph.node, nodes)
    del simulated.graph.value_info[:]
    drop_unused(simulated)
    onnx.checker.check_model(simulated)
    return simulated


def _dequantized(node: Node, constants: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    values, scale = constants[node.input[0]], constants[node.input[1]]
    zero_point = constants[node.input[2]] if len(node.input) > 2 else np.zeros_like(scale, values.dtype)
    if scale.size > 1:
        axis = attribute(node, "axis", 1) % values.ndim
        shape = [-1 if dim == axis else 1 for dim in range(values.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    else:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return np.asarray((values.astype(np.int64) - zero_point.astype(np.int64)) * scale, np.float32)


def _in_steps(model: Model, node: Node, constants: dict[str, NDArray[Any]]) -> list[Node]:
    """Return the float nodes for one QuantizeLinear or DequantizeLinear of a computed tensor."""
    scale = constants[node.input[1]]
    zero_point = constants[node.input[2]] if len(node.input) > 2 else np.uint8(0)
    if scale.size != 1 or np.asarray(zero_point).dtype not in _LIMITS:
        raise QuantizeError(f"{node.name} quantizes a computed tensor per channel or not to 8 bits", hint="quantize it per tensor")
    name = node.output[0]

    def constant(kind: str, value: Any) -> str:
        model.graph.initializer.append(
            numpy_helper.from_array(np.array(float(np.asarray(value).reshape(())), np.float32), f"{name}_{kind}")
        )
        return f"{name}_{kind}"

    scale_name, zero_name = constant("simulated_scale", scale), constant("simulated_zero", zero_point)
    if node.op_type == "DequantizeLinear":
        return [
            helper.make_node("Sub", [node.input[0], zero_name], [f"{name}_shifted"], name=f"{node.name}_shift"),
            helper.make_node("Mul", [f"{name}_shifted", scale_name], [name], name=f"{node.name}_scale"),
        ]
    low, high = _LIMITS[np.asarray(zero_point).dtype]
    return [
        helper.make_node("Div", [node.input[0], scale_name], [f"{name}_steps"], name=f"{node.name}_divide"),
        helper.make_node("Round", [f"{name}_steps"], [f"{name}_rounded"], name=f"{node.name}_round"),
        helper.make_node("Add", [f"{name}_rounded", zero_name], [f"{name}_shifted"], name=f"{node.name}_shift"),
        helper.make_node(
            "Clip", [f"{name}_shifted", constant("simulated_low", low), constant("simulated_high", high)], [name], name=f"{node.name}_clip"
        ),
    ]
