"""The roles of a library: their staged and published metadata, their keys, and which signatures they have.

The base of ``model_sync.library.library.Library``: python-tuf's ``Repository`` on the files of one directory. Every signed document names
its role in ``x-role``, so that a signature for one model line is not valid for another; the timestamp has its signing time in
``x-issued-at``, which helps a box without a working clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import (
    TOP_LEVEL_ROLE_NAMES,
    DelegatedRole,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.repository import Repository

from model_sync.errors import PublishError
from model_sync.library.files import LibraryFiles, read_metadata
from model_sync.library.keys import Passphrase, load_holder, load_signer, public_path
from model_sync.trust.documents import ROLLOUT_ROLE, LineIndex, line_path
from model_sync.trust.metadata import MAX_METADATA_BYTES
from model_sync.trust.rollback_protection import ISSUED_AT, iso, utc_now

ROLE_FIELD = "x-role"
_ROOM_FOR_SIGNATURES = 100_000
ONLINE = (Snapshot.type, Timestamp.type)
AnyMetadata: TypeAlias = "Metadata[Any]"
Clock: TypeAlias = Callable[[], datetime]


class RoleState(NamedTuple):
    """The state of a role.

    Attributes:
        role: its name.
        version: the version of its newest metadata, waiting or published.
        signed: key holders who have signed.
        missing: key holders who may still sign when a signature is missing.
        have: number of signatures; for a rotated root the lower count of the old and the new root.
        need: number of required signatures.
        published: whether the newest version is public.
    """

    role: str
    version: int
    signed: list[str]
    missing: list[str]
    have: int
    need: int
    published: bool


class OnlineKeys:
    """The encrypted keys under ``online/``, opened only when one of them has to sign."""

    def __init__(self, directory: Path, passphrase: Passphrase | None) -> None:
        self._passphrase = passphrase
        self._secret: str | None = None
        self._signers: dict[str, Signer] = {}
        self.paths = {load_holder(path).key.keyid: path for path in sorted(directory.glob("*.pem")) if public_path(path).is_file()}

    def signer(self, keyid: str) -> Signer | None:
        """Return the signer of a key; None when the key is not here or there is no passphrase.

        Raises:
            SettingsError: the key cannot be decrypted.
        """
        if keyid not in self.paths or self._passphrase is None:
            return None
        if keyid not in self._signers:
            self._signers[keyid] = load_signer(self.paths[keyid], self._ask)
        return self._signers[keyid]

    def _ask(self, what: str) -> str:
        # All online keys have the same passphrase, so it is asked for once.
        if self._secret is None and self._passphrase is not None:
            self._secret = self._passphrase(f"online keys ({what})")
        return self._secret or ""


class LibraryRoles(Repository):
    """Reads and stages the metadata of one library.

    Args:
        directory: the directory of the library.
        signers: signers that are always available.
        passphrase: decrypts the keys under ``online/``; None leaves them locked.
        clock: returns the time now, with zone.
        lock_timeout_s: how long a command waits for another one.
    """

    def __init__(
        self,
        directory: Path,
        signers: Iterable[Signer] = (),
        *,
        passphrase: Passphrase | None = None,
        clock: Clock = utc_now,
        lock_timeout_s: float = 30.0,
    ) -> None:
        self.files = LibraryFiles(directory, lock_timeout_s)
        self.signers = {signer.public_key.keyid: signer for signer in signers}
        self.online = OnlineKeys(self.files.online, passphrase)
        self._clock = clock
        self._next: dict[str, AnyMetadata] = {}

    def now(self) -> datetime:
        """Return the time now in whole seconds, UTC."""
        return self._clock().replace(microsecond=0)

    def open(self, role: str) -> AnyMetadata:
        """Return the newest metadata of a role: being promoted, staged, published, or a first version."""
        newest = self._next.get(role) or self.staged(role) or self.latest(role)
        if newest is not None:
            return newest
        if role == Root.type:
            fresh: Any = Root()
        elif role == Snapshot.type:
            fresh = Snapshot(meta={})
        elif role == Timestamp.type:
            fresh = Timestamp(snapshot_meta=self.snapshot_info)
        else:
            fresh = Targets()
        fresh.unrecognized_fields[ROLE_FIELD] = role
        return Metadata(fresh)

    def close(self, role: str, md: AnyMetadata) -> None:
        """Set version and expiry of a changed role, sign it with the available keys, and stage it (online roles: hold it)."""
        before = self.latest(role)
        md.signed.version = before.signed.version + 1 if before is not None else 1
        md.signed.expires = self.now() + timedelta(days=self.files.config().expiry_days.days(role))
        if role == Timestamp.type:
            md.signed.unrecognized_fields[ISSUED_AT] = iso(self.now())
        md.signatures.clear()
        if len(md.to_bytes()) > MAX_METADATA_BYTES - _ROOM_FOR_SIGNATURES:
            raise PublishError(
                f"the metadata of {role} would be larger than {MAX_METADATA_BYTES} bytes, which is the most that a box reads",
                hint="nothing was published: use a new model line (`model-library add-line`)",
                code="library.refused",
            )
        keyids = set(self.keys(role)) | set(md.signed.roles[role].keyids if role == Root.type else ())
        for signer in self.available_signers(keyids):
            md.sign(signer, append=True)
        if role not in ONLINE:
            self.files.write(self.files.staged_path(role), md.to_bytes())
            return
        if not verifies(self.open(Root.type).signed, role, md):
            raise PublishError(
                f"the key of {role} is locked or not here, so nothing new was published; all signatures are kept",
                hint="run `model-library refresh-timestamp` where the online keys and their passphrase are",
                code="library.keys",
            )
        self._next[role] = md

    @property
    def targets_infos(self) -> dict[str, MetaFile]:
        """The snapshot's entries of the targets roles that are being promoted."""
        return {f"{role}.json": _metafile(md) for role, md in self._next.items() if isinstance(md.signed, Targets)}

    @property
    def snapshot_info(self) -> MetaFile:
        """The timestamp's entry of the snapshot."""
        return _metafile(self.open(Snapshot.type))

    def staged(self, role: str) -> AnyMetadata | None:
        """Return the version that waits for signatures, or None."""
        path = self.files.staged_path(role)
        return read_metadata(path) if path.is_file() else None

    def staged_roles(self) -> list[str]:
        """Return the roles with a waiting version, in the recommended order of signing."""
        names = {path.name.removesuffix(".json") for path in self.files.staged.glob("*.json")}
        return [role for role in (Root.type, Targets.type) if role in names] + sorted(names - {Root.type, Targets.type})

    def published(self, role: str) -> AnyMetadata | None:
        """Return the public metadata of a role, or None; None also for a model line that was ended."""
        if role not in TOP_LEVEL_ROLE_NAMES and ((top := self.latest(Targets.type)) is None or role not in delegated(top.signed)):
            return None
        return self.latest(role)

    def latest(self, role: str) -> AnyMetadata | None:
        """Return the newest public metadata of a role, also of an ended model line, whose version numbers continue."""
        if role == Root.type:
            version = 0
            while self.files.metadata_path(role, version + 1).is_file():
                version += 1
            return read_metadata(self.files.metadata_path(role, version)) if version else None
        path = self.files.metadata_path(Timestamp.type)
        if not path.is_file():
            return None
        timestamp = read_metadata(path)
        if role == Timestamp.type:
            return timestamp
        snapshot = read_metadata(self.files.metadata_path(Snapshot.type, timestamp.signed.snapshot_meta.version))
        if role == Snapshot.type:
            return snapshot
        info = snapshot.signed.meta.get(f"{role}.json")
        return read_metadata(self.files.metadata_path(role, info.version)) if info is not None else None

    def role_names(self) -> list[str]:
        """Return every role, waiting ones included."""
        return [Root.type, Targets.type, *delegated(self.targets()), *ONLINE]

    def stage_files(self, role: str, files: dict[str, bytes], extra: Iterable[TargetFile] = ()) -> None:
        """Stage a new version of a role with small files, and with targets whose files are already in the library."""
        with self.edit_targets(role) as targets:
            for path, data in files.items():
                target = TargetFile.from_data(path, data)
                if self.files.find_target(target) is None:
                    self.files.write(self.files.staged_target(target), data)
                targets.targets[path] = target
            for target in extra:
                targets.targets[target.path] = target

    def read_target(self, targets: Targets, path: str) -> bytes:
        """Return the bytes of a small target file; raise PublishError when it is missing."""
        target = targets.targets.get(path)
        where = self.files.find_target(target) if target is not None else None
        if where is None:
            raise PublishError(
                f"the library has no {path}",
                hint="restore its directory from a backup, or add the model line again",
                code="library.refused",
            )
        return where.read_bytes()

    def lines(self) -> list[str]:
        """Return the names of the model lines, waiting ones included."""
        return sorted(set(delegated(self.targets())) - {ROLLOUT_ROLE})

    def index(self, line: str) -> LineIndex:
        """Return the newest index of a model line, waiting changes included.

        Raises:
            PublishError: there is no such model line.
        """
        if line not in self.lines():
            known = ", ".join(self.lines()) or "none"
            raise PublishError(
                f"there is no model line {line!r}", hint=f"add it with `model-library add-line`; model lines: {known}", code="library.role"
            )
        return LineIndex.parse(self.read_target(self.targets(line), line_path(line)))

    def public_index(self, line: str) -> LineIndex:
        """Return the public index of a model line; raise PublishError while it waits for its first signatures."""
        self.index(line)
        md = self.published(line)
        if md is None:
            raise PublishError(f"the model line {line!r} is not public yet", code="library.role")
        return LineIndex.parse(self.read_target(md.signed, line_path(line)))

    def delegators(self, role: str) -> list[Root | Targets]:
        """Return the delegators that define the keys of a role: the public one, and the waiting one."""
        name = Root.type if role in TOP_LEVEL_ROLE_NAMES else Targets.type
        delegators = [md.signed for md in (self.published(name), self._next.get(name) or self.staged(name)) if md is not None]
        return [signed for signed in delegators if role in TOP_LEVEL_ROLE_NAMES or role in delegated(signed)]

    def keys(self, role: str) -> dict[str, Key]:
        """Return the keys that may sign a role now or after the waiting rotation."""
        return {keyid: signed.get_key(keyid) for signed in self.delegators(role) for keyid in signed.get_delegated_role(role).keyids}

    def available_signers(self, keyids: Iterable[str]) -> list[Signer]:
        """Return the available signers of some keys."""
        signers = (self.signers.get(keyid) or self.online.signer(keyid) for keyid in sorted(keyids))
        return [signer for signer in signers if signer is not None]

    def state(self, role: str) -> RoleState:
        """Return who has signed a role's newest version and what is missing; raise PublishError for an unknown role."""
        waiting = self.staged(role)
        md = waiting or self.published(role)
        if md is None or not (delegators := self.delegators(role)):
            raise PublishError(f"there is no role {role!r}", code="library.role")
        # A root is verified by the root before it and by itself; every other role by its newest delegator.
        verifiers = delegators if role == Root.type else delegators[-1:]
        results = [verifier.get_verification_result(role, md.signed_bytes, md.signatures) for verifier in verifiers]
        strict = max(results, key=lambda result: result.missing)
        signed = {keyid for result in results for keyid in result.signed}
        missing = {keyid for result in results if result.missing for keyid in result.unsigned}
        name = self.files.config().name
        return RoleState(
            role=role,
            version=md.signed.version,
            signed=sorted(map(name, signed)),
            missing=sorted(map(name, missing)),
            have=len(strict.signed),
            need=strict.threshold,
            published=waiting is None,
        )


def delegated(signed: Any) -> dict[str, DelegatedRole]:
    """Return the roles that a targets document delegates to."""
    delegations = getattr(signed, "delegations", None)
    return dict(delegations.roles or {}) if delegations is not None else {}


def verifies(delegator: Root | Targets, role: str, md: AnyMetadata) -> bool:
    """Return whether ``delegator`` accepts the signatures of a role's metadata."""
    try:
        delegator.verify_delegate(role, md.signed_bytes, md.signatures)
    except UnsignedMetadataError:
        return False
    return True


def _metafile(md: AnyMetadata) -> MetaFile:
    return MetaFile.from_data(md.signed.version, md.to_bytes(), ["sha256"])
