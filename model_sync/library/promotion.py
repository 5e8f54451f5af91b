"""Promotion: versions with enough signatures that fit together become public, in an order that is safe at a kill.

Target files first, then versioned metadata, then the timestamp, which makes the rest visible to boxes. After a kill at any point the
last complete state is public; the next command continues from the files under ``staged/``.
"""

from __future__ import annotations

import shutil
from datetime import timedelta

from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, Root, Snapshot, Targets, Timestamp

from model_sync.errors import PublishError
from model_sync.library.files import due_days
from model_sync.library.roles import ONLINE, AnyMetadata, LibraryRoles, delegated, verifies

# A command that runs once a day, a little earlier or later each time, renews the snapshot before it is due.
_EARLY_DAYS = 1.5


class LibraryPromotion(LibraryRoles):
    """Moves staged metadata to the public tree."""

    def promote_complete(self) -> list[str]:
        """Promote every version that is complete and fits together; return the roles that became public.

        Raises:
            PublishError: a version is complete but the online keys are locked; all signatures are kept.
        """
        with self.files.locked():
            self._remove_finished()
            self._stage_for_new_keys()
            self._add_available_signatures()
            self._next = self._choose_versions()
            if not self._next:
                return []
            try:
                fresh = [role for role, md in self._next.items() if self._is_unpublished(role, md)]
                self.do_snapshot()
                self.do_timestamp()
                self._commit(fresh)
            finally:
                self._next = {}
            self._remove_finished()
            return fresh

    def refresh_timestamp(self) -> Timestamp:
        """Sign a new timestamp, and a new snapshot a day before it is due; for cron, every day.

        Raises:
            PublishError: nothing is published yet, or the online keys are locked.
        """
        with self.files.locked():
            self.promote_complete()
            snapshot = self.published(Snapshot.type)
            if snapshot is None:
                raise PublishError(
                    "nothing is published yet", hint="sign root and targets first: see `model-library status`", code="library.incomplete"
                )
            self._next = self._choose_versions()
            try:
                due = timedelta(days=due_days(self.files.config().expiry_days.snapshot) + _EARLY_DAYS)
                self.do_snapshot(force=snapshot.signed.expires - self.now() < due)
                self.do_timestamp(force=True)
                self._commit([])
            finally:
                self._next = {}
            return self.timestamp()

    def _stage_for_new_keys(self) -> None:
        """Stage again, unchanged, each role whose public version the waiting delegator would not accept."""
        for role in (Targets.type, *delegated(self.targets())):
            public, delegators = self.published(role), self.delegators(role)
            if public is not None and self.staged(role) is None and not verifies(delegators[-1], role, public):
                with self.edit(role):
                    pass

    def _add_available_signatures(self) -> None:
        """Add signatures of keys that are available now and were not when a version was staged."""
        for role in self.staged_roles():
            md = self.staged(role)
            if md is not None and (signers := self.available_signers(set(self.keys(role)) - md.signatures.keys())):
                for signer in signers:
                    md.sign(signer, append=True)
                self.files.write(self.files.staged_path(role), md.to_bytes())

    def _choose_versions(self) -> dict[str, AnyMetadata]:
        """Return the newest root, targets and delegated roles that accept each other; empty before there are any.

        A delegated role without a signed version stops its delegator: a box would treat the gap as an attack.
        """
        for root in self._candidates(Root.type):
            for targets in self._candidates(Targets.type):
                chosen = {Root.type: root, Targets.type: targets}
                for role in delegated(targets.signed):
                    fitting = (md for md in self._candidates(role) if verifies(targets.signed, role, md))
                    if (md := next(fitting, None)) is not None:
                        chosen[role] = md
                if verifies(root.signed, Targets.type, targets) and chosen.keys() >= delegated(targets.signed).keys():
                    return chosen
        return {}

    def _candidates(self, role: str) -> list[AnyMetadata]:
        """Return the staged version, unless it expired while it waited, and the published one."""
        staged, public = self.staged(role), self.published(role)
        if staged is not None and staged.signed.is_expired(self.now()):
            staged = None
        if staged is not None and role == Root.type:
            before = public.signed if public is not None else None
            if not staged.signed.get_root_verification_result(before, staged.signed_bytes, staged.signatures):
                staged = None
        return [md for md in (staged, public) if md is not None]

    def _is_unpublished(self, role: str, md: AnyMetadata) -> bool:
        public = self.published(role)
        return public is None or bool(public.signed.version != md.signed.version)

    def _commit(self, fresh: list[str]) -> None:
        """Write the chosen state; ``fresh`` names its offline roles that are not public yet."""
        for role in fresh:
            if isinstance(self._next[role].signed, Targets):
                self._publish_files(self._next[role].signed)
        for role in [*(role for role in fresh if role != Root.type), *(role for role in ONLINE[:1] if role in self._next)]:
            self.files.write(self.files.metadata_path(role, self._next[role].signed.version), self._next[role].to_bytes())
        last = {Root.type: Root.type in fresh, Timestamp.type: Timestamp.type in self._next}
        for role in [Timestamp.type, Root.type] if last[Root.type] and self._timestamp_first() else [Root.type, Timestamp.type]:
            if last[role]:
                version = self._next[role].signed.version if role == Root.type else None
                self.files.write(self.files.metadata_path(role, version), self._next[role].to_bytes())

    def _timestamp_first(self) -> bool:
        """Return whether the new timestamp is written before the new root: a box that polls between the two must accept both.

        Usually the timestamp is last. It is first when the new root does not accept the public metadata, and the old keys are available
        and sign the new state too. Without the old keys, a box that polls in between tries again.
        """
        root, before = self._next[Root.type].signed, self.published(Root.type)
        roles = (Timestamp.type, Snapshot.type, Targets.type)
        public = {role: self.published(role) for role in roles}
        if before is None or all(md is not None and verifies(root, role, md) for role, md in public.items()):
            return False
        return all((md := self._next.get(role) or public[role]) is not None and verifies(before.signed, role, md) for role in roles)

    def _publish_files(self, targets: Targets) -> None:
        for target in targets.targets.values():
            where = self.files.find_target(target)
            if where is None:
                raise PublishError(
                    f"{target.path} is signed but its file is missing; boxes see the state before",
                    hint="publish the bundle again",
                    code="library.incomplete",
                )
            if where != self.files.public_target(target):
                self.files.move(where, self.files.public_target(target))

    def _remove_finished(self) -> None:
        """Remove staged metadata that is public or has no delegator, and staged files when nothing waits."""
        for role in self.staged_roles():
            staged, public = self.staged(role), self.published(role)
            done = staged is not None and public is not None and public.signed.version >= staged.signed.version
            if done or (role not in TOP_LEVEL_ROLE_NAMES and not self.delegators(role)):  # the model line was ended
                self.files.staged_path(role).unlink()
        if not self.staged_roles():
            shutil.rmtree(self.files.staged / "targets", ignore_errors=True)
