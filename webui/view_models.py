"""What several pages show alike: states, the patient, reasons, how a model was run. Built here, so that templates only print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from flask_babel import gettext

from appliance.core.domain import Note, ScanState
from appliance.core.run_summary import RunSummary
from webui.formatting import format_age, format_sex
from webui.messages import STATES, reason_hint, reason_text

DASH: Final = "–"
_SHORT_DIGEST_CHARS: Final = 12

View: TypeAlias = dict[str, Any]
"""Values ready to print, by the names that a template uses for them."""


def note_view(note: Note | None) -> View | None:
    """A reason code in words, with the note's detail (may be empty); None for None."""
    return {"code": note.code, "text": reason_text(note.code), "hint": reason_hint(note.code), "detail": note.detail} if note else None


def run_view(ran: RunSummary | None) -> View | None:
    """How a model was run: ``runtime`` by its maker's name, ``precision`` in words, and why; None where nothing was run."""
    if ran is None:
        return None
    precision = ran.precision.upper()
    if ran.ran_in:
        precision = gettext("%(file)s weights, ran in %(ran)s", file=precision, ran=ran.ran_in.upper())
    return {
        "code": ran.code, "runtime": ran.runtime, "precision": precision, "reason": reason_text(ran.code) if ran.code else "",
        "hint": reason_hint(ran.code) if ran.fallback else "", "is_fallback": ran.fallback,
    }  # fmt: skip


def state_chip(state: ScanState, position: int | None = None) -> View:
    """The state of an image or a study, with its position in the queue (1 = next) if it has one; ``state`` is for scripts."""
    words = STATES[state]
    parts = [str(words.word), *([gettext("no. %(n)s", n=position)] if position else [])]
    return {"word": " · ".join(parts), "icon": words.icon, "tone": words.tone, "state": state.value}


def digest_view(digest: str) -> View:
    """A model's digest, and its beginning for people."""
    return {"digest": digest, "short_digest": digest[:_SHORT_DIGEST_CHARS]}


def sex_and_age(sex: str, age_years: float | None) -> str:
    """A patient's sex and age in words; a dash when both are unknown."""
    return gettext(", ").join(filter(None, (format_sex(sex), format_age(age_years)))) or DASH


def join_nonempty(parts: Iterable[str]) -> str:
    """The texts that are not empty, with blanks between them."""
    return " ".join(filter(None, parts))
