"""A small model that really tells pictures apart, and sets of pictures for it: what the quantizer's tests work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from quantize.draft import Draft
from quantize.gate import predictions
from quantize.gate.predictions import REFERENCE, RuntimeTarget
from quantize.gate.verdicts import Limits
from quantize.pipeline import BundleRecipe, run
from quantize.recipes import int8
from quantize.recipes.variant_makers import Maker, all_makers, int8_maker

SIDE = 32
CHANNELS = 12
RIDGE = 0.02

FP16 = all_makers()[0]
INT8 = int8_maker(next(recipe for recipe in int8.recipes() if recipe.name == "unsigned-chained-percentile"))
# The small model needs tens of microseconds per image: whether int8 is faster on it is chance, and not what these tests check.
NO_SCORE_LIMIT = Limits(score=1.0)

DRAFT = """\
name = "tiny-model"
version = "1.0.0"
task = "classification"
change_kind = "algorithm"
licence = "Apache-2.0"
min_appliance_version = "0.1.0"
title = { zh = "小模型", en = "Tiny model" }
intended_use = { zh = "仅供测试", en = "For tests only" }

[[labels]]
name = "spot"
title = { zh = "斑点", en = "Spot" }
code = { scheme = "SCT", value = "125605004", meaning = "Spot" }

[[operating_points]]
label = "spot"
sensitivity = 0.9

[applies_to]
modality = ["CR"]
sop_class_uid = ["1.2.840.10008.5.1.4.1.1.1"]
body_part = ["CHEST"]
view_position = ["PA"]
when_body_part_absent = "assume"
assumed_body_part = "CHEST"
when_view_absent = "assume"
assumed_view = "PA"
age = { min_years = 0.0, max_years = 99.0, outside = "caution", absent = "caution", note = { zh = "无", en = "none" } }

[input]
name = "image"
layout = "NCHW"
dtype = "float32"
channels = 1
height = 32
width = 32
pipeline = [
  { step = "modality_lut" }, { step = "voi", default = "minmax" }, { step = "monochrome2" }, { step = "to_uint8" },
  { step = "letterbox", fill = 0, align = "center" },
  { step = "resize", height = 32, width = 32, filter = "antialias_bilinear" }, { step = "scale", divide_by = 255.0 },
]

[[outputs]]
name = "probability"
kind = "probability"
shape = ["n", 1]

[training_data]
n_images = 1
description = { zh = "合成", en = "synthetic" }
sources = [{ name = "drawn", n_images = 1, licence = "Apache-2.0" }]
"""


def picture(rng: np.random.Generator, ill: bool) -> NDArray[np.uint8]:
    """Noise, with a bright spot where it is ill; some spots are faint, so that no model is perfect."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    x, y = rng.uniform(8, SIDE - 8, 2)
    spot = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18) * rng.uniform(20, 160) if ill else 0.0
    return np.asarray(np.clip(60 + 22 * rng.standard_normal((SIDE, SIDE)) + spot, 0, 255), np.uint8)


def write_set(directory: Path, count: int, seed: int, *, labels: bool = True) -> Path:
    """Write pictures, every other one ill, and their ``labels.csv``."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = ["file,spot,source,patient"]
    for number in range(count):
        Image.fromarray(picture(rng, number % 2 == 1)).save(directory / f"{number:04d}.png")
        lines.append(f"{number:04d}.png,{number % 2},{'town' if number % 3 else 'village'},{seed}-{number}")
    if labels:
        (directory / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def write_model(path: Path, seed: int = 5) -> Path:
    """Write a network of two convolutions, pooling and a linear layer fitted to the spots; it has no activation map yet."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((CHANNELS, 1, 5, 5)) / 5, "b1": rng.standard_normal(CHANNELS) * 0.1,
        "w2": rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 10, "b2": rng.standard_normal(CHANNELS) * 0.1,
        "w3": np.zeros((1, CHANNELS)), "b3": np.zeros(1),
    }  # fmt: skip
    model = _model(weights)
    images = [picture(rng, number % 2 == 1) for number in range(400)]
    features = _run(model, "pooled", np.stack(images)[:, None].astype(np.float32) / 255)
    flat = np.concatenate([features.reshape(len(images), -1), np.ones((len(images), 1))], axis=1)
    middle, wanted = flat.mean(0), np.where(np.arange(400) % 2 == 1, 3.0, -3.0)
    apart = flat - middle
    # Ridge regression: large weights that cancel each other would not survive 8 bits.
    fitted = np.linalg.solve(apart.T @ apart + RIDGE * np.eye(len(middle)), apart.T @ wanted)
    weights["w3"], weights["b3"] = fitted[None, :-1], np.array([-(middle @ fitted)])
    onnx.save(_model(weights), path)
    return path


def _model(weights: dict[str, Any]) -> Any:
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], "first", pads=[2, 2, 2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "second", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logit"], "linear", transB=1),
        helper.make_node("Sigmoid", ["logit"], ["probability"], "sigmoid"),
    ]
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _run(model: Any, output: str, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    from quantize.graph.onnx_graph import session, with_outputs, with_shapes

    found: NDArray[np.float32] = session(with_outputs(with_shapes(model), [output])).run([output], {"image": tensor})[0]
    return found


def write_site(directory: Path) -> Path:
    """Write model, draft and both sets into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    write_model(directory / "float.onnx")
    (directory / "draft.toml").write_text(DRAFT, encoding="utf-8")
    Draft.parse(DRAFT.encode())
    write_set(directory / "calibration", 40, seed=1, labels=False)
    write_set(directory / "evaluation", 150, seed=2)
    return directory


def only_onnxruntime() -> tuple[list[RuntimeTarget], dict[str, str]]:
    """Stand in for ``predictions.runtime_targets`` where a second runtime proves nothing more."""
    return [REFERENCE], dict.fromkeys(("openvino", "tensorrt", "triton"), "left out by the test")


def run_with_only_onnxruntime(site: Path, out: Path, *makers: Maker) -> None:
    """Make a bundle in a process of its own that may be killed."""
    predictions.runtime_targets = only_onnxruntime
    run(recipe(site, out, *makers))


def recipe(site: Path, out: Path, *makers: Maker, **more: Any) -> BundleRecipe:
    """Return the recipe of a bundle made from the files that ``write_site`` wrote."""
    given = {"makers": makers, "limits": NO_SCORE_LIMIT, **more}
    return BundleRecipe(site / "float.onnx", site / "draft.toml", site / "calibration", site / "evaluation", out, **given)
