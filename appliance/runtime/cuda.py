"""CUDA through NVIDIA's Python bindings (``cuda-bindings``), with a check of every return code.

The module is ``cuda.bindings.runtime`` since 12.6, and ``cuda.cudart`` in older versions on a Jetson. In both every call returns a tuple
of the error and its values; here an error is raised. Only calls that need more than that have a wrapper.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

from appliance.core.errors import InferenceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_MODULES: Final = ("cuda.bindings.runtime", "cuda.cudart")
_MEMORY: Final = ("cudaErrorMemoryAllocation",)
# The box has no GPU, or none that this process may use; the model is not the reason.
_UNAVAILABLE: Final = (
    "cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorInvalidDevice", "cudaErrorDevicesUnavailable", "cudaErrorStubLibrary",
    "cudaErrorInitializationError", "cudaErrorSystemDriverMismatch", "cudaErrorCompatNotSupportedOnDevice", "cudaErrorSystemNotReady",
)  # fmt: skip
_NON_BLOCKING: Final = 1  # cudaStreamNonBlocking


@dataclass(frozen=True)
class Gpu:
    """A GPU according to CUDA: its name, compute capability ("8.7") and the newest CUDA its driver can run ("12.2")."""

    index: int
    name: str
    compute_capability: str
    driver_cuda: str


class Cuda:
    """The CUDA runtime of this process.

    Args:
        runtime: module of the bindings; searched when None.

    Raises:
        InferenceError: ``runtime.unavailable``: the bindings are not installed.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._runtime = runtime or _bindings()
        kinds = self._runtime.cudaMemcpyKind
        self.to_device, self.to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        # Thread-local: CUDA calls of other threads do not break a capture.
        self.capture_mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime by its name.

        Returns:
            None, its only value, or a tuple of its values.

        Raises:
            InferenceError: ``runtime.memory``, ``runtime.unavailable`` (no GPU), or ``job.error``.
        """
        error, *values = getattr(self._runtime, name)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise _failure(name, str(error.name))
        return values[0] if len(values) == 1 else tuple(values) or None

    def clear_error(self) -> None:
        """Clear the last error of CUDA after it was handled."""
        self._runtime.cudaGetLastError()

    def gpu(self, index: int) -> Gpu:
        """Make a GPU the current one of this thread and describe it."""
        count = self.call("cudaGetDeviceCount")
        if index >= count:
            raise InferenceError("runtime.unavailable", f"there is no GPU:{index}, only {count}")
        self.call("cudaSetDevice", index)
        properties = self.call("cudaGetDeviceProperties", index)
        name = properties.name.decode("utf-8", "replace") if isinstance(properties.name, bytes) else str(properties.name)
        newest = int(self.call("cudaDriverGetVersion"))
        return Gpu(index, name.strip("\0 "), f"{properties.major}.{properties.minor}", f"{newest // 1000}.{newest % 1000 // 10}")

    def free_bytes(self) -> int:
        """Return the free memory of the current GPU."""
        return int(self.call("cudaMemGetInfo")[0])

    def stream(self) -> Any:
        """Create a stream that does not wait for the default one."""
        return self.call("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def instantiate(self, graph: Any) -> Any:
        """Make a captured graph ready to launch."""
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        except TypeError:  # CUDA 11 has arguments for an error log
            return self.call("cudaGraphInstantiate", graph, b"", 0)[0]


@dataclass
class Transfer:
    """The buffers of a tensor: page-locked memory on the host, and memory on the GPU.

    Attributes:
        host: the host buffer as an array with the largest shape of the tensor, [n, ...].
        device: address of the GPU buffer.
        pinned: address of the host buffer.
    """

    host: NDArray[Any]
    device: int
    pinned: int


class GpuResources:
    """Resources on the GPU, each freed once, in the reverse order of creation."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._handles: list[tuple[str, Any]] = []

    def keep(self, freed_by: str, handle: Any) -> Any:
        """Register a handle with the function that frees it; returns the handle."""
        self._handles.append((freed_by, handle))
        return handle

    def transfer(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Transfer:
        """Allocate the buffers of a tensor.

        Raises:
            InferenceError: ``runtime.memory``; a buffer that was allocated is freed with the other resources.
        """
        import numpy as np

        nbytes = max(1, prod(shape) * dtype.itemsize)
        pinned = int(self.keep("cudaFreeHost", self._cuda.call("cudaMallocHost", nbytes)))
        device = int(self.keep("cudaFree", self._cuda.call("cudaMalloc", nbytes)))
        raw = (ctypes.c_byte * nbytes).from_address(pinned)
        host: NDArray[Any] = np.frombuffer(memoryview(raw), dtype=dtype, count=prod(shape)).reshape(shape)
        return Transfer(host, device, pinned)

    def drop(self, handle: Any) -> None:
        """Free one handle now."""
        for index, (freed_by, held) in enumerate(self._handles):
            if held is handle:
                del self._handles[index]
                self._free(freed_by, held)
                return

    def release(self) -> None:
        """Free everything; an error is logged and the rest is freed all the same."""
        while self._handles:
            self._free(*self._handles.pop())

    def _free(self, freed_by: str, handle: Any) -> None:
        try:
            self._cuda.call(freed_by, handle)
        except InferenceError as error:  # after a GPU fault every call fails until the process ends
            logger.warning("%s: %s", freed_by, error.detail)


def _bindings() -> Any:
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise InferenceError("runtime.unavailable", f"no CUDA for Python (the package cuda-python): {reasons[0]}")


def _failure(name: str, error: str) -> InferenceError:
    """Convert the name of a CUDA error: ``cudaErrorMemoryAllocation`` becomes "memory allocation"."""
    code = "runtime.memory" if error in _MEMORY else "runtime.unavailable" if error in _UNAVAILABLE else "job.error"
    return InferenceError(code, f"{name}: " + re.sub(r"(?<=[a-z])(?=[A-Z])", " ", error.removeprefix("cudaError")).lower())
