"""The TensorRT adapter's own paths, on stand-ins for TensorRT and CUDA (``trt_stand_in``); with a GPU see ``tests/hardware``."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core import device_profile
from appliance.core.errors import InferenceError
from appliance.runtime import Candidate, engine_cache, trt_build
from appliance.runtime.tensorrt import TensorRtRuntime
from appliance.runtime.trt_compat import TrtCompat
from tests.support.trt_stand_in import VERSIONS, CudaError, StandInCuda, stand_in

MODEL = {"input": "image", "shape": [-1, 1, 4, 4]}


class Spec:
    name = "image"
    shape = (1, 4, 4)


class Bench:
    """A stand-in GPU, a model on it, and builds done in this process (how builders die is ``test_trt_build``)."""

    def __init__(self, tmp_path: Path, version: str = "8.6.0") -> None:
        self.cuda = StandInCuda()
        self.trt = stand_in(version, self.cuda)
        self.cache = tmp_path / "cache"
        self.path = tmp_path / "model.onnx"
        self.builds: list[trt_build.BuildRequest] = []
        self.model()

    def model(self, **how: Any) -> None:
        self.path.write_text(json.dumps(MODEL | how))

    def runtime(self, batch: int = 4, provider: str = "GPU:0", **how: Any) -> TensorRtRuntime:
        candidate = Candidate("tensorrt", "model.onnx", "fp16", provider, batch=batch)
        return TensorRtRuntime(candidate, tensorrt=lambda: TrtCompat(self.trt), bindings=self.cuda, **how)

    def loaded(self, batch: int = 4, **how: Any) -> TensorRtRuntime:
        runtime = self.runtime(batch, **how)
        runtime.load(self.path, Spec(), cache=self.cache)
        return runtime

    def build(self, order: trt_build.BuildRequest, **_: Any) -> dict[str, Any]:
        self.builds.append(order)
        compat = TrtCompat(self.trt)
        own = self.cache / "own"
        own.mkdir(parents=True, exist_ok=True)
        notes = trt_build.construct(compat, order, own, compat.messages(), 1 << 20, lambda _: None)
        engine_cache.write(order.cache, order.profile, (own / "engine").read_bytes(), notes)
        return notes

    def held(self) -> dict[str, int]:
        gc.collect()
        return {name: count for name, count in (self.cuda.live + self.trt.live).items() if count}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setattr(trt_build, "build", made.build)
    monkeypatch.setattr(device_profile, "gpu_driver", lambda: "580.65.06")
    return made


@pytest.fixture(params=VERSIONS)
def each(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path, request.param)
    monkeypatch.setattr(trt_build, "build", made.build)
    return made


def images(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).random((n, 1, 4, 4), np.float32)


def right(outputs: dict[str, Any], given: Any) -> bool:
    return np.allclose(outputs["mean"][:, 0], given.reshape(len(given), -1).mean(axis=1)) and np.array_equal(outputs["same"], given)


def test_every_version_builds_runs_and_gives_everything_back(each: Bench) -> None:
    runtime = each.loaded()
    runtime.warm_up()
    for n in (1, 2, 3, 4, 4, 4, 1):
        given = images(n, n)
        assert right(runtime.infer({"image": given}), given)
    runtime.close()
    assert each.held() == {}
    with pytest.raises(InferenceError, match="closed"):
        runtime.infer({"image": images(1)})
    runtime.close()


def test_describes_what_ran(bench: Bench) -> None:
    runtime = bench.loaded()
    assert runtime.describe()["cuda_graph_why"] == "not captured yet for this batch"
    runtime.warm_up()
    said = runtime.describe()
    assert said == json.loads(json.dumps(said))
    assert said == {
        "runtime": "tensorrt", "version": "8.6.0", "provider": "GPU:0 NVIDIA Stand-in", "precision": "fp16", "threads": 0, "batch": 4,
        "engine": "built", "cuda_graph": True, "layers": {"fp16": 1, "fp32": 1}, "ran": "fp16", "driver": "580.65.06",
        "compute_capability": "8.7",
        "build": {"batch": 4, "dynamic": True, "workspace_bytes": 1 << 20, "progress": "elapsed", "timings": "new"},
    }  # fmt: skip
    assert runtime.provider == "GPU:0 NVIDIA Stand-in"


def test_second_load_takes_the_stored_engine(bench: Bench) -> None:
    bench.loaded().close()
    assert bench.loaded().describe()["engine"] == "cached"
    assert len(bench.builds) == 1


def test_without_a_cache_nothing_stays(bench: Bench, tmp_path: Path) -> None:
    runtime = bench.runtime()
    runtime.load(bench.path, Spec())
    assert runtime.describe()["engine"] == "built"
    assert not list(tmp_path.rglob("*.engine"))


def test_corrupt_engine_is_rebuilt_with_its_reason(bench: Bench) -> None:
    bench.loaded().close()
    stored = next(bench.cache.glob("*.engine"))
    stored.write_bytes(stored.read_bytes()[:-3])
    assert bench.loaded().describe()["engine"] == "rebuilt: the stored engine is damaged (not what was written)"


def test_engine_of_another_tensorrt_is_rebuilt(bench: Bench) -> None:
    bench.loaded().close()
    bench.trt = stand_in("10.3.0", bench.cuda)
    assert bench.loaded().describe()["engine"] == "rebuilt: TensorRT 8.6.0 -> 10.3.0"


def test_engine_of_another_gpu_is_rebuilt(bench: Bench) -> None:
    bench.loaded().close()
    bench.cuda.name = b"NVIDIA Other"
    assert bench.loaded().describe()["engine"] == "rebuilt: GPU NVIDIA Stand-in -> NVIDIA Other"


def test_engine_of_another_driver_is_rebuilt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.loaded().close()
    monkeypatch.setattr(device_profile, "gpu_driver", lambda: "580.82.07")
    assert bench.loaded().describe()["engine"] == "rebuilt: driver 580.65.06 -> 580.82.07"


def test_stored_engine_that_tensorrt_does_not_take_is_rebuilt_once(bench: Bench) -> None:
    bench.model(stale=True)
    with pytest.raises(InferenceError, match="Serialization assertion") as caught:
        bench.loaded()
    assert caught.value.code == "runtime.build"
    assert bench.held() == {}
    assert len(bench.builds) == 1
    profile = bench.builds[0].profile
    whole = json.dumps(MODEL | {"range": [1, 4], "stale": True}).encode()
    bench.model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_cache, "read", _first(engine_cache.CacheEntry(whole, notes={"batch": 4}), engine_cache.read))
        said = bench.loaded().describe()["engine"]
    assert said.startswith("rebuilt: the stored engine was not taken (TensorRT: Serialization assertion")
    assert profile.precision == "fp16"


def _first(answer: Any, after: Callable[..., Any]) -> Callable[..., Any]:
    answers = [answer]
    return lambda *arguments: answers.pop() if answers else after(*arguments)


def test_graph_is_captured_at_the_second_run_of_a_batch_and_given_up_with_it(bench: Bench) -> None:
    runtime = bench.loaded()
    launches = lambda: bench.cuda.calls["cudaGraphLaunch"]  # noqa: E731
    runtime.infer({"image": images(2)})
    assert (launches(), bench.cuda.live["graph exec"]) == (0, 0)
    for seed in (1, 2, 3):
        given = images(2, seed)
        assert right(runtime.infer({"image": given}), given)
    assert (launches(), bench.cuda.live["graph exec"], bench.cuda.live["graph"]) == (3, 1, 0)
    runtime.infer({"image": images(3)})
    assert (launches(), bench.cuda.live["graph exec"]) == (3, 0)
    runtime.infer({"image": images(3)})
    assert bench.cuda.calls["cudaGraphInstantiate"] == 2
    runtime.close()
    assert bench.held() == {}


def test_network_that_cannot_be_captured_is_enqueued_and_said(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.model(no_graph=True)
    with caplog.at_level(logging.WARNING):
        runtime = bench.loaded()
        for seed in range(4):
            given = images(2, seed)
            assert right(runtime.infer({"image": given}), given)
    said = runtime.describe()
    assert (said["cuda_graph"], said["cuda_graph_why"]) == (False, "TensorRT: the run failed")
    assert bench.cuda.calls["cudaStreamBeginCapture"] == 1  # not tried again and again
    assert "no CUDA graph" in caplog.text
    runtime.close()
    assert bench.held() == {}


@pytest.mark.parametrize("where", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_capture_that_fails_in_cuda(bench: Bench, where: str) -> None:
    bench.cuda.fails[where] = (1, CudaError.cudaErrorStreamCaptureInvalidated)
    runtime = bench.loaded()
    for seed in range(3):
        given = images(1, seed)
        assert right(runtime.infer({"image": given}), given)
    assert "stream capture invalidated" in runtime.describe()["cuda_graph_why"]
    runtime.close()
    assert bench.held() == {}


def test_graphs_can_be_switched_off(bench: Bench) -> None:
    runtime = bench.loaded(graphs=False)
    runtime.warm_up()
    assert runtime.describe()["cuda_graph_why"] == "switched off"


def test_more_images_than_the_engine_takes_go_in_pieces(bench: Bench) -> None:
    runtime = bench.loaded(2)
    given = images(7)
    assert right(runtime.infer({"image": given}), given)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_file_of_a_fixed_batch_is_filled_up(bench: Bench, n: int) -> None:
    bench.model(shape=[2, 1, 4, 4])
    runtime = bench.loaded(2)
    assert runtime.describe()["batch"] == 2
    given = images(n)
    assert right(runtime.infer({"image": given}), given)
    assert runtime.infer({"image": given})["mean"].shape == (n, 1)


@pytest.mark.parametrize(
    "step", ["cudaMallocHost", "cudaMalloc", "cudaStreamCreateWithFlags", "cudaGetDeviceProperties", "cudaSetDevice", "cudaGetDeviceCount"]
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_load_that_fails_leaks_nothing(bench: Bench, step: str, number: int) -> None:
    bench.cuda.fails[step] = (number, CudaError.cudaErrorIllegalAddress)
    runtime = bench.runtime()
    try:
        runtime.load(bench.path, Spec(), cache=bench.cache)
    except InferenceError as error:
        assert (error.code, step in error.detail) == ("job.error", True)
    runtime.close()
    assert bench.held() == {}


def test_out_of_gpu_memory_tries_half_the_batch_then_fails_clearly(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.model(largest_context=2)
    with caplog.at_level(logging.WARNING):
        runtime = bench.loaded(4)
    assert runtime.describe()["batch"] == 2
    given = images(4)
    assert right(runtime.infer({"image": given}), given)
    runtime.close()
    bench.model(largest_context=0)
    with pytest.raises(InferenceError) as caught:
        bench.loaded(4)
    assert caught.value.code == "runtime.memory"
    assert bench.held() == {}


def test_out_of_gpu_memory_for_buffers(bench: Bench) -> None:
    bench.cuda.fails["cudaMalloc"] = (2, CudaError.cudaErrorMemoryAllocation)
    with pytest.raises(InferenceError, match="cudaMalloc: memory allocation") as caught:
        bench.loaded(1)
    assert caught.value.code == "runtime.memory"
    assert bench.held() == {}


def test_memory_is_given_back_after_the_engine_that_uses_it(bench: Bench) -> None:
    runtime = bench.loaded()
    runtime.warm_up()
    bench.cuda.order.clear()
    runtime.close()
    freed = [name for name in bench.cuda.order if "Free" in name or "Destroy" in name]
    assert freed == ["cudaGraphExecDestroy", *["cudaFree", "cudaFreeHost"] * 3, "cudaStreamDestroy"]


def test_what_cannot_be_freed_does_not_keep_the_rest(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    runtime = bench.loaded()
    bench.cuda.fails["cudaFree"] = (1, CudaError.cudaErrorIllegalAddress)
    with caplog.at_level(logging.WARNING):
        runtime.close()
    assert "illegal address" in caplog.text
    assert bench.held() == {"device": 1}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_output_that_is_no_number_is_an_error(bench: Bench, value: float) -> None:
    runtime = bench.loaded()
    for _ in range(3):  # plain and from the graph
        with pytest.raises(InferenceError, match="no numbers"):
            runtime.infer({"image": np.full((1, 1, 4, 4), value, np.float32)})
    assert right(runtime.infer({"image": images(1)}), images(1))


def test_run_that_fails_says_what_tensorrt_said(bench: Bench) -> None:
    bench.model(fails=True)
    runtime = bench.loaded()
    with pytest.raises(InferenceError, match="the run failed") as caught:
        runtime.infer({"image": images(1)})
    assert caught.value.code == "job.error"


@pytest.mark.parametrize("step", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_cuda_that_fails_in_a_run_is_an_error(bench: Bench, step: str) -> None:
    runtime = bench.loaded()
    bench.cuda.fails[step] = (bench.cuda.calls[step] + 1, CudaError.cudaErrorIllegalAddress)
    with pytest.raises(InferenceError, match="illegal address"):
        runtime.infer({"image": images(1)})
    runtime.close()
    assert bench.held() == {}


def test_inputs_that_are_not_the_models_are_refused(bench: Bench) -> None:
    runtime, good = bench.loaded(), images(1)
    for given in (
        {},
        {"other": good},
        {"image": good, "more": good},
        {"image": good.astype(np.float64)},
        {"image": good[:, :, :2]},
        {"image": good[:0]},
    ):
        with pytest.raises(InferenceError, match="the model takes 'image'"):
            runtime.infer(given)


@pytest.mark.parametrize("how", [{"shape": [-1, 1, 8, 8]}, {"input": "picture"}, {"shape": [-1, 16]}])
def test_model_that_takes_another_input_is_refused(bench: Bench, how: dict[str, Any]) -> None:
    bench.model(**how)
    with pytest.raises(InferenceError, match="the manifest says") as caught:
        bench.loaded()
    assert caught.value.code == "job.error"
    assert bench.held() == {}


def test_engine_of_a_type_nobody_has_is_refused(bench: Bench) -> None:
    bench.model(type="FP8")
    with pytest.raises(InferenceError, match="the engine takes"):
        bench.loaded()
    assert bench.held() == {}


@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "CUDA:0", "GPU:", "GPU:-1", ""])
def test_other_places_than_a_gpu_are_refused(bench: Bench, provider: str) -> None:
    with pytest.raises(InferenceError, match="runs on GPU:0"):
        bench.runtime(provider=provider).load(bench.path, Spec())


@pytest.mark.parametrize("batch", [0, 17])
def test_batches_that_no_engine_is_built_for(bench: Bench, batch: int) -> None:
    with pytest.raises(InferenceError, match="1 to 16"):
        bench.loaded(batch)


def test_no_gpu_is_said_before_tensorrt_is_touched(bench: Bench) -> None:
    """TensorRT 8.6.0 ends with a segmentation fault when a Runtime is made where there is no GPU."""
    bench.cuda.gpus = 0
    touched: list[int] = []
    candidate = Candidate("tensorrt", "model.onnx", "fp16", "GPU:0")
    with pytest.raises(InferenceError) as caught:
        TensorRtRuntime(candidate, tensorrt=lambda: touched.append(1), bindings=bench.cuda).load(bench.path, Spec())  # type: ignore[arg-type, return-value]
    assert (caught.value.code, touched) == ("runtime.unavailable", [])


def test_gpu_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(InferenceError, match="no GPU:3, only 1") as caught:
        bench.runtime(provider="GPU:3").load(bench.path, Spec())
    assert caught.value.code == "runtime.unavailable"


def test_second_gpu_is_made_current_in_every_thread(bench: Bench) -> None:
    bench.cuda.gpus = 2
    runtime = bench.runtime(provider="GPU:1")
    runtime.load(bench.path, Spec(), cache=bench.cache)
    before = bench.cuda.calls["cudaSetDevice"]
    runtime.infer({"image": images(1)})
    assert bench.cuda.calls["cudaSetDevice"] == before + 1


def test_model_that_is_not_there(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match="cannot be read"):
        bench.runtime().load(tmp_path / "absent.onnx", Spec())
