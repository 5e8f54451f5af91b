"""The signed life of the models on this box, as the status page shows it: what reads patients, what comes next, what went wrong.

The worker writes the journal (table ``activations``), the lines' rules (``model_lines``) and ``models``; here they are only read.
Nothing of a patient stands in any of them. Values that another version wrote are shown as far as they are understood.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import ValidationError

from appliance.core.domain import Note
from appliance.core.run_summary import RuntimeStatus, name_of
from appliance.lifecycle.trial_monitor import allowed_latency_ms
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests
from model_sync.bundle import Watch

# The way of every version; each may end in one of TROUBLE instead.
STEPS: Final = ("staged", "building", "self-test", "trial", "good")
COMING: Final = STEPS[:3]
OPEN: Final = STEPS[:4]
TROUBLE: Final = ("failed", "rolled-back", "withdrawn")
# A trial that a still newer version cut short: nothing was wrong with it.
_NO_TROUBLE: Final = "activation.superseded"
HISTORY_PAGE: Final = 10


@dataclass(frozen=True)
class Model:
    """One version that reads patients, or did."""

    version: str
    digest: str
    precision: str
    runtime: str
    activated_at: str
    title: Mapping[str, str]
    watch: Watch
    running: RuntimeStatus


@dataclass(frozen=True)
class Trial:
    """How a version on trial does against what its manifest allows; None where nothing was measured or nothing is set."""

    cases: int
    wanted: int | None
    failures: int
    max_failure_fraction: float | None
    latency_ms: float | None
    self_test_ms: float | None
    max_latency_ms: float | None
    drift: float | None
    max_drift: float | None

    @property
    def part(self) -> float:
        """How much of the trial is done, 0 to 1."""
        return min(1.0, self.cases / self.wanted) if self.wanted else 0.0

    @property
    def beyond(self) -> frozenset[str]:
        """Which of ``failures``, ``latency`` and ``drift`` are beyond what is allowed, whether or not there is enough of it to judge by."""
        failed = self.failures / (self.cases + self.failures) if self.failures else 0.0
        pairs = {
            "failures": (failed, self.max_failure_fraction), "latency": (self.latency_ms, self.max_latency_ms),
            "drift": (self.drift, self.max_drift),
        }  # fmt: skip
        return frozenset(name for name, (value, limit) in pairs.items() if value is not None and limit is not None and value > limit)


@dataclass(frozen=True)
class Activation:
    """One entry of the journal; ``progress`` is 0 to 1 within the state."""

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
    watching: bool
    started_at: str
    updated_at: str
    ended_at: str | None

    def step(self, name: str) -> str:
        """How far a step of the stepper is: ``done``, ``now`` or ``todo``."""
        here, there = STEPS.index(self.state) if self.state in STEPS else -1, STEPS.index(name)
        return "done" if there < here else "now" if there == here else "todo"


@dataclass(frozen=True)
class Line:
    """One model line: its versions, the rules of its signed index, and the last thing that went wrong.

    ``coming`` does not read patients yet, ``trial`` does already; there may be both. ``trouble`` is the last failed, rolled-back
    or withdrawn activation, or the one at work when it is out of its bounds and there is none to go back to; ``mended`` says that
    a later version came out good (going back to an older one mends nothing). ``tuning`` is the last measuring of
    the current version, perhaps under way.
    """

    name: str
    title: Mapping[str, str] | None
    current: Model | None
    previous: Model | None
    coming: Activation | None
    trial: Activation | None
    trouble: Activation | None
    mended: bool
    minimum_version: str
    withdrawn: tuple[tuple[str, str], ...]
    tuning: TuningRequest | None = None

    @property
    def under_way(self) -> tuple[Activation, ...]:
        """What has not reached its end yet."""
        return tuple(item for item in (self.coming, self.trial) if item)


def lines(store: Store) -> list[Line]:
    """Every model line this box knows of, by name."""
    database = store.database
    models = database.query("SELECT * FROM models ORDER BY activated_at DESC")
    rules = {row["name"]: row for row in database.query("SELECT * FROM model_lines")}
    journal = database.query(
        "SELECT * FROM activations WHERE id IN (SELECT max(id) FROM activations GROUP BY name, state, purpose) ORDER BY id DESC"
    )
    names = sorted({row["name"] for row in (*models, *journal)} | set(rules))
    known = {row["digest"]: _model(row) for row in models}
    tunings = TuningRequests(database)
    found = [
        _line(
            name,
            [row for row in models if row["name"] == name],
            [_activation(row, known) for row in journal if row["name"] == name],
            known,
            rules.get(name),
        )
        for name in names
    ]
    return [replace(line, tuning=tunings.of(line.current.digest)) if line.current else line for line in found]


def history(store: Store, before: int | None) -> tuple[list[Activation], bool]:
    """Activations, newest first, and whether there are older ones; ``before`` is the last id of the page before."""
    rows = store.database.query(
        "SELECT * FROM activations WHERE ? IS NULL OR id < ? ORDER BY id DESC LIMIT ?", before, before, HISTORY_PAGE + 1
    )
    return [_activation(row, {}) for row in rows[:HISTORY_PAGE]], len(rows) > HISTORY_PAGE


def _line(name: str, models: list[sqlite3.Row], journal: list[Activation], known: Mapping[str, Model], rules: sqlite3.Row | None) -> Line:
    by_state = {state: known[row["digest"]] for state in ("previous", "active") for row in models if row["state"] == state}
    current = by_state.get("active")
    at_work = next((item for item in journal if current and item.state == "good" and item.digest == current.digest), None)
    trouble = at_work if at_work and at_work.reason else next((item for item in journal if _is_trouble(item)), None)
    good = next((item for item in journal if item.state == "good" and item.purpose == "activate"), None)
    title = next((known[row["digest"]].title for row in models if known[row["digest"]].title), None)
    withdrawn = _object(rules["withdrawn"]) if rules else {}
    return Line(
        name=name,
        title=title,
        current=current,
        previous=by_state.get("previous"),
        coming=next((item for item in journal if item.state in COMING), None),
        trial=next((item for item in journal if item.state == "trial"), at_work if at_work and at_work.watching else None),
        trouble=trouble,
        mended=bool(trouble and good and good.id > trouble.id),
        minimum_version=str(rules["minimum_version"]) if rules else "",
        withdrawn=tuple((str(version), _why(reason)) for version, reason in withdrawn.items()),
    )


def _is_trouble(item: Activation) -> bool:
    return item.state in TROUBLE and not (item.reason and item.reason.code == _NO_TROUBLE)


def _model(row: sqlite3.Row) -> Model:
    manifest = _object(row["manifest"])
    title = manifest.get("title")
    try:
        watch = Watch.model_validate(manifest.get("watch", {}))
    except ValidationError:  # a newer manifest than this page understands
        watch = Watch()
    return Model(
        version=row["version"],
        digest=row["digest"],
        precision=row["precision"],
        runtime=name_of(row["runtime"]),
        activated_at=row["activated_at"],
        title=title if isinstance(title, dict) and {"zh", "en"} <= title.keys() else {},
        watch=watch,
        running=RuntimeStatus.of(row["self_test"]),
    )


def _activation(row: sqlite3.Row, known: Mapping[str, Model]) -> Activation:
    reason, trial = _object(row["reason"]), _object(row["trial"])
    model = known.get(row["digest"])
    return Activation(
        id=row["id"],
        name=row["name"],
        version=row["version"],
        digest=row["digest"],
        source=row["source"],
        purpose=row["purpose"],
        state=row["state"],
        attempts=row["attempts"],
        progress=min(1.0, max(0.0, row["progress"])),
        reason=Note(str(reason["code"]), str(reason.get("detail", ""))) if "code" in reason else None,
        trial=_trial(trial, _object(row["self_test"]), model.watch if model else None) if row["trial"] else None,
        watching=trial.get("watching") is True,
        started_at=row["started_at"],
        updated_at=row["updated_at"],
        ended_at=row["ended_at"],
    )


def _trial(trial: Mapping[str, Any], self_test: Mapping[str, Any], watch: Watch | None) -> Trial:
    self_test_ms = _number(self_test, "median_ms")
    bound_ms = max(self_test_ms or 0.0, _number(self_test, "watch_ms") or 0.0)
    return Trial(
        cases=int(_number(trial, "cases") or 0),
        wanted=watch.trial_cases if watch else None,
        failures=int(_number(trial, "failures") or 0),
        max_failure_fraction=watch.max_failure_fraction if watch else None,
        latency_ms=_number(trial, "latency_ms"),
        self_test_ms=self_test_ms,
        max_latency_ms=allowed_latency_ms(watch, bound_ms) if watch and bound_ms else None,
        drift=_number(trial, "drift"),
        max_drift=watch.max_score_drift if watch else None,
    )


def _number(values: Mapping[str, Any], *names: str) -> float | None:
    """The first of these values that is a finite number; a drift is told as one number or as one for each label."""
    for name in names:
        value = values.get(name)
        if isinstance(value, dict):
            value = max((item for item in value.values() if isinstance(item, int | float)), default=None)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
            return float(value)
    return None


def _object(text: str | None) -> dict[str, Any]:
    """A JSON object of the database; empty when it is none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _why(reason: object) -> str:
    """Why a version was withdrawn: the central team's own words."""
    return str(reason.get("reason", "")) if isinstance(reason, dict) else str(reason)
