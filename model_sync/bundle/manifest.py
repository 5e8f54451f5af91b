"""The schema of ``manifest.json``: intended use, input, outputs and operating points of a model.

Parsing is strict: an unknown field, a duplicate key, a wrong type or an invalid reference is an error, so that a box never guesses the
intended use of a model (R28) or its threshold (R29).
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from model_sync.bundle.applies_to import AppliesTo, Text
from model_sync.bundle.envelope import FIRST_OF_SCHEMA_2, invalid_manifest, require_readable, version_core
from model_sync.bundle.input_check_spec import InputCheck
from model_sync.bundle.input_spec import InputSpec
from model_sync.bundle.output_spec import (
    BACKGROUND,
    Count,
    Explain,
    Golden,
    OperatingPoint,
    OutputSpec,
    ScoreHistogram,
)
from model_sync.bundle.volume_spec import VolumeSpec
from model_sync.field_types import Identifier, NonEmpty, Precision, RelativePath, SemVer, Sha256, Strict

MANIFEST_NAME = "manifest.json"
REQUIRED_DOCUMENTS = ("MODEL_CARD.md", "gate.json")

_TAGS = {("input", "NCHW"), ("input", "NCDHW")}
ModelInput: TypeAlias = Annotated[InputSpec | VolumeSpec, Field(discriminator="layout")]


class Code(Strict):
    """A coded concept: SNOMED CT (scheme SCT) or RadLex, as used in the structured report."""

    scheme: Literal["SCT", "RADLEX"]
    value: NonEmpty
    meaning: NonEmpty


class Verdict(Strict):
    """How the result of a label is put into words for a doctor.

    Attributes:
        positive: where the score reaches the threshold.
        below: where it does not; it must not sound as if nothing were there.
    """

    positive: Text
    below: Text


class Label(Strict):
    """One finding that the model detects; a box has general words where ``verdict`` (schema 2) is absent."""

    name: Identifier
    title: Text
    code: Code
    verdict: Verdict | None = None


class Variant(Strict):
    """The weights in one precision; ``gate`` names the record that shows it agrees with the float model.

    Attributes:
        precision: the precision of its weights and sums.
        file: the ONNX file.
        sha256: its digest.
        recipe: how it was made.
        gate: the gate record, one of ``documents``.
        activations: how the activations of int8 are quantized: symmetric for TensorRT, unsigned for CPUs with VNNI; None for other
            precisions. A bundle may contain both.
        not_on: runtimes on which this variant failed when it was made; a box does not use them.
    """

    precision: Precision
    file: RelativePath
    sha256: Sha256
    recipe: NonEmpty
    gate: RelativePath | None
    activations: Literal["symmetric", "unsigned"] | None = None
    not_on: list[Literal["onnxruntime", "openvino", "tensorrt", "triton"]] = Field(default_factory=list)


class TrainingSource(Strict):
    """A source of training images, and its licence."""

    name: NonEmpty
    n_images: Count
    licence: NonEmpty


class TrainingData(Strict):
    """The training data of the model."""

    description: Text
    n_images: Count
    sources: list[TrainingSource]


class Registration(Strict):
    """The product's registration as a medical device; None where there is none."""

    number: str | None
    device_class: str | None
    pccp_id: str | None


class Watch(Strict):
    """The trial of a new version on a box, and what rolls it back (R31).

    Attributes:
        trial_cases: analysed images after which the trial is passed.
        trial_hours: hours after which it is passed, if at least one image was analysed.
        max_failure_fraction: largest share of failed analyses; checked from the third failure on.
        max_latency_ratio: largest median inference time, as a multiple of the self-test's.
        max_score_drift: largest population stability index between the scores on this box and ``reference_scores``; checked
            from 50 images on, minus the expected value of chance. The share of ill patients of a clinic differs from that of any
            test set, so the default allows that and detects a changed shape of the distribution; None checks no drift.
    """

    trial_cases: Annotated[int, Field(ge=1)] = 200
    trial_hours: Annotated[float, Field(gt=0)] = 72.0
    max_failure_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_latency_ratio: Annotated[float, Field(gt=1)] = 5.0
    max_score_drift: Annotated[float, Field(gt=0)] | None = 3.0


class Document(Strict):
    """Any other file of the bundle: model card, gate record, engine."""

    file: RelativePath
    sha256: Sha256


class Manifest(Strict):
    """``manifest.json``, schema 1 or 2.

    Schema 2 adds optional fields: ``input_check``, ``labels[].verdict``, ``operating_points[].groups`` and ``applies_to.synonyms``.
    A box that reads only schema 1 refuses it, and must: it would analyse images that the input check stops.
    """

    schema_: Literal[1, 2] = Field(alias="schema")
    name: Identifier
    version: SemVer
    task: Literal["classification", "detection", "segmentation", "measurement"]
    title: Text
    labels: Annotated[list[Label], Field(min_length=1)]
    applies_to: AppliesTo
    intended_use: Text
    registration: Registration
    change_kind: Literal["algorithm", "data"]
    input: ModelInput
    outputs: Annotated[list[OutputSpec], Field(min_length=1)]
    explain: Explain | None
    operating_points: list[OperatingPoint]
    variants: Annotated[list[Variant], Field(min_length=1)]
    golden: Annotated[list[Golden], Field(min_length=1)]
    reference_scores: list[ScoreHistogram]
    training_data: TrainingData
    licence: NonEmpty
    min_appliance_version: SemVer
    documents: list[Document]
    watch: Watch = Watch()
    input_check: InputCheck | None = None

    @classmethod
    def parse(cls, raw: bytes, appliance_version: str = "") -> Manifest:
        """Read the bytes of a ``manifest.json``.

        Args:
            raw: the file.
            appliance_version: of the box that reads it; empty where that does not matter, as at the central library.

        Raises:
            BundleError: ``bundle.too_new``: it needs a newer appliance, which is found out before any field is judged;
                ``bundle.manifest_invalid``, naming each field that is wrong.
        """
        require_readable(raw, appliance_version)
        try:
            manifest = cls.model_validate_json(raw, strict=True)
            json.loads(raw, object_pairs_hook=_refuse_duplicate_keys)
        except ValidationError as error:
            wrong = [f"{_where(e['loc'])}: {e['msg']}" for e in error.errors(include_url=False)]
            raise invalid_manifest("; ".join(wrong[:10])) from error
        except ValueError as error:
            raise invalid_manifest(str(error)) from error
        return manifest

    def to_json(self) -> bytes:
        """Return the canonical bytes of the manifest: stable order, UTF-8, two spaces."""
        return (self.model_dump_json(by_alias=True, exclude_unset=True, indent=2) + "\n").encode()

    def label(self, name: str) -> Label:
        """Return the label called ``name``.

        Raises:
            KeyError: the model has no such label.
        """
        return {label.name: label for label in self.labels}[name]

    def operating_point(self, label: str) -> OperatingPoint:
        """Return the operating point of ``label``.

        Raises:
            KeyError: the model has no such label.
        """
        return {point.label: point for point in self.operating_points}[label]

    @property
    def image_input(self) -> InputSpec:
        """The input of a model of images.

        Raises:
            BundleError: ``bundle.manifest_invalid``: it is a model of volumes.
        """
        if isinstance(self.input, VolumeSpec):
            raise invalid_manifest("the model reads volumes, not images")
        return self.input

    @property
    def volume_input(self) -> VolumeSpec:
        """The input of a model of volumes.

        Raises:
            BundleError: ``bundle.manifest_invalid``: it is a model of images.
        """
        if isinstance(self.input, InputSpec):
            raise invalid_manifest("the model reads images, not volumes")
        return self.input

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every file that the manifest lists, by relative path."""
        return {
            **{v.file: v.sha256 for v in self.variants},
            **{g.input: g.sha256 for g in self.golden},
            **{d.file: d.sha256 for d in self.documents},
            **({self.input_check.file: self.input_check.sha256} if self.input_check else {}),
        }

    @model_validator(mode="after")
    def _schema_has_its_fields(self) -> Self:
        if self.schema_ == 1:
            present = {
                "input_check": self.input_check is not None,
                "labels.verdict": any(label.verdict is not None for label in self.labels),
                "operating_points.groups": any(point.groups for point in self.operating_points),
                "applies_to.synonyms": self.applies_to.synonyms is not None,
            }
            if newer := [name for name, is_present in present.items() if is_present]:
                raise ValueError(f"schema 1 has no {', '.join(newer)}: write schema 2")
        elif version_core(self.min_appliance_version) < version_core(FIRST_OF_SCHEMA_2):
            raise ValueError(f"schema 2 needs a min_appliance_version of {FIRST_OF_SCHEMA_2} or newer")
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        labels = [label.name for label in self.labels]
        _unique("labels", labels)
        _unique("outputs", [output.name for output in self.outputs])
        for field in ("operating_points", "reference_scores"):
            named = [entry.label for entry in getattr(self, field)]
            _unique(field, named)
            # A score without an operating point must not exist (R29); other tasks have no score.
            if self.task in ("classification", "detection") and set(named) != set(labels):
                raise ValueError(f"{field} must name every label exactly once")
        cams = {output.name for output in self.outputs if output.kind == "cam"}
        if self.explain is not None and self.explain.output not in cams:
            raise ValueError("explain.output must name an output of kind cam")
        return self

    @model_validator(mode="after")
    def _files_agree(self) -> Self:
        precisions = [variant.precision for variant in self.variants]
        _unique("variants", [(variant.precision, variant.activations) for variant in self.variants])
        documents = [document.file for document in self.documents]
        checks = [self.input_check.file] if self.input_check else []
        files = [v.file for v in self.variants] + [g.input for g in self.golden] + documents + checks
        _unique("files", [file.lower() for file in files])
        if MANIFEST_NAME in (file.lower() for file in files):
            raise ValueError("the manifest cannot list itself")
        if missing := [name for name in REQUIRED_DOCUMENTS if name not in documents]:
            raise ValueError(f"documents must list {', '.join(missing)}")
        for variant in self.variants:
            if variant.gate is not None and variant.gate not in documents:
                raise ValueError(f"the gate record {variant.gate} is not among the documents")
        for golden in self.golden:
            if set(golden.tolerance) != set(precisions):
                raise ValueError(f"{golden.input}: one tolerance per variant is needed")
            if self.task in ("classification", "segmentation") and set(golden.expected) != {label.name for label in self.labels}:
                what = "probability" if self.task == "classification" else "Dice coefficient"
                raise ValueError(f"{golden.input}: one expected {what} per label is needed")
        return self

    @model_validator(mode="after")
    def _volume_agrees(self) -> Self:
        segmented = [output for output in self.outputs if output.kind == "segmentation_logits"]
        if isinstance(self.input, VolumeSpec) and self.input_check is not None:
            raise ValueError("input_check is for models of images")
        if isinstance(self.input, VolumeSpec) and (self.task != "segmentation" or len(segmented) != 1 or self.explain is not None):
            raise ValueError("a model of volumes must be a segmentation with one output of kind segmentation_logits and no explain")
        if self.applies_to.sequence is not None and not isinstance(self.input, VolumeSpec):
            raise ValueError("applies_to.sequence needs an input of layout NCDHW")
        if segmented and not isinstance(self.input, VolumeSpec):
            raise ValueError("segmentation_logits need an input of layout NCDHW")
        for output in segmented:
            if set(output.classes or ()) - {BACKGROUND} != {label.name for label in self.labels}:
                raise ValueError(f"{output.name}: classes must be {BACKGROUND} and every label exactly once")
        return self


def _where(location: tuple[int | str, ...]) -> str:
    # The discriminator of a union of inputs or steps is not a field of the file.
    parts = [str(part) for part in location]
    return ".".join(part for part, before in zip(parts, ["", *parts], strict=False) if (before, part) not in _TAGS) or "manifest"


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> None:
    # With a duplicate key two parsers could read two different models.
    _unique("keys", [key for key, _ in pairs])


def _unique(what: str, names: list[Any]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{what} must not repeat: {', '.join(map(str, twice))}")
