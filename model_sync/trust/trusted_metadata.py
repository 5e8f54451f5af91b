"""The trusted metadata set of one library in a directory: verified root by root, then role by role.

The TUF client, after each refresh, and the check without a network both use this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import Signed, Snapshot, TargetFile, Targets, Timestamp

from model_sync import atomic_files
from model_sync.errors import Action, TrustError
from model_sync.trust import documents
from model_sync.trust.metadata import (
    MAX_METADATA_BYTES,
    altered,
    ambiguous,
    expired,
    listed,
    load_newest_root,
    missing,
    read,
    verified,
)
from model_sync.trust.rollback_protection import BUILT_AT, AnchoredRoot, Clocks, RollbackState, issued_at


@dataclass(frozen=True)
class TrustedMetadata:
    """Metadata whose signatures, versions and hashes are verified; expiry is checked separately, with the caller's clock.

    Attributes:
        roles: the verified roles that the targets role delegates to, in its order; absent ones are left out.
        problems: why the check of a delegated role failed; the other roles are not affected.
    """

    root: AnchoredRoot
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets
    roles: Mapping[str, Targets] = field(default_factory=dict)
    problems: Mapping[str, TrustError] = field(default_factory=dict)

    @classmethod
    def load(cls, metadata: Path, root: bytes) -> TrustedMetadata:
        """Verify the metadata directory of a python-tuf client, starting from the bytes of the provisioned root.

        Raises:
            TrustError: ``trust.missing``, ``trust.signature``, ``trust.version``, ``trust.digest`` or ``trust.metadata``.
            OSError: a file exists and cannot be read.
        """
        newest = load_newest_root(metadata, root)
        timestamp = verified(Timestamp, read(metadata, Timestamp.type), newest, Timestamp.type)
        snapshot = listed(Snapshot, metadata, newest, Snapshot.type, timestamp.snapshot_meta)
        targets = listed(Targets, metadata, newest, Targets.type, snapshot.meta.get("targets.json"))
        unchecked = cls(newest, timestamp, snapshot, targets)
        roles, problems = unchecked._load_delegated(metadata)
        return cls(newest, timestamp, snapshot, targets, roles, problems)

    def _load_delegated(self, metadata: Path) -> tuple[dict[str, Targets], dict[str, TrustError]]:
        roles: dict[str, Targets] = {}
        problems: dict[str, TrustError] = {}
        for name in self.delegated_names():
            try:
                role = listed(Targets, metadata, self.targets, name, self.snapshot.meta.get(f"{name}.json"))
                if role.delegations is not None:
                    raise ambiguous(f"the role {name} delegates further", "a role has one delegator, which is the targets role")
                roles[name] = role
            except atomic_files.NotRegularFileError:
                problems[name] = altered(f"the {name} metadata")
            except TrustError as error:
                problems[name] = error
        return roles, problems

    def delegated_names(self) -> list[str]:
        """Return the names of the roles that the targets role delegates to, in its order."""
        delegations = self.targets.delegations
        return list(delegations.roles) if delegations is not None and delegations.roles else []

    def line_names(self) -> list[str]:
        """Return the model lines that the library has today."""
        return [name for name in self.delegated_names() if name != documents.ROLLOUT_ROLE]

    def role_of(self, path: str) -> str | None:
        """Return the role that may sign a target path: the first in order; None when there is none."""
        delegations = self.targets.delegations
        return next((name for name, _ in delegations.get_roles_for_target(path)), None) if delegations is not None else None

    def target(self, path: str, role: str) -> TargetFile | None:
        """Return the target that ``role`` signs at ``path``, or None.

        Raises:
            TrustError: ``trust.revoked``, ``trust.ambiguous``, or the problem of the role.
        """
        if role not in self.delegated_names():
            raise TrustError(
                f"the library no longer delegates to {role}: signatures of its keys are not valid",
                code="trust.revoked",
                action=Action.NONE,
            )
        if (first := self.role_of(path)) != role or path in self.targets.targets:
            raise ambiguous(f"{role} is not the only role that may sign {path}", f"{first or 'targets'} comes first")
        if role in self.problems:
            raise self.problems[role]
        return self.roles[role].targets.get(path)

    def valid_until(self, *roles: str) -> datetime:
        """Return the earliest expiry of root, timestamp, snapshot, targets and of the named roles."""
        signed: list[Signed] = [self.root, self.timestamp, self.snapshot, self.targets]
        return min(part.expires for part in (*signed, *(self.roles[name] for name in roles if name in self.roles)))

    def refuse_expired(self, clocks: Clocks, *roles: str) -> None:
        """Check expiry against the effective time.

        Raises:
            TrustError: ``trust.expired``, naming the role and all the clocks.
        """
        top: dict[str, Signed] = {"root": self.root, "timestamp": self.timestamp, "snapshot": self.snapshot, "targets": self.targets}
        for name, signed in (top | {name: self.roles[name] for name in roles if name in self.roles}).items():
            if signed.is_expired(clocks.effective):
                raise expired(name, signed.expires, clocks)

    def refuse_older(self, rollback_state: RollbackState) -> None:
        """Compare with the versions seen before; raise TrustError ``trust.rollback`` when one is older."""
        rollback_state.refuse_older(self.root, self.timestamp, self.snapshot)

    def clocks(
        self, rollback_state: RollbackState, system: datetime, server: datetime | None = None, built_at: datetime = BUILT_AT
    ) -> Clocks:
        """Return the clocks; the issue time of this timestamp metadata raises the earliest possible time."""
        issued = min(issued_at(self.timestamp) or built_at, self.timestamp.expires)
        return Clocks(system, max(rollback_state.earliest_time(self.root, built_at), issued), server)


def read_index(trusted: TrustedMetadata, directory: Path, line: str) -> documents.LineIndex:
    """Return the index of a model line from its copy in ``directory``, after all checks.

    Raises:
        TrustError: the role, the copy or the document failed a check, or is not here.
    """
    index = documents.LineIndex.parse(read_document(trusted, directory, documents.line_path(line), line))
    if index.line != line:
        raise TrustError(f"the index that {line} signs is of {index.line}", code="trust.document", action=Action.OPERATOR)
    return index


def read_document(trusted: TrustedMetadata, directory: Path, path: str, role: str) -> bytes:
    """Return the bytes of a small target from its copy in ``directory``, verified against the signed hash of ``role``."""
    target = trusted.target(path, role)
    if target is None:
        raise missing(f"{role} signs no {path}")
    if any((directory / folder).is_symlink() for folder in PurePosixPath(path).parents):
        raise altered(path)
    try:
        raw = atomic_files.read(directory / path, MAX_METADATA_BYTES)
        target.verify_length_and_hashes(raw)
    except FileNotFoundError as error:
        raise missing(f"{path} has not been received") from error
    except (LengthOrHashMismatchError, atomic_files.NotRegularFileError) as error:
        raise altered(path) from error
    return raw
