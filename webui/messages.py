"""The words for codes and states: how this package names what the box and the sync agent report by code.

English is the source text; ``translations/zh`` holds the Chinese one. Reason codes of the box have their catalogue in
:mod:`appliance.reasons`, which the JSON output shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from flask_babel import gettext, lazy_gettext

from appliance import reasons
from appliance.core.applicability import ABSENT, AgeOutside
from appliance.core.domain import Note, ScanState
from appliance.store.priority import Urgency
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
    ScanState.RUNNING: StateWords(lazy_gettext("AI is reading"), "running", "calm"),
    ScanState.AI_READY: StateWords(lazy_gettext("AI result ready"), "ready", "ready"),
    ScanState.REVIEWING: StateWords(lazy_gettext("Under review"), "reviewing", "ready"),
    ScanState.SIGNED: StateWords(lazy_gettext("Signed"), "signed", "done"),
    ScanState.OVERRIDDEN: StateWords(lazy_gettext("Overridden by the doctor"), "overridden", "done"),
    ScanState.QUALITY_REJECTED: StateWords(lazy_gettext("Image quality too poor – not analysed"), "quality", "warn"),
    ScanState.OUT_OF_SCOPE: StateWords(lazy_gettext("Out of AI scope – not analysed"), "scope", "quiet"),
    ScanState.NOT_ANALYSED: StateWords(lazy_gettext("Could not be analysed"), "not_analysed", "warn"),
    ScanState.FAILED: StateWords(lazy_gettext("Analysis failed"), "failed", "bad"),
}

# The states of a model version in the journal of activations (appliance/schema.sql).
ACTIVATIONS: Final[dict[str, StateWords]] = {
    "staged": StateWords(lazy_gettext("Arrived"), "download", "calm"),
    "building": StateWords(lazy_gettext("Being built"), "build", "calm"),
    "self-test": StateWords(lazy_gettext("Self-test"), "test", "calm"),
    "trial": StateWords(lazy_gettext("On trial"), "running", "ready"),
    "good": StateWords(lazy_gettext("Proven"), "check", "done"),
    "failed": StateWords(lazy_gettext("Failed"), "failed", "bad"),
    "rolled-back": StateWords(lazy_gettext("Rolled back"), "undo", "bad"),
    "withdrawn": StateWords(lazy_gettext("Withdrawn"), "scope", "bad"),
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
    "untrusted": (
        StateWords(lazy_gettext("Alarm: not to be trusted"), "shield", "alarm"),
        lazy_gettext("What came is not rightly signed. It was not used; the box keeps the model it has. Tell the central team at once."),
    ),
    "waiting": (
        StateWords(lazy_gettext("Waiting"), "waiting", "calm"),
        lazy_gettext("Nothing is fetched at the moment; the box goes on by itself."),
    ),
    "downloading": (
        StateWords(lazy_gettext("Downloading"), "download", "calm"),
        lazy_gettext("A new version is on its way. A broken connection does no harm: the download goes on where it stopped."),
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

# The sync agent's codes in a few words; for a code that is not here the page shows the agent's own English sentence.
_SYNC_CODES: Final = {
    "sync.unreachable": lazy_gettext("The library does not answer. Check the line and the cables."),
    "sync.not_the_library": lazy_gettext("Something else than the library answers, such as a login page of the network. Check the line."),
    "sync.tls": lazy_gettext("The library's certificate is not accepted. Check the clock of the box and the setting ca_certificate."),
    "sync.slow": lazy_gettext("The line is too slow at the moment. What arrived is kept."),
    "sync.refused": lazy_gettext("The library refuses this box. Ask the central team."),
    "sync.range": lazy_gettext("The line or a proxy garbles downloads. What arrived whole is kept."),
    "sync.window": lazy_gettext("Outside the hours in which the line may be used."),
    "sync.budget": lazy_gettext("Today's allowance of data is used up."),
    "sync.disk_full": lazy_gettext("The disk has too little room for a new model. Free some space."),
    "trust.signature": lazy_gettext("A signature is wrong or missing."),
    "trust.expired": lazy_gettext("The signatures have expired. Check the clock of the box; if it is right, ask the central team."),
    "trust.rollback": lazy_gettext("The library offers something older than the box has seen already."),
    "trust.digest": lazy_gettext("A file is not the one that was signed."),
    "trust.revoked": lazy_gettext("The library has ended this model line."),
    "trust.missing": lazy_gettext("A signed part is missing."),
    "trust.part_expired": lazy_gettext(
        "The signatures of one model line have expired. Check the clock of the box; if it is right, ask the central team."
    ),
    "trust.too_large": lazy_gettext("A signed part is larger than it may be."),
    "sync.incomplete": lazy_gettext("The library's server lacks a file. Tell the central team."),
    "sync.error": lazy_gettext("The sync agent itself failed. Send its log to the central team."),
    "sync.too_long": lazy_gettext("The library sends more than it may. Ask the central team."),
    "sync.no_rollout": lazy_gettext("The library has no rollout for the ring of this box. Check the setting ring."),
    "sync.busy": lazy_gettext("Another run of the sync agent is at work."),
    "sync.stopped": lazy_gettext("The sync agent was stopped. Start the service model-sync."),
    "sync.disk": lazy_gettext("The directory for downloads cannot be used. Check the disk and who owns it."),
    "sync.state": lazy_gettext("The sync agent's own directory cannot be used. Check the disk and who owns it."),
    "sync.no_url": lazy_gettext("No address of the library is set. Set urls, or import from a USB stick."),
    "sync.url": lazy_gettext("The address of the library is wrong. Check urls in sync.toml."),
    "sync.report": lazy_gettext("The report to the central server failed. Models are fetched all the same."),
    "sync.usb": lazy_gettext("The USB stick cannot be read. Try again with a new one."),
    "usb.incomplete": lazy_gettext("The USB stick is incomplete. Try again with a new one."),
    "sync.settings": lazy_gettext("A setting of the sync agent is wrong. Mend sync.toml."),
    "trust.document": lazy_gettext("A signed document is not valid."),
    "trust.version": lazy_gettext("The signed parts do not fit together."),
    "trust.metadata": lazy_gettext("The signed metadata is damaged."),
    "trust.ambiguous": lazy_gettext("Who may sign is not beyond doubt."),
    "trust.foreign_root": lazy_gettext("The USB stick is of another library."),
    "trust.unknown": lazy_gettext("The rollout names a version that was never signed."),
    "trust.withdrawn": lazy_gettext("The rollout names a withdrawn version."),
    "trust.below_minimum": lazy_gettext("The rollout names a version older than the oldest allowed."),
    "trust.root": lazy_gettext("The box's own starting point of trust (root.json) is damaged or missing."),
}

# What the sync agent decided about the version that the library has for a model line.
DECISIONS: Final = {
    "ready": lazy_gettext("here, will be put to the test"),
    "paused": lazy_gettext("the rollout is paused"),
    "not_chosen": lazy_gettext("this box is not part of the rollout"),
    "not_yet": lazy_gettext("the turn of this box has not come yet"),
    "waiting": lazy_gettext("waits for its hours or its allowance of data"),
    "refused": lazy_gettext("refused"),
    "withdrawn": lazy_gettext("withdrawn by the central team, which will name another version"),
    "below_minimum": lazy_gettext("older than the oldest version that may run; another will be named"),
    "expired": lazy_gettext("its signatures have expired; the central team has to sign anew"),
    "ended": lazy_gettext("ended by the library; the model in use works on"),
    "unknown": lazy_gettext("not in the library"),
    "absent": lazy_gettext("not on the USB stick"),
    "unreachable": lazy_gettext("not complete yet, goes on by itself"),
    "error": lazy_gettext("stopped by a fault of this box"),
}

RESULTS: Final = {
    "stored": lazy_gettext("Stored"),
    "duplicate": lazy_gettext("Already on this box"),
    "conflict": lazy_gettext("Stored, but conflicts with another image"),
    "skipped": lazy_gettext("Skipped"),
    "refused": lazy_gettext("Refused"),
}


def reason_text(code: str) -> str:
    """What a reason code says; an unknown one (written by a newer version) shows itself."""
    return reasons.text(code, language()) if code in reasons.REASONS else code


def reason_hint(code: str) -> str:
    """What a person should do about a reason code."""
    return reasons.hint(code, language()) if code in reasons.REASONS else ""


def sync_text(code: str) -> str:
    """What a code of the sync agent says; empty for one that has no words here."""
    return str(_SYNC_CODES.get(code, ""))


# Groups of codes whose detail helps a doctor; other details are technical and stay in the record.
_CODES_WITH_DETAIL: Final = ("scope.", "assume.", "quality.")


def note_detail(note: Note) -> str:
    """The detail of a note where it helps a doctor, else an empty text."""
    age = AgeOutside.from_note(note)
    if age is not None:
        return str(gettext("%(age)s years; the model is for %(low)s to %(high)s", age=age.years, low=age.min_years, high=age.max_years))
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
