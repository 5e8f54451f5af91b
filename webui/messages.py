"""The words that the pages show for states, decisions and reason codes.

English is the source text; ``translations/zh`` holds the Chinese one. The texts of reason codes are in :mod:`model_sync.messages`, which
the commands and the structured reports share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from flask_babel import gettext, lazy_gettext
from flask_babel.speaklater import LazyString

from appliance.core.applicability import ABSENT, AgeOutside
from appliance.core.domain import Note, ScanState
from appliance.core.states import ActivationState
from appliance.store.priority import Urgency
from model_sync import messages
from webui.formatting import format_time, language


@dataclass(frozen=True)
class StateWords:
    """How a state is shown: its word, the name of its icon, and the tone of its colour (never the colour alone)."""

    word: Any
    icon: str
    tone: str


STATES: Final[dict[ScanState, StateWords]] = {
    ScanState.WAITING: StateWords(lazy_gettext("Waiting for more images"), "waiting", "calm"),
    ScanState.QUEUED: StateWords(lazy_gettext("In the queue"), "queued", "calm"),
    ScanState.RUNNING: StateWords(lazy_gettext("AI is analysing"), "running", "calm"),
    ScanState.AI_READY: StateWords(lazy_gettext("AI result ready"), "ready", "ready"),
    ScanState.REVIEWING: StateWords(lazy_gettext("Under review"), "reviewing", "ready"),
    ScanState.SIGNED: StateWords(lazy_gettext("Signed"), "signed", "done"),
    ScanState.OVERRIDDEN: StateWords(lazy_gettext("Overridden by the doctor"), "overridden", "done"),
    ScanState.QUALITY_REJECTED: StateWords(lazy_gettext("Image quality too poor – not analysed"), "quality", "warn"),
    ScanState.OUT_OF_SCOPE: StateWords(lazy_gettext("Out of AI scope – not analysed"), "scope", "quiet"),
    ScanState.NOT_ANALYSED: StateWords(lazy_gettext("Could not be analysed"), "not_analysed", "warn"),
    ScanState.FAILED: StateWords(lazy_gettext("Analysis failed"), "failed", "bad"),
}

# Views of a radiograph, see appliance.core.clinical_terms.view_of.
VIEWS: Final[dict[str, Any]] = {
    "PA": lazy_gettext("Frontal (PA)"),
    "AP": lazy_gettext("Frontal (AP)"),
    "FRONTAL": lazy_gettext("Frontal"),
    "LL": lazy_gettext("Lateral (left)"),
    "RL": lazy_gettext("Lateral (right)"),
    "LATERAL": lazy_gettext("Lateral"),
    "OBLIQUE": lazy_gettext("Oblique"),
    "LORDOTIC": lazy_gettext("Lordotic"),
    "DECUBITUS": lazy_gettext("Decubitus"),
    "": lazy_gettext("Image"),
}

ACTIVATIONS: Final[dict[str, StateWords]] = {
    ActivationState.STAGED: StateWords(lazy_gettext("Arrived"), "download", "calm"),
    ActivationState.BUILDING: StateWords(lazy_gettext("Being built"), "build", "calm"),
    ActivationState.SELF_TEST: StateWords(lazy_gettext("Self-test"), "test", "calm"),
    ActivationState.TRIAL: StateWords(lazy_gettext("On trial"), "running", "ready"),
    ActivationState.GOOD: StateWords(lazy_gettext("Trial passed"), "check", "done"),
    ActivationState.FAILED: StateWords(lazy_gettext("Failed"), "failed", "bad"),
    ActivationState.ROLLED_BACK: StateWords(lazy_gettext("Rolled back"), "undo", "bad"),
    ActivationState.WITHDRAWN: StateWords(lazy_gettext("Withdrawn"), "scope", "bad"),
}

SOURCES: Final = {
    "library": lazy_gettext("from the library"),
    "usb": lazy_gettext("from a USB stick"),
    "hand": lazy_gettext("by hand"),
    "embedded": lazy_gettext("came with the box"),
}

# The link to the model library (webui.models.library_view). Unreachable needs patience, untrusted a person: they never look alike.
LIBRARY: Final[dict[str, tuple[StateWords, Any]]] = {
    "ok": (StateWords(lazy_gettext("Connected"), "check", "done"), lazy_gettext("The library answers and all signatures are in order.")),
    "unreachable": (
        StateWords(lazy_gettext("Not reachable"), "cloud_off", "quiet"),
        lazy_gettext("The box keeps working with the model it has and tries again by itself. Nothing is wrong with the model."),
    ),
    "outdated": (
        StateWords(lazy_gettext("Outdated, not updated"), "not_analysed", "warn"),
        lazy_gettext("The last USB stick is genuine and too old: nothing was taken. The box keeps the model it has. Bring a newer stick."),
    ),
    "untrusted": (
        StateWords(lazy_gettext("Alarm: not to be trusted"), "shield", "alarm"),
        lazy_gettext(
            "What was received is not correctly signed. It was not used; the box keeps the model it has. Tell the central team at once."
        ),
    ),
    "waiting": (
        StateWords(lazy_gettext("Waiting"), "waiting", "calm"),
        lazy_gettext("Nothing is fetched at the moment; the box continues by itself."),
    ),
    "downloading": (
        StateWords(lazy_gettext("Downloading"), "download", "calm"),
        lazy_gettext("A new version is on its way. A broken connection does no harm: the download continues where it stopped."),
    ),
    "error": (
        StateWords(lazy_gettext("The sync agent has a problem"), "failed", "warn"),
        lazy_gettext("The box keeps working with the model it has. Call the technician."),
    ),
    "none": (
        StateWords(lazy_gettext("No library is set up"), "info", "quiet"),
        lazy_gettext("New models come by hand. Set exchange_dir to receive them from the central library."),
    ),
    "missing": (
        StateWords(lazy_gettext("The sync agent has not reported yet"), "not_analysed", "warn"),
        lazy_gettext("The box keeps working with the model it has. Check that the service model-sync runs."),
    ),
    "garbled": (
        StateWords(lazy_gettext("The report of the sync agent cannot be read"), "not_analysed", "warn"),
        lazy_gettext("The box keeps working with the model it has. Check that the service model-sync runs."),
    ),
}

# What the sync agent decided about the version that the library has for a model line.
DECISIONS: Final = {
    code.removeprefix("decision."): LazyString(lambda code=code: messages.text(code, language()))
    for code in sorted(messages.codes("model_sync"))
    if code.startswith("decision.") and code != "decision.none"
}

RESULTS: Final = {
    "stored": lazy_gettext("Stored"),
    "duplicate": lazy_gettext("Already on this box"),
    "conflict": lazy_gettext("Stored, but conflicts with another image"),
    "skipped": lazy_gettext("Skipped"),
    "refused": lazy_gettext("Refused"),
}


def reason_text(code: str) -> str:
    """The text of a reason code of the box; an unknown one (of a newer version) is shown as it is."""
    code = messages.current_code(code, "box")
    return messages.text(code, language()) if messages.is_known(code) else code


def reason_hint(code: str) -> str:
    """What a person should do about a reason code."""
    code = messages.current_code(code, "box")
    return messages.hint(code, language()) if messages.is_known(code) else ""


def sync_text(code: str) -> str:
    """The text of a code of the sync agent and what to do; empty for a code that this version does not know."""
    code = messages.current_code(code, "agent")
    if not messages.is_known(code):
        return ""
    return f"{messages.text(code, language())}{gettext('. ')}{messages.hint(code, language())}"


# Groups of codes whose detail helps a doctor; other details are technical and stay in the record.
_CODES_WITH_DETAIL: Final = ("scope.", "assume.", "quality.")


def note_detail(note: Note) -> str:
    """The detail of a note where it helps a doctor, else an empty text."""
    age = AgeOutside.from_note(note)
    if age is not None:
        return str(gettext("%(age)s years; the model is for %(low)s to %(high)s", age=age.years, low=age.min_years, high=age.max_years))
    if note.code in ("quality.turned", "caution.turned_by_person") and note.detail.isdecimal():
        return str(gettext("clockwise by %(degrees)s°", degrees=note.detail))
    return note.detail if note.detail != ABSENT and note.code.startswith(_CODES_WITH_DETAIL) else ""


def urgency_text(urgency: Urgency) -> str:
    """Who made a study urgent, and when."""
    if not urgency.at:  # stored by a version that did not record the time; then only the command line could do it
        return str(gettext("Asked for on the box's command line, time not recorded"))
    values = {"actor": urgency.actor, "at": format_time(urgency.at), "term": urgency.term}
    if urgency.origin == "sender":
        return str(gettext("Marked %(term)s by its sender (Requested Procedure Priority): %(actor)s, %(at)s", **values))
    if urgency.origin == "cli":
        return str(gettext("Asked for on the box's command line, %(at)s", **values))
    return str(gettext("Asked for by %(actor)s, %(at)s", **values))
