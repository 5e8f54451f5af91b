"""What this box may believe, from the metadata it has on its disk alone: offline, read-only, from the provisioned root.

``check`` is asked right before a model is put to work, by an account that cannot write here: which versions the library's
line roles have signed, which of them are withdrawn, and until when that holds. It trusts nothing that an earlier pull
concluded: root by root, then timestamp, snapshot, targets and each line's role, signatures, versions and hashes are checked
again, with the time and the versions that the floor knows. The refresh (``model_sync.upstream``) is checked by the same chain.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import Signed, Snapshot, TargetFile, Targets, Timestamp

from model_sync import documents, durable
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.floors import BUILT_AT, FLOOR_FILE, AnchoredRoot, Clocks, Floors, iso, issued_at, utc_now
from model_sync.trust_files import (
    HISTORY,
    KEEP,
    MAX_METADATA_BYTES,
    altered,
    ambiguous,
    expired,
    foreign,
    listed,
    missing,
    newest_root,
    read,
    read_root,
    set_aside,
    verified,
)

__all__ = [
    "CURRENT", "MAX_METADATA_BYTES", "Chain", "Facts", "LineFacts", "altered", "check", "expired", "facts_of", "missing",
    "newest_root", "print_check", "read_document", "read_index", "read_root", "set_aside",
]  # fmt: skip
CURRENT = "trust"  # a link to the newest whole set of metadata and documents


@dataclass(frozen=True)
class Chain:
    """Metadata that hangs together by signatures, versions and hashes; expiry is judged apart, by the caller's clock.

    Attributes:
        roles: the roles that the targets role delegates to, verified, in its order; absent ones are left out.
        troubles: why a delegated role that is here cannot be believed; the others are not touched by it.
    """

    root: AnchoredRoot
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets
    roles: Mapping[str, Targets] = field(default_factory=dict)
    troubles: Mapping[str, TrustError] = field(default_factory=dict)

    @classmethod
    def load(cls, metadata: Path, root: bytes) -> Chain:
        """Verify the metadata directory of a python-tuf client, starting from the bytes of the provisioned root.

        Raises:
            TrustError: ``trust.missing``, ``trust.signature``, ``trust.version``, ``trust.digest`` or ``trust.metadata``.
            OSError: a file is there and cannot be read.
        """
        newest = newest_root(metadata, root)
        timestamp = verified(Timestamp, read(metadata, Timestamp.type), newest, Timestamp.type)
        snapshot = listed(Snapshot, metadata, newest, Snapshot.type, timestamp.snapshot_meta)
        targets = listed(Targets, metadata, newest, Targets.type, snapshot.meta.get("targets.json"))
        chain = cls(newest, timestamp, snapshot, targets)
        roles, troubles = chain._delegated(metadata)
        return cls(newest, timestamp, snapshot, targets, roles, troubles)

    def _delegated(self, metadata: Path) -> tuple[dict[str, Targets], dict[str, TrustError]]:
        roles: dict[str, Targets] = {}
        troubles: dict[str, TrustError] = {}
        for name in self.delegated_names():
            try:
                role = listed(Targets, metadata, self.targets, name, self.snapshot.meta.get(f"{name}.json"))
                if role.delegations is not None:
                    raise ambiguous(f"the role {name} delegates further", "a role has one delegator, which is the targets role")
                roles[name] = role
            except durable.NotPlain:
                troubles[name] = altered(f"the {name} metadata")
            except TrustError as error:
                troubles[name] = error
        return roles, troubles

    def delegated_names(self) -> list[str]:
        """Return the names of the roles that the targets role delegates to, in its order."""
        delegations = self.targets.delegations
        return list(delegations.roles) if delegations is not None and delegations.roles else []

    def line_names(self) -> list[str]:
        """Return the model lines that the library has today."""
        return [name for name in self.delegated_names() if name != documents.ROLLOUT_ROLE]

    def role_of(self, path: str) -> str | None:
        """Return the one role that speaks for a target path: the first in order; None when nobody does."""
        delegations = self.targets.delegations
        return next((name for name, _ in delegations.get_roles_for_target(path)), None) if delegations is not None else None

    def target(self, path: str, role: str) -> TargetFile | None:
        """Return what ``role`` signs at ``path``, or None when it signs nothing there.

        Raises:
            TrustError: ``trust.revoked``, ``trust.ambiguous``, or what is wrong with the role's metadata.
        """
        if role not in self.delegated_names():
            raise TrustError(
                f"the library no longer delegates to {role}: whatever its keys sign counts for nothing",
                hint=f"ask the central team whether the line was ended; {KEEP}",
                code="trust.revoked",
            )
        if (first := self.role_of(path)) != role or path in self.targets.targets:
            raise ambiguous(f"{path} is not {role}'s alone to sign", f"{first or 'targets'} comes first")
        if role in self.troubles:
            raise self.troubles[role]
        return self.roles[role].targets.get(path)

    def valid_until(self, *roles: str) -> datetime:
        """Return the earliest expiry of root, timestamp, snapshot, targets and of the named roles."""
        signed: list[Signed] = [self.root, self.timestamp, self.snapshot, self.targets]
        return min(part.expires for part in (*signed, *(self.roles[name] for name in roles if name in self.roles)))

    def refuse_expired(self, clocks: Clocks, *roles: str) -> None:
        """Judge expiry by the effective time.

        Raises:
            TrustError: ``trust.expired``, naming the role and all the clocks.
        """
        top: dict[str, Signed] = {"root": self.root, "timestamp": self.timestamp, "snapshot": self.snapshot, "targets": self.targets}
        for name, signed in (top | {name: self.roles[name] for name in roles if name in self.roles}).items():
            if signed.is_expired(clocks.effective):
                raise expired(name, signed.expires, clocks)

    def refuse_older(self, floors: Floors) -> None:
        """Compare with what was seen before; raises TrustError ``trust.rollback``."""
        floors.refuse_older(self.root, self.timestamp, self.snapshot)

    def clocks(self, floors: Floors, system: datetime, server: datetime | None = None, built_at: datetime = BUILT_AT) -> Clocks:
        """Return the clocks, the floor raised by the issue time that this very timestamp signs (as far as it is valid)."""
        issued = min(issued_at(self.timestamp) or built_at, self.timestamp.expires)
        return Clocks(system, max(floors.time(self.root, built_at), issued), server)


@dataclass(frozen=True)
class LineFacts:
    """What a line's role signs about its versions."""

    index: documents.LineIndex
    valid_until: datetime

    def to_dict(self, now: datetime) -> dict[str, Any]:
        """Return the JSON form; ``expired`` says it of this line alone, whatever has become of the others."""
        return {
            "minimum_version": self.index.minimum_version,
            "withdrawn": {item.version: {"reason": item.reason, "at": iso(item.at)} for item in self.index.withdrawn},
            "versions": {item.version: item.digest for item in self.index.versions},
            "valid_until": iso(self.valid_until),
            "expired": now >= self.valid_until,
        }


@dataclass(frozen=True)
class Facts:
    """What may be believed about every line; ``troubles`` are lines that cannot be believed, and why."""

    now: datetime
    valid_until: datetime
    lines: Mapping[str, LineFacts]
    troubles: Mapping[str, TrustError]

    @property
    def expired(self) -> bool:
        """Say whether anything has expired: its withdrawals and minimum still hold, nothing new of it may be put to work."""
        return self.now >= self.valid_until

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that ``model-sync check`` prints."""
        return {
            "ok": True,
            "now": iso(self.now),
            "valid_until": iso(self.valid_until),
            "expired": self.expired,
            "lines": {name: line.to_dict(self.now) for name, line in self.lines.items()},
            "troubles": {name: {"code": error.code, "message": error.message} for name, error in self.troubles.items()},
        }


def check(exchange_dir: Path, root: Path, now: datetime | None = None) -> Facts:
    """Verify what lies in the exchange directory; writes nothing, asks nobody.

    Args:
        exchange_dir: the directory that the agent shares with the box.
        root: the provisioned root.json.
        now: the system clock, for tests.

    Raises:
        TrustError: the metadata cannot be believed.
        LibraryUnreachable: ``sync.state``: a file cannot be read.
    """
    system = now or utc_now()
    try:
        floors = Floors.load([exchange_dir / FLOOR_FILE])
        return _facts(exchange_dir, read_root(root), floors, system)
    except OSError as error:
        raise durable.disk_trouble(error) from error


def _facts(exchange_dir: Path, root: bytes, floors: Floors, system: datetime) -> Facts:
    base = _current(exchange_dir)
    if foreign(base / "metadata", root):
        raise missing("what lies here is of the library that this box followed before; nothing of its new one has been received")
    chain = Chain.load(base / "metadata", root)
    chain.refuse_older(floors)
    return facts_of(chain, base / "documents", chain.clocks(floors, system).effective)


def _current(exchange_dir: Path) -> Path:
    """Return the newest set. Its link is followed once, so that a pull that ends meanwhile cannot mix two; no other is followed.

    Raises:
        OSError: a link leads out of the exchange directory, or stands where none belongs.
    """
    link = exchange_dir / CURRENT
    name = os.readlink(link) if link.is_symlink() else CURRENT  # without a link no pull has ended yet
    if "/" in name or name in ("", ".", ".."):
        raise OSError(errno.ELOOP, "its link leads out of the exchange directory", str(link))
    base = exchange_dir / name
    for directory in (base, base / "metadata", base / "metadata" / HISTORY, base / "documents"):
        if directory.is_symlink():
            raise OSError(errno.ELOOP, "a link stands where a directory belongs", str(directory))
    return base


def facts_of(chain: Chain, directory: Path, now: datetime) -> Facts:
    """Read the index of every line whose role is here; a line without one is left out, with the reason."""
    lines: dict[str, LineFacts] = {}
    troubles: dict[str, TrustError] = {}
    for name in chain.line_names():
        try:
            lines[name] = LineFacts(read_index(chain, directory, name), chain.valid_until(name))
        except TrustError as error:
            troubles[name] = error
    valid_until = min((line.valid_until for line in lines.values()), default=chain.valid_until())
    return Facts(now, valid_until, lines, troubles)


def read_index(chain: Chain, directory: Path, line: str) -> documents.LineIndex:
    """Return the index of a line from its verified copy in ``directory``.

    Raises:
        TrustError: the role, the copy or the document cannot be believed, or is not here.
    """
    index = documents.LineIndex.parse(read_document(chain, directory, documents.line_path(line), line))
    if index.line != line:
        raise TrustError(
            f"the index that {line} signs speaks of {index.line}",
            hint=f"tell the central team: it was signed by mistake or in bad faith; {KEEP}",
            code="trust.document",
        )
    return index


def read_document(chain: Chain, directory: Path, path: str, role: str) -> bytes:
    """Return the bytes of a small target from its copy in ``directory``, verified against the chain."""
    target = chain.target(path, role)
    if target is None:
        raise missing(f"{role} signs no {path}")
    if any((directory / folder).is_symlink() for folder in PurePosixPath(path).parents):
        raise altered(path)
    try:
        raw = durable.read(directory / path, MAX_METADATA_BYTES)
        target.verify_length_and_hashes(raw)
    except FileNotFoundError as error:
        raise missing(f"{path} has not been received") from error
    except (LengthOrHashMismatchError, durable.NotPlain) as error:
        raise altered(path) from error
    return raw


def print_check(exchange_dir: Path, root: Path) -> int:
    """Print the facts as one JSON object, whatever it meets; returns 0 when they are verified, 1 when not."""
    try:
        facts = check(exchange_dir, root).to_dict()
    except (TrustError, LibraryUnreachable) as error:
        facts = {"ok": False, "code": error.code, "message": error.message, "hint": error.hint}
    except Exception as error:  # noqa: BLE001  (whoever asks reads one JSON object: no answer would stop every line, with no reason)
        facts = {
            "ok": False,
            "code": "trust.unchecked",
            "message": f"the check met what it cannot reckon with ({type(error).__name__}): nothing is verified",
            "hint": f"run `model-sync pull`; if it stays, send this line to the central team; {KEEP}",
        }
    # In ASCII, which every locale writes alike: in GB18030 a reason in Chinese would be no JSON to whoever reads UTF-8.
    print(json.dumps(facts, sort_keys=True))
    return 0 if facts["ok"] else 1
