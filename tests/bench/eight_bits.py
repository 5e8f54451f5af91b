"""What int8 gains on this processor in processor time: ONNX Runtime and OpenVINO, float and int8 with weights of 7 and of 8 bits.

One thread each, in turns, and the time that the processor spent on the call instead of the time on the clock: what else the machine does
changes it little, so the ratios of one run can be compared even on a busy machine. The clock decides on the box (``--only runtimes``).
Weights of 8 bits are there to compare: on a processor without VNNI ONNX Runtime adds them in its slower, exact mode, and OpenVINO is
refused them (``appliance.runtime.weight_range``).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from appliance.core.errors import InferenceError
from appliance.runtime import CPU, Candidate, Runtime, open_runtime
from appliance.runtime.availability import available
from appliance.tuning.candidate_process import CandidateProcess
from tests.bench.networks import NETWORKS
from tests.bench.runtimes import Input, pictures

_ROUNDS: Final = 9
_CALIBRATION: Final = 4
# The recipes whose graphs differ; the ways to choose ranges do not change the time.
_RECIPES: Final = ("unsigned-weighted", "unsigned-everything", "symmetric")


def run(directory: Path) -> list[dict[str, Any]]:
    """Measure every network: rows with ``name``, ``measured`` (times as fast as ONNX Runtime in float), ``unit`` and ``note``."""
    directory.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for title, shape, path in _networks(directory):
        print(f"measuring {title} ...", file=sys.stderr)
        for row in _rows(title, Input("image", shape), _files(path, shape)):
            print(f"  {row['name']}: {row['note']}", file=sys.stderr)
            rows.append(row)
    return rows


def _networks(directory: Path) -> Iterator[tuple[str, tuple[int, ...], Path]]:
    from appliance.lifecycle.model_control import reference_bundle
    from model_sync.bundle import ModelBundle

    bundle = ModelBundle.load(reference_bundle())
    yield "reference model", bundle.manifest.image_input.shape, _copy(bundle.path(bundle.variant("fp32").file), directory / "reference")
    for title, (build, shape) in NETWORKS.items():
        path = directory / build.__name__ / "fp32.onnx"
        path.parent.mkdir()
        path.write_bytes(build().SerializeToString())
        yield title, shape, path


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    (target / "fp32.onnx").write_bytes(source.read_bytes())
    return target / "fp32.onnx"


def _files(path: Path, shape: tuple[int, ...]) -> list[tuple[str, str, Path]]:
    """Name, precision and file of the float network and of its int8 variants."""
    from quantize.graph import onnx_graph
    from quantize.recipes import int8

    model = onnx_graph.clean_up(onnx.load(path))
    calibration = int8.calibrate(model, [*pictures(shape, _CALIBRATION, seed=1)[:, None]])
    files = [("fp32", "fp32", path)]
    for recipe in int8.recipes():
        if recipe.method == "minmax" and recipe.name.startswith(_RECIPES):
            out = path.with_name(f"{recipe.name}.onnx")
            int8.quantize(model, recipe, calibration, out)
            kind = recipe.name.removesuffix("-minmax").removesuffix("-7bit")
            files.append((f"{kind}, {recipe.weight_bits}-bit weights", "int8", out))
    return files


def _rows(title: str, spec: Input, files: list[tuple[str, str, Path]]) -> Iterator[dict[str, Any]]:
    tensor = np.ascontiguousarray(pictures(spec.shape, 1, seed=2))
    opened: dict[tuple[str, str], Runtime] = {}
    for name, precision, path in files:
        for entry in available():
            if entry.runtime not in ("onnxruntime", "openvino") or not entry.providers:
                continue
            candidate = Candidate(entry.runtime, path.name, precision, CPU if entry.runtime == "onnxruntime" else "CPU", threads=1)
            try:
                with CandidateProcess(path, spec, candidate, deadline_s=600.0) as attempt:  # a compiler may end its process
                    attempt.load()
            except InferenceError as error:
                yield _row(f"{title}: {entry.runtime} {name}", None, f"{error.code} {error.detail}")
                continue
            opened[entry.runtime, name] = open_runtime(path, spec, candidate)
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in opened}
    for number in range(_ROUNDS):
        for key in [*list(opened)[number % len(opened) :], *list(opened)[: number % len(opened)]]:
            opened[key].infer({"image": tensor})  # nobody starts with another's data in the cache
            spent[key].append(_processor_ms(opened[key], tensor))
    base = spent["onnxruntime", "fp32"]
    for (runtime, name), values in spent.items():
        note = f"{statistics.median(values):.1f} ms of one core, least {min(values):.1f} ms ({min(base) / min(values):.2f} x)"
        yield _row(f"{title}: {runtime} {name}", statistics.median(base) / statistics.median(values), note)
    for runtime_opened in opened.values():
        runtime_opened.close()


def _processor_ms(runtime: Runtime, tensor: Any) -> float:
    started = time.process_time()
    runtime.infer({"image": tensor})
    return (time.process_time() - started) * 1000


def _row(name: str, measured: float | None, note: str) -> dict[str, Any]:
    return {"name": name, "measured": measured, "unit": "x", "target": None, "least": True, "note": note}
