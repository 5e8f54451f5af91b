"""Small networks for tests of runtimes, written on the spot: a classifier in fp32, fp16 and int8, and graphs that do one odd thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 16
CHANNELS = 3


@dataclass(frozen=True)
class Spec:
    """What a runtime needs to know of an input."""

    name: str = "image"
    shape: tuple[int, ...] = (CHANNELS, SIDE, SIDE)


def value(name: str, shape: tuple[Any, ...]) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def constant(name: str, array: Any) -> Any:
    return numpy_helper.from_array(np.asarray(array), name)


def save(path: Path, nodes: list[Any], outputs: list[Any], shape: tuple[Any, ...], constants: Iterable[Any] = ()) -> Path:
    graph = helper.make_graph(nodes, "g", [value("image", shape)], outputs, list(constants))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def classifier(path: Path, batch: int | str = "n") -> Path:
    """Two convolutions, pooling, a linear layer: probability [n, 2] and the map [n, 8, 16, 16]."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(0, 0.25, (8, CHANNELS, 3, 3)), "b1": random.normal(0, 0.1, 8), "w2": random.normal(0, 0.15, (8, 8, 3, 3)),
        "b2": random.normal(0, 0.1, 8), "w3": random.normal(0, 0.5, (2, 8)), "b3": random.normal(0, 0.1, 2),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["map"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["map"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], name="linear", transB=1),
        helper.make_node("Sigmoid", ["logits"], ["probability"], name="sigmoid"),
    ]
    outputs = [value("probability", (batch, 2)), value("map", (batch, 8, SIDE, SIDE))]
    constants = [constant(name, array.astype(np.float32)) for name, array in weights.items()]
    return save(path, nodes, outputs, (batch, CHANNELS, SIDE, SIDE), constants)


def pictures(n: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).random((n, CHANNELS, SIDE, SIDE), np.float32)


def half(source: Path, target: Path) -> Path:
    """Everything inside in float16, float32 at both ends."""
    model = onnx.load(source)
    for weight in model.graph.initializer:
        weight.CopyFrom(constant(weight.name, numpy_helper.to_array(weight).astype(np.float16)))
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        node.input[:] = ["image16" if name == "image" else f"{name}16" if name in outputs else name for name in node.input]
        node.output[:] = [f"{name}16" if name in outputs else name for name in node.output]
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["image16"], to=TensorProto.FLOAT16))
    model.graph.node.extend(helper.make_node("Cast", [f"{name}16"], [name], to=TensorProto.FLOAT) for name in sorted(outputs))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)
    return target


def int8(source: Path, target: Path, *, unsigned: bool = True, keep: Sequence[str] = (), weight_bits: int = 8) -> Path:
    """Explicit Q/DQ around convolutions and the linear layer, per channel, but for the nodes to keep in float.

    Two products of 8-bit activations and weights of 7 bits always fit into 16 bits: such a network is exact on any processor.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter([{"image": pictures(1, seed)} for seed in range(20)])

        def get_next(self) -> Any:
            return next(self._left, None)

    quantize_static(
        source, target, Reader(), quant_format=QuantFormat.QDQ, weight_type=QuantType.QInt8, per_channel=True,
        activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8, op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        nodes_to_exclude=list(keep), reduce_range=weight_bits == 7,
        extra_options={"ActivationSymmetric": not unsigned, "WeightSymmetric": True},
    )  # fmt: skip
    return target


def run_node_by_node(path: Path, tensor: Any) -> dict[str, Any]:
    """What a model answers by its definition: no fusion, so Q/DQ only round and every product is one of float32, on any processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: tensor}), strict=True))


def reciprocal(path: Path, numerator: float) -> Path:
    """probability = numerator / (mean(image) - 1): no number for a picture of ones, a fine one for zeros."""
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Sub", ["mean", "one"], ["rest"]),
        helper.make_node("Div", ["top", "rest"], ["probability"]),
    ]
    constants = [constant("one", np.float32(1)), constant("top", np.float32(numerator))]
    return save(path, nodes, [value("probability", ("n", CHANNELS))], ("n", CHANNELS, SIDE, SIDE), constants)


def of_unknown_operator(path: Path) -> Path:
    nodes = [helper.make_node("Nonsense", ["image"], ["y"])]
    return save(path, nodes, [value("y", ("n", CHANNELS, SIDE, SIDE))], ("n", CHANNELS, SIDE, SIDE))


def of_two_inputs(path: Path) -> Path:
    shape = ("n", CHANNELS, SIDE, SIDE)
    graph = helper.make_graph(
        [helper.make_node("Add", ["image", "more"], ["y"])], "g", [value("image", shape), value("more", shape)], [value("y", shape)]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def of_no_input(path: Path) -> Path:
    nodes = [helper.make_node("Identity", ["one"], ["y"])]
    graph = helper.make_graph(nodes, "g", [], [value("y", (1, 1))], [constant("one", np.ones((1, 1), np.float32))])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def of_other_batch(path: Path) -> Path:
    """Its output has eight rows whatever comes in."""
    nodes = [helper.make_node("Reshape", ["image", "shape"], ["y"])]
    return save(path, nodes, [value("y", (8, 96))], (1, CHANNELS, SIDE, SIDE), [constant("shape", np.array([8, 96], np.int64))])


def without_its_weights(source: Path, target: Path) -> Path:
    """The weights stand in a file beside it, which is gone."""
    onnx.save_model(onnx.load(source), target, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (target.parent / "weights.bin").unlink()
    return target
