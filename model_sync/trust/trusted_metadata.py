"""The trusted metadata set of one library, as it lies in a directory: verified root by root, then role by role.

Both the TUF client, after each refresh, and the check without a network verify the same files with this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import Signed, Snapshot, TargetFile, Targets, Timestamp

from model_sync import atomic_files
from model_sync.errors import TrustError
from model_sync.trust import documents
from model_sync.trust.metadata import KEEP, MAX_METADATA_BYTES, altered, ambiguous, expired, listed, missing, newest_root, read, verified
from model_sync.trust.rollback_protection import BUILT_AT, AnchoredRoot, Clocks, Floors, issued_at


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
            except atomic_files.NotPlain:
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
        raw = atomic_files.read(directory / path, MAX_METADATA_BYTES)
        target.verify_length_and_hashes(raw)
    except FileNotFoundError as error:
        raise missing(f"{path} has not been received") from error
    except (LengthOrHashMismatchError, atomic_files.NotPlain) as error:
        raise altered(path) from error
    return raw
