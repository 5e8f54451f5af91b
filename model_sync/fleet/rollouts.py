"""The public rollouts, and their pause by a newly signed rollout.

A pause is not a flag in a database, which anybody with access to the server could change: it is signed by the rollout key, like the
rollout. Without that key the server can only show the command to run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from securesystemslib.signer import Signer
from tuf.api.metadata import Targets

from model_sync.errors import PublishError
from model_sync.fleet.database import Fleet, VersionTally
from model_sync.fleet.pause import ExpectedRollout, PausingLibrary
from model_sync.library.files import read_metadata
from model_sync.library.keys import Passphrase
from model_sync.library.library import Library
from model_sync.trust.documents import ROLLOUT_ROLE, LineIndex, Rollout, RolloutStep, line_path, older, rollout_path

logger = logging.getLogger(__name__)
_HISTORY = 500
_LOCK_TIMEOUT_S = 0.5  # a person waits for the page


@dataclass(frozen=True)
class PublishedRollouts:
    """The public documents: the rollout of each ring, the index of each model line; ``serial`` is the version of the rollout role."""

    rollouts: dict[str, Rollout]
    lines: dict[str, LineIndex]
    serial: int = 0

    def step(self, ring: str, line: str) -> RolloutStep | None:
        """Return the step of a ring and a model line, or None."""
        rollout = self.rollouts.get(ring)
        return rollout.lines.get(line) if rollout is not None else None


class Rollouts:
    """Reads and pauses the published rollouts of a library; ``signer`` has the rollout key, ``passphrase`` decrypts the online keys."""

    def __init__(self, directory: Path, fleet: Fleet, signer: Signer | None = None, passphrase: Passphrase | None = None) -> None:
        self._directory = directory
        self._fleet = fleet
        self._signer = signer
        self._passphrase = passphrase
        self._is_rollback: dict[tuple[str, str, int], bool] = {}
        self._cached: tuple[tuple[int, int], PublishedRollouts] | None = None

    @property
    def can_sign(self) -> bool:
        """Whether a pause can be signed here."""
        return self._signer is not None

    def library(self, lock_timeout_s: float = _LOCK_TIMEOUT_S) -> PausingLibrary:
        """Return the library with the available keys."""
        signers = [self._signer] if self._signer is not None else []
        return PausingLibrary(self._directory, signers, passphrase=self._passphrase, lock_timeout_s=lock_timeout_s)

    def published(self) -> PublishedRollouts:
        """Return the public documents; they are read again only when the timestamp changed.

        Raises:
            ModelSyncError: the library cannot be read.
        """
        try:
            facts = (self._directory / "public" / "metadata" / "timestamp.json").stat()
            seen = (facts.st_mtime_ns, facts.st_ino)
            if self._cached is None or seen != self._cached[0]:
                self._cached = seen, _read(Library(self._directory))  # one assignment: several threads call this
        except FileNotFoundError:
            return PublishedRollouts({}, {})
        except OSError as error:
            raise _disk_error(error) from error
        return self._cached[1]

    def set_paused(
        self,
        ring: str,
        line: str,
        paused: bool,
        actor: str,
        expected: ExpectedRollout,
        figures: str = "",
        *,
        note: str = "",
        lock_timeout_s: float = _LOCK_TIMEOUT_S,
    ) -> bool:
        """Sign the rollout of a ring with one model line paused or resumed; return False when nothing changed.

        Args:
            ring: the ring of the rollout.
            line: the model line.
            paused: whether to pause or to resume.
            actor: the person or program, for the record.
            expected: the rollout that the actor saw.
            figures: the failed/tried boxes that the actor saw.
            note: the reason that a person gave.
            lock_timeout_s: the longest wait for another command.

        Raises:
            PublishError: no key is here, there is no such rollout or it is not the expected one, or the library refused;
                nothing was changed.
        """
        if not self.can_sign:
            raise PublishError("this server has no rollout key", hint=self.command(ring, line, paused), code="library.key")
        try:
            step, changed = self.library(lock_timeout_s).set_paused(ring, line, paused, expected)
        except OSError as error:
            raise _disk_error(error) from error
        if not changed:
            return False
        action = "paused" if paused else "resumed"
        self._fleet.record(actor, action, ring=ring, line=line, subject=step.version, figures=figures, note=note)
        logger.warning("rollout %s: ring %s line %s version %s by %s", action, ring, line, step.version, actor)
        return True

    def is_spent(self, ring: str, line: str, step: RolloutStep, tally: VersionTally) -> bool:
        """Return whether the failure budget of a rollout is used up, so that it has to be paused.

        Failures that a person acknowledged by a resume do not count again. A rollback is never paused, because boxes would keep the
        worse version.
        """
        if not is_budget_spent(step, tally):
            return False
        return is_budget_spent(step, tally, self._fleet.acknowledged_failures(ring, line, step.version)) and not self.is_rollback(
            ring, line
        )

    def is_rollback(self, ring: str, line: str) -> bool:
        """Return whether the version of a ring's rollout is older than the one signed before it.

        Raises:
            ModelSyncError: the library cannot be read.
        """
        published = self.published()
        key = ring, line, published.serial
        if key not in self._is_rollback:
            try:
                is_older = _is_older_than_before(Library(self._directory), ring, line, published)
            except OSError as error:
                raise _disk_error(error) from error
            self._is_rollback = {known: back for known, back in self._is_rollback.items() if known[2] == published.serial} | {key: is_older}
            return is_older
        return self._is_rollback[key]

    def command(self, ring: str, line: str, paused: bool) -> str:
        """Return the commands with the effect of the button, for a machine that has the key."""
        step = self.published().step(ring, line)
        if step is None:
            return ""
        budget = step.failure_budget
        return (
            f"model-library rollout {self._directory} --ring {ring} --line {line} --version {step.version}"
            f" --percent {step.percent:g} --start {step.start:%Y-%m-%dT%H:%M:%SZ} --duration-h {step.duration_h:g}"
            f" --max-failures {budget.max_fraction:g} --min-failures {budget.min_boxes}{' --paused' if paused else ''}"
            f"\nmodel-library sign {self._directory} --key ROLLOUT.pem"
        )


def is_budget_spent(step: RolloutStep, tally: VersionTally, known: int = 0) -> bool:
    """Return whether a version failed on more boxes than its budget allows, not counting ``known`` failures."""
    failed = tally.failed - known
    return failed >= step.failure_budget.min_boxes and failed > step.failure_budget.max_fraction * (tally.tried - known)


def _is_older_than_before(library: Library, ring: str, line: str, published: PublishedRollouts) -> bool:
    """Compare with the last different version among earlier public rollouts, newest first."""
    step, path = published.step(ring, line), rollout_path(ring)
    for serial in range(published.serial - 1, max(0, published.serial - _HISTORY), -1) if step is not None else ():
        file = library.files.metadata_path(ROLLOUT_ROLE, serial)
        if not file.is_file():
            continue
        signed = read_metadata(file).signed
        if path not in signed.targets:
            return False
        before = Rollout.parse(library.read_target(signed, path)).lines.get(line)
        if before is not None and step is not None and before.version != step.version:
            return older(step.version, before.version)
    return False


def _read(library: Library) -> PublishedRollouts:
    rollouts, lines = {}, {}
    if (chosen := library.published(ROLLOUT_ROLE)) is not None:
        for path in chosen.signed.targets:
            rollout = Rollout.parse(library.read_target(chosen.signed, path))
            rollouts[rollout.ring] = rollout
    top = library.published(Targets.type)
    delegations = top.signed.delegations if top is not None else None
    for line in (delegations.roles or {}) if delegations is not None else ():
        role = library.published(line) if line != ROLLOUT_ROLE else None
        if role is not None and line_path(line) in role.signed.targets:
            lines[line] = LineIndex.parse(library.read_target(role.signed, line_path(line)))
    return PublishedRollouts(rollouts, lines, chosen.signed.version if chosen is not None else 0)


def _disk_error(error: OSError) -> PublishError:
    return PublishError(f"the library's disk: {error.strerror}", code="library.disk")
