"""The interface to the runtimes: one protocol, one adapter per runtime, opened by :func:`open_runtime`.

An adapter reports what the runtime really uses (``provider``, ``describe``), never what was requested. A request that the runtime does
not fulfil is an error; there is no silent fallback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from appliance.core.errors import InferenceError
from appliance.runtime.candidate import CPU, RUNTIMES, Candidate, RuntimeName, baseline_candidate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CPU", "RUNTIMES", "Candidate", "OnProgress", "Runtime", "RuntimeName", "TensorSpec", "baseline_candidate", "open_runtime"]

# ONNX Runtime sends telemetry unless this is set before its import. Nothing may leave this box.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# OpenVINO installs `openvino_telemetry`, which on `import openvino` creates an identifier, stores it in the home directory and sends it
# to an analytics service. A module that is None in sys.modules cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

OnProgress = Callable[[float], None]
"""Called with the part (0 to 1) of a long load, such as building an engine, that is done."""


class TensorSpec(Protocol):
    """The input of a model as a runtime needs it, for images and volumes: its name and the shape of one image's tensor."""

    @property
    def name(self) -> str:
        """Name of the input in the graph."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's tensor without the batch: [channels, height, width] or [channels, depth, height, width]."""
        ...


class Runtime(Protocol):
    """An adapter to one runtime, constructed with a :class:`Candidate`; it uses no resources before ``load``.

    Attributes:
        name: of the runtime, as in the findings: "onnxruntime".
        version: of the runtime.
        precision: of the variant.
        provider: the device or server that runs the model, as the runtime reports it after ``load``.
    """

    name: str
    version: str
    precision: str
    provider: str

    def load(self, model_path: Path, input_spec: TensorSpec, *, cache: Path | None = None, on_progress: OnProgress | None = None) -> None:
        """Load a model and compare its input with the manifest; build an engine first if the runtime needs one.

        Args:
            model_path: the ONNX file of the variant.
            input_spec: the input according to the manifest.
            cache: directory for engines and timing caches; nothing is kept when None.
            on_progress: called during a long load.

        Raises:
            InferenceError: ``job.error`` (the model cannot be loaded, has another input, or would run on another provider than requested),
                ``runtime.unavailable`` (the runtime is not on this box), ``runtime.memory``, ``runtime.build`` (no engine).
        """
        ...

    def warm_up(self) -> None:
        """Run the model once with the batch size of the candidate, so that the first scan does not wait for it.

        Raises:
            InferenceError: as ``infer``.
        """
        ...

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model.

        Args:
            inputs: input name -> float32 array [n, ...] with the shape of the manifest; n from 1 to the batch size of the candidate.

        Returns:
            Output name -> array [n, ...]; every value is finite.

        Raises:
            InferenceError: ``job.error``: wrong input, a failure of the runtime, or an output that is not finite.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Describe what runs, for the results and the health page; JSON types only.

        The keys are ``runtime``, ``version``, ``provider``, ``precision`` (of the variant), ``threads``, ``batch``, and if the runtime
        reports it: ``layers`` (precision -> number of layers) and ``ran``, the precisions of the layers with weights as the manifest
        names them, the most frequent first: "fp32" for an fp16 file on a CPU, "int8 + fp32" if some ran in float; empty without weights.
        """
        ...

    def close(self) -> None:
        """Free the model; the adapter cannot be used afterwards."""
        ...


def open_runtime(
    model_path: Path, input_spec: TensorSpec, candidate: Candidate, *, cache: Path | None = None, on_progress: OnProgress | None = None
) -> Runtime:
    """Load a model as the candidate says and warm it up; arguments and errors as :meth:`Runtime.load`."""
    module, name = _ADAPTERS[candidate.runtime]
    runtime: Runtime | None = None
    try:  # the module of the adapter and the library of the runtime are imported only now
        adapter: Runtime = getattr(importlib.import_module(module), name)(candidate)
        runtime = adapter
        adapter.load(model_path, input_spec, cache=cache, on_progress=on_progress)
        adapter.warm_up()
    except BaseException as error:
        if runtime is not None:
            runtime.close()
        if isinstance(error, ImportError):
            reason = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else f"{error}"
            raise InferenceError("runtime.unavailable", f"{candidate.runtime}: {reason[:200]}") from error
        raise
    return adapter


_ADAPTERS: Final[dict[RuntimeName, tuple[str, str]]] = {
    "onnxruntime": ("appliance.runtime.onnxruntime", "OnnxRuntime"),
    "openvino": ("appliance.runtime.openvino", "OpenVinoRuntime"),
    "tensorrt": ("appliance.runtime.tensorrt", "TensorRtRuntime"),
    "triton": ("appliance.runtime.triton", "TritonRuntime"),
}
