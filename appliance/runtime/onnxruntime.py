"""ONNX Runtime: the adapter that every box has.

Set for a small, quiet process: no memory arena (an arena keeps its high-water mark for ever) and no spinning threads (they
would burn the core that the web process needs); neither costs time at one scan after another: 16 ms for the reference model
on one core of an AMD EPYC with or without. Measured resident memory of a bare process with the reference model: 101 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime as ort

from appliance.errors import InferenceError
from appliance.runtime import Candidate, TensorSpec, Told

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOG_ERRORS_ONLY: Final = 3


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

    def load(self, model_path: Path, input_spec: TensorSpec, *, cache: Path | None = None, told: Told | None = None) -> None:
        """Load; see ``Runtime.load``. It builds nothing, so nothing is cached and nothing is told."""
        del cache, told
        self._shape = input_spec.shape
        self._input = input_spec.name
        self._session = self._open(model_path, self._candidate.provider)
        self.provider = self._session.get_providers()[0]
        if self.provider != self._candidate.provider:
            raise InferenceError("job.error", f"asked for {self._candidate.provider}, the session runs on {self.provider}")
        self._check_signature()

    def warm_up(self) -> None:
        """Run once; see ``Runtime.warm_up``."""
        self.infer({self._input: np.zeros((self._candidate.batch, *self._shape), np.float32)})

    def _open(self, model_path: Path, provider: str) -> Any:
        if provider not in ort.get_available_providers():
            raise InferenceError("job.error", f"this ONNX Runtime has no {provider}, only {', '.join(ort.get_available_providers())}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._candidate.cores
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = _LOG_ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return ort.InferenceSession(str(model_path), options, providers=[provider])
        except Exception as error:  # port wrapper: the exceptions of ONNX Runtime have no public base
            raise InferenceError("job.error", f"the model cannot be loaded: {_first_line(error)}") from error

    def _check_signature(self) -> None:
        """The file must take what the manifest says; a number in its shape must be the manifest's, a name may be anything."""
        inputs = self._session.get_inputs()
        if [item.name for item in inputs] != [self._input]:
            raise InferenceError("job.error", f"the model's inputs are {[item.name for item in inputs]}, the manifest says {self._input!r}")
        shape = inputs[0].shape
        fits = len(shape) == 1 + len(self._shape) and all(
            not isinstance(n, int) or n == m for n, m in zip(shape, (1, *self._shape), strict=True)
        )
        if not fits or inputs[0].type != "tensor(float)":
            raise InferenceError("job.error", f"the model takes {inputs[0].type} {shape}, the manifest says float {[1, *self._shape]}")

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model; see ``Runtime.infer``."""
        value = inputs.get(self._input)
        if set(inputs) != {self._input} or value is None or value.dtype != np.float32 or value.shape[1:] != self._shape:
            raise InferenceError("job.error", f"the model takes {self._input!r} as float32 [n, {', '.join(map(str, self._shape))}]")
        if self._session is None:
            raise InferenceError("job.error", "the runtime is closed")
        names = [item.name for item in self._session.get_outputs()]
        try:
            values = self._session.run(names, inputs)
        except Exception as error:  # port wrapper, as above
            raise InferenceError("job.error", f"ONNX Runtime: {_first_line(error)}") from error
        outputs = dict(zip(names, values, strict=True))
        for name, output in outputs.items():
            if output.shape[:1] != value.shape[:1]:
                raise InferenceError("job.error", f"output {name!r} has the shape {output.shape}")
            if not np.isfinite(output).all():
                raise InferenceError("job.error", f"output {name!r} holds values that are no numbers")
        return outputs

    def describe(self) -> dict[str, Any]:
        """What ran; see ``Runtime.describe``."""
        return {
            "runtime": self.name,
            "version": self.version,
            "provider": self.provider,
            "precision": self.precision,
            "threads": self._candidate.cores,
            "batch": self._candidate.batch,
        }

    def close(self) -> None:
        """Free the session."""
        self._session = None


def _first_line(error: Exception) -> str:
    """The message without the paths of this machine that ONNX Runtime likes to add below."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
