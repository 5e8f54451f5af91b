"""The bundle itself: files, golden cases with their tolerances, gate record, manifest; checked as a box checks it, then put in place."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.core.errors import InferenceError
from appliance.tuning.candidate_process import CandidateProcess
from model_sync.bundle import (
    MANIFEST_NAME,
    Document,
    Explain,
    Golden,
    Manifest,
    ModelBundle,
    OperatingPoint,
    Precision,
    ScoreHistogram,
    Variant,
)
from quantize import golden, measures
from quantize.draft import MODEL_CARD
from quantize.errors import QuantizeError
from quantize.gate import Verdict
from quantize.scoring import LOAD_S, REFERENCE, Answers, Place, answers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantize.data import PictureSet
    from quantize.proofs import Ground
    from quantize.selection import Tried

GATE: Final = "gate.json"
_BINS: Final = 20
# A tolerance of 1 lets everything pass: what the cases are measured with before the real ones are known.
_ANY: Final = 1.0

Told = Callable[[float], None]


@dataclass(frozen=True)
class Measured:
    """What belongs to this version alone: chosen and counted on the float model's scores (R29, R31)."""

    points: tuple[OperatingPoint, ...]
    histograms: tuple[ScoreHistogram, ...]

    @classmethod
    def of(cls, ground: Ground, measured_on: str) -> Measured:
        """Measure the operating points at the thresholds of ``ground``, and count the scores.

        Args:
            ground: the float model's answers and thresholds.
            measured_on: names the set.
        """
        points, histograms = [], []
        edges = [round(i / _BINS, 4) for i in range(_BINS + 1)]
        for i, label in enumerate(ground.found.draft.label_names):
            scored, threshold = ground.evaluation.scored(i, ground.reference.score[:, i]), ground.thresholds[i]
            sensitivity, specificity = measures.sensitivity_of(scored, threshold), measures.specificity_of(scored, threshold)
            if sensitivity is None or specificity is None:
                raise QuantizeError("an operating point needs positive and negative pictures", hint="check the labels of the set")
            size = f"{measured_on}: {len(scored.score)} pictures, {int(scored.positive.sum())} positive"
            per_source = measures.per_source(scored, threshold)
            points.append(
                OperatingPoint(
                    label=label,
                    threshold=threshold,
                    sensitivity=sensitivity,
                    specificity=specificity,
                    measured_on=size,
                    per_source=per_source,
                )
            )
            counts, _ = np.histogram(scored.score, bins=edges)
            histograms.append(ScoreHistogram(label=label, edges=edges, counts=counts.tolist(), measured_on=measured_on))
        return cls(tuple(points), tuple(histograms))


def thresholds(evaluation: PictureSet, reference: Answers, sensitivities: Sequence[float]) -> list[float]:
    """Choose the threshold of each label: the highest that finds at least its share of the positives.

    Raises:
        QuantizeError: ``model.threshold``: only a threshold of 0 would.
    """
    chosen = []
    for i, sensitivity in enumerate(sensitivities):
        threshold = measures.threshold_for(evaluation.positive[:, i], reference.score[:, i], sensitivity)
        if not 0 < threshold < 1:
            raise QuantizeError(
                f"no threshold between 0 and 1 finds {sensitivity:g} of the positives of label {i + 1}; it would be {threshold:g}",
                hint="the model does not separate them; aim lower, or look at the labels and the outputs",
                code="model.threshold",
            )
        chosen.append(threshold)
    return chosen


@dataclass(frozen=True)
class Documents:
    """The texts of a bundle.

    Attributes:
        card: ``MODEL_CARD.md``.
        gate: ``gate.json``, all but what the golden cases add.
    """

    card: str
    gate: dict[str, Any]


def write(
    ground: Ground, kept: Sequence[Tried], measured: Measured, pictures: Mapping[str, NDArray[np.uint8]], documents: Documents, out: Path,
    told: Told,
) -> Manifest:  # fmt: skip
    """Write the bundle beside ``out``, check it as the box does, and put it in the place of ``out`` in one go.

    Raises:
        QuantizeError: ``bundle.golden``: a variant does not pass its own golden cases.
        BundleError: it is no bundle.
    """
    staging = out.with_name(out.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "golden").mkdir(parents=True)
    files = {entry.name: _copy_variant(entry, ground, staging) for entry in kept}
    loose: dict[Precision, float] = {entry.precision: _ANY for entry in kept}
    cases = _golden(ground, pictures, loose, staging)
    gate = documents.gate
    draft_manifest = _manifest(ground, kept, files, measured, cases, _documents(staging, documents.card, gate))
    _put(staging, MANIFEST_NAME, draft_manifest.to_json())
    differences = _try_cases(ModelBundle.load(staging), ground, kept, files, told)
    tolerances = _tolerances(kept, differences)
    for entry in kept:
        record = gate["variants"][entry.precision]["files"][files[entry.name]]
        record["golden"] = {place.title: round(worst, 3) for place, worst in differences[entry.name].items()}
    cases = [case.model_copy(update={"tolerance": dict(tolerances)}) for case in cases]
    manifest = _manifest(ground, kept, files, measured, cases, _documents(staging, documents.card, gate))
    _put(staging, MANIFEST_NAME, manifest.to_json())
    ModelBundle.load(staging)
    _replace(staging, out)
    return manifest


def file_name(entry: Tried, name: str) -> str:
    """The name of a variant's file in the bundle."""
    kind = f"_{entry.activations}" if entry.activations else ""
    return f"{name.replace('-', '_')}_{entry.precision}{kind}.onnx"


def _copy_variant(entry: Tried, ground: Ground, staging: Path) -> str:
    assert entry.path is not None
    name = file_name(entry, ground.found.draft.name)
    shutil.copyfile(entry.path, staging / name)
    return name


def _golden(ground: Ground, pictures: Mapping[str, NDArray[np.uint8]], loose: dict[Precision, float], staging: Path) -> list[Golden]:
    from appliance.imaging.preprocessing import from_display

    found, cases = ground.found, []
    tensors = np.concatenate([from_display(pixels, found.draft.input).tensor for pixels in pictures.values()])
    candidate = REFERENCE.candidate(found.path.name, "fp32", threads=1)
    said = answers(found.path, found.draft.input, candidate, tensors, found.heads)
    for i, (name, pixels) in enumerate(pictures.items()):
        one = Answers(said.score[i : i + 1], None if said.cam is None else said.cam[i : i + 1], None, {})
        raw, expected = golden.case_file(pixels, one)
        digest = _put(staging, f"golden/{name}.npz", raw)
        cases.append(golden.entry(f"golden/{name}.npz", digest, found.draft.label_names, expected, loose))
    return cases


def _try_cases(
    bundle: ModelBundle, ground: Ground, kept: Sequence[Tried], files: Mapping[str, str], told: Told
) -> dict[str, dict[Place, float]]:
    """The largest difference of each variant's golden cases on each runtime where it passed the gate, as the box computes it.

    Raises:
        QuantizeError: ``bundle.golden``.
    """
    from appliance.imaging.golden_cases import cases

    prepared = cases(bundle)
    found: dict[str, dict[Place, float]] = {}
    for number, entry in enumerate(kept):
        found[entry.name] = {}
        path = bundle.path(files[entry.name])
        for place in entry.passed:
            try:
                with CandidateProcess(
                    path, ground.found.draft.input, place.candidate(path.name, entry.precision), deadline_s=LOAD_S
                ) as attempt:
                    attempt.load()
                    worst = max(case.difference(attempt.infer) for case in prepared)
            except InferenceError as error:
                raise QuantizeError(
                    f"{entry.name} on {place.title}, golden cases: {error}", hint=error.hint, code="bundle.golden"
                ) from error
            if not worst < _ANY:
                raise QuantizeError(
                    f"{entry.name} on {place.title} is off by {worst:.3g} on a golden case",
                    hint="choose golden pictures that look like the evaluation set's",
                    code="bundle.golden",
                )
            found[entry.name][place] = worst
        told((number + 1) / len(kept))
    return found


def _tolerances(kept: Sequence[Tried], differences: Mapping[str, Mapping[Place, float]]) -> dict[Precision, float]:
    measured: dict[Precision, list[float]] = {}
    for entry in kept:
        measured.setdefault(entry.precision, []).extend(differences[entry.name].values())
    return {precision: golden.tolerance(precision, values) for precision, values in measured.items()}


def _documents(staging: Path, card: str, gate: dict[str, Any]) -> list[Document]:
    texts = {MODEL_CARD: card, GATE: json.dumps(gate, ensure_ascii=False, indent=2) + "\n"}
    return [Document(file=name, sha256=_put(staging, name, text.encode())) for name, text in texts.items()]


def _manifest(
    ground: Ground, kept: Sequence[Tried], files: Mapping[str, str], measured: Measured, cases: list[Golden], documents: list[Document]
) -> Manifest:
    draft = ground.found.draft
    cam = draft.output("cam")
    return Manifest(
        schema=1,
        name=draft.name,
        version=draft.version,
        task=draft.task,
        title=draft.title,
        labels=draft.labels,
        applies_to=draft.applies_to,
        intended_use=draft.intended_use,
        registration=draft.registration.filled(),
        change_kind=draft.change_kind,
        input=draft.input,
        outputs=draft.outputs,
        explain=None if cam is None else Explain(output=cam, kind="cam"),
        operating_points=list(measured.points),
        variants=[_variant(entry, files[entry.name]) for entry in kept],
        golden=cases,
        reference_scores=list(measured.histograms),
        training_data=draft.training_data,
        licence=draft.licence,
        min_appliance_version=draft.min_appliance_version,
        documents=documents,
        **({"watch": draft.watch} if "watch" in draft.model_fields_set else {}),
    )


def _variant(entry: Tried, file: str) -> Variant:
    path = entry.path
    assert path is not None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # What says nothing is left out, so that an appliance of an earlier version reads the manifest too.
    more: dict[str, Any] = {}
    if entry.activations is not None:
        more["activations"] = entry.activations
    if entry.not_on:
        more["not_on"] = entry.not_on
    return Variant(precision=entry.precision, file=file, sha256=digest, recipe=entry.recipe, gate=GATE, **more)


def gate_record(ground: Ground, tried: Sequence[Tried], kept: Sequence[Tried], measured_on: str) -> dict[str, Any]:
    """``gate.json``: what each shipped variant answered on each runtime, and what was left out and why.

    Times are not in it: they belong to the machine that measured, and a second run has to write the same bytes.
    """
    from dataclasses import asdict

    variants: dict[str, Any] = {}
    for entry in kept:
        record = variants.setdefault(entry.precision, {"passed": True, "files": {}})
        record["files"][file_name(entry, ground.found.draft.name)] = {
            "recipe": entry.recipe,
            "not_on": entry.not_on,
            "runtimes": {place.title: _runtime(place, verdict) for place, verdict in entry.verdicts.items()},
        }
    return {
        "schema": 1,
        "reference": "fp32",
        "dataset": measured_on,
        "limits": asdict(ground.limits),
        "note": "Held against the float model's answers by ONNX Runtime on a CPU. Compare an AUC only within one source.",
        "variants": variants,
        "not_measured_here": {
            "runtimes": dict(ground.absent),
            "note": "On these the golden cases decide, on the box.",
        },
        "refused": [
            {"name": entry.name, "precision": entry.precision, "activations": entry.activations, **_refusal(entry)}
            for entry in tried
            if entry.refused is not None
        ],
    }


def _refusal(entry: Tried) -> dict[str, str]:
    assert entry.refused is not None
    timed = entry.refused.code.startswith("speed.")
    return {"code": entry.refused.code, "detail": "" if timed else entry.refused.detail}


def _runtime(place: Place, verdict: Verdict) -> dict[str, Any]:
    return {"version": place.version, **verdict.to_json()}


def _put(directory: Path, relative: str, raw: bytes) -> str:
    """Write a file and return its SHA-256."""
    (directory / relative).write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def _replace(staging: Path, out: Path) -> None:
    """Put ``staging`` in the place of ``out``; a kill in between leaves the old bundle whole under ``.old``, never half a one."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)
