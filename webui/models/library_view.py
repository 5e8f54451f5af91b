"""The link to the model library, as the sync agent last reported it in ``sync-status.json`` of the exchange directory.

The agent runs as another user: its file may be missing, old, incomplete or invalid, and the status page must work all the same.
"Unreachable" and "untrusted" are never mixed: in the first case one waits, in the second a person must act at once.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

from flask_babel import gettext

from webui.formatting import format_count, format_size, format_time
from webui.messages import LIBRARY, sync_text
from webui.view_models import DASH, View, join_nonempty

FILE_NAME: Final = "sync-status.json"
STATES: Final = ("ok", "unreachable", "outdated", "untrusted", "waiting", "downloading", "error")
# Added by this page: no exchange directory is set, there is no file yet, or it is invalid.
OWN_STATES: Final = ("none", "missing", "garbled")
STALE_AFTER: Final = timedelta(hours=2)
CLOCK_SLACK: Final = timedelta(minutes=5)
_MAX_BYTES: Final = 256 << 10
_MAX_TEXT_CHARS: Final = 300


@dataclass(frozen=True)
class Progress:
    """A file that is being downloaded; sizes in bytes."""

    file: str
    done: int
    total: int


@dataclass(frozen=True)
class Offer:
    """The version that the library has for a model line, the agent's decision about it (a code), and when it is due, if known."""

    version: str
    decision: str
    at: str


@dataclass(frozen=True)
class LibraryLink:
    """The state of the link; times are ISO 8601 in UTC, empty when unknown.

    ``clock`` is ``behind``, ``ahead`` or empty, with ``clock_minutes``: the box's clock compared with the library's, or with the latest
    time that is known to have passed (``floor``).
    """

    state: str
    code: str = ""
    message: str = ""
    hint: str = ""
    at: str = ""
    since: str = ""
    last_success_at: str = ""
    last_attempt_at: str = ""
    received_bytes: int = 0
    progress: Progress | None = None
    offers: Mapping[str, Offer] = field(default_factory=dict)
    is_stale: bool = False
    clock: str = ""
    clock_minutes: int = 0


def library_card(link: LibraryLink) -> View:
    """The link as the status page shows it.

    ``reason`` is why it is in this state; ``report``: the agent's own English sentence, where this version has no text for its code;
    ``warnings``: the report is old, or the clock of the box is wrong; ``times``: last success and last attempt, None before the first
    report.
    """
    words, meaning = LIBRARY[link.state]
    progress = link.progress
    return {
        "state": link.state,
        "words": words,
        "meaning": meaning,
        "since": gettext("since %(when)s", when=format_time(link.since)) if link.since and link.state != "ok" else "",
        "code": link.code if link.state not in ("ok", "downloading") else "",
        "reason": sync_text(link.code),
        "report": join_nonempty((link.message, link.hint)),
        "progress": progress,
        "progress_text": f"{format_size(progress.done)} / {format_size(progress.total)}" if progress else "",
        "warnings": list(_warnings(link)),
        "times": _report_times(link) if link.at else None,
        "received": format_size(link.received_bytes),
    }


def _warnings(link: LibraryLink) -> Iterator[str]:
    minutes = format_count(link.clock_minutes)
    if link.is_stale:
        when = format_time(link.at)
        yield gettext("This report is old: the sync agent last reported %(when)s. Check that the service model-sync runs.", when=when)
    if link.clock == "behind":
        yield gettext("The clock of the box is behind by %(minutes)s minutes. Set it right: signatures carry dates.", minutes=minutes)
    elif link.clock == "ahead":
        yield gettext("The clock of the box is ahead by %(minutes)s minutes. Set it right: signatures carry dates.", minutes=minutes)


def _report_times(link: LibraryLink) -> tuple[str, str]:
    success = format_time(link.last_success_at) if link.last_success_at else str(gettext("never"))
    return success, format_time(link.last_attempt_at) if link.last_attempt_at else DASH


def read_library_link(exchange_dir: Path | None, now: datetime | None = None) -> LibraryLink:
    """The agent's last report; never raises, whatever the file holds."""
    if exchange_dir is None:
        return LibraryLink("none")
    try:
        raw = _read(exchange_dir / FILE_NAME)
    except FileNotFoundError:
        return LibraryLink("missing")
    except OSError:
        return LibraryLink("garbled")
    try:
        report = json.loads(raw)
    except (ValueError, RecursionError):
        return LibraryLink("garbled")
    if not isinstance(report, dict) or report.get("state") not in STATES or _time(report.get("at")) is None:
        return LibraryLink("garbled")
    return _link(report, now or datetime.now(timezone.utc))


def _read(path: Path) -> bytes:
    """The file's bytes; a link, a pipe or a device in its place is not followed, waited for or read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise OSError("too large")
    return raw


def _link(report: Mapping[str, Any], now: datetime) -> LibraryLink:
    at = _time(report["at"]) or now
    clock, minutes = _clock(report.get("clock"))
    return LibraryLink(
        state=report["state"],
        code=_text(report.get("code")),
        message=_text(report.get("message")),
        hint=_text(report.get("hint")),
        at=at.isoformat(),
        since=_iso(report.get("since")),
        last_success_at=_iso(report.get("last_success_at")),
        last_attempt_at=_iso(report.get("last_attempt_at")),
        received_bytes=_size(report.get("received_bytes")),
        progress=_progress(report.get("progress")),
        offers=_offers(report.get("lines")),
        is_stale=abs(now - at) > STALE_AFTER,
        clock=clock,
        clock_minutes=minutes,
    )


def _progress(value: object) -> Progress | None:
    if not isinstance(value, dict):
        return None
    total = _size(value.get("total_bytes"))
    return Progress(_text(value.get("file")), min(_size(value.get("done_bytes")), total), total) if total else None


def _offers(value: object) -> dict[str, Offer]:
    offers = {}
    for name, about in value.items() if isinstance(value, dict) else ():
        if isinstance(about, dict):
            decision, _, at = _text(about.get("decision")).partition(" ")
            offers[str(name)] = Offer(_text(about.get("version")), decision, _iso(at))
    return offers


def _clock(value: object) -> tuple[str, int]:
    """Whether the box's clock is wrong, so that expired signatures look valid or valid ones expired."""
    if not isinstance(value, dict) or (system := _time(value.get("system"))) is None:
        return "", 0
    server, floor = _time(value.get("server")), _time(value.get("floor"))
    if floor is not None and floor - system > CLOCK_SLACK:
        return "behind", _minutes(floor - system)
    if server is not None and abs(server - system) > CLOCK_SLACK:
        return ("behind" if server > system else "ahead"), _minutes(abs(server - system))
    return "", 0


def _minutes(span: timedelta) -> int:
    return round(span.total_seconds() / 60)


def _time(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value.replace("Z", "+00:00"))
        return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None


def _iso(value: object) -> str:
    time = _time(value)
    return time.isoformat() if time else ""


def _text(value: object) -> str:
    return "".join(char for char in value if char.isprintable())[:_MAX_TEXT_CHARS] if isinstance(value, str) else ""


def _size(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0
