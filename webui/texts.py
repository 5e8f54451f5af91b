"""Words, numbers and dates as a person of either language writes them.

English is the source text; ``translations/zh`` holds the Chinese one. Coded reasons have their own catalogue in
:mod:`appliance.reasons`, which the JSON output and the structured reports share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, datetime, time, tzinfo
from typing import Any, Final, cast
from zoneinfo import ZoneInfo

from babel import Locale, dates, numbers
from flask import Flask, current_app, has_request_context, request
from flask_babel import Babel, get_locale, gettext, lazy_gettext, ngettext

from appliance.core.domain import Note, ScanState
from model_sync import messages
from model_sync.messages import Language

LANGUAGES: Final[tuple[Language, ...]] = ("zh", "en")
LANGUAGE_COOKIE: Final = "lang"
TIMEZONE_COOKIE: Final = "tz"
_HTML_LANG: Final = {"zh": "zh-CN", "en": "en"}
_TIMEZONE: Final = re.compile(r"[A-Za-z0-9_+\-]{1,32}(/[A-Za-z0-9_+\-]{1,32}){0,2}")


@dataclass(frozen=True)
class StateWords:
    """How a state is told: its word, the name of its icon, and the tone of its colour (never the colour alone)."""

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

# The life of a model version, by the states of the journal (appliance/schema.sql).
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

# The line to the model library (webui.library). Unreachable asks for patience, untrusted for a person: never the same look.
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
        lazy_gettext("A new version is on its way. A broken line does no harm: the download goes on where it stopped."),
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

# The agent's codes in a few words; one that is not here is told in the agent's own (English) sentence.
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

# What the agent decided about the version that the library has for a line.
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

SEXES: Final = {"M": lazy_gettext("male"), "F": lazy_gettext("female"), "O": lazy_gettext("other sex")}


def init_app(app: Flask) -> None:
    """Teach an application its languages and give the templates these helpers."""
    Babel(app, default_locale="en", locale_selector=_select_locale)
    app.jinja_env.globals.update(
        _=gettext, ngettext=ngettext, states=STATES, results=RESULTS, reason_text=reason_text, reason_hint=reason_hint,
        note_detail=note_detail, language=language, html_lang=html_lang, local=local,
        activations=ACTIVATIONS, sources=SOURCES, library_words=LIBRARY, sync_text=sync_text, decisions=DECISIONS,
    )  # fmt: skip
    app.jinja_env.filters.update(
        moment=moment, study_date=study_date, score=score, percent=percent, size=size, person=person_name, sex=sex, age=age,
        count=count, milliseconds=milliseconds, difference=difference, millilitres=millilitres, ratio=ratio,
    )  # fmt: skip


def _select_locale() -> str:
    return language() if has_request_context() else "en"


def language() -> Language:
    """The language of this request: as the person chose it, else as the box is set."""
    chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    return cast(Language, chosen if chosen in LANGUAGES else current_app.extensions["box"].settings.language)


def html_lang() -> str:
    """The value of the ``lang`` attribute."""
    return _HTML_LANG[language()]


def local(zh: str, en: str) -> str:
    """Whichever of two texts is in the language of this request (texts of a model's manifest come in both)."""
    return zh if language() == "zh" else en


def reason_text(code: str) -> str:
    """What a reason code says; an unknown one (written by a newer version) shows itself."""
    return messages.text(code, language()) if messages.is_known(code) else code


def reason_hint(code: str) -> str:
    """What a person should do about a reason code."""
    return messages.hint(code, language()) if messages.is_known(code) else ""


def sync_text(code: str) -> str:
    """What a code of the sync agent says; empty for one that has no words here."""
    return str(_SYNC_CODES.get(code, ""))


_DETAILED: Final = ("scope.", "assume.", "quality.")


def note_detail(note: Note) -> str:
    """The particulars of a note where they tell a doctor something; technical ones stay in the record."""
    if note.code == "caution.age_outside" and (parts := re.fullmatch(r"(\S+); (\S+)-(\S+)", note.detail)):
        return str(gettext("%(age)s years; the model is for %(low)s to %(high)s", age=parts[1], low=parts[2], high=parts[3]))
    return note.detail if note.detail not in ("", "-") and note.code.startswith(_DETAILED) else ""


def _timezone() -> tzinfo | None:
    """The browser's time zone (its clock is the one on the clinic's wall), else the box's."""
    name = request.cookies.get(TIMEZONE_COOKIE, "")
    if not _TIMEZONE.fullmatch(name):
        return None
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return None


def moment(iso: str) -> str:
    """A moment of the box's own records (ISO 8601, UTC) in local time."""
    when = datetime.fromisoformat(iso).astimezone(_timezone())
    pattern = "y-MM-dd HH:mm" if language() == "zh" else "d MMM y, HH:mm"
    return dates.format_datetime(when, pattern, tzinfo=when.tzinfo, locale=_locale())


def study_date(row: Any) -> str:
    """A study's date and time (DICOM DA and TM) as the modality's clock showed them; empty when unknown."""
    try:
        taken = datetime.strptime(row.study_date, "%Y%m%d").date()
    except ValueError:  # shown as it came, unless it says nothing
        return str(row.study_date) if row.study_date.strip("0. ") else ""
    text: str = dates.format_date(taken, "y-MM-dd" if language() == "zh" else "d MMM y", locale=_locale())
    at = _study_time(row.study_time, taken)
    return f"{text} {at:%H:%M}" if at else text


def _study_time(value: str, _taken: date) -> time | None:
    match = re.match(r"(\d\d):?(\d\d)", value)
    return time(int(match[1]), int(match[2])) if match and int(match[1]) < 24 and int(match[2]) < 60 else None


def score(value: float) -> str:
    """A model's score: three decimals, so that a score just above its threshold never looks equal to it."""
    return numbers.format_decimal(value, "0.000", locale=_locale())


def percent(value: float) -> str:
    """A fraction as per cent with one decimal."""
    return numbers.format_percent(value, "0.0%", locale=_locale())


def ratio(value: float) -> str:
    """A plain number with at most two decimals: how many times, how much drift."""
    return numbers.format_decimal(value, "0.0#", locale=_locale())


def difference(value: float) -> str:
    """A small difference: two significant digits, or that it is next to nothing."""
    return "< 0.0001" if value < 1e-4 else numbers.format_decimal(value, "0.0000" if value < 0.01 else "0.000", locale=_locale())


def count(value: int) -> str:
    """A whole number with its thousands apart."""
    return numbers.format_decimal(value, locale=_locale())


def milliseconds(value: float) -> str:
    """A duration: milliseconds below a second, else seconds."""
    if value < 1000:
        return f"{numbers.format_decimal(value, '0' if value >= 10 else '0.0', locale=_locale())} ms"
    return f"{numbers.format_decimal(value / 1000, '0.0', locale=_locale())} s"


def millilitres(value: float) -> str:
    """A volume: tenths below 100 ml, else whole millilitres."""
    return f"{numbers.format_decimal(value, '#,##0.0' if value < 100 else '#,##0', locale=_locale())} ml"


def size(value: int) -> str:
    """A size in bytes in the unit that fits (binary multiples, as Windows shows them)."""
    amount, units = float(value), ["B", "KB", "MB", "GB", "TB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{numbers.format_decimal(amount, '0' if amount >= 100 or units[0] == 'B' else '0.0', locale=_locale())} {units[0]}"


def person_name(value: str) -> str:
    """A person name (VR PN, PS3.5 6.2.1): the ideographic group for Chinese readers, else whichever group there is."""
    groups = [_name_group(group) for group in value.split("=")]
    alphabetic, ideographic = groups[0], groups[1] if len(groups) > 1 else ""
    preferred = (ideographic or alphabetic) if language() == "zh" else (alphabetic or ideographic)
    return preferred or next((group for group in groups if group), "")


def _name_group(group: str) -> str:
    parts = [part.strip() for part in group.split("^") if part.strip()]
    # A Chinese name has no gap between family and given name.
    glue = "" if parts and all(re.match(r"[㐀-鿿\U00020000-\U0003ffff]", part) for part in parts) else " "
    return glue.join(parts)


def sex(value: str) -> str:
    """Patient's Sex in words; empty when unknown."""
    return str(SEXES.get(value.strip().upper()[:1], ""))


def age(years: float | None) -> str:
    """An age as doctors say it: days, months or years; empty when unknown."""
    if years is None:
        return ""
    if 0 < years < 1 / 12:
        return str(gettext("%(n)s d", n=round(years * 365.25)))
    if 0 < years < 2:
        return str(gettext("%(n)s mo", n=int(years * 12 + 1e-6)))
    return str(gettext("%(n)s y", n=int(years + 1e-6)))


def _locale() -> Locale:
    return cast(Locale, get_locale() or Locale("en"))
