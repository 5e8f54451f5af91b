"""Run a variant on every image of a set, on one runtime, in a process of its own, because it may crash; and measure its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from appliance.runtime import TensorSpec
from appliance.runtime.availability import available
from appliance.runtime.candidate import CPU, Candidate, RuntimeName
from appliance.tuning.candidate_process import CandidateProcess
from model_sync.bundle import OutputSpec
from quantize.progress import OnProgress, no_progress

LOAD_S: Final = 600.0
# Further digits are noise between processors; without them a second run writes the same bytes.
_DIGITS: Final = 6


@dataclass(frozen=True)
class Heads:
    """The outputs that are compared: names in the graph, None where the model has no such output."""

    probability: str | None = None
    cam: str | None = None
    segmentation: str | None = None

    @classmethod
    def of(cls, outputs: Sequence[OutputSpec]) -> Heads:
        """Return the first output of each kind."""
        names = {output.kind: output.name for output in reversed(outputs)}
        return cls(names.get("probability"), names.get("cam"), names.get("segmentation_logits"))


@dataclass(frozen=True)
class Predictions:
    """The outputs of one variant on one runtime.

    Attributes:
        score: probabilities, float64 [n, labels]; [n, 0] without any.
        cam: class activation maps, float32 [n, labels, h, w], or None.
        mask: the class of every pixel or voxel, uint8 [n, ...], or None.
        describe: what the runtime reported that it ran.
    """

    score: NDArray[np.float64]
    cam: NDArray[np.float32] | None
    mask: NDArray[np.uint8] | None
    describe: Mapping[str, Any]


@dataclass(frozen=True)
class RuntimeTarget:
    """A runtime and its provider on which a variant can run on this computer."""

    runtime: RuntimeName
    provider: str
    version: str = ""

    @property
    def title(self) -> str:
        """The name for tables: the runtime, with the provider when it is not the CPU."""
        return self.runtime if self.provider in (CPU, "CPU") else f"{self.runtime} {self.provider}"

    def candidate(self, file: str, precision: str, threads: int = 0) -> Candidate:
        """The candidate that runs ``file`` here, one picture at a time as a clinic's box does."""
        return Candidate(self.runtime, file, precision, self.provider, threads)


REFERENCE: Final = RuntimeTarget("onnxruntime", CPU)


def runtime_targets() -> tuple[list[RuntimeTarget], dict[str, str]]:
    """Return where variants can run on this computer, and for each unavailable runtime the reason."""
    targets: list[RuntimeTarget] = []
    unavailable: dict[str, str] = {}
    for entry in available():
        targets += [RuntimeTarget(entry.runtime, provider, entry.version or "") for provider in entry.providers]
        if not entry.providers:
            unavailable[entry.runtime] = entry.why
    return targets, unavailable


def predict(
    model: Path, spec: TensorSpec, candidate: Candidate, tensors: NDArray[np.float32], heads: Heads, on_progress: OnProgress = no_progress
) -> Predictions:
    """Run every picture through a variant, one at a time.

    Args:
        model: the ONNX file.
        spec: the model's input.
        candidate: how it is run.
        tensors: float32 [n, ...].
        heads: the outputs to keep.
        on_progress: called as it goes.

    Raises:
        InferenceError: it does not load, its process died, or it gave no valid answer.
    """
    arrays: dict[str, list[NDArray[Any]]] = {"score": [], "cam": [], "mask": []}
    with CandidateProcess(model, spec, candidate, deadline_s=LOAD_S) as attempt:
        described = attempt.load()
        for number in range(len(tensors)):
            outputs = attempt.infer(np.ascontiguousarray(tensors[number : number + 1]))
            _append_outputs(arrays, outputs, heads)
            on_progress((number + 1) / len(tensors))
    score = np.concatenate(arrays["score"]) if arrays["score"] else np.zeros((len(tensors), 0))
    return Predictions(
        np.round(score.astype(np.float64), _DIGITS),
        np.concatenate(arrays["cam"]) if arrays["cam"] else None,
        np.concatenate(arrays["mask"]) if arrays["mask"] else None,
        described,
    )


def _append_outputs(arrays: dict[str, list[NDArray[Any]]], outputs: dict[str, NDArray[np.float32]], heads: Heads) -> None:
    if heads.probability is not None:
        value = outputs[heads.probability]
        arrays["score"].append(value.reshape(len(value), -1))
    if heads.cam is not None:
        arrays["cam"].append(outputs[heads.cam])
    if heads.segmentation is not None:
        arrays["mask"].append(outputs[heads.segmentation].argmax(axis=1).astype(np.uint8))


@dataclass(frozen=True)
class Timing:
    """The measured times of one candidate.

    Attributes:
        median_ms: of all its calls.
        best_ms: the fastest.
        load_ms: loading and warming up.
        peak_rss_bytes: of its process.
    """

    median_ms: float
    best_ms: float
    load_ms: float
    peak_rss_bytes: int


def measure_interleaved(
    candidates: Sequence[tuple[Path, Candidate]], spec: TensorSpec, tensor: NDArray[np.float32], *, rounds: int = 9, repeat: int = 5,
    on_progress: OnProgress = no_progress,
) -> list[Timing]:  # fmt: skip
    """Measure the speed of all candidates in turns, a few calls each, so that a busy moment of the computer affects all of them alike.

    Args:
        candidates: model file and how it is run; each has to load.
        spec: the model's input.
        tensor: one picture, float32 [1, ...].
        rounds: how often each has its turn.
        repeat: calls per turn.
        on_progress: called as it goes.

    Raises:
        InferenceError: one of them does not load any more.
    """
    samples: list[list[float]] = [[] for _ in candidates]
    with ExitStack() as stack:
        attempts = [stack.enter_context(CandidateProcess(model, spec, candidate, deadline_s=LOAD_S)) for model, candidate in candidates]
        for attempt in attempts:
            attempt.load()
            attempt.time(tensor, repeat)  # caches and clocks settle
        for turn in range(rounds):
            for number, attempt in enumerate(attempts):
                samples[number] += attempt.time(tensor, repeat)
                on_progress((turn * len(attempts) + number + 1) / (rounds * len(attempts)))
        return [
            Timing(float(np.median(values)), min(values), attempt.load_ms, attempt.peak_rss_bytes)
            for values, attempt in zip(samples, attempts, strict=True)
        ]
