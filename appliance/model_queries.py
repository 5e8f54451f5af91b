"""Queries over the models of this box: the active and previous version of each model line, activations, trials and problems.

The worker writes the journal (table ``activations``), the rules of the model lines (``model_lines``) and ``models``; this module only
reads them. None of them holds patient data. Values that another version of the appliance wrote are returned as far as they are valid.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from appliance.core.accuracy import accuracy_problem
from appliance.core.applicable_accuracy import PatientGroup
from appliance.core.domain import Note, Rate
from appliance.core.run_summary import RuntimeStatus, name_of
from appliance.core.self_test_report import allowed_latency_ms
from appliance.core.states import PENDING_STATES
from appliance.store.score_alarms import ScoreAlarm, ScoreAlarms
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests
from model_sync.bundle import BundleError, Interval, Manifest, Watch

# The states of an activation in their order; each may end in one of FAILURES instead.
STEPS: Final = (*map(str, PENDING_STATES), "trial", "good")
OPEN: Final = STEPS[:4]
FAILURES: Final = ("failed", "rolled-back", "withdrawn")
# A newer version ended the trial: nothing was wrong with this one.
_SUPERSEDED: Final = "activation.superseded"
HISTORY_PAGE: Final = 10


@dataclass(frozen=True)
class MeasuredLabel:
    """What was measured for a label at its threshold: on all test images together and per group of patients.

    Attributes:
        title: of the label, by language.
        n_positive: test images with the finding.
        n_negative: test images without it.
    """

    title: Mapping[str, str]
    threshold: float
    sensitivity: Rate
    specificity: Rate
    n_positive: int
    n_negative: int
    groups: tuple[PatientGroup, ...]


@dataclass(frozen=True)
class ModelVersion:
    """A version that is active on this box, or was.

    Attributes:
        measured: its accuracy by the manifest; none for a model without thresholds, or of a newer format.
        accuracy_problem: why its accuracy is not verified.
    """

    version: str
    digest: str
    precision: str
    runtime: str
    activated_at: str
    title: Mapping[str, str]
    watch: Watch
    running: RuntimeStatus
    measured: tuple[MeasuredLabel, ...]
    accuracy_problem: Note | None


@dataclass(frozen=True)
class Trial:
    """What was measured of a version on trial, and the limits of its manifest; None where nothing was measured or no limit is set."""

    cases: int
    wanted_cases: int | None
    failures: int
    max_failure_fraction: float | None
    latency_ms: float | None
    self_test_ms: float | None
    max_latency_ms: float | None
    drift: float | None
    max_drift: float | None

    @property
    def fraction(self) -> float:
        """How much of the trial is done, 0 to 1."""
        return min(1.0, self.cases / self.wanted_cases) if self.wanted_cases else 0.0

    @property
    def exceeded(self) -> frozenset[str]:
        """Which of ``failures``, ``latency`` and ``drift`` exceed their limit, whether or not there are enough cases to decide by."""
        failed = self.failures / (self.cases + self.failures) if self.failures else 0.0
        pairs = {
            "failures": (failed, self.max_failure_fraction), "latency": (self.latency_ms, self.max_latency_ms),
            "drift": (self.drift, self.max_drift),
        }  # fmt: skip
        return frozenset(name for name, (value, limit) in pairs.items() if value is not None and limit is not None and value > limit)


@dataclass(frozen=True)
class Activation:
    """One entry of the journal.

    Attributes:
        progress: within the state, 0 to 1.
        is_observed: its first images on this box are still compared with the limits of its manifest.
    """

    id: int
    name: str
    version: str
    digest: str
    source: str
    purpose: str
    state: str
    attempts: int
    progress: float
    reason: Note | None
    trial: Trial | None
    is_observed: bool
    started_at: str
    updated_at: str
    ended_at: str | None

    def step_state(self, name: str) -> Literal["done", "now", "todo"]:
        """Whether a step of ``STEPS`` is done, is being done now, or comes later."""
        current, step = STEPS.index(self.state) if self.state in STEPS else -1, STEPS.index(name)
        return "done" if step < current else "now" if step == current else "todo"


@dataclass(frozen=True)
class ModelLine:
    """One model line: its versions, the rules of its signed index, and its last problem.

    Attributes:
        active: the version that analyses images.
        previous: the version before it, to roll back to.
        preparing: an activation whose version is not active yet.
        trial: the activation of the active version, while it is on trial; there may be both.
        problem: the last failed, rolled-back or withdrawn activation; or that of the active version, if it exceeds its limits and there
            is no version to roll back to.
        is_problem_resolved: a later version is good (a rollback to an older one resolves nothing).
        tuning: the last measurement of the active version, perhaps still running.
        score_alarms: what nobody acknowledged of the active version, one per label.
    """

    name: str
    title: Mapping[str, str] | None
    active: ModelVersion | None
    previous: ModelVersion | None
    preparing: Activation | None
    trial: Activation | None
    problem: Activation | None
    is_problem_resolved: bool
    minimum_version: str
    withdrawn: tuple[tuple[str, str], ...]
    tuning: TuningRequest | None = None
    score_alarms: tuple[ScoreAlarm, ...] = ()

    @property
    def unfinished(self) -> tuple[Activation, ...]:
        """The activations that have not ended."""
        return tuple(item for item in (self.preparing, self.trial) if item)

    @property
    def is_busy(self) -> bool:
        """Whether an activation or a measurement is running or waits."""
        return bool(self.unfinished) or bool(self.tuning and self.tuning.open)


def model_lines(store: Store) -> list[ModelLine]:
    """Every model line that this box knows, by name."""
    database = store.database
    models = database.query("SELECT * FROM models ORDER BY activated_at DESC")
    rules = {row["name"]: row for row in database.query("SELECT * FROM model_lines")}
    journal = database.query(
        "SELECT * FROM activations WHERE id IN (SELECT max(id) FROM activations GROUP BY name, state, purpose) ORDER BY id DESC"
    )
    names = sorted({row["name"] for row in (*models, *journal)} | set(rules))
    versions = {row["digest"]: _version(row, store.settings.data_dir) for row in models}
    tunings = TuningRequests(database)
    lines = [
        _line(
            name, [row for row in models if row["name"] == name], [_activation(row, versions) for row in journal if row["name"] == name],
            versions, rules.get(name),
        )
        for name in names
    ]  # fmt: skip
    alarms = ScoreAlarms(database).active()
    return [
        replace(line, tuning=tunings.of(line.active.digest), score_alarms=tuple(alarm for alarm in alarms if alarm.name == line.name))
        if line.active else line for line in lines
    ]  # fmt: skip


def activation_history(store: Store, before: int | None) -> tuple[list[Activation], bool]:
    """Activations, newest first, and whether there are older ones; ``before`` is the last id of the previous page."""
    rows = store.database.query(
        "SELECT * FROM activations WHERE ? IS NULL OR id < ? ORDER BY id DESC LIMIT ?", before, before, HISTORY_PAGE + 1
    )
    return [_activation(row, {}) for row in rows[:HISTORY_PAGE]], len(rows) > HISTORY_PAGE


def _line(
    name: str, models: list[sqlite3.Row], journal: list[Activation], versions: Mapping[str, ModelVersion], rules: sqlite3.Row | None
) -> ModelLine:
    by_state = {state: versions[row["digest"]] for state in ("previous", "active") for row in models if row["state"] == state}
    active = by_state.get("active")
    of_active = next((item for item in journal if active and item.state == "good" and item.digest == active.digest), None)
    problem = of_active if of_active and of_active.reason else next((item for item in journal if _is_problem(item)), None)
    good = next((item for item in journal if item.state == "good" and item.purpose == "activate"), None)
    title = next((versions[row["digest"]].title for row in models if versions[row["digest"]].title), None)
    withdrawn = _object(rules["withdrawn"]) if rules else {}
    return ModelLine(
        name=name,
        title=title,
        active=active,
        previous=by_state.get("previous"),
        preparing=next((item for item in journal if item.state in PENDING_STATES), None),
        trial=next((item for item in journal if item.state == "trial"), of_active if of_active and of_active.is_observed else None),
        problem=problem,
        is_problem_resolved=bool(problem and good and good.id > problem.id),
        minimum_version=str(rules["minimum_version"]) if rules else "",
        withdrawn=tuple((str(version), _withdrawal_reason(reason)) for version, reason in withdrawn.items()),
    )


def _is_problem(item: Activation) -> bool:
    return item.state in FAILURES and not (item.reason and item.reason.code == _SUPERSEDED)


def _version(row: sqlite3.Row, data_dir: Path) -> ModelVersion:
    manifest = _object(row["manifest"])
    title = manifest.get("title")
    try:
        watch = Watch.model_validate(manifest.get("watch", {}))
    except ValidationError:  # a manifest of a newer format
        watch = Watch()
    return ModelVersion(
        version=row["version"], digest=row["digest"], precision=row["precision"], runtime=name_of(row["runtime"]),
        activated_at=row["activated_at"], title=title if isinstance(title, dict) and {"zh", "en"} <= title.keys() else {}, watch=watch,
        running=RuntimeStatus.of(row["self_test"]), measured=_measured(row["manifest"]),
        accuracy_problem=accuracy_problem(data_dir / row["directory"], row["digest"]),
    )  # fmt: skip


def _measured(text: str) -> tuple[MeasuredLabel, ...]:
    try:
        manifest = Manifest.parse(text.encode())
    except BundleError:  # of a newer format
        return ()
    return tuple(
        MeasuredLabel(
            manifest.label(point.label).title.model_dump(), point.threshold, _rate(point.sensitivity), _rate(point.specificity),
            sum(source.n_positive for source in point.per_source), sum(source.n_negative for source in point.per_source),
            tuple(point.groups),
        )
        for point in manifest.operating_points
    )  # fmt: skip


def _rate(interval: Interval) -> Rate:
    return interval.value, interval.low, interval.high


def _activation(row: sqlite3.Row, versions: Mapping[str, ModelVersion]) -> Activation:
    reason, trial = _object(row["reason"]), _object(row["trial"])
    version = versions.get(row["digest"])
    columns = ("id", "name", "version", "digest", "source", "purpose", "state", "attempts", "started_at", "updated_at", "ended_at")
    return Activation(
        **{name: row[name] for name in columns},
        progress=min(1.0, max(0.0, row["progress"])),
        reason=Note(str(reason["code"]), str(reason.get("detail", ""))) if "code" in reason else None,
        trial=_trial(trial, _object(row["self_test"]), version.watch if version else None) if row["trial"] else None,
        is_observed=trial.get("watching") is True,
    )


def _trial(trial: Mapping[str, Any], self_test: Mapping[str, Any], watch: Watch | None) -> Trial:
    self_test_ms = _number(self_test, "median_ms")
    bound_ms = max(self_test_ms or 0.0, _number(self_test, "watch_ms") or 0.0)
    return Trial(
        cases=int(_number(trial, "cases") or 0), wanted_cases=watch.trial_cases if watch else None,
        failures=int(_number(trial, "failures") or 0), max_failure_fraction=watch.max_failure_fraction if watch else None,
        latency_ms=_number(trial, "latency_ms"), self_test_ms=self_test_ms,
        max_latency_ms=allowed_latency_ms(watch, bound_ms) if watch and bound_ms else None,
        drift=_number(trial, "drift"), max_drift=watch.max_score_drift if watch else None,
    )  # fmt: skip


def _number(values: Mapping[str, Any], name: str) -> float | None:
    """A value if it is a finite number; of a value per label (drift) the largest."""
    value = values.get(name)
    if isinstance(value, dict):
        value = max((item for item in value.values() if isinstance(item, int | float)), default=None)
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) == float("inf") or value != value:
        return None
    return float(value)


def _object(text: str | None) -> dict[str, Any]:
    """A JSON object of the database; empty when the text is none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _withdrawal_reason(reason: object) -> str:
    """Why a version was withdrawn, in the words of the central team."""
    return str(reason.get("reason", "")) if isinstance(reason, dict) else str(reason)
