"""Post-training quantization to int8 as explicit Q/DQ in the ONNX, by a list of recipes that are all tried and measured.

The base is ``onnxruntime.quantization``: its calibrators measure, its ``QDQQuantizer`` writes. ``quantize_static``, which joins the
two, is not called, because it would calibrate again for every recipe; here calibration is done once per model (``calibrate``) and read
by every recipe.

Two kinds of activations are written:

- ``symmetric``: int8 with zero point 0, the only kind TensorRT takes on a GPU. Q/DQ stands in front of what multiplies (Conv, Gemm,
  MatMul) and on the shortcut of a residual Add, nowhere else: none between a convolution and its activation, none behind it, no
  quantized bias (TensorRT's documentation, "Working with quantized types", Q/DQ placement recommendations). ConvTranspose and Concat
  stay float: with Q/DQ on them TensorRT 8.6 did not build.
- ``unsigned``: uint8 with a zero point, what x86 multiplies with signed weights in one instruction (VNNI). Outputs are quantized as
  well, so that ONNX Runtime can keep whole chains in uint8; not those behind the last multiplication, because a score in 256 steps,
  cut off where calibration saw its largest, saves no time.

Weights have 8 or 7 bits. With 7, from -64 to 64, an x86 processor without VNNI computes them fast and exactly
(``appliance.runtime.weight_range``); with 8, ONNX Runtime has to take a slower mode there, and OpenVINO is refused.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import (
    Model,
    Node,
    attribute,
    consumers,
    drop_unused,
    initializers,
    producers,
    replace_all,
    sort_nodes,
    with_shapes,
)
from quantize.progress import OnProgress, no_progress, part_of
from quantize.recipes.calibration import METHODS, Calibration, Method, Range, Tensors, calibrate

__all__ = ["CHAINED", "EVERYTHING", "METHODS", "WEIGHTED", "Calibration", "Recipe", "calibrate", "quantizable", "quantize", "recipes"]

Activations: TypeAlias = Literal["symmetric", "unsigned"]

WEIGHTED: Final = ("Conv", "Gemm", "MatMul")
_MULTIPLYING: Final = (*WEIGHTED, "ConvTranspose")
# What stands between the convolutions of a residual network; quantized too, a chain never leaves uint8.
CHAINED: Final = (*WEIGHTED, "Relu", "Clip", "Add", "MaxPool")
EVERYTHING: Final = (
    *CHAINED, "ConvTranspose", "Concat", "AveragePool", "GlobalAveragePool", "Mul", "Sigmoid", "LeakyRelu", "Resize",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The options of one quantization.

    Attributes:
        name: in reports, such as ``unsigned-chained-minmax``.
        precision: ``mixed`` where layers were put back to float for accuracy, else ``int8``.
        activations: see the module's docstring.
        method: how ranges are chosen from what calibration measured: all values; nearly all of them (``calibration.PERCENTILE``); or
            the range that loses the least information (Kullback-Leibler).
        op_types: the operators that are quantized.
        weight_bits: bits that the weights use of the 8 in which they are stored.
        keep: names of nodes that stay float.
    """

    name: str
    precision: Literal["int8", "mixed"]
    activations: Activations
    method: Method
    op_types: tuple[str, ...]
    weight_bits: Literal[7, 8] = 8
    keep: frozenset[str] = frozenset()

    def keeping(self, nodes: frozenset[str]) -> Recipe:
        """Return this recipe with more nodes in float; its precision is then ``mixed``."""
        return replace(self, precision="mixed", keep=self.keep | nodes)


def recipes() -> tuple[Recipe, ...]:
    """Return the recipes to try; those that won most often come first.

    All are tried because the best placement of Q/DQ and the best calibration differ by graph and runtime.
    """
    made: list[Recipe] = []
    widths: tuple[tuple[Literal[7, 8], str], ...] = ((8, ""), (7, "7bit-"))
    for bits, infix in widths:
        for method in METHODS:
            made.append(Recipe(f"unsigned-weighted-{infix}{method}", "int8", "unsigned", method, WEIGHTED, bits))
            made.append(Recipe(f"unsigned-chained-{infix}{method}", "int8", "unsigned", method, CHAINED, bits))
            made.append(Recipe(f"symmetric-{infix}{method}", "int8", "symmetric", method, WEIGHTED, bits))
        made.append(Recipe(f"unsigned-everything-{infix}minmax", "int8", "unsigned", "minmax", EVERYTHING, bits))
    return tuple(made)


def quantize(
    model: Model, recipe: Recipe, tensors: Tensors | Calibration, out: Path, *, on_progress: OnProgress = no_progress
) -> frozenset[str]:
    """Write ``model`` quantized by ``recipe`` to ``out``; inputs and outputs stay float32 and keep their names.

    Args:
        model: a cleaned float model (``graph.clean_up``); it is not changed.
        recipe: how.
        tensors: the calibration set, or the ``Calibration`` of this model, which saves measuring it again.
        out: the ONNX file to write.
        on_progress: called with the fraction that is done.

    Returns:
        The names of the nodes that are quantized.

    Raises:
        QuantizeError: See ``calibrate``; or the recipe leaves nothing quantized, or a tensor it quantizes was not calibrated.
    """
    calibration = tensors if isinstance(tensors, Calibration) else calibrate(model, tensors, on_progress=part_of(on_progress, 0.0, 0.9))
    chosen = quantizable(model, recipe)
    if not chosen:
        raise QuantizeError(
            f"the recipe {recipe.name} quantizes nothing: the model has no {', '.join(recipe.op_types)} that is not kept",
            hint="leave this recipe out",
        )
    quantized = _written(model, recipe, chosen, calibration.ranges(recipe.method))
    if recipe.activations == "symmetric":
        _quantize_shortcuts(quantized, chosen, calibration.ranges(recipe.method))
    else:
        _free_ends(quantized, chosen & _behind_the_last(model, _multiplying(model, recipe)))
    quantized.ir_version = model.ir_version
    sort_nodes(quantized)
    drop_unused(quantized)
    onnx.checker.check_model(quantized)
    onnx.save(quantized, out)
    on_progress(1.0)
    return chosen


def quantizable(model: Model, recipe: Recipe) -> frozenset[str]:
    """Return the names of the nodes that ``recipe`` quantizes in ``model``."""
    multiplying = _multiplying(model, recipe)
    inner = {node.name for node in model.graph.node if node.op_type in recipe.op_types and node.op_type not in _MULTIPLYING}
    return frozenset(multiplying | (inner - recipe.keep - _behind_the_last(model, multiplying)))


def _multiplying(model: Model, recipe: Recipe) -> set[str]:
    """Return the nodes with weights that a recipe quantizes."""
    constants = initializers(model)
    chosen = set()
    for node in model.graph.node:
        # A product of two computed tensors (attention) has no weights to shrink, and int8 loses most there.
        weightless = node.op_type in _MULTIPLYING and node.input[1] not in constants
        # ONNX has no per-channel scales for it: its output channels are not one axis of its weights.
        grouped = node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1
        if node.op_type in _MULTIPLYING and node.op_type in recipe.op_types and not (weightless or grouped):
            chosen.add(str(node.name))
    return chosen - recipe.keep


def _behind_the_last(model: Model, multiplying: set[str]) -> set[str]:
    """Return the nodes from whose outputs no path leads to a quantized node with weights."""
    taken: set[str] = set()
    behind = set()
    for node in reversed(model.graph.node):
        if not taken.intersection(node.output):
            behind.add(str(node.name))
        if node.name in multiplying or taken.intersection(node.output):
            taken.update(node.input)
    return behind


def _written(model: Model, recipe: Recipe, chosen: frozenset[str], ranges: dict[str, Range]) -> Model:
    """Return the model with the Q/DQ pairs that ONNX Runtime's quantizer writes for the chosen nodes."""
    symmetric = recipe.activations == "symmetric"
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    options: dict[str, Any] = {"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not symmetric}
    if symmetric:
        options["OpTypesToExcludeOutputQuantization"] = list(recipe.op_types)
    with _quiet():
        quantizer = QDQQuantizer(
            with_shapes(model),
            True,  # weights per channel
            recipe.weight_bits == 7,  # "reduced range": -64 to 64
            QuantType.QInt8,
            QuantType.QInt8 if symmetric else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            sorted(chosen),
            [],
            list(recipe.op_types),
            options,
        )
        return quantizer.quantize_model()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of ONNX Runtime's quantizer about options that are intended here; it uses the root logger."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def _free_ends(model: Model, ends: frozenset[str]) -> None:
    """Remove the Q/DQ pairs after the nodes ``ends``."""
    readers = consumers(model)
    gone: set[str] = set()
    for node in [node for node in model.graph.node if node.name in ends]:
        quantize_node = next(reader for reader in readers[node.output[0]] if reader.op_type == "QuantizeLinear")
        dequantize_node = readers[quantize_node.output[0]][0]
        gone.update((quantize_node.name, dequantize_node.name))
        # The name of what was dequantized stays, because it may be an output of the graph.
        node.output[0] = dequantize_node.output[0]
    replace_all(model.graph.node, [node for node in model.graph.node if node.name not in gone])


def _quantize_shortcuts(model: Model, chosen: frozenset[str], ranges: dict[str, Range]) -> None:
    """Put Q/DQ on the shortcut of each residual Add that has none yet, so that TensorRT fuses the Add into the int8 convolution.

    Where the block keeps its size, the shortcut is what the block's first convolution takes, and is quantized with it. Where a
    convolution on the shortcut changes the size, its output is float, and the Add would be float, too.
    """
    made, readers = producers(model), consumers(model)
    for node in [node for node in model.graph.node if node.op_type == "Add"]:
        sources = [made.get(name) for name in node.input]
        both = all(source is not None and source.op_type == "Conv" and source.name in chosen for source in sources)
        if not both:
            continue
        # The one with fewer convolutions behind it is the shortcut; either would be right.
        shortcut = min(node.input, key=lambda name: _depth(made, name))
        if shortcut in ranges and len(readers[shortcut]) == 1:
            _insert_pair(model, node, shortcut, ranges[shortcut])


def _depth(made: dict[str, Node], tensor: str, limit: int = 8) -> int:
    """Count the convolutions in the chain before a tensor, back to the previous Add."""
    depth = 0
    while depth < limit and (node := made.get(tensor)) is not None and node.op_type != "Add":
        depth += node.op_type == "Conv"
        tensor = node.input[0]
    return depth


def _insert_pair(model: Model, reader: Node, tensor: str, limits: Range) -> None:
    scale = np.float32(max(abs(limits[0]), abs(limits[1]), float(np.finfo(np.float32).tiny) * 128) / 127)
    names = [f"{tensor}_shortcut_scale", f"{tensor}_shortcut_zero_point"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), names[0]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), names[1]))
    quantize_node, dequantize_node = f"{tensor}_shortcut_quantized", f"{tensor}_shortcut_dequantized"
    pair = [
        helper.make_node("QuantizeLinear", [tensor, *names], [quantize_node], name=f"{tensor}_shortcut_QuantizeLinear"),
        helper.make_node("DequantizeLinear", [quantize_node, *names], [dequantize_node], name=f"{tensor}_shortcut_DequantizeLinear"),
    ]
    at = next(index for index, node in enumerate(model.graph.node) if node.name == reader.name)
    for node in reversed(pair):
        model.graph.node.insert(at, node)
    reader.input[:] = [dequantize_node if name == tensor else name for name in reader.input]
