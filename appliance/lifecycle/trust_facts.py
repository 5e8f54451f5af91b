"""What ``model-sync check`` verified, line by line: what one line says that cannot be understood is that line's trouble alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, Final, TypeAlias

from pydantic import AwareDatetime, BaseModel, BeforeValidator, StringConstraints, TypeAdapter, ValidationError

from appliance.core.child_process import plain
from appliance.core.domain import Note
from model_sync import messages

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LONGEST_TEXT: Final = 300
# Semantic versioning 2.0, clauses 2, 9 and 10, as strict as the library that compares them.
_NUMBER, _PRE, _BUILD = "(0|[1-9][0-9]*)", "(0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)", "[0-9A-Za-z-]+"
_SEMVER: Final = rf"^{_NUMBER}\.{_NUMBER}\.{_NUMBER}(-{_PRE}(\.{_PRE})*)?(\+{_BUILD}(\.{_BUILD})*)?$"
Version: TypeAlias = Annotated[str, StringConstraints(pattern=_SEMVER, max_length=64)]
Digest: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Line: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Text: TypeAlias = Annotated[str, BeforeValidator(lambda value: plain(value, _LONGEST_TEXT))]
_LINE: Final[TypeAdapter[str]] = TypeAdapter(Line)


class Withdrawn(BaseModel):
    """Why a version must not read another patient."""

    reason: Text


class Trouble(BaseModel):
    """Why metadata cannot be believed."""

    code: Text
    message: Text = ""

    def note(self) -> Note:
        """As a coded reason; one that this version does not know is said as not checked."""
        code = messages.current_code(self.code, "box")
        return Note(code if messages.is_known(code) else "trust.unchecked", self.message)


class LineFacts(BaseModel):
    """What the signed index of one line says, and until when that may put anything new to work."""

    minimum_version: Version
    withdrawn: dict[Version, Withdrawn] = {}
    versions: dict[Version, Digest]
    valid_until: AwareDatetime | None = None
    expired: bool | None = None


class Facts(BaseModel):
    """What ``model-sync check`` verified; without ``ok`` nothing of it holds but the code that says why.

    ``now`` is the time it judged by, which is never behind what the library has signed, whatever the box's clock says.
    """

    ok: bool
    now: AwareDatetime | None = None
    expired: bool = False
    valid_until: AwareDatetime | None = None
    code: Text = ""
    message: Text = ""
    lines: dict[str, LineFacts] = {}
    troubles: dict[str, Trouble] = {}

    @classmethod
    def parse(cls, text: str) -> Facts:
        """Read what a check said; a line that does not fit becomes a trouble of its own, and the others are learnt.

        Raises:
            ValueError: it is no answer at all.
        """
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deep") from error
        if not isinstance(value, dict):
            raise ValueError("no object")
        given, told = (_mapping(value.pop(name, {})) for name in ("lines", "troubles"))
        facts = cls.model_validate(value)
        for name, item in told.items():
            facts.troubles[plain(name, _LONGEST_TEXT)] = _trouble(item)
        for name, item in given.items():
            try:
                facts.lines[_LINE.validate_python(name)] = LineFacts.model_validate(item)
            except ValidationError as error:
                what = "; ".join(".".join(map(str, problem["loc"])) for problem in error.errors(include_url=False)[:3])
                facts.troubles[plain(name, _LONGEST_TEXT)] = Trouble(code="trust.document", message=f"does not fit: {what}")
        return facts

    def refusal(self, name: str, version: str, digest: str) -> Note | None:
        """Why a model may not newly be put to work by what is signed; None when it may."""
        if not self.ok:
            return Trouble(code=self.code, message=self.message).note()
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


def _trouble(value: Any) -> Trouble:
    try:
        return Trouble.model_validate(value)
    except ValidationError:
        return Trouble(code="trust.unchecked")
