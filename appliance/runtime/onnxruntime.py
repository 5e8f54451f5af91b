"""ONNX Runtime: the adapter that every box has.

The settings are for a small process: no memory arena (it never shrinks) and no spinning threads (they would use the core that the web
process needs). Neither makes single images slower: 16 ms for the reference model on one core of an AMD EPYC with or without. A process
with the reference model has 101 MB of resident memory.

What ran is taken from the profile that ONNX Runtime writes of the warm-up (3 ms, once), not from the file: the profile lists each kernel
with its types and provider. A Q/DQ graph with a pattern that cannot be fused runs in float between conversions, and only the profile
shows that. A float file that is labelled int8 is refused. A Q/DQ graph that runs in float is accepted, because its results are those of
the gate and it is the fallback of every box; ``ran`` shows it.
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
from appliance.runtime import CPU, Candidate, OnProgress, TensorSpec
from appliance.runtime.cpu_features import avoid_saturation, saturates
from appliance.runtime.tensors import (
    Layer,
    check_outputs,
    check_precision,
    check_signature,
    checked_input,
    counted,
    describe_adapter,
    failure,
    ran_in,
)
from appliance.runtime.weight_range import fits_16_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_PROFILE_BYTES: Final = 16 << 20
_LOG_ERRORS_ONLY: Final = 3
_KERNEL: Final = "_kernel_time"
# Operators that only move or convert tensors are not counted as layers.
_NO_LAYER: Final = frozenset({
    "Cast", "DequantizeLinear", "Flatten", "Identity", "MemcpyFromHost", "MemcpyToHost", "QuantizeLinear", "ReorderInput", "ReorderOutput",
    "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
_QUANTIZED: Final = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
_DYNAMIC: Final = "DynamicQuantize"  # has float32 input and multiplies in 8 bits
_HEAVY: Final = ("Conv", "Gemm", "MatMul", "Attention", "LSTM", "GRU")
_PRECISIONS: Final = {
    "float": "f32", "float16": "f16", "bfloat16": "bf16", "double": "f64", "uint8": "u8", "int8": "i8", "int32": "i32", "int64": "i64",
}  # fmt: skip

# Otherwise GPUs since Ampere multiply float32 silently in TF32, with 10 bits of mantissa, and each allocation doubles the arena.
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

    def load(self, model_path: Path, input_spec: TensorSpec, *, cache: Path | None = None, on_progress: OnProgress | None = None) -> None:
        """Load the model; see ``Runtime.load``. It builds nothing: there is no cache and no progress."""
        del cache, on_progress
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
        """Run once and read from the profile what ran; see ``Runtime.warm_up``."""
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
        is_float = self._candidate.precision in ("fp32", "fp16")  # its weights need not be read
        if saturates() and (is_float or not fits_16_bits(model_path)):
            avoid_saturation(options)
        with suppress(OSError):  # no disk space for a profile: then it is unknown what ran
            self._profile = TemporaryDirectory(prefix="appliance-ort-")
            options.profile_file_prefix = str(Path(self._profile.name) / "profile")
            options.enable_profiling = True
        try:
            return ort.InferenceSession(str(model_path), options, providers=[provider], provider_options=[_OPTIONS.get(provider, {})])
        except Exception as error:  # the exceptions of ONNX Runtime have no public base class
            raise failure("the model cannot be loaded", _first_line(error), error) from error

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model; see ``Runtime.infer``."""
        if self._session is None:
            raise InferenceError("job.error", "the runtime is closed")
        value = checked_input(inputs, self._input, self._shape)
        try:
            values = self._session.run(self._outputs, {self._input: value})
        except Exception as error:  # as above
            raise failure("ONNX Runtime", _first_line(error), error) from error
        outputs = dict(zip(self._outputs, values, strict=True))
        check_outputs(outputs, len(value))
        return outputs

    def describe(self) -> dict[str, Any]:
        """Describe what ran; see ``Runtime.describe``. ``layers`` and ``ran`` need the warm-up and its profile."""
        layers = counted(precision for _, precision in self._ran)
        ran = {"layers": layers, "ran": ran_in(_heavy(self._ran))} if layers else {}
        return describe_adapter(self, self._candidate.cores, self._candidate.batch) | ran

    def close(self) -> None:
        """Free the session."""
        self._end_profile()
        self._session = None

    def _end_profile(self) -> list[dict[str, Any]]:
        """End the profile and return its kernels; empty when there was no profile or it cannot be read."""
        profile, self._profile = self._profile, None
        if profile is None:
            return []
        with profile:
            if self._session is None:
                return []
            with suppress(OSError, ValueError):
                path = Path(self._session.end_profiling())
                if path.stat().st_size <= _MAX_PROFILE_BYTES:  # it lists every iteration of a loop in the model
                    return kernels_of(json.loads(path.read_bytes()))
            return []


def kernels_of(events: object) -> list[dict[str, Any]]:
    """Extract the kernels from a profile of ONNX Runtime: each has ``op_name``, ``provider``, ``input_type_shape`` and more."""
    entries = [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
    return [event["args"] for event in entries if str(event.get("name", "")).endswith(_KERNEL) and isinstance(event.get("args"), dict)]


def layers_of(kernels: Iterable[dict[str, Any]]) -> list[Layer]:
    """List operator and precision (of the first input: ``f32``, ``f16``, ``u8``, ``i8``) of each layer that ran."""
    layers = []
    for kernel in kernels:
        first = next(iter(kernel.get("input_type_shape") or [{}]))
        operator, kind = str(kernel.get("op_name")), next(iter(first), None)
        if operator not in _NO_LAYER and kind is not None:
            layers.append((operator, "u8" if operator.startswith(_DYNAMIC) else _PRECISIONS.get(kind, kind)))
    return layers


def _heavy(ran: Iterable[Layer]) -> list[str]:
    return [precision for operator, precision in ran if _is_heavy(operator)]


def _is_heavy(operator: str) -> bool:
    return any(name in operator for name in _HEAVY)


def check_placement(kernels: Sequence[dict[str, Any]], provider: str) -> None:
    """Check that the heavy layers ran on the requested provider; light ones, such as shape computations, may run on the CPU.

    Raises:
        InferenceError: ``job.error``: a heavy layer ran on another provider (ONNX Runtime moves it to the CPU silently);
            ``runtime.unavailable``: it is unknown where the layers ran (no profile), and the provider is not the CPU.
    """
    if provider == CPU:
        return
    if not kernels:
        raise InferenceError("runtime.unavailable", f"asked for {provider}, and it is unknown where the layers ran: there is no profile")
    misplaced = [kernel for kernel in kernels if kernel.get("provider") != provider and _is_heavy(str(kernel.get("op_name")))]
    if misplaced:
        first = misplaced[0]
        raise InferenceError(
            "job.error", f"asked for {provider}, {len(misplaced)} layers ran on {first.get('provider')} (the first: {first.get('op_name')})"
        )


def _first_line(error: Exception) -> str:
    """Return the first line of the message, without the details that ONNX Runtime adds."""
    return (str(error).splitlines() or [type(error).__name__])[0]
