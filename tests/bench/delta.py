"""``python -m tests.bench.delta``: what a model update costs on the wire, and what rebuilding it costs the box.

The models are made here, the same ones each time: convolutions and linear layers with normal weights of the usual spread
(standard deviation sqrt(2 / fan-in)), 28 MB of them. Fine-tuning is noise on the float weights:

- ``1e-3``: N(0, 1e-3) on every weight. This is what the requirement's table shows: 6.8-8.1 MB of 28 are 2 to 2.3 bits per
  weight, the entropy of a change by about one int8 step, and a step here is 0.0005 to 0.001.
- ``1e-3 of sigma``: N(0, 1e-3 x the layer's standard deviation), thirty times less.

int8 weights are quantized per output channel, and after fine-tuning again, with the same scales or with new ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from model_sync.delta.codec import best

ROOT = Path(__file__).resolve().parents[2]
_REFERENCE = ROOT / "appliance" / "bundles" / "cxr-pneumonia"
_WEIGHT_BYTES = 28_000_000
_DECODE_RUNS = 5
Array = NDArray[Any]
Change = Callable[[np.random.Generator, Array, float], Array]  # generator, a layer's weights, share of the weights before it

# (out, in, kernel): a residual network's stages, then linear layers; kernel 0 is linear. 28.0 million weights.
_LAYERS = [
    *[(64, 1, 7), *[(64, 64, 3)] * 4, (128, 64, 3), *[(128, 128, 3)] * 3, (256, 128, 3), *[(256, 256, 3)] * 5, (512, 256, 3)],
    *[*[(512, 512, 3)] * 5, (1024, 512, 1), (4096, 1024, 0), (1024, 4096, 0), (1024, 1024, 0), (1024, 1024, 0), (14, 1024, 0)],
]


def weights(width: int) -> list[Array]:
    """Return float32 layers that take 28 MB at ``width`` bytes per weight."""
    rng = np.random.default_rng(20240229)
    layers, total = [], 0
    for out, into, kernel in _LAYERS:
        row = (into, kernel, kernel) if kernel else (into,)
        shape = (min(out, (_WEIGHT_BYTES // width - total) // math.prod(row)), *row)  # the last layer is cut to measure
        if shape[0]:
            layers.append((rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))).astype(np.float32))
            total += layers[-1].size
    return layers


def everywhere(size: float, of_sigma: bool = False) -> Change:
    """Return a fine-tuning that moves every weight by N(0, size), or by that much of the layer's standard deviation."""
    return lambda rng, layer, _: layer + (rng.standard_normal(layer.shape) * size * (layer.std() if of_sigma else 1)).astype(np.float32)


def last_part(share: float, size: float) -> Change:
    """Return a fine-tuning that moves only the last ``share`` of the weights, in the order of the file."""

    def change(rng: np.random.Generator, layer: Array, start: float) -> Array:
        total = sum(math.prod((out, into, max(1, kernel) ** 2)) for out, into, kernel in _LAYERS)
        place = start + np.arange(layer.size).reshape(layer.shape) / total
        return layer + (rng.standard_normal(layer.shape) * size * (place >= 1 - share)).astype(np.float32)

    return change


def tuned(layers: list[Array], change: Change) -> list[Array]:
    """Return the layers after a fine-tuning."""
    rng = np.random.default_rng(7)
    total = sum(layer.size for layer in layers)
    done, changed = 0, []
    for layer in layers:
        changed.append(change(rng, layer, done / total))
        done += layer.size
    return changed


def scales(layers: list[Array]) -> list[Array]:
    """Return the int8 scale of each output channel."""
    return [(np.abs(layer).max(axis=tuple(range(1, layer.ndim))) / 127).astype(np.float32) for layer in layers]


def int8_model(layers: list[Array], steps: list[Array]) -> bytes:
    """Return a Q/DQ model with weights quantized by ``steps``."""
    tensors, nodes = [], []
    for number, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        quantized = np.rint(layer / step.reshape(-1, *[1] * (layer.ndim - 1))).clip(-128, 127).astype(np.int8)
        name = f"features.{number}.weight"
        zero = np.zeros(len(step), np.int8)
        tensors += [numpy_helper.from_array(quantized, f"{name}_quantized"), numpy_helper.from_array(step, f"{name}_scale")]
        tensors.append(numpy_helper.from_array(zero, f"{name}_zero_point"))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"], [name], f"{name}/dequantize", axis=0
            )
        )
    return _model(layers, tensors, nodes)


def float_model(layers: list[Array], dtype: type) -> bytes:
    """Return a model with float weights of ``dtype``."""
    tensors = [numpy_helper.from_array(layer.astype(dtype), f"features.{number}.weight") for number, layer in enumerate(layers)]
    return _model(layers, tensors, [])


def _model(layers: list[Array], tensors: list[TensorProto], nodes: list[onnx.NodeProto]) -> bytes:
    value, image = "image", True
    for number, layer in enumerate(layers):
        if layer.ndim == 2 and image:
            nodes += [helper.make_node("GlobalAveragePool", [value], ["pooled"]), helper.make_node("Flatten", ["pooled"], ["flat"])]
            value, image = "flat", False
        attributes: dict[str, Any] = {"pads": [layer.shape[2] // 2] * 4} if layer.ndim == 4 else {"transB": 1}
        kind = "Conv" if layer.ndim == 4 else "Gemm"
        nodes.append(helper.make_node(kind, [value, f"features.{number}.weight"], [f"layer{number}"], f"layer{number}", **attributes))
        nodes.append(helper.make_node("Relu", [f"layer{number}"], [value := f"relu{number}"]))
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 512, 512])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        tensors,
    )
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    return data


def reference(change: Change | None) -> bytes:
    """Return the shipped float32 reference model, fine-tuned by noise."""
    model = onnx.load(next(_REFERENCE.glob("cxr_*.onnx")))
    chosen = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    if change:
        for tensor, layer in zip(chosen, tuned([numpy_helper.to_array(tensor) for tensor in chosen], change), strict=True):
            tensor.raw_data = layer.astype(np.float32).tobytes()
    data: bytes = model.SerializeToString()
    return data


def cases() -> dict[str, tuple[Callable[[], tuple[bytes, bytes]], float | None]]:
    """Return what is measured: name -> (makes old and new, most megabytes on the wire)."""
    fine, finer, finest = everywhere(1e-3), everywhere(1e-4), everywhere(1e-3, of_sigma=True)

    def int8(change: Change, rescaled: bool = False) -> tuple[bytes, bytes]:
        before = weights(1)
        after, steps = tuned(before, change), scales(before)
        return int8_model(before, steps), int8_model(after, scales(after) if rescaled else steps)

    def floats(dtype: type, change: Change) -> tuple[bytes, bytes]:
        before = weights(np.dtype(dtype).itemsize)
        return float_model(before, dtype), float_model(tuned(before, change), dtype)

    return {
        "int8, all weights 1e-3, same scales": (lambda: int8(fine), 9.0),
        "int8, all weights 1e-3, new scales": (lambda: int8(fine, rescaled=True), None),
        "int8, all weights 1e-4, same scales": (lambda: int8(finer), None),
        "int8, all weights 1e-3 of sigma, same scales": (lambda: int8(finest), 9.0),
        "int8, all weights 1e-3 of sigma, new scales": (lambda: int8(finest, rescaled=True), None),
        "int8, last 5 % of weights 1e-3": (lambda: int8(last_part(0.05, 1e-3)), 0.6),
        "float16, all weights 1e-3": (lambda: floats(np.float16, fine), None),
        "float32, all weights 1e-3": (lambda: floats(np.float32, fine), None),
        "reference model (float32), all weights 1e-3": (lambda: (reference(None), reference(fine)), None),
        "reference model (float32), all weights 1e-3 of sigma": (lambda: (reference(None), reference(finest)), None),
    }


def run(only: str = "") -> list[dict[str, Any]]:
    """Measure each case whose name contains ``only``; rows have name, measured, target, unit, and what else was seen.

    The rows of the wire come in megabytes; those of the box, for a target of the issue, in seconds and megabytes of
    resident memory, both of a process of its own that does nothing else.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-delta-") as directory:
        for name, (make, target) in cases().items():
            if only in name:
                rows += _measure(Path(directory), name, *make(), target)
    return rows


def _measure(directory: Path, name: str, old: bytes, new: bytes, target: float | None) -> list[dict[str, Any]]:
    paths = [directory / part for part in ("old", "new", "delta", "out")]
    paths[0].write_bytes(old)
    paths[1].write_bytes(new)
    start = time.perf_counter()
    encoded = best(paths[0], paths[1])
    seconds = time.perf_counter() - start
    paths[2].write_bytes(encoded.data)
    digest = hashlib.sha256(new).hexdigest()
    command = [sys.executable, "-c", _DECODE, encoded.codec, *map(str, (paths[0], paths[2], paths[3])), digest, str(len(new))]
    decoded = [json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout) for _ in range(_DECODE_RUNS)]
    assert paths[3].read_bytes() == new
    wire = {"name": f"delta: {name}", "measured": len(encoded.data) / 1e6, "target": target, "unit": "MB"}
    wire |= {"plain": len(new) / 1e6, "codec": encoded.codec, "encode_s": seconds}
    box = [
        {"name": f"delta, decoding: {name}", "measured": min(run["s"] for run in decoded), "target": 0.5, "unit": "s"}
        | {"cpu_s": min(run["cpu"] for run in decoded)},
        {"name": f"delta, decoder's memory: {name}", "measured": max(run["rss"] for run in decoded) / 1e6, "target": 200.0, "unit": "MB"},
    ]
    return [wire, *box]


# Resident memory is the peak of the whole process, interpreter included (not ru_maxrss: Linux lets it begin at the parent's);
# the time is that of the first delta it applies, the import of numpy included, and the least of five such processes, because
# others may run on this machine.
_DECODE = """
import json, re, sys, time
from pathlib import Path
from model_sync.delta.codec import apply
codec, old, delta, out, digest, length = sys.argv[1:]
start = time.perf_counter()
before = time.process_time()
apply(codec, Path(old), Path(delta), Path(out), to_sha256=digest, to_length=int(length))
seconds = time.perf_counter() - start
peak, = re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({"s": seconds, "cpu": time.process_time() - before, "rss": int(peak) * 1024}))
"""


def main() -> int:
    """Print the table; exit 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Measure deltas between model versions.")
    parser.add_argument("--only", default="", help="measure only the cases whose name contains this")
    rows = run(parser.parse_args().only)
    for row in rows:
        target = "" if row["target"] is None else f"  (at most {row['target']:g})"
        more = f"  of {row['plain']:.1f} MB plain, {row['codec']}, made in {row['encode_s']:.1f} s" if "plain" in row else ""
        more += f"  ({row['cpu_s']:.2f} s of it computing)" if "cpu_s" in row else ""
        print(f"{row['name']:<72} {row['measured']:8.2f} {row['unit']}{target}{more}")
    return int(any(row["target"] is not None and row["measured"] > row["target"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
