"""ONNX Runtime: the adapter that every box has.

Set for a small, quiet process: no memory arena (an arena keeps its high-water mark for ever) and no spinning threads (they
would burn the core that the web process needs); neither costs time at one scan after another: 16 ms for the reference model
on one core of an AMD EPYC with or without. Measured resident memory of a bare process with the reference model: 101 MB.

What ran is read from ONNX Runtime's own profile of the warm-up, not from the file: it tells each kernel, what it took and where it ran.
A Q/DQ graph whose pattern its fuser does not know runs in float around conversions, and nothing else says so. The profile costs 3 ms
once; afterwards the session is as fast as one that never had it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime as ort

from appliance.errors import InferenceError
from appliance.runtime import CPU, Candidate, TensorSpec, Told
from appliance.runtime.processor import saturates
from appliance.runtime.tensors import check_outputs, check_signature, checked_input, counted, failure

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_PROFILE_BYTES: Final = 16 << 20
_LOG_ERRORS_ONLY: Final = 3
_KERNEL: Final = "_kernel_time"
# What moves or converts tensors is no layer of the model.
_NO_LAYER: Final = frozenset({
    "Cast", "DequantizeLinear", "Flatten", "Identity", "MemcpyFromHost", "MemcpyToHost", "QuantizeLinear", "ReorderInput", "ReorderOutput",
    "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
_HEAVY: Final = ("Conv", "Gemm", "MatMul", "Attention", "LSTM", "GRU")
_PRECISIONS: Final = {
    "float": "f32", "float16": "f16", "bfloat16": "bf16", "double": "f64", "uint8": "u8", "int8": "i8", "int32": "i32", "int64": "i64",
}  # fmt: skip

# On a GPU since Ampere, float32 is otherwise multiplied in TF32, with 10 bits of mantissa and without a word; and the memory taken doubles.
_OPTIONS: Final = {"CUDAExecutionProvider": {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}}


class OnnxRuntime:
    """A model in an ONNX Runtime session; see ``appliance.runtime.Runtime``."""

    name = "onnxruntime"

    def __init__(self, candidate: Candidate) -> None:
        self.version: str = ort.__version__
        self.precision = candidate.precision
        self.provider = candidate.provider
        self._candidate = candidate
        self._session: Any = None
        self._input = ""
        self._shape: tuple[int, ...] = ()
        self._outputs: list[str] = []
        self._layers: dict[str, int] = {}
        self._profile: TemporaryDirectory[str] | None = None

    def load(self, model_path: Path, input_spec: TensorSpec, *, cache: Path | None = None, told: Told | None = None) -> None:
        """Load; see ``Runtime.load``. It builds nothing, so nothing is cached and nothing is told."""
        del cache, told
        self._shape = input_spec.shape
        self._input = input_spec.name
        self._session = self._open(model_path, self._candidate.provider)
        self.provider = self._session.get_providers()[0]
        if self.provider != self._candidate.provider:
            raise InferenceError("job.error", f"asked for {self._candidate.provider}, the session runs on {self.provider}")
        inputs = self._session.get_inputs()
        dims = [n if isinstance(n, int) else None for n in inputs[0].shape] if inputs else []
        name, kind = ", ".join(item.name for item in inputs), inputs[0].type if inputs else ""
        check_signature(name, dims, kind, self._input, self._shape, self._candidate.batch)
        self._outputs = [item.name for item in self._session.get_outputs()]

    def warm_up(self) -> None:
        """Run once and see what ran; see ``Runtime.warm_up``."""
        try:
            self.infer({self._input: np.zeros((self._candidate.batch, *self._shape), np.float32)})
        finally:
            kernels = self._end_profile()
        check_placement(kernels, self.provider)
        self._layers = counted(layer_precisions(kernels))

    def _open(self, model_path: Path, provider: str) -> Any:
        if provider not in ort.get_available_providers():
            raise InferenceError(
                "runtime.unavailable", f"this ONNX Runtime has no {provider}, only {', '.join(ort.get_available_providers())}"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._candidate.cores
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = _LOG_ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        with suppress(OSError):  # no room for a profile: then nothing tells what ran
            self._profile = TemporaryDirectory(prefix="appliance-ort-")
            options.profile_file_prefix = str(Path(self._profile.name) / "profile")
            options.enable_profiling = True
        try:
            return ort.InferenceSession(str(model_path), options, providers=[provider], provider_options=[_OPTIONS.get(provider, {})])
        except Exception as error:  # port wrapper: the exceptions of ONNX Runtime have no public base
            raise failure("the model cannot be loaded", _first_line(error), error) from error

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model; see ``Runtime.infer``."""
        if self._session is None:
            raise InferenceError("job.error", "the runtime is closed")
        value = checked_input(inputs, self._input, self._shape)
        try:
            values = self._session.run(self._outputs, {self._input: value})
        except Exception as error:  # port wrapper, as above
            raise failure("ONNX Runtime", _first_line(error), error) from error
        outputs = dict(zip(self._outputs, values, strict=True))
        check_outputs(outputs, len(value))
        return outputs

    def describe(self) -> dict[str, Any]:
        """What ran; see ``Runtime.describe``. ``layers`` is there once it is warm."""
        return {
            "runtime": self.name,
            "version": self.version,
            "provider": self.provider,
            "precision": self.precision,
            "threads": self._candidate.cores,
            "batch": self._candidate.batch,
        } | ({"layers": dict(self._layers)} if self._layers else {})

    def close(self) -> None:
        """Free the session."""
        self._end_profile()
        self._session = None

    def _end_profile(self) -> list[dict[str, Any]]:
        """End the profile and return its kernels; none when there was no profile, or nothing can be read from it."""
        profile, self._profile = self._profile, None
        if profile is None:
            return []
        with profile:
            if self._session is None:
                return []
            with suppress(OSError, ValueError):
                path = Path(self._session.end_profiling())
                if path.stat().st_size <= _MOST_PROFILE_BYTES:  # a loop writes down every round: not worth a box's memory
                    return kernels_of(json.loads(path.read_bytes()))
            return []


def kernels_of(events: object) -> list[dict[str, Any]]:
    """The kernels in ONNX Runtime's profile: ``op_name``, ``provider``, ``input_type_shape`` and more of each that ran."""
    of_nodes = [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
    return [event["args"] for event in of_nodes if str(event.get("name", "")).endswith(_KERNEL) and isinstance(event.get("args"), dict)]


def layer_precisions(kernels: Iterable[dict[str, Any]]) -> list[str]:
    """The precision of each layer that ran, in OpenVINO's words: that of its first input; ``f32``, ``f16``, ``u8``, ``i8``."""
    found = []
    for kernel in kernels:
        first = next(iter(kernel.get("input_type_shape") or [{}]))
        kind = next(iter(first), None)
        if kernel.get("op_name") not in _NO_LAYER and kind is not None:
            found.append(_PRECISIONS.get(kind, kind))
    return found


def check_placement(kernels: Iterable[dict[str, Any]], provider: str) -> None:
    """Raise InferenceError when a heavy layer did not run where it should: ONNX Runtime itself moves it to the CPU without a word.

    Light ones may: shapes are worked out on the CPU on purpose.
    """
    elsewhere = [
        kernel for kernel in kernels
        if provider != CPU and kernel.get("provider") != provider and any(name in str(kernel.get("op_name")) for name in _HEAVY)
    ]  # fmt: skip
    if elsewhere:
        first = elsewhere[0]
        raise InferenceError(
            "job.error", f"asked for {provider}, {len(elsewhere)} layers ran on {first.get('provider')} (the first: {first.get('op_name')})"
        )


def _first_line(error: Exception) -> str:
    """The message without what ONNX Runtime adds below."""
    return (str(error).splitlines() or [type(error).__name__])[0]
