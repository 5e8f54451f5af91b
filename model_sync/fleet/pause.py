"""How the server publishes a pause: on top of what boxes see, never on top of what waits for people's signatures.

The server holds the rollout key. If a pause were an edit like any other, that key would also sign what somebody prepared for others
to read. So it is made from the published rollout, and what waits is staged again, unsigned, on top of it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

from tuf.api.metadata import Metadata, TargetFile, Targets

from model_sync.errors import ModelSyncError, PublishError
from model_sync.library.library import Library
from model_sync.library.roles import AnyMetadata, verifies
from model_sync.trust.documents import ROLLOUT_ROLE, Rollout, RolloutStep, rollout_path


class Seen(NamedTuple):
    """What somebody saw before they asked: the step's version, and the number of the rollout role (None: any will do)."""

    version: str
    serial: int | None = None


class Signed(NamedTuple):
    """What became of a pause: the step that boxes see now, and whether it had to be signed for that."""

    step: RolloutStep
    changed: bool


class PausingLibrary(Library):
    """A library whose rollouts can be paused beside what waits in it."""

    def set_paused(self, ring: str, line: str, paused: bool, seen: Seen) -> Signed:
        """Publish the rollout of a ring anew with one line paused, or going on; nothing else of what boxes see changes.

        Raises:
            PublishError: no such rollout, it is not what was seen, the keys here do not suffice, or another command holds the library;
                boxes go on with what is public, and what waited waits as before.
        """
        with self.files.locked():
            public = self.published(ROLLOUT_ROLE)
            path = rollout_path(ring)
            before = Rollout.parse(self.read_target(public.signed, path)) if public and path in public.signed.targets else None
            if public is None or before is None or line not in before.lines:
                raise PublishError(f"ring {ring} has no rollout of {line}", hint="reload the page", code="library.rollout")
            step = before.lines[line]
            if step.version != seen.version or seen.serial not in (None, public.signed.version):
                raise PublishError(
                    f"the rollout of {line} to {ring} was changed in the meantime",
                    hint="reload the page and look again",
                    code="library.rollout",
                )
            if step.paused == paused:
                return Signed(step, False)
            after = self._with_step(before, line, step.model_copy(update={"paused": paused}))
            self._publish_beside(self._edited(public, after, 1), lambda waiting: self._rebased(waiting, before, after))
            return Signed(after.lines[line], True)

    def _with_step(self, before: Rollout, line: str, step: RolloutStep) -> Rollout:
        return Rollout(ring=before.ring, issued_at=self.now(), lines={**before.lines, line: step})

    def _edited(self, md: AnyMetadata, document: Rollout, above: int) -> AnyMetadata:
        """Return a copy with another document of a ring, unsigned, numbered ``above`` what is public."""
        copy: Metadata[Any] = Metadata.from_bytes(md.to_bytes())
        public = self.published(ROLLOUT_ROLE)
        assert public is not None
        target = TargetFile.from_data(rollout_path(document.ring), document.to_json())
        if self.files.find_target(target) is None:
            self.files.write(self.files.staged_target(target), document.to_json())
        copy.signed.targets[target.path] = target
        copy.signed.version = public.signed.version + above
        copy.signed.expires = self.now() + timedelta(days=self.files.config().expiry_days.days(ROLLOUT_ROLE))
        copy.signatures.clear()
        return copy

    def _rebased(self, waiting: AnyMetadata, before: Rollout, after: Rollout) -> AnyMetadata:
        """Return what waits, on top of what is about to be public: a step that nobody changed follows, and so does a pause."""
        path = rollout_path(after.ring)
        if path not in waiting.signed.targets:
            return self._edited(waiting, after, 2)
        theirs = Rollout.parse(self.read_target(waiting.signed, path))
        lines = {}
        for name, step in theirs.lines.items():
            ours = after.lines.get(name)
            if ours is not None and step == before.lines.get(name):
                lines[name] = ours
            elif ours is not None and ours.paused and step.version == ours.version:
                lines[name] = step.model_copy(update={"paused": True})
            else:
                lines[name] = step
        return self._edited(waiting, Rollout(ring=after.ring, issued_at=after.issued_at, lines=lines), 2)

    def _publish_beside(self, pause: AnyMetadata, rebase: Callable[[AnyMetadata], AnyMetadata]) -> None:
        """Sign and publish one rollout; what waits is moved above it first, so that a kill between the two loses nothing."""
        for signer in self.signers_at_hand(self.keys(ROLLOUT_ROLE)):
            pause.sign(signer, append=True)
        waiting, staged = self.staged(ROLLOUT_ROLE), self.files.staged_path(ROLLOUT_ROLE)
        self._next = self._choose()
        try:
            self._refuse_unsigned(pause, waiting)
            self._next[ROLLOUT_ROLE] = pause
            fresh = [role for role, md in self._next.items() if self._is_new(role, md)]
            if waiting is not None:
                self.files.write(staged, rebase(waiting).to_bytes())
            try:
                self.do_snapshot()
                self.do_timestamp()
            except (ModelSyncError, OSError):
                if waiting is not None:
                    self.files.write(staged, waiting.to_bytes())
                raise
            self._commit(fresh)
        finally:
            self._next = {}
        self._drop_finished()

    def _refuse_unsigned(self, pause: AnyMetadata, waiting: AnyMetadata | None) -> None:
        if verifies(self._next[Targets.type].signed, ROLLOUT_ROLE, pause):
            return
        if waiting is not None:
            raise PublishError(
                "the rollout needs more signatures than this server can give, and another rollout waits for signatures already",
                hint="have that one signed, or drop it with `model-library discard`; nothing was signed",
                code="library.unsigned",
            )
        self.files.write(self.files.staged_path(ROLLOUT_ROLE), pause.to_bytes())
        raise PublishError("the rollout waits for more signatures", hint="`model-library status` says whose", code="library.unsigned")
