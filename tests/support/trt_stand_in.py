"""Stand-ins for TensorRT and CUDA where there is no GPU: enough of both to walk the adapter's own paths, and no more.

What keeps them honest is ``tests/support/trt_api.json``, the names that the real bindings of TensorRT 8.6.0, 10.3.0 and 11.4.0 have: a
stand-in of a version cannot be made with a name that its real class lacks. "Device memory" is host memory, so that copies are copies and
what is not freed is seen. A model is an ONNX file, which ONNX Runtime computes, or JSON that says how a build and an engine shall behave:
then the engine gives the mean of its input and the input itself. ``lay`` writes both as importable packages, for builder processes.
"""

# ruff: noqa: N802, N815, ARG002 - names and arguments are NVIDIA's

from __future__ import annotations

import base64
import ctypes
import enum
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

API = json.loads((Path(__file__).parent / "trt_api.json").read_text())
VERSIONS = tuple(API)
_SLOW_S = float(os.environ.get("STAND_IN_BUILD_S", 0))


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class StandInCuda:
    """``cuda.bindings.runtime`` with host memory for the device's.

    Attributes:
        fails: function -> (call number, error): that call fails.
        live: what was got and not given back, by kind.
        calls: how often each function was called.
    """

    cudaError_t = CudaError
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, gpus: int = 1, name: bytes = b"NVIDIA Stand-in", capacity: int = 4 << 30) -> None:
        self.gpus, self.name, self.capability = gpus, name, (8, 7)
        self.free = capacity
        self.fails: dict[str, tuple[int, CudaError]] = {}
        self.live: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.order: list[str] = []
        self.recording: list[Any] | None = None
        self._memory: dict[int, Any] = {}
        self._graphs: dict[int, list[Any]] = {}
        self.made = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def called(*arguments: Any) -> Any:
            self.calls[name] += 1
            self.order.append(name)
            number, error = self.fails.get(name, (0, CudaError.cudaSuccess))
            if number != self.calls[name]:
                return found(*arguments)
            if name == "cudaStreamEndCapture":  # a capture that failed is over all the same
                self.recording = None
            return error, None

        return called

    def cudaGetDeviceCount(self) -> Any:
        return (CudaError.cudaSuccess, self.gpus) if self.gpus else (CudaError.cudaErrorNoDevice, None)

    def cudaSetDevice(self, index: int) -> Any:
        return (CudaError.cudaSuccess,)

    def cudaGetDeviceProperties(self, index: int) -> Any:
        return CudaError.cudaSuccess, SimpleNamespace(name=self.name, major=self.capability[0], minor=self.capability[1])

    def cudaDriverGetVersion(self) -> Any:
        return CudaError.cudaSuccess, 12020

    def cudaMemGetInfo(self) -> Any:
        return CudaError.cudaSuccess, self.free, 8 << 30

    def cudaDeviceSynchronize(self) -> Any:
        return (CudaError.cudaSuccess,)

    def cudaGetLastError(self) -> Any:
        return (CudaError.cudaSuccess,)

    def _get(self, nbytes: int, kind: str) -> Any:
        memory = ctypes.create_string_buffer(nbytes)
        self._memory[ctypes.addressof(memory)] = memory
        self.live[kind] += 1
        return CudaError.cudaSuccess, ctypes.addressof(memory)

    def _give(self, address: int, kind: str) -> Any:
        del self._memory[address]  # a second time is a KeyError
        self.live[kind] -= 1
        return (CudaError.cudaSuccess,)

    def cudaMalloc(self, nbytes: int) -> Any:
        if nbytes > self.free:
            return CudaError.cudaErrorMemoryAllocation, None
        self.free -= nbytes
        return self._get(nbytes, "device")

    def cudaMallocHost(self, nbytes: int) -> Any:
        return self._get(nbytes, "host")

    def cudaFree(self, address: int) -> Any:
        self.free += len(self._memory[address])
        return self._give(address, "device")

    def cudaFreeHost(self, address: int) -> Any:
        return self._give(address, "host")

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        self.live["stream"] += 1
        return CudaError.cudaSuccess, 77

    def cudaStreamDestroy(self, stream: int) -> Any:
        self.live["stream"] -= 1
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return (CudaError.cudaSuccess,)

    def do(self, work: Any) -> None:
        """Work on the stream: done, or recorded while a capture goes on."""
        work() if self.recording is None else self.recording.append(work)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> Any:
        self.do(lambda: ctypes.memmove(target, source, nbytes))
        return (CudaError.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        self.recording = []
        return (CudaError.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        recorded, self.recording = self.recording, None
        return self._graph(recorded or [], "graph")

    def _graph(self, recorded: list[Any], kind: str) -> Any:
        self.made += 1
        self.live[kind] += 1
        self._graphs[self.made] = recorded
        return CudaError.cudaSuccess, self.made

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        return self._graph(self._graphs[graph], "graph exec")

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        for work in self._graphs[graph]:
            work()
        return (CudaError.cudaSuccess,)

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self._graphs[graph]
        self.live["graph"] -= 1
        return (CudaError.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> Any:
        del self._graphs[graph]
        self.live["graph exec"] -= 1
        return (CudaError.cudaSuccess,)


def stand_in(version: str, cuda: StandInCuda) -> Any:
    """A module like TensorRT's of one version, on a stand-in for CUDA; ``live`` counts its objects on the GPU."""
    api, live = API[version], Counter[str]()
    enums = {name: enum.IntEnum(name, members) for name, members in api["enums"].items()}  # type: ignore[misc]

    def checked(cls: type) -> type:
        real = set(api["classes"][cls.__name__])
        assert {name for name in vars(cls) if name[0] != "_"} <= real, f"{cls.__name__} of {version}"
        return cls

    @checked
    class ILogger:
        Severity = enums["Severity"]

        def log(self, severity: Any, msg: str) -> None:
            raise AssertionError("not subclassed")

    class IProgressMonitor:
        pass

    @checked
    class INetworkDefinition:
        num_inputs = 1

        def __init__(self, flags: int) -> None:
            self._flags = flags
            self._model: dict[str, Any] = {}

        def get_input(self, index: int) -> Any:
            return SimpleNamespace(name=self._model["input"], shape=tuple(self._model["shape"]))

    @checked
    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network
            self.num_errors = 0

        def parse_from_file(self, model: str) -> bool:
            return self.parse(Path(model).read_bytes())

        def parse(self, model: bytes, path: Any = None) -> bool:
            self._network._model = _read(model, version)
            self._errors = self._network._model.get("parse", [])
            self.num_errors = len(self._errors)
            return not self._errors

        def get_error(self, index: int) -> Any:
            said = self._errors[index]
            error = SimpleNamespace(desc=lambda: said["text"], code=lambda: f"ErrorCode.{enums['ErrorCode'][said['code']].name}")
            if "node_operator" in api["classes"]["ParserError"]:
                error.node_operator, error.node_name = lambda: said["operator"], lambda: said["node"]
            return error

    @checked
    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self._names = set(data.decode().split()) if data else set()

        def serialize(self) -> bytes:
            return " ".join(sorted(self._names)).encode()

        def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
            self._names |= input_cache._names
            return True

    @checked
    class IBuilderConfig:
        builder_optimization_level = 3
        profiling_verbosity = enums["ProfilingVerbosity"].LAYER_NAMES_ONLY

        def __init__(self) -> None:
            self._flags, self._limits = {"TF32"}, {}  # type: ignore[var-annotated]
            self._sources = sum(1 << int(source) for source in enums["TacticSource"])
            self._timings = ITimingCache(b"")

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag.name)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._limits[pool.name] = pool_size

        def get_tactic_sources(self) -> int:
            return self._sources

        def set_tactic_sources(self, tactic_sources: int) -> bool:
            self._sources = tactic_sources
            return True

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self._timings = cache
            return b"foreign" not in cache.serialize()

        def get_timing_cache(self) -> Any:
            return self._timings

        def add_optimization_profile(self, profile: Any) -> int:
            self._profile = profile._shapes
            return 0

    @checked
    class IOptimizationProfile:
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes = {input: (min, opt, max)}

    @checked
    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> Any:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> Any:
            self._config = IBuilderConfig()
            return self._config

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            return _build(network, config, self._logger, enums)

    @checked
    class EngineInspector:
        def get_engine_information(self, format: Any) -> str:
            layer = {"Name": "conv", "Weights": {"Type": "Half", "Count": 9}, "Inputs": [{"Format/Datatype": "Float"}]}
            return json.dumps({"Layers": [layer, {"Inputs": [{"Format/Datatype": "Row major linear FP32"}]}, {"Inputs": []}]})

    @checked
    class IExecutionContext:
        def __init__(self, model: dict[str, Any]) -> None:
            self._model, self._at, self._n = model, {}, 0  # type: ignore[var-annotated]
            live["context"] += 1

        def __del__(self) -> None:
            live["context"] -= 1

        def set_input_shape(self, name: str, shape: Any) -> bool:
            smallest, largest = self._model["range"]
            self._n = shape[0] if smallest <= shape[0] <= largest else 0
            return self._n > 0

        def get_tensor_shape(self, name: str) -> Any:
            rest = self._model["shape"][1:] if name == self._model["input"] else _outputs(self._model)[name]
            return (self._n, *rest)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._at[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            if cuda.recording is not None and self._model.get("no_graph"):
                return False
            cuda.do(self._compute)
            return not self._model.get("fails")

        def _compute(self) -> None:
            shape = (self._n, *self._model["shape"][1:])
            address = self._at[self._model["input"]]
            given = np.frombuffer((ctypes.c_float * int(np.prod(shape))).from_address(address), np.float32).reshape(shape)
            for name, value in self._run(given).items():
                value = np.ascontiguousarray(value, np.float32)
                ctypes.memmove(self._at[name], value.ctypes.data, value.nbytes)

        def _run(self, given: Any) -> dict[str, Any]:
            if "onnx" not in self._model:
                return {"mean": given.reshape(self._n, -1).mean(axis=1), "same": given}
            import onnxruntime

            session = onnxruntime.InferenceSession(base64.b64decode(self._model["onnx"]), providers=["CPUExecutionProvider"])
            names = list(_outputs(self._model))
            return dict(zip(names, session.run(names, {self._model["input"]: given}), strict=True))

    @checked
    class ICudaEngine:
        def __init__(self, model: dict[str, Any]) -> None:
            self._model = model
            self.num_io_tensors = 1 + len(_outputs(model))
            live["engine"] += 1

        def __del__(self) -> None:
            live["engine"] -= 1

        def get_tensor_name(self, index: int) -> str:
            return str([self._model["input"], *_outputs(self._model)][index])

        def get_tensor_mode(self, name: str) -> Any:
            return enums["TensorIOMode"]["INPUT" if name == self._model["input"] else "OUTPUT"]

        def get_tensor_shape(self, name: str) -> Any:
            return tuple(self._model["shape"])

        def get_tensor_dtype(self, name: str) -> Any:
            return enums["DataType"][self._model.get("type", "FLOAT")]

        def create_execution_context(self) -> Any:
            largest = self._model.get("largest_context", 99)
            return IExecutionContext(self._model) if self._model["range"][1] <= largest else None

        def create_engine_inspector(self) -> Any:
            return EngineInspector()

    @checked
    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            model = json.loads(serialized_engine)
            if model.get("stale"):
                self._logger.log(enums["Severity"].ERROR, "Serialization assertion stdVersionRead == kVERSION failed")
                return None
            return ICudaEngine(model)

    module = SimpleNamespace(
        __version__=version, ILogger=ILogger, OnnxParser=OnnxParser, Builder=Builder, Runtime=Runtime, live=live,
        **{name: found for name, found in enums.items() if name != "Severity"},
    )  # fmt: skip
    if "IProgressMonitor" in api["classes"]:
        module.IProgressMonitor = IProgressMonitor
    return module


def _outputs(model: dict[str, Any]) -> dict[str, list[int]]:
    """Output -> its dimensions without the batch."""
    found: dict[str, list[int]] = model.get("outputs") or {"mean": [1], "same": model["shape"][1:]}
    return found


def _read(data: bytes, version: str) -> dict[str, Any]:
    """A model's JSON; an ONNX file's input, outputs and content, or what is wrong with it, as JSON."""
    if data.startswith(b"{"):
        return dict(json.loads(data))
    import onnx

    try:
        graph = onnx.load_model_from_string(data).graph
    except Exception:  # noqa: BLE001 - protobuf's own
        return {"parse": [{"text": "Failed to parse ONNX model", "code": "MODEL_DESERIALIZE_FAILED", "operator": "", "node": ""}]}
    unknown = [node for node in graph.node if not onnx.defs.has(node.op_type)]
    if unknown:
        said = {"text": f"No importer registered for op: {unknown[0].op_type}", "code": "UNSUPPORTED_NODE"}
        return {"parse": [said | {"operator": unknown[0].op_type, "node": unknown[0].name}]}

    weights = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.INT8}
    if version.startswith("8.") and any(node.op_type == "DequantizeLinear" and node.input[0] in weights for node in graph.node):
        return {"parse": [{"text": "invalid weights type of Int8", "code": "INVALID_NODE", "operator": "", "node": ""}]}

    def dims(item: Any) -> list[int]:
        return [dim.dim_value or -1 for dim in item.type.tensor_type.shape.dim]

    outputs = {item.name: dims(item)[1:] for item in graph.output}
    content = base64.b64encode(data).decode()
    return {"input": graph.input[0].name, "shape": dims(graph.input[0]), "outputs": outputs, "onnx": content}


def _build(network: Any, config: Any, logger: Any, enums: Any) -> bytes | None:
    """What the model's JSON says a build shall do: die, hang, complain, run out of memory, or make an engine."""
    model = network._model
    largest = next(iter(config._profile.values()))[2][0] if hasattr(config, "_profile") else model["shape"][0]
    smallest = 1 if hasattr(config, "_profile") else largest
    monitor = getattr(config, "progress_monitor", None)
    if monitor is not None:
        monitor.phase_start("Building Engine", None, 2)
        monitor.step_complete("Building Engine", 0)
        monitor.phase_finish("Building Engine")
    for severity, text in model.get("says", []):
        logger.log(enums["Severity"][severity], text)
    if "signal" in model:
        os.kill(os.getpid(), signal.Signals[model["signal"]])
    time.sleep(model.get("takes_s", _SLOW_S))
    if largest > model.get("largest_build", 99):
        logger.log(
            enums["Severity"].ERROR, "[virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further information)"
        )
        return None
    if model.get("no_engine"):
        return None
    config._timings._names.add(model.get("timing", "conv"))
    made = model | {"range": [smallest, largest], "flags": sorted(config._flags), "network": network._flags, "limits": config._limits}
    made |= {"level": config.builder_optimization_level, "sources": config._sources, "verbosity": config.profiling_verbosity.name}
    return json.dumps(made).encode()


def lay(directory: Path, version: str, capacity: int = 4 << 30) -> None:
    """Write both as packages ``tensorrt`` and ``cuda.bindings.runtime``, for processes that have the directory on their path."""
    (directory / "cuda" / "bindings").mkdir(parents=True)
    for package in (directory / "cuda", directory / "cuda" / "bindings"):
        (package / "__init__.py").write_text("")
    names = f"cuda = StandInCuda(capacity={capacity})\n"
    names += "globals().update({n: getattr(cuda, n) for n in dir(cuda) if n.startswith('cuda')})\n"
    (directory / "cuda" / "bindings" / "runtime.py").write_text("from tests.support.trt_stand_in import StandInCuda\n" + names)
    made = "from cuda.bindings import runtime\nfrom tests.support.trt_stand_in import stand_in\n"
    made += f"_it = stand_in({version!r}, runtime.cuda)\n"
    (directory / "tensorrt.py").write_text(made + "globals().update(vars(_it))\n")
