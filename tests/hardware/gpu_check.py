"""What only a GPU can show of the TensorRT adapter; runs with TensorRT, cuda-bindings and NumPy alone.

``python -m tests.hardware.gpu_check [--level 1] [--only NAME ...] [--out DIR]`` prints a line for each check and a table of the reference
model, and ends with 1 when one failed, with 2 where there is no GPU or no TensorRT. ``make test-gpu`` runs the same checks by pytest.
The level is the builder's optimisation level: at 1 TensorRT 8.6 takes half a minute for a network, at its default 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from appliance.core.errors import InferenceError
from appliance.runtime import Candidate
from appliance.runtime.cuda import Cuda
from appliance.runtime.tensorrt import TensorRtRuntime
from tests.hardware import tiny_onnx

BUNDLE = Path(__file__).resolve().parents[2] / "appliance" / "bundles" / "cxr-pneumonia"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "models" / "cxr_pneumonia"
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 3e-2}
MOST_LEAKED_BYTES = 4 << 20
MOST_OVERHEAD_MS = 0.1


class Spec:
    """The input of a network, as a manifest says it."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


TINY = Spec("image", (tiny_onnx.CHANNELS, tiny_onnx.SIDE, tiny_onnx.SIDE))


class Bench:
    """Where the checks work: a directory, a builder level, and what they found for the table."""

    def __init__(self, directory: Path, level: int = 1) -> None:
        self.directory, self.level = directory, level
        self.cuda = Cuda()
        self.gpu = self.cuda.gpu(0)
        self.rows: list[dict[str, Any]] = []

    @property
    def cache(self) -> Path:
        """The engines that the checks share, so that each is built once."""
        return self.directory / "cache"

    def tiny(self, precision: str = "fp32", batch: int | str = "n") -> Path:
        """The tiny network's file."""
        return tiny_onnx.write(self.directory / f"tiny-{precision}-{batch}.onnx", precision, batch)

    def open(self, path: Path, precision: str = "fp32", batch: int = 16, spec: Spec = TINY, **how: Any) -> TensorRtRuntime:
        """A network loaded and warmed up."""
        cache = how.pop("cache", self.cache)
        on_progress = how.pop("on_progress", None)
        runtime = TensorRtRuntime(Candidate("tensorrt", path.name, precision, "GPU:0", batch=batch), level=self.level, **how)
        try:
            runtime.load(path, spec, cache=cache, on_progress=on_progress)
            runtime.warm_up()
        except BaseException:
            runtime.close()
            raise
        return runtime

    def free_bytes(self) -> int:
        """The GPU's free memory once everything that was asked for is done."""
        self.cuda.call("cudaDeviceSynchronize")
        return self.cuda.free_bytes()


def pictures(n: int, spec: Spec = TINY, seed: int = 0) -> Any:
    """Random images, float32 [n, ...]."""
    return np.random.default_rng(seed).random((n, *spec.shape), np.float32)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of any output."""
    assert set(found) == set(expected), f"outputs {sorted(found)}, expected {sorted(expected)}"
    for name, value in found.items():
        assert value.shape == expected[name].shape, f"{name}: {value.shape}, expected {expected[name].shape}"
    return max(float(np.max(np.abs(found[name] - expected[name]))) for name in expected)


def check_precisions(bench: Bench) -> str:
    """Built in float, half and 8 bits, right in each, and what the layers ran in."""
    said = []
    for precision, tolerance in TOLERANCE.items():
        done: list[float] = []
        runtime = bench.open(bench.tiny(precision), precision, on_progress=done.append)
        images = pictures(3)
        worst = difference(runtime.infer({"image": images}), tiny_onnx.expected(images))
        described = runtime.describe()
        runtime.close()
        assert worst <= tolerance, f"{precision} is off by {worst}"
        assert done == sorted(done), "progress went back"
        assert described["engine"] in ("built", "cached"), described["engine"]
        json.dumps(described)
        said.append(f"{precision}: off by {worst:.2g}, {described['layers']}, {described['build']}")
    return "; ".join(said)


def check_cache(bench: Bench) -> str:
    """The second load takes the stored engine; a damaged one is built again, with the reason."""
    cache = bench.directory / "own-cache"
    bench.open(bench.tiny(), cache=cache).close()
    started = time.perf_counter()
    runtime = bench.open(bench.tiny(), cache=cache)
    seconds = time.perf_counter() - started
    assert runtime.describe()["engine"] == "cached", runtime.describe()
    runtime.close()
    stored = next(cache.glob("*.engine"))
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(data)
    runtime = bench.open(bench.tiny(), cache=cache)
    engine, timings = runtime.describe()["engine"], runtime.describe()["build"]["timings"]
    runtime.close()
    assert engine.startswith("rebuilt: the stored engine is damaged"), engine
    assert timings == "reused", timings
    return f"cached engine loaded in {seconds:.2f} s; {engine}; timings {timings}"


def check_batches(bench: Bench) -> str:
    """Every batch of 1 to 16 gives what its images give alone, more go in pieces, and a fixed batch is filled up."""
    runtime = bench.open(bench.tiny())
    images = pictures(20)
    expected = tiny_onnx.expected(images)
    worst = 0.0
    for n in [*range(1, 17), 20, 1, 16]:
        part = {name: value[:n] for name, value in expected.items()}
        worst = max(worst, difference(runtime.infer({"image": images[:n]}), part))
    runtime.close()
    runtime = bench.open(bench.tiny("fp32", 4), batch=4)
    for n in (1, 4, 7):
        worst = max(worst, difference(runtime.infer({"image": images[:n]}), {name: value[:n] for name, value in expected.items()}))
    runtime.close()
    assert worst <= TOLERANCE["fp32"], worst
    return f"off by {worst:.2g} at most"


def check_graph(bench: Bench) -> str:
    """Replayed from a CUDA graph it gives bit for bit what it gives enqueued plainly."""
    graph, plain = bench.open(bench.tiny()), bench.open(bench.tiny(), graphs=False)
    for n in (1, 1, 1, 5, 5, 1, 1):
        images = pictures(n, seed=n)
        one, other = graph.infer({"image": images}), plain.infer({"image": images})
        assert all(np.array_equal(one[name], other[name]) for name in other), f"batch {n} differs"
    said = graph.describe(), plain.describe()
    graph.close()
    plain.close()
    assert said[0]["cuda_graph"] is True, said[0].get("cuda_graph_why")
    assert said[1]["cuda_graph"] is False
    return "equal"


def check_memory(bench: Bench) -> str:
    """With the GPU's memory taken, a load says so, and works again once it is given back."""
    path = bench.tiny()
    bench.open(path).close()
    held = []
    step = 256 << 20
    while step >= 1 << 16:
        try:
            held.append(bench.cuda.call("cudaMalloc", step))
        except InferenceError:
            bench.cuda.clear_error()
            step //= 2
    try:
        said = _refusal(lambda: bench.open(path, cache=bench.directory / "memory-cache"))
    finally:
        for address in held:
            bench.cuda.call("cudaFree", address)
    assert said.code == "runtime.memory", f"{said.code}: {said.detail}"
    bench.open(path).close()
    return said.detail


class FailingCuda:
    """CUDA whose n-th call of one function fails."""

    def __init__(self, runtime: Any, function: str, number: int) -> None:
        self._runtime, self._function, self._left = runtime, function, number

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._runtime, name)
        if name != self._function:
            return found

        def called(*arguments: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                return self._runtime.cudaError_t.cudaErrorMemoryAllocation, None
            return found(*arguments)

        return called


def check_leaks(bench: Bench) -> str:
    """Loads that fail at every step, and loads that do not, leave the GPU's memory as it was."""
    path, worst = bench.tiny(), 0
    for batch in (1, 16, 1, 16):  # what CUDA loads once and keeps is loaded
        bench.open(path, batch=batch).close()
    before = bench.free_bytes()
    steps = [("cudaMallocHost", n) for n in (1, 2, 3)] + [("cudaMalloc", n) for n in (1, 2, 3)] + [("cudaGetDeviceCount", 1)]
    for function, number in steps:
        failing = FailingCuda(bench.cuda._runtime, function, number)
        said = _refusal(lambda failing=failing: bench.open(path, batch=1, bindings=failing))
        assert said.code == "runtime.memory", said
        worst = max(worst, before - bench.free_bytes())
    _refusal(lambda: bench.open(path, spec=Spec("image", (3, 8, 8))))
    for _ in range(5):
        bench.open(path).close()
        worst = max(worst, before - bench.free_bytes())
    assert worst <= MOST_LEAKED_BYTES, f"{worst} bytes are gone"
    return f"{worst} bytes at most"


def check_failures(bench: Bench) -> str:
    """An operator that TensorRT does not know is named; a build that takes too long is ended; another GPU is said to be absent."""
    unknown = tiny_onnx.write(bench.directory / "unknown.onnx", "fp32", operator="NoSuchOperator")
    named = _refusal(lambda: bench.open(unknown))
    assert named.code == "runtime.build", named
    assert "NoSuchOperator" in named.detail, named
    late = _refusal(lambda: bench.open(bench.tiny(), cache=bench.directory / "late", build_deadline_s=0.5))
    assert late.code == "runtime.deadline", late
    garbage = bench.directory / "garbage.onnx"
    garbage.write_bytes(b"no model")
    assert _refusal(lambda: bench.open(garbage)).code == "runtime.build"
    runtime = TensorRtRuntime(Candidate("tensorrt", "x", "fp32", "GPU:99"))
    absent = _refusal(lambda: runtime.load(bench.tiny(), TINY))
    assert absent.code == "runtime.unavailable", absent
    return f"{named.detail}; {late.detail}; {absent.detail}"


def check_overhead(bench: Bench) -> str:
    """The adapter adds at most 0.1 ms to copying in, launching the graph, waiting and copying out."""
    runtime = bench.open(bench.tiny(), batch=1)
    images = pictures(1)
    loaded = runtime._loaded
    assert loaded is not None

    def bare() -> None:
        loaded.tensors["image"].host[:] = images
        loaded.cuda._runtime.cudaGraphLaunch(runtime._graph, loaded.stream)
        loaded.cuda._runtime.cudaStreamSynchronize(loaded.stream)
        for name in loaded.outputs:
            loaded.tensors[name].host.copy()

    whole, alone = _median_ms(lambda: runtime.infer({"image": images}), 500), _median_ms(bare, 500)
    runtime.close()
    assert whole - alone <= MOST_OVERHEAD_MS, f"{whole:.3f} ms against {alone:.3f} ms"
    return f"{whole:.3f} ms against {alone:.3f} ms bare"


def check_reference(bench: Bench) -> str:
    """The reference model in every precision that is at hand: built, right, and timed."""
    files = _reference_files()
    assert files, "no reference model"
    spec = Spec("image", (1, 224, 224))
    float_outputs: dict[str, Any] = {}
    images = pictures(16, spec)
    for precision, path in files.items():
        started = time.perf_counter()
        try:
            runtime = bench.open(path, precision, 16, spec)
        except InferenceError as error:
            if precision == "fp32":
                raise
            bench.rows.append({"file": path.name, "precision": precision, "failed": f"{error.code}: {error.detail}"})
            continue
        seconds = time.perf_counter() - started
        outputs = runtime.infer({"image": images})
        float_outputs = float_outputs or outputs
        off = float(np.max(np.abs(outputs["probability"] - float_outputs["probability"])))
        described = runtime.describe()
        row = {"file": path.name, "precision": precision, "load_s": round(seconds, 1), "max_probability_difference": round(off, 4)}
        for n in (1, 16):
            row[f"batch_{n}_ms"] = round(_median_ms(lambda n=n, run=runtime: run.infer({"image": images[:n]}), 200), 3)
        bench.rows.append(row | {name: described[name] for name in ("layers", "build", "engine", "cuda_graph", "version", "driver")})
        runtime.close()
        assert off <= 0.2, f"{path.name} is off by {off}"
    return f"{len(bench.rows)} rows"


def _reference_files() -> dict[str, Path]:
    """Precision -> file: of the bundle, else of the models that stand beside the clone."""
    manifest = BUNDLE / "manifest.json"
    variants = json.loads(manifest.read_text())["variants"] if manifest.is_file() else []
    found: dict[str, Path] = {}
    for variant in sorted(variants, key=lambda item: (item["precision"] != "fp32", item.get("activations") or "")):
        found.setdefault(variant["precision"], BUNDLE / variant["file"])
    for path in sorted(SHARED.glob("*.onnx")) if SHARED.is_dir() else []:
        precision = next((name for name in TOLERANCE if name in path.name), None)
        if precision is not None:
            found.setdefault(precision, path)
    return found


def _refusal(call: Callable[[], Any]) -> InferenceError:
    try:
        call()
    except InferenceError as error:
        return error
    raise AssertionError("nothing was refused")


def _median_ms(call: Callable[[], Any], repeat: int) -> float:
    for _ in range(20):
        call()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


CHECKS: dict[str, Callable[[Bench], str]] = {
    name.removeprefix("check_"): found for name, found in list(globals().items()) if name.startswith("check_")
}


def main() -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        try:
            bench = Bench(Path(directory), arguments.level)
        except InferenceError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"{bench.gpu.name}, compute capability {bench.gpu.compute_capability}, CUDA {bench.gpu.driver_cuda}", flush=True)
        for name in arguments.only:
            started = time.perf_counter()
            try:
                said = CHECKS[name](bench)
            except Exception:  # noqa: BLE001 - the next check runs all the same
                said, failed = traceback.format_exc(), failed + 1
                print(f"FAILED {name}: {said}", flush=True)
            else:
                print(f"ok {name} ({time.perf_counter() - started:.1f} s): {said}", flush=True)
        for row in bench.rows:
            print(json.dumps(row), flush=True)
        if arguments.out is not None:
            (arguments.out / "gpu_check.json").write_text(json.dumps(bench.rows, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
