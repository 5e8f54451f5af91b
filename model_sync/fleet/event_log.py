"""The log of the fleet page: what people and the failure budget did here, and what the signed library says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from model_sync.errors import ModelSyncError, PublishError
from model_sync.fleet import views
from model_sync.fleet.database import Fleet
from model_sync.library.history import LibraryEvent, LibraryHistory

LATEST: Final = 15
PAGE_ENTRIES: Final = 50


class LogEntry(NamedTuple):
    """One entry of the log.

    Attributes:
        at: seconds since the epoch.
        who: a person, the failure budget, or the key holders who signed.
        action: the key of its text.
        subject: what it is about.
        note: a reason.
        until: when a role expires, in seconds since the epoch.
    """

    at: int
    who: str
    action: str
    subject: str
    note: str
    until: int | None = None


@dataclass(frozen=True)
class LogPage:
    """One page of the log, the newest entry first."""

    entries: list[LogEntry]
    page: int
    pages: int


class EventLog:
    """Merges the recorded actions of the database and the events of the library."""

    def __init__(self, fleet: Fleet, library: Path) -> None:
        self._fleet = fleet
        self._history = LibraryHistory(library)

    def read(self, page: int = 1, size: int = PAGE_ENTRIES) -> LogPage:
        """Return one page.

        Raises:
            ModelSyncError: the library cannot be read.
        """
        try:
            signed = [_of_library(event) for event in self._history.events()]
        except OSError as error:
            raise PublishError(f"the library's disk: {error.strerror}", code="library.disk") from error
        return self._page(signed, page, size)

    def read_actions(self, size: int = LATEST) -> LogPage:
        """Return the recorded actions alone, for a library that cannot be read."""
        return self._page([], 1, size)

    def expiring(self) -> list[LogEntry]:
        """Return the roles that have expired or will soon; empty when the library cannot be read, which the page says elsewhere."""
        try:
            events = self._history.current_expiries()
        except (ModelSyncError, OSError):
            return []
        return [_of_library(event) for event in events]

    def _page(self, signed: list[LogEntry], page: int, size: int) -> LogPage:
        total = len(signed) + views.count_actions(self._fleet)
        pages = max(1, -(-total // size))
        page = min(max(1, page), pages)
        done = [
            LogEntry(row["at"], row["actor"], row["action"], _join(row["ring"], row["line"], row["subject"], row["figures"]), row["note"])
            for row in views.latest_actions(self._fleet, page * size)
        ]
        merged = sorted((*signed, *done), key=lambda entry: entry.at, reverse=True)
        return LogPage(merged[(page - 1) * size : page * size], page, pages)


def _of_library(event: LibraryEvent) -> LogEntry:
    until = int(event.until.timestamp()) if event.until is not None else None
    return LogEntry(int(event.at.timestamp()), ", ".join(event.who), event.kind, _join(*event.subject), event.note, until)


def _join(*parts: str) -> str:
    return " · ".join(filter(None, parts))
