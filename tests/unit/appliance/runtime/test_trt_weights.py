"""int8 weights as TensorRT 8 reads them: the same numbers to the bit, and nothing else of the model changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.runtime.trt_weights import with_float_weights
from tests.hardware import tiny_onnx
from tests.support import small_networks
from tests.support.trt_stand_in import StandInCuda, stand_in


def run(model: Any, images: Any) -> list[Any]:
    return list(onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"image": images}))


def int8_constants(model: onnx.ModelProto) -> set[str]:
    taken = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {item.name for item in model.graph.initializer if item.data_type == TensorProto.INT8 and item.name in taken}


def test_weights_of_a_quantized_model(tmp_path: Path) -> None:
    path = small_networks.int8(small_networks.classifier(tmp_path / "fp32.onnx"), tmp_path / "int8.onnx")
    assert int8_constants(onnx.load(path))
    rewritten = with_float_weights(path)
    assert rewritten is not None
    model = onnx.load_model_from_string(rewritten)
    onnx.checker.check_model(model, full_check=True)
    assert not int8_constants(model)
    images = small_networks.pictures(3)
    for before, after in zip(run(str(path), images), run(rewritten, images), strict=True):
        assert np.array_equal(before, after)


def dequantized(tmp_path: Path, scale: Any, axis: int | None, twice: bool = False) -> Path:
    """image + dequantize(int8 [4, 5, 6]): every int8 there is, in a constant."""
    whole = np.resize(np.arange(-127, 128, dtype=np.int8), (4, 5, 6))
    scale = np.asarray(scale, np.float32)
    constants = {"w": whole, "s": scale, "z": np.zeros(scale.shape, np.int8)}
    attributes = {} if axis is None else {"axis": axis}
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], **attributes), helper.make_node("Add", ["image", "d"], ["sum"])]
    if twice:
        nodes += [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["e"], **attributes),
            helper.make_node("Add", ["sum", "e"], ["out"]),
        ]
    shape = [4, 5, 6]
    outputs = [helper.make_tensor_value_info("out" if twice else "sum", TensorProto.FLOAT, shape)]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [image], outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    ("scale", "axis"),
    [
        (0.003, None),
        (np.geomspace(1e-6, 3, 4), 0),
        (np.geomspace(1e-6, 3, 5), 1),
        (np.geomspace(1e-6, 3, 6), -1),
        (np.linspace(1, 2, 5), None),
    ],
)
def test_every_int8_comes_back(tmp_path: Path, scale: Any, axis: int | None, twice: bool) -> None:
    path = dequantized(tmp_path, scale, axis, twice)
    rewritten = with_float_weights(path)
    assert rewritten is not None
    images = np.zeros((4, 5, 6), np.float32)
    assert np.array_equal(run(str(path), images)[0], run(rewritten, images)[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_nothing_to_rewrite(tmp_path: Path, precision: str) -> None:
    assert with_float_weights(tiny_onnx.write(tmp_path / "tiny.onnx", precision)) is None


def test_what_the_parser_says_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dequantized(tmp_path, 0.1, None)
    assert with_float_weights(tmp_path / "absent.onnx") is None
    (tmp_path / "garbage.onnx").write_bytes(b"\xffno model")
    assert with_float_weights(tmp_path / "garbage.onnx") is None
    apart = onnx.load(path)
    onnx.save(apart, tmp_path / "apart.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert with_float_weights(tmp_path / "apart.onnx") is None
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert with_float_weights(path) is None


@pytest.mark.parametrize(("version", "rewritten"), [("8.6.0", True), ("10.3.0", False), ("11.4.0.106", False)])
def test_only_tensorrt_8_gets_it(tmp_path: Path, version: str, rewritten: bool) -> None:
    from appliance.runtime.trt_compat import TrtCompat

    compat = TrtCompat(stand_in(version, StandInCuda()))
    path = dequantized(tmp_path, 0.1, None)
    network = compat.trt.Builder(compat.messages()).create_network(compat.network_flags())
    parser = compat.trt.OnnxParser(network, compat.messages())
    assert compat.parse(parser, path)
    assert parser.parse_from_file(str(path)) is not rewritten  # the stand-in of 8.6 refuses int8 constants, as its parser does
