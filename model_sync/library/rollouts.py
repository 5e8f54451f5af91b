"""Rollouts: the version that the boxes of a ring install, and the end of a model line, which no rollout may name any more."""

from __future__ import annotations

from datetime import datetime

from pydantic import ValidationError
from tuf.api.metadata import Targets

from model_sync.errors import PublishError
from model_sync.library.promotion import LibraryPromotion
from model_sync.library.publish import require_version, validation_error
from model_sync.library.roles import RoleState, delegated
from model_sync.trust.documents import ROLLOUT_ROLE, FailureBudget, Rollout, RolloutStep, rollout_path


def rollout(
    library: LibraryPromotion,
    ring: str,
    line: str,
    version: str,
    percent: float = 100.0,
    start: datetime | None = None,
    duration_h: float = 0.0,
    failure_budget: FailureBudget | None = None,
    paused: bool = False,
) -> RoleState:
    """Stage the version of a model line that a ring's boxes install.

    Raises:
        PublishError: the rollout role has no keys yet, or the version is not public, withdrawn or below the minimum, or a number
            is out of its range.
    """
    with library.files.locked():
        if ROLLOUT_ROLE not in library.role_names():
            raise PublishError(
                "the rollout role has no keys yet", hint="give it some with `model-library rollout-keys`", code="library.rollout"
            )
        index = library.public_index(line)
        require_version(index, version)
        refusal = index.refusal(version)
        if refusal is not None and not paused:
            why = {"withdrawn": "is withdrawn", "below_minimum": f"is older than the minimum {index.minimum_version}"}[refusal]
            raise PublishError(
                f"{line} {version} {why}", hint="choose a version that boxes may run; nothing was changed", code="library.rollout"
            )
        targets, path = library.targets(ROLLOUT_ROLE), rollout_path(ring)
        try:
            before = Rollout.parse(library.read_target(targets, path)).lines if path in targets.targets else {}
            begin, budget = start or library.now(), failure_budget or FailureBudget()
            step = RolloutStep(version=version, percent=percent, start=begin, duration_h=duration_h, failure_budget=budget, paused=paused)
            document = Rollout(ring=ring, issued_at=library.now(), lines={**before, line: step})
        except ValidationError as error:
            raise validation_error("rollout", error, "percent is 0 to 100, times are in hours") from error
        library.stage_files(ROLLOUT_ROLE, {path: document.to_json()})
        library.promote_complete()
        return library.state(ROLLOUT_ROLE)


def end_line(library: LibraryPromotion, line: str) -> RoleState:
    """Stage the end of a model line: first its removal from rollouts, if there are any, then from the targets role.

    Returns the state of the role that waits; when it is ``rollout``, call this again after that version is public.

    Raises:
        PublishError: there is no such model line.
    """
    with library.files.locked():
        public = library.published(Targets.type)
        if line not in library.lines() and public is not None and line in delegated(public.signed):
            library.promote_complete()  # a killed or repeated command: finish it
            return library.state(Targets.type)
        library.index(line)
        _remove_from_rollouts(library, line)
        rollouts = library.published(ROLLOUT_ROLE)
        if rollouts is not None and any(line in document.lines for document in _rollouts(library, rollouts.signed).values()):
            return library.state(ROLLOUT_ROLE)
        with library.edit_targets() as targets:
            for keyid in list(targets.get_delegated_role(line).keyids):
                targets.revoke_key(keyid, line)
            assert targets.delegations is not None
            assert targets.delegations.roles is not None
            del targets.delegations.roles[line]
        library.files.staged_path(line).unlink(missing_ok=True)
        library.promote_complete()
        return library.state(Targets.type)


def _remove_from_rollouts(library: LibraryPromotion, line: str) -> None:
    if ROLLOUT_ROLE not in library.role_names():
        return
    changed = {}
    for path, document in _rollouts(library, library.targets(ROLLOUT_ROLE)).items():
        if line in document.lines:
            lines = {name: step for name, step in document.lines.items() if name != line}
            changed[path] = Rollout(ring=document.ring, issued_at=library.now(), lines=lines).to_json()
    if changed:
        library.stage_files(ROLLOUT_ROLE, changed)
        library.promote_complete()


def _rollouts(library: LibraryPromotion, targets: Targets) -> dict[str, Rollout]:
    return {path: Rollout.parse(library.read_target(targets, path)) for path in targets.targets}
