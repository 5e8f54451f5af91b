"""Weights of 7 bits: no sum is clipped on any processor, which is shown by the numbers, by every kernel here, and from the file alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from appliance.core.errors import InferenceError
from appliance.runtime import CPU, Candidate, cpu_features, open_runtime
from appliance.runtime.weight_range import LARGEST_WEIGHT, fits_16_bits
from tests.support import small_networks as networks
from tests.support.small_networks import constant, save, value

CHANNELS, SIDE = 32, 8
SHAPE = (CHANNELS, SIDE, SIDE)
INT16 = np.iinfo(np.int16)
RUNTIMES = [("onnxruntime", CPU)] + ([("openvino", "CPU")] if importlib.util.find_spec("openvino") else [])


@dataclass(frozen=True)
class Spec:
    name: str = "image"
    shape: tuple[int, ...] = SHAPE


# --- the numbers ----------------------------------------------------------------------------------------------------


def clipped_sum(activations: Any, weights: Any) -> int:
    """What VPMADDUBSW and VPMADDWD make of a dot product: pairs of products in 16 bits with saturation, then 32 bits."""
    products = activations.astype(np.int32) * weights.astype(np.int32)
    return int(np.clip(products.reshape(-1, 2).sum(axis=1), INT16.min, INT16.max).sum())


def test_64_is_the_largest_weight_of_which_two_products_fit() -> None:
    assert 2 * 255 * LARGEST_WEIGHT == 32640 <= INT16.max
    assert INT16.min <= -2 * 255 * LARGEST_WEIGHT
    assert INT16.max < 2 * 255 * (LARGEST_WEIGHT + 1)


PAIRS = st.lists(st.tuples(st.integers(0, 255), st.integers(-LARGEST_WEIGHT, LARGEST_WEIGHT)), min_size=2, max_size=64).filter(
    lambda pairs: len(pairs) % 2 == 0
)


@given(PAIRS)
def test_with_weights_of_7_bits_both_kinds_of_processor_add_the_same(pairs: list[tuple[int, int]]) -> None:
    activations, weights = (np.array(column) for column in zip(*pairs, strict=True))
    assert clipped_sum(activations, weights) == int(activations @ weights)


def test_with_weights_of_8_bits_they_do_not() -> None:
    activations, weights = np.array([255, 255]), np.array([127, 127])
    assert (clipped_sum(activations, weights), int(activations @ weights)) == (INT16.max, 64770)


# --- the kernels of this machine ------------------------------------------------------------------------------------


KERNELS = {
    "3x3": (48, CHANNELS, 3, 3),
    "1x1": (48, CHANNELS, 1, 1),
    "depthwise": (CHANNELS, 1, 3, 3),
    "grouped": (CHANNELS, 8, 3, 3),
    "linear": (16, CHANNELS * SIDE * SIDE),
}


def one_operator(path: Path, weights: Any, *, unsigned: bool, output_step: float) -> Path:
    """One convolution or linear layer of whole numbers, so that its sums are known exactly.

    ``output_step``: of the quantized output, without which ONNX Runtime multiplies in float; 0 leaves the output in float.
    """
    constants = [
        constant("step", np.float32(1)), constant("zero", np.uint8(0) if unsigned else np.int8(0)),
        constant("w", weights.astype(np.int8)), constant("w_step", np.ones(len(weights), np.float32)),
        constant("w_zero", np.zeros(len(weights), np.int8)), constant("y_step", np.float32(output_step)),
        constant("y_zero", np.uint8(128) if unsigned else np.int8(0)),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("QuantizeLinear", ["flat" if weights.ndim == 2 else "image", "step", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "step", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "w_step", "w_zero"], ["wf"], axis=0),
    ]
    if weights.ndim == 2:
        nodes.append(helper.make_node("Gemm", ["x", "wf"], ["y"], transB=1))
    else:
        pad, group = weights.shape[2] // 2, CHANNELS // weights.shape[1]
        nodes.append(helper.make_node("Conv", ["x", "wf"], ["y"], pads=[pad] * 4, group=group))
    if output_step:
        nodes.append(helper.make_node("QuantizeLinear", ["y", "y_step", "y_zero"], ["yq"]))
        nodes.append(helper.make_node("DequantizeLinear", ["yq", "y_step", "y_zero"], ["output"]))
    else:
        nodes[-1].output[0] = "output"
        constants = constants[:-2]
    shape: tuple[Any, ...] = ("n", len(weights)) if weights.ndim == 2 else ("n", len(weights), SIDE, SIDE)
    return save(path, nodes, [value("output", shape)], ("n", *SHAPE), constants)


def worst(shape: tuple[int, ...], largest: int, *, unsigned: bool, seed: int) -> tuple[Any, Any]:
    """Weights and an image at the ends of their ranges: all of one sign (seed 0), or mixed."""
    rng = np.random.default_rng(seed)
    high, low = (255, 0) if unsigned else (127, -127)
    if not seed:
        return np.full(shape, largest), np.full((1, *SHAPE), high, np.float32)
    return rng.choice([-largest, 1 - largest, largest], shape), rng.choice([low, high - 1, high], (1, *SHAPE)).astype(np.float32)


def answer(path: Path, runtime: Any, provider: str, image: Any) -> tuple[Any, Any]:
    """What a runtime answers in 8 bits, and the precisions of its layers."""
    opened = open_runtime(path, Spec(), Candidate(runtime, path.name, "int8", provider, 1))
    try:
        return opened.infer({"image": image})["output"], opened.describe()["layers"]
    finally:
        opened.close()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("unsigned", [True, False], ids=["unsigned", "symmetric"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("runtime", "provider"), RUNTIMES)
def test_every_kernel_of_this_processor_adds_weights_of_7_bits_exactly(
    tmp_path: Path, runtime: str, provider: str, kernel: str, unsigned: bool, seed: int
) -> None:
    """Against the graph node by node in float, whose sums of whole numbers are exact."""
    weights, image = worst(KERNELS[kernel], LARGEST_WEIGHT, unsigned=unsigned, seed=seed)
    exact = one_operator(tmp_path / "exact.onnx", weights, unsigned=unsigned, output_step=0)
    (sums,) = networks.run_node_by_node(exact, image).values()
    step = float(np.abs(sums).max() / 127) if runtime == "onnxruntime" else 0.0
    path = one_operator(tmp_path / "model.onnx", weights, unsigned=unsigned, output_step=step)
    assert fits_16_bits(path)
    found, layers = answer(path, runtime, provider, image)
    assert {"u8", "i8"} & set(layers)  # else nothing was multiplied in 8 bits
    (right,) = networks.run_node_by_node(path, image).values()
    assert np.abs(found - right).max() <= step  # a tie may be rounded either way


@pytest.mark.skipif(not cpu_features.saturates(), reason="this processor adds 8-bit products in 32 bits")
@pytest.mark.parametrize(("runtime", "provider"), RUNTIMES)
def test_weights_of_8_bits_are_clipped_here_where_nothing_prevents_it(
    tmp_path: Path, runtime: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail, and the refusal below is needed."""
    weights, image = worst(KERNELS["3x3"], 127, unsigned=True, seed=0)
    step = float(weights[0].size * 255)
    path = one_operator(tmp_path / "model.onnx", weights, unsigned=True, output_step=step)
    (right,) = networks.run_node_by_node(path, image).values()
    if runtime == "onnxruntime":
        assert np.array_equal(answer(path, runtime, provider, image)[0], right)  # it is told to add exactly
    else:
        with pytest.raises(InferenceError, match="may be clipped"):
            answer(path, runtime, provider, image)
    for module in ("onnxruntime", "openvino"):
        monkeypatch.setattr(f"appliance.runtime.{module}.saturates", lambda: False)
    assert np.abs(answer(path, runtime, provider, image)[0] - right).max() > 20 * step


# --- the file -------------------------------------------------------------------------------------------------------


Change = Callable[[Any], None]


def set_weights(values: Any, number: Any = np.int8) -> Change:
    def change(model: Any) -> None:
        tensor = next(item for item in model.graph.initializer if item.name == "w")
        tensor.CopyFrom(constant("w", np.full(tensor.dims, values, number)))

    return change


def set_zero_point(number: int) -> Change:
    def change(model: Any) -> None:
        tensor = next(item for item in model.graph.initializer if item.name == "w_zero")
        tensor.CopyFrom(constant("w_zero", np.full(tensor.dims, number, np.int8)))

    return change


def add_node(kind: str, inputs: list[str], **attributes: Any) -> Change:
    def change(model: Any) -> None:
        model.graph.node.append(helper.make_node(kind, inputs, ["more"], **attributes))

    return change


def quantize_weights_in_the_graph(model: Any) -> None:
    model.graph.initializer.append(constant("float", np.zeros(KERNELS["3x3"], np.float32)))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["float", "step", "w_zero_one"], ["w_made"]))
    next(node for node in model.graph.node if node.output[0] == "wf").input[0] = "w_made"


def multiply_two_computed(model: Any) -> None:
    model.graph.node.append(helper.make_node("MatMul", ["x", "x"], ["more"]))


def put_outside(model: Any) -> None:
    next(item for item in model.graph.initializer if item.name == "w").data_location = TensorProto.EXTERNAL


def cut_short(model: Any) -> None:
    tensor = next(item for item in model.graph.initializer if item.name == "w")
    tensor.raw_data = tensor.raw_data[:7]


def add_function(model: Any) -> None:
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], imports))


BRANCH = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "branch", [], [value("z", (1,))])

UNBOUNDED: dict[str, Change] = {
    "a weight of 65": set_weights(65),
    "a weight of -65": set_weights(-65),
    "a weight of -128": set_weights(-128),
    "unsigned weights": set_weights(1, np.uint8),
    "weights around another zero": set_zero_point(1),
    "weights that the graph quantizes": quantize_weights_in_the_graph,
    "a product of two computed tensors": multiply_two_computed,
    "QLinearConv": add_node("QLinearConv", ["xq", "step", "zero", "w", "w_step", "w_zero", "y_step", "y_zero"]),
    "MatMulInteger": add_node("MatMulInteger", ["xq", "w"]),
    "LSTM": add_node("LSTM", ["x", "wf", "wf"]),
    "an operator of another domain": add_node("QGemm", ["xq"], domain="com.microsoft"),
    "a subgraph": add_node("If", ["x"], then_branch=BRANCH, else_branch=BRANCH),
    "a function": add_function,
    "weights in another file": put_outside,
    "weights that are cut short": cut_short,
}


@pytest.fixture
def bounded(tmp_path: Path) -> Path:
    return one_operator(tmp_path / "model.onnx", np.full(KERNELS["3x3"], LARGEST_WEIGHT), unsigned=True, output_step=1.0)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_cannot_be_shown_to_fit_does_not(bounded: Path, name: str) -> None:
    model = onnx.load(bounded)
    UNBOUNDED[name](model)
    bounded.write_bytes(model.SerializeToString())
    assert not fits_16_bits(bounded)


@pytest.mark.parametrize("weight", [-LARGEST_WEIGHT, 0, LARGEST_WEIGHT])
def test_weights_up_to_64_fit(bounded: Path, weight: int) -> None:
    model = onnx.load(bounded)
    set_weights(weight)(model)
    bounded.write_bytes(model.SerializeToString())
    assert fits_16_bits(bounded)


@pytest.mark.parametrize("raw", [b"", b"no model", b"\x08\xff\xff"])
def test_what_is_no_model_is_not_shown_to_fit(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(raw)
    assert fits_16_bits(tmp_path / "model.onnx") == (raw == b"")  # an empty file is a model without layers
    assert not fits_16_bits(tmp_path / "absent.onnx")


def test_a_float_model_multiplies_nothing_in_8_bits(tmp_path: Path) -> None:
    assert fits_16_bits(networks.classifier(tmp_path / "fp32.onnx"))
    assert fits_16_bits(networks.half(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx"))


def test_the_quantizer_of_onnxruntime_stays_within_the_range(tmp_path: Path) -> None:
    fp32 = networks.classifier(tmp_path / "fp32.onnx")
    assert fits_16_bits(networks.int8(fp32, tmp_path / "7.onnx", weight_bits=7))
    assert not fits_16_bits(networks.int8(fp32, tmp_path / "8.onnx"))


@pytest.mark.parametrize(("weight", "is_exact"), [(LARGEST_WEIGHT, None), (LARGEST_WEIGHT + 1, "1")])
def test_onnxruntime_takes_its_slower_mode_only_where_sums_may_be_clipped(
    bounded: Path, monkeypatch: pytest.MonkeyPatch, weight: int, is_exact: str | None
) -> None:
    import onnxruntime

    model = onnx.load(bounded)
    set_weights(weight)(model)
    bounded.write_bytes(model.SerializeToString())
    options: list[Any] = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, asked, **more: options.append(asked) or real(path, asked, **more))
    for module in ("onnxruntime", "cpu_features"):
        monkeypatch.setattr(f"appliance.runtime.{module}.saturates", lambda: True)
    open_runtime(bounded, Spec(), Candidate("onnxruntime", "model.onnx", "int8", CPU, 1)).close()
    if is_exact is None:
        with pytest.raises(RuntimeError):
            options[0].get_session_config_entry("session.x64quantprecision")
    else:
        assert options[0].get_session_config_entry("session.x64quantprecision") == is_exact
