"""The result of ``model-sync check``. Invalid facts of one model line become a trouble of that line; the other lines stay valid."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, Final, TypeAlias

from pydantic import AwareDatetime, BaseModel, BeforeValidator, StringConstraints, TypeAdapter, ValidationError

from appliance.core.child_process import printable_text
from appliance.core.domain import Note
from model_sync import messages

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LONGEST_TEXT: Final = 300
# Semantic versioning 2.0, clauses 2, 9 and 10, as strict as the library that compares them.
_NUMBER, _PRE, _BUILD = "(0|[1-9][0-9]*)", "(0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)", "[0-9A-Za-z-]+"
_SEMVER: Final = rf"^{_NUMBER}\.{_NUMBER}\.{_NUMBER}(-{_PRE}(\.{_PRE})*)?(\+{_BUILD}(\.{_BUILD})*)?$"
Version: TypeAlias = Annotated[str, StringConstraints(pattern=_SEMVER, max_length=64)]
Digest: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
LineName: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Text: TypeAlias = Annotated[str, BeforeValidator(lambda value: printable_text(value, _LONGEST_TEXT))]
_LINE_NAME: Final[TypeAdapter[str]] = TypeAdapter(LineName)


class WithdrawnVersion(BaseModel):
    """Why a version must not analyse scans any more."""

    reason: Text


class TrustTrouble(BaseModel):
    """Why metadata cannot be trusted."""

    code: Text
    message: Text = ""

    def note(self) -> Note:
        """Return the trouble as a coded reason; an unknown code becomes ``trust.unchecked``."""
        code = messages.current_code(self.code, "box")
        return Note(code if messages.is_known(code) else "trust.unchecked", self.message)


class LineFacts(BaseModel):
    """The signed index of one model line, and until when new activations may rely on it."""

    minimum_version: Version
    withdrawn: dict[Version, WithdrawnVersion] = {}
    versions: dict[Version, Digest]
    valid_until: AwareDatetime | None = None
    expired: bool | None = None


class TrustFacts(BaseModel):
    """The verified facts; without ``ok`` only ``code`` and ``message`` are valid: they say why the check failed.

    ``now`` is the time that the check used. It is never before a time that the library signed, whatever the clock of the box says.
    """

    ok: bool
    now: AwareDatetime | None = None
    expired: bool = False
    valid_until: AwareDatetime | None = None
    code: Text = ""
    message: Text = ""
    lines: dict[str, LineFacts] = {}
    troubles: dict[str, TrustTrouble] = {}

    @classmethod
    def parse(cls, text: str) -> TrustFacts:
        """Parse the output of a check; invalid facts of a model line become a trouble of that line.

        Raises:
            ValueError: the text is not the output of a check.
        """
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deep") from error
        if not isinstance(value, dict):
            raise ValueError("no object")
        lines, troubles = (_mapping(value.pop(name, {})) for name in ("lines", "troubles"))
        facts = cls.model_validate(value)
        for name, item in troubles.items():
            facts.troubles[printable_text(name, _LONGEST_TEXT)] = _trouble(item)
        for name, item in lines.items():
            try:
                facts.lines[_LINE_NAME.validate_python(name)] = LineFacts.model_validate(item)
            except ValidationError as error:
                fields = "; ".join(".".join(map(str, problem["loc"])) for problem in error.errors(include_url=False)[:3])
                facts.troubles[printable_text(name, _LONGEST_TEXT)] = TrustTrouble(code="trust.document", message=f"does not fit: {fields}")
        return facts

    def find_refusal(self, name: str, version: str, digest: str) -> Note | None:
        """Find why the signed metadata does not allow a new activation of a model; None when it does."""
        if not self.ok:
            return TrustTrouble(code=self.code, message=self.message).note()
        line = self.lines.get(name)
        if line is None and name in self.troubles:
            return self.troubles[name].note()
        until = (line.valid_until if line else None) or self.valid_until
        now = max(self.now or _EPOCH, datetime.now(timezone.utc))
        expired = line.expired if line and line.expired is not None else self.expired
        if until is None or until <= now or expired:
            return Note("trust.expired", until.isoformat() if until else "")
        signed = line.versions.get(version) if line else None
        if signed is None:
            return Note("model.not_signed", f"{name} {version}")
        return None if signed == digest else Note("model.mismatch", f"{name} {version} is {signed[:12]}, not {digest[:12]}")


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _trouble(value: Any) -> TrustTrouble:
    try:
        return TrustTrouble.model_validate(value)
    except ValidationError:
        return TrustTrouble(code="trust.unchecked")
