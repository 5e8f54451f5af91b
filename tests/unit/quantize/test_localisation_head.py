"""The head of the reference model that says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from appliance.lifecycle.model_control import reference_bundle
from model_sync.bundle import ModelBundle
from quantize.errors import QuantizeError
from quantize.reference import build, localisation_head

WEIGHTS = Path("models") / "cxr_pneumonia" / build.WEIGHTS


def run(path: Path, pictures: Any) -> tuple[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    probability, cam = session.run(["probability", "cam"], {"image": pictures})
    return probability, cam


def test_the_bundle_holds_the_trained_weights_with_the_committed_head(shared: Path, tmp_path: Path) -> None:
    bundle = ModelBundle.load(reference_bundle())
    composed = localisation_head.compose(shared / WEIGHTS, tmp_path / "model.onnx")
    pictures = np.random.default_rng(1).random((2, 1, 224, 224), dtype=np.float32)
    for ours, shipped in zip(run(composed, pictures), run(bundle.path(bundle.variant("fp32").file), pictures), strict=True):
        np.testing.assert_allclose(ours, shipped, rtol=1e-4, atol=1e-4)


def test_the_cells_add_up_to_the_probability(tmp_path: Path) -> None:
    bundle = ModelBundle.load(reference_bundle())
    pictures = np.random.default_rng(2).random((3, 1, 224, 224), dtype=np.float32)
    probability, cam = run(bundle.path(bundle.variant("fp32").file), pictures)
    assert cam.shape == (3, 1, 14, 14)
    logits = np.log(np.exp(cam.astype(np.float64)).mean((2, 3)))
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logits)), atol=1e-4)


def test_an_operator_of_another_domain_keeps_its_opset(shared: Path, tmp_path: Path) -> None:
    head = onnx.load(localisation_head.HEAD)
    head.opset_import.append(helper.make_opsetid("com.example", 3))
    onnx.save(head, tmp_path / "head.onnx")
    composed = onnx.load(localisation_head.compose(shared / WEIGHTS, tmp_path / "model.onnx", tmp_path / "head.onnx"))
    assert {entry.domain: entry.version for entry in composed.opset_import}["com.example"] == 3
    assert len(composed.opset_import) == 2


def test_weights_that_are_absent_or_of_another_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="not at"):
        localisation_head.compose(tmp_path / "absent.onnx", tmp_path / "out.onnx")
    value = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 224, 224])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 1, 224, 224])
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["out"])], "other", [value], [out])
    onnx.save(helper.make_model(graph), tmp_path / "x.onnx")
    with pytest.raises(QuantizeError, match="no tensor"):
        localisation_head.compose(tmp_path / "x.onnx", tmp_path / "out.onnx")
