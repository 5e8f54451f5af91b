"""What the tests of tuning need: bundles with variants that are right, wrong, slow, endless, or no model at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.activation_box import change_manifest


def add_variant(bundle: Path, precision: str, change: Callable[[Any], object] = lambda _model: None, *, tolerance: float = 0.01) -> Path:
    """Give a bundle another variant: its float model, changed, under another precision. Returns the file."""
    import onnx

    model = onnx.load(bundle / "model_fp32.onnx")
    change(model)
    onnx.checker.check_model(model)
    path = bundle / f"model_{precision}.onnx"
    onnx.save(model, path)
    _list(bundle, path, precision, tolerance)
    return path


def add_junk(bundle: Path, precision: str) -> Path:
    """Give a bundle a variant that no runtime can load."""
    path = bundle / f"model_{precision}.onnx"
    path.write_bytes(b"junk")
    _list(bundle, path, precision, 0.01)
    return path


def _list(bundle: Path, path: Path, precision: str, tolerance: float) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def change(manifest: dict[str, Any]) -> None:
        manifest["variants"].append({"precision": precision, "file": path.name, "sha256": digest, "recipe": "tests", "gate": "gate.json"})
        for golden in manifest["golden"]:
            golden["tolerance"][precision] = tolerance

    change_manifest(bundle, change)


def not_on(bundle: Path, precision: str, *runtimes: str) -> None:
    """Say in the manifest that a variant failed on these runtimes when it was made."""
    change_manifest(
        bundle, lambda manifest: [item.update(not_on=list(runtimes)) for item in manifest["variants"] if item["precision"] == precision]
    )


def wrong(model: Any) -> None:
    """Every answer is off: the map is moved by so much that no golden case comes out."""
    _through(model, lambda graph: ("Add", _constant(graph, "off", np.float32(1.0))))


def not_a_number(model: Any) -> None:
    """Half precision that overflows: infinity less infinity."""
    _through(model, lambda graph: ("Mul", _constant(graph, "inf", np.float32(np.inf))))


def slow(model: Any, rounds: int = 40_000) -> None:
    """Right, but it goes round and round before it says so."""
    from onnx import TensorProto, helper

    graph = model.graph
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Sin", ["value"], ["value_next"])],
        "round",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), helper.make_tensor_value_info("value_next", TensorProto.FLOAT, [])],
    )
    times, yes = _constant(graph, "times", np.int64(rounds)), _constant(graph, "yes", np.bool_(True))
    zero = _constant(graph, "zero_f", np.float32(0))
    graph.node.insert(0, helper.make_node("Loop", [times, yes, zero], ["extra"], body=body))
    _through(model, lambda _graph: ("Add", "extra"))


def endless(model: Any) -> None:
    """It never answers."""
    slow(model, 2**62)


def _through(model: Any, what: Callable[[Any], tuple[str, str]]) -> None:
    """Lead the model's ``cam``, and with it the probability, through one more node."""
    from onnx import helper

    graph = model.graph
    kind, other = what(graph)
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == "cam":
                node.output[index] = "cam_plain"
    position = next(index for index, node in enumerate(graph.node) if "cam_plain" in node.output) + 1
    graph.node.insert(position, helper.make_node(kind, ["cam_plain", other], ["cam"]))


def _constant(graph: Any, name: str, value: Any) -> str:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def table_of(report: str) -> list[dict[str, Any]]:
    """The table in a stored self-test."""
    rows: list[dict[str, Any]] = json.loads(report)["table"]
    return rows


def brief(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int, int], tuple[str, str]]:
    """A table as (runtime, precision, threads, batch) -> (state, code)."""
    return {
        (row["candidate"]["runtime"], row["candidate"]["precision"], row["candidate"]["threads"], row["candidate"]["batch"]): (
            row["state"],
            row["code"],
        )
        for row in rows
    }
