"""The trials of new models: counted, ended, or ended by a rollback."""

from __future__ import annotations

import json
import logging
import sqlite3
from typing import Any

from appliance.core.self_test_report import SelfTestReport
from appliance.core.states import ActivationState
from appliance.lifecycle.journal import Journal
from appliance.lifecycle.takeover import Takeovers
from appliance.lifecycle.trial_monitor import Statistics, find_violation, is_over, measure
from appliance.store.store import Store
from model_sync.bundle import Manifest


class Trials:
    """Judges the models on trial and the first models of their lines.

    Args:
        takeovers: replaces models that are rolled back.
    """

    def __init__(self, store: Store, journal: Journal, takeovers: Takeovers, logger: logging.Logger) -> None:
        self._store, self._journal, self._takeovers, self._log = store, journal, takeovers, logger

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
        current = measure(self._store.database, row["digest"], manifest, known["after_job"], known.get("way_after_job", 0))
        trial = known | current.to_json()
        if trial != known:
            self._journal.record_statistics(row["id"], trial, case_finished=current.cases > known["cases"])
        return manifest, current, trial
