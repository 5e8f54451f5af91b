"""Whether the 8-bit sums of a model can be clipped on a processor without VNNI, decided from its weights.

Such a processor multiplies unsigned 8-bit activations with signed 8-bit weights in pairs and adds the two products in 16 bits, with
saturation (VPMADDUBSW). With weights from -64 to 64 a sum is at most 2 x 255 x 64 = 32,640 in magnitude, which 16 bits hold (32,767), so
that nothing is ever clipped and the results are those of any other processor. Runtimes that read activations as signed shift them by 128
first, which stays within 0 to 255. Larger weights may be clipped; how often depends on the image.

The weights themselves are read, not a field of the manifest: so it holds for bundles of any age, and nobody can state it wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

LARGEST_WEIGHT: Final = 64
"""The largest magnitude of a weight with which a pair of products always fits: 2 x 255 x 64 <= 2**15 - 1."""

_WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Operators that pass their first input on, in another shape at most.
_LAYOUT: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# Operators that multiply in ways that are not followed here.
_UNKNOWN: Final = ("Attention", "Einsum", "GRU", "Integer", "LSTM", "QLinear", "RNN", "DynamicQuantize")
_STANDARD: Final = ("", "ai.onnx")


def fits_16_bits(path: Path) -> bool:
    """Return whether every sum of two 8-bit products of this model fits into 16 bits, whatever the image.

    False means that it could not be shown: a quantized weight above ``LARGEST_WEIGHT``, a product of two computed tensors, an operator or
    a structure that is not followed (subgraphs, functions, other domains, external weights), or no valid ONNX file.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:  # a box without the package takes the slower, exact way
        return False
    try:
        model = onnx.load_model(path, load_external_data=False)
        return not model.functions and _Graph(model.graph).is_bounded()
    except (OSError, DecodeError, ValueError):  # the last: a tensor with fewer bytes than its shape needs
        return False


class _Graph:
    """The main graph of a model, with what its products are made of."""

    def __init__(self, graph: Any) -> None:
        self._nodes = list(graph.node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in self._nodes for name in node.output}

    def is_bounded(self) -> bool:
        return all(self._is_known(node) for node in self._nodes) and all(
            any(self._is_bounded_weight(name) for name in node.input[:2]) for node in self._nodes if node.op_type in _WEIGHTED
        )

    def _is_known(self, node: Any) -> bool:
        """Whether a node is a standard operator without a subgraph whose products are followed here."""
        has_subgraph = any(item.HasField("g") or item.graphs for item in node.attribute)
        return node.domain in _STANDARD and not has_subgraph and not any(part in node.op_type for part in _UNKNOWN)

    def _is_bounded_weight(self, name: str) -> bool:
        """Whether an operand is a float constant, with which nothing multiplies in 8 bits, or an int8 constant within the range."""
        while (node := self._producers.get(name)) is not None and node.op_type in _LAYOUT:
            name = node.input[0]
        if node is None:
            return name in self._constants
        if node.op_type == "DequantizeLinear":
            tensor, zero_point = self._constants.get(node.input[0]), node.input[2] if len(node.input) > 2 else ""
            return tensor is not None and _is_in_range(tensor) and (not zero_point or self._is_zero(zero_point))
        return bool(node.op_type == "Constant")

    def _is_zero(self, name: str) -> bool:
        tensor = self._constants.get(name)
        return tensor is not None and not _values(tensor).any()


def _is_in_range(tensor: Any) -> bool:
    import onnx

    if tensor.data_type != onnx.TensorProto.INT8 or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return False
    return int(np.abs(_values(tensor).astype(np.int16)).max(initial=0)) <= LARGEST_WEIGHT


def _values(tensor: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)
