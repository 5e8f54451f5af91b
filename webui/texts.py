"""Words, numbers and dates as a person of either language writes them.

English is the source text; ``translations/zh`` holds the Chinese one. Coded reasons are in :mod:`model_sync.messages`, which the
JSON output and the structured reports share.
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
from flask_babel.speaklater import LazyString

from appliance.core.domain import Note, ScanState
from model_sync import messages
from model_sync.messages import LANGUAGES, Language

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

# What the agent decided about the version that the library has for a line.
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
    """What a reason code of the box says; an unknown one (written by a newer version) shows itself."""
    code = messages.current_code(code, "box")
    return messages.text(code, language()) if messages.is_known(code) else code


def reason_hint(code: str) -> str:
    """What a person should do about a reason code."""
    code = messages.current_code(code, "box")
    return messages.hint(code, language()) if messages.is_known(code) else ""


def sync_text(code: str) -> str:
    """What a code of the sync agent says and what to do; empty for one that this version does not know."""
    code = messages.current_code(code, "agent")
    if not messages.is_known(code):
        return ""
    return f"{messages.text(code, language())}{gettext('. ')}{messages.hint(code, language())}"


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
