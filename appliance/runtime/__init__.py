"""The port to whatever runs a model: one protocol, one adapter per runtime, opened by ``open_runtime``.

What an adapter reports (``provider``, ``describe``) is what the runtime says it got, never what was asked for; asking for something
it did not get is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from appliance.core.errors import InferenceError
from appliance.runtime.candidate import CPU, RUNTIMES, Candidate, RuntimeName, plain_candidate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CPU", "RUNTIMES", "Candidate", "Runtime", "RuntimeName", "TensorSpec", "Told", "open_runtime", "plain_candidate"]

# ONNX Runtime reports home unless it is told not to before it is imported. Nothing ever leaves this box.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# So does OpenVINO, if `openvino_telemetry` is installed, which comes with it: on nothing more than `import openvino` it makes up an
# identifier, keeps it in the home directory and sends it to an analytics service. A module that is None cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

Told = Callable[[float], None]
"""Called with the part (0 to 1) of a long load, an engine being built, that is done."""


class TensorSpec(Protocol):
    """What a runtime needs to know of a manifest's input, of pictures and of volumes: its name and the shape of one image's tensor."""

    @property
    def name(self) -> str:
        """The input's name in the graph."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """One image's tensor without the batch: [channels, height, width] or [channels, depth, height, width]."""
        ...


class Runtime(Protocol):
    """An adapter to one runtime; made with a :class:`Candidate`, it holds nothing until ``load``.

    Attributes:
        name: the runtime, as in the finding: "onnxruntime".
        version: its version.
        precision: the precision of the variant it runs.
        provider: where it runs, as the runtime reports it once loaded.
    """

    name: str
    version: str
    precision: str
    provider: str

    def load(self, model_path: Path, input_spec: TensorSpec, *, cache: Path | None = None, told: Told | None = None) -> None:
        """Load a model and hold its input against the manifest's; build an engine first where the runtime needs one.

        Args:
            model_path: the ONNX file of the variant.
            input_spec: what the manifest says the model takes.
            cache: directory for engines and timing caches; none is kept when None.
            told: called as a long load goes on.

        Raises:
            InferenceError: ``job.error`` (it cannot be loaded, does not take that input, or would run elsewhere than asked),
                ``runtime.unavailable`` (the runtime is not on this box), ``runtime.memory``, ``runtime.build`` (no engine).
        """
        ...

    def warm_up(self) -> None:
        """Run it once, with the candidate's batch, so that the first patient does not wait for it.

        Raises:
            InferenceError: as ``infer``.
        """
        ...

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model.

        Args:
            inputs: input name -> float32 array [n, ...] of the shape that the manifest says; any n from 1 to the candidate's batch.

        Returns:
            Output name -> array [n, ...]; every value is finite.

        Raises:
            InferenceError: ``job.error``: wrong input, a failure of the runtime, or an output that is no number.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What ran, for the result and the health page; JSON types only.

        ``runtime``, ``version``, ``provider``, ``precision`` (the variant's), ``threads``, ``batch``, and where the runtime tells,
        ``layers``: how many layers ran in which precision, and ``ran``: the precisions of those with weights in the manifest's words,
        the most frequent first, "fp32" for an fp16 file on a CPU, "int8 + fp32" where some ran in float; empty where none has weights.
        """
        ...

    def close(self) -> None:
        """Free the model; the object cannot be used afterwards."""
        ...


def open_runtime(
    model_path: Path, input_spec: TensorSpec, candidate: Candidate, *, cache: Path | None = None, told: Told | None = None
) -> Runtime:
    """Load a model the candidate's way and warm it up; arguments and errors as :meth:`Runtime.load`."""
    runtime = _adapter(candidate)
    try:
        runtime.load(model_path, input_spec, cache=cache, told=told)
        runtime.warm_up()
    except ImportError as error:
        runtime.close()
        raise _not_installed(candidate, error) from error
    except BaseException:
        runtime.close()
        raise
    return runtime


_ADAPTERS: Final[dict[RuntimeName, tuple[str, str]]] = {
    "onnxruntime": ("appliance.runtime.onnxruntime", "OnnxRuntime"),
    "openvino": ("appliance.runtime.openvino", "OpenVinoRuntime"),
    "tensorrt": ("appliance.runtime.tensorrt", "TensorRtRuntime"),
    "triton": ("appliance.runtime.triton", "TritonRuntime"),
}


def _adapter(candidate: Candidate) -> Runtime:
    """The adapter, not loaded: its module and the library behind it are imported only now."""
    module, name = _ADAPTERS[candidate.runtime]
    try:
        adapter: Runtime = getattr(importlib.import_module(module), name)(candidate)
    except ImportError as error:
        raise _not_installed(candidate, error) from error
    return adapter


def _not_installed(candidate: Candidate, error: ImportError) -> InferenceError:
    reason = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else f"{error}"
    return InferenceError("runtime.unavailable", f"{candidate.runtime}: {reason[:200]}")
