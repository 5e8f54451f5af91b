"""A bundle whose input check judges the chest phantom by its brightness: above and below, left and right, and as a whole."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydicom.dataset import FileDataset

from quantize.reference.phantom import Phantom, dataset
from tests.support.activation_box import change_manifest
from tests.support.library_site import tiny_bundle

SIDE = 64
CLASSES = ["upright", "turned_90", "turned_180", "turned_270", "negative", "other"]
PIPELINE: list[dict[str, Any]] = [
    {"step": "modality_lut"}, {"step": "voi", "default": "percentile"}, {"step": "monochrome2"}, {"step": "to_uint8"},
    {"step": "letterbox", "fill": 0, "align": "center"},
    {"step": "resize", "height": SIDE, "width": SIDE, "filter": "antialias_bilinear"}, {"step": "scale", "divide_by": 255.0},
]  # fmt: skip

# The manifest's ``input_check`` without its file.
RECORD: dict[str, Any] = {
    "output": "probabilities", "classes": CLASSES, "min_upright": 0.5, "measured_on": "phantoms", "figures": [],
    "input": {"name": "image", "layout": "NCHW", "dtype": "float32", "channels": 1, "height": SIDE, "width": SIDE, "pipeline": PIPELINE},
}  # fmt: skip


def write_network(path: Path, *, classes: int = len(CLASSES), upright: float = 0.0) -> None:
    """Write a network of one linear layer: the phantom is brighter below than above, and darker than half.

    ``upright`` is the bias of that class: -1e6 stops every image, 1e6 none.
    """
    mean = np.full((SIDE, SIDE), 1 / SIDE**2, np.float32)
    below, right = mean.copy(), mean.copy()
    below[: SIDE // 2] *= -1
    right[:, : SIDE // 2] *= -1
    # Logits: the content of the phantom is brighter below by about 0.06, turned by 90 degrees clockwise on the left, and so on.
    rows = [0 * mean, -400 * right, -400 * below, 400 * right, 1000 * mean, -1000 * mean]
    bias = np.array([upright, -12, -12, -12, -530, 50], np.float32)[:classes]
    weights = np.stack([row.ravel() for row in rows], axis=1)[:, :classes].astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "check",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", classes])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def add_input_check(bundle: Path, **network: Any) -> Path:
    """Add the input check to a bundle, in schema 2; ``network`` as in :func:`write_network`."""
    path = bundle / "input_check.onnx"
    write_network(path, **network)
    own = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return change_manifest(bundle, lambda manifest: manifest.update(schema=2, min_appliance_version="0.2.0", input_check=RECORD | own))


def checked_bundle(directory: Path, version: str = "1.0.0", **options: Any) -> Path:
    """A tiny bundle with an input check, which lets the golden cases of this seed through."""
    return add_input_check(tiny_bundle(directory, version, seed=10), **options)


def film(*, turns: int = 0, negative: bool = False, seed: int = 1, **attributes: Any) -> FileDataset:
    """A chest phantom of 256 x 256 pixels, turned clockwise by ``turns`` quarters without a word in its header."""
    ds = dataset(Phantom(rows=256, cols=256, seed=seed), name=f"film-{turns}-{negative}-{seed}")
    values = np.rot90(ds.pixel_array, -turns)
    if negative:
        values = 2**ds.BitsStored - 1 - values
    ds.PixelData = values.astype(np.uint16).tobytes()
    ds.PatientOrientation = attributes.pop("PatientOrientation", None)
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds
