"""What the tests of tuning need: bundles with variants that are right, wrong, slow, endless, or no model at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from appliance.core.settings import Settings
from tests.support.activation_box import change_manifest


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


def command(settings: Settings, *arguments: str, language: str = "C.UTF-8") -> subprocess.CompletedProcess[str]:
    """``appliance tune ...`` on a box."""
    line = [sys.executable, "-m", "appliance", "tune", *arguments, "--data-dir", str(settings.data_dir)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": language}, timeout=200)


# -- networks of their own, without a bundle -------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """The fields of ``model_sync.bundle.Variant`` that tuning uses."""

    precision: str
    file: str
    not_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """What every network of these takes: ``x``, float32 [n, 4]; it answers ``cam``, [n, 4]."""

    name: str = "x"
    shape: tuple[int, ...] = (4,)


def network(path: Path, change: Callable[[Any], object] = lambda _model: None, row: Callable[[Any], None] | None = None) -> Path:
    """A network that answers what it is given, [n, 4], changed by ``change`` (such as :func:`slow`) and made by ``row`` where given."""
    import onnx
    from onnx import TensorProto, helper

    given, said = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "cam"))
    graph = helper.make_graph([], "small", [given], [said])
    (row or (lambda graph: add_node(graph, "Identity", ["x"], "cam")))(graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    change(model)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def add_node(graph: Any, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
    """Another node at the end."""
    from onnx import helper

    graph.node.append(helper.make_node(kind, inputs, [output], **attributes))


def _parted(graph: Any) -> None:
    """``most``: all rows but the last; ``last``: the last."""
    start, less, none = (_constant(graph, name, np.array([value], np.int64)) for name, value in (("zero", 0), ("less", -1), ("end", 2**31)))
    add_node(graph, "Slice", ["x", start, less, start], "most")
    add_node(graph, "Slice", ["x", less, none, start], "last")


def rolled(graph: Any) -> None:
    """Every image gets the answer of the one before it, the first that of the last."""
    _parted(graph)
    add_node(graph, "Concat", ["last", "most"], "cam", axis=0)


def right_at_the_end(graph: Any) -> None:
    """Only the last image of several gets its answer."""
    _parted(graph)
    add_node(graph, "Mul", ["most", _constant(graph, "half", np.float32(0.5))], "halved")
    add_node(graph, "Concat", ["halved", "last"], "cam", axis=0)


def wrong_where_odd(graph: Any) -> None:
    """Right alone and for an even number of images, wrong for three, five and so on."""
    add_node(graph, "Shape", ["x"], "rows", start=0, end=1)
    one, two = _constant(graph, "one", np.array([1], np.int64)), _constant(graph, "two", np.array([2], np.int64))
    add_node(graph, "Mod", ["rows", two], "rest")
    add_node(graph, "Equal", ["rest", one], "odd")
    add_node(graph, "Greater", ["rows", one], "several")
    add_node(graph, "And", ["odd", "several"], "off")
    half, whole = _constant(graph, "half", np.array([0.5], np.float32)), _constant(graph, "whole", np.array([1.0], np.float32))
    add_node(graph, "Where", ["off", half, whole], "factor")
    add_node(graph, "Mul", ["x", "factor"], "cam")


def same_to_all(graph: Any) -> None:
    """One half, whatever it is given."""
    add_node(graph, "Mul", ["x", _constant(graph, "nothing", np.float32(0.0))], "none")
    add_node(graph, "Add", ["none", _constant(graph, "half", np.float32(0.5))], "cam")


def subject(directory: Path, files: Sequence[str], *, values: Sequence[float] = (0.3, 0.7), batches: Sequence[int] = ()) -> Any:
    """These files of a directory, ``<precision>.onnx`` or ``<precision>-<anything>.onnx``, with golden cases that answer these values."""
    from appliance.imaging.golden_cases import Case
    from appliance.tuning.measurement import Subject

    def case(value: float) -> Case:
        tensor = np.full((1, 4), value, np.float32)
        return Case(
            f"case-{value}",
            tensor,
            lambda infer: float(np.max(np.abs(infer(tensor)["cam"] - value))),
            dict.fromkeys(("fp32", "fp16", "int8"), 0.01),
        )

    variants = [Variant(file.split("-")[0].split(".")[0], file) for file in files]
    return Subject(Spec(), variants, lambda file: directory / file, [case(value) for value in values], batches)
