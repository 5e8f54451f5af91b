"""Numbers, dates, sizes and names as a person of either language writes them, and the language of a request."""

from __future__ import annotations

import re
from datetime import datetime, tzinfo
from typing import Final, cast
from zoneinfo import ZoneInfo

from babel import Locale, dates, numbers
from flask import Flask, has_request_context, request
from flask_babel import Babel, get_locale, gettext, lazy_gettext

from model_sync.messages import LANGUAGES, Language
from webui.context import current_box

LANGUAGE_COOKIE: Final = "lang"
TIMEZONE_COOKIE: Final = "tz"
_HTML_LANG: Final = {"zh": "zh-CN", "en": "en"}
_TIMEZONE: Final = re.compile(r"[A-Za-z0-9_+\-]{1,32}(/[A-Za-z0-9_+\-]{1,32}){0,2}")
_SEXES: Final = {"M": lazy_gettext("male"), "F": lazy_gettext("female"), "O": lazy_gettext("other sex")}


def init_app(app: Flask) -> None:
    """Let an application speak both languages; English is the source text, ``translations/zh`` holds the Chinese one."""
    Babel(app, default_locale="en", locale_selector=lambda: language() if has_request_context() else "en")


def language() -> Language:
    """The language of this request: as the person chose it, else as the box is set."""
    chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    return cast(Language, chosen if chosen in LANGUAGES else current_box().settings.language)


def html_lang() -> str:
    """The value of the ``lang`` attribute."""
    return _HTML_LANG[language()]


def localize(zh: str, en: str) -> str:
    """Choose between two texts by the language of this request (texts of a model's manifest come in both)."""
    return zh if language() == "zh" else en


def untranslated(text: str) -> dict[str, str]:
    """A text that exists in one language only: ``text``, its ``lang``, and a ``mark`` for people where it is not that of the page."""
    lang = "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"
    return {"text": text, "lang": _HTML_LANG[lang], "mark": "" if lang == language() else gettext("(not translated)")}


def _timezone() -> tzinfo | None:
    """The browser's time zone, which its script sends as a cookie; None, the zone of the box, when there is none."""
    name = request.cookies.get(TIMEZONE_COOKIE, "")
    if not _TIMEZONE.fullmatch(name):
        return None
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return None


def format_time(iso: str) -> str:
    """A time of the box's own records (ISO 8601, UTC) in the browser's time zone."""
    when = datetime.fromisoformat(iso).astimezone(_timezone())
    pattern = "y-MM-dd HH:mm" if language() == "zh" else "d MMM y, HH:mm"
    return dates.format_datetime(when, pattern, tzinfo=when.tzinfo, locale=_locale())


def format_study_date(study_date: str, study_time: str) -> str:
    """A study's date and time (DICOM DA and TM) as the modality's clock showed them; empty when unknown."""
    try:
        day = datetime.strptime(study_date, "%Y%m%d").date()
    except ValueError:  # shown as it came, unless it holds only zeros and blanks
        return study_date if study_date.strip("0. ") else ""
    text: str = dates.format_date(day, "y-MM-dd" if language() == "zh" else "d MMM y", locale=_locale())
    match = re.match(r"(\d\d):?(\d\d)", study_time)
    valid = match is not None and int(match[1]) < 24 and int(match[2]) < 60
    return f"{text} {match[1]}:{match[2]}" if match and valid else text


def format_score(value: float) -> str:
    """A model's score: three decimals, so that a score just above its threshold never looks equal to it."""
    return numbers.format_decimal(value, "0.000", locale=_locale())


def format_percent(value: float) -> str:
    """A fraction as per cent with one decimal."""
    return numbers.format_percent(value, "0.0%", locale=_locale())


def format_ratio(value: float) -> str:
    """A number with one or two decimals."""
    return numbers.format_decimal(value, "0.0#", locale=_locale())


def format_difference(value: float) -> str:
    """A small difference: two significant digits, or that it is below 0.0001."""
    return "< 0.0001" if value < 1e-4 else numbers.format_decimal(value, "0.0000" if value < 0.01 else "0.000", locale=_locale())


def format_count(value: int) -> str:
    """An integer with separators between the thousands."""
    return numbers.format_decimal(value, locale=_locale())


def format_milliseconds(value: float) -> str:
    """A duration: milliseconds below a second, else seconds."""
    if value < 1000:
        return f"{numbers.format_decimal(value, '0' if value >= 10 else '0.0', locale=_locale())} ms"
    return f"{numbers.format_decimal(value / 1000, '0.0', locale=_locale())} s"


def format_volume(value: float) -> str:
    """A volume in millilitres: with one decimal below 100 ml, else without."""
    return f"{numbers.format_decimal(value, '#,##0.0' if value < 100 else '#,##0', locale=_locale())} ml"


def format_size(value: int) -> str:
    """A size in bytes in the unit that fits (binary multiples, as Windows shows them)."""
    amount, units = float(value), ["B", "KB", "MB", "GB", "TB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{numbers.format_decimal(amount, '0' if amount >= 100 or units[0] == 'B' else '0.0', locale=_locale())} {units[0]}"


def format_person_name(value: str) -> str:
    """A person name (VR PN, PS3.5 6.2.1): the ideographic group for Chinese readers, else whichever group is not empty."""
    groups = [_name_group(group) for group in value.split("=")]
    alphabetic, ideographic = groups[0], groups[1] if len(groups) > 1 else ""
    preferred = (ideographic or alphabetic) if language() == "zh" else (alphabetic or ideographic)
    return preferred or next((group for group in groups if group), "")


def _name_group(group: str) -> str:
    parts = [part.strip() for part in group.split("^") if part.strip()]
    # A Chinese name has no blank between family and given name.
    separator = "" if parts and all(re.match(r"[㐀-鿿\U00020000-\U0003ffff]", part) for part in parts) else " "
    return separator.join(parts)


def format_sex(value: str) -> str:
    """Patient's Sex in words; empty when unknown."""
    return str(_SEXES.get(value.strip().upper()[:1], ""))


def format_age(years: float | None) -> str:
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
