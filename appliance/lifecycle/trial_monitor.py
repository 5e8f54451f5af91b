"""The watch over a new model at work: failures, latency and score drift against what its manifest allows (requirement R31).

Everything is counted from the jobs and findings of this version since it was put to work, so that no counter can be lost.
"""

from __future__ import annotations

import bisect
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

from appliance.core.domain import Note, ScanState
from appliance.store.database import Database
from model_sync.bundle import Manifest, ScoreHistogram, Watch

# One failure in one reading is half of nothing: shares and medians say something from so many on.
FAILURES_FROM: Final = 3
LATENCY_FROM: Final = 5
DRIFT_FROM: Final = 50
# A model that is done sooner than this is judged as if it took so long: a busy box makes tenths of a millisecond into several.
LATENCY_FLOOR_MS: Final = 20.0
# Detail of a failure that came before the model saw anything of the film: not its fault.
BEFORE_MODEL: Final = "before the model"
# What runs the model was not to be had, a hub that is down for one: not its fault either. Nor is how long the line to a hub takes, or
# another way than the one that was measured.
_NOT_REACHED: Final = ("runtime.unavailable", "runtime.deadline")
# Jeffreys' prior: an empty bin is rare, not impossible.
_PRIOR: Final = 0.5


@dataclass(frozen=True)
class Statistics:
    """What a version did since it was put to work.

    Attributes:
        cases: images it read.
        failures: readings that failed for good.
        latency_ms: median time of an inference the way it is run now; None before the first, or before five since that changed.
        drift: largest population stability index of a label, less the part that chance alone gives; None before 50 images.
    """

    cases: int
    failures: int
    latency_ms: float | None
    drift: float | None

    def to_json(self) -> dict[str, Any]:
        """As it stands in the journal."""
        return {"cases": self.cases, "failures": self.failures, "latency_ms": self.latency_ms, "drift": self.drift}


def measure(database: Database, digest: str, manifest: Manifest, after_job: int, way_after_job: int = 0) -> Statistics:
    """Count what a version did in the jobs planned after ``after_job``.

    Args:
        database: the box's.
        digest: the version.
        manifest: its manifest.
        after_job: the last job before it was put to work.
        way_after_job: the last job before another way of running it was taken; 0 when none was. Times before it were another way's
            and do not count, and the first few after it tell nothing yet.
    """
    jobs = database.query(
        "SELECT id, outcome, coalesce(json_extract(timing_ms, '$.window'), json_extract(timing_ms, '$.infer')) AS infer,"
        " coalesce(json_extract(runtime, '$.leaves_box'), json_extract(runtime, '$.reason.code') = 'choice.fallback', 0) AS other FROM jobs"
        " WHERE model_digest = ? AND id > ? AND outcome IN (?, ?) AND state IN ('done', 'failed')"
        " AND coalesce(json_extract(reason, '$.detail'), '') != ?"
        " AND NOT (outcome = 'failed' AND coalesce(json_extract(reason, '$.code'), '') IN (SELECT value FROM json_each(?)))",
        digest, after_job, ScanState.AI_READY.value, ScanState.FAILED.value, BEFORE_MODEL, json.dumps(_NOT_REACHED),
    )  # fmt: skip
    read = [row for row in jobs if row["outcome"] == ScanState.AI_READY.value]
    latencies = [row["infer"] for row in read if row["infer"] is not None and not row["other"] and row["id"] > way_after_job]
    timed = len(latencies) >= (LATENCY_FROM if way_after_job else 1)
    drift = None
    if len(read) >= DRIFT_FROM:
        drift = max((_drift(database, digest, after_job, histogram) for histogram in manifest.reference_scores), default=None)
    return Statistics(len(read), len(jobs) - len(read), statistics.median(latencies) if timed else None, drift)


def _drift(database: Database, digest: str, after_job: int, histogram: ScoreHistogram) -> float:
    rows = database.query(
        "SELECT f.score FROM jobs j JOIN findings f ON f.job_id = j.id WHERE j.model_digest = ? AND j.id > ? AND f.label = ?",
        digest, after_job, histogram.label,
    )  # fmt: skip
    if not rows:
        return 0.0
    return stability_index([row["score"] for row in rows], histogram) - (len(histogram.counts) - 1) / len(rows)


def stability_index(scores: Sequence[float], reference: ScoreHistogram) -> float:
    """The population stability index of scores against a histogram: the sum over bins of (p - q) ln(p / q).

    A score beyond the outermost edges belongs to the outermost bin.
    """
    bins = len(reference.counts)
    counts = [0] * bins
    for score in scores:
        counts[min(max(bisect.bisect_right(reference.edges, score) - 1, 0), bins - 1)] += 1
    here, there = _shares(counts), _shares(reference.counts)
    return math.fsum((p - q) * math.log(p / q) for p, q in zip(here, there, strict=True))


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + _PRIOR * len(counts)
    return [(count + _PRIOR) / total for count in counts]


def out_of_bounds(seen: Statistics, watch: Watch, self_test_ms: float) -> Note | None:
    """What passes the manifest's bounds, the worst first; None when nothing does."""
    done = seen.cases + seen.failures
    if seen.failures >= FAILURES_FROM and seen.failures / done > watch.max_failure_fraction:
        return Note("activation.failures", f"{seen.failures} of {done}")
    allowed_ms = allowed_latency_ms(watch, self_test_ms)
    if seen.cases >= LATENCY_FROM and seen.latency_ms is not None and seen.latency_ms > allowed_ms:
        return Note("activation.latency", f"{seen.latency_ms:.1f} ms, self-test {self_test_ms:.1f} ms")
    if seen.drift is not None and watch.max_score_drift is not None and seen.drift > watch.max_score_drift:
        return Note("activation.drift", f"{seen.drift:.2f}, allowed {watch.max_score_drift:g}")
    return None


def allowed_latency_ms(watch: Watch, self_test_ms: float) -> float:
    """The longest median that the manifest allows where the self-test took so long."""
    return watch.max_latency_ratio * max(self_test_ms, LATENCY_FLOOR_MS)


def bound_ms(report: dict[str, Any]) -> float:
    """What the latency is held against: the self-test's, or that of a slower way it was run since through no fault of the model's."""
    return float(max(report["median_ms"], report.get("watch_ms", 0.0)))


def is_over(seen: Statistics, watch: Watch, since: str, now: datetime | None = None) -> bool:
    """Whether the trial has lasted long enough: enough cases, or enough hours with a case at least; never while too much of it failed."""
    if seen.failures > watch.max_failure_fraction * (seen.cases + seen.failures):
        return False
    hours = ((now or datetime.now(timezone.utc)) - datetime.fromisoformat(since)).total_seconds() / 3600
    return seen.cases >= watch.trial_cases or (seen.cases >= 1 and hours >= watch.trial_hours)


def after_job(row: Any) -> int:
    """The last job before an activation's model was put to work."""
    return int(json.loads(row["trial"] or "{}").get("after_job", 0))
