"""Making the variants and putting each before the gate on every runtime here; each step is kept, so that a killed run goes on."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.errors import InferenceError
from model_sync.bundle import sha256_of
from quantize.errors import QuantizeError
from quantize.gate import verdicts
from quantize.gate.predictions import REFERENCE, Answers, Place, answers, interleaved
from quantize.gate.selection import Tried
from quantize.gate.verdicts import Limits, Reason, Verdict

if TYPE_CHECKING:
    from quantize.gate.image_sets import PictureSet
    from quantize.gate.preparation import Float
    from quantize.recipes.variant_makers import Maker, Source
    from quantize.work_directory import Work

Told = Callable[[float], None]

# Not remembered for the next try: another moment may have the memory or the time.
_PASSING: Final = ("runtime.memory", "runtime.deadline")


class _NotKeptError(Exception):
    """A verdict that is right for this moment only."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict


@dataclass
class Ground:
    """What the variants are held against.

    Attributes:
        found: the float model.
        evaluation: the labelled set.
        limits: of the gate.
        places: where variants run here.
        absent: runtimes that cannot run here, and why.
        work: the finished steps.
        reference: the float model's answers.
        thresholds: one per scored label.
        scores: (variant, place) -> its answers' scores, for the report.
    """

    found: Float
    evaluation: PictureSet
    limits: Limits
    places: Sequence[Place]
    absent: dict[str, str]
    work: Work
    reference: Answers
    thresholds: Sequence[float] = ()
    scores: dict[tuple[str, Place], np.ndarray[Any, Any]] = field(default_factory=dict)
    described: dict[tuple[str, Place], dict[str, Any]] = field(default_factory=dict)


def reference_answers(found: Float, evaluation: PictureSet, work: Work, told: Told) -> Answers:
    """The float model's answers: ONNX Runtime on one thread, so that sums are always added alike.

    Raises:
        QuantizeError: ``model.output``: an output of kind probability leaves 0 to 1; ``model.runs``: it does not run.
    """

    def make(directory: Path) -> dict[str, Any]:
        candidate = REFERENCE.candidate(found.path.name, "fp32", threads=1)
        try:
            said = answers(found.path, found.draft.input, candidate, evaluation.tensors, found.heads, told)
        except InferenceError as error:
            raise QuantizeError(f"the float model does not run: {error}", hint=error.hint, code="model.runs") from error
        _save(directory, said)
        return dict(said.describe)

    directory, described = work.step("reference", [sha256_of(found.path), evaluation.digest], make)
    said = _load(directory, described)
    labels = found.draft.label_names
    if labels and said.score.shape[1] != len(labels):
        message = f"{found.heads.probability!r} has {said.score.shape[1]} values, the draft has {len(labels)} labels"
        raise QuantizeError(message, hint="list the labels in the order of the output", code="model.output")
    if said.score.size and not (said.score.min() >= 0 and said.score.max() <= 1):
        message = f"{found.heads.probability!r} goes from {said.score.min():.3g} to {said.score.max():.3g}: no probability"
        raise QuantizeError(message, hint="export the model with its sigmoid or softmax", code="model.output")
    return said


def make(maker: Maker, source: Source, ground: Ground, calibration_digest: str, told: Told) -> Tried:
    """Make one variant; one that cannot be made is refused with the reason."""
    tried = Tried(maker.name, maker.precision, maker.activations, None, maker.recipe, maker.family)

    def write(directory: Path) -> None:
        maker.make(source, directory / "model.onnx", told)

    inputs = [ground.found.digest, sha256_of(ground.found.path), calibration_digest, maker.recipe, maker.depends]
    try:
        directory, _ = ground.work.step(maker.name, inputs, write)
    except QuantizeError as error:
        tried.refused = Reason("make.failed", error.message)
        return tried
    tried.path = directory / "model.onnx"
    return tried


def prove(tried: Tried, ground: Ground, told: Told) -> None:
    """Put a variant before the gate on every place; whatever its process dies of is its verdict."""
    if tried.path is None:
        return
    for number, place in enumerate(ground.places):
        start, share = number / len(ground.places), 1 / len(ground.places)
        tried.verdicts[place] = _prove(tried, place, ground, lambda part, a=start, b=share: told(a + b * part))  # type: ignore[misc]


def _prove(tried: Tried, place: Place, ground: Ground, told: Told) -> Verdict:
    assert tried.path is not None
    path, found = tried.path, ground.found
    inputs = [
        sha256_of(path), sha256_of(found.path), ground.evaluation.digest, asdict(place), asdict(ground.limits), list(ground.thresholds),
    ]  # fmt: skip

    def make(directory: Path) -> dict[str, Any]:
        candidate = place.candidate(path.name, tried.precision, threads=1)
        try:
            said = answers(path, found.draft.input, candidate, ground.evaluation.tensors, found.heads, told)
        except InferenceError as error:
            verdict = verdicts.failed(error.code, error.detail)
            if error.code in _PASSING:
                raise _NotKeptError(verdict) from error
            return {"verdict": verdict.to_json(), "describe": {}}
        except KeyError as error:
            return {"verdict": verdicts.failed("gate.output", f"it has no output {error}").to_json(), "describe": {}}
        _save(directory, said)
        verdict = verdicts.judge(ground.reference, said, ground.evaluation, found.draft.label_names, ground.thresholds, ground.limits)
        return {"verdict": verdict.to_json(), "describe": dict(said.describe)}

    try:
        directory, remembered = ground.work.step(f"gate-{tried.name}-{place.runtime}", inputs, make)
    except _NotKeptError as error:
        return error.verdict
    if (directory / "answers.npz").is_file():
        ground.scores[tried.name, place] = _load(directory, {}).score
    ground.described[tried.name, place] = remembered["describe"]
    figures = dict(remembered["verdict"])
    passed, reasons = figures.pop("passed"), figures.pop("reasons")
    return Verdict(passed, tuple(Reason(**reason) for reason in reasons), figures)


def measure(tried: Iterable[Tried], ground: Ground, told: Told) -> None:
    """Time everything that is left on every place where it passed, all of it in turns: times of different runtimes compare too.

    Raises:
        QuantizeError: ``speed.failed``: something that ran before does not load any more.
    """
    tensor = np.ascontiguousarray(ground.evaluation.tensors[:1])
    runs = [(entry, place) for entry in tried if entry.refused is None for place in entry.passed]
    pairs = [(entry.path, place.candidate(entry.path.name, entry.precision)) for entry, place in runs if entry.path is not None]
    try:
        times = interleaved(pairs, ground.found.draft.input, tensor, told=told)
    except InferenceError as error:
        raise QuantizeError(f"a variant failed while it was timed: {error}", hint="start the command again", code="speed.failed") from error
    for (entry, place), timed in zip(runs, times, strict=True):
        entry.timed[place] = timed


def _save(directory: Path, said: Answers) -> None:
    arrays = {"score": said.score, "cam": said.cam, "mask": said.mask}
    np.savez(directory / "answers.npz", **{name: value for name, value in arrays.items() if value is not None})  # type: ignore[arg-type]


def _load(directory: Path, described: dict[str, Any]) -> Answers:
    try:
        with np.load(directory / "answers.npz", allow_pickle=False) as arrays:
            return Answers(arrays["score"], arrays.get("cam"), arrays.get("mask"), described)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise QuantizeError(
            f"the work directory {directory.parent} is damaged", hint="remove it and start again", code="work.damaged"
        ) from error
