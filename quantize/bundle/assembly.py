"""Write the bundle: files, golden cases with their tolerances, gate record, manifest; check it as a box does, then put it in place."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import InferenceError
from appliance.imaging.golden_cases import cases
from appliance.imaging.preprocessing import from_display
from appliance.runtime.input_check import InputChecker
from appliance.tuning.candidate_process import CandidateProcess
from model_sync.bundle import (
    GATE_SCHEMA,
    MANIFEST_NAME,
    Document,
    Explain,
    Golden,
    InputCheck,
    Manifest,
    ModelBundle,
    OperatingPoint,
    Precision,
    Registration,
    ScoreHistogram,
    Variant,
    sha256_of,
)
from quantize.bundle import golden_cases
from quantize.draft import INPUT_CHECK, MODEL_CARD
from quantize.errors import QuantizeError
from quantize.gate import processor_kinds, roc_statistics
from quantize.gate.gate_runs import GateContext
from quantize.gate.image_sets import ImageSet, evaluation_digest
from quantize.gate.predictions import LOAD_S, REFERENCE, Predictions, RuntimeTarget, predict
from quantize.gate.selection import VariantResult
from quantize.gate.verdicts import RefusalReason
from quantize.messages import Code
from quantize.progress import OnProgress

GATE: Final = "gate.json"
_BINS: Final = 20
# Lets everything pass: the cases are measured with it before the real tolerances are known.
_ANY: Final = 1.0


@dataclass(frozen=True)
class OperatingPoints:
    """Operating points and score histograms of this model version, measured on the float model's scores (R29, R31)."""

    points: tuple[OperatingPoint, ...]
    histograms: tuple[ScoreHistogram, ...]

    @classmethod
    def of(cls, context: GateContext, measured_on: str) -> OperatingPoints:
        """Measure the operating points at the thresholds of ``context``, and count the scores.

        Args:
            context: the float model's answers and thresholds.
            measured_on: names the set.
        """
        points, histograms = [], []
        edges = [round(i / _BINS, 4) for i in range(_BINS + 1)]
        for i, label in enumerate(context.float_model.draft.label_names):
            scored, threshold = context.evaluation.scored(i, context.reference.score[:, i]), context.thresholds[i]
            sensitivity, specificity = roc_statistics.sensitivity_of(scored, threshold), roc_statistics.specificity_of(scored, threshold)
            if sensitivity is None or specificity is None:
                raise QuantizeError("an operating point needs positive and negative pictures", hint="check the labels of the set")
            size = f"{measured_on}: {len(scored.score)} pictures, {int(scored.positive.sum())} positive"
            per_source = roc_statistics.per_source(scored, threshold)
            populations = context.float_model.draft.populations
            # Left out where there are none, so that an appliance that reads only schema 1 accepts the manifest.
            groups = {"groups": roc_statistics.per_population(scored, threshold, populations)} if populations else {}
            points.append(
                OperatingPoint(
                    label=label,
                    threshold=threshold,
                    sensitivity=sensitivity,
                    specificity=specificity,
                    measured_on=size,
                    per_source=per_source,
                    **groups,
                )
            )
            counts, _ = np.histogram(scored.score, bins=edges)
            histograms.append(ScoreHistogram(label=label, edges=edges, counts=counts.tolist(), measured_on=measured_on))
        return cls(tuple(points), tuple(histograms))


def thresholds(evaluation: ImageSet, reference: Predictions, sensitivities: Sequence[float]) -> list[float]:
    """Choose the threshold of each label: the highest that finds at least its share of the positives.

    Raises:
        QuantizeError: ``model.threshold``: only a threshold of 0 does.
    """
    chosen = []
    for i, sensitivity in enumerate(sensitivities):
        threshold = roc_statistics.threshold_for(evaluation.positive[:, i], reference.score[:, i], sensitivity)
        if not 0 < threshold < 1:
            raise QuantizeError(
                f"no threshold between 0 and 1 finds {sensitivity:g} of the positives of label {i + 1}; it would be {threshold:g}",
                hint="the model does not separate them; choose a lower sensitivity, or check the labels and the outputs",
                code=Code.MODEL_THRESHOLD,
            )
        chosen.append(threshold)
    return chosen


def write(
    context: GateContext,
    shipped: Sequence[VariantResult],
    operating: OperatingPoints,
    images: Mapping[str, NDArray[np.uint8]],
    card: str,
    gate: dict[str, Any],
    input_check: tuple[bytes, InputCheck] | None,
    out: Path,
    on_progress: OnProgress,
) -> Manifest:
    """Write the bundle beside ``out``, check it as the box does, and replace ``out`` in one step.

    Args:
        context: the float model, its predictions and the sets.
        shipped: the variants in the bundle.
        operating: operating points and histograms.
        images: the golden images by name.
        card: ``MODEL_CARD.md``.
        gate: ``gate.json``; the differences of the golden cases are added.
        input_check: as :meth:`quantize.draft.Draft.read_input_check` returns it.
        out: the bundle's directory.
        on_progress: called as the golden cases are run.

    Raises:
        QuantizeError: ``bundle.golden``: a variant does not pass its own golden cases.
        BundleError: it is no bundle, or its gate record does not match it.
    """
    staging = out.with_name(out.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "golden").mkdir(parents=True)
    files = {entry.name: _copy_variant(entry, context, staging) for entry in shipped}
    loose: dict[Precision, float] = {entry.precision: _ANY for entry in shipped}
    cases = _golden(context, images, loose, staging)
    check = None if input_check is None else input_check[1]
    if input_check is not None:
        _put(staging, INPUT_CHECK, input_check[0])
    draft_manifest = _manifest(context, shipped, files, operating, cases, _documents(staging, card, gate), check)
    _put(staging, MANIFEST_NAME, draft_manifest.to_json())
    _try_input_check(ModelBundle.load(staging))
    differences = _try_cases(ModelBundle.load(staging), context, shipped, files, on_progress)
    tolerances = _tolerances(shipped, differences)
    for entry in shipped:
        record = gate["variants"][entry.precision]["files"][files[entry.name]]
        record["golden"] = {target.title: round(worst, 3) for target, worst in differences[entry.name].items()}
    cases = [case.model_copy(update={"tolerance": dict(tolerances)}) for case in cases]
    manifest = _manifest(context, shipped, files, operating, cases, _documents(staging, card, gate), check)
    _put(staging, MANIFEST_NAME, manifest.to_json())
    if (problem := ModelBundle.load(staging).gate_problem()) is not None:
        raise problem
    _replace(staging, out)
    return manifest


def file_name(entry: VariantResult, name: str) -> str:
    """Return the name of a variant's file in the bundle."""
    kind = f"_{entry.activations}" if entry.activations else ""
    return f"{name.replace('-', '_')}_{entry.precision}{kind}.onnx"


def _copy_variant(entry: VariantResult, context: GateContext, staging: Path) -> str:
    name = file_name(entry, context.float_model.draft.name)
    shutil.copyfile(_path_of(entry), staging / name)
    return name


def _path_of(entry: VariantResult) -> Path:
    """The file of a variant that was made."""
    assert entry.path is not None
    return entry.path


def _golden(context: GateContext, images: Mapping[str, NDArray[np.uint8]], loose: dict[Precision, float], staging: Path) -> list[Golden]:
    result, cases = context.float_model, []
    tensors = np.concatenate([from_display(pixels, result.draft.input).tensor for pixels in images.values()])
    candidate = REFERENCE.candidate(result.path.name, "fp32", threads=1)
    message = predict(result.path, result.draft.input, candidate, tensors, result.heads)
    for i, (name, pixels) in enumerate(images.items()):
        one = Predictions(message.score[i : i + 1], None if message.cam is None else message.cam[i : i + 1], None, {})
        raw, expected = golden_cases.case_file(pixels, one)
        digest = _put(staging, f"golden/{name}.npz", raw)
        labels = result.draft.label_names
        cases.append(Golden(input=f"golden/{name}.npz", sha256=digest, expected=dict(zip(labels, expected, strict=True)), tolerance=loose))
    return cases


def _try_cases(
    bundle: ModelBundle, context: GateContext, shipped: Sequence[VariantResult], files: Mapping[str, str], on_progress: OnProgress
) -> dict[str, dict[RuntimeTarget, float]]:
    """The largest difference of each variant's golden cases on each runtime where it passed the gate, as the box computes it.

    Raises:
        QuantizeError: ``bundle.golden``.
    """
    prepared = cases(bundle)
    result: dict[str, dict[RuntimeTarget, float]] = {}
    for number, entry in enumerate(shipped):
        result[entry.name] = {}
        path = bundle.path(files[entry.name])
        for target in entry.run_here:
            try:
                with CandidateProcess(
                    path, context.float_model.draft.input, target.candidate(path.name, entry.precision), deadline_s=LOAD_S
                ) as attempt:
                    attempt.load()
                    worst = max(case.difference(attempt.infer) for case in prepared)
            except InferenceError as error:
                raise QuantizeError(
                    f"{entry.name} on {target.title}, golden cases: {error}", hint=error.hint, code=Code.BUNDLE_GOLDEN
                ) from error
            if not worst < _ANY:
                raise QuantizeError(
                    f"{entry.name} on {target.title} is off by {worst:.3g} on a golden case",
                    hint="choose golden pictures that resemble the evaluation set",
                    code=Code.BUNDLE_GOLDEN,
                )
            result[entry.name][target] = worst
        on_progress((number + 1) / len(shipped))
    return result


def _try_input_check(bundle: ModelBundle) -> None:
    """Run the input check over the golden cases, as the self-test of every box will.

    Raises:
        QuantizeError: ``bundle.golden``: it stops one of them, or cannot be run.
    """
    try:
        checker = InputChecker.open(bundle)
        stopped = [] if checker is None else [case.name for case in bundle.golden_cases() if checker.doubt(case.pixels) is not None]
    except InferenceError as error:
        raise QuantizeError(f"the input check: {error}", hint=error.hint, code=Code.BUNDLE_GOLDEN) from error
    if stopped:
        raise QuantizeError(
            f"the input check stops the golden cases {', '.join(stopped)}",
            hint="choose golden pictures that the model is made for, or train the input check on pictures of their kind",
            code=Code.BUNDLE_GOLDEN,
        )


def _tolerances(shipped: Sequence[VariantResult], differences: Mapping[str, Mapping[RuntimeTarget, float]]) -> dict[Precision, float]:
    operating: dict[Precision, list[float]] = {}
    for entry in shipped:
        operating.setdefault(entry.precision, []).extend(differences[entry.name].values())
    return {precision: golden_cases.tolerance(precision, values) for precision, values in operating.items()}


def _documents(staging: Path, card: str, gate: dict[str, Any]) -> list[Document]:
    texts = {MODEL_CARD: card, GATE: json.dumps(gate, ensure_ascii=False, indent=2) + "\n"}
    return [Document(file=name, sha256=_put(staging, name, text.encode())) for name, text in texts.items()]


def _manifest(
    context: GateContext,
    shipped: Sequence[VariantResult],
    files: Mapping[str, str],
    operating: OperatingPoints,
    cases: list[Golden],
    documents: list[Document],
    input_check: InputCheck | None,
) -> Manifest:
    draft = context.float_model.draft
    cam = draft.output("cam")
    return Manifest(
        schema=draft.schema_version,
        name=draft.name,
        version=draft.version,
        task=draft.task,
        title=draft.title,
        labels=draft.labels,
        applies_to=draft.applies_to,
        intended_use=draft.intended_use,
        registration=Registration(**draft.registration.model_dump()),
        change_kind=draft.change_kind,
        input=draft.input,
        outputs=draft.outputs,
        explain=None if cam is None else Explain(output=cam, kind="cam"),
        operating_points=list(operating.points),
        variants=[_variant(entry, files[entry.name]) for entry in shipped],
        golden=cases,
        reference_scores=list(operating.histograms),
        training_data=draft.training_data,
        licence=draft.licence,
        min_appliance_version=draft.min_appliance_version,
        documents=documents,
        **({} if input_check is None else {"input_check": input_check}),
        **({"watch": draft.watch} if "watch" in draft.model_fields_set else {}),
    )


def _variant(entry: VariantResult, file: str) -> Variant:
    digest = sha256_of(_path_of(entry))
    # Empty fields are left out, so that an appliance of an earlier version accepts the manifest too.
    more: dict[str, Any] = {}
    if entry.activations is not None:
        more["activations"] = entry.activations
    if entry.not_on:
        more["not_on"] = entry.not_on
    return Variant(precision=entry.precision, file=file, sha256=digest, recipe=entry.recipe, gate=GATE, **more)


def gate_record(
    context: GateContext, variants: Sequence[VariantResult], shipped: Sequence[VariantResult], operating: OperatingPoints, measured_on: str,
    input_check: InputCheck | None,
) -> dict[str, Any]:  # fmt: skip
    """Return ``gate.json`` (``model_sync/bundle/gate_record.py``): the verdict on each shipped variant per runtime, and what was left out.

    It names what was measured: the files by digest, the operating points, the input, the input check, and the evaluation set by digest.
    Times are not in it: they belong to the machine that measured, and a second run has to write the same bytes.
    """
    draft = context.float_model.draft
    records: dict[str, Any] = {}
    for entry in shipped:
        record = records.setdefault(entry.precision, {"passed": True, "files": {}})
        record["files"][file_name(entry, draft.name)] = {
            "sha256": sha256_of(_path_of(entry)),
            "recipe": entry.recipe,
            "not_on": entry.not_on,
            "runtimes": {target.title: {"version": target.version, **verdict.to_json()} for target, verdict in entry.verdicts.items()},
        }
    return {
        "schema": GATE_SCHEMA,
        "reference": "fp32",
        "evaluation": {
            "sha256": evaluation_digest(context.evaluation, draft.label_names),
            "n_images": len(context.evaluation),
            "name": measured_on,
        },
        "labels": [label.name for label in draft.labels],
        "input": draft.input.model_dump(mode="json", exclude_unset=True),
        "operating_points": [point.model_dump(mode="json", exclude_unset=True) for point in operating.points],
        **({} if input_check is None else {"input_check": input_check.model_dump(mode="json", exclude_unset=True)}),
        "limits": asdict(context.limits),
        "note": "Held against the float model's answers by ONNX Runtime on a CPU. Compare an AUC only within one source.",
        "variants": records,
        "processors": {"measured_on": processor_kinds.kind_here(), "note": processor_kinds.NOTE},
        "not_measured_here": {
            "runtimes": dict(context.unavailable),
            "note": "On these the golden cases decide, on the box.",
        },
        "refused": [
            {"name": entry.name, "precision": entry.precision, "activations": entry.activations, **_refusal(entry.refused)}
            for entry in variants
            if entry.refused is not None
        ],
    }


def _refusal(refused: RefusalReason) -> dict[str, str]:
    """The reason without times, which belong to the machine that measured."""
    is_timed = refused.code in (Code.SPEED_SLOWER, Code.SPEED_OTHER_BETTER)
    return {"code": refused.code, "detail": "" if is_timed else refused.detail}


def _put(directory: Path, relative: str, raw: bytes) -> str:
    """Write a file and return its SHA-256."""
    (directory / relative).write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def _replace(staging: Path, out: Path) -> None:
    """Replace ``out`` by ``staging``; a kill in between leaves the old bundle complete under ``.old``."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)
