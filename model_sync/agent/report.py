"""The status report of a box to the centre: enumerations, versions, digests and bounded numbers, signed by the box.

It has no free text, so it cannot contain patient data (R18): a code that is not in ``CODES`` becomes ``unlisted``, a time before
``EARLIEST`` becomes the epoch, and a model that the signed library does not name is only counted. The appliance's part
(``exchange/box-report.json``) is parsed by the same schema; with an unknown key no part of it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, Final, Literal, NoReturn, TypeAlias, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from pydantic import StringConstraints as Pattern
from securesystemslib.exceptions import FormatError, UnverifiedSignatureError
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner, Signature, SSlibKey

from model_sync.agent.sync_status import SyncState
from model_sync.errors import CodedError, TextEnum
from model_sync.field_types import Identifier, Precision, SemVer, Sha256
from model_sync.messages import REPORTED
from model_sync.trust.rollback_protection import iso

MAX_REPORT_BYTES: Final = 64 << 10
MAX_BOX_REPORT_BYTES: Final = 256 << 10
UNLISTED: Final = "unlisted"  # also a key of REPORTED
EARLIEST: Final = datetime(2024, 1, 1, tzinfo=timezone.utc)
EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LATEST: Final = datetime(2200, 1, 1, tzinfo=timezone.utc)
_DISK_STEP_BYTES: Final = 64 << 20
CODES: Final = frozenset(REPORTED) | {""}

_Report = TypeVar("_Report", bound="Allowed")


class ModelState(TextEnum):
    """The state of a model on a box, as it is stored and reported."""

    ACTIVE = "active"
    PREVIOUS = "previous"
    RETIRED = "retired"
    STAGED = "staged"
    BUILDING = "building"
    SELF_TEST = "self-test"
    TRIAL = "trial"
    GOOD = "good"
    FAILED = "failed"
    ROLLED_BACK = "rolled-back"
    WITHDRAWN = "withdrawn"


ActivationState: TypeAlias = Literal[
    ModelState.STAGED, ModelState.BUILDING, ModelState.SELF_TEST, ModelState.TRIAL, ModelState.GOOD, ModelState.FAILED,
    ModelState.ROLLED_BACK, ModelState.WITHDRAWN,
]  # fmt: skip


def _listed(value: object) -> object:
    return value if not isinstance(value, str) or value in CODES else UNLISTED


def _plausible(moment: datetime) -> datetime:
    """Return the time in seconds; an impossible one, of a clock that is not set, becomes the epoch."""
    return moment.astimezone(timezone.utc).replace(microsecond=0) if EARLIEST <= moment < _LATEST else EPOCH


Code: TypeAlias = Annotated[str, BeforeValidator(_listed)]
Instant: TypeAlias = Annotated[AwareDatetime, AfterValidator(_plausible), PlainSerializer(iso)]
BoxId: TypeAlias = Annotated[str, Pattern(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
# A release of this product, not any text that semantic versioning allows.
RELEASE: Final = r"^\d{1,5}\.\d{1,5}\.\d{1,5}((a|b|rc|\.dev|-(alpha|beta|rc|dev|canary)\.?)\d{1,5})?$"
Release: TypeAlias = Annotated[str, Pattern(pattern=RELEASE)]
RuntimeName: TypeAlias = Annotated[
    str,
    Pattern(
        pattern=r"^(none|(onnxruntime|tensorrt|openvino|triton)( \d{1,5}(\.\d{1,5}){0,3})?"
        r"( (CPU|CUDA|Tensorrt|OpenVINO)ExecutionProvider)?)$"
    ),
]
# A digest of processor, features, cores and GPUs: it names a kind of box, and has room for no text.
DeviceClass: TypeAlias = Annotated[str, Pattern(pattern=r"^[0-9a-f]{16}$")]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=10**6)]
Bytes: TypeAlias = Annotated[int, Field(ge=0, lt=2**53)]
# Rounded down: the last digits are not needed, and could carry other information.
DiskBytes: TypeAlias = Annotated[Bytes, AfterValidator(lambda value: value // _DISK_STEP_BYTES * _DISK_STEP_BYTES)]
Version: TypeAlias = Annotated[SemVer, Pattern(max_length=64)]
Sequence: TypeAlias = Annotated[int, Field(ge=1, lt=2**53)]


class ReportError(CodedError):
    """A report was refused.

    Attributes:
        code: ``report.invalid`` (not the schema), ``report.signature`` (not signed by this box).
    """


class Allowed(BaseModel):
    """Base of the schema: no unknown keys, no type conversion, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelReport(Allowed):
    """One model on the box."""

    line: Identifier
    version: Version
    digest: Sha256
    state: ModelState
    precision: Precision
    runtime: RuntimeName


class ActivationReport(Allowed):
    """The latest state of one activation; ``code`` is the reason of a failure or a rollback."""

    line: Identifier
    version: Version
    digest: Sha256
    state: ActivationState
    code: Code | None = None
    at: Instant


class Health(Allowed):
    """Counters of the box."""

    waiting_jobs: Count
    failed_jobs_24h: Count
    analysed_24h: Count
    disk_free_bytes: DiskBytes


class AuditHead(Allowed):
    """The number of entries of the box's audit, and the digest of the last one."""

    entries: Bytes
    digest: Sha256


class AuditReport(Allowed):
    """The head of the box's audit, and the digests that entries which earlier heads named have now (zeros: the entry is missing)."""

    head: AuditHead
    anchors: Annotated[list[AuditHead], Field(max_length=16)]


class BoxReport(Allowed):
    """``exchange/box-report.json``, written by the appliance; ``unlisted`` counts what the agent left out.

    ``device_class`` is the same for boxes with the same processor and GPUs; None of an appliance that does not report it. So is ``audit``.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")]
    at: Instant
    appliance_version: Release
    models: Annotated[list[ModelReport], Field(max_length=64)]
    activations: Annotated[list[ActivationReport], Field(max_length=64)]
    health: Health
    unlisted: Count = 0
    device_class: DeviceClass | None = None
    audit: AuditReport | None = None

    @classmethod
    def parse(cls, raw: bytes) -> BoxReport:
        """Parse the appliance's report; raise ReportError that names fields only, never their values."""
        return _validated(cls, load_json(raw, MAX_BOX_REPORT_BYTES))

    def restricted_to(self, lines: Mapping[str, frozenset[str]]) -> BoxReport:
        """Return a copy without models and activations that the signed library does not name.

        ``lines`` maps each signed model line to its versions. A version may also be a plain release number: the model that was
        installed with the box is in no index.
        """

        def listed(item: ModelReport | ActivationReport) -> bool:
            return item.line in lines and (item.version in lines[item.line] or _is_release(item.version))

        models, activations = [item for item in self.models if listed(item)], [item for item in self.activations if listed(item)]
        left_out = len(self.models) + len(self.activations) - len(models) - len(activations)
        return self.model_copy(update={"models": models, "activations": activations, "unlisted": left_out})


class SyncReport(Allowed):
    """The state of the sync agent; ``since`` is when this state began."""

    state: SyncState
    code: Code
    since: Instant | None = None
    last_success_at: Instant | None = None
    received_bytes: Bytes = 0


class StatusReport(Allowed):
    """One report; ``sequence`` rises with each report of a box, so that an old report cannot be replayed."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    box_id: BoxId
    sequence: Sequence
    at: Instant
    agent_version: Release
    ring: Identifier
    sync: SyncReport
    box: BoxReport | None
    box_code: Code = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)


def sign(report: StatusReport, signer: CryptoSigner) -> bytes:
    """Return the envelope to send: the report, and the box's signature over its canonical JSON."""
    signed = report.to_dict()
    signature = signer.sign(canonical(signed))
    return json.dumps({"signed": signed, "signature": signature.to_dict()}, separators=(",", ":"), sort_keys=True).encode()


def verify(body: bytes, key: SSlibKey) -> StatusReport:
    """Read an envelope and check its signature with the key of the box's certificate.

    Raises:
        ReportError: ``report.invalid`` or ``report.signature``.
    """
    envelope = load_json(body, MAX_REPORT_BYTES)
    if not isinstance(envelope, dict) or set(envelope) != {"signed", "signature"} or not isinstance(envelope["signature"], dict):
        _invalid("it is not an object of signed and signature")
    report = _validated(StatusReport, envelope["signed"])
    given = envelope["signature"]
    if set(given) != {"keyid", "sig"} or not all(isinstance(value, str) and len(value) <= 1024 for value in given.values()):
        _invalid("its signature has another form")
    try:
        # Over the received values, not the parsed ones: a default of a newer schema must not break an older box.
        key.verify_signature(Signature(key.keyid, given["sig"]), canonical(envelope["signed"]))
    except UnverifiedSignatureError as error:
        raise ReportError("report.signature", "the signature is not this box's") from error
    return report


def canonical(value: Any) -> bytes:
    """Return the bytes to sign, as canonical JSON; raise FormatError when there are none."""
    encoded = encode_canonical(value)
    if encoded is None:  # only with a writer, which is not given
        raise FormatError("no canonical form")
    return encoded.encode()


def load_json(raw: bytes, max_bytes: int) -> Any:
    """Parse JSON from the network: bounded length, no duplicate key, fraction, NaN or deep nesting.

    Raises:
        ReportError: ``report.invalid``.
    """
    if len(raw) > max_bytes:
        _invalid(f"it is larger than {max_bytes} bytes")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_float=_no_fraction, parse_constant=_no_fraction)
    except (ValueError, RecursionError) as error:
        raise ReportError("report.invalid", "the report is not valid JSON") from error


def _validated(kind: type[_Report], value: Any) -> _Report:
    try:
        parsed = kind.model_validate_json(json.dumps(value))
        canonical(value)
    except ValidationError as error:
        places = sorted({".".join(part if part in _FIELDS else "?" for part in map(str, item["loc"])) for item in error.errors()[:8]})
        raise ReportError("report.invalid", f"the report does not fit its schema at {', '.join(places)}") from None
    except (FormatError, RecursionError, ValueError):
        _invalid("it cannot be written as canonical JSON")
    return parsed


def _invalid(why: str) -> NoReturn:
    raise ReportError("report.invalid", f"the report was refused: {why}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key is repeated")
    return keys


def _no_fraction(_text: str) -> NoReturn:
    raise ValueError("a number is not an integer")


def _is_release(version: str) -> bool:
    return all(part.isdigit() and len(part) <= 5 for part in version.split("."))


# An error names fields of the schema and never a key that was received.
_FIELDS: Final = frozenset(
    name
    for kind in (ModelReport, ActivationReport, Health, AuditHead, AuditReport, BoxReport, SyncReport, StatusReport)
    for field, info in kind.model_fields.items()
    for name in (field, info.alias or field)
)
