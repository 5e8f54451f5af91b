"""``draft.toml``: the part of the manifest that people write. The pipeline computes the other fields.

Parsing is as strict as for the manifest: the error names each unknown field, missing field or value of the wrong type. People do not
write thresholds: ``[[operating_points]]`` gives the wanted sensitivity per label, and the pipeline chooses the threshold from measurements.
"""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from model_sync.bundle import (
    AppliesTo,
    Identifier,
    InputCheck,
    InputSpec,
    Label,
    NonEmpty,
    OutputSpec,
    Registration,
    RelativePath,
    SemVer,
    Strict,
    Text,
    TrainingData,
    Watch,
)
from model_sync.bundle.envelope import FIRST_OF_SCHEMA_2, version_core
from quantize.errors import QuantizeError
from quantize.messages import Code

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL_CARD = "MODEL_CARD.md"
INPUT_CHECK = "input_check.onnx"


class SensitivityTarget(Strict):
    """The wanted sensitivity of a label. The pipeline chooses the highest threshold that reaches it."""

    label: Identifier
    sensitivity: Annotated[float, Field(gt=0, le=1)] = 0.95


class Population(Strict):
    """A population of patients, as the sources of the test images state it. The pipeline measures the operating points on each.

    Attributes:
        sources: how the names of its sources begin in ``labels.csv``.
        population: the group.
        min_years: age of the youngest patients.
        max_years: age of the oldest patients, in completed years.
    """

    sources: Annotated[list[NonEmpty], Field(min_length=1)]
    population: Literal["child", "adult"]
    min_years: Annotated[float, Field(ge=0)]
    max_years: Annotated[float, Field(gt=0, le=150)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_years >= self.max_years:
            raise ValueError("min_years must be below max_years")
        return self

    def includes_source(self, source: str) -> bool:
        """Whether the images of a source show patients of this population."""
        return source.startswith(tuple(self.sources))


class DraftRegistration(Registration):
    """The registration. TOML has no null: a missing field is None."""

    number: str | None = None
    device_class: str | None = None
    pccp_id: str | None = None


class InputCheckFiles(Strict):
    """The input check of the bundle: its ONNX file, and the rest of the manifest's ``input_check`` as JSON; both beside the draft."""

    network: RelativePath
    record: RelativePath


class Draft(Strict):
    """``draft.toml``; the fields are the manifest's."""

    name: Identifier
    version: SemVer
    task: Literal["classification", "detection", "segmentation", "measurement"]
    title: Text
    labels: Annotated[list[Label], Field(min_length=1)]
    applies_to: AppliesTo
    intended_use: Text
    registration: DraftRegistration = DraftRegistration()
    change_kind: Literal["algorithm", "data"]
    input: InputSpec
    outputs: Annotated[list[OutputSpec], Field(min_length=1)]
    operating_points: list[SensitivityTarget] = Field(default_factory=list)
    populations: list[Population] = Field(default_factory=list)
    training_data: TrainingData
    licence: NonEmpty
    min_appliance_version: SemVer
    watch: Watch = Watch()
    input_check: InputCheckFiles | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        names = [label.name for label in self.labels]
        aims = [aim.label for aim in self.operating_points]
        if self.task in ("classification", "detection") and sorted(aims) != sorted(names):
            raise ValueError(f"operating_points must name every label exactly once: {', '.join(names)}")
        if self.task in ("classification", "detection") and not any(output.kind == "probability" for output in self.outputs):
            raise ValueError("outputs must name the output of kind probability")
        return self

    @model_validator(mode="after")
    def _populations_are_apart(self) -> Self:
        ordered = sorted(self.populations, key=lambda population: population.min_years)
        if any(population.max_years + 1 > after.min_years for population, after in pairwise(ordered)):
            raise ValueError("populations must not overlap in age")
        return self

    @model_validator(mode="after")
    def _appliance_reads_it(self) -> Self:
        if self.schema_version > 1 and version_core(self.min_appliance_version) < version_core(FIRST_OF_SCHEMA_2):
            raise ValueError(
                f"populations, verdicts, synonyms and an input check need a min_appliance_version of {FIRST_OF_SCHEMA_2} or newer"
            )
        return self

    @property
    def schema_version(self) -> Literal[1, 2]:
        """The lowest schema of the manifest that has every field of this draft: older appliances read a manifest of schema 1 too."""
        is_newer = (
            self.populations
            or self.input_check is not None
            or self.applies_to.synonyms is not None
            or any(label.verdict is not None for label in self.labels)
        )
        return 2 if is_newer else 1

    @classmethod
    def parse(cls, raw: bytes) -> Draft:
        """Read the bytes of a draft.

        Raises:
            QuantizeError: ``draft.invalid``, naming each field that is wrong.
        """
        try:
            return cls.model_validate(tomllib.loads(raw.decode()), strict=True)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc'])) or 'draft'}: {e['msg']}" for e in error.errors(include_url=False)]
            raise _invalid("; ".join(wrong[:10])) from error
        except ValueError as error:  # TOML and UTF-8 errors are of this kind
            raise _invalid(str(error)) from error

    @classmethod
    def load(cls, path: Path) -> Draft:
        """Read a draft.

        Raises:
            QuantizeError: ``draft.missing``, ``draft.invalid``.
        """
        if not path.is_file():
            raise QuantizeError(f"the draft {path} does not exist", code=Code.DRAFT_MISSING)
        return cls.parse(path.read_bytes())

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that are scored: none for a task without scores."""
        return tuple(label.name for label in self.labels) if self.task in ("classification", "detection") else ()

    def read_input_check(self, directory: Path) -> tuple[bytes, InputCheck] | None:
        """Read the files of the input check beside the draft: the network, and the part of the manifest; None where there is none.

        Raises:
            QuantizeError: ``draft.invalid``: a file is missing, or the record is not valid.
        """
        if self.input_check is None:
            return None
        try:
            network = (directory / self.input_check.network).read_bytes()
            record = json.loads((directory / self.input_check.record).read_bytes())
            own = {"file": INPUT_CHECK, "sha256": hashlib.sha256(network).hexdigest()}
            return network, InputCheck.model_validate(record | own, strict=True)
        except OSError as error:
            raise _invalid(f"input_check: {error.filename} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise _invalid(f"input_check: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (ValueError, TypeError) as error:
            raise _invalid(f"input_check: {self.input_check.record} is no JSON object") from error

    def output(self, kind: str) -> str | None:
        """The name of the first output of a kind."""
        return next((output.name for output in self.outputs if output.kind == kind), None)

    def with_cam(self, name: str, shape: list[Any]) -> Draft:
        """The draft with the class activation map that the pipeline added to the graph."""
        return self.model_copy(update={"outputs": [*self.outputs, OutputSpec(name=name, kind="cam", shape=shape)]})


def _invalid(what: str) -> QuantizeError:
    return QuantizeError(f"the draft is not valid: {what}", code=Code.DRAFT_INVALID)
