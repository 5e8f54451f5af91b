"""Which way of running a model this box chooses, how much faster it is than ONNX Runtime in fp32, and what the port costs.

Every network is quantized by the quantizer's own recipes, tuned by the box's own tuner, and its choice then timed in turns with a bare
ONNX Runtime session of the float model on the same number of threads: one run, one machine, ratios. The session is set as ONNX Runtime
comes (memory arena, spinning threads) and as the box sets it, and the faster of the two is the opponent. The networks of
:mod:`tests.bench.networks` have random weights: no accuracy can be measured on them, so what counts as right is a difference to float of
at most ``_TOLERANCE`` of float's largest output. The reference model is the one the box carries, and its variants passed the gate.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.core.errors import InferenceError
from appliance.imaging.golden_cases import Case
from appliance.runtime import CPU, Runtime, open_runtime
from appliance.runtime.availability import no_gpu
from appliance.tuning.candidate_process import CandidateProcess
from appliance.tuning.selection import Selection
from appliance.tuning.tuner import Limits, Subject, tune
from tests.bench.networks import NETWORKS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from model_sync.bundle import ModelBundle

_TOLERANCE: Final = {"fp32": 0.001, "fp16": 0.05, "mixed": 0.2, "int8": 0.2}
_TARGETS: Final = {"reference model": 3.0, "ResNet-50 224²": 3.0, "DenseNet-121 224²": 2.5, "U-Net 512²": 3.5}
_CALIBRATION: Final = 4
_CASES: Final = 2
_ROUNDS: Final = 15
_TURN_MS: Final = 60.0
_MOST_PER_TURN: Final = 10
_PAIRS: Final = 200
_LIMITS: Final = Limits(seconds=240.0, measuring_s=60.0)
_FLAGS: Final = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Variant:
    """A file that the tuner tries; the fields of ``model_sync.bundle.Variant`` that tuning uses."""

    precision: str
    file: str
    not_on: Sequence[str] = ()


@dataclass(frozen=True)
class Input:
    """What a network takes; see ``appliance.runtime.TensorSpec``."""

    name: str
    shape: tuple[int, ...]


def run(directory: Path) -> list[dict[str, Any]]:
    """Everything, in a scratch directory: rows with ``name``, ``measured``, ``unit``, ``target``, ``least`` and ``note``."""
    directory.mkdir(parents=True)
    rows = []
    for title, subject, gate in _subjects(directory):
        print(f"tuning {title} ...", file=sys.stderr)
        try:
            choice = tune(subject, threads=_cores(), cache=directory / "cache", limits=_LIMITS)
        except InferenceError as error:
            rows.append(_row(title, None, "x", _TARGETS[title], least=True, note=f"nothing is right here: {error.code} {error.detail}"))
            continue
        rows.append(_race(title, subject, choice, gate))
        if title == "reference model":
            rows += [*_overheads(subject, choice), _batching(choice)]
        if title == "reference model" or any(row.candidate.runtime == "tensorrt" and row.candidate.file for row in choice.table):
            rows += _engines(title, choice)
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a Markdown table; one without a target is there to compare with."""
    print("\n| runtimes | measured | target | |\n|---|---|---|---|")
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.2f} {row['unit']}"
        target = "" if row["target"] is None else f"{'≥' if row['least'] else '≤'} {row['target']:g} {row['unit']}"
        print(f"| {row['name']} | {measured} | {target} | {row['note']} |")


def instructions() -> str:
    """The instructions of this processor that decide which precision is fast."""
    have = set(next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split())
    return ", ".join(f"{flag} {'yes' if flag in have else 'no'}" for flag in _FLAGS)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# -- what is measured ------------------------------------------------------------------------------------------------


def _subjects(directory: Path) -> Iterator[tuple[str, Subject, Callable[[Selection], str]]]:
    """Title, what the tuner is given, and what says how right the choice is."""
    from appliance.lifecycle.model_control import reference_bundle
    from model_sync.bundle import ModelBundle

    bundle = ModelBundle.load(reference_bundle())
    yield "reference model", replace(Subject.of_bundle(bundle), batches=(2, 4, 8)), lambda choice: _gate_of(bundle, choice)
    for title, (build, shape) in NETWORKS.items():
        room = directory / build.__name__
        room.mkdir()
        (room / "fp32.onnx").write_bytes(build().SerializeToString())
        yield title, Subject(Input("image", shape), _variants(room, shape), room.joinpath, _cases(room, shape), ()), _difference_of


def pictures(shape: tuple[int, ...], count: int, seed: int) -> NDArray[np.float32]:
    """Pictures [count, ...] in 0..1 of soft blocks under noise: white noise alone has no large structure, as no scan is."""
    draw = np.random.default_rng(seed)
    channels, height, width = shape
    blocks = np.kron(draw.random((count, channels, 8, 8)), np.ones((1, 1, height // 8, width // 8)))
    return (0.8 * blocks + 0.2 * draw.random((count, *shape))).astype(np.float32)


def _variants(room: Path, shape: tuple[int, ...]) -> list[Variant]:
    """The float network and what the quantizer's recipes make of it; entropy and percentile change the accuracy, not the time."""
    import onnx

    from quantize.graph import onnx_graph
    from quantize.recipes import fp16, int8

    model = onnx_graph.clean_up(onnx.load(room / "fp32.onnx"))
    tensors = [*pictures(shape, _CALIBRATION, seed=1)[:, None]]
    measured = int8.calibrate(model, tensors)
    variants = [Variant("fp32", "fp32.onnx")]
    if not no_gpu():  # on a CPU it is the float model with casts
        onnx.save(fp16.convert(model, frozenset()), room / "fp16.onnx")
        variants.append(Variant("fp16", "fp16.onnx"))
    for recipe in int8.recipes():
        if recipe.method == "minmax":
            file = f"{recipe.name}.onnx"
            int8.quantize(model, recipe, measured, room / file)
            variants.append(Variant(recipe.precision, file))
    return variants


def _cases(room: Path, shape: tuple[int, ...]) -> list[Case]:
    """Pictures that no range was measured on, with the float network's answers."""
    run = _bare(room / "fp32.onnx")[0]
    return [_case(f"picture {number}", tensor, run(tensor)) for number, tensor in enumerate(pictures(shape, _CASES, seed=2)[:, None])]


def _case(name: str, tensor: NDArray[np.float32], expected: NDArray[np.float32]) -> Case:
    def difference(infer: Any) -> float:
        return float(np.max(np.abs(infer(tensor)["output"] - expected)) / np.max(np.abs(expected)))

    return Case(name, tensor, difference, _TOLERANCE)


def _difference_of(choice: Selection) -> str:
    difference, allowed = choice.chosen.max_difference or 0.0, _TOLERANCE[choice.candidate.precision]
    return f"off by {difference:.1%} of the largest output (allowed {allowed:.1%})"


def _gate_of(bundle: ModelBundle, choice: Selection) -> str:
    """What the bundle's gate measured of the chosen file on the chosen runtime."""
    record = json.loads(bundle.path("gate.json").read_text("utf-8"))["variants"][choice.candidate.precision]
    measured = record.get("files", {}).get(choice.candidate.file, {}).get("runtimes", {}).get(choice.candidate.runtime)
    if measured is None:
        return f"gate passed: {record['passed']}"
    found = []
    for label, figures in measured["labels"].items():
        sources = [abs(one["auc"] - one["auc_float"]) for one in figures["per_source"] if one["gated"]]
        found.append(f"{label}: AUC off by {figures['auc_difference']:.4f}, {max(sources, default=0.0):.4f} in the worst large source")
    return f"gate passed: {measured['passed']} ({'; '.join(found)})"


# -- the race --------------------------------------------------------------------------------------------------------


def _bare(path: Path) -> list[Callable[[NDArray[np.float32]], NDArray[np.float32]]]:
    """The float model in bare sessions on all cores: as ONNX Runtime comes, and as the box's adapter sets it."""
    import onnxruntime as ort

    made: list[Callable[[NDArray[np.float32]], NDArray[np.float32]]] = []
    for quiet in (False, True):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = _cores()
        if quiet:
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(str(path), options, providers=[CPU])
        name = session.get_inputs()[0].name
        made.append(lambda tensor, session=session, name=name: session.run(None, {name: tensor})[0])  # type: ignore[misc]
    return made


def _race(title: str, subject: Subject, choice: Selection, gate: Callable[[Selection], str]) -> dict[str, Any]:
    """The choice and the float sessions by turns; each turn begins with a call that is not counted, so that nobody starts cold."""
    tensor = subject.cases[0].tensor
    plain = next(variant for variant in subject.variants if variant.precision == "fp32")
    racers = [_timer(run, tensor) for run in _bare(subject.path(plain.file))]
    single = replace(choice.candidate, batch=1)
    with CandidateProcess(subject.path(single.file), subject.input, single, deadline_s=300.0) as attempt:
        attempt.load()
        racers.append(lambda repeat: attempt.time(tensor, repeat))
        repeats = [max(1, min(_MOST_PER_TURN, round(_TURN_MS / statistics.median(racer(3))))) for racer in racers]
        turns: list[list[float]] = [[] for _ in racers]
        least = [math.inf] * len(racers)
        for number in range(_ROUNDS if min(repeats) > 1 else _ROUNDS // 3):
            for index in sorted(range(len(racers)), key=lambda index: (index + number) % len(racers)):
                times = racers[index](repeats[index] + 1)[1:]
                turns[index].append(statistics.median(times))
                least[index] = min(least[index], *times)
    *floats, ours = (statistics.median(medians) for medians in turns)
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(choice.chosen.layers.items()))
    notes = [
        f"{choice.candidate.runtime} {choice.candidate.file}",
        layers,
        gate(choice),
        f"fastest calls {min(least[:-1]) / least[-1]:.2f} x",
    ]
    name = f"{title}: ONNX Runtime fp32 {min(floats):.1f} ms / tuned choice {ours:.2f} ms"
    row = _row(name, min(floats) / ours, "x", _TARGETS[title], least=True, note="; ".join(filter(None, notes)))
    return row | {"float_ms": floats, "table": [entry.to_json() for entry in choice.table]}


def _row(
    name: str, measured: float | None, unit: str, target: float | None = None, *, least: bool = False, note: str = ""
) -> dict[str, Any]:
    """A line of the table; ``target`` is the least that ``measured`` should be, or the most."""
    return {"name": name, "measured": measured, "unit": unit, "target": target, "least": least, "note": note}


def _timer(run: Callable[[NDArray[np.float32]], object], tensor: NDArray[np.float32]) -> Callable[[int], list[float]]:
    def timed(repeat: int) -> list[float]:
        times = []
        for _ in range(repeat):
            started = time.perf_counter()
            run(tensor)
            times.append((time.perf_counter() - started) * 1000)
        return times

    return timed


# -- the port --------------------------------------------------------------------------------------------------------


def _overheads(subject: Subject, choice: Selection) -> Iterator[dict[str, Any]]:
    """What an adapter adds to its runtime's own call: on the fastest variant, where it weighs most, call by call in turns."""
    tensor, name = subject.cases[0].tensor, subject.input.name
    for runtime in _INSIDE:
        rows = [row for row in choice.table if row.candidate.runtime == runtime and row.candidate.batch == 1 and row.median_ms is not None]
        if not rows:
            why = next((row.detail for row in choice.table if row.candidate.runtime == runtime), "")
            yield _row(f"{runtime}: adapter over the bare call", None, "%", note=f"not measured: {why}")
            continue
        candidate = min(rows, key=lambda row: row.median_ms or 0.0).candidate
        opened = open_runtime(subject.path(candidate.file), subject.input, candidate)
        adapter, bare = _timer(_through(opened, name), tensor), _timer(_INSIDE[runtime](opened), tensor)
        pairs = [(adapter(1)[0], bare(1)[0]) if number % 2 else (bare(1)[0], adapter(1)[0])[::-1] for number in range(_PAIRS)]
        opened.close()
        # What else the machine does only ever adds: the fifth-fastest of every 25 is nearer to the call's own time than the middle one.
        whole_ms, bare_ms = (sorted(times)[len(times) // 5] for times in zip(*pairs, strict=True))
        added_ms = whole_ms - bare_ms
        note = f"{1000 * added_ms:.0f} µs on {bare_ms:.2f} ms of {candidate.file}"
        yield _row(f"{runtime}: adapter over the bare call", 100 * added_ms / bare_ms, "%", 5.0, note=note)


def _through(opened: Runtime, name: str) -> Callable[[NDArray[np.float32]], object]:
    return lambda tensor: opened.infer({name: tensor})


def _inside_onnxruntime(opened: Any) -> Callable[[NDArray[np.float32]], object]:
    session = opened._session
    names, name = [item.name for item in session.get_outputs()], session.get_inputs()[0].name
    return lambda tensor: session.run(names, {name: tensor})


def _inside_openvino(opened: Any) -> Callable[[NDArray[np.float32]], object]:
    request = opened._requests[1]
    return lambda tensor: request.infer([tensor], share_inputs=True, share_outputs=True)


_INSIDE: Final = {"onnxruntime": _inside_onnxruntime, "openvino": _inside_openvino}
"""Runtime -> its own call, on the very model that the adapter has loaded."""


def _batching(choice: Selection) -> dict[str, Any]:
    """What an image in the best batch gains over one alone."""
    rows = [row for row in choice.table if row.candidate.batch > 1 and row.per_image_ms]
    single = next(row for row in choice.table if row.candidate == replace(choice.candidate, batch=1))
    tried = ", ".join(f"{row.per_image_ms:.2f} ms by {row.candidate.batch}" for row in rows)
    best = min((row.per_image_ms for row in rows if row.per_image_ms), default=None)
    gain = single.median_ms / best if best and single.median_ms else None
    return _row("an image alone / in a batch", gain, "x", note=f"{single.median_ms:.2f} ms alone; {tried or 'no batch was right'}")


def _engines(title: str, choice: Selection) -> Iterator[dict[str, Any]]:
    """Every engine on a GPU, with what it took to build it; or the words why there is none."""
    for row in choice.table:
        if row.candidate.runtime != "tensorrt":
            continue
        built = f"built and loaded in {row.load_ms / 1000:.0f} s; " if row.load_ms else ""
        yield _row(
            f"{title}: tensorrt {row.candidate.file}".rstrip(), row.median_ms, "ms", note=f"{built}{row.state}: {row.detail or row.code}"
        )
