"""Write half precision into the ONNX file, so that every runtime computes the same. What overflows in half precision stays float32.

Which nodes those are is measured: the float model runs on calibration tensors with every intermediate tensor exposed. ONNX Runtime's
module ``float16`` converts. It joins two neighbours that stay float32 by a cast to half precision and back, in which the value
overflows, and casts a tensor with two such readers twice under one name; both are corrected here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import (
    Model,
    Node,
    consumers,
    copy_of,
    drop_unused,
    float_tensors,
    initializers,
    input_name,
    producers,
    replace_all,
    session,
    sort_nodes,
    with_outputs,
    with_shapes,
)
from quantize.progress import OnProgress, no_progress, part_of
from quantize.recipes.calibration import Tensors

FLOAT16_MAX: Final = float(np.finfo(np.float16).max)
# A patient's picture may cause larger values than any picture of the calibration set.
HEADROOM: Final = 4.0
# The relative error of rounding a tensor, as a root of squares; 3e-4 where all its values are normal in half precision.
MAX_ROUNDING_ERROR: Final = 3e-3
_FEW: Final = 16
# What sums its input up in half precision overflows earlier than its result does.
_SUMS: Final = ("GlobalAveragePool", "AveragePool", "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
_SQUARES: Final = ("InstanceNormalization", "LayerNormalization", "GroupNormalization", "ReduceL2", "ReduceSumSquare", "Pow")


def convert_to_fp16(model: Model, tensors: Tensors, *, on_progress: OnProgress = no_progress) -> Model:
    """Return ``model`` in half precision: weights and tensors float16, inputs and outputs float32, what would overflow float32.

    Args:
        model: a cleaned float model (``graph.clean_up``); it is not changed.
        tensors: calibration tensors, float32 [n, ...], of the size the model takes.
        on_progress: called with the fraction that is done.

    Raises:
        QuantizeError: A tensor of the half-precision model still holds NaN or Inf on a calibration tensor; it is named.
    """
    float_nodes = find_out_of_range_nodes(model, tensors, on_progress=part_of(on_progress, 0.0, 0.6))
    fp16_model = convert(model, float_nodes)
    _verify(fp16_model, _spread(tensors))
    on_progress(1.0)
    return fp16_model


def find_out_of_range_nodes(model: Model, tensors: Tensors, *, on_progress: OnProgress = no_progress) -> frozenset[str]:
    """Return the names of the nodes that float16 cannot compute accurately.

    A node is kept in float32 where a tensor that it reads or writes, a weight, or a sum inside it exceeds the range of float16
    (65504, with ``HEADROOM``), or where rounding to float16 costs more than ``MAX_ROUNDING_ERROR``, because most of its values are
    too small.

    Raises:
        QuantizeError: A tensor of the float model itself holds NaN or Inf on a calibration tensor; it is named.
    """
    names = float_tensors(model)
    largest, rounding = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for part, name, value in _computed(model, tensors, names):
        if not np.isfinite(value).all():
            raise QuantizeError(
                f"the float model computes NaN or Inf in {name!r}", hint="the model overflows in float32; it cannot be trusted at all"
            )
        largest[name] = max(largest[name], float(np.abs(value).max(initial=0.0)))
        on_progress(0.8 * part)
    for _, name, value in _computed(model, _spread(tensors), names):
        rounding[name] = max(rounding[name], _rounding_error(value))
    on_progress(1.0)
    bad = {name for name in names if largest[name] * HEADROOM > FLOAT16_MAX or rounding[name] > MAX_ROUNDING_ERROR}
    for name, weight in initializers(model).items():
        if weight.dtype == np.float32 and (
            float(np.abs(weight).max(initial=0.0)) > FLOAT16_MAX or _rounding_error(weight) > MAX_ROUNDING_ERROR
        ):
            bad.add(name)
    sums = {node.name for node in model.graph.node if _sum_inside(model, node, largest) * HEADROOM > FLOAT16_MAX}
    return frozenset(sums | {node.name for node in model.graph.node if bad.intersection((*node.input, *node.output))})


def convert(model: Model, float_nodes: frozenset[str]) -> Model:
    """Return ``model`` in half precision but for ``float_nodes``, its inputs and its outputs; nothing is measured.

    Operators that ONNX Runtime does not compute in half precision stay float32 as well.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    fp16_model = convert_float_to_float16(copy_of(model), keep_io_types=True, node_block_list=sorted(float_nodes), disable_shape_infer=True)
    _join_kept_neighbours(fp16_model)
    sort_nodes(fp16_model)
    drop_unused(fp16_model)
    return with_shapes(fp16_model)


def _computed(model: Model, tensors: Tensors, names: list[str]) -> Iterator[tuple[float, str, NDArray[Any]]]:
    """Run the images one by one to limit memory; yield the fraction done, the name of each tensor and its value."""
    shown = with_outputs(model, names)
    opened = session(shown, optimised=False)
    outputs = [item.name for item in opened.get_outputs()]
    count = sum(len(tensor) for tensor in tensors)
    done = 0
    for tensor in tensors:
        for image in tensor:
            done += 1
            for name, value in zip(outputs, opened.run(None, {input_name(model): image[None]}), strict=True):
                yield done / count, name, value


def _rounding_error(value: NDArray[Any]) -> float:
    """The root of the summed squares of what rounding to float16 changes, relative to that of the tensor; inf beyond its range."""
    with np.errstate(over="ignore"):
        change = value.astype(np.float16).astype(np.float32) - value
    norm = float(np.linalg.norm(value.astype(np.float32, copy=False).ravel()))
    return float(np.linalg.norm(change.ravel())) / norm if norm else 0.0


def _sum_inside(model: Model, node: Node, largest: dict[str, float]) -> float:
    """Return an upper bound of the sum inside a node, given the largest magnitude of each tensor; 0 for operators that do not sum."""
    if node.op_type not in (*_SUMS, *_SQUARES):
        return 0.0
    value = largest.get(node.input[0], 0.0)
    if node.op_type in _SQUARES:
        value *= value
    return value * _cells(model, node) if node.op_type in _SUMS else value


def _cells(model: Model, node: Node) -> float:
    """Return how many input values a node adds for one output value, without the batch axis."""
    sizes = []
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    for name in (node.input[0], node.output[0]):
        sizes.append(float(np.prod([axis.dim_value or 1 for axis in list(shapes.get(name, []))[1:]])))
    return max(sizes[0] / sizes[1], 1.0)


def _join_kept_neighbours(model: Model) -> None:
    """Connect neighbouring float32 nodes directly, without a cast to float16 between them; write each cast once."""
    unique = {node.name: node for node in model.graph.node if node.op_type == "Cast"}
    replace_all(model.graph.node, [node for node in model.graph.node if unique.pop(node.name, None) or node.op_type != "Cast"])
    made = producers(model)
    source: dict[str, str] = {}
    for node in model.graph.node:
        inner = made.get(node.input[0]) if node.op_type == "Cast" and _to(node) == onnx.TensorProto.FLOAT else None
        if inner is not None and inner.op_type == "Cast" and _to(inner) == onnx.TensorProto.FLOAT16:
            source[node.output[0]] = inner.input[0]
    outputs = {value.name for value in model.graph.output}
    readers = consumers(model)
    for old, new in source.items():
        if old in outputs:
            # An output keeps its name: its cast passes the float32 value through.
            made[old].input[0] = new
            made[old].op_type = "Identity"
            del made[old].attribute[:]
            continue
        for node in readers.get(old, ()):
            node.input[:] = [new if name == old else name for name in node.input]


def _to(node: Node) -> int:
    return int(next(item.i for item in node.attribute if item.name == "to"))


def _spread(tensors: Tensors) -> Tensors:
    """Return a few images from all parts of the set: rounding errors are similar for all images, and float16 is slow on a CPU."""
    return [tensor[:: max(1, len(tensor) * len(tensors) // _FEW)] for tensor in tensors]


def _verify(fp16_model: Model, tensors: Tensors) -> None:
    """Check that no tensor of the float16 model holds NaN or Inf."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    names = [value.name for value in fp16_model.graph.value_info if value.type.tensor_type.elem_type in kinds]
    for _, name, value in _computed(fp16_model, tensors, names):
        if not np.isfinite(value).all():
            raise QuantizeError(
                f"in half precision {name!r} becomes NaN or Inf", hint="leave the fp16 variant out, or retrain with smaller activations"
            )
