from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import clean_up, with_outputs
from quantize.recipes.fp16 import convert, convert_to_fp16, find_out_of_range_nodes
from tests.support.quantize_networks import Net, dense, images, random_network, residual, run, unet


def types(model: Any) -> set[str]:
    return {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}


def loud(gain: float = 3e5) -> Any:
    """A net whose middle reaches ``gain``, far beyond half precision, and comes back: two neighbours are out of range."""
    net = Net(5)
    data = net.relu(net.conv("image", 4))
    up = net.add("Mul", data, net.weight(np.float32(gain)), channels=4)
    middle = net.relu(up)
    down = net.add("Mul", middle, net.weight(np.float32(1 / gain)), channels=4)
    # The loud tensor has a second reader: two casts of one tensor.
    other = net.add("Mul", middle, net.weight(np.float32(-2 / gain)), channels=4)
    net.head(net.add("Concat", down, other, axis=1, channels=8))
    return clean_up(net.model())


@pytest.mark.parametrize("net", [residual, unet, dense])
def test_half_precision_is_near_float_and_takes_half_the_space(net: Any) -> None:
    model = clean_up(net())
    half = convert_to_fp16(model, [images()])
    onnx.checker.check_model(half, full_check=True)
    assert types(half) == {"FLOAT16"}
    assert {value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)} == {onnx.TensorProto.FLOAT}
    assert [value.name for value in half.graph.output] == [value.name for value in model.graph.output]
    for before, after in zip(run(model, images()), run(half, images()), strict=True):
        assert after.dtype == np.float32
        np.testing.assert_allclose(after, before, atol=2e-2 * float(np.abs(before).max()))


def test_what_overflows_is_found_and_its_neighbours_with_it() -> None:
    model = loud()
    kept = find_out_of_range_nodes(model, [images()])
    kinds = {node.name: node.op_type for node in model.graph.node}
    assert sorted(kinds[name] for name in kept) == ["Mul", "Mul", "Mul", "Relu"]


def test_an_intermediate_that_overflows_is_kept_in_float32_and_right() -> None:
    model = loud()
    half = convert_to_fp16(model, [images()])
    np.testing.assert_allclose(run(half, images())[0], run(model, images())[0], atol=5e-3)
    # What is written between kept neighbours never passes through half precision, whatever a runtime makes of the graph.
    names = [value.name for value in half.graph.value_info]
    assert all(np.isfinite(value).all() for value in run(with_outputs(half, names), images(), optimised=False))


def test_without_the_keep_list_the_same_net_overflows() -> None:
    half = convert(loud(), frozenset())
    names = [value.name for value in half.graph.value_info]
    values = run(with_outputs(half, names), images(), optimised=False)
    assert not all(np.isfinite(value).all() for value in values)


def test_a_weight_beyond_half_precision_is_kept() -> None:
    net = Net()
    small = net.add("Mul", "image", net.weight(np.float32(1e-6)), channels=1)
    net.add("Mul", small, net.weight(np.float32(1e6)), to="y")
    model = net.model("y")
    assert find_out_of_range_nodes(model, [images()]) == {"Mul_0", "Mul_1"}
    np.testing.assert_allclose(run(convert_to_fp16(model, [images()]), images())[0], images(), rtol=1e-3, atol=1e-3)


def test_a_tensor_of_tiny_values_is_kept() -> None:
    net = Net()
    net.add("Mul", net.relu(net.conv("image", 2)), net.weight(np.float32(1e-7)), to="small")
    model = clean_up(net.model("small"))
    assert [node.op_type for node in model.graph.node if node.name in find_out_of_range_nodes(model, [images()])] == ["Mul"]
    half = convert_to_fp16(model, [images()])
    np.testing.assert_allclose(run(half, images())[0], run(model, images())[0], rtol=1e-2, atol=1e-10)


def test_a_mean_whose_sum_overflows_is_kept() -> None:
    net = Net(side=32)
    loud = net.add("Mul", "image", net.weight(np.float32(200)), channels=1)
    net.add("GlobalAveragePool", loud, to="y")
    # The tensor itself reaches 200, its sum over 1024 cells 100 000.
    assert find_out_of_range_nodes(clean_up(net.model("y")), [images(side=32)]) == {"GlobalAveragePool_1"}


def test_a_model_that_overflows_in_float_is_refused() -> None:
    net = Net()
    net.add("Exp", net.add("Mul", "image", net.weight(np.float32(1000)), channels=1), to="y")
    with pytest.raises(QuantizeError, match="float model computes NaN or Inf in 'y'"):
        convert_to_fp16(net.model("y"), [images()])


def test_half_precision_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import quantize.recipes.fp16

    monkeypatch.setattr(quantize.recipes.fp16, "find_out_of_range_nodes", lambda *_, **__: frozenset())
    with pytest.raises(QuantizeError, match=r"in half precision .* becomes NaN or Inf"):
        convert_to_fp16(loud(), [images()])


def test_a_kept_node_whose_output_is_the_graphs_keeps_its_name_and_precision() -> None:
    net = Net()
    net.add("Mul", net.add("Mul", "image", net.weight(np.float32(1e6)), channels=1), net.weight(np.float32(2)), to="y")
    model = net.model("y")
    half = convert_to_fp16(model, [images()])
    np.testing.assert_allclose(run(half, images())[0], run(model, images())[0], rtol=1e-6)


def test_the_part_done_is_told_up_to_one() -> None:
    fractions: list[float] = []
    convert_to_fp16(clean_up(residual()), [images(2), images(1)], on_progress=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_net_with_any_nodes_kept_stays_valid_and_near(data: st.DataObject) -> None:
    model = clean_up(random_network(data))
    names = [node.name for node in model.graph.node]
    kept = frozenset(data.draw(st.lists(st.sampled_from(names)))) if names else frozenset()
    half = convert(model, kept)
    onnx.checker.check_model(half, full_check=True)
    made = {name: node for node in half.graph.node for name in node.output}
    weights = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in half.graph.initializer}
    for node in half.graph.node:
        if node.name in kept:
            # A kept node reads what another kept one wrote, or a cast; never a tensor in half precision.
            assert all(weights.get(name, np.float32) == np.float32 for name in node.input if name not in made)
    for before, after in zip(run(model, images(2, side=8)), run(half, images(2, side=8)), strict=True):
        np.testing.assert_allclose(after, before, atol=0.05 * max(float(np.abs(before).max()), 1.0))
