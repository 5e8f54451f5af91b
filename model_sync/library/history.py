"""The history of a library, read from its public metadata: what was published, withdrawn, rolled out, by whose signatures; expiries.

Every version of an offline role stays public, so the history needs no log of its own, and nobody can change it without the keys. The
time of a change is the one that its signed document carries; where there is none, it is the time of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

from tuf.api.metadata import Root, Targets

from model_sync.errors import ModelSyncError
from model_sync.library.files import due_days, read_metadata
from model_sync.library.library import Library
from model_sync.library.roles import ONLINE, AnyMetadata
from model_sync.trust.documents import ROLLOUT_ROLE, LineIndex, Rollout, RolloutStep, line_path

_MAX_VERSIONS = 300  # of one role


class LibraryEvent(NamedTuple):
    """One event of a library.

    Attributes:
        at: when, in UTC.
        kind: ``published``, ``withdrawn``, ``minimum``, ``rollout``, ``rollout-paused``, ``rollout-resumed``, ``rollout-ended``, ``signed``
            (a role changed in another way, or its validity), ``waiting`` (for signatures), ``expires`` (soon) or ``expired``.
        who: the names of the key holders who signed.
        subject: role and version, ring, model line, version; as far as they apply.
        note: the reason of a withdrawal, or numbers.
        until: when the role expires, for ``expires``.
    """

    at: datetime
    kind: str
    who: tuple[str, ...]
    subject: tuple[str, ...]
    note: str = ""
    until: datetime | None = None


class LibraryHistory:
    """Reads the events of a library; public metadata is read once, since it never changes under its name."""

    def __init__(self, directory: Path) -> None:
        self._library = Library(directory)
        self._known: dict[tuple[str, int], list[LibraryEvent]] = {}

    def events(self) -> list[LibraryEvent]:
        """Return the events, the newest first.

        Raises:
            ModelSyncError: the library cannot be read.
            OSError: a file cannot be read.
        """
        events = [*self._waiting(), *self.current_expiries()]
        for role in self._library.role_names():
            newest = self._library.published(role) if role not in ONLINE else None
            if newest is not None:
                for version in range(newest.signed.version, max(0, newest.signed.version - _MAX_VERSIONS), -1):
                    events += self._version_events(role, version)
        return sorted(events, key=lambda event: event.at, reverse=True)

    def current_expiries(self) -> list[LibraryEvent]:
        """Return the expiries of the newest versions: those that passed, and those that are near.

        Raises:
            ModelSyncError: the library cannot be read.
        """
        newest = ((role, self._library.published(role)) for role in self._library.role_names())
        return [event for role, md in newest if md is not None for event in self._expiry(role, md)]

    def _version_events(self, role: str, version: int) -> list[LibraryEvent]:
        key = role, version
        path = self._library.files.metadata_path(role, version)
        if key not in self._known and path.is_file():
            self._known[key] = list(self._read(role, version))
        return self._known.get(key, [])

    def _read(self, role: str, version: int) -> Iterator[LibraryEvent]:
        new, old = self._metadata(role, version), self._metadata(role, version - 1)
        assert new is not None, "the caller has seen the file"
        file_at, who = self._file_time(role, version), self._signers(new)
        if old is not None and old.signed.expires < file_at:
            yield LibraryEvent(old.signed.expires, "expired", (), (f"{role} v{version - 1}",))
        try:
            changes = list(self._changes(role, new.signed, old.signed if old is not None else None))
        except ModelSyncError:  # a copy without the documents of earlier versions: the signatures are still known
            changes = []
        for at, kind, subject, note in changes:
            yield LibraryEvent(at or file_at, kind, who, (*subject, f"{role} v{version}"), note)
        if not changes:
            yield LibraryEvent(file_at, "signed", who, (f"{role} v{version}",))

    def _changes(self, role: str, new: Any, old: Any) -> Iterator[tuple[datetime | None, str, tuple[str, ...], str]]:
        if role in (Root.type, Targets.type):
            return
        if role == ROLLOUT_ROLE:
            for path in sorted(new.targets):
                target = old.targets.get(path) if old is not None else None
                if target is None or target.hashes != new.targets[path].hashes:
                    rollout = Rollout.parse(self._library.read_target(old, path)) if target is not None else None
                    yield from _rollout_changes(Rollout.parse(self._library.read_target(new, path)), rollout)
            return
        path = line_path(role)
        index = LineIndex.parse(self._library.read_target(new, path)) if path in new.targets else None
        before = LineIndex.parse(self._library.read_target(old, path)) if old is not None and path in old.targets else None
        if index is not None:
            yield from _index_changes(index, before)

    def _expiry(self, role: str, newest: AnyMetadata) -> Iterator[LibraryEvent]:
        """Yield that the newest version of a role has expired, or will soon."""
        now, expires = self._library.now(), newest.signed.expires
        due = expires - timedelta(days=due_days(self._library.files.config().expiry_days.days(role)))
        subject = (f"{role} v{newest.signed.version}",)
        if expires <= now:
            yield LibraryEvent(expires, "expired", (), subject)
        elif due <= now:
            yield LibraryEvent(due, "expires", (), subject, until=expires)

    def _waiting(self) -> Iterator[LibraryEvent]:
        for role in self._library.staged_roles():
            md = self._library.staged(role)
            if md is None or not self._library.delegators(role):
                continue
            state = self._library.state(role)
            at = datetime.fromtimestamp(self._library.files.staged_path(role).stat().st_mtime, timezone.utc)
            yield LibraryEvent(at, "waiting", tuple(state.signed), (f"{role} v{state.version}",), f"{state.have}/{state.need}")

    def _metadata(self, role: str, version: int) -> AnyMetadata | None:
        path = self._library.files.metadata_path(role, version)
        return read_metadata(path) if path.is_file() else None

    def _file_time(self, role: str, version: int) -> datetime:
        return datetime.fromtimestamp(self._library.files.metadata_path(role, version).stat().st_mtime, timezone.utc)

    def _signers(self, md: AnyMetadata) -> tuple[str, ...]:
        return tuple(sorted(map(self._library.files.config().name, md.signatures)))


def _index_changes(new: LineIndex, old: LineIndex | None) -> Iterator[tuple[datetime | None, str, tuple[str, ...], str]]:
    have = {release.version: release.digest for release in old.versions} if old is not None else {}
    gone = {item.version for item in old.withdrawn} if old is not None else set()
    for release in new.versions:
        if have.get(release.version) != release.digest:
            yield release.published_at, "published", (new.line, release.version), ""
    for item in new.withdrawn:
        if item.version not in gone:
            yield item.at, "withdrawn", (new.line, item.version), item.reason
    if old is not None and old.minimum_version != new.minimum_version:
        yield None, "minimum", (new.line, new.minimum_version), ""


def _rollout_changes(new: Rollout, old: Rollout | None) -> Iterator[tuple[datetime | None, str, tuple[str, ...], str]]:
    before = old.lines if old is not None else {}
    for line, step in sorted(new.lines.items()):
        if before.get(line) != step:
            yield new.issued_at, _rollout_kind(step, before.get(line)), (new.ring, line, step.version), _describe(step)
    for line in sorted(before.keys() - new.lines.keys()):
        yield new.issued_at, "rollout-ended", (new.ring, line), ""


def _rollout_kind(new: RolloutStep, old: RolloutStep | None) -> str:
    if old is not None and new.model_copy(update={"paused": old.paused}) == old:
        return "rollout-paused" if new.paused else "rollout-resumed"
    return "rollout-paused" if new.paused else "rollout"


def _describe(step: RolloutStep) -> str:
    """Return percentage and duration, which need no words."""
    return f"{step.percent:g}\u00a0% / {step.duration_h:g}\u00a0h"
