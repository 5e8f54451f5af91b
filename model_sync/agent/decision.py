"""The decision of a pull about each model line, and why a version that the rollout names must not come to this box."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from model_sync.agent.exchange import Source
from model_sync.agent.library_view import LibraryView
from model_sync.agent.staging import StagingJob
from model_sync.agent.sync_status import LineStatus, SyncState, state_of
from model_sync.errors import MODEL_STAYS, Action, ModelSyncError, SettingsError, TextEnum, TrustError
from model_sync.settings import SyncSettings
from model_sync.trust import documents
from model_sync.trust.documents import LineIndex
from model_sync.trust.rollback_protection import iso


class Decision(TextEnum):
    """The decision about one model line, as it is stored in the status file; the message ``decision.<value>`` explains it."""

    READY = "ready"
    PAUSED = "paused"
    NOT_CHOSEN = "not_chosen"
    NOT_YET = "not_yet"
    WAITING = "waiting"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"
    BELOW_MINIMUM = "below_minimum"
    EXPIRED = "expired"
    ENDED = "ended"
    UNREACHABLE = "unreachable"
    ERROR = "error"
    ABSENT = "absent"
    UNKNOWN = "unknown"
    NONE = "none"


_OF_CODE = {
    "trust.withdrawn": Decision.WITHDRAWN, "trust.below_minimum": Decision.BELOW_MINIMUM, "trust.part_expired": Decision.EXPIRED,
    "trust.revoked": Decision.ENDED, "trust.line_ended": Decision.ENDED, "trust.document": Decision.REFUSED,
}  # fmt: skip
_OF_STATE = {
    SyncState.UNTRUSTED: Decision.REFUSED, SyncState.ERROR: Decision.ERROR, SyncState.UNREACHABLE: Decision.UNREACHABLE,
    SyncState.WAITING: Decision.WAITING, SyncState.OUTDATED: Decision.EXPIRED,
}  # fmt: skip
# The most urgent problem first.
_SEVERITY = (SyncState.UNTRUSTED, SyncState.ERROR, SyncState.OUTDATED, SyncState.UNREACHABLE, SyncState.WAITING)


@dataclass(frozen=True)
class LineOutcome:
    """The decision about one model line in one pull.

    Attributes:
        decision: the decision.
        version: the version it is about; empty when there is none.
        digest: the digest of that version.
        at: when this box takes part, for ``NOT_YET``.
        problem: the reason of the decision, if there is one; a withdrawal is also stored here, but is no error.
    """

    decision: Decision
    version: str = ""
    digest: str = ""
    at: datetime | None = None
    problem: ModelSyncError | None = None

    def status(self) -> LineStatus:
        """Return the entry of the status file."""
        decision = str(self.decision) + (f" {iso(self.at)}" if self.at else "")
        if self.problem is None:
            return LineStatus(self.version, self.digest, decision)
        return LineStatus(self.version, self.digest, decision, self.problem.code, self.problem.message, self.problem.hint)


@dataclass(frozen=True)
class PullResult:
    """The result of a pull that reached the library.

    Attributes:
        lines: the outcome of each model line; a problem of one does not affect the others.
        changed: whether the directives for the box changed.
        received_bytes: bytes received over the link.
        code: the code of the status.
        new_lines: the model lines for which the box has a new directive.
    """

    lines: Mapping[str, LineOutcome]
    changed: bool
    received_bytes: int
    code: str = "sync.ok"
    new_lines: frozenset[str] = frozenset()

    def with_reworded_problems(self, reword: Callable[[ModelSyncError], ModelSyncError]) -> PullResult:
        """Return a copy whose problems were passed through ``reword``."""
        lines = {name: replace(line, problem=reword(line.problem)) if line.problem else line for name, line in self.lines.items()}
        return replace(self, lines=lines)

    @property
    def problems(self) -> dict[str, ModelSyncError]:
        """The problems by model line."""
        return {name: line.problem for name, line in self.lines.items() if line.problem is not None}

    @property
    def worst_problem(self) -> ModelSyncError | None:
        """The most urgent problem; None when there is no error."""
        errors = [problem for problem in self.problems.values() if problem.action is not Action.NONE]
        return min(errors, key=lambda error: _SEVERITY.index(state_of(error)), default=None)


def failed_outcome(job: StagingJob, problem: ModelSyncError) -> LineOutcome:
    """Return the outcome of a model line whose version is wanted and could not be staged."""
    return LineOutcome(decision_for_problem(problem), job.release.version, job.release.digest, problem=problem)


def decision_for_problem(problem: ModelSyncError) -> Decision:
    """Return what a problem means for its model line."""
    if isinstance(problem, SettingsError):
        return Decision.UNKNOWN
    return _OF_CODE.get(problem.code) or _OF_STATE[state_of(problem)]


def decide(view: LibraryView, settings: SyncSettings, source: Source, line: str, now: datetime) -> LineOutcome:
    """Decide about a model line without problems; ``now`` is the effective time."""
    is_followed = view.rollout is not None and line in (settings.lines or view.rollout.lines)
    step = view.rollout.lines.get(line) if view.rollout and is_followed else None
    if step is None:
        return LineOutcome(Decision.NONE)
    if line in view.absent:
        return LineOutcome(Decision.ABSENT, step.version)
    index = view.indexes.get(line)
    release = index.release(step.version) if index else None
    digest = release.digest if release else ""
    if (refusal := find_refusal(line, index, step.version)) is not None:
        return LineOutcome(decision_for_problem(refusal), step.version, digest, problem=refusal)
    if source == "usb":
        return LineOutcome(Decision.PAUSED if step.paused else Decision.READY, step.version, digest)
    turn = documents.decide(step, line, settings.box_id, now)
    return LineOutcome(Decision.READY if turn.take else Decision(turn.code), step.version, digest, turn.at)


def find_refusal(line: str, index: LineIndex | None, version: str) -> TrustError | None:
    """Return why a version that the rollout names must not come to this box; None when it may."""
    code = index.refusal(version) if index else "unknown"
    if code is None:
        return None
    withdrawal = index.withdrawal(version) if index else None
    reason = {
        "unknown": "the role of the model line has not signed such a version",
        "withdrawn": f"it is withdrawn: {withdrawal.reason if withdrawal else ''}",
        "below_minimum": f"it is older than the minimum version {index.minimum_version if index else ''}",
    }[code]
    hint = {
        "unknown": f"tell the central team to sign a new rollout; {MODEL_STAYS}",
        "withdrawn": "nothing to do: the central team will name another version; a box that runs the withdrawn one stops using it",
        "below_minimum": f"nothing to do: the central team will name another version; {MODEL_STAYS}, also when it is below the minimum",
    }[code]
    action = Action.ALARM if code == "unknown" else Action.NONE
    return TrustError(f"the rollout names {line} {version}, and {reason}", hint=hint, code=f"trust.{code}", action=action)
