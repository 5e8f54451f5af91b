"""Watches the raw scores of the active models for a shift, and raises an alarm for an administrator; it switches nothing off.

The test is in :mod:`appliance.lifecycle.score_shift`, the stored state in :mod:`appliance.store.score_alarms`: a restart loses nothing.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Final

from appliance.core.domain import Note
from appliance.core.states import ModelState
from appliance.lifecycle.score_shift import Reference, ShiftEvidence
from appliance.store.database import Database
from appliance.store.score_alarms import SCORE_SHIFT, ScoreAlarms, ScoreMonitor
from model_sync.bundle import Manifest

logger = logging.getLogger(__name__)

# The scores whose median the alarm shows beside that of the scores before them: an alarm usually comes after some more.
_SHOWN_SCORES: Final = 20


class ScoreMonitors:
    """Takes new scores into account; :meth:`check` is called between two jobs and reads some hundred scores at most."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._alarms = ScoreAlarms(database)
        self._manifests: dict[str, Manifest] = {}
        # (digest, label) -> the findings up to this one were searched; so that other models' findings are read once.
        self._searched: dict[tuple[str, str], int] = {}
        self._newest = -1

    def check(self) -> int:
        """Compare the new scores of every active model; returns how many alarms were raised."""
        newest = self._db.number("SELECT max(id) FROM findings")
        if newest == self._newest:
            return 0
        rows = self._db.query("SELECT digest, name, version FROM models WHERE state = ?", ModelState.ACTIVE.value)
        manifests = {row["digest"]: self._manifest(row["digest"]) for row in rows}
        self._manifests = manifests
        labels = sum(len(manifest.reference_scores) for manifest in manifests.values())
        raised, is_complete = 0, True
        for row in rows:
            manifest = manifests[row["digest"]]
            for histogram in manifest.reference_scores:
                point = next((point for point in manifest.operating_points if point.label == histogram.label), None)
                monitor = self._next(row["digest"], histogram.label)
                new = self._alarms.next_scores(monitor) if monitor else []
                if monitor is None or not new:
                    self._searched[row["digest"], histogram.label] = newest
                    continue
                is_complete = False  # there may be more than one step reads
                note = self._add(monitor, new, Reference.of(histogram, point), labels, f"{row['name']} {row['version']}")
                raised += note is not None
        self._newest = newest if is_complete else -1
        return raised

    def _manifest(self, digest: str) -> Manifest:
        known = self._manifests.get(digest)
        if known is None:
            row = self._db.require(digest, "SELECT manifest FROM models WHERE digest = ?", digest)
            known = Manifest.model_validate_json(row["manifest"])
        return known

    def _next(self, digest: str, label: str) -> ScoreMonitor | None:
        monitor = self._alarms.monitor(digest, label)
        searched = self._searched.get((digest, label), 0)
        return replace(monitor, last_finding=max(monitor.last_finding, searched)) if monitor else None

    def _add(self, monitor: ScoreMonitor, new: Sequence[sqlite3.Row], reference: Reference, labels: int, model: str) -> Note | None:
        """Take findings into account, and store the evidence or the alarm; returns the alarm."""
        evidence = _parse(monitor.evidence)
        for row in new:
            monitor = replace(monitor, last_finding=row["id"], studies=monitor.studies + int(row["first"]))
            if not row["first"]:
                continue
            evidence.add(row["score"], reference if monitor.compares_reference else None)
            if evidence.exceeds(labels):
                return self._raise(replace(monitor, evidence=json.dumps(asdict(evidence))), model)
        self._alarms.record(replace(monitor, evidence=json.dumps(asdict(evidence))))
        return None

    def _raise(self, monitor: ScoreMonitor, model: str) -> Note:
        """Raise the alarm; its detail has medians and counts only."""
        scores = self._alarms.last_scores(monitor)
        note = Note(SCORE_SHIFT, _describe(monitor.label, scores[:_SHOWN_SCORES], scores[_SHOWN_SCORES:]))
        self._alarms.record(monitor, note, model)
        logger.error("the scores of a model shifted", extra={"code": note.code})
        return note


def _describe(label: str, last: Sequence[float], before: Sequence[float]) -> str:
    text = f"{label}: median {statistics.median(last):.2f} of the last {len(last)}"
    return text + (f", {statistics.median(before):.2f} of {len(before)} before" if before else "")


def _parse(text: str) -> ShiftEvidence:
    """Read stored evidence; that of another version of the test begins anew."""
    try:
        values = json.loads(text)
        evidence = ShiftEvidence(list(values["history"]), tuple(values["own"]), tuple(values["against_reference"]))
        return evidence if evidence.is_valid() else ShiftEvidence()
    except (ValueError, TypeError, KeyError):
        return ShiftEvidence()
