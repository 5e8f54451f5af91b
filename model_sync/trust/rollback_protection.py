"""Protection against rollback: the earliest possible time and the highest version of each role that this box has seen.

A signature shows who signed, not when. python-tuf compares only with the metadata that it stored: when that is lost, it would accept an
old library. It also trusts the system clock, which starts in 1970 on a box without a clock battery. So two copies of a small file,
separate from the metadata, contain the rollback state:

- *time*: the highest issue time that the timestamp role signed, and the highest system time, limited to the validity of the
  metadata that was just verified: a clock that was ahead for a week must not make later valid metadata look expired.
- *anchor*: the state is valid only for the provisioned root under which it was recorded. A library whose root keys are lost or
  stolen is replaced by a new one, whose versions start at 1; a person installs its first root.
- *versions*: per role, bound to the keys of the roles that sign for it (TUF specification, clause 5.3.11): when a trusted root
  replaces the key of timestamp or snapshot, because one was stolen, the central team may restart the numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from tuf.api.metadata import Root, Snapshot, Timestamp

from model_sync import atomic_files
from model_sync.errors import TrustError

ROLLBACK_FILE = "floor.json"
ISSUED_AT = "x-issued-at"  # signed with the timestamp metadata
# This program did not exist before, so the time is never earlier.
BUILT_AT = datetime(2026, 1, 1, tzinfo=timezone.utc)
_START = datetime(1970, 1, 1, tzinfo=timezone.utc)
_YEARS = range(2000, 2200)  # other years are treated as invalid
_CLOCKS_AGREE = timedelta(hours=12)


def utc_now() -> datetime:
    """Return the system clock, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0)


class AnchoredRoot(Root):
    """A root with its origin: ``anchor`` is the SHA-256 of the provisioned root from which it was reached."""

    anchor: str = ""

    @classmethod
    def of(cls, root: Root, provisioned: bytes) -> AnchoredRoot:
        """Return ``root``, reached from the bytes of the provisioned one."""
        anchored = cls.__new__(cls)
        anchored.__dict__.update(root.__dict__, anchor=hashlib.sha256(provisioned).hexdigest())
        return anchored


@dataclass(frozen=True)
class Clocks:
    """The system clock, the earliest possible time, and the ``Date`` header of the server's last answer."""

    system: datetime
    earliest: datetime
    server: datetime | None = None

    @property
    def effective(self) -> datetime:
        """The time against which expiry is checked."""
        return max(self.system, self.earliest)

    @property
    def is_plausible(self) -> bool:
        """Whether the system clock agrees with the server; the server's date is unsigned and never replaces the clock."""
        return self.server is None or abs(self.system - self.server) < _CLOCKS_AGREE

    def describe(self) -> str:
        """Return a sentence with the three times."""
        server = f", the library's server says {iso(self.server)}" if self.server else ""
        return f"this box's clock says {iso(self.system)}, it is at least {iso(self.earliest)}{server}"

    def hint(self) -> str:
        """Return what to do about expired metadata."""
        if not self.is_plausible or self.system < self.earliest:
            return "the clock of this box is wrong: set it, then run `model-sync pull`; the model in use stays"
        return "the central team has to sign fresh metadata (`model-library refresh-timestamp`); the model in use stays"


@dataclass(frozen=True)
class RoleVersion:
    """The highest version of a role that was seen, and the ids of the keys that signed for it."""

    version: int
    keys: Sequence[str]


@dataclass(frozen=True)
class RollbackState:
    """The content of ``floor.json``; of several copies the one with the highest ``serial`` counts.

    ``anchor`` is the SHA-256 of the provisioned root under which the state was recorded; a file of an older version has none,
    and the next update adds it.
    """

    serial: int = 0
    root: int = 0
    system: datetime = _START
    issued: datetime = _START
    clock_keys: Sequence[str] = ()
    roles: Mapping[str, RoleVersion] = field(default_factory=dict)
    anchor: str = ""

    @classmethod
    def load(cls, paths: Sequence[Path]) -> RollbackState:
        """Read the newest copy; a damaged or absent one is skipped."""
        return max((cls._parse(atomic_files.read_json(path)) for path in paths), key=lambda state: state.serial, default=cls())

    @classmethod
    def _parse(cls, value: dict[str, Any]) -> RollbackState:
        try:
            roles = {name: RoleVersion(int(role["version"]), tuple(role["keys"])) for name, role in value["roles"].items()}
            system, issued = (datetime.fromisoformat(value[name]).astimezone(timezone.utc) for name in ("system", "issued"))
            if not all(moment == _START or moment.year in _YEARS for moment in (system, issued)):
                return cls()
            keys, anchor = tuple(value["clock_keys"]), str(value.get("anchor", ""))
            return cls(int(value["serial"]), int(value["root"]), system, issued, keys, roles, anchor)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            return cls()

    def save(self, path: Path) -> None:
        """Write one copy; raise OSError on failure."""
        value = asdict(self) | {"schema": 1, "system": self.system.isoformat(), "issued": self.issued.isoformat()}
        atomic_files.write_json(path, value)

    def valid_under(self, root: Root) -> RollbackState:
        """Return the part that is valid under ``root``: this state, or an empty one if it was recorded under another provisioned root."""
        anchor = _anchor(root)
        return RollbackState(self.serial) if self.anchor and anchor and self.anchor != anchor else self

    def earliest_time(self, root: Root, built_at: datetime = BUILT_AT) -> datetime:
        """Return the earliest possible time. Times signed by a replaced timestamp key no longer count."""
        if self.valid_under(root) is not self or (self.clock_keys and tuple(self.clock_keys) != _keys(root, Timestamp.type)):
            return built_at
        return max(built_at, self.system, self.issued)

    def refuse_older(self, root: Root, timestamp: Timestamp, snapshot: Snapshot) -> None:
        """Compare the metadata of a library with the versions seen before.

        Raises:
            TrustError: ``trust.rollback``: a role is older than a version seen before, or is missing in the snapshot.
        """
        valid = self.valid_under(root)
        if root.version < valid.root:
            raise _rollback(Root.type, root.version, valid.root)
        for name, version in _versions(timestamp, snapshot).items():
            known = valid.roles.get(name)
            if known and tuple(known.keys) == _keys_for(root, name) and version < known.version:
                raise _rollback(name, version, known.version)
        for name, known in valid.roles.items():
            if name not in _versions(timestamp, snapshot) and tuple(known.keys) == _keys_for(root, name):
                raise TrustError(
                    f"the library's snapshot no longer names the role {name}, which this box knows in version {known.version}",
                    code="trust.rollback",
                )

    def advance(self, root: Root, timestamp: Timestamp, snapshot: Snapshot, clocks: Clocks, valid_until: datetime) -> RollbackState:
        """Return the state after metadata that was just verified; the same object when nothing changed."""
        keys = _keys(root, Timestamp.type)
        same = self.valid_under(root) is self and tuple(self.clock_keys) == keys
        before = self if same else replace(self, system=_START, issued=_START)
        last_valid = max(valid_until, BUILT_AT) - timedelta(seconds=1)
        system = max(before.system, min(clocks.system, last_valid)) if clocks.is_plausible else before.system
        issued = max(before.issued, min(issued_at(timestamp) or _START, last_valid))
        roles = {name: RoleVersion(version, _keys_for(root, name)) for name, version in _versions(timestamp, snapshot).items()}
        after = RollbackState(self.serial, root.version, system, issued, keys, roles, _anchor(root))
        # The system clock alone is written once an hour, not at every poll.
        if system - self.system < timedelta(hours=1) and replace(after, system=self.system) == self:
            return self
        return replace(after, serial=self.serial + 1)


def issued_at(timestamp: Timestamp) -> datetime | None:
    """Return the signed issue time of timestamp metadata; None when it is absent or not valid."""
    try:
        moment = datetime.fromisoformat(str(timestamp.unrecognized_fields[ISSUED_AT]).replace("Z", "+00:00"))
        moment = moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    except (KeyError, ValueError, OverflowError):
        return None
    return moment if moment.year in _YEARS else None


def iso(moment: datetime) -> str:
    """Return a time as ``2026-01-31T12:00:00Z``; the year always has four digits."""
    with contextlib.suppress(OverflowError):  # at the ends of the calendar, in another time zone
        moment = moment.astimezone(timezone.utc)
    return moment.replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def _anchor(root: Root) -> str:
    return root.anchor if isinstance(root, AnchoredRoot) else ""


def _versions(timestamp: Timestamp, snapshot: Snapshot) -> dict[str, int]:
    listed = {name.removesuffix(".json"): meta.version for name, meta in snapshot.meta.items()}
    return listed | {Timestamp.type: timestamp.version, Snapshot.type: snapshot.version}


def _keys(root: Root, *roles: str) -> tuple[str, ...]:
    return tuple(sorted({keyid for role in roles for keyid in root.roles[role].keyids}))


def _keys_for(root: Root, role: str) -> tuple[str, ...]:
    return _keys(root, Timestamp.type, Snapshot.type) if role in (Timestamp.type, Snapshot.type) else _keys(root, Snapshot.type)


def _rollback(role: str, version: int, known: int) -> TrustError:
    return TrustError(
        f"the library offers version {version} of its {role} metadata, and this box has already seen version {known}", code="trust.rollback"
    )
