"""What a pull concludes about each line, and why a version that the rollout names must not come to this box."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from model_sync.documents import LineIndex
from model_sync.errors import ModelSyncError, TrustError
from model_sync.floors import iso
from model_sync.staging import Job
from model_sync.sync_status import LineStatus, state_of

KEEP = "the model in use stays"


@dataclass(frozen=True)
class Outcome:
    """What a pull did about one line.

    Attributes:
        decision: ``ready`` (the box has been told), ``paused``, ``not_chosen``, ``not_yet``, ``waiting``, ``refused``,
            ``unreachable``, ``error`` or ``none`` (no rollout names the line).
    """

    decision: str
    version: str = ""
    digest: str = ""
    at: datetime | None = None
    problem: ModelSyncError | None = None

    def status(self) -> LineStatus:
        """Return what the status file says about the line."""
        return LineStatus(self.version, self.digest, self.decision + (f" {iso(self.at)}" if self.at else ""))


@dataclass(frozen=True)
class Pulled:
    """The end of a pull that reached the library; ``problems`` are those of single lines, which stopped no other line.

    Attributes:
        changed: whether the box has been told something new.
        received_bytes: bytes that came over the line.
    """

    lines: Mapping[str, Outcome]
    changed: bool
    received_bytes: int
    code: str = "sync.ok"

    def told(self, words: Callable[[ModelSyncError], ModelSyncError]) -> Pulled:
        """Return the same with its problems in other words."""
        lines = {name: replace(line, problem=words(line.problem)) if line.problem else line for name, line in self.lines.items()}
        return replace(self, lines=lines)

    @property
    def problems(self) -> dict[str, ModelSyncError]:
        """What went wrong, by line."""
        return {name: line.problem for name, line in self.lines.items() if line.problem is not None}

    @property
    def worst(self) -> ModelSyncError | None:
        """The problem that a person has to hear of first: distrust before anything else."""
        order = ("untrusted", "error", "unreachable", "waiting")
        return min(self.problems.values(), key=lambda error: order.index(state_of(error)), default=None)


def job_of(index: LineIndex, version: str) -> Job:
    """Return what is to be brought for a version that no refusal speaks against."""
    release = index.release(version)
    assert release is not None, "the caller has asked for a refusal first"
    return Job(index.line, release, tuple(index.deltas))


def instead(job: Job, decision: str, problem: ModelSyncError) -> Outcome:
    """Return the outcome of a line whose version was wanted and is not to be had."""
    return Outcome(decision, job.release.version, job.release.digest, problem=problem)


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
    return TrustError(
        f"the rollout names {line} {version}, and {why}", hint=f"tell the central team: the rollout has to be signed anew; {KEEP}",
        code=f"trust.{code}",
    )  # fmt: skip
