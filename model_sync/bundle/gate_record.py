"""The gate record, ``gate.json``: what was measured, on which weights, at which threshold, on which images.

``quantize`` writes it, ``model-library publish`` refuses a bundle whose record does not match its manifest, and a box shows the accuracy
of a model only where it matches (R29). A record of schema 1 names no digests, so nobody can tell what was measured: such a bundle keeps
running, and its accuracy is not verified.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_sync.bundle.input_check_spec import InputCheck
from model_sync.bundle.manifest import Manifest, ModelInput, Variant
from model_sync.bundle.output_spec import Count, OperatingPoint
from model_sync.errors import BundleError
from model_sync.field_types import Identifier, NonEmpty, Precision, RelativePath, Sha256

GATE_SCHEMA: Final = 2


class _Part(BaseModel):
    """Base of every part of the record. Further fields are for people and are not compared."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class EvaluationSet(_Part):
    """The labelled images of the gate.

    Attributes:
        sha256: of the set, see ``evaluation_digest`` in ``quantize/gate/image_sets.py``; it names no patient.
        n_images: their number.
        name: for people.
    """

    sha256: Sha256
    n_images: Annotated[Count, Field(ge=1)]
    name: NonEmpty


class RuntimeFigures(_Part):
    """The verdict on one runtime, with the figures of each label.

    ``processors`` states of an 8-bit variant how its results are known on each kind of processor (docs/adr/0032-seven-bit-weights.md).
    """

    passed: bool
    processors: dict[Literal["exact", "saturating"], Literal["measured", "same", "simulated", "refused"]] = Field(default_factory=dict)
    labels: dict[Identifier, dict[str, Any]] = Field(default_factory=dict)


class MeasuredFile(_Part):
    """One file of weights as it was measured.

    Attributes:
        sha256: its digest.
        not_on: runtimes on which it failed.
        runtimes: the verdict on each runtime.
    """

    sha256: Sha256
    not_on: list[str] = Field(default_factory=list)
    runtimes: dict[str, RuntimeFigures] = Field(default_factory=dict)


class MeasuredVariant(_Part):
    """The files of one precision."""

    passed: bool
    files: dict[RelativePath, MeasuredFile]


class GateRecord(_Part):
    """``gate.json``, schema 2.

    Attributes:
        evaluation: the images.
        labels: of the manifest, in the order of the scores.
        input: of the manifest: the pipeline that prepared the images.
        operating_points: of the manifest: the thresholds, and what was measured at them, groups of patients included.
        input_check: of the manifest: its network by digest, its limit, and what it stopped; None where the bundle has none.
        variants: the files of each precision.
    """

    schema_: Literal[2] = Field(alias="schema")
    evaluation: EvaluationSet
    labels: list[Identifier]
    input: ModelInput
    operating_points: list[OperatingPoint]
    input_check: InputCheck | None = None
    variants: dict[Precision, MeasuredVariant]


def check_gate(manifest: Manifest, read: Callable[[str], bytes]) -> None:
    """Check that the gate records of a bundle were made with its weights, thresholds, figures and input.

    Args:
        manifest: of the bundle.
        read: returns the verified bytes of a document of the bundle.

    Raises:
        BundleError: ``gate.absent``, ``gate.invalid``, ``gate.failed``, ``gate.unbound``, ``gate.evaluation``, ``gate.weights``,
            ``gate.runtime``, ``gate.threshold``, ``gate.figures`` or ``gate.input``, with the particulars.
    """
    documents: dict[str, dict[str, Any]] = {}
    for variant in manifest.variants:
        if variant.gate is None:
            raise BundleError("gate.absent", f"the {variant.precision} variant has no gate record")
        if variant.gate not in documents:
            documents[variant.gate] = _parse(variant.gate, read(variant.gate))
        _check_passed(variant, documents[variant.gate])
    for name, document in documents.items():
        record = _record(name, document)
        _check_model(manifest, record)
        for variant in manifest.variants:
            if variant.gate == name:
                _check_variant(manifest, variant, record)


def _parse(name: str, raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError("gate.invalid", f"{name} is no gate record: it is not JSON") from error
    if not isinstance(document, dict) or not isinstance(document.get("variants"), dict):
        raise BundleError("gate.invalid", f"{name} is no gate record: it lists no variants")
    return document


def _check_passed(variant: Variant, document: dict[str, Any]) -> None:
    """Check what records of every schema have: that the precision was measured, and passed."""
    entry = document["variants"].get(variant.precision)
    if not isinstance(entry, dict) or "passed" not in entry:
        raise BundleError("gate.invalid", f"{variant.gate} is no gate record on the {variant.precision} variant")
    if entry["passed"] is not True:
        raise BundleError("gate.failed", f"the {variant.precision} variant did not pass its gate")


def _record(name: str, document: dict[str, Any]) -> GateRecord:
    if document.get("schema") != GATE_SCHEMA:
        raise BundleError("gate.unbound", f"{name} has schema {document.get('schema')!r}, digests are in schema {GATE_SCHEMA}")
    try:
        return GateRecord.model_validate_json(json.dumps(document))
    except ValidationError as error:
        wrong = [(".".join(map(str, entry["loc"])), entry["msg"]) for entry in error.errors(include_url=False)]
    missing = [field for field, _ in wrong]
    detail = f"{name}: " + "; ".join(f"{field}: {problem}" for field, problem in wrong)
    if any(field.startswith("evaluation") for field in missing):
        raise BundleError("gate.evaluation", detail)
    if any(field.endswith("sha256") for field in missing):
        raise BundleError("gate.unbound", detail)
    raise BundleError("gate.invalid", detail)


def _check_model(manifest: Manifest, record: GateRecord) -> None:
    """Compare what all variants share: labels, thresholds, figures, input, input check."""
    if record.labels != [label.name for label in manifest.labels]:
        raise BundleError("gate.input", f"measured were the labels {', '.join(record.labels)}, in this order")
    measured = {point.label: point for point in record.operating_points}
    if measured.keys() != {point.label for point in manifest.operating_points}:
        raise BundleError("gate.figures", f"measured were the operating points of {', '.join(sorted(measured)) or 'no label'}")
    for point in manifest.operating_points:
        if point.threshold != measured[point.label].threshold:
            detail = f"{point.label}: the manifest has the threshold {point.threshold:g}, measured was {measured[point.label].threshold:g}"
            raise BundleError("gate.threshold", detail)
        if point != measured[point.label]:
            raise BundleError("gate.figures", f"{point.label}: the figures of the manifest are not those that were measured")
    if record.input != manifest.input:
        raise BundleError("gate.input", "the images of the gate were prepared by another pipeline")
    if record.input_check is None and manifest.input_check is not None:
        raise BundleError("gate.unbound", "the gate record does not name the input check of the bundle")
    if record.input_check != manifest.input_check:
        raise BundleError("gate.input", "the input check of the bundle is not the one that was measured")


def _check_variant(manifest: Manifest, variant: Variant, record: GateRecord) -> None:
    measured = record.variants[variant.precision].files.get(variant.file)
    if measured is None:
        names = ", ".join(sorted(record.variants[variant.precision].files)) or "no file"
        raise BundleError("gate.weights", f"{variant.gate} is on {names}, not on {variant.file}")
    if measured.sha256 != variant.sha256:
        detail = f"{variant.file} has the digest {variant.sha256[:12]}, measured was {measured.sha256[:12]}"
        raise BundleError("gate.weights", detail)
    if not any(figures.passed for figures in measured.runtimes.values()):
        raise BundleError("gate.failed", f"{variant.file} passed on no runtime")
    passed = {title.partition(" ")[0] for title, figures in measured.runtimes.items() if figures.passed}
    if refused := sorted({title.partition(" ")[0] for title in measured.runtimes} - passed - set(variant.not_on)):
        raise BundleError("gate.runtime", f"{variant.file} did not pass on {', '.join(refused)}, and the manifest allows it there")
    thresholds = {point.label: point.threshold for point in manifest.operating_points}
    for title, figures in measured.runtimes.items():
        for label, values in figures.labels.items():
            if label in thresholds and values.get("threshold") != thresholds[label]:
                detail = f"{variant.file} on {title}: {label} was measured at the threshold {values.get('threshold')}"
                raise BundleError("gate.threshold", detail)
