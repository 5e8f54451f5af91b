"""What several pages show alike: states, the patient, how a model was run. Built here, so that templates only print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flask_babel import gettext

from appliance.core.domain import Note, ScanState
from appliance.core.run_summary import RunSummary
from webui.formatting import format_age, format_sex
from webui.messages import STATES, reason_hint, reason_text

DASH = "–"


@dataclass(frozen=True)
class Chip:
    """A word with an icon and the tone of its colour; ``state`` is the value behind it, for scripts."""

    word: str
    icon: str
    tone: str
    state: str


@dataclass(frozen=True)
class NoteView:
    """A reason code in words; ``detail`` may be empty."""

    code: str
    text: str
    hint: str
    detail: str = ""

    @classmethod
    def of(cls, note: Note | None) -> NoteView | None:
        """The words of a note with its unchanged detail; None for None."""
        return cls(note.code, reason_text(note.code), reason_hint(note.code), note.detail) if note else None


@dataclass(frozen=True)
class RunView:
    """How a model was run: ``runtime`` by its maker's name, ``precision`` in words, and why that way."""

    code: str
    runtime: str
    precision: str
    reason: str
    hint: str
    is_fallback: bool

    @classmethod
    def of(cls, ran: RunSummary | None) -> RunView | None:
        """The words of a run; None where nothing was run."""
        if ran is None:
            return None
        precision = ran.precision.upper()
        if ran.ran_in:
            precision = gettext("%(file)s weights, ran in %(ran)s", file=precision, ran=ran.ran_in.upper())
        return cls(
            ran.code, ran.runtime, precision, reason_text(ran.code) if ran.code else "", reason_hint(ran.code) if ran.fallback else "",
            ran.fallback,
        )  # fmt: skip


def state_chip(state: ScanState, position: int | None = None) -> Chip:
    """The chip of an image's or a study's state, with its position in the queue (1 = next) if it has one."""
    words = STATES[state]
    parts = [str(words.word), *([gettext("no. %(n)s", n=position)] if position else [])]
    return Chip(" · ".join(parts), words.icon, words.tone, state.value)


def sex_and_age(sex: str, age_years: float | None) -> str:
    """A patient's sex and age in words; a dash when both are unknown."""
    return gettext(", ").join(filter(None, (format_sex(sex), format_age(age_years)))) or DASH


def join_nonempty(parts: Iterable[str]) -> str:
    """The texts that are not empty, with blanks between them."""
    return " ".join(filter(None, parts))
