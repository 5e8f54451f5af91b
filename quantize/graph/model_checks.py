"""Check a float model before it is quantized. Each error names the problem and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import checker, external_data_helper, numpy_helper

from model_sync.bundle import InputSpec, OutputSpec
from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import STANDARD_DOMAINS, Model, Node, inputs_of, opset_of, session, with_shapes

# From 9 the converter reaches opset 17; 21 is what the oldest ONNX Runtime that a box may carry (1.20) runs.
SUPPORTED_OPSETS: Final = range(9, 22)
# A protobuf message cannot be larger; a model that is has no place on a small box either.
MAX_MODEL_BYTES: Final = 2**31 - 1
_QUANTIZED: Final = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger")


def read_model(path: Path, input_spec: InputSpec | None = None, outputs: Sequence[OutputSpec] = ()) -> Model:
    """Read the float model at ``path``; inline its external data and fix the size of every axis except the batch.

    Args:
        path: the ONNX file.
        input_spec: the draft manifest's input: its name must be the model's, its shape fixes what is dynamic there.
        outputs: the draft manifest's outputs: each must be the model's, save one of kind ``cam``.

    Raises:
        QuantizeError: there is no model; it is damaged, larger than 2 GB, or lacks its external data; its opset or an operator (named)
            is not supported; it is quantized or in half precision already; a weight (named) holds NaN or Inf; it lacks the manifest's
            input or outputs, or has an axis besides the batch that the manifest does not fix.
    """
    model = _load(path)
    _check_opset(model)
    _check_operators(model)
    _check_precision(model)
    _check_weights(model)
    _check_signature(model, input_spec, outputs)
    model = _with_fixed_axes(model, input_spec)
    _check_runs(model)
    return model


def require_file(path: Path) -> None:
    """Raise QuantizeError when ``path`` is no file. Called before any slow step starts."""
    if not path.is_file():
        raise QuantizeError(f"there is no model at {path}", hint="give the path of the float model's .onnx file")


def _load(path: Path) -> Model:
    require_file(path)
    _check_size(path.stat().st_size)
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if not model.graph.node:
        raise _damaged(path, "it holds no node")
    _inline(model, path)
    try:
        checker.check_model(model)
    except checker.ValidationError as error:
        if operator := _unknown_operator(model):
            raise operator from error
        raise _damaged(path, str(error).splitlines()[0]) from error
    return model


def _damaged(path: Path, why: str) -> QuantizeError:
    return QuantizeError(f"{path} is no complete ONNX model: {why}", hint="copy or export the model again; the file may be cut off")


def _check_size(size: int) -> None:
    if size > MAX_MODEL_BYTES:
        raise QuantizeError(f"the model has {size} bytes, more than 2 GB", hint="a box cannot run it; distil or prune the model first")


def _tensors(model: Model) -> Iterator[tuple[str, Any]]:
    """Yield every constant of the main graph with its name: initializers, and the values of Constant nodes."""
    for tensor in model.graph.initializer:
        yield tensor.name, tensor
    for node in model.graph.node:
        for item in node.attribute:
            if item.HasField("t"):
                yield (node.output[0] if node.output else node.name), item.t


def _inline(model: Model, path: Path) -> None:
    """Load external data, stored in files beside the model, into the model."""
    outside = [(name, tensor) for name, tensor in _tensors(model) if external_data_helper.uses_external_data(tensor)]
    for name, tensor in outside:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if not (path.parent / location).is_file():
            raise QuantizeError(
                f"the external data of {name!r} are missing: {location} is not beside {path.name}",
                hint="copy all files of the export together, or export the model as one file",
            )
        _check_size(path.stat().st_size + (path.parent / location).stat().st_size)
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (checker.ValidationError, OSError, ValueError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error
    for _, tensor in outside:
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    _check_size(model.ByteSize())


def _check_opset(model: Model) -> None:
    version = opset_of(model)
    if version not in SUPPORTED_OPSETS:
        raise QuantizeError(
            f"the model's opset is {version}; supported are {SUPPORTED_OPSETS[0]} to {SUPPORTED_OPSETS[-1]}",
            hint="export the model again with opset 17",
        )


def _check_operators(model: Model) -> None:
    if operator := _unknown_operator(model):
        raise operator
    if quantized := next((node for node in model.graph.node if node.op_type in _QUANTIZED), None):
        raise QuantizeError(f"the model is quantized already: it has {_describe(quantized)}", hint="give the float model it was made from")


def _unknown_operator(model: Model) -> QuantizeError | None:
    """Return an error that names the first operator outside the ONNX standard, which other runtimes cannot run; None without one."""
    for node in model.graph.node:
        if node.domain not in STANDARD_DOMAINS or not onnx.defs.has(node.op_type, opset_of(model), ""):
            return _unsupported(node)
    return None


def _unsupported(node: Node) -> QuantizeError:
    return QuantizeError(
        f"the operator {_describe(node)} is not supported",
        hint="export the model with standard ONNX operators, without fusions of one runtime",
    )


def _describe(node: Node) -> str:
    return f"{node.domain + '.' if node.domain else ''}{node.op_type} (node {node.name or 'without a name'!r})"


def _check_precision(model: Model) -> None:
    kinds = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16", onnx.TensorProto.DOUBLE: "float64"}
    tensors = [(value.name, value.type.tensor_type.elem_type) for value in inputs_of(model)[:1]]
    tensors += [(name, tensor.data_type) for name, tensor in _tensors(model) if tensor.data_type != onnx.TensorProto.DOUBLE]
    for name, kind in tensors:
        if kind in kinds:
            raise QuantizeError(
                f"the model is not the float one: {name!r} is {kinds[kind]}",
                hint="give the float32 model; half precision is made from it, with what overflows kept in float32",
            )


def _check_weights(model: Model) -> None:
    for name, tensor in _tensors(model):
        if tensor.data_type == onnx.TensorProto.FLOAT and not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise QuantizeError(f"the weight {name!r} holds NaN or Inf", hint="training has diverged there; give an earlier checkpoint")


def _check_signature(model: Model, spec: InputSpec | None, outputs: Sequence[OutputSpec]) -> None:
    names = [value.name for value in inputs_of(model)]
    wanted = spec.name if spec is not None else (names or [""])[0]
    if names != [wanted]:
        raise QuantizeError(
            f"the model's inputs are {', '.join(names) or 'none'}; the manifest's is {wanted or 'one'}",
            hint="name the input in the draft manifest as the export did; a model takes one image or volume",
        )
    has = [value.name for value in model.graph.output]
    for output in outputs:
        if output.name not in has and output.kind != "cam":
            raise QuantizeError(
                f"the model has no output {output.name!r}, only {', '.join(has)}",
                hint="name the outputs in the draft manifest as the export did",
            )


def _with_fixed_axes(model: Model, spec: InputSpec | None) -> Model:
    """Return the model with a fixed size for every input axis except the batch, and with all shapes inferred again."""
    value = inputs_of(model)[0]
    axes = list(value.type.tensor_type.shape.dim)
    sizes = (None, *(spec.shape if spec is not None else [None] * (len(axes) - 1)))
    text = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in axes]
    if len(axes) != len(sizes):
        raise _wrong_input(f"the model's input {value.name!r} is {text}, the manifest's one image or volume is {list(sizes[1:])}")
    for index, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        if index == 0:
            continue
        if axis.HasField("dim_value"):
            if size not in (None, axis.dim_value):
                raise _wrong_input(f"the model's input {value.name!r} is {text}, the manifest says {list(sizes[1:])}")
        elif size is None:
            raise QuantizeError(
                f"axis {index} of the input {value.name!r} is dynamic ({text[index]}), and nothing fixes it",
                hint="give its size in the draft manifest's input; only the batch may vary",
            )
        else:
            axis.dim_value = size
    return _with_true_outputs(model)


def _with_true_outputs(model: Model) -> Model:
    """Return the model with output sizes that are inferred from its input size."""
    for value in model.graph.output:
        for axis in list(value.type.tensor_type.shape.dim)[1:]:
            axis.ClearField("value")
    try:
        return with_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise _wrong_input(f"the model cannot take an input of the manifest's size: {str(error).splitlines()[-1]}") from error


def _wrong_input(message: str) -> QuantizeError:
    return QuantizeError(message, hint="correct the draft manifest's input, or export the model for it")


def _check_runs(model: Model) -> None:
    """Check that ONNX Runtime, which every box has, can load the model and run it on one black image."""
    value = inputs_of(model)[0]
    shape = [axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim]
    try:
        session(model, optimised=False).run(None, {value.name: np.zeros(shape, np.float32)})
    except Exception as error:  # port wrapper: the exceptions of ONNX Runtime have no public base
        text = (str(error).splitlines() or [type(error).__name__])[0]
        for node in model.graph.node:
            if "NOT_IMPLEMENTED" in text and f"{node.op_type}(" in text:
                raise _unsupported(node) from error
        raise QuantizeError(
            f"ONNX Runtime cannot run the model: {text[:300]}", hint="correct the draft manifest's input, or export the model again"
        ) from error
