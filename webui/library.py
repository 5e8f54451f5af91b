"""The line to the model library, as the sync agent last told it in ``sync-status.json`` of the exchange directory.

The agent is another account: its file may be missing, old, half a file or anything at all, and none of that may take the status
page down. "Unreachable" and "untrusted" are never mixed: the first needs patience, the second a person at once.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

FILE_NAME: Final = "sync-status.json"
STATES: Final = ("ok", "unreachable", "untrusted", "waiting", "downloading", "error")
# What this page adds: no exchange directory is set, no file there yet, or nothing that can be understood in it.
OWN_STATES: Final = ("none", "missing", "garbled")
STALE_AFTER: Final = timedelta(hours=2)
CLOCK_SLACK: Final = timedelta(minutes=5)
_MAX_BYTES: Final = 256 << 10
_MAX_TEXT_CHARS: Final = 300


@dataclass(frozen=True)
class Progress:
    """A file on its way; sizes in bytes."""

    file: str
    done: int
    total: int


@dataclass(frozen=True)
class Offer:
    """What the library has for a line, what the agent decided about it (a code of the agent's), and when its turn comes if it told."""

    version: str
    decision: str
    at: str


@dataclass(frozen=True)
class Library:
    """The state of the line; moments are ISO 8601 in UTC, empty when unknown.

    ``clock`` is ``behind``, ``ahead`` or empty, with ``clock_minutes``: the box's clock against the library's, or against a moment
    that is known to have been (the floor).
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
    stale: bool = False
    clock: str = ""
    clock_minutes: int = 0


def read(exchange_dir: Path | None, now: datetime | None = None) -> Library:
    """What the agent told last; never raises, whatever stands in the file."""
    if exchange_dir is None:
        return Library("none")
    try:
        raw = _read(exchange_dir / FILE_NAME)
    except FileNotFoundError:
        return Library("missing")
    except OSError:
        return Library("garbled")
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        return Library("garbled")
    if not isinstance(told, dict) or told.get("state") not in STATES or _moment(told.get("at")) is None:
        return Library("garbled")
    return _library(told, now or datetime.now(timezone.utc))


def _read(path: Path) -> bytes:
    """The file's bytes; a link, a pipe or a device that another account put there is not followed, waited for or read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise OSError("too large")
    return raw


def _library(told: Mapping[str, Any], now: datetime) -> Library:
    at = _moment(told["at"]) or now
    clock, minutes = _clock(told.get("clock"))
    return Library(
        state=told["state"],
        code=_text(told.get("code")),
        message=_text(told.get("message")),
        hint=_text(told.get("hint")),
        at=at.isoformat(),
        since=_iso(told.get("since")),
        last_success_at=_iso(told.get("last_success_at")),
        last_attempt_at=_iso(told.get("last_attempt_at")),
        received_bytes=_size(told.get("received_bytes")),
        progress=_progress(told.get("progress")),
        offers=_offers(told.get("lines")),
        stale=abs(now - at) > STALE_AFTER,
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
    """Whether the box's clock is wrong enough to matter: expired signatures look valid, or valid ones expired."""
    if not isinstance(value, dict) or (system := _moment(value.get("system"))) is None:
        return "", 0
    server, floor = _moment(value.get("server")), _moment(value.get("floor"))
    if floor is not None and floor - system > CLOCK_SLACK:
        return "behind", _minutes(floor - system)
    if server is not None and abs(server - system) > CLOCK_SLACK:
        return ("behind" if server > system else "ahead"), _minutes(abs(server - system))
    return "", 0


def _minutes(span: timedelta) -> int:
    return round(span.total_seconds() / 60)


def _moment(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None


def _iso(value: object) -> str:
    moment = _moment(value)
    return moment.isoformat() if moment else ""


def _text(value: object) -> str:
    return "".join(char for char in value if char.isprintable())[:_MAX_TEXT_CHARS] if isinstance(value, str) else ""


def _size(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0
