"""The port to whatever runs a model: one protocol, one adapter per runtime, chosen by ``open_runtime``.

An adapter is ready when it exists: constructing it loads the model, checks it against the manifest's input and runs it once.
What it reports (``provider``, ``describe``) is what the runtime says it got, never what was asked for; asking for something
it did not get is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model_sync.bundle import InputSpec

__all__ = ["Runtime", "open_runtime"]

# ONNX Runtime reports home unless it is told not to before it is imported. Nothing ever leaves this box.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

CPU = "CPUExecutionProvider"


class Runtime(Protocol):
    """A model that is loaded, warmed up and ready to read.

    Attributes:
        name: the runtime, as in the finding: "onnxruntime".
        version: its version.
        precision: the precision of the variant it runs.
        provider: the execution provider that the runtime reports for the session.
    """

    name: str
    version: str
    precision: str
    provider: str

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model.

        Args:
            inputs: input name -> float32 array of the shape that the manifest says.

        Returns:
            Output name -> array; every value is finite.

        Raises:
            InferenceError: ``job.error``: wrong input, a failure of the runtime, or an output that is no number.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What ran, for the result and the health page: runtime, version, provider, precision, threads; JSON types only."""
        ...

    def close(self) -> None:
        """Free the model; the object cannot be used afterwards."""
        ...


def open_runtime(model_path: Path, input_spec: InputSpec, precision: str, threads: int | None = None, *, provider: str = CPU) -> Runtime:
    """Load a model and warm it up.

    Args:
        model_path: the ONNX file of the variant.
        input_spec: what the manifest says the model takes.
        precision: the variant's precision, for the record.
        threads: threads of one inference; all of this process's cores when None.
        provider: the execution provider that must run it.

    Raises:
        InferenceError: ``job.error``: the model cannot be loaded, does not take that input, or runs on another provider.
    """
    from appliance.runtime.onnxruntime import OnnxRuntime

    return OnnxRuntime(model_path, input_spec, precision, threads, provider=provider)
