"""The gate states both kinds of processor wherever it runs: what is measured, what is the same by arithmetic, what is simulated."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.runtime import CPU, Candidate, open_runtime
from appliance.runtime.weight_range import fits_16_bits
from quantize.errors import QuantizeError
from quantize.gate import processor_kinds
from quantize.gate.predictions import RuntimeTarget
from quantize.graph.float_simulation import simulate_in_float
from quantize.graph.onnx_graph import clean_up, initializers
from quantize.recipes.calibration import calibrate
from quantize.recipes.int8 import Recipe, quantize, recipes
from tests.support import small_networks
from tests.support.quantize_networks import dense, images, residual, unet

ORT, VINO = RuntimeTarget("onnxruntime", CPU), RuntimeTarget("openvino", "CPU")
GPU = RuntimeTarget("tensorrt", "GPU:0")
MINMAX = [recipe for recipe in recipes() if recipe.method == "minmax"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    fp32 = small_networks.classifier(folder / "fp32.onnx")
    return {bits: small_networks.int8(fp32, folder / f"{bits}.onnx", weight_bits=bits) for bits in (7, 8)}


# --- which evidence there is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saturates", "bits", "target", "evidence"),
    [
        (False, 7, ORT, {"exact": "measured", "saturating": "same"}),
        (False, 7, VINO, {"exact": "measured", "saturating": "same"}),
        (False, 8, ORT, {"exact": "measured", "saturating": "same"}),
        (False, 8, VINO, {"exact": "measured", "saturating": "refused"}),
        (True, 7, ORT, {"exact": "same", "saturating": "measured"}),
        (True, 7, VINO, {"exact": "same", "saturating": "measured"}),
        (True, 8, ORT, {"exact": "same", "saturating": "measured"}),
        (True, 8, VINO, {"exact": "simulated", "saturating": "refused"}),
        (True, 8, GPU, {}),
        (False, 8, RuntimeTarget("onnxruntime", "CUDAExecutionProvider"), {}),
    ],
)
def test_both_kinds_of_processor_have_a_result_on_either_kind_of_workbench(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch, saturates: bool, bits: int, target: RuntimeTarget, evidence: dict[str, str]
) -> None:
    monkeypatch.setattr(processor_kinds, "saturates", lambda: saturates)
    assert processor_kinds.find_evidence(files[bits], target) == evidence
    assert processor_kinds.kind_here() == ("saturating" if saturates else "exact")


# --- the simulation -------------------------------------------------------------------------------------------------


def save_quantized(net: Any, recipe: Recipe, folder: Path) -> Path:
    model = clean_up(net())
    quantize(model, recipe, calibrate(model, [images(8)]), folder / "int8.onnx")
    return folder / "int8.onnx"


@pytest.mark.parametrize("recipe", MINMAX, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("net", [residual, unet, dense])
def test_the_simulation_computes_what_the_quantized_graph_defines(net: Any, recipe: Recipe, tmp_path: Path) -> None:
    path = save_quantized(net, recipe, tmp_path)
    simulated = simulate_in_float(onnx.load(path))
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in simulated.graph.node}
    assert {tensor.data_type for tensor in simulated.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    onnx.save(simulated, tmp_path / "float.onnx")
    tensor = images(2, seed=3)
    right = small_networks.run_node_by_node(path, tensor)
    found = small_networks.run_node_by_node(tmp_path / "float.onnx", tensor)
    for name, expected in right.items():
        assert np.abs(found[name] - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("recipe", MINMAX, ids=lambda recipe: recipe.name)
def test_a_recipe_of_7_bits_fits_and_one_of_8_does_not(recipe: Recipe, tmp_path: Path) -> None:
    path = save_quantized(residual, recipe, tmp_path)
    assert fits_16_bits(path) == (recipe.weight_bits == 7)
    weights = [value for value in initializers(onnx.load(path)).values() if value.dtype == np.int8 and value.ndim > 1]
    assert max(int(np.abs(value.astype(int)).max()) for value in weights) == (64 if recipe.weight_bits == 7 else 127)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_multiplies_nothing_of_the_simulation_in_8_bits(files: dict[int, Path], tmp_path: Path) -> None:
    """Else its sums might be clipped after all: it recognises many forms of quantization."""
    onnx.save(simulate_in_float(onnx.load(files[8])), tmp_path / "float.onnx")
    runtime = open_runtime(tmp_path / "float.onnx", small_networks.Spec(), Candidate("openvino", "float.onnx", "fp32", "CPU", 1))
    assert set(runtime.describe()["layers"]) == {"f32"}
    tensor = small_networks.pictures(1)
    right, found = small_networks.run_node_by_node(files[8], tensor), runtime.infer({"image": tensor})
    runtime.close()
    for name, expected in right.items():
        assert np.abs(found[name] - expected).max() <= 0.02 * np.abs(expected).max()  # single values on a tie of the rounding


def change_to_channels(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    scale.CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), scale.name))


def change_to_16_bits(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    model.graph.initializer.append(numpy_helper.from_array(np.uint16(0), "zero16"))
    node.input[2] = "zero16"


@pytest.mark.parametrize("change", [change_to_channels, change_to_16_bits])
def test_what_is_not_simulated_is_refused(files: dict[int, Path], change: Any) -> None:
    model = onnx.load(files[8])
    change(model)
    with pytest.raises(QuantizeError, match="per channel or not to 8 bits"):
        simulate_in_float(model)


def test_a_graph_without_zero_points_is_simulated(tmp_path: Path) -> None:
    """ONNX, QuantizeLinear: without a zero point it is 0 and the type is uint8."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "step"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "step"], ["y"], name="d"),
    ]
    shape = ("n", small_networks.CHANNELS, small_networks.SIDE, small_networks.SIDE)
    outputs = [small_networks.value("y", shape)]
    path = small_networks.save(tmp_path / "q.onnx", nodes, outputs, shape, [small_networks.constant("step", np.float32(0.25))])
    onnx.save(simulate_in_float(onnx.load(path)), tmp_path / "float.onnx")
    tensor = np.float32([-1, 0.125, 0.375, 0.4, 70]).repeat(154)[: 3 * 256].reshape(1, 3, 16, 16)
    right = small_networks.run_node_by_node(path, tensor)["y"]
    assert np.array_equal(small_networks.run_node_by_node(tmp_path / "float.onnx", tensor)["y"], right)
