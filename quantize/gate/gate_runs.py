"""Make the variants and run the gate for each on every runtime here. Each step is stored, so that an interrupted run can resume."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import onnx

from appliance.core.errors import InferenceError
from appliance.runtime.weight_range import fits_16_bits
from model_sync.bundle import sha256_of
from quantize.errors import QuantizeError
from quantize.gate import processor_kinds, verdicts
from quantize.gate.image_sets import ImageSet
from quantize.gate.predictions import REFERENCE, Predictions, RuntimeTarget, measure_interleaved, predict
from quantize.gate.preparation import FloatModel
from quantize.gate.selection import VariantResult
from quantize.gate.verdicts import Limits, RefusalReason, Verdict
from quantize.graph.float_simulation import simulate_in_float
from quantize.messages import Code
from quantize.progress import OnProgress, part_of
from quantize.recipes.variant_makers import Maker, Source
from quantize.work_directory import WorkDirectory

# Not stored: at the next try there may be enough memory or time.
_TRANSIENT: Final = ("runtime.memory", "runtime.deadline")


class _TransientError(Exception):
    """A verdict that must not be stored, because another try may give another result."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict


@dataclass
class GateContext:
    """The float model, the evaluation set and the limits that every variant is compared with.

    Attributes:
        float_model: the float model.
        evaluation: the labelled set.
        limits: of the gate.
        targets: where variants run here.
        unavailable: runtimes that cannot run here, and why.
        work: the finished steps.
        reference: the float model's predictions.
        thresholds: one per scored label.
        scores: of each variant on each target, for the report.
        described: what the runtime reported that it ran.
    """

    float_model: FloatModel
    evaluation: ImageSet
    limits: Limits
    targets: Sequence[RuntimeTarget]
    unavailable: dict[str, str]
    work: WorkDirectory
    reference: Predictions
    thresholds: Sequence[float] = ()
    scores: dict[tuple[str, RuntimeTarget], np.ndarray[Any, Any]] = field(default_factory=dict)
    described: dict[tuple[str, RuntimeTarget], dict[str, Any]] = field(default_factory=dict)


def predict_reference(float_model: FloatModel, evaluation: ImageSet, work: WorkDirectory, on_progress: OnProgress) -> Predictions:
    """Return the float model's predictions, computed by ONNX Runtime on one thread so that they are reproducible.

    Raises:
        QuantizeError: ``model.output``: an output of kind probability leaves 0 to 1; ``model.runs``: it does not run.
    """

    def make(directory: Path) -> dict[str, Any]:
        candidate = REFERENCE.candidate(float_model.path.name, "fp32", threads=1)
        try:
            predictions = predict(float_model.path, float_model.draft.input, candidate, evaluation.tensors, float_model.heads, on_progress)
        except InferenceError as error:
            raise QuantizeError(f"the float model does not run: {error}", hint=error.hint, code=Code.MODEL_RUNS) from error
        _save(directory, predictions)
        return dict(predictions.describe)

    directory, described = work.step("reference", [sha256_of(float_model.path), evaluation.digest], make)
    predictions = _load(directory, described)
    labels = float_model.draft.label_names
    if labels and predictions.score.shape[1] != len(labels):
        message = f"{float_model.heads.probability!r} has {predictions.score.shape[1]} values, the draft has {len(labels)} labels"
        raise QuantizeError(message, hint="list the labels in the order of the output", code=Code.MODEL_OUTPUT)
    if predictions.score.size and not (predictions.score.min() >= 0 and predictions.score.max() <= 1):
        message = (
            f"{float_model.heads.probability!r} goes from {predictions.score.min():.3g} to {predictions.score.max():.3g}: no probability"
        )
        raise QuantizeError(message, hint="export the model with its sigmoid or softmax", code=Code.MODEL_OUTPUT)
    return predictions


def make_variant(maker: Maker, source: Source, context: GateContext, on_progress: OnProgress) -> VariantResult:
    """Make one variant; one that cannot be made is refused with the reason."""
    result = VariantResult(maker.name, maker.precision, maker.activations, None, maker.recipe, maker.family)

    def write(directory: Path) -> None:
        maker.make(source, directory / "model.onnx", on_progress)

    inputs = [context.float_model.digest, sha256_of(context.float_model.path), source.digest, maker.recipe, maker.depends]
    try:
        directory, _ = context.work.step(maker.name, inputs, write)
    except QuantizeError as error:
        result.refused = RefusalReason(Code.MAKE_FAILED, error.message)
        return result
    result.path = directory / "model.onnx"
    result.fits_16_bits = fits_16_bits(result.path)
    return result


def run_gate(result: VariantResult, context: GateContext, on_progress: OnProgress) -> None:
    """Run the gate for a variant on every runtime target; when its process dies, the reason is the verdict."""
    if result.path is None:
        return
    for number, target in enumerate(context.targets):
        part = part_of(on_progress, number / len(context.targets), (number + 1) / len(context.targets))
        result.verdicts[target] = _run_gate_on(result, target, context, part)


def _run_gate_on(result: VariantResult, target: RuntimeTarget, context: GateContext, on_progress: OnProgress) -> Verdict:
    assert result.path is not None
    path, float_model = result.path, context.float_model
    processors = processor_kinds.find_evidence(path, target) if result.precision in ("int8", "mixed") else {}
    is_simulated = processors.get("exact") == "simulated"
    inputs = [
        sha256_of(path),
        sha256_of(float_model.path),
        context.evaluation.digest,
        asdict(target),
        asdict(context.limits),
        list(context.thresholds),
        processors,
    ]

    def make(directory: Path) -> dict[str, Any]:
        try:
            if is_simulated:
                predictions = _simulate(path, target, context, on_progress)
            else:
                candidate = target.candidate(path.name, result.precision, threads=1)
                predictions = predict(path, float_model.draft.input, candidate, context.evaluation.tensors, float_model.heads, on_progress)
        except InferenceError as error:
            verdict = verdicts.failed_verdict(error.code, error.detail)
            if error.code in _TRANSIENT:
                raise _TransientError(verdict) from error
            return {"verdict": verdict.to_json(), "describe": {}}
        except QuantizeError as error:
            return {"verdict": verdicts.failed_verdict(error.code, error.message).to_json(), "describe": {}}
        except KeyError as error:
            return {"verdict": verdicts.failed_verdict(Code.GATE_OUTPUT, f"it has no output {error}").to_json(), "describe": {}}
        _save(directory, predictions)
        verdict = verdicts.judge(
            context.reference, predictions, context.evaluation, float_model.draft.label_names, context.thresholds, context.limits
        )
        if processors:
            verdict = replace(verdict, figures=verdict.figures | {"processors": dict(processors)})
        return {"verdict": verdict.to_json(), "describe": dict(predictions.describe)}

    try:
        directory, stored = context.work.step(f"gate-{result.name}-{target.runtime}", inputs, make)
    except _TransientError as error:
        return error.verdict
    if (directory / "answers.npz").is_file():
        context.scores[result.name, target] = _load(directory, {}).score
    context.described[result.name, target] = stored["describe"]
    figures = dict(stored["verdict"])
    passed, reasons = figures.pop("passed"), figures.pop("reasons")
    return Verdict(passed, tuple(RefusalReason(**reason) for reason in reasons), figures)


def _simulate(path: Path, target: RuntimeTarget, context: GateContext, on_progress: OnProgress) -> Predictions:
    """Return the predictions of a quantized variant computed in float on ``target``, whose own 8-bit sums may be clipped here."""
    float_model = context.float_model
    with TemporaryDirectory(prefix="quantize.") as directory:
        simulated = Path(directory, path.name)
        onnx.save(simulate_in_float(onnx.load(path)), simulated)
        candidate = target.candidate(simulated.name, "fp32", threads=1)
        predictions = predict(simulated, float_model.draft.input, candidate, context.evaluation.tensors, float_model.heads, on_progress)
    return replace(predictions, describe={})  # what ran is not what will run


def measure_speed(result: Iterable[VariantResult], context: GateContext, on_progress: OnProgress) -> None:
    """Measure the speed of every remaining variant on every target where it passed, in turns, so that all times are comparable.

    Raises:
        QuantizeError: ``speed.failed``: something that ran before does not load any more.
    """
    tensor = np.ascontiguousarray(context.evaluation.tensors[:1])
    runs = [(entry, target) for entry in result if entry.refused is None for target in entry.run_here]
    pairs = [(entry.path, target.candidate(entry.path.name, entry.precision)) for entry, target in runs if entry.path is not None]
    try:
        times = measure_interleaved(pairs, context.float_model.draft.input, tensor, on_progress=on_progress)
    except InferenceError as error:
        raise QuantizeError(f"a variant failed while it was timed: {error}", code=Code.SPEED_FAILED) from error
    for (entry, target), timing in zip(runs, times, strict=True):
        entry.timing[target] = timing


def _save(directory: Path, predictions: Predictions) -> None:
    arrays = {"score": predictions.score, "cam": predictions.cam, "mask": predictions.mask}
    np.savez(directory / "answers.npz", **{name: value for name, value in arrays.items() if value is not None})  # type: ignore[arg-type]


def _load(directory: Path, described: dict[str, Any]) -> Predictions:
    try:
        with np.load(directory / "answers.npz", allow_pickle=False) as arrays:
            return Predictions(arrays["score"], arrays.get("cam"), arrays.get("mask"), described)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise QuantizeError(f"the work directory {directory.parent} is damaged", code=Code.WORK_DAMAGED) from error
