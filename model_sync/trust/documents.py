"""The signed documents of the library, each a small TUF target: the index of a model line, and the rollout of a ring.

``models/<line>/line.json`` is signed by the role of the model line: which versions exist, which is the oldest that a box may run,
which are withdrawn, and which deltas exist. ``rollout/<ring>.json`` is signed by the rollout role, which can only choose among the versions
of the index.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta
from typing import Annotated, Literal, NamedTuple, TypeAlias, TypeVar

import semver
from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator
from typing_extensions import Self

from model_sync.errors import Action, TrustError
from model_sync.field_types import Identifier, NonEmpty, RelativePath, SemVer, Sha256, Strict


def _plausible_year(moment: datetime) -> datetime:
    # A typing error such as the year 9999 must not break date arithmetic.
    if not 2000 <= moment.year < 2200:
        raise ValueError("a time between 2000 and 2200 is needed")
    return moment


Moment: TypeAlias = Annotated[AwareDatetime, AfterValidator(_plausible_year)]
Codec: TypeAlias = Literal["zstd-prefix", "tensor"]
_Document = TypeVar("_Document", bound="SignedDocument")
# TUF's path patterns match segment by segment: a bundle's files lie at most three folders deep.
_LINE_PATTERNS = ("models/{line}/*", "models/{line}/*/*", "models/{line}/*/*/*", "models/{line}/*/*/*/*", "deltas/{line}/*")
ROLLOUT_ROLE = "rollout"
ROLLOUT_PATTERN = "rollout/*.json"


class SignedDocument(Strict):
    """Base of the signed documents: strict JSON, canonical bytes."""

    @classmethod
    def parse(cls: type[_Document], raw: bytes) -> _Document:
        """Read the bytes of a verified target.

        Raises:
            TrustError: ``trust.document``: it is signed and not valid: the signers made a mistake, or the box is too old.
        """
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or cls.__name__}: {item['msg']}" for item in error.errors(include_url=False)[:5]
            )
            raise TrustError(f"a signed {cls.__name__} is not valid: {wrong}", code="trust.document", action=Action.OPERATOR) from error

    def to_json(self) -> bytes:
        """Return the canonical bytes: sorted keys, UTF-8, two spaces."""
        return (json.dumps(self.model_dump(mode="json", by_alias=True), ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


class Release(Strict):
    """One version of a model line: ``digest`` is the SHA-256 of its ``manifest.json``, which names every file."""

    version: SemVer
    digest: Sha256
    published_at: Moment


class Withdrawal(Strict):
    """A version that must not analyse another image, and why; the reason is shown to clinicians."""

    version: SemVer
    reason: Annotated[NonEmpty, Field(max_length=300)]
    at: Moment


class Delta(Strict):
    """A delta that builds one file from another one: ``path`` is the target that holds it, ``length`` its bytes."""

    from_sha256: Sha256
    to_sha256: Sha256
    codec: Codec
    path: RelativePath
    length: Annotated[int, Field(gt=0)]


class LineIndex(SignedDocument):
    """The index of a model line, ``models/<line>/line.json``."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    line: Identifier
    minimum_version: SemVer
    versions: Annotated[list[Release], Field(max_length=500)]
    withdrawn: Annotated[list[Withdrawal], Field(max_length=500)] = Field(default_factory=list)
    deltas: Annotated[list[Delta], Field(max_length=2000)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        versions = [release.version for release in self.versions]
        if len(set(versions)) != len(versions):
            raise ValueError("a version is listed twice")
        if unknown := {item.version for item in self.withdrawn} - set(versions):
            raise ValueError(f"withdrawn but never published: {', '.join(sorted(unknown))}")
        return self

    def release(self, version: str) -> Release | None:
        """Return the entry of ``version``, or None."""
        return next((item for item in self.versions if item.version == version), None)

    def withdrawal(self, version: str) -> Withdrawal | None:
        """Return the withdrawal of ``version``, or None."""
        return next((item for item in self.withdrawn if item.version == version), None)

    def refusal(self, version: str) -> str | None:
        """Return why a box must not run ``version``: ``unknown``, ``withdrawn`` or ``below_minimum``; None when it may."""
        if self.release(version) is None:
            return "unknown"
        if self.withdrawal(version) is not None:
            return "withdrawn"
        return "below_minimum" if older(version, self.minimum_version) else None


class FailureBudget(Strict):
    """How many activations may fail before a rollout is paused: a share of the boxes that tried it, and at least a number."""

    max_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    min_boxes: Annotated[int, Field(ge=1)] = 2


class RolloutStep(Strict):
    """The rollout of one model line: ``percent`` of the ring's boxes take ``version``, spread over ``duration_h`` from ``start``."""

    version: SemVer
    percent: Annotated[float, Field(ge=0, le=100)]
    start: Moment
    duration_h: Annotated[float, Field(ge=0, le=24 * 90)] = 0.0
    failure_budget: FailureBudget = FailureBudget()
    paused: bool = False


class Rollout(SignedDocument):
    """The rollout of a ring, ``rollout/<ring>.json``."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    ring: Identifier
    issued_at: Moment
    lines: Annotated[dict[Identifier, RolloutStep], Field(max_length=200)]


class RolloutTurn(NamedTuple):
    """Whether a box takes a version now; ``code`` says why not: ``paused``, ``not_chosen`` or ``not_yet`` (then ``at``)."""

    take: bool
    code: str = ""
    at: datetime | None = None


def decide(step: RolloutStep, line: str, box_id: str, now: datetime) -> RolloutTurn:
    """Return whether one box takes a version now; the result depends only on the arguments.

    Places below ``percent`` take part, lower ones earlier. So a higher ``percent`` only adds boxes.
    """
    if step.paused:
        return RolloutTurn(False, "paused")
    place = place_of(line, step.version, box_id)
    if place >= step.percent:
        return RolloutTurn(False, "not_chosen")
    at = step.start + timedelta(hours=step.duration_h * place / step.percent)
    return RolloutTurn(True) if now >= at else RolloutTurn(False, "not_yet", at)


def place_of(line: str, version: str, box_id: str) -> float:
    """Return the place of a box in the rollouts of a version, in [0, 100): a hash, so that each version begins with other boxes."""
    draw = hashlib.sha256(f"{line}\n{version}\n{box_id}".encode()).digest()
    return int.from_bytes(draw[:8], "big") / 2**64 * 100


def older(version: str, than: str) -> bool:
    """Return whether ``version`` precedes ``than`` (Semantic Versioning 2.0, clause 11)."""
    return semver.Version.parse(version).compare(than) < 0


def line_path(line: str) -> str:
    """Return the target path of a model line's index."""
    return f"models/{line}/line.json"


def file_path(line: str, version: str, file: str) -> str:
    """Return the target path of one file of one version."""
    return f"models/{line}/{version}/{file}"


def delta_path(line: str, from_sha256: str, to_sha256: str, codec: Codec) -> str:
    """Return the target path of a delta."""
    return f"deltas/{line}/{to_sha256[:16]}-{from_sha256[:16]}.{codec}"


def rollout_path(ring: str) -> str:
    """Return the target path of a ring's rollout."""
    return f"rollout/{ring}.json"


def line_patterns(line: str) -> list[str]:
    """Return the path patterns that the targets role delegates to the role of a model line."""
    return [pattern.format(line=line) for pattern in _LINE_PATTERNS]
