"""What the library says about models, each a small signed TUF target: the index of a line, and the rollout of a ring.

``models/<line>/line.json`` is signed by the line's own role: which versions exist, which is the oldest a box may run, which
are withdrawn, and which deltas there are. ``rollout/<ring>.json`` is signed by the rollout role, which can only choose among
the versions of the index: it cannot bring a model of its own to a box.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

import semver
from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator
from typing_extensions import Self

from model_sync.bundle.input_spec import NonEmpty, Strict
from model_sync.bundle.manifest import SemVer
from model_sync.bundle.output_spec import Identifier, RelativePath, Sha256
from model_sync.errors import TrustError


def _in_our_time(moment: datetime) -> datetime:
    # A signer's slip such as the year 9999 must not break the arithmetic of every box.
    if not 2000 <= moment.year < 2200:
        raise ValueError("a time between 2000 and 2200 is needed")
    return moment


Moment: TypeAlias = Annotated[AwareDatetime, AfterValidator(_in_our_time)]
Codec: TypeAlias = Literal["zstd-prefix", "tensor"]
_Document = TypeVar("_Document", bound="SignedDocument")
# TUF's path patterns match segment by segment: a bundle's files lie at most three folders deep.
_LINE_PATTERNS = ("models/{line}/*", "models/{line}/*/*", "models/{line}/*/*/*", "models/{line}/*/*/*/*", "deltas/{line}/*")
ROLLOUT_ROLE = "rollout"
ROLLOUT_PATTERN = "rollout/*.json"


class SignedDocument(Strict):
    """Base of the documents: strict JSON, canonical bytes."""

    @classmethod
    def parse(cls: type[_Document], raw: bytes) -> _Document:
        """Read the bytes of a verified target.

        Raises:
            TrustError: signed, but not a document this version understands: the signers made a mistake, or a newer library
                speaks to an older box.
        """
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or cls.__name__}: {item['msg']}" for item in error.errors(include_url=False)[:5]
            )
            raise TrustError(
                f"a signed {cls.__name__} is not valid: {wrong}",
                hint="update the box, or tell the central team; the model in use stays",
                code="trust.document",
            ) from error

    def to_json(self) -> bytes:
        """Return the canonical bytes: sorted keys, UTF-8, two spaces."""
        return (json.dumps(self.model_dump(mode="json", by_alias=True), ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


class Release(Strict):
    """One version of a line: ``digest`` is the SHA-256 of its ``manifest.json``, which names every file of it."""

    version: SemVer
    digest: Sha256
    published_at: Moment


class Withdrawal(Strict):
    """A version that must not read another patient, and why; the reason is shown to clinicians."""

    version: SemVer
    reason: Annotated[NonEmpty, Field(max_length=300)]
    at: Moment


class Delta(Strict):
    """A way to make one file out of another that a box may have: ``path`` is the target that holds it, ``length`` its bytes."""

    from_sha256: Sha256
    to_sha256: Sha256
    codec: Codec
    path: RelativePath
    length: Annotated[int, Field(gt=0)]


class LineIndex(SignedDocument):
    """``models/<line>/line.json``."""

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
        """Return why ``version`` is withdrawn, or None."""
        return next((item for item in self.withdrawn if item.version == version), None)

    def refusal(self, version: str) -> str | None:
        """Say why a box must not run ``version``: ``unknown``, ``withdrawn`` or ``below_minimum``; None when it may."""
        if self.release(version) is None:
            return "unknown"
        if self.withdrawal(version) is not None:
            return "withdrawn"
        return "below_minimum" if older(version, self.minimum_version) else None


class FailureBudget(Strict):
    """How many failed activations a rollout may cost before it is paused: a share of the boxes that tried, above a minimum."""

    max_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    min_boxes: Annotated[int, Field(ge=1)] = 2


class RolloutStep(Strict):
    """What a ring's boxes do with one line: ``percent`` of them take ``version``, spread over ``duration_h`` from ``start``."""

    version: SemVer
    percent: Annotated[float, Field(ge=0, le=100)]
    start: Moment
    duration_h: Annotated[float, Field(ge=0, le=24 * 90)] = 0.0
    failure_budget: FailureBudget = FailureBudget()
    paused: bool = False


class Rollout(SignedDocument):
    """``rollout/<ring>.json``."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    ring: Identifier
    issued_at: Moment
    lines: Annotated[dict[Identifier, RolloutStep], Field(max_length=200)]


class Decision(NamedTuple):
    """Whether a box takes a version now; ``code`` says why not: ``paused``, ``not_chosen`` or ``not_yet`` (then ``at``)."""

    take: bool
    code: str = ""
    at: datetime | None = None


def decide(step: RolloutStep, line: str, box_id: str, now: datetime) -> Decision:
    """Decide for one box, the same way each time it is asked, and without telling anybody.

    A box's place in a rollout is a hash of its name, the line and the version, in [0, 100): those below ``percent`` take part,
    the lower ones earlier. So a widened rollout only adds boxes, and the canaries of one version are not those of the next.
    """
    if step.paused:
        return Decision(False, "paused")
    draw = hashlib.sha256(f"{line}\n{step.version}\n{box_id}".encode()).digest()
    place = int.from_bytes(draw[:8], "big") / 2**64 * 100
    if place >= step.percent:
        return Decision(False, "not_chosen")
    at = step.start + timedelta(hours=step.duration_h * place / step.percent)
    return Decision(True) if now >= at else Decision(False, "not_yet", at)


def older(version: str, than: str) -> bool:
    """Say whether ``version`` comes before ``than`` by the precedence of semantic versioning 2.0 (clause 11)."""
    return semver.Version.parse(version).compare(than) < 0


def line_path(line: str) -> str:
    """Return the target path of a line's index."""
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
    """Return the path patterns that the targets role delegates to the role of a line."""
    return [pattern.format(line=line) for pattern in _LINE_PATTERNS]


def delta_custom(delta: Delta) -> dict[str, Any]:
    """Return what a delta's TUF target carries in ``custom``."""
    return {"from_sha256": delta.from_sha256, "to_sha256": delta.to_sha256, "codec": delta.codec}
