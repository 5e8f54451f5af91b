"""TensorRT on NVIDIA GPUs, on a Jetson or a PC: an engine that is built on the box, cached, and run as a CUDA graph.

There is one stream and page-locked memory on the host. Both copies and the network are captured into one CUDA graph per batch size, so
that an inference is one launch and one wait. TensorRT needs a normal run between a change of shape and a capture, and a capture takes
milliseconds; so a graph is captured when the same batch size comes twice in a row, and the earlier graph is dropped. A network that
cannot be captured is enqueued directly, and ``describe`` says so.

Engines are built by :mod:`appliance.runtime.trt_build` in a process of its own and stored by :mod:`appliance.runtime.engine_cache`. The
resources on the GPU are freed in order when a load fails. After a GPU fault only the end of the process frees them, which is why
candidates are measured in a process of their own (:mod:`appliance.tuning.candidate_process`).
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.core import device_profile
from appliance.core.errors import InferenceError
from appliance.runtime import Candidate, OnProgress, TensorSpec, engine_cache, trt_build
from appliance.runtime.cuda import Cuda, Gpu, GpuResources, Transfer
from appliance.runtime.engine_cache import EngineProfile
from appliance.runtime.tensors import check_outputs, checked_input, describe_adapter, ran_in, run_in_pieces
from appliance.runtime.trt_compat import Messages, TrtCompat, find

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 1 << 20

_PROVIDER: Final = re.compile(r"GPU:(\d{1,3})(?: .*)?")
_TYPES: Final = {
    "FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "INT8": np.int8, "UINT8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclass
class _Loaded:
    """A deserialised engine with all its resources on the GPU; ``release`` frees them in the reverse order of creation."""

    cuda: Cuda
    messages: Messages
    holding: GpuResources
    runtime: Any = None
    engine: Any = None
    context: Any = None
    stream: Any = None
    tensors: dict[str, Transfer] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def release(self) -> None:
        if self.stream is not None:
            with suppress(InferenceError):  # wait for the rest of a failed run, whose error was already reported
                self.cuda.call("cudaStreamSynchronize", self.stream)
        self.tensors = {}
        self.context = self.engine = self.runtime = None  # in this order: each is freed with its last reference
        self.holding.release()


class TensorRtRuntime:
    """A model as a TensorRT engine; see ``appliance.runtime.Runtime``.

    Args:
        candidate: ``provider`` is ``GPU:<index>``; ``batch`` is the largest batch of the optimisation profile, at most 16.
        level: builder optimisation level.
        build_deadline_s: time limit for building an engine.
        graphs: whether to capture CUDA graphs.
        tensorrt: imports TensorRT.
        bindings: of CUDA; searched when None.
    """

    name = "tensorrt"

    def __init__(
        self, candidate: Candidate, *, level: int = trt_build.LEVEL, build_deadline_s: float = trt_build.DEADLINE_S, graphs: bool = True,
        tensorrt: Callable[[], TrtCompat] = find, bindings: Any = None,
    ) -> None:  # fmt: skip
        self.version = ""
        self.precision = candidate.precision
        self.provider = candidate.provider
        self._candidate = candidate
        self._level, self._deadline_s, self._graphs = level, build_deadline_s, graphs
        self._find, self._bindings = tensorrt, bindings
        self._input = ""
        self._shape: tuple[int, ...] = ()
        self._gpu: Gpu | None = None
        self._driver = ""
        self._built = ""
        self._notes: dict[str, Any] = {}
        self._layers: dict[str, int] = {}
        self._heavy: dict[str, int] = {}
        self._loaded: _Loaded | None = None
        self._context_batch = 0  # batch size that the execution context is set to
        self._runs = 0  # number of consecutive runs with it
        self._graph: Any = None
        self._no_graph = "" if graphs else "switched off"

    def load(self, model_path: Path, input_spec: TensorSpec, *, cache: Path | None = None, on_progress: OnProgress | None = None) -> None:
        """Load the engine from the cache, or build it; see ``Runtime.load``."""
        self._input, self._shape = input_spec.name, tuple(input_spec.shape)
        index = _gpu_index(self._candidate)
        cuda = Cuda(self._bindings)
        gpu = cuda.gpu(index)  # before TensorRT is used: 8.6 has a segmentation fault when there is no GPU
        compat = self._find()
        logger.info("%s on %s, compute capability %s", compat.title, gpu.name, gpu.compute_capability)
        self.version, self._gpu = compat.version, gpu
        self._driver = device_profile.gpu_driver() or f"CUDA {gpu.driver_cuda}"
        with ExitStack() as own:
            if cache is None:
                cache = Path(own.enter_context(tempfile.TemporaryDirectory(prefix="engine-")))
            profile = self._profile(compat, gpu, model_path)
            request = trt_build.BuildRequest(model_path, self._input, profile, cache, index)
            self._open_or_halve_batch(cuda, compat, request, on_progress)
        self.provider = f"GPU:{index} {gpu.name}"

    def _profile(self, compat: TrtCompat, gpu: Gpu, model_path: Path) -> EngineProfile:
        batch = self._candidate.batch
        if not 1 <= batch <= trt_build.MAX_BATCH:
            raise InferenceError("job.error", f"a batch of {batch}; engines are built for 1 to {trt_build.MAX_BATCH}")
        digest = hashlib.sha256()
        try:
            with open(model_path, "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise InferenceError("job.error", f"the model cannot be read: {error.strerror}") from error
        return EngineProfile(
            gpu=gpu.name, compute_capability=gpu.compute_capability, tensorrt=compat.version, driver=self._driver, precision=self.precision,
            batch=batch, shape=self._shape, level=self._level, onnx_sha256=digest.hexdigest(),
        )  # fmt: skip

    def _open_or_halve_batch(self, cuda: Cuda, compat: TrtCompat, request: trt_build.BuildRequest, on_progress: OnProgress | None) -> None:
        """Open the engine; if it was built but does not fit into the memory of the GPU, try half the batch size."""
        try:
            self._open(cuda, compat, request, on_progress)
        except InferenceError as error:
            if error.code != "runtime.memory" or not self._built or request.profile.batch == 1:
                raise
            logger.warning("not enough memory for batch %d, trying half of it: %s", request.profile.batch, error.detail)
            half = replace(request, profile=replace(request.profile, batch=request.profile.batch // 2))
            self._open(cuda, compat, half, on_progress)

    def _open(self, cuda: Cuda, compat: TrtCompat, request: trt_build.BuildRequest, on_progress: OnProgress | None) -> None:
        """Load an engine onto the GPU; a cached engine that TensorRT refuses is built again, once."""
        entry = engine_cache.read(request.cache, request.profile)
        if entry.data:
            self._built = "cached"
            try:
                self._load_engine(cuda, compat, entry)
            except InferenceError as error:
                if error.code != "runtime.build":
                    raise
                entry = engine_cache.CacheEntry(b"", f"the stored engine was not taken ({error.detail})")
            else:
                return
        self._built = ""
        trt_build.build(request, deadline_s=self._deadline_s, on_progress=on_progress)
        self._built = f"rebuilt: {entry.why}" if entry.why else "built"
        entry = engine_cache.read(request.cache, request.profile)
        if not entry.data:
            raise InferenceError("runtime.build", f"the engine that was built cannot be read back: {entry.why or 'it is gone'}")
        self._load_engine(cuda, compat, entry)

    def _load_engine(self, cuda: Cuda, compat: TrtCompat, entry: engine_cache.CacheEntry) -> None:
        messages = compat.messages()
        loaded = _Loaded(cuda, messages, GpuResources(cuda))
        try:
            self._notes = dict(entry.notes or {})
            self._deserialise(compat, loaded, entry.data)
            self._allocate(compat, loaded)
        except BaseException:
            loaded.release()
            raise
        self._layers, self._heavy = compat.layer_types(loaded.engine), compat.layer_types(loaded.engine, heavy=True)
        self._loaded, self._context_batch, self._runs, self._graph = loaded, 0, 0, None

    def _deserialise(self, compat: TrtCompat, loaded: _Loaded, data: bytes) -> None:
        loaded.stream = loaded.holding.keep("cudaStreamDestroy", loaded.cuda.stream())
        loaded.runtime = compat.trt.Runtime(loaded.messages)
        loaded.engine = loaded.runtime.deserialize_cuda_engine(data)
        if loaded.engine is None:
            raise trt_build.explain_build(loaded.messages)
        loaded.context = loaded.engine.create_execution_context()
        if loaded.context is None:
            raise InferenceError("runtime.memory", (loaded.messages.errors() or ["no execution context"])[-1])

    def _allocate(self, compat: TrtCompat, loaded: _Loaded) -> None:
        """Allocate every tensor for the largest batch; the input of the engine must match the manifest."""
        names = [loaded.engine.get_tensor_name(index) for index in range(loaded.engine.num_io_tensors)]
        inputs = [name for name in names if loaded.engine.get_tensor_mode(name) == compat.trt.TensorIOMode.INPUT]
        shape = tuple(loaded.engine.get_tensor_shape(self._input)) if inputs == [self._input] else ()
        kind = loaded.engine.get_tensor_dtype(self._input).name if shape else ""
        if shape[1:] != self._shape or kind != "FLOAT":
            raise InferenceError("job.error", f"the engine takes {inputs} {kind} {list(shape)}, the manifest says {[-1, *self._shape]}")
        batch = self._largest
        if not loaded.context.set_input_shape(self._input, (batch, *self._shape)):
            raise InferenceError("job.error", f"the engine does not take a batch of {batch}")
        loaded.outputs = [name for name in names if name not in inputs]
        for name in names:
            self._allocate_tensor(loaded, name, batch)

    def _allocate_tensor(self, loaded: _Loaded, name: str, batch: int) -> None:
        shape = tuple(loaded.context.get_tensor_shape(name))
        kind = loaded.engine.get_tensor_dtype(name).name
        if kind not in _TYPES or -1 in shape or shape[:1] != (batch,):
            raise InferenceError("job.error", f"the tensor {name!r} of the engine is {kind} {list(shape)}")
        loaded.tensors[name] = loaded.holding.transfer(shape, np.dtype(_TYPES[kind]))
        if not loaded.context.set_tensor_address(name, loaded.tensors[name].device):
            raise InferenceError("job.error", f"the tensor {name!r} of the engine takes no memory")

    @property
    def _largest(self) -> int:
        """Largest batch of the engine: less than requested if there was not enough memory, or the fixed batch of the file."""
        return int(self._notes.get("batch", self._candidate.batch))

    def warm_up(self) -> None:
        """Run twice, so that the CUDA graph exists before the first scan; see ``Runtime.warm_up``."""
        for _ in range(2):
            self.infer({self._input: np.zeros((self._candidate.batch, *self._shape), np.float32)})

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model, in several batches if the engine has a smaller limit; see ``Runtime.infer``."""
        value = checked_input(inputs, self._input, self._shape)
        loaded = self._loaded
        if loaded is None or self._gpu is None:
            raise InferenceError("job.error", "the runtime is closed")
        if self._gpu.index:
            loaded.cuda.call("cudaSetDevice", self._gpu.index)  # each thread has its own current GPU
        return run_in_pieces(value, self._largest, bool(self._notes.get("dynamic", True)), lambda piece: self._run(loaded, piece))

    def _run(self, loaded: _Loaded, value: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Run one batch that the engine accepts."""
        n = len(value)
        if n != self._context_batch:
            self._reshape(loaded, n)
        loaded.tensors[self._input].host[:n] = value
        if self._graph is None and self._runs and not self._no_graph:
            self._capture(loaded, n)
        if self._graph is not None:
            loaded.cuda.call("cudaGraphLaunch", self._graph, loaded.stream)
        else:
            self._enqueue(loaded, n)
        loaded.cuda.call("cudaStreamSynchronize", loaded.stream)
        self._runs += 1
        return self._results(loaded, n)

    def _reshape(self, loaded: _Loaded, n: int) -> None:
        self._drop_graph(loaded)
        self._context_batch = 0
        if not loaded.context.set_input_shape(self._input, (n, *self._shape)):
            raise self._failed(loaded, f"a batch of {n} is not taken")
        self._context_batch, self._runs = n, 0

    def _enqueue(self, loaded: _Loaded, n: int) -> None:
        """Enqueue copy to the GPU, inference and copy to the host on the stream, without waiting."""
        copy, tensors, stream = loaded.cuda.call, loaded.tensors, loaded.stream
        source = tensors[self._input]
        copy("cudaMemcpyAsync", source.device, source.pinned, source.host[:n].nbytes, loaded.cuda.to_device, stream)
        if not loaded.context.execute_async_v3(int(stream)):
            raise self._failed(loaded, "the run failed")
        for name in loaded.outputs:
            output = tensors[name]
            copy("cudaMemcpyAsync", output.pinned, output.device, output.host[:n].nbytes, loaded.cuda.to_host, stream)

    def _capture(self, loaded: _Loaded, n: int) -> None:
        """Capture a run as a CUDA graph; if that fails, store why and run without one."""
        cuda, graph = loaded.cuda, None
        try:
            cuda.call("cudaStreamBeginCapture", loaded.stream, cuda.capture_mode)
            try:
                self._enqueue(loaded, n)
            finally:
                graph = cuda.call("cudaStreamEndCapture", loaded.stream)
            self._graph = loaded.holding.keep("cudaGraphExecDestroy", cuda.instantiate(graph))
        except InferenceError as error:
            cuda.clear_error()
            self._no_graph = error.detail
            logger.warning("no CUDA graph: %s", error.detail)
            loaded.messages.clear()
        finally:
            if graph is not None and int(graph):
                cuda.call("cudaGraphDestroy", graph)

    def _drop_graph(self, loaded: _Loaded) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            loaded.holding.drop(graph)

    def _results(self, loaded: _Loaded, n: int) -> dict[str, NDArray[Any]]:
        # Copied: the next run overwrites the memory.
        results = {name: loaded.tensors[name].host[:n].copy() for name in loaded.outputs}
        check_outputs(results, n)
        return {name: output.astype(np.float32) if output.dtype == np.float16 else output for name, output in results.items()}

    def _failed(self, loaded: _Loaded, what: str) -> InferenceError:
        errors = loaded.messages.errors()
        loaded.messages.clear()
        return InferenceError("job.error", f"TensorRT: {errors[-1] if errors else what}")

    def describe(self) -> dict[str, Any]:
        """Describe what ran; see ``Runtime.describe``.

        Additional keys: ``engine`` (built, cached, or rebuilt and why), ``build`` (the notes of the builder), ``cuda_graph`` and, if
        there is none, ``cuda_graph_why``; ``compute_capability``, ``driver``.
        """
        description = describe_adapter(self, self._candidate.threads, self._largest) | {
            "engine": self._built, "build": dict(self._notes), "cuda_graph": self._graph is not None,
            "layers": dict(self._layers), "ran": ran_in(Counter(self._heavy).elements()), "driver": self._driver,
            "compute_capability": self._gpu.compute_capability if self._gpu else "",
        }  # fmt: skip
        if self._graph is None:
            description["cuda_graph_why"] = self._no_graph or "not captured yet for this batch"
        return description

    def close(self) -> None:
        """Free everything on the GPU."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._drop_graph(loaded)
            loaded.release()


def _gpu_index(candidate: Candidate) -> int:
    match = _PROVIDER.fullmatch(candidate.provider)
    if match is None:
        raise InferenceError("job.error", f"TensorRT runs on GPU:0, not on {candidate.provider!r}")
    return int(match[1])
