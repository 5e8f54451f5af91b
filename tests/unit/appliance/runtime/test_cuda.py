"""CUDA's real bindings where there is no GPU: every function is there, and every return code becomes an error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import InferenceError
from appliance.runtime import cuda as module
from appliance.runtime.cuda import Cuda, GpuResources
from tests.support.trt_stand_in import CudaError, StandInCuda

bindings = pytest.importorskip("cuda.bindings.runtime", reason="no wheel of cuda-bindings for this machine")


def without_gpu() -> Cuda:
    found = Cuda()
    error, count = bindings.cudaGetDeviceCount()
    if error == bindings.cudaError_t.cudaSuccess and count:
        pytest.skip("this machine has a GPU")
    return found


def test_real_bindings_have_every_function_of_the_stand_in() -> None:
    for name in dir(StandInCuda()):
        if name.startswith("cuda"):
            assert hasattr(bindings, name), name
    for error in CudaError:
        assert int(getattr(bindings.cudaError_t, error.name)) == error


def test_errors_that_mean_memory_or_no_gpu_are_errors_of_cuda() -> None:
    assert all(hasattr(bindings.cudaError_t, name) for name in (*module._MEMORY, *module._UNAVAILABLE))


@pytest.mark.parametrize(
    "call",
    [
        lambda cuda: cuda.gpu(0),
        lambda cuda: cuda.free_bytes(),
        lambda cuda: cuda.stream(),
        lambda cuda: cuda.call("cudaMalloc", 16),
        lambda cuda: cuda.call("cudaMallocHost", 16),
        lambda cuda: GpuResources(cuda).transfer((1, 4), np.dtype(np.float32)),
    ],
)
def test_no_gpu_is_said_by_whatever_is_called(call: Callable[[Cuda], Any]) -> None:
    with pytest.raises(InferenceError) as caught:
        call(without_gpu())
    assert caught.value.code == "runtime.unavailable"


def test_bindings_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InferenceError, match="cuda-python") as caught:
        Cuda()
    assert caught.value.code == "runtime.unavailable"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CudaError.cudaErrorMemoryAllocation, "runtime.memory"),
        (CudaError.cudaErrorNoDevice, "runtime.unavailable"),
        (CudaError.cudaErrorIllegalAddress, "job.error"),
    ],
)
def test_codes(error: CudaError, code: str) -> None:
    stand_in = StandInCuda()
    stand_in.fails["cudaMalloc"] = (1, error)
    with pytest.raises(InferenceError) as caught:
        Cuda(stand_in).call("cudaMalloc", 1)
    assert caught.value.code == code


def test_graph_of_cuda_11_is_instantiated_too() -> None:
    stand_in = StandInCuda()
    stand_in.__dict__["cudaGraphInstantiate"] = lambda graph, log, _: (CudaError.cudaSuccess, ("exec", graph), log)
    assert Cuda(stand_in).instantiate(3) == ("exec", 3)


def test_what_is_held_is_freed_once_and_backwards() -> None:
    stand_in = StandInCuda()
    holding = GpuResources(Cuda(stand_in))
    stream = holding.keep("cudaStreamDestroy", Cuda(stand_in).stream())
    holding.transfer((2, 3), np.dtype(np.float32))
    stand_in.order.clear()
    holding.drop(stream)
    holding.drop(stream)
    holding.release()
    holding.release()
    assert stand_in.order == ["cudaStreamDestroy", "cudaFree", "cudaFreeHost"]
    assert +stand_in.live == {}
