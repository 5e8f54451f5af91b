"""What this box may believe, from the metadata it has on its disk alone: offline, read-only, from the provisioned root.

``check`` is asked right before a model is put to work, by an account that cannot write here: which versions the library's
line roles have signed, which of them are withdrawn, and until when that holds. It trusts nothing that an earlier pull
concluded: root by root, then timestamp, snapshot, targets and each line's role, signatures, versions and hashes are checked
again, with the time and the versions that the floor knows. The refresh (``model_sync.upstream``) is checked by the same chain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from tuf.api.exceptions import LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from model_sync import documents, durable
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.floors import BUILT_AT, FLOOR_FILE, Clocks, Floors, iso, issued_at, utc_now

CURRENT = "trust"  # a link to the newest whole set of metadata and documents
MAX_METADATA_BYTES = 5_000_000
MAX_ROOTS = 1024
_Role = TypeVar("_Role", bound=Signed)
_KEEP = "the model in use stays"


@dataclass(frozen=True)
class Chain:
    """Metadata that hangs together by signatures, versions and hashes; expiry is judged apart, by the caller's clock.

    Attributes:
        roles: the roles that the targets role delegates to, verified, in its order; absent ones are left out.
        troubles: why a delegated role that is here cannot be believed; the others are not touched by it.
    """

    root: Root
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
        timestamp = _verified(Timestamp, _read(metadata, Timestamp.type), newest, Timestamp.type)
        snapshot = _listed(Snapshot, metadata, newest, Snapshot.type, timestamp.snapshot_meta)
        targets = _listed(Targets, metadata, newest, Targets.type, snapshot.meta.get("targets.json"))
        chain = cls(newest, timestamp, snapshot, targets)
        roles, troubles = chain._delegated(metadata)
        return cls(newest, timestamp, snapshot, targets, roles, troubles)

    def _delegated(self, metadata: Path) -> tuple[dict[str, Targets], dict[str, TrustError]]:
        roles: dict[str, Targets] = {}
        troubles: dict[str, TrustError] = {}
        for name in self.delegated_names():
            try:
                role = _listed(Targets, metadata, self.targets, name, self.snapshot.meta.get(f"{name}.json"))
                if role.delegations is not None:
                    raise _ambiguous(f"the role {name} delegates further", "a role has one delegator, which is the targets role")
                roles[name] = role
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
                hint=f"ask the central team whether the line was ended; {_KEEP}",
                code="trust.revoked",
            )
        if (first := self.role_of(path)) != role or path in self.targets.targets:
            raise _ambiguous(f"{path} is not {role}'s alone to sign", f"{first or 'targets'} comes first")
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

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "minimum_version": self.index.minimum_version,
            "withdrawn": {item.version: {"reason": item.reason, "at": iso(item.at)} for item in self.index.withdrawn},
            "versions": {item.version: item.digest for item in self.index.versions},
            "valid_until": iso(self.valid_until),
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
        """Say whether anything has expired: withdrawals and minimum still hold, nothing new may be put to work."""
        return self.now >= self.valid_until

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that ``model-sync check`` prints."""
        return {
            "ok": True,
            "now": iso(self.now),
            "valid_until": iso(self.valid_until),
            "expired": self.expired,
            "lines": {name: line.to_dict() for name, line in self.lines.items()},
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
    # The link is followed once: a pull that ends meanwhile cannot mix two sets.
    base = (exchange_dir / CURRENT).resolve() if (exchange_dir / CURRENT).is_symlink() else exchange_dir
    chain = Chain.load(base / "metadata", root)
    chain.refuse_older(floors)
    return facts_of(chain, base / "documents", chain.clocks(floors, system).effective)


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
            hint=f"tell the central team: it was signed by mistake or in bad faith; {_KEEP}",
            code="trust.document",
        )
    return index


def read_document(chain: Chain, directory: Path, path: str, role: str) -> bytes:
    """Return the bytes of a small target from its copy in ``directory``, verified against the chain."""
    target = chain.target(path, role)
    if target is None:
        raise missing(f"{role} signs no {path}")
    try:
        with (directory / path).open("rb") as stream:
            raw = stream.read(min(target.length, MAX_METADATA_BYTES) + 1)
        target.verify_length_and_hashes(raw)
    except FileNotFoundError as error:
        raise missing(f"{path} has not been received") from error
    except LengthOrHashMismatchError as error:
        raise altered(path) from error
    return raw


def newest_root(metadata: Path, root: bytes) -> Root:
    """Go from the provisioned root to the newest one on disk, each signed by the one before it and by itself.

    Raises:
        TrustError: the provisioned root is none.
    """
    trusted = _verified(Root, root, None, Root.type)
    for _ in range(MAX_ROOTS):
        try:
            raw = (metadata / "root_history" / f"{trusted.version + 1}.root.json").read_bytes()
            following = _verified(Root, raw, trusted, Root.type)
        except (OSError, TrustError):
            # A half-written file counts as absent, as in python-tuf: the floor knows whether a newer root was seen.
            return trusted
        if following.version != trusted.version + 1:
            return trusted
        trusted = following
    return trusted


def read_root(path: Path) -> bytes:
    """Return the bytes of the provisioned root.

    Raises:
        TrustError: ``trust.root``: there is none, so nothing can be trusted.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TrustError(
            f"{path} is missing: without the library's first root.json no signature can be checked",
            hint="copy root.json from the central team's installation folder again",
            code="trust.root",
        ) from error


def _read(metadata: Path, role: str) -> bytes:
    try:
        with (metadata / f"{role}.json").open("rb") as stream:
            return stream.read(MAX_METADATA_BYTES)
    except FileNotFoundError as error:
        raise missing(f"no {role} metadata is here") from error


def _listed(kind: type[_Role], metadata: Path, delegator: Root | Targets, role: str, meta: Any) -> _Role:
    """Read a role that the metadata before it names with its version, and with hashes if it likes."""
    if meta is None:
        raise TrustError(
            f"{role} is delegated to, but the snapshot does not name it",
            hint=f"tell the central team: the library is inconsistent; {_KEEP}",
            code="trust.metadata",
        )
    raw = _read(metadata, role)
    try:
        meta.verify_length_and_hashes(raw)
    except LengthOrHashMismatchError as error:
        raise altered(f"the {role} metadata") from error
    signed = _verified(kind, raw, delegator, role)
    if signed.version != meta.version:
        raise TrustError(
            f"the {role} metadata is version {signed.version}, and {meta.version} was announced",
            hint=f"run `model-sync pull`; {_KEEP}",
            code="trust.version",
        )
    return signed


def _verified(kind: type[_Role], raw: bytes, delegator: Root | Targets | None, role: str) -> _Role:
    try:
        metadata = Metadata.from_bytes(raw)
        if not isinstance(metadata.signed, kind):
            raise RepositoryError(f"a {metadata.signed.type} where {kind.__name__} is due")
        if delegator is not None:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        if isinstance(metadata.signed, Root):
            metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except DeserializationError as error:
        raise TrustError(
            f"the {role} metadata is damaged: it cannot be read",
            hint=f"run `model-sync pull`, which fetches it again; {_KEEP}",
            code="trust.metadata",
        ) from error
    except (RepositoryError, ValueError) as error:
        raise TrustError(
            f"the {role} metadata is not signed by those who may sign it ({error})",
            hint=f"tell the central team: somebody may be forging models; {_KEEP}",
            code="trust.signature",
        ) from error
    return cast("_Role", metadata.signed)


def expired(role: str, at: datetime, clocks: Clocks) -> TrustError:
    """Return the error for metadata that is no longer valid; the clocks say whether it or the box is wrong."""
    return TrustError(f"the {role} metadata expired on {iso(at)}: {clocks.describe()}", hint=clocks.hint(), code="trust.expired")


def missing(what: str) -> TrustError:
    """Return the error for something that was never received, or was lost."""
    return TrustError(f"{what}", hint=f"run `model-sync pull`; {_KEEP}", code="trust.missing")


def altered(what: str) -> TrustError:
    """Return the error for bytes that are not those which were signed."""
    return TrustError(
        f"{what} is not what was signed: its length or its hash differs",
        hint=f"run `model-sync pull` again; if it stays, have the disk and the line checked; {_KEEP}",
        code="trust.digest",
    )


def _ambiguous(what: str, why: str) -> TrustError:
    return TrustError(
        f"{what}: {why}", hint=f"tell the central team: who may sign a line must be beyond doubt; {_KEEP}", code="trust.ambiguous"
    )


def print_check(exchange_dir: Path, root: Path) -> int:
    """Print the facts as one JSON object; returns 0 when they are verified, 1 when not."""
    try:
        facts = check(exchange_dir, root).to_dict()
    except (TrustError, LibraryUnreachable) as error:
        facts = {"ok": False, "code": error.code, "message": error.message, "hint": error.hint}
    print(json.dumps(facts, ensure_ascii=False, sort_keys=True))
    return 0 if facts["ok"] else 1
