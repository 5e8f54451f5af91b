"""Publication of a pause by the server: based on the public rollout, never on one that waits for signatures.

The server has the rollout key. If a pause were an ordinary edit, that key would also sign waiting changes that nobody has approved. So
the pause is made from the public rollout, and a waiting version is staged again, unsigned, with a higher number.
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


class ExpectedRollout(NamedTuple):
    """The rollout that a person saw: its version, and the version of the rollout role (None accepts any)."""

    version: str
    serial: int | None = None


class PauseResult(NamedTuple):
    """The result of a pause: the public step, and whether a new version was signed."""

    step: RolloutStep
    changed: bool


class PausingLibrary(Library):
    """A library whose rollouts can be paused while other versions wait for signatures."""

    def set_paused(self, ring: str, line: str, paused: bool, expected: ExpectedRollout) -> PauseResult:
        """Publish the rollout of a ring with one model line paused or resumed; nothing else that is public changes.

        Raises:
            PublishError: there is no such rollout, it is not the expected one, the keys here do not suffice, or another command
                holds the library; nothing was changed.
        """
        with self.files.locked():
            public = self.published(ROLLOUT_ROLE)
            path = rollout_path(ring)
            before = Rollout.parse(self.read_target(public.signed, path)) if public and path in public.signed.targets else None
            if public is None or before is None or line not in before.lines:
                raise PublishError(f"ring {ring} has no rollout of {line}", hint="reload the page", code="library.rollout")
            step = before.lines[line]
            if step.version != expected.version or expected.serial not in (None, public.signed.version):
                raise PublishError(
                    f"the rollout of {line} to {ring} was changed in the meantime",
                    hint="reload the page and check it again",
                    code="library.rollout",
                )
            if step.paused == paused:
                return PauseResult(step, False)
            after = self._with_step(before, line, step.model_copy(update={"paused": paused}))
            self._publish_beside(self._edited(public, after, 1), lambda waiting: self._rebased(waiting, before, after))
            return PauseResult(after.lines[line], True)

    def _with_step(self, before: Rollout, line: str, step: RolloutStep) -> Rollout:
        return Rollout(ring=before.ring, issued_at=self.now(), lines={**before.lines, line: step})

    def _edited(self, md: AnyMetadata, document: Rollout, above: int) -> AnyMetadata:
        """Return an unsigned copy with another document of a ring; its version is ``above`` higher than the public one."""
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
        """Return the waiting version on top of the new public one: unchanged steps and a pause are taken over."""
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
        """Sign and publish one rollout; a waiting version gets a higher number first, so that a kill loses nothing."""
        for signer in self.available_signers(self.keys(ROLLOUT_ROLE)):
            pause.sign(signer, append=True)
        waiting, staged = self.staged(ROLLOUT_ROLE), self.files.staged_path(ROLLOUT_ROLE)
        self._next = self._choose_versions()
        try:
            self._refuse_unsigned(pause, waiting)
            self._next[ROLLOUT_ROLE] = pause
            fresh = [role for role, md in self._next.items() if self._is_unpublished(role, md)]
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
        self._remove_finished()

    def _refuse_unsigned(self, pause: AnyMetadata, waiting: AnyMetadata | None) -> None:
        if verifies(self._next[Targets.type].signed, ROLLOUT_ROLE, pause):
            return
        if waiting is not None:
            raise PublishError(
                "the rollout needs more signatures than this server can give, and another rollout waits for signatures already",
                hint="have that one signed, or delete it with `model-library discard`; nothing was signed",
                code="library.unsigned",
            )
        self.files.write(self.files.staged_path(ROLLOUT_ROLE), pause.to_bytes())
        raise PublishError("the rollout waits for more signatures", code="library.unsigned")
