"""OpenVINO on the CPU.

The precision is always forced to f32. By default OpenVINO silently runs a float32 model in bfloat16 on CPUs that support it: twice as
fast, with 8 bits of mantissa, in a precision that no gate has tested. Quantized layers still run in 8 bits, because the graph says so.
The hint does not show what ran (f16 runs as bf16), so the precision of every layer is read from the compiled model, and a candidate with
another precision than its label is refused with ``runtime.precision``: an int8 or mixed file without any layer in 8 bits would be shown
as int8 without being faster than the float model. On a processor without VNNI a model of which a layer runs in 8 bits is refused as well,
unless its weights are so small that no sum is clipped (:mod:`appliance.runtime.weight_range`).

Models are compiled for a fixed shape: with a dynamic batch the reference model takes up to 1.5 times as long, because some operators
are not fused. One model is compiled for a single image, the most frequent case, and one for the batch size of the candidate; any other
number of images is run as full batches and single images, as a batch gains little on a CPU. Threads are not pinned: the web process
needs a core too, and a pinned thread would have to wait for it.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.core.errors import InferenceError
from appliance.runtime import Candidate, OnProgress, TensorSpec, openvino_cache
from appliance.runtime.cpu_features import saturates
from appliance.runtime.tensors import (
    Layer,
    check_outputs,
    check_precision,
    check_signature,
    checked_input,
    counted,
    describe_adapter,
    failure,
    in_eight_bits,
    ran_in,
)
from appliance.runtime.weight_range import fits_16_bits

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# Operators that only move or convert tensors are not counted as layers.
_NO_LAYER: Final = frozenset({"Input", "Output", "Parameter", "Result", "Const", "Constant", "Reorder", "Reshape", "ShapeOf", "Transpose"})
_HEAVY: Final = frozenset({
    "Convolution", "Deconvolution", "FullyConnected", "MatMul", "MHA", "RNNCell", "RNNSeq", "ScaledDotProductAttention",
})  # fmt: skip
_SINK: Final = re.compile(r"/sink_port_\d+$")
_NOISE: Final = ("Exception from ", "Check '", "While validating", "FrontEnd API failed", "Summary:")


def import_openvino() -> ModuleType:
    """Import OpenVINO without its model converter, which takes 90 ms and imports the telemetry.

    Raises:
        ImportError: it is not installed, or cannot run on this machine.
    """
    tools = "openvino.tools"
    if "openvino" not in sys.modules:
        sys.modules[tools] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if sys.modules.get(tools, ...) is None:
            del sys.modules[tools]
    module: ModuleType = openvino
    return module


def version() -> str:
    """Return the version of OpenVINO without the build number."""
    return str(import_openvino().get_version()).split("-", 1)[0]


class OpenVinoRuntime:
    """A model compiled by OpenVINO; see ``appliance.runtime.Runtime``."""

    name = "openvino"

    def __init__(self, candidate: Candidate) -> None:
        self._ov = import_openvino()
        self.version = version()
        self.precision = candidate.precision
        self.provider = candidate.provider
        self._candidate = candidate
        self._spec_name = ""
        self._shape: tuple[int, ...] = ()
        self._requests: dict[int, Any] = {}
        self._outputs: list[str] = []
        self._ran: dict[int, list[Layer]] = {}
        self._threads = candidate.cores

    def load(self, model_path: Path, input_spec: TensorSpec, *, cache: Path | None = None, on_progress: OnProgress | None = None) -> None:
        """Compile the model for one image and for the batch size of the candidate; see ``Runtime.load``."""
        self._spec_name, self._shape = input_spec.name, tuple(input_spec.shape)
        core = self._ov.Core()
        if self.provider not in core.available_devices:
            raise InferenceError("runtime.unavailable", f"OpenVINO has no {self.provider} here, only {', '.join(core.available_devices)}")
        sizes = sorted({1, self._candidate.batch})
        try:
            for done, size in enumerate(sizes):
                model = self._load_or_compile(core, model_path, size, cache)
                self._requests[size], self._ran[size] = model.create_infer_request(), layers_of(model)
                if on_progress is not None:
                    on_progress((done + 1) / len(sizes))
        except (RuntimeError, MemoryError, TypeError, ValueError, OSError) as error:  # the exceptions of its bindings
            raise failure("the model cannot be loaded", _last_line(error), error) from error
        self.provider = ", ".join(model.get_property("EXECUTION_DEVICES"))
        self._outputs = [output_name(output) for output in model.outputs]
        self._threads = int(model.get_property("INFERENCE_NUM_THREADS"))  # fewer than requested if two threads share a core
        for ran in self._ran.values():
            self._check_layers(ran, model_path)

    def _load_or_compile(self, core: Any, model_path: Path, size: int, cache: Path | None) -> Any:
        """Return the model for one batch size, from the cache if it is there."""
        if cache is None:
            return self._compile(core, model_path, size)
        settings = {"openvino": self.provider, "shape": [size, *self._shape], "input": self._spec_name, **self._settings()}
        box = {"version": str(self._ov.get_version()), "processor": str(core.get_property(self.provider, "FULL_DEVICE_NAME"))}
        entry = openvino_cache.of_file(model_path, settings, box)
        if entry is not None and (data := entry.read(cache)):
            try:
                return core.import_model(data, self.provider, self._settings())
            except RuntimeError as error:
                logger.warning("compiled model %s is compiled again: %s", entry.file_name, _last_line(error))
        model = self._compile(core, model_path, size)
        if entry is not None:
            exported = model.export_model()
            entry.write(cache, exported if isinstance(exported, bytes) else exported.getvalue())  # bytes up to 2025
        return model

    def _compile(self, core: Any, model_path: Path, size: int) -> Any:
        model = core.read_model(model_path)
        name = ", ".join(self._spec_name if self._spec_name in item.get_names() else item.get_any_name() for item in model.inputs)
        shape = model.inputs[0].partial_shape if name == self._spec_name else self._ov.PartialShape.dynamic()
        dims = [n.get_length() if n.is_static else None for n in shape] if shape.rank.is_static else []
        kind = model.inputs[0].element_type.get_type_name() if model.inputs else ""
        check_signature(name, dims, kind, self._spec_name, self._shape, size)
        model.reshape([size, *self._shape])
        return core.compile_model(model, self.provider, self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": "f32",
            "EXECUTION_MODE_HINT": "ACCURACY",  # no quantization that is not in the graph
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": self._candidate.cores,
            "ENABLE_CPU_PINNING": False,
        }

    def _check_layers(self, ran: list[Layer], model_path: Path) -> None:
        """Refuse layers with another precision than the variant's, or with results that differ from the gate; raises InferenceError."""
        rounded = sum(precision == "bf16" for _, precision in ran)
        if rounded:
            raise InferenceError("runtime.precision", f"{rounded} layers run in bf16 though f32 was asked for")
        heavy = _heavy(ran)
        check_precision(self.precision, heavy)
        if in_eight_bits(heavy) and saturates() and not fits_16_bits(model_path):
            raise InferenceError(
                "runtime.precision",
                f"sums of 8-bit products, of {in_eight_bits(heavy)} layers, may be clipped on this processor, which has no VNNI",
            )

    def warm_up(self) -> None:
        """Run each compiled model once; see ``Runtime.warm_up``."""
        for size in self._requests:
            self.infer({self._spec_name: np.zeros((size, *self._shape), np.float32)})

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model; see ``Runtime.infer``."""
        if not self._requests:
            raise InferenceError("job.error", "the runtime is closed")
        value = checked_input(inputs, self._spec_name, self._shape)
        n, batch = len(value), self._candidate.batch
        try:
            if n in self._requests:
                outputs = self._run(value)
            else:
                starts = [*range(0, n - n % batch, batch), *range(n - n % batch, n)]
                parts = [self._run(value[start:end]) for start, end in zip(starts, [*starts[1:], n], strict=True)]
                outputs = {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}
        except (RuntimeError, MemoryError, TypeError, ValueError) as error:
            raise failure("OpenVINO", _last_line(error), error) from error
        check_outputs(outputs, n)
        return outputs

    def _run(self, value: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        request = self._requests[len(value)]
        value = value if value.flags.writeable else value.copy()  # an OpenVINO Tensor cannot share read-only memory
        request.set_input_tensor(self._ov.Tensor(value, shared_memory=True))
        request.infer()
        # Copied: the next inference overwrites the memory.
        return {name: request.get_output_tensor(index).data.copy() for index, name in enumerate(self._outputs)}

    def describe(self) -> dict[str, Any]:
        """Describe what ran on one image; see ``Runtime.describe``. ``layers_batch`` is added if a batch runs in other precisions."""
        ran, of_batch = (self._ran.get(size, []) for size in (1, self._candidate.batch))
        layers, layers_batch = (counted(precision for _, precision in each) for each in (ran, of_batch))
        described = describe_adapter(self, self._threads, self._candidate.batch) | {"layers": layers, "ran": ran_in(_heavy(ran))}
        return described | ({"layers_batch": layers_batch} if layers_batch != layers else {})

    def close(self) -> None:
        """Free the compiled models."""
        self._requests.clear()


def output_name(output: Any) -> str:
    """Return the name of an output in the ONNX graph, from its Result node; fused casts may have renamed the tensor."""
    name = _SINK.sub("", output.get_node().get_friendly_name())
    return name if name in output.get_names() else str(output.get_any_name())


def _heavy(ran: list[Layer]) -> list[str]:
    return [precision for kind, precision in ran if kind in _HEAVY]


def layers_of(model: Any) -> list[Layer]:
    """List kind and precision (``runtimePrecision`` of the runtime model) of each layer of a compiled model, without conversions."""
    infos = [op.get_rt_info() for op in model.get_runtime_model().get_ordered_ops()]
    layers = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in infos]
    return [(kind, precision) for kind, precision in layers if kind not in _NO_LAYER]


def _last_line(error: BaseException) -> str:
    """Return the informative line of a message: the last one that is no source location and no failed assertion."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith(_NOISE)), type(error).__name__)
