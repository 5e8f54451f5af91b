"""Trials of new models: statistics, whether they exceed the limits of the manifest (requirement R31), and the end of the trial.

Everything is counted from the jobs and findings of the version since it was activated, so that no counter can be lost.
"""

from __future__ import annotations

import bisect
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from appliance.core.domain import JobState, Note, ScanState
from appliance.core.self_test_report import SelfTestReport, allowed_latency_ms
from appliance.core.states import ActivationState
from appliance.store.database import Database
from model_sync.bundle import Manifest, ScoreHistogram, Watch

if TYPE_CHECKING:
    import logging
    import sqlite3

    from appliance.lifecycle.journal import Journal
    from appliance.lifecycle.takeover import Takeovers

# Fewer cases than these say nothing about a share, a median or a distribution.
FAILURES_FROM: Final = 3
LATENCY_FROM: Final = 5
DRIFT_FROM: Final = 50
# Failures that are not the model's: there was no memory to decode or prepare the image, or a remote runtime did not answer.
_NOT_THE_MODEL: Final = ("job.memory_input", "runtime.unavailable", "runtime.deadline")
# Jeffreys' prior: an empty bin is rare, not impossible.
_PRIOR: Final = 0.5


@dataclass(frozen=True)
class Statistics:
    """What a version did since it was activated.

    Attributes:
        cases: images that it analysed.
        failures: jobs that failed for good.
        latency_ms: median time of an inference with the current candidate; None before the first, or before five since it changed.
        drift: largest population stability index of a label, minus the part that chance gives; None before 50 images.
    """

    cases: int
    failures: int
    latency_ms: float | None
    drift: float | None

    def to_json(self) -> dict[str, Any]:
        """The statistics as they are stored in the journal."""
        return asdict(self)


def measure(database: Database, digest: str, manifest: Manifest, after_job: int, candidate_after_job: int = 0) -> Statistics:
    """Count what a version did in the jobs planned after ``after_job``, the last one before it was activated.

    ``candidate_after_job`` is the last job before another candidate was chosen to run the version; 0 when none was. Times before it belong
    to the earlier candidate and do not count, and the first few after it say nothing yet.
    """
    jobs = database.query(
        "SELECT id, outcome, coalesce(json_extract(timing_ms, '$.window'), json_extract(timing_ms, '$.infer')) AS infer,"
        " coalesce(json_extract(runtime, '$.leaves_box'), json_extract(runtime, '$.reason.code') = 'choice.fallback', 0) AS other FROM jobs"
        " WHERE model_digest = ? AND id > ? AND outcome IN (?, ?) AND state IN (?, ?)"
        " AND NOT (outcome = ? AND coalesce(json_extract(reason, '$.code'), '') IN (SELECT value FROM json_each(?)))",
        digest, after_job, ScanState.AI_READY.value, ScanState.FAILED.value, JobState.DONE.value, JobState.FAILED.value,
        ScanState.FAILED.value, json.dumps(_NOT_THE_MODEL),
    )  # fmt: skip
    analysed = [row for row in jobs if row["outcome"] == ScanState.AI_READY.value]
    # Times of a remote runtime depend on the network, and those of the fallback are not the chosen candidate's.
    latencies = [row["infer"] for row in analysed if row["infer"] is not None and not row["other"] and row["id"] > candidate_after_job]
    has_enough = len(latencies) >= (LATENCY_FROM if candidate_after_job else 1)
    drift = None
    if len(analysed) >= DRIFT_FROM:
        drift = max((_drift(database, digest, after_job, histogram) for histogram in manifest.reference_scores), default=None)
    return Statistics(len(analysed), len(jobs) - len(analysed), statistics.median(latencies) if has_enough else None, drift)


def _drift(database: Database, digest: str, after_job: int, histogram: ScoreHistogram) -> float:
    rows = database.query(
        "SELECT f.score FROM jobs j JOIN findings f ON f.job_id = j.id WHERE j.model_digest = ? AND j.id > ? AND f.label = ?",
        digest, after_job, histogram.label,
    )  # fmt: skip
    if not rows:
        return 0.0
    return stability_index([row["score"] for row in rows], histogram) - (len(histogram.counts) - 1) / len(rows)


def stability_index(scores: Sequence[float], reference: ScoreHistogram) -> float:
    """Compute the population stability index of scores against a histogram: the sum over bins of (p - q) ln(p / q).

    A score beyond the outermost edges belongs to the outermost bin.
    """
    bins = len(reference.counts)
    counts = [0] * bins
    for score in scores:
        counts[min(max(bisect.bisect_right(reference.edges, score) - 1, 0), bins - 1)] += 1
    observed, expected = _shares(counts), _shares(reference.counts)
    return math.fsum((p - q) * math.log(p / q) for p, q in zip(observed, expected, strict=True))


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + _PRIOR * len(counts)
    return [(count + _PRIOR) / total for count in counts]


def find_violation(current: Statistics, watch: Watch, expected_ms: float) -> Note | None:
    """Find the first limit of the manifest that is exceeded: failures, then latency, then drift; None when none is."""
    done = current.cases + current.failures
    if current.failures >= FAILURES_FROM and current.failures / done > watch.max_failure_fraction:
        return Note("activation.failures", f"{current.failures} of {done}")
    allowed_ms = allowed_latency_ms(watch, expected_ms)
    if current.cases >= LATENCY_FROM and current.latency_ms is not None and current.latency_ms > allowed_ms:
        return Note("activation.latency", f"{current.latency_ms:.1f} ms, self-test {expected_ms:.1f} ms")
    if current.drift is not None and watch.max_score_drift is not None and current.drift > watch.max_score_drift:
        return Note("activation.drift", f"{current.drift:.2f}, allowed {watch.max_score_drift:g}")
    return None


def is_over(current: Statistics, watch: Watch, since: str, now: datetime | None = None) -> bool:
    """Whether the trial lasted long enough: enough cases, or enough hours and one case; never while too many jobs failed."""
    if current.failures > watch.max_failure_fraction * (current.cases + current.failures):
        return False
    hours = ((now or datetime.now(timezone.utc)) - datetime.fromisoformat(since)).total_seconds() / 3600
    return current.cases >= watch.trial_cases or (current.cases >= 1 and hours >= watch.trial_hours)


class Trials:
    """Judges the models on trial and the first models of their lines.

    Args:
        takeovers: replaces models that are rolled back.
    """

    def __init__(self, database: Database, journal: Journal, takeovers: Takeovers, logger: logging.Logger) -> None:
        self._database, self._journal, self._takeovers, self._log = database, journal, takeovers, logger

    def count_all(self) -> None:
        """Update the stored statistics of every monitored model."""
        for row in self._journal.monitored():
            self._count(row)

    def check(self) -> None:
        """Compare every monitored model with its limits: roll it back, raise the alarm, or end its trial."""
        for row in self._journal.monitored():
            if row["digest"] in self._takeovers:
                continue
            manifest, current, trial = self._count(row)
            violation = find_violation(current, manifest.watch, SelfTestReport.from_json(row["self_test"]).expected_ms)
            if violation is not None and row["state"] == ActivationState.GOOD:
                self._journal.record_alarm(row["id"], trial, violation)
            elif violation is not None:
                self._log.error("model rolled back", extra={"code": violation.code})
                self._takeovers.roll_back(row, violation)
            elif is_over(current, manifest.watch, trial["since"]):
                self._journal.complete_trial(row["id"], trial)

    def _count(self, row: sqlite3.Row) -> tuple[Manifest, Statistics, dict[str, Any]]:
        """Count what a model did; changed statistics are stored."""
        manifest, known = Manifest.model_validate_json(row["manifest"]), json.loads(row["trial"])
        current = measure(self._database, row["digest"], manifest, known["after_job"], known.get("way_after_job", 0))
        trial = known | current.to_json()
        if trial != known:
            self._journal.record_statistics(row["id"], trial, case_finished=current.cases > known["cases"])
        return manifest, current, trial
