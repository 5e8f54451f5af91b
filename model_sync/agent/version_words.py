"""What the box has made of a version, in words: it is in use, in its trial, failed, or still to be activated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from model_sync.agent.decision import Decision
from model_sync.agent.exchange import Exchange
from model_sync.agent.report import ModelState
from model_sync.messages import Language, current_code, is_known, text

_FAILED = (ModelState.FAILED.value, ModelState.ROLLED_BACK.value)


class FailedVersion(NamedTuple):
    """A version that failed on this box or was rolled back; ``code`` is the reason, ``at`` the time as the box wrote it."""

    line: str
    version: str
    code: str
    at: str

    def describe(self, language: Language) -> str:
        """Return the reason and its code."""
        return f"{text(self.code, language)} [{self.code}]" if is_known(self.code) else f"[{self.code}]"


class BoxVersions:
    """The versions of the box's own report."""

    def __init__(self, exchange: Exchange) -> None:
        self._models = exchange.reported_models() or []
        self._activations = exchange.reported_activations()

    def failed(self) -> Iterator[FailedVersion]:
        """Yield the versions whose newest activation failed or was rolled back, the newest first."""
        seen = set()
        for entry in self._activations:
            line, version = _printable(entry.get("line")), _printable(entry.get("version"))
            if (line, version) in seen:
                continue
            seen.add((line, version))
            if entry.get("state") in _FAILED:
                code = current_code(_printable(entry.get("code")) or "unlisted", "box")
                yield FailedVersion(line, version, code, _printable(entry.get("at")))

    def describe(self, line: str, version: str, decision: str, language: Language) -> str:
        """Return the words for the decision about a version; one that was received is described by what the box did with it."""
        if decision == Decision.READY:
            for failed in self.failed():
                if (failed.line, failed.version) == (line, version):
                    return text("status.failed_here", language, why=failed.describe(language))
            if any((model.get("line"), model.get("version"), model.get("state")) == (line, version, "active") for model in self._models):
                return text("status.on_trial" if self._newest_state(line, version) == ModelState.TRIAL else "status.works", language)
        key = f"decision.{decision}"
        return text(key, language) if is_known(key) else decision  # an unknown one is of a newer version

    def _newest_state(self, line: str, version: str) -> str:
        same = (entry for entry in self._activations if (entry.get("line"), entry.get("version")) == (line, version))
        return str(next(same, {}).get("state"))


def _printable(value: object) -> str:
    """Return a text of the box's report, bounded and without control characters: another account writes that file."""
    return "".join(letter for letter in value if letter.isprintable())[:128] if isinstance(value, str) else ""
