"""What this box has seen already and will not go behind: a time, and a version per role.

A signature says who; only memory says when. python-tuf remembers by the metadata it keeps: emptied or lost, an old library
would be as good as the new one; and it believes the system clock, which on a box without a battery starts in 1970. So two
copies of a small file hold the floors, apart from the metadata:

- *time*: the highest issue time that the timestamp role signed, and the system clock, the latter only as far as metadata
  that was just verified is valid: a clock that runs ahead for a week cannot make the good metadata of the day after look old.
- *anchor*: all of it counts for the provisioned root that it was learnt under, and for no other. A library whose root keys are
  lost or stolen is replaced by a new one, which counts from 1; its first root comes by hand, and with it a new beginning.
- *versions*: per role, bound to the keys of the roles that vouch for it, as in clause 5.3.11 of the TUF specification: when a
  trusted root replaces the key of timestamp or snapshot, a central team that recovers from a stolen key may count anew.
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

FLOOR_FILE = "floor.json"
ISSUED_AT = "x-issued-at"  # signed with the timestamp metadata
# No package with this line was built earlier: the time is never before it, whatever the clock says.
BUILT_AT = datetime(2026, 1, 1, tzinfo=timezone.utc)
_START = datetime(1970, 1, 1, tzinfo=timezone.utc)
_YEARS = range(2000, 2200)  # what is outside is no time that can be reckoned with
_CLOCKS_AGREE = timedelta(hours=12)


def utc_now() -> datetime:
    """Return the system clock, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0)


class AnchoredRoot(Root):
    """A root that knows where its trust began: ``anchor`` is the SHA-256 of the provisioned root."""

    anchor: str = ""

    @classmethod
    def of(cls, root: Root, provisioned: bytes) -> AnchoredRoot:
        """Return ``root``, reached from the bytes of the provisioned one."""
        anchored = cls.__new__(cls)
        anchored.__dict__.update(root.__dict__, anchor=hashlib.sha256(provisioned).hexdigest())
        return anchored


@dataclass(frozen=True)
class Clocks:
    """What there is to know about the time: the system clock, the floor, and the ``Date`` of the server's last answer."""

    system: datetime
    floor: datetime
    server: datetime | None = None

    @property
    def effective(self) -> datetime:
        """The time that expiry is judged by."""
        return max(self.system, self.floor)

    @property
    def plausible(self) -> bool:
        """Say whether nothing speaks against the system clock; the server's date is unsigned, so it can only object."""
        return self.server is None or abs(self.system - self.server) < _CLOCKS_AGREE

    def describe(self) -> str:
        """Return the three times in words."""
        server = f", the library's server says {iso(self.server)}" if self.server else ""
        return f"this box's clock says {iso(self.system)}, it is at least {iso(self.floor)}{server}"

    def hint(self) -> str:
        """Return what to do about metadata that expired: set the clock, or have the central team sign anew."""
        if not self.plausible or self.system < self.floor:
            return "the clock of this box is wrong: set it, then run `model-sync pull`; the model in use stays"
        return "the central team has to sign fresh metadata (`model-library refresh-timestamp`); the model in use stays"


@dataclass(frozen=True)
class RoleFloor:
    """The highest version of a role that was seen, and the key ids that vouched for it."""

    version: int
    keys: Sequence[str]


@dataclass(frozen=True)
class Floors:
    """The content of ``floor.json``; of several copies the one with the highest ``serial`` holds.

    ``anchor`` is the SHA-256 of the provisioned root that they were learnt under; one of before anchors were kept binds itself to
    the next root that it meets.
    """

    serial: int = 0
    root: int = 0
    system: datetime = _START
    issued: datetime = _START
    clock_keys: Sequence[str] = ()
    roles: Mapping[str, RoleFloor] = field(default_factory=dict)
    anchor: str = ""

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Floors:
        """Read the newest copy; a damaged or absent one is passed over."""
        return max((cls._parse(atomic_files.read_json(path)) for path in paths), key=lambda floors: floors.serial, default=cls())

    @classmethod
    def _parse(cls, value: dict[str, Any]) -> Floors:
        try:
            roles = {name: RoleFloor(int(role["version"]), tuple(role["keys"])) for name, role in value["roles"].items()}
            system, issued = (datetime.fromisoformat(value[name]).astimezone(timezone.utc) for name in ("system", "issued"))
            if not all(moment == _START or moment.year in _YEARS for moment in (system, issued)):
                return cls()
            keys, anchor = tuple(value["clock_keys"]), str(value.get("anchor", ""))
            return cls(int(value["serial"]), int(value["root"]), system, issued, keys, roles, anchor)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            return cls()

    def save(self, path: Path) -> None:
        """Write one copy; raises OSError."""
        value = asdict(self) | {"schema": 1, "system": self.system.isoformat(), "issued": self.issued.isoformat()}
        atomic_files.write_json(path, value)

    def under(self, root: Root) -> Floors:
        """Return what counts under ``root``: nothing, when this was learnt under another provisioned root."""
        anchor = _anchor(root)
        return Floors(self.serial) if self.anchor and anchor and self.anchor != anchor else self

    def time(self, root: Root, built_at: datetime = BUILT_AT) -> datetime:
        """Return the earliest that it can be. Times that a replaced timestamp key vouched for no longer count."""
        if self.under(root) is not self or (self.clock_keys and tuple(self.clock_keys) != _keys(root, Timestamp.type)):
            return built_at
        return max(built_at, self.system, self.issued)

    def refuse_older(self, root: Root, timestamp: Timestamp, snapshot: Snapshot) -> None:
        """Compare what a library says now with what it said before.

        Raises:
            TrustError: ``trust.rollback``: a role is older than this box has seen it, or is gone from the snapshot.
        """
        counting = self.under(root)
        if root.version < counting.root:
            raise _rollback(Root.type, root.version, counting.root)
        for name, version in _versions(timestamp, snapshot).items():
            known = counting.roles.get(name)
            if known and tuple(known.keys) == _bound(root, name) and version < known.version:
                raise _rollback(name, version, known.version)
        for name, known in counting.roles.items():
            if name not in _versions(timestamp, snapshot) and tuple(known.keys) == _bound(root, name):
                raise TrustError(
                    f"the library's snapshot no longer names the role {name}, which this box knows in version {known.version}",
                    hint="tell the central team: somebody offers an old or forged library; the model in use stays",
                    code="trust.rollback",
                )

    def advanced(self, root: Root, timestamp: Timestamp, snapshot: Snapshot, clocks: Clocks, valid_until: datetime) -> Floors:
        """Return the floors after metadata that was just verified; the same object when nothing rose."""
        keys = _keys(root, Timestamp.type)
        same = self.under(root) is self and tuple(self.clock_keys) == keys
        before = self if same else replace(self, system=_START, issued=_START)
        last_valid = max(valid_until, BUILT_AT) - timedelta(seconds=1)
        system = max(before.system, min(clocks.system, last_valid)) if clocks.plausible else before.system
        issued = max(before.issued, min(issued_at(timestamp) or _START, last_valid))
        roles = {name: RoleFloor(version, _bound(root, name)) for name, version in _versions(timestamp, snapshot).items()}
        after = Floors(self.serial, root.version, system, issued, keys, roles, _anchor(root))
        # The system clock alone is worth a write once an hour, not at every look.
        if system - self.system < timedelta(hours=1) and replace(after, system=self.system) == self:
            return self
        return replace(after, serial=self.serial + 1)


def issued_at(timestamp: Timestamp) -> datetime | None:
    """Return when the timestamp metadata says it was signed, or None; a signed text that is no time of ours counts as none."""
    try:
        moment = datetime.fromisoformat(str(timestamp.unrecognized_fields[ISSUED_AT]).replace("Z", "+00:00"))
        moment = moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    except (KeyError, ValueError, OverflowError):
        return None
    return moment if moment.year in _YEARS else None


def iso(moment: datetime) -> str:
    """Return a time as ``2026-01-31T12:00:00Z``, whatever its year; a year always has four digits."""
    with contextlib.suppress(OverflowError):  # the first or the last hours there are, in another zone
        moment = moment.astimezone(timezone.utc)
    return moment.replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def _anchor(root: Root) -> str:
    return root.anchor if isinstance(root, AnchoredRoot) else ""


def _versions(timestamp: Timestamp, snapshot: Snapshot) -> dict[str, int]:
    listed = {name.removesuffix(".json"): meta.version for name, meta in snapshot.meta.items()}
    return listed | {Timestamp.type: timestamp.version, Snapshot.type: snapshot.version}


def _keys(root: Root, *roles: str) -> tuple[str, ...]:
    return tuple(sorted({keyid for role in roles for keyid in root.roles[role].keyids}))


def _bound(root: Root, role: str) -> tuple[str, ...]:
    return _keys(root, Timestamp.type, Snapshot.type) if role in (Timestamp.type, Snapshot.type) else _keys(root, Snapshot.type)


def _rollback(role: str, version: int, known: int) -> TrustError:
    return TrustError(
        f"the library offers version {version} of its {role} metadata, and this box has already seen version {known}",
        hint="an old copy: use the newest USB stick, or tell the central team that a server is behind; the model in use stays",
        code="trust.rollback",
    )
