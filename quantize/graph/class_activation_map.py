"""A class activation map by graph surgery: Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.

Where the head is global average pooling and one linear layer, the linear layer may be applied to each cell of the feature map before
the pooling: a 1 x 1 convolution with its weights. The mean of that map over its cells plus the bias is the logit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import Model, Node, attribute, copy_of, initializers, output_names, producers, shape_of, with_shapes

_ACTIVATIONS: Final = ("Sigmoid", "Softmax", "Identity")
_RESHAPES: Final = ("Flatten", "Squeeze", "Reshape", "Identity", "Dropout")


def add_cam(model: Model, probability_output: str, cam_output: str = "cam") -> Model:
    """Return ``model`` with the output ``cam_output``, float32 [n, labels, h, w] ([n, labels, d, h, w] for volumes).

    Returned as it is where it has that output already. The head that is understood: GlobalAveragePool, or ReduceMean over all
    spatial axes, then Flatten, Squeeze or Reshape, then Gemm, or MatMul with or without Add, then Sigmoid, Softmax or nothing.

    Args:
        model: a cleaned float model (``graph.clean_up``); it is not changed.
        probability_output: the output that the map explains.
        cam_output: the name of the new output.

    Raises:
        QuantizeError: There is no such output, or its head is another one; the message names it.
    """
    if cam_output in output_names(model):
        return model
    if probability_output not in output_names(model):
        raise QuantizeError(
            f"the model has no output {probability_output!r}, only {', '.join(output_names(model))}",
            hint="name the probability output in the draft manifest as the export did",
        )
    mapped = with_shapes(model)
    linear, weight = _linear(mapped, _behind(mapped, probability_output, _ACTIVATIONS))
    features = _features(mapped, linear)
    shape = shape_of(mapped, features)
    if shape is None or len(shape) not in (4, 5) or shape[1] != weight.shape[1]:
        raise _refuse(f"the pooled features are {shape}, the linear layer takes {weight.shape[1]} channels")
    return _with_map(mapped, features, shape, weight, cam_output)


def _refuse(result: str) -> QuantizeError:
    return QuantizeError(
        f"no class activation map can be added: {result}",
        hint="the head must be global average pooling and one linear layer; leave 'explain' out of the draft manifest, or export a map",
    )


def _behind(model: Model, tensor: str, passed: tuple[str, ...]) -> str:
    """Return the tensor that ``tensor`` was made from by nodes of the types ``passed``."""
    made = producers(model)
    while (node := made.get(tensor)) is not None and node.op_type in passed:
        tensor = node.input[0]
    return tensor


def _maker(model: Model, tensor: str, what: str) -> Node:
    node = producers(model).get(tensor)
    if node is None:
        raise _refuse(f"{what} is an input or a constant")
    return node


def _linear(model: Model, logit: str) -> tuple[str, NDArray[np.float32]]:
    """The linear layer's input, and its weights as [labels, channels]."""
    constants = initializers(model)
    node = _maker(model, logit, "the logit")
    if node.op_type == "Add":
        rest = [name for name in node.input if name not in constants]
        if len(rest) != 1:
            raise _refuse(f"the logit is the sum of two computed tensors ({node.name})")
        node = _maker(model, rest[0], "the linear layer")
    elif node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] not in constants:
        raise _refuse(f"the logit is the sum of two computed tensors ({node.name})")
    readers: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
        "Gemm": lambda weight: attribute(node, "alpha", 1.0) * (weight if attribute(node, "transB", 0) else weight.T),
        "MatMul": lambda weight: weight.T,
    }
    weight = constants.get(node.input[1]) if node.op_type in readers else None
    if weight is None or weight.ndim != 2 or attribute(node, "transA", 0):
        raise _refuse(f"in front of the probability stands {node.op_type} ({node.name}), no linear layer with constant weights")
    return str(node.input[0]), np.asarray(readers[node.op_type](weight), np.float32)


def _features(model: Model, tensor: str) -> str:
    """The feature map whose mean over all cells the linear layer takes."""
    node = _maker(model, _behind(model, tensor, _RESHAPES), "what the linear layer takes")
    if node.op_type == "GlobalAveragePool" or (node.op_type == "ReduceMean" and _over_all_cells(model, node)):
        return str(node.input[0])
    raise _refuse(f"in front of the linear layer stands {node.op_type} ({node.name}), no global average pooling")


def _over_all_cells(model: Model, node: Node) -> bool:
    axes: Any = attribute(node, "axes")
    if axes is None and len(node.input) > 1:
        axes = initializers(model).get(node.input[1])
    rank = len(shape_of(model, node.input[0]) or [])
    return axes is not None and sorted(int(axis) % max(rank, 1) for axis in axes) == list(range(2, rank))


def _with_map(model: Model, features: str, shape: list[int | str], weight: NDArray[np.float32], name: str) -> Model:
    kernel = f"{name}/weight"
    mapped = copy_of(model)
    mapped.graph.initializer.append(numpy_helper.from_array(weight.reshape(*weight.shape, *([1] * (len(shape) - 2))), kernel))
    mapped.graph.node.append(helper.make_node("Conv", [features, kernel], [name], name=f"{name}/Conv"))
    mapped.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [shape[0] or "n", len(weight), *shape[2:]]))
    return mapped
