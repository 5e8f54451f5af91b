from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from quantize.errors import QuantizeError
from quantize.graph.class_activation_map import add_cam
from quantize.graph.onnx_graph import OPSET, clean_up, copy_of, initializers, output_names
from tests.support.quantize_networks import Net, dense, images, random_network, residual, run, unet


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_cleaned_net_computes_what_it_did(data: st.DataObject) -> None:
    model = random_network(data)
    cleaned = clean_up(model)
    onnx.checker.check_model(cleaned, full_check=True)
    assert output_names(cleaned) == output_names(model)
    assert len(cleaned.graph.node) <= len(model.graph.node)
    for before, after in zip(run(model, images(2, side=8), optimised=False), run(cleaned, images(2, side=8)), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)


def test_no_batch_norm_is_left_behind_conv_convtranspose_and_gemm() -> None:
    net = Net()
    up = net.norm(net.up(net.norm(net.conv("image", 4)), 6, group=2))
    flat = net.add("Flatten", net.add("GlobalAveragePool", up), axis=1)
    first = net.add("Gemm", flat, net.weight(net.draw(5, 6)), net.weight(net.draw(5)), transB=1, beta=0.5, alpha=2.0)
    net.channels[first] = 5
    second = net.add("Gemm", net.norm(first), net.weight(net.draw(5, 3)), channels=3)
    net.add("Identity", net.norm(second), to="y")
    model = net.model("y")
    cleaned = clean_up(model)
    assert kinds(cleaned)["BatchNormalization"] == 0
    np.testing.assert_allclose(run(cleaned, images())[0], run(model, images())[0], rtol=1e-4, atol=1e-5)


def test_a_batch_norm_in_front_of_a_convolution_stays() -> None:
    assert kinds(clean_up(dense()))["BatchNormalization"] == 5


def test_a_convolution_that_is_read_twice_keeps_its_batch_norm() -> None:
    net = Net()
    conv = net.conv("image", 4)
    net.add("Add", net.norm(conv), conv, to="y")
    assert kinds(clean_up(net.model("y")))["BatchNormalization"] == 1


def test_weights_shared_by_two_convolutions_are_folded_for_each() -> None:
    net = Net()
    weight = net.weight(net.draw(4, 1, 3, 3))
    parts = [net.norm(net.add("Conv", "image", weight, channels=4, pads=[1] * 4)) for _ in range(2)]
    net.add("Add", *parts, to="y")
    model = net.model("y")
    cleaned = clean_up(model)
    assert kinds(cleaned)["BatchNormalization"] == 0
    np.testing.assert_allclose(run(cleaned, images())[0], run(model, images())[0], rtol=1e-4, atol=1e-5)


def test_constants_identities_dead_nodes_and_unused_weights_are_gone() -> None:
    net = Net()
    unused = net.weight(np.zeros(3, np.float32))
    net.nodes.append(helper.make_node("Constant", [], ["half"], value=onnx.numpy_helper.from_array(np.float32(0.5))))
    net.nodes.append(helper.make_node("Neg", ["half"], ["minus"]))
    net.relu("image")
    net.add("Sub", net.add("Identity", "image"), "minus", to="y")
    cleaned = clean_up(net.model("y"))
    assert kinds(cleaned) == {"Sub": 1}
    assert unused not in initializers(cleaned)
    np.testing.assert_allclose(run(cleaned, images())[0], images() + 0.5)


def test_an_old_opset_is_raised_and_a_newer_one_left() -> None:
    old = Net(opset=11)
    old.norm(old.conv("image", 4))
    old.add("Squeeze", old.add("GlobalAveragePool", "t1"), axes=[2, 3], to="y")
    model = old.model("y")
    cleaned = clean_up(model)
    assert [entry.version for entry in cleaned.opset_import] == [OPSET]
    np.testing.assert_allclose(run(cleaned, images())[0], run(model, images())[0], rtol=1e-4, atol=1e-5)
    newer = Net(opset=20)
    newer.add("Relu", "image", to="y")
    assert [entry.version for entry in clean_up(newer.model("y")).opset_import] == [20]


def test_an_opset_that_is_stated_twice_is_stated_once() -> None:
    """As ``onnx.compose.merge_models`` leaves it."""
    model = residual()
    model.opset_import.append(helper.make_opsetid("", model.opset_import[0].version))
    assert len(clean_up(model).opset_import) == 1


def test_nodes_without_a_name_or_with_the_same_get_one_of_their_own() -> None:
    model = residual()
    for node in model.graph.node:
        node.name = "" if node.op_type == "Relu" else "same"
    names = [node.name for node in clean_up(model).graph.node]
    assert len(set(names)) == len(names)
    assert "" not in names
    again = [node.name for node in clean_up(clean_up(model)).graph.node]
    assert again == names


def test_the_batch_stays_symbolic_and_inner_shapes_are_written() -> None:
    cleaned = clean_up(unet())
    assert cleaned.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    assert [axis.dim_value for axis in cleaned.graph.output[0].type.tensor_type.shape.dim][1:] == [2, 16, 16]
    assert len(cleaned.graph.value_info) == len(cleaned.graph.node) - 1


def test_the_given_model_is_not_changed() -> None:
    model = residual()
    before = model.SerializeToString(deterministic=True)
    clean_up(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("kind", ["gemm", "matmul"])
@pytest.mark.parametrize("pool", ["global", "mean", "mean-negative"])
@pytest.mark.parametrize(("labels", "last"), [(1, "Sigmoid"), (3, "Softmax"), (2, "Identity")])
def test_the_mean_of_the_added_map_plus_the_bias_is_the_logit(kind: str, pool: str, labels: int, last: str) -> None:
    net = Net(3)
    net.head(net.relu(net.conv("image", 6, stride=2)), labels, kind=kind, pool=pool, last=last)
    mapped = add_cam(clean_up(net.model()), "probability")
    onnx.checker.check_model(mapped, full_check=True)
    assert output_names(mapped) == ["probability", "cam"]
    probability, cam = run(mapped, images(3))
    assert cam.shape == (3, labels, 8, 8)
    logit = cam.mean(axis=(2, 3)) + initializers(net.model())["bias"]
    if last == "Sigmoid":
        logit = 1 / (1 + np.exp(-logit))
    elif last == "Softmax":
        logit = np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probability, logit, rtol=1e-4, atol=1e-5)


def test_a_map_that_is_there_already_is_left() -> None:
    mapped = add_cam(clean_up(residual()), "probability")
    assert add_cam(mapped, "probability") is mapped


def test_a_volume_gets_a_map_of_three_dimensions() -> None:
    net = Net()
    net.input = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 1, 4, 6, 8])
    features = net.add("Conv", "image", net.weight(net.draw(5, 1, 1, 1, 1)), channels=5)
    pooled = net.add("ReduceMean", features, axes=[2, 3, 4], keepdims=0)
    net.add("Sigmoid", net.add("Gemm", pooled, net.weight(net.draw(5, 2))), to="probability")
    mapped = add_cam(clean_up(net.model()), "probability")
    assert run(mapped, np.ones((1, 1, 4, 6, 8), np.float32))[1].shape == (1, 2, 4, 6, 8)


def no_pooling(net: Net) -> None:
    flat = net.add("Flatten", net.conv("image", 2), axis=1)
    net.add("Gemm", flat, net.weight(net.draw(512, 1)), to="probability")


def partial_pooling(net: Net) -> None:
    pooled = net.add("Flatten", net.add("ReduceMean", net.conv("image", 2), axes=[3]), axis=1)
    net.add("Gemm", pooled, net.weight(net.draw(32, 1)), to="probability")


def two_linear_layers(net: Net) -> None:
    pooled = net.add("Flatten", net.add("GlobalAveragePool", net.conv("image", 4)), axis=1)
    hidden = net.relu(net.add("Gemm", pooled, net.weight(net.draw(4, 3))))
    net.add("Gemm", hidden, net.weight(net.draw(3, 1)), to="probability")


def no_linear_layer(net: Net) -> None:
    net.add("Sigmoid", net.add("GlobalAveragePool", net.conv("image", 1)), to="probability")


def sum_of_two(net: Net) -> None:
    pooled = net.add("Flatten", net.add("GlobalAveragePool", net.conv("image", 4)), axis=1)
    parts = [net.add("MatMul", pooled, net.weight(net.draw(4, 1))) for _ in range(2)]
    net.add("Add", *parts, to="probability")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (no_pooling, "stands Conv"),
        (partial_pooling, "no global average pooling"),
        (two_linear_layers, "stands Relu"),
        (no_linear_layer, "no linear layer"),
        (sum_of_two, "sum of two"),
    ],
)
def test_another_head_gets_no_map_but_an_error_that_says_what_stands_there(write: Any, said: str) -> None:
    net = Net()
    write(net)
    with pytest.raises(QuantizeError, match=said) as caught:
        add_cam(clean_up(net.model()), "probability")
    assert caught.value.hint


def test_a_map_of_an_output_that_is_not_there() -> None:
    with pytest.raises(QuantizeError, match="no output 'score'"):
        add_cam(residual(), "score")


def test_a_copy_is_independent() -> None:
    model = residual()
    copied = copy_of(model)
    del copied.graph.node[:]
    assert model.graph.node


def test_an_old_graph_that_cannot_be_converted_says_so() -> None:
    net = Net(opset=9)
    net.add("Upsample", "image", net.weight(np.ones(4, np.float32)), to="y")
    model = net.model("y")
    del model.graph.initializer[:]
    with pytest.raises(QuantizeError, match="cannot be converted from opset 9 to 17: Input w0 is undefined") as caught:
        clean_up(model)
    assert "opset 17" in caught.value.hint
