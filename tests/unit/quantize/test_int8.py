from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from quantize.errors import QuantizeError
from quantize.graph.class_activation_map import add_cam
from quantize.graph.onnx_graph import clean_up, consumers, initializers, producers
from quantize.recipes import calibration, int8
from quantize.recipes.int8 import Calibration, Recipe, calibrate, quantizable, quantize, recipes
from tests.support.quantize_networks import Net, dense, images, random_network, residual, run, unet

BY_NAME = {recipe.name: recipe for recipe in recipes()}


@pytest.fixture(autouse=True, scope="module")
def few_bins() -> Iterator[None]:
    """Entropy weighs every pair of bins; few are enough to see that it works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_BINS", 256)
        yield


# The calibration of each network: entropy ranges take seconds, and every recipe reads the same ones.
MEASURED: dict[tuple[bytes, int], Calibration] = {}


QDQ = ("QuantizeLinear", "DequantizeLinear")


def quantized(model: Any, recipe: Recipe, directory: Path, count: int = 16) -> Any:
    out = directory / "int8.onnx"
    key = model.SerializeToString(deterministic=True), count
    if key not in MEASURED:
        MEASURED[key] = calibrate(model, [images(count)])
    quantize(model, recipe, MEASURED[key], out)
    return onnx.load(out)


def zero_points(model: Any) -> list[Any]:
    held = initializers(model)
    return [held[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]


def around(model: Any, kind: str) -> list[tuple[list[str], list[str]]]:
    """For each node of a kind: what makes its inputs, and what reads its output."""
    made, readers = producers(model), consumers(model)
    return [
        ([made[name].op_type for name in node.input if name in made], sorted(reader.op_type for reader in readers.get(node.output[0], ())))
        for node in model.graph.node
        if node.op_type == kind
    ]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("net", [residual, unet, dense])
def test_every_recipe_writes_a_model_that_is_near_the_float_one(net: Any, recipe: Recipe, tmp_path: Path) -> None:
    model = clean_up(net())
    small = quantized(model, recipe, tmp_path)
    onnx.checker.check_model(small, full_check=True)
    held = {tensor.data_type for tensor in small.graph.initializer}
    assert onnx.TensorProto.INT8 in held
    (right,), (now,) = run(model, images(4, seed=9)), run(small, images(4, seed=9))
    assert now.dtype == np.float32
    # Entropy cuts what is rare, and a network of random weights has only rare values.
    allowed = 0.2 if recipe.method == "entropy" else 0.1
    assert np.sqrt(np.mean((now - right) ** 2)) < allowed * np.sqrt(np.mean(right**2))


@pytest.mark.parametrize("net", [residual, unet, dense])
@pytest.mark.parametrize("method", int8.METHODS)
def test_symmetric_is_what_tensorrt_takes(net: Any, method: str, tmp_path: Path) -> None:
    small = quantized(clean_up(net()), BY_NAME[f"symmetric-{method}"], tmp_path)
    held = initializers(small)
    for node in small.graph.node:
        if node.op_type in QDQ:
            assert held[node.input[2]].dtype == np.int8
            assert not held[node.input[2]].any()
            assert (held[node.input[1]] > 0).all()
    # Neither ConvTranspose nor Concat reads or writes anything quantized but for what a convolution behind it takes.
    for inputs, _ in around(small, "ConvTranspose") + around(small, "Concat"):
        assert "DequantizeLinear" not in inputs or net is dense
    for node in small.graph.node:
        if node.op_type == "ConvTranspose":
            assert held[node.input[1]].dtype == np.float32


def test_symmetric_puts_nothing_between_a_convolution_and_its_activation_and_quantizes_no_bias(tmp_path: Path) -> None:
    small = quantized(clean_up(residual()), BY_NAME["symmetric-minmax"], tmp_path)
    held = initializers(small)
    for node in small.graph.node:
        if node.op_type == "Conv":
            assert held[node.input[2]].dtype == np.float32
    for inputs, readers in around(small, "Conv"):
        assert inputs == ["DequantizeLinear", "DequantizeLinear"]
        assert set(readers) <= {"Relu", "Add", "QuantizeLinear"}
    assert all("DequantizeLinear" not in inputs for inputs, _ in around(small, "Relu"))


def test_symmetric_quantizes_the_shortcut_of_each_residual_add_and_only_that(tmp_path: Path) -> None:
    small = quantized(clean_up(residual(blocks=4)), BY_NAME["symmetric-minmax"], tmp_path)
    adds = around(small, "Add")
    assert len(adds) == 4
    assert all(sorted(inputs) == ["Conv", "DequantizeLinear"] for inputs, _ in adds)
    made = producers(small)
    # Where the size changes, the shortcut is the single convolution, not the end of the two.
    for node in small.graph.node:
        if node.op_type == "Add":
            source = next(made[name] for name in node.input if made[name].op_type == "Conv")
            assert initializers(small)[made[source.input[1]].input[0]].shape[2:] == (3, 3)


def test_weights_are_symmetric_per_channel_int8(tmp_path: Path) -> None:
    for name in ("symmetric-minmax", "unsigned-chained-minmax"):
        small = quantized(clean_up(residual()), BY_NAME[name], tmp_path)
        held, made = initializers(small), producers(small)
        for node in small.graph.node:
            if node.op_type == "Conv":
                weight, scale, zero = (held[item] for item in made[node.input[1]].input)
                assert weight.dtype == np.int8
                assert scale.shape == (len(weight),)
                assert not zero.any()


def test_unsigned_has_uint8_activations_and_lets_rounding_do_the_relu(tmp_path: Path) -> None:
    small = quantized(clean_up(residual()), BY_NAME["unsigned-chained-minmax"], tmp_path)
    assert {zero.dtype for zero in zero_points(small)} == {np.dtype(np.uint8)}
    assert Counter(node.op_type for node in small.graph.node)["Relu"] == 0
    assert any(int(zero) == 0 for zero in zero_points(small))


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("net", [residual, unet])
def test_nothing_behind_the_last_multiplication_is_quantized(net: Any, recipe: Recipe, tmp_path: Path) -> None:
    """A score in 256 steps, cut off where calibration saw its largest, saves no time."""
    model = add_cam(clean_up(net()), "probability") if net is residual else clean_up(net())
    small = quantized(model, recipe, tmp_path)
    made = producers(small)
    for output in small.graph.output:
        tensor = output.name
        while made[tensor].op_type == "Sigmoid":
            tensor = made[tensor].input[0]
        assert made[tensor].op_type in ("Conv", "Gemm")
        assert made[made[tensor].input[0]].op_type == "DequantizeLinear"


def test_a_relu_behind_the_last_convolution_is_not_lost(tmp_path: Path) -> None:
    net = Net()
    net.add("Relu", net.conv(net.relu(net.conv("image", 4)), 2), to="y")
    model = clean_up(net.model("y"))
    small = quantized(model, BY_NAME["unsigned-chained-minmax"], tmp_path)
    assert [node.op_type for node in small.graph.node][-1] == "Relu"
    (now,), (right,) = run(small, images()), run(model, images())
    assert now.min() == 0
    assert np.abs(now - right).max() < 0.05 * right.max()


def test_nodes_to_keep_stay_float(tmp_path: Path) -> None:
    model = clean_up(residual())
    first = next(node.name for node in model.graph.node if node.op_type == "Conv")
    recipe = BY_NAME["symmetric-minmax"].keeping(frozenset({first}))
    assert recipe.precision == "mixed"
    assert first not in quantizable(model, recipe)
    small = quantized(model, recipe, tmp_path)
    kept = next(node for node in small.graph.node if node.name == first)
    assert initializers(small)[kept.input[1]].dtype == np.float32
    assert first not in quantize(model, recipe, [images(2)], tmp_path / "again.onnx")


def test_a_recipe_that_quantizes_nothing(tmp_path: Path) -> None:
    model = clean_up(residual())
    recipe = BY_NAME["symmetric-minmax"]
    with pytest.raises(QuantizeError, match="quantizes nothing"):
        quantize(model, recipe.keeping(quantizable(model, recipe)), [images(2)], tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_a_product_of_two_computed_tensors_is_left(tmp_path: Path) -> None:
    net = Net()
    left = net.conv("image", 2)
    product = net.add("MatMul", left, net.add("Transpose", left, perm=[0, 1, 3, 2]), channels=2)
    net.conv(product, 1, to="y")
    model = clean_up(net.model("y"))
    assert {name.split("_")[0] for name in quantizable(model, BY_NAME["unsigned-weighted-minmax"])} == {"Conv"}
    quantized(model, BY_NAME["unsigned-weighted-minmax"], tmp_path)


def test_a_map_is_still_the_logit_cell_by_cell(tmp_path: Path) -> None:
    model = add_cam(clean_up(residual()), "probability")
    small = quantized(model, BY_NAME["unsigned-chained-minmax"], tmp_path)
    assert [value.name for value in small.graph.output] == ["probability", "cam"]
    bias = float(initializers(model)["bias"][0])
    probability, cam = run(small, images(8, seed=3))
    assert np.abs(1 / (1 + np.exp(-(cam.mean(axis=(2, 3)) + bias))) - probability).max() < 0.05


def test_calibration_is_done_once_and_read_by_every_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = clean_up(residual())
    measured = calibrate(model, [images(8)])
    monkeypatch.setattr(int8, "calibrate", None)
    files = []
    for recipe in recipes():
        quantize(model, recipe, measured, tmp_path / f"{recipe.name}.onnx")
        files.append((tmp_path / f"{recipe.name}.onnx").read_bytes())
    assert len(set(files)) >= 6  # on a few random pictures two methods may agree


def test_calibration_does_not_depend_on_how_the_pictures_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = clean_up(residual())
    whole = calibrate(model, [images(6)])
    monkeypatch.setattr(calibration, "_STEP_BYTES", 1)
    parts = calibrate(model, [images(6)[:1], images(6)[1:]])
    for name, (low, high) in whole.extremes.items():
        np.testing.assert_allclose(parts.extremes[name], (low, high), rtol=1e-5, atol=1e-6)
        assert abs(int(parts.histograms[name].sum()) - int(whole.histograms[name].sum())) == 0
    assert parts.ranges("percentile").keys() == whole.ranges("percentile").keys()


def test_percentile_cuts_outliers_that_minmax_holds() -> None:
    net = Net(side=128)
    net.add("Identity", net.relu("image"), to="y")
    pictures = images(4, side=128)
    pictures[0, 0, 0, 0] = 1000.0
    measured = calibrate(net.model("y"), [pictures])
    assert measured.ranges("minmax")["image"][1] == 1000.0
    assert measured.ranges("percentile")["image"][1] < 10


def test_a_dark_first_picture_does_not_decide_the_histograms() -> None:
    model = clean_up(residual())
    pictures = images(4)
    pictures[0] *= 1e-9
    measured = calibrate(model, [pictures[:1], pictures[1:]])
    assert {len(counts) for counts in measured.histograms.values()} == {calibration._BINS}


def test_an_all_black_set_still_gives_positive_scales(tmp_path: Path) -> None:
    net = Net()
    net.conv(net.relu(net.conv("image", 2, bias=False)), 2, bias=False, to="y")
    model = clean_up(net.model("y"))
    out = tmp_path / "x.onnx"
    for recipe in recipes():
        quantize(model, recipe, [np.zeros((4, 1, 16, 16), np.float32)], out)
        small = onnx.load(out)
        held = initializers(small)
        for node in small.graph.node:
            if node.op_type in QDQ:
                assert (held[node.input[1]] > 0).all()
        assert np.isfinite(run(small, images(2))[0]).all()


@pytest.mark.parametrize("tensors", [[], [np.zeros((0, 1, 16, 16), np.float32)]])
def test_an_empty_calibration_set(tensors: list[Any]) -> None:
    with pytest.raises(QuantizeError, match="calibration set is empty"):
        calibrate(clean_up(residual()), tensors)


def test_a_calibration_tensor_of_another_size_or_type() -> None:
    with pytest.raises(QuantizeError, match=r"does not run on a calibration tensor of shape \[2, 1, 8, 16\]"):
        calibrate(clean_up(residual()), [np.zeros((2, 1, 8, 16), np.float32)])
    with pytest.raises(QuantizeError, match="does not run on a calibration tensor"):
        calibrate(clean_up(residual()), [np.zeros((2, 1, 16, 16), np.float64)])


@pytest.mark.parametrize(("value", "kind"), [(500.0, "Exp"), (-1.0, "Log")])
def test_a_calibration_tensor_that_makes_the_model_overflow(value: float, kind: str) -> None:
    net = Net()
    net.relu(net.add(kind, "image", channels=1, to="middle"))
    with pytest.raises(QuantizeError, match="computes NaN or Inf in 'middle'"):
        calibrate(clean_up(net.model("t1")), [np.full((1, 1, 16, 16), value, np.float32)])


def test_the_part_done_is_told_and_nothing_is_printed_or_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fractions: list[float] = []
    before = logging.getLogger().level
    quantize(clean_up(residual()), BY_NAME["unsigned-chained-entropy"], [images(4)], tmp_path / "x.onnx", on_progress=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    assert logging.getLogger().level == before


def test_a_model_with_a_fixed_batch_is_calibrated_by_it(tmp_path: Path) -> None:
    net = Net(batch=1)
    net.head(net.relu(net.conv("image", 4)))
    small = quantized(clean_up(net.model()), BY_NAME["unsigned-chained-percentile"], tmp_path, 5)
    assert numpy_helper.to_array(small.graph.initializer[0]).size


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(recipes()))
def test_any_net_by_any_recipe_runs_and_keeps_its_signature(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, recipe: Recipe
) -> None:
    model = clean_up(random_network(data))
    out = tmp_path_factory.getbasetemp() / "any.onnx"
    if not quantizable(model, recipe):
        return
    quantize(model, recipe, [images(4, side=8)], out)
    small = onnx.load(out)
    onnx.checker.check_model(small, full_check=True)
    for before, after in zip(run(model, images(2, side=8)), run(small, images(2, side=8)), strict=True):
        assert after.shape == before.shape
        assert np.isfinite(after).all()
