"""The central library: a ``tuf.repository.Repository`` whose offline roles collect signatures one key at a time.

An edit stages a new version of a role under ``staged/``; each holder adds a signature, here or on another machine. When the
thresholds are met, everything that fits together is promoted at once: target files first, then versioned metadata, then the
timestamp, which is what makes boxes see it. A kill at any point leaves the last complete state in public, and the next command
finishes the work.

Every signed document says its role in ``x-role``, so that a signature made for one line cannot be taken for another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import (
    TOP_LEVEL_ROLE_NAMES,
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.repository import Repository

from model_sync import library_check, publish
from model_sync.documents import ROLLOUT_PATTERN, ROLLOUT_ROLE, FailureBudget, LineIndex, line_path, line_patterns
from model_sync.errors import PublishError, SettingsError
from model_sync.keys import Passphrase, load_signer
from model_sync.library_files import Expiry, LibraryConfig, LibraryFiles, read_metadata

ISSUED_AT = "x-issued-at"
ROLE_FIELD = "x-role"
_ONLINE = (Snapshot.type, Timestamp.type)
_FIRST: dict[str, Callable[[], Any]] = {Root.type: Root, Targets.type: Targets}
Signed: TypeAlias = "Root | Targets | Snapshot | Timestamp"


class State(NamedTuple):
    """Where a role stands: who signed the waiting version, how many must, and whether it is public now."""

    role: str
    version: int
    signed: list[str]
    missing: list[str]
    have: int
    need: int
    published: bool


class Library(Repository):
    """One library directory.

    Args:
        directory: made by ``init``.
        signers: keys that sign by themselves whatever they may sign: those of the online roles.
        clock: returns the time now, with zone.
        lock_timeout_s: how long a command waits for another one.
    """

    def __init__(
        self,
        directory: Path,
        signers: Iterable[Signer] = (),
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        lock_timeout_s: float = 30.0,
    ) -> None:
        self.files = LibraryFiles(directory, lock_timeout_s)
        self.signers = {signer.public_key.keyid: signer for signer in signers}
        self._clock = clock
        self._next: dict[str, Metadata] = {}

    @classmethod
    def init(
        cls,
        directory: Path,
        root_keys: list[Key],
        targets_keys: list[Key],
        *,
        snapshot_key: Key,
        timestamp_key: Key,
        threshold: int = 2,
        expiry: Expiry | None = None,
        holders: dict[str, str] | None = None,
        signers: Iterable[Signer] = (),
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> Library:
        """Lay an empty library and stage its first root and targets for their signatures.

        Raises:
            PublishError: there is a library already, or a threshold cannot be met by the keys.
        """
        library = cls(directory, signers, clock=clock)
        if (directory / "library.json").exists():
            raise PublishError(f"{directory} is a library already", hint="choose another directory; nothing was changed")
        for role, keys, need in (("root", root_keys, threshold), ("targets", targets_keys, threshold)):
            _check_threshold(role, keys, need)
        library.files.create()
        library.files.write_config(LibraryConfig(expiry_days=expiry or Expiry(), holders=holders or {}))
        with library.files.locked():
            with library.edit_root() as root:
                for role, keys, need in (
                    ("root", root_keys, threshold),
                    ("targets", targets_keys, threshold),
                    ("snapshot", [snapshot_key], 1),
                    ("timestamp", [timestamp_key], 1),
                ):
                    for key in keys:
                        root.add_key(key, role)
                    root.roles[role].threshold = need
            with library.edit_targets() as targets:
                targets.delegations = Delegations({}, {})
            library.settle()
        return library

    @classmethod
    def open_library(
        cls, directory: Path, passphrase: Passphrase | None = None, *, clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc)
    ) -> Library:
        """Open a library; with ``passphrase`` its online keys too, without it is locked: it can stage, not publish.

        Raises:
            SettingsError: this is no library, or an online key does not open.
        """
        files = LibraryFiles(directory)
        files.config()
        paths = sorted(files.online.glob("*.pem")) if passphrase is not None else []
        return cls(directory, [load_signer(path, passphrase) for path in paths if passphrase is not None], clock=clock)

    # --- what the base class asks for ---------------------------------------------------------------------------------

    def open(self, role: str) -> Metadata:
        """Return the newest metadata of a role: being promoted, staged, published, or a first version."""
        if role in self._next:
            return self._next[role]
        found = self.staged(role) or self.published(role)
        if found is not None:
            return found
        if role == Snapshot.type:
            fresh: Any = Snapshot(meta={})
        elif role == Timestamp.type:
            fresh = Timestamp(snapshot_meta=self.snapshot_info)
        else:
            fresh = _FIRST.get(role, Targets)()
        fresh.unrecognized_fields[ROLE_FIELD] = role
        return Metadata(fresh)

    def close(self, role: str, md: Metadata) -> None:
        """Date and number a changed role, sign it with the keys at hand, and stage it (online roles: keep it to be promoted)."""
        before = self.published(role)
        md.signed.version = before.signed.version + 1 if before is not None else 1
        now = self._clock().replace(microsecond=0)
        md.signed.expires = now + timedelta(days=self.files.config().expiry_days.days(role))
        if role == Timestamp.type:
            md.signed.unrecognized_fields[ISSUED_AT] = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        md.signatures.clear()
        keyids = set(self.keys(role)) | set(md.signed.roles[role].keyids if role == Root.type else ())
        for keyid in sorted(keyids & self.signers.keys()):
            md.sign(self.signers[keyid], append=True)
        if role in _ONLINE:
            self._refuse_locked(role, md)
            self._next[role] = md
        else:
            self.files.write(self.files.staged_path(role), md.to_bytes())

    @property
    def targets_infos(self) -> dict[str, MetaFile]:
        """What the snapshot says of each targets role that is about to be public."""
        return {f"{role}.json": _metafile(md) for role, md in self._next.items() if isinstance(md.signed, Targets)}

    @property
    def snapshot_info(self) -> MetaFile:
        """What the timestamp says of the snapshot."""
        md = self._next.get(Snapshot.type) or self.published(Snapshot.type)
        if md is None:
            raise PublishError("there is no snapshot yet", hint="sign root and targets first")
        return _metafile(md)

    # --- reading ------------------------------------------------------------------------------------------------------

    def staged(self, role: str) -> Metadata | None:
        """Return the version that waits for signatures, or None."""
        path = self.files.staged_path(role)
        return read_metadata(path) if path.is_file() else None

    def staged_roles(self) -> list[str]:
        """Return the roles with a waiting version, in the order in which they are best signed."""
        names = {path.name.removesuffix(".json") for path in self.files.staged.glob("*.json")}
        return [role for role in ("root", "targets") if role in names] + sorted(names - {"root", "targets"})

    def published(self, role: str) -> Metadata | None:
        """Return what boxes see of a role, or None."""
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

    def lines(self) -> list[str]:
        """Return the names of the model lines, waiting ones included."""
        delegations = self.targets().delegations
        return sorted(set(delegations.roles or {}) - {ROLLOUT_ROLE}) if delegations is not None else []

    def role_names(self) -> list[str]:
        """Return every role, waiting ones included."""
        return [Root.type, Targets.type, *_roles(self.targets()), *_ONLINE]

    def public_index(self, line: str) -> LineIndex:
        """Return the index of a line as boxes see it; raises PublishError while the line waits for its signatures."""
        self.index(line)
        md = self.published(line)
        if md is None:
            raise PublishError(f"the line {line!r} is not public yet", hint="have its roles signed: see `model-library status`")
        return LineIndex.parse(self.read_target(md.signed, line_path(line)))

    def delegators(self, role: str) -> list[Root | Targets]:
        """Return who may say which keys a role has: the public delegator, and the waiting one that will follow it."""
        name = Root.type if role in TOP_LEVEL_ROLE_NAMES else Targets.type
        found = [md.signed for md in (self.published(name), self._next.get(name) or self.staged(name)) if md is not None]
        return [signed for signed in found if role in TOP_LEVEL_ROLE_NAMES or role in _roles(signed)]

    def keys(self, role: str) -> dict[str, Key]:
        """Return the keys that may sign a role now or after the waiting rotation."""
        return {keyid: signed.get_key(keyid) for signed in self.delegators(role) for keyid in signed.get_delegated_role(role).keyids}

    def index(self, line: str) -> LineIndex:
        """Return the newest index of a line, waiting changes included.

        Raises:
            PublishError: there is no such line.
        """
        if line not in self.lines():
            known = ", ".join(self.lines()) or "none"
            raise PublishError(f"there is no model line {line!r}", hint=f"add it with `model-library add-line`; known lines: {known}")
        return LineIndex.parse(self.read_target(self.targets(line), line_path(line)))

    def read_target(self, targets: Targets, path: str) -> bytes:
        """Return the bytes of a small target file; raises PublishError when the library has lost it."""
        where = self.files.find_target(targets.targets[path])
        if where is None:
            raise PublishError(f"{path} is signed but its file is missing", hint="restore the library's directory from its backup")
        return where.read_bytes()

    # --- signatures ---------------------------------------------------------------------------------------------------

    def state(self, role: str) -> State:
        """Say who has signed a role's newest version and what is missing."""
        md = self.staged(role) or self.published(role)
        if md is None:
            raise PublishError(f"there is no role {role!r}", hint="`model-library status` lists them")
        config, waiting = self.files.config(), self.staged(role) is not None
        results = [r for r in self._results(role, md) if r is not None]
        signed = {keyid for result in results for keyid in result.signed}
        short = max(results, key=lambda result: result.missing)
        missing = {keyid for result in results if result.missing for keyid in result.unsigned} - signed
        return State(
            role, md.signed.version, sorted(map(config.name, signed)), sorted(map(config.name, missing)),
            len(short.signed), short.threshold, not waiting,
        )  # fmt: skip

    def _results(self, role: str, md: Metadata) -> list[Any]:
        delegators = self.delegators(role)
        if role == Root.type:
            # Both the root before and the new one decide; an already public one has been through that.
            return [signed.get_verification_result(role, md.signed_bytes, md.signatures) for signed in delegators]
        return [delegators[-1].get_verification_result(role, md.signed_bytes, md.signatures)]

    def sign(self, role: str, signer: Signer) -> State:
        """Add one signature to a waiting version and promote what is complete then.

        Raises:
            PublishError: nothing waits, the key is none of the role's, or the online keys are locked (the signature is kept).
        """
        with self.files.locked():
            md = self.staged(role)
            if md is None:
                raise PublishError(f"nothing of {role} waits for a signature", hint="`model-library status` shows what does")
            self._known_key(role, signer.public_key.keyid)
            md.sign(signer, append=True)
            self._check_signature(role, md, signer.public_key.keyid)
            self.files.write(self.files.staged_path(role), md.to_bytes())
            self.settle()
            return self.state(role)

    def merge(self, file: Path) -> State:
        """Take the signatures of a copy of a waiting version that was signed on another machine.

        Raises:
            PublishError: the copy is of a version that does not wait any more, was changed, or has a signature that is wrong or
                of an unknown key. Nothing is taken then.
        """
        with self.files.locked():
            other = read_metadata(file)
            role = str(other.signed.unrecognized_fields.get(ROLE_FIELD, ""))
            md = self.staged(role) if role in self.staged_roles() else None
            self._refuse_stale(file, role, other, md)
            assert md is not None
            fresh = [keyid for keyid in other.signatures if keyid not in md.signatures]
            for keyid in other.signatures:
                self._known_key(role, keyid)
                self._check_signature(role, other, keyid)
            for keyid in fresh:
                md.signatures[keyid] = other.signatures[keyid]
            self.files.write(self.files.staged_path(role), md.to_bytes())
            self.settle()
            return self.state(role)

    def _refuse_stale(self, file: Path, role: str, other: Metadata, md: Metadata | None) -> None:
        if md is not None and other.signed_bytes == md.signed_bytes:
            return
        again = "copy the file from staged/ again and have it signed; nothing was taken"
        newest = md or (self.published(role) if role in self.role_names() else None)
        if newest is None:
            raise PublishError(f"{file.name} is of no role of this library", hint="merge the copy of a file of staged/; nothing was taken")
        if other.signed.version < newest.signed.version or md is None:
            raise PublishError(
                f"{file.name} is {role} version {other.signed.version}; version {newest.signed.version} is"
                f" {'waiting' if md is not None else 'published'}: it is stale", hint=again,
            )  # fmt: skip
        raise PublishError(f"{file.name} is not the {role} that waits here: its content was changed", hint=again)

    def _known_key(self, role: str, keyid: str) -> None:
        if keyid not in (known := self.keys(role)):
            names = ", ".join(sorted(map(self.files.config().name, known)))
            raise PublishError(f"the key {keyid[:8]} is no key of {role}", hint=f"its keys are those of: {names}")

    def _check_signature(self, role: str, md: Metadata, keyid: str) -> None:
        try:
            self.keys(role)[keyid].verify_signature(md.signatures[keyid], md.signed_bytes)
        except UnverifiedSignatureError as error:
            raise PublishError(
                f"the signature of {self.files.config().name(keyid)} does not fit {role}",
                hint="have the file signed again with the right key; nothing was taken",
            ) from error

    # --- promotion ----------------------------------------------------------------------------------------------------

    def settle(self) -> list[str]:
        """Promote everything that is complete and fits together; returns the roles that became public.

        Raises:
            PublishError: something is complete but the online keys are locked; all signatures are kept.
        """
        with self.files.locked():
            self._drop_finished()
            self._next = self._choose() or {}
            if not self._next:
                return []
            try:
                fresh = [role for role, md in self._next.items() if not self._is_published(role, md)]
                self.do_snapshot()
                self.do_timestamp()
                if not fresh and not self._next.keys() & set(_ONLINE):
                    return []
                self._commit(fresh)
            finally:
                self._next = {}
            self._drop_finished()
            return fresh

    def refresh_timestamp(self) -> Timestamp:
        """Sign a new timestamp, and a new snapshot when half of its life is over; for cron.

        Raises:
            PublishError: nothing is published yet, or the online keys are locked.
        """
        with self.files.locked():
            self.settle()
            self._next = self._choose() or {}
            try:
                snapshot = self.published(Snapshot.type)
                if not self._next or snapshot is None:
                    raise PublishError("nothing is published yet", hint="sign root and targets first: see `model-library status`")
                half = timedelta(days=self.files.config().expiry_days.snapshot / 2)
                self.do_snapshot(force=snapshot.signed.expires - self._clock() < half)
                self.do_timestamp(force=True)
                self._commit([])
            finally:
                self._next = {}
            return self.timestamp()

    def _choose(self) -> dict[str, Metadata] | None:
        """Return the newest root, targets and delegated roles that verify each other, or None before the first."""
        for root in self._candidates(Root.type):
            for targets in self._candidates(Targets.type):
                if not _verifies(root.signed, Targets.type, targets):
                    continue
                chosen = {Root.type: root, Targets.type: targets}
                for role in _roles(targets.signed):
                    fitting = [md for md in self._candidates(role) if _verifies(targets.signed, role, md)]
                    if not fitting:
                        break
                    chosen[role] = fitting[0]
                else:
                    return chosen
        return None

    def _candidates(self, role: str) -> list[Metadata]:
        staged, public = self.staged(role), self.published(role)
        if staged is not None and (staged.signed.is_expired(self._clock()) or not self._root_complete(role, staged, public)):
            staged = None
        return [md for md in (staged, public) if md is not None]

    @staticmethod
    def _root_complete(role: str, staged: Metadata, public: Metadata | None) -> bool:
        if role != Root.type:
            return True
        previous = public.signed if public is not None else None
        return bool(staged.signed.get_root_verification_result(previous, staged.signed_bytes, staged.signatures))

    def _is_published(self, role: str, md: Metadata) -> bool:
        public = self.published(role)
        return public is not None and public.signed.version == md.signed.version

    def _commit(self, fresh: list[str]) -> None:
        """Write the chosen state: files, versioned metadata, and last what makes boxes see it."""
        for role in fresh:
            if isinstance(signed := self._next[role].signed, Targets):
                self._publish_files(signed)
        for role in [*(role for role in fresh if role != Root.type), Snapshot.type]:
            if role in self._next:
                self._write_public(role)
        last = [Timestamp.type]
        if Root.type in fresh:
            # A box may come between the two: the first of them has to fit what is there already.
            last = [Timestamp.type, Root.type] if self._fits_old_root() else [Root.type, Timestamp.type]
        for role in last:
            if role in self._next:
                self._write_public(role)

    def _fits_old_root(self) -> bool:
        before = self.published(Root.type)
        roles = [role for role in (Timestamp.type, Snapshot.type, Targets.type) if role in self._next]
        if before is None or all(
            public is not None and _verifies(self._next[Root.type].signed, role, public)
            for role in roles
            for public in [self.published(role)]
        ):
            return False  # what is public fits the new root too: the timestamp comes last, as always
        return all(_verifies(before.signed, role, self._next[role]) for role in roles)

    def _write_public(self, role: str) -> None:
        md = self._next[role]
        version = None if role == Timestamp.type else md.signed.version
        self.files.write(self.files.metadata_path(role, version), md.to_bytes())

    def _publish_files(self, targets: Targets) -> None:
        for target in targets.targets.values():
            (name,) = target.get_prefixed_paths()
            where = self.files.find_target(target)
            if where is None:
                raise PublishError(
                    f"{target.path} is signed but its file is missing", hint="publish the bundle again; boxes see the old state"
                )
            if where != self.files.public / "targets" / name:
                self.files.move(where, self.files.public / "targets" / name)

    def _drop_finished(self) -> None:
        for role in self.staged_roles():
            md = self.staged(role)
            if md is not None and (public := self.published(role)) is not None and public.signed.version >= md.signed.version:
                self.files.staged_path(role).unlink()

    def _refuse_locked(self, role: str, md: Metadata) -> None:
        root = self._next[Root.type].signed
        if not _verifies(root, role, md):
            raise PublishError(
                f"the key of {role} is not at hand, so nothing new was published; all signatures are kept",
                hint="run `model-library refresh-timestamp` where the online keys and their passphrase are",
            )

    # --- lines and keys -----------------------------------------------------------------------------------------------

    def add_line(self, name: str, keys: list[Key], threshold: int = 2) -> State:
        """Delegate a new model line to ``keys``; its role and ``targets`` wait for their signatures.

        Raises:
            PublishError: the name is taken or not allowed, or the threshold cannot be met.
        """
        index = LineIndex(line=name, minimum_version="0.0.0", versions=[])
        publish.check_line_name(name)
        return self._delegate(name, keys, threshold, line_patterns(name), {line_path(name): index.to_json()})

    def set_rollout_keys(self, keys: list[Key], threshold: int = 1) -> State:
        """Delegate ``rollout/*.json``; given again, the keys replace the old ones."""
        with self.files.locked():
            if ROLLOUT_ROLE in _roles(self.targets()):
                return self._change_keys(ROLLOUT_ROLE, keys, threshold)
            return self._delegate(ROLLOUT_ROLE, keys, threshold, [ROLLOUT_PATTERN], {})

    def _delegate(self, name: str, keys: list[Key], threshold: int, patterns: list[str], files: dict[str, bytes]) -> State:
        _check_threshold(name, keys, threshold)
        with self.files.locked():
            self._refuse_second_delegator(name, patterns)
            with self.edit_targets() as targets:
                delegations = targets.delegations or Delegations({}, {})
                targets.delegations = delegations
                assert delegations.roles is not None
                delegations.roles[name] = DelegatedRole(name, [], threshold, True, patterns)
                for key in keys:
                    targets.add_key(key, name)
            self.stage_files(name, files)
            self.settle()
            return self.state(name)

    def _refuse_second_delegator(self, name: str, patterns: list[str]) -> None:
        for other, role in _roles(self.targets()).items():
            if other == name and self.staged(name) is None and self.published(name) is None:
                continue  # a command was killed between its two files: do it again
            if other == name or any(role.is_delegated_path(pattern.replace("*", "x")) for pattern in patterns):
                raise PublishError(
                    f"{name!r} is delegated already: a role has one delegator",
                    hint="`model-library rotate-key` changes its keys; choose another name for another line",
                )

    def stage_files(self, role: str, files: dict[str, bytes], extra: Iterable[TargetFile] = (), drop: Iterable[str] = ()) -> None:
        """Stage a new version of a role with small files, and with targets whose files lie staged already."""
        with self.edit_targets(role) as targets:
            for path, data in files.items():
                target = TargetFile.from_data(path, data)
                (name,) = target.get_prefixed_paths()
                if self.files.find_target(target) is None:
                    self.files.write(self.files.staged / "targets" / name, data)
                targets.targets[path] = target
            for target in extra:
                targets.targets[target.path] = target
            for path in drop:
                targets.targets.pop(path, None)

    def rotate_key(self, role: str, old_keyid: str | None, new_key: Key | None, *, threshold: int | None = None) -> list[str]:
        """Replace a key of a role (None for old adds, None for new removes); returns the roles that wait for signatures now.

        A lost key is replaced the same way: the threshold of the others signs. A new root needs the old and the new root's
        threshold; a role whose signatures no longer suffice is staged again beside it, and both are published together.

        Raises:
            PublishError: no such role or key, the new key is there already, or too few keys would be left.
        """
        with self.files.locked():
            delegator = self.open(Root.type if role in TOP_LEVEL_ROLE_NAMES else Targets.type).signed
            if role not in TOP_LEVEL_ROLE_NAMES and role not in _roles(delegator):
                raise PublishError(f"there is no role {role!r}", hint="`model-library status` lists the roles")
            current: Role = delegator.get_delegated_role(role)
            if old_keyid is not None and old_keyid not in current.keyids:
                raise PublishError(f"{old_keyid[:8]} is no key of {role}", hint="`model-library status` lists the keys of each role")
            if new_key is not None and new_key.keyid in current.keyids:
                raise PublishError(f"{new_key.keyid[:8]} is a key of {role} already", hint="make a new key with `model-library key new`")
            keys = [delegator.get_key(keyid) for keyid in current.keyids if keyid != old_keyid]
            self._change_keys(role, keys + ([new_key] if new_key is not None else []), threshold or current.threshold)
            return self.staged_roles()

    def _change_keys(self, role: str, keys: list[Key], threshold: int) -> State:
        _check_threshold(role, keys, threshold)
        with self.edit(Root.type if role in TOP_LEVEL_ROLE_NAMES else Targets.type) as delegator:
            assert isinstance(delegator, (Root, Targets))
            for keyid in list(delegator.get_delegated_role(role).keyids):
                if keyid not in {key.keyid for key in keys}:
                    delegator.revoke_key(keyid, role)
            for key in keys:
                delegator.add_key(key, role)
            delegator.get_delegated_role(role).threshold = threshold
        newest = self.staged(role) or self.published(role)
        if role not in (Root.type, *_ONLINE) and newest is not None and not _verifies(self.delegators(role)[-1], role, newest):
            self.renew(role)
        self.settle()
        return self.state(role)

    def renew(self, role: str) -> State:
        """Stage an offline role again as it is, with a new expiry."""
        with self.files.locked():
            if role in _ONLINE or role not in self.role_names():
                raise PublishError(
                    f"{role!r} is no role that people sign", hint="snapshot and timestamp: `model-library refresh-timestamp`"
                )
            with self.edit(role):
                pass
            self.settle()
            return self.state(role)

    def name_holders(self, names: dict[str, str]) -> None:
        """Remember who holds which key, for people; nothing of it is signed."""
        with self.files.locked():
            config = self.files.config()
            self.files.write_config(config.model_copy(update={"holders": {**config.holders, **names}}))

    # --- models (publish.py) and checks (library_check.py) ------------------------------------------------------------

    def publish(self, bundle: Path, *, deltas: bool = True, minimum_version: str | None = None, **options: Any) -> State:
        """Stage one version of a line; see ``publish.publish``."""
        return publish.publish(self, bundle, deltas=deltas, minimum_version=minimum_version, **options)

    def withdraw(self, line: str, version: str, reason: str) -> State:
        """Stage the withdrawal of a version; see ``publish.withdraw``."""
        return publish.withdraw(self, line, version, reason)

    def set_minimum(self, line: str, version: str) -> State:
        """Stage a higher oldest version; see ``publish.set_minimum``."""
        return publish.set_minimum(self, line, version)

    def rollout(
        self,
        ring: str,
        line: str,
        version: str,
        percent: float = 100.0,
        start: datetime | None = None,
        duration_h: float = 0.0,
        failure_budget: FailureBudget | None = None,
        paused: bool = False,
    ) -> State:
        """Stage which version a ring's boxes take; see ``publish.rollout``."""
        step = publish.Choice(version, percent, start or self.now(), duration_h, failure_budget or FailureBudget(), paused)
        return publish.rollout(self, ring, line, step)

    def now(self) -> datetime:
        """Return the time now in whole seconds, UTC."""
        return self._clock().replace(microsecond=0)

    def status(self) -> dict[str, Any]:
        """Return each role's version, expiry, signatures and keys; see ``library_check.status``."""
        return library_check.status(self)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> library_check.Verified:
        """Walk the whole public tree; see ``library_check.verify``."""
        return library_check.verify(self.files.public, self.now(), progress)


def _metafile(md: Metadata) -> MetaFile:
    return MetaFile.from_data(md.signed.version, md.to_bytes(), ["sha256"])


def _roles(signed: Any) -> dict[str, DelegatedRole]:
    delegations = getattr(signed, "delegations", None)
    return dict(delegations.roles or {}) if delegations is not None else {}


def _verifies(delegator: Root | Targets, role: str, md: Metadata) -> bool:
    try:
        delegator.verify_delegate(role, md.signed_bytes, md.signatures)
    except UnsignedMetadataError:
        return False
    return True


def _check_threshold(role: str, keys: list[Key], threshold: int) -> None:
    if len({key.keyid for key in keys}) != len(keys):
        raise PublishError(f"a key of {role} is given twice", hint="each holder has a key of their own; nothing was changed")
    if not 1 <= threshold <= len(keys):
        raise PublishError(
            f"{role}: {len(keys)} keys cannot give {threshold} signatures", hint="give more keys or a lower threshold; nothing was changed"
        )
