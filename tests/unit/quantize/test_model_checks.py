from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from quantize.errors import QuantizeError
from quantize.graph import model_checks
from quantize.graph.model_checks import read_model
from tests.support.quantize_networks import FLOAT, Net, residual


@dataclass(frozen=True)
class Spec:
    name: str = "image"
    shape: tuple[int, ...] = (1, 16, 16)


@dataclass(frozen=True)
class Out:
    name: str
    kind: str = "probability"


def saved(model: Any, directory: Path) -> Path:
    path = directory / "model.onnx"
    onnx.save(model, path)
    return path


def refused(path: Path, said: str, *args: Any) -> None:
    with pytest.raises(QuantizeError, match=said) as caught:
        read_model(path, *args)
    assert caught.value.hint


def dynamic(*axes: int | str | None) -> Any:
    model = residual()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", FLOAT, list(axes)))
    return model


def test_a_good_model_is_read(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    assert read_model(path, Spec(), [Out("probability"), Out("cam", "cam")]).graph.node
    assert read_model(path).graph.node


def test_there_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "there is no model at")
    refused(tmp_path, "there is no model at")


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x08"])
def test_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, "no complete ONNX model")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_truncated_model(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = residual().SerializeToString()
    path = tmp_path_factory.getbasetemp() / "cut.onnx"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(QuantizeError):
        read_model(path, Spec())


@pytest.mark.parametrize("version", [7, 8, 22, 40])
def test_an_unsupported_opset_says_which_are_supported(tmp_path: Path, version: int) -> None:
    model = residual()
    model.opset_import[0].version = version
    refused(saved(model, tmp_path), f"opset is {version}; supported are 9 to 21|no complete ONNX model")


def test_an_operator_of_another_domain_is_named(tmp_path: Path) -> None:
    model = residual()
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Sharpen", "com.example"
    refused(saved(model, tmp_path), r"operator com\.example\.Sharpen \(node 'BatchNormalization_1'\) is not supported")


def test_an_operator_that_onnx_does_not_know_is_named(tmp_path: Path) -> None:
    model = residual()
    model.graph.node[2].op_type = "Relo"
    refused(saved(model, tmp_path), r"operator Relo \(node 'Relu_2'\) is not supported")


def test_an_operator_that_onnx_runtime_does_not_have_is_named(tmp_path: Path) -> None:
    net = Net(opset=20)
    flat = net.add("Reshape", "image", net.weight(np.array([-1], np.int64)))
    bytes_ = net.add("Cast", flat)
    net.nodes[-1].attribute.append(helper.make_attribute("to", onnx.TensorProto.UINT8))
    picture = net.add("ImageDecoder", bytes_)
    net.add("Cast", picture, to="probability")
    net.nodes[-1].attribute.append(helper.make_attribute("to", onnx.TensorProto.FLOAT))
    refused(saved(net.model(), tmp_path), r"operator ImageDecoder \(node 'ImageDecoder_2'\) is not supported")


def test_external_data_missing_names_file_and_weight(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(residual(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    refused(path, r"external data of 'w0' are missing: weights\.bin is not beside model\.onnx")


def test_external_data_are_inlined(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(residual(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = read_model(path, Spec())
    assert {t.name: numpy_helper.to_array(t).tobytes() for t in model.graph.initializer} == {
        t.name: numpy_helper.to_array(t).tobytes() for t in residual().graph.initializer
    }
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_external_data_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(residual(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 10)
    refused(path, "no complete ONNX model")


def test_external_data_elsewhere_on_the_disk_are_not_read(tmp_path: Path) -> None:
    inside = tmp_path / "export"
    inside.mkdir()
    path = inside / "model.onnx"
    onnx.save(residual(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (inside / "weights.bin").rename(tmp_path / "weights.bin")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights.bin" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    refused(path, "no complete ONNX model|missing")


def test_more_than_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as stream:
        stream.truncate(model_checks.MAX_MODEL_BYTES + 1)  # a hole: it takes no space
    refused(path, "more than 2 GB")
    onnx.save(residual(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with (tmp_path / "weights.bin").open("r+b") as stream:
        stream.truncate(model_checks.MAX_MODEL_BYTES)
    refused(path, "more than 2 GB")
    monkeypatch.setattr(model_checks, "MAX_MODEL_BYTES", 100)
    refused(saved(residual(), tmp_path), "more than 2 GB")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, value: float) -> None:
    model = residual()
    broken = numpy_helper.to_array(model.graph.initializer[0]).copy()
    broken[0, 0, 0, 0] = value
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(broken, "stem.weight"))
    model.graph.node[0].input[1] = "stem.weight"
    refused(saved(model, tmp_path), "'stem.weight' holds NaN or Inf")


def test_a_model_in_half_precision_is_not_the_float_one(tmp_path: Path) -> None:
    from quantize.recipes.fp16 import convert

    refused(saved(convert(residual(), frozenset()), tmp_path), "not the float one: .* is float16")


def test_a_quantized_model_is_not_the_float_one(tmp_path: Path) -> None:
    net = Net()
    scale, zero = net.weight(np.float32(0.1)), net.weight(np.int8(0))
    net.add("DequantizeLinear", net.add("QuantizeLinear", "image", scale, zero), scale, zero, to="probability")
    refused(saved(net.model(), tmp_path), "quantized already: it has QuantizeLinear")


@pytest.mark.parametrize("axes", [("n", 1, None, None), ("n", 1, "h", "w"), ("n", "c", "h", 16)])
def test_dynamic_axes_are_fixed_by_the_manifest(tmp_path: Path, axes: tuple[int | str | None, ...]) -> None:
    model = read_model(saved(dynamic(*axes), tmp_path), Spec())
    assert [axis.dim_value or axis.dim_param for axis in model.graph.input[0].type.tensor_type.shape.dim] == ["n", 1, 16, 16]


def test_a_dynamic_axis_that_nothing_fixes(tmp_path: Path) -> None:
    refused(saved(dynamic("n", 1, "h", 16), tmp_path), r"axis 2 of the input 'image' is dynamic \(h\), and nothing fixes it")


def test_outputs_get_the_size_that_follows_from_the_input(tmp_path: Path) -> None:
    net = Net()
    net.input = helper.make_tensor_value_info("image", FLOAT, ["n", 1, "h", "w"])
    net.conv("image", 2, stride=2, to="probability")
    model = read_model(saved(net.model(), tmp_path), Spec())
    assert [axis.dim_value or axis.dim_param for axis in model.graph.output[0].type.tensor_type.shape.dim] == ["n", 2, 8, 8]


def test_a_size_that_the_model_cannot_take(tmp_path: Path) -> None:
    net = Net()
    net.input = helper.make_tensor_value_info("image", FLOAT, ["n", 1, "h", "w"])
    flat = net.add("Flatten", "image", axis=1)
    net.add("Gemm", flat, net.weight(net.draw(100, 1)), to="probability")
    refused(saved(net.model(), tmp_path), "cannot take an input of the manifest's size|cannot run the model", Spec())


@pytest.mark.parametrize("shape", [(1, 16, 32), (3, 16, 16), (1, 16), (1, 4, 16, 16)])
def test_another_size_than_the_manifest_says(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refused(saved(residual(), tmp_path), "the model's input 'image' is", Spec(shape=shape))


def test_without_the_manifests_input(tmp_path: Path) -> None:
    refused(saved(residual(), tmp_path), "inputs are image; the manifest's is picture", Spec(name="picture"))


def test_without_the_manifests_output(tmp_path: Path) -> None:
    refused(saved(residual(), tmp_path), "no output 'score', only probability", Spec(), [Out("score")])


def test_two_inputs(tmp_path: Path) -> None:
    net = Net()
    net.add("Add", "image", "mask", to="probability")
    model = helper.make_model(
        helper.make_graph(
            net.nodes,
            "net",
            [net.input, helper.make_tensor_value_info("mask", FLOAT, ["n", 1, 16, 16])],
            [helper.make_tensor_value_info("probability", FLOAT, ["n", 1, 16, 16])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    refused(saved(model, tmp_path), "inputs are image, mask")


def test_weights_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    """As the first versions of the format wrote them."""
    model = residual()
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert read_model(saved(model, tmp_path), Spec()).graph.node
