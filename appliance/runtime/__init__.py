"""The port to whatever runs a model: one protocol, one adapter per runtime, opened by ``open_runtime``.

What an adapter reports (``provider``, ``describe``) is what the runtime says it got, never what was asked for; asking for something
it did not get is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from appliance.runtime.candidate import CPU, RUNTIMES, Candidate, RuntimeName, plain_candidate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CPU", "RUNTIMES", "Candidate", "Runtime", "RuntimeName", "TensorSpec", "Told", "open_runtime", "plain_candidate"]

# ONNX Runtime reports home unless it is told not to before it is imported. Nothing ever leaves this box.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

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
        ``layers``: how many layers ran in which precision.
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
    except BaseException:
        runtime.close()
        raise
    return runtime


def _adapter(candidate: Candidate) -> Runtime:
    from appliance.runtime.onnxruntime import OnnxRuntime

    return OnnxRuntime(candidate)
