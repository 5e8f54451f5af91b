"""Clean-up of a float ONNX graph before anything is measured or quantized: one opset, folded constants, folded BatchNorm, stable names.

Constants, identities and duplicate casts are folded by ONNX Runtime's own offline optimisation at the level ``basic``, which writes
standard operators only. BatchNormalization is folded here, because ONNX Runtime folds it behind Conv alone, not behind
ConvTranspose and Gemm, and a BatchNormalization left between a convolution and its activation breaks every int8 fusion.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference, version_converter

from appliance.runtime.cpu_features import avoid_saturation
from quantize.errors import QuantizeError

# What TensorRT 8.6 (JetPack 6.0) reads at most, and the first with everything the quantizer writes.
OPSET: Final = 17
STANDARD_DOMAINS: Final = ("", "ai.onnx")

Model: TypeAlias = Any
Node: TypeAlias = Any
Array: TypeAlias = NDArray[np.float32]


def clean_up(model: Model) -> Model:
    """Return a copy of ``model`` that computes the same with fewer and simpler nodes.

    The opset is at least ``OPSET``; BatchNormalization behind Conv, ConvTranspose and Gemm is folded into their weights; constants
    are folded; dead nodes, unused initializers and stale shapes are gone, true shapes are written; every node has a unique name.
    Inputs and outputs keep their names, types and order; a symbolic batch stays symbolic.

    Raises:
        QuantizeError: The graph cannot be brought to ``OPSET``.
    """
    cleaned = _at_opset(model)
    _name_nodes(cleaned)
    _constants_to_initializers(cleaned)
    _fold_batch_norms(cleaned)
    cleaned = _basic_optimisations(cleaned)
    drop_unused(cleaned)
    _name_nodes(cleaned)
    return with_shapes(cleaned)


def copy_of(model: Model) -> Model:
    """Return an independent copy of a model."""
    return copy.deepcopy(model)


def with_shapes(model: Model) -> Model:
    """Return ``model`` with the shapes of all its tensors inferred anew."""
    fresh = copy_of(model)
    del fresh.graph.value_info[:]
    return shape_inference.infer_shapes(fresh, data_prop=True)


def initializers(model: Model) -> dict[str, Array]:
    """Return the initializers of the main graph by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def producers(model: Model) -> dict[str, Node]:
    """Return the node that produces each tensor, by tensor name."""
    return {output: node for node in model.graph.node for output in node.output if output}


def consumers(model: Model) -> dict[str, list[Node]]:
    """Return the nodes that read each tensor, by tensor name, in the order of the graph."""
    readers_by_tensor: dict[str, list[Node]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(filter(None, node.input)):
            readers_by_tensor.setdefault(name, []).append(node)
    return readers_by_tensor


def output_names(model: Model) -> list[str]:
    """Return the names of the graph's outputs in their order."""
    return [output.name for output in model.graph.output]


def inputs_of(model: Model) -> list[Any]:
    """Return the inputs that are no initializers (up to format 3 initializers are inputs too)."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def input_name(model: Model) -> str:
    """Return the name of the first input that is no initializer."""
    return str(inputs_of(model)[0].name)


def opset_of(model: Model) -> int:
    """Return the version of the standard operators; 0 where the model states none."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 0)


def attribute(node: Node, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute, or ``default`` where it is absent."""
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def shape_of(model: Model, tensor: str) -> list[int | str] | None:
    """Return the inferred shape of a tensor, texts for symbolic axes ("" unnamed); None where it is unknown."""
    graph = model.graph
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.name == tensor and value.type.tensor_type.HasField("shape"):
            return [axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in value.type.tensor_type.shape.dim]
    return None


def float_tensors(model: Model) -> list[str]:
    """Return the float32 tensors that nodes make, outputs of the graph included, in the graph's order."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    return [name for node in model.graph.node for name in node.output if kinds.get(name) == onnx.TensorProto.FLOAT]


def with_outputs(model: Model, names: Iterable[str]) -> Model:
    """Return a copy of ``model`` with the tensors ``names`` as additional outputs."""
    extended = copy_of(model)
    known = {value.name: value for value in extended.graph.value_info}
    present = set(output_names(extended))
    extended.graph.output.extend(known[name] for name in dict.fromkeys(names) if name not in present and name in known)
    return extended


def session(model: Model, *, optimised: bool = True, threads: int = 0) -> Any:
    """Open a model in ONNX Runtime on the CPU, 8-bit sums exact as on a box; ``optimised=False`` runs the graph node by node."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # An arena would keep the largest memory that any exposed tensor needed.
    options.enable_cpu_mem_arena = False
    avoid_saturation(options)
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def drop_unused(model: Model) -> None:
    """Remove nodes and initializers that lead to no output, and imports of domains that no node uses."""
    wanted = set(output_names(model))
    remaining = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            remaining.append(node)
            wanted.update(_inputs_of(node))
    replace_all(model.graph.node, list(reversed(remaining)))
    replace_all(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in wanted])
    used = {node.domain for node in model.graph.node} | {""}
    replace_all(model.opset_import, [entry for entry in model.opset_import if entry.domain in used])


def state_opsets_once(model: Model) -> None:
    """Leave one opset of each domain, the last: onnx.compose.merge_models states those of each part, ONNX Runtime's quantizer takes one."""
    replace_all(model.opset_import, list({entry.domain: entry for entry in model.opset_import}.values()))


def sort_nodes(model: Model) -> None:
    """Sort the nodes so that each tensor is produced before it is read, as ONNX requires."""
    producer_of = producers(model)
    done: set[str] = set()
    ordered: list[Node] = []
    stack = [(node, False) for node in reversed(model.graph.node)]
    while stack:
        node, ready = stack.pop()
        if node.name in done:
            continue
        if ready:
            done.add(node.name)
            ordered.append(node)
            continue
        stack.append((node, True))
        stack.extend((producer_of[name], False) for name in node.input if name in producer_of and producer_of[name].name not in done)
    replace_all(model.graph.node, ordered)


def replace_all(field: Any, items: list[Any]) -> None:
    """Set a repeated protobuf field to ``items``, which may be elements of the same field."""
    # Copies, because clearing the field would empty the messages it lent.
    copies = [copy.deepcopy(item) for item in items]
    del field[:]
    field.extend(copies)


def _inputs_of(node: Node) -> Iterator[str]:
    """Yield the tensors that a node reads, including those that the bodies of its loops and branches read from outside."""
    yield from filter(None, node.input)
    for item in node.attribute:
        for graph in (*item.graphs, *([item.g] if item.HasField("g") else [])):
            for inner in graph.node:
                yield from _inputs_of(inner)


def _at_opset(model: Model) -> Model:
    version = opset_of(model)
    converted = copy_of(model)
    state_opsets_once(converted)
    if version < OPSET:
        try:
            converted = version_converter.convert_version(converted, OPSET)
        except (RuntimeError, ValueError, LookupError, version_converter.ConvertError) as error:
            raise QuantizeError(
                f"the model cannot be converted from opset {version} to {OPSET}: {str(error).splitlines()[0]}",
                hint=f"export the model again with opset {OPSET}",
            ) from error
    # The lowest version of the format that carries this opset: old boxes refuse a newer one.
    converted.ir_version = helper.find_min_ir_version_for(list(converted.opset_import), ignore_unknown=True)
    replace_all(converted.graph.input, inputs_of(converted))
    return converted


def _name_nodes(model: Model) -> None:
    """Give every node a unique name, because recipes list the nodes that stay float by name."""
    taken = Counter(node.name for node in model.graph.node)
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or (taken[node.name] > 1 and node.name in seen):
            base = node.name or f"{node.op_type}_{index}"
            while base in taken or base in seen:
                base += "_"
            node.name = base
        seen.add(node.name)


def _constants_to_initializers(model: Model) -> None:
    remaining = []
    for node in model.graph.node:
        value = attribute(node, "value") if node.op_type == "Constant" else None
        if value is None or node.output[0] in output_names(model):
            remaining.append(node)
            continue
        tensor = copy.deepcopy(value)
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
    replace_all(model.graph.node, remaining)


def _fold_batch_norms(model: Model) -> None:
    """Fold each BatchNormalization that is the only reader of a Conv, ConvTranspose or Gemm into that node's weights."""
    producer_of, taken, weights = producers(model), consumers(model), initializers(model)
    outputs = set(output_names(model))
    folded = []
    for norm in [node for node in model.graph.node if node.op_type == "BatchNormalization"]:
        node = producer_of.get(norm.input[0])
        alone = len(taken.get(norm.input[0], ())) == 1 and norm.input[0] not in outputs
        if node is None or not alone or attribute(norm, "training_mode", 0) or len(list(filter(None, norm.output))) != 1:
            continue
        parts = [weights.get(name) for name in (*node.input[1:], *norm.input[1:])]
        if node.op_type in _WITH_NORM and all(part is not None for part in parts):
            _fold(model, node, norm, weights)
            producer_of[norm.output[0]] = node
            folded.append(norm.name)
    replace_all(model.graph.node, [node for node in model.graph.node if node.name not in folded])


def _fold(model: Model, node: Node, norm: Node, weights: dict[str, Array]) -> None:
    """Fold ``norm`` into ``node``: scale the weights per output channel and put the remaining terms into the bias."""
    scale, shift, mean, variance = (weights[name].astype(np.float64) for name in norm.input[1:5])
    factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    weight = _scaled(node, weights[node.input[1]].astype(np.float64), factor)
    bias: NDArray[np.float64] = weights[node.input[2]].astype(np.float64) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if node.op_type == "Gemm":
        bias = bias * attribute(node, "beta", 1.0)
        replace_all(node.attribute, [item for item in node.attribute if item.name != "beta"])
    bias = (bias - mean) * factor + shift
    names = [f"{node.name}/folded_weight", f"{node.name}/folded_bias"]
    for name, value in zip(names, (weight, bias), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    data = node.input[0]
    del node.input[:]
    node.input.extend([data, *names])
    node.output[0] = norm.output[0]


_WITH_NORM: Final = ("Conv", "ConvTranspose", "Gemm")


def _scaled(node: Node, weight: NDArray[np.float64], factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights multiplied by ``factor`` per output channel; the axis depends on the operator."""
    if node.op_type == "Conv":
        return weight * factor.reshape(-1, *([1] * (weight.ndim - 1)))
    if node.op_type == "Gemm":
        return weight * (factor[:, None] if attribute(node, "transB", 0) else factor)
    # ConvTranspose: [in, out / group, ...], the groups one after the other along the input channels.
    group = attribute(node, "group", 1)
    split = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    return (split * factor.reshape(group, 1, weight.shape[1], *([1] * (weight.ndim - 2)))).reshape(weight.shape)


def _basic_optimisations(model: Model) -> Model:
    """Return the graph after the basic optimisations of ONNX Runtime; the unchanged graph, if they wrote a non-standard operator."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory(prefix="quantize.") as directory:
        path = Path(directory, "model.onnx")
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(path)
    if any(node.domain not in STANDARD_DOMAINS for node in optimised.graph.node):
        return model
    optimised.ir_version = model.ir_version
    return optimised
