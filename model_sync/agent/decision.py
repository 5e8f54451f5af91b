"""What a pull concludes about each line, and why a version that the rollout names must not come to this box."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from model_sync.agent.exchange import Source
from model_sync.agent.library_view import Look
from model_sync.agent.staging import Job
from model_sync.agent.sync_status import LineStatus, code_of, state_of
from model_sync.errors import ModelSyncError, SettingsError, TrustError
from model_sync.settings import SyncSettings
from model_sync.trust import documents
from model_sync.trust.documents import LineIndex
from model_sync.trust.rollback_protection import iso

KEEP = "the model in use stays"
_DECISIONS = {
    "trust.withdrawn": "withdrawn", "trust.below_minimum": "below_minimum", "trust.part_expired": "expired", "trust.revoked": "ended",
    "trust.line_ended": "ended",
    "trust.document": "refused",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a pull did about one line.

    Attributes:
        decision: ``ready`` (the box has been told), ``paused``, ``not_chosen``, ``not_yet``, ``waiting``, ``refused``,
            ``withdrawn``, ``below_minimum``, ``expired``, ``ended``, ``unreachable``, ``error``, ``absent`` (a stick does not carry
            the line), ``unknown`` (the settings name a line that the library does not have) or ``none`` (no rollout names it).
        problem: why, when that is more than the decision says; not each is a trouble (see ``Pulled.worst``).
    """

    decision: str
    version: str = ""
    digest: str = ""
    at: datetime | None = None
    problem: ModelSyncError | None = None

    def status(self) -> LineStatus:
        """Return what the status file says about the line."""
        decision = self.decision + (f" {iso(self.at)}" if self.at else "")
        if self.problem is None:
            return LineStatus(self.version, self.digest, decision)
        return LineStatus(self.version, self.digest, decision, code_of(self.problem), self.problem.message, self.problem.hint)


@dataclass(frozen=True)
class Pulled:
    """The end of a pull that reached the library; ``problems`` are those of single lines, which stopped no other line.

    Attributes:
        changed: whether the box has been told something new.
        received_bytes: bytes that came over the line.
        laid: the lines of which the box has been told another version than before.
    """

    lines: Mapping[str, Outcome]
    changed: bool
    received_bytes: int
    code: str = "sync.ok"
    laid: frozenset[str] = frozenset()

    def told(self, words: Callable[[ModelSyncError], ModelSyncError]) -> Pulled:
        """Return the same with its problems in other words."""
        lines = {name: replace(line, problem=words(line.problem)) if line.problem else line for name, line in self.lines.items()}
        return replace(self, lines=lines)

    @property
    def problems(self) -> dict[str, ModelSyncError]:
        """What there is to say, by line, from a withdrawal to a forgery."""
        return {name: line.problem for name, line in self.lines.items() if line.problem is not None}

    @property
    def worst(self) -> ModelSyncError | None:
        """The problem that a person has to hear of first, distrust before anything else; None when all is as the library wants it."""
        order = ("untrusted", "error", "unreachable", "waiting")
        troubles = [problem for problem in self.problems.values() if state_of(problem) != "ok"]
        return min(troubles, key=lambda error: order.index(state_of(error)), default=None)


def job_of(index: LineIndex, version: str) -> Job:
    """Return what is to be brought for a version that no refusal speaks against."""
    release = index.release(version)
    assert release is not None, "the caller has asked for a refusal first"
    return Job(index.line, release, tuple(index.deltas))


def instead(job: Job, problem: ModelSyncError) -> Outcome:
    """Return the outcome of a line whose version was wanted and is not to be had."""
    return Outcome(decision_for(problem), job.release.version, job.release.digest, problem=problem)


def decision_for(problem: ModelSyncError) -> str:
    """Return what a problem means for its line."""
    if isinstance(problem, SettingsError):
        return "unknown"
    return _DECISIONS.get(code_of(problem)) or {"untrusted": "refused"}.get(state := state_of(problem), state)


def decide(look: Look, settings: SyncSettings, source: Source, line: str, now: datetime) -> Outcome:
    """Decide about a line that nothing is wrong with; ``now`` is the effective time."""
    followed = look.rollout is not None and line in (settings.lines or look.rollout.lines)
    step = look.rollout.lines.get(line) if look.rollout and followed else None
    if step is None:
        return Outcome("none")
    if line in look.absent:
        return Outcome("absent", step.version)
    index = look.indexes.get(line)
    release = index.release(step.version) if index else None
    digest = release.digest if release else ""
    if (refusal := refusal_of(line, index, step.version)) is not None:
        return Outcome(decision_for(refusal), step.version, digest, problem=refusal)
    if source == "usb":
        return Outcome("paused" if step.paused else "ready", step.version, digest)
    decision = documents.decide(step, line, settings.box_id, now)
    return Outcome("ready" if decision.take else decision.code, step.version, digest, decision.at)


def refusal_of(line: str, index: LineIndex | None, version: str) -> TrustError | None:
    """Say why a version that the rollout names must not come here."""
    code = index.refusal(version) if index else "unknown"
    if code is None:
        return None
    withdrawal = index.withdrawal(version) if index else None
    why = {
        "unknown": "the line's own role has not signed such a version",
        "withdrawn": f"it is withdrawn: {withdrawal.reason if withdrawal else ''}",
        "below_minimum": f"it is older than {index.minimum_version if index else ''}, the oldest that may run",
    }[code]
    forged = code == "unknown"
    hint = "tell the central team: the rollout has to be signed anew" if forged else "nothing here: the central team will name another"
    return TrustError(f"the rollout names {line} {version}, and {why}", hint=f"{hint}; {KEEP}", code=f"trust.{code}")
