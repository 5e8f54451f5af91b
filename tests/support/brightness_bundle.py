"""A bundle whose model tells the tissues of the phantom head by their brightness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from appliance.imaging.volumes.geometry import Grid
from model_sync.bundle import GoldenVolume, ModelBundle
from tests.support import series as made_up
from tests.support import volume_bundle

STEPS = {"scale": [{"step": "clip", "low": 0.0, "high": 5000.0}], "min_slices": 8, "spacing": (2.0, 2.0, 2.0), "apart": 6.0}


def brightness_model() -> bytes:
    """ONNX that tells tissues by brightness: white matter above 620, grey matter above 100."""
    nodes = [
        helper.make_node("Mul", ["volume", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "half"], ["background"]),
        helper.make_node("Greater", ["volume", "high"], ["is_white"]),
        helper.make_node("Cast", ["is_white"], ["one_white"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["one_white", "two"], ["white"]),
        helper.make_node("Greater", ["volume", "low"], ["is_grey"]),
        helper.make_node("Cast", ["is_grey"], ["grey"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["background", "white", "grey"], ["logits"], axis=1),
    ]
    numbers = {"zero": 0.0, "half": 0.5, "high": 620.0, "two": 2.0, "low": 100.0}
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in numbers.items()]
    graph = helper.make_graph(
        nodes, "brightness", [helper.make_tensor_value_info("volume", TensorProto.FLOAT, ["n", 1, "d", "h", "w"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3, "d", "h", "w"])], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def golden_volume(shape: tuple[int, int, int] = (18, 20, 22)) -> GoldenVolume:
    """The phantom head and its tissues by brightness, 2 mm."""
    grid = Grid(shape, np.array([[0, 0, 2.0, -20], [0, 2.0, 0, -18], [-2.0, 0, 0, 20], [0, 0, 0, 1]]))
    values = made_up.head(grid.to_patient(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))).astype(np.float32)
    mask = np.select([values > 620, values > 100], [1, 2], 0).astype(np.uint8)
    return GoldenVolume("head", values, grid.affine, mask, {"white_matter": 1.0, "grey_matter": 1.0}, {"fp32": 0.01})


def write_bundle(directory: Path, version: str = "1.0.0", **changes: Any) -> ModelBundle:
    """A bundle of :func:`brightness_model` in a directory; ``changes`` are fields of its manifest."""
    case = golden_volume()
    volume_bundle.write(
        directory, brightness_model(), volume_bundle.golden_npz(case.values, case.affine, case.mask), version=version,
        **({"input": volume_bundle.volume_input(24, **STEPS)} | changes),
    )  # fmt: skip
    return ModelBundle.load(directory)
