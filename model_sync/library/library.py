"""The central library and the operations of the central team.

An edit stages a new version of an offline role; each key holder adds a signature, here or on another machine; a complete version
becomes public automatically (``promotion``). ``roles`` reads, numbers and signs the roles.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, DelegatedRole, Delegations, Root, Targets

from model_sync.errors import PublishError
from model_sync.library import check as library_check
from model_sync.library import status as library_status
from model_sync.library.barred_rollouts import FieldResults
from model_sync.library.files import CONFIG_NAME, Expiry, LibraryConfig, read_metadata
from model_sync.library.keys import Passphrase, token_error
from model_sync.library.promotion import LibraryPromotion
from model_sync.library.publish import check_line_name
from model_sync.library.roles import ONLINE, ROLE_FIELD, AnyMetadata, Clock, RoleState, delegated
from model_sync.trust.documents import ROLLOUT_PATTERN, ROLLOUT_ROLE, LineIndex, line_path, line_patterns
from model_sync.trust.rollback_protection import utc_now

_UNCHANGED = "; nothing was changed"


class Library(LibraryPromotion):
    """One library directory; the constructor's arguments are those of ``LibraryRoles``."""

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
        passphrase: Passphrase | None = None,
        clock: Clock = utc_now,
    ) -> Library:
        """Create an empty library and stage its first root and targets for signatures.

        Raises:
            PublishError: there is a library already, or the keys cannot meet a threshold.
        """
        roles = {"root": root_keys, "targets": targets_keys, "snapshot": [snapshot_key], "timestamp": [timestamp_key]}
        thresholds = {role: 1 if role in ONLINE else threshold for role in roles}
        for role, keys in roles.items():
            _check_threshold(role, keys, thresholds[role])
        library = cls(directory, signers, passphrase=passphrase, clock=clock)
        if (directory / CONFIG_NAME).exists() and (library.staged(Targets.type) or library.published(Root.type)) is not None:
            raise PublishError(f"{directory} is a library already{_UNCHANGED}", code="library.exists")
        library.files.create()
        library.files.write_config(LibraryConfig(expiry_days=expiry or Expiry(), holders=holders or {}))
        with library.files.locked():
            with library.edit_root() as root:
                for role, keys in roles.items():
                    root.roles[role].keyids.clear()
                    root.roles[role].threshold = thresholds[role]
                    for key in keys:
                        root.add_key(key, role)
            with library.edit_targets() as targets:
                targets.delegations = Delegations({}, {})
            library.promote_complete()
        return library

    @classmethod
    def open_library(cls, directory: Path, passphrase: Passphrase | None = None, *, clock: Clock = utc_now) -> Library:
        """Open a library; without ``passphrase`` its online keys stay locked: it can stage and collect signatures, but not publish.

        Raises:
            SettingsError: this is no library.
        """
        library = cls(directory, passphrase=passphrase, clock=clock)
        library.files.config()
        return library

    def name_holders(self, names: dict[str, str]) -> None:
        """Store the names of key holders, for people; they are not signed."""
        with self.files.locked():
            config = self.files.config()
            self.files.write_config(config.model_copy(update={"holders": {**config.holders, **names}}))

    def sign(self, role: str, signer: Signer, *, shown: AnyMetadata | None = None) -> RoleState:
        """Add one signature to a waiting version and promote every version that is then complete.

        Args:
            role: the role whose version waits.
            signer: one of its keys.
            shown: the version that was shown to the key holder; only this one is signed.

        Raises:
            PublishError: nothing waits, the version is not the shown one, the key does not belong to the role, or the online keys
                are locked (the signature is kept).
            SettingsError: the token does not sign.
        """
        with self.files.locked():
            md = self._waiting(role)
            if shown is not None and shown.signed_bytes != md.signed_bytes:
                raise PublishError(
                    f"{role} was changed while you read it; nothing was signed", hint="run the command again", code="library.stale"
                )
            self._known_key(role, signer.public_key.keyid)
            add_signature(md, signer)
            self._check_signature(role, md, signer.public_key.keyid)
            self.files.write(self.files.staged_path(role), md.to_bytes())
            self.promote_complete()
            return self.state(role)

    def merge(self, file: Path) -> RoleState:
        """Merge the signatures of a copy of a waiting version that was signed on another machine.

        Raises:
            PublishError: the copy is of a version that no longer waits, was changed, or has a signature that is wrong or of an
                unknown key. Then nothing is merged.
        """
        with self.files.locked():
            other = read_metadata(file)
            role = str(other.signed.unrecognized_fields.get(ROLE_FIELD, ""))
            md = self._same_payload(file.name, role, other)
            for keyid in other.signatures:
                self._known_key(role, keyid)
                self._check_signature(role, other, keyid)
            md.signatures = {**other.signatures, **md.signatures}
            self.files.write(self.files.staged_path(role), md.to_bytes())
            self.promote_complete()
            return self.state(role)

    def _waiting(self, role: str) -> AnyMetadata:
        md = self.staged(role) if role in self.role_names() else None
        if md is None:
            raise PublishError(f"nothing of {role} waits for a signature", code="library.unsigned")
        if md.signed.is_expired(self.now()):
            raise PublishError(
                f"{role} expired while it waited for signatures",
                hint=f"`model-library renew {role}` stages it again",
                code="library.unsigned",
            )
        return md

    def _same_payload(self, name: str, role: str, other: AnyMetadata) -> AnyMetadata:
        """Return the waiting version of which ``other`` is a copy; raise PublishError when there is none."""
        if role not in self.role_names():
            raise PublishError(f"{name} is of no role of this library; nothing was merged", code="library.stale")
        staged, public = self.staged(role), self.published(role)
        if public is not None and other.signed.version <= public.signed.version:
            raise PublishError(
                f"{name} is stale: it is {role} version {other.signed.version}, and {public.signed.version} is published",
                code="library.stale",
            )
        md = self._waiting(role)
        if staged is None or other.signed_bytes != md.signed_bytes:
            raise PublishError(f"{name} is not the {role} that waits here: one of the two was changed since", code="library.stale")
        return md

    def _known_key(self, role: str, keyid: str) -> None:
        if keyid not in (known := self.keys(role)):
            names = ", ".join(sorted(map(self.files.config().name, known)))
            raise PublishError(
                f"the key {self.files.config().name(keyid)} is no key of {role}",
                hint=f"its keys are those of: {names}",
                code="library.keys",
            )

    def _check_signature(self, role: str, md: AnyMetadata, keyid: str) -> None:
        try:
            self.keys(role)[keyid].verify_signature(md.signatures[keyid], md.signed_bytes)
        except UnverifiedSignatureError as error:
            raise PublishError(
                f"the signature of {self.files.config().name(keyid)} does not fit {role}", code="library.signature"
            ) from error

    def discard(self) -> list[str]:
        """Delete everything that waits for signatures, with its files; return the roles that waited."""
        with self.files.locked():
            waiting = self.staged_roles()
            if self.published(Root.type) is None:
                raise PublishError("the first root and targets cannot be discarded", hint="delete the directory and start again")
            for role in reversed(waiting):  # a role before its delegator
                self.files.staged_path(role).unlink()
            shutil.rmtree(self.files.staged / "targets", ignore_errors=True)
            return waiting

    def add_line(self, name: str, keys: list[Key], threshold: int = 2) -> RoleState:
        """Delegate a new model line to ``keys``; its role and ``targets`` wait for their signatures.

        A model line that was ended continues with its earlier versions: their content never changes, and withdrawals stay valid.

        Raises:
            PublishError: the name is taken or not allowed, or the threshold cannot be met.
        """
        check_line_name(name)
        index = LineIndex(line=name, minimum_version="0.0.0", versions=[])
        files = {line_path(name): index.to_json()} if self.latest(name) is None else {}
        return self._delegate(name, keys, threshold, line_patterns(name), files)

    def set_rollout_keys(self, keys: list[Key], threshold: int = 1) -> RoleState:
        """Delegate ``rollout/*.json``; later calls replace the keys."""
        with self.files.locked():
            if self.published(ROLLOUT_ROLE) or self.staged(ROLLOUT_ROLE):
                return self._change_keys(ROLLOUT_ROLE, keys, threshold)
            return self._delegate(ROLLOUT_ROLE, keys, threshold, [ROLLOUT_PATTERN], {})

    def _delegate(self, name: str, keys: list[Key], threshold: int, patterns: list[str], files: dict[str, bytes]) -> RoleState:
        _check_threshold(name, keys, threshold)
        with self.files.locked():
            self._refuse_second_delegator(name, patterns)
            with self.edit_targets() as targets:
                targets.delegations = targets.delegations or Delegations({}, {})
                assert targets.delegations.roles is not None
                targets.delegations.roles[name] = DelegatedRole(name, [], threshold, True, patterns)
                for key in keys:
                    targets.add_key(key, name)
            self.stage_files(name, files)
            self.promote_complete()
            return self.state(name)

    def _refuse_second_delegator(self, name: str, patterns: list[str]) -> None:
        for other, role in delegated(self.targets()).items():
            if other == name and self.staged(name) is None and self.published(name) is None:
                continue  # a command was killed between its two files: repeat it
            if other == name or any(role.is_delegated_path(pattern.replace("*", "x")) for pattern in patterns):
                raise PublishError(
                    f"{name!r} is delegated already: a role has one delegator{_UNCHANGED}",
                    hint="`model-library rotate-key` changes its keys; another line needs another name",
                    code="library.keys",
                )

    def rotate_key(self, role: str, old_keyid: str | None, new_key: Key | None, *, threshold: int | None = None) -> list[str]:
        """Replace a key of a role (None for old adds, None for new removes); return the roles that then wait for signatures.

        A lost key is replaced in the same way: the holders of the other keys sign. A new root needs the thresholds of the old and of the
        new root; a role whose signatures no longer suffice is staged again, and becomes public together with its delegator.

        Raises:
            PublishError: no such role or key, the new key is there already, or too few keys would be left.
        """
        with self.files.locked():
            delegator = self.open(Root.type if role in TOP_LEVEL_ROLE_NAMES else Targets.type).signed
            if role not in self.role_names():
                raise PublishError(f"there is no role {role!r}{_UNCHANGED}", code="library.role")
            current = delegator.get_delegated_role(role)
            if new_key is not None and new_key.keyid in current.keyids and old_keyid is not None and old_keyid not in current.keyids:
                self.promote_complete()  # a killed or repeated command: finish it
                return self.staged_roles()
            if old_keyid is not None and old_keyid not in current.keyids:
                raise PublishError(f"{old_keyid[:8]} is no key of {role}{_UNCHANGED}", code="library.keys")
            if new_key is not None and new_key.keyid in current.keyids:
                raise PublishError(
                    f"{new_key.keyid[:8]} is a key of {role} already{_UNCHANGED}",
                    hint="make a new one: `model-library key new`",
                    code="library.unsigned",
                )
            keys = [delegator.get_key(keyid) for keyid in current.keyids if keyid != old_keyid]
            self._change_keys(role, keys + ([new_key] if new_key is not None else []), threshold or current.threshold)
            return self.staged_roles()

    def _change_keys(self, role: str, keys: list[Key], threshold: int) -> RoleState:
        _check_threshold(role, keys, threshold)
        with self.edit(Root.type if role in TOP_LEVEL_ROLE_NAMES else Targets.type) as delegator:
            assert isinstance(delegator, (Root, Targets))
            current = delegator.get_delegated_role(role)
            for keyid in [keyid for keyid in current.keyids if keyid not in {key.keyid for key in keys}]:
                delegator.revoke_key(keyid, role)
            for key in keys:
                delegator.add_key(key, role)
            current.threshold = threshold
        self.promote_complete()
        return self.state(role)

    def renew(self, role: str) -> RoleState:
        """Stage an offline role again as it is, with a new expiry; raise PublishError for other roles."""
        with self.files.locked():
            if role in ONLINE or role not in self.role_names():
                raise PublishError(
                    f"{role!r} is no role that people sign",
                    hint="snapshot and timestamp: `model-library refresh-timestamp`",
                    code="library.role",
                )
            with self.edit(role):
                pass
            self.promote_complete()
            return self.state(role)

    def status(self, results: FieldResults | None = None) -> dict[str, Any]:
        """Return each role's version, expiry, signatures and keys, and what to do next; see ``status.status``."""
        return library_status.status(self, results)

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> library_check.VerificationResult:
        """Verify the public tree; see ``check.verify``."""
        return library_check.verify(self.files.public, self.now(), on_progress)


def add_signature(md: AnyMetadata, signer: Signer) -> None:
    """Add a signature; raise SettingsError when the signer (a token) does not sign."""
    try:
        md.sign(signer, append=True)
    except UnsignedMetadataError as error:
        raise token_error("the key does not sign", error.__cause__ or error) from error


def _check_threshold(role: str, keys: list[Key], threshold: int) -> None:
    if len({key.keyid for key in keys}) != len(keys):
        raise PublishError(f"a key of {role} is given twice{_UNCHANGED}", code="library.keys")
    if not 1 <= threshold <= len(keys):
        raise PublishError(f"{role}: {len(keys)} keys cannot give {threshold} signatures{_UNCHANGED}", code="library.keys")
