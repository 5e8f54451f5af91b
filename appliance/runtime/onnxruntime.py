"""ONNX Runtime: the adapter that every box has.

Set for a small, quiet process: no memory arena (an arena keeps its high-water mark for ever) and no spinning threads (they
would burn the core that the web process needs); neither costs time at one scan after another: 16 ms for the reference model
on one core of an AMD EPYC with or without. Measured resident memory of a bare process with the reference model: 101 MB.

What ran is read from ONNX Runtime's own profile of the warm-up, not from the file: it tells each kernel, what it took and where it ran.
A Q/DQ graph whose pattern its fuser does not know runs in float around conversions, and nothing else says so. The profile costs 3 ms
once; afterwards the session is as fast as one that never had it. A float file that is called int8 is refused by it; a Q/DQ graph that runs
in float is not, as its numbers are those that were gated and this is what every box falls back to: it says so in ``ran``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime as ort

from appliance.core.errors import InferenceError
from appliance.runtime import CPU, Candidate, TensorSpec, Told
from appliance.runtime.cpu_features import avoid_saturation
from appliance.runtime.tensors import (
    Layer,
    check_outputs,
    check_precision,
    check_signature,
    checked_input,
    counted,
    failure,
    ran_in,
)

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
_QUANTIZED: Final = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
_DYNAMIC: Final = "DynamicQuantize"  # takes float32 and multiplies in 8 bits
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
        self._ran: list[Layer] = []
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
        self._ran = layers_of(kernels)
        quantized = any(kernel.get("op_name") in _QUANTIZED for kernel in kernels)
        check_precision(self.precision, _heavy(self._ran), quantized=quantized)

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
        avoid_saturation(options)
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
        """What ran; see ``Runtime.describe``. ``layers`` and ``ran`` are there once it is warm, and where there was room for a profile."""
        layers = counted(precision for _, precision in self._ran)
        return {
            "runtime": self.name,
            "version": self.version,
            "provider": self.provider,
            "precision": self.precision,
            "threads": self._candidate.cores,
            "batch": self._candidate.batch,
        } | ({"layers": layers, "ran": ran_in(_heavy(self._ran))} if layers else {})

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


def layers_of(kernels: Iterable[dict[str, Any]]) -> list[Layer]:
    """Operator and precision of each layer that ran, in OpenVINO's words: that of its first input; ``f32``, ``f16``, ``u8``, ``i8``."""
    found = []
    for kernel in kernels:
        first = next(iter(kernel.get("input_type_shape") or [{}]))
        operator, kind = str(kernel.get("op_name")), next(iter(first), None)
        if operator not in _NO_LAYER and kind is not None:
            found.append((operator, "u8" if operator.startswith(_DYNAMIC) else _PRECISIONS.get(kind, kind)))
    return found


def _heavy(ran: Iterable[Layer]) -> list[str]:
    return [precision for operator, precision in ran if _is_heavy(operator)]


def _is_heavy(operator: str) -> bool:
    return any(name in operator for name in _HEAVY)


def check_placement(kernels: Sequence[dict[str, Any]], provider: str) -> None:
    """Look where the layers of a model ran; light ones may run on the CPU, where shapes are worked out on purpose.

    Raises:
        InferenceError: a heavy layer did not run where it should (``job.error``: ONNX Runtime itself moves it to the CPU without a word),
            or nothing tells where any ran, and it should not be the CPU (``runtime.unavailable``: no room for a profile).
    """
    if provider == CPU:
        return
    if not kernels:
        raise InferenceError("runtime.unavailable", f"asked for {provider}, and where the layers ran cannot be told: there is no profile")
    elsewhere = [kernel for kernel in kernels if kernel.get("provider") != provider and _is_heavy(str(kernel.get("op_name")))]
    if elsewhere:
        first = elsewhere[0]
        raise InferenceError(
            "job.error", f"asked for {provider}, {len(elsewhere)} layers ran on {first.get('provider')} (the first: {first.get('op_name')})"
        )


def _first_line(error: Exception) -> str:
    """The message without what ONNX Runtime adds below."""
    return (str(error).splitlines() or [type(error).__name__])[0]
