"""Queries on the journal of models: what is pending, what is forbidden, what failed before, which model may take over."""

from __future__ import annotations

import json
import sqlite3
from datetime import datetime, timedelta, timezone
from typing import Final

import semver

from appliance.core import device_profile
from appliance.core.domain import JobState, Note
from appliance.core.errors import ActivationError
from appliance.core.states import IN_USE_STATES, PENDING_STATES, ActivationState, ModelState
from appliance.store.database import Database

# Failures that will happen again on this device: the model is not tried again unless a person asks for it or the device changes.
PERMANENT_FAILURES: Final = frozenset(
    {
        "model.self_test", "model.too_new", "activation.crash_loop", "activation.reboot_loop", "activation.deadline", "activation.memory",
        "activation.failures", "activation.latency", "activation.drift", "activation.by_hand",
    }
)  # fmt: skip
# Refusals before the self-test began: checking them again costs nothing, so it is done whenever the model is wanted.
REFUSALS: Final = frozenset(
    {
        "activation.superseded", "model.absent", "model.not_signed", "model.mismatch", "model.below_minimum", "model.withdrawn",
    }
)  # fmt: skip
INTERRUPTED: Final = "activation.interrupted"
_RETRY: Final = timedelta(minutes=10)
_LONGEST_RETRY: Final = timedelta(days=1)

PENDING_JSON: Final = json.dumps(PENDING_STATES)
_IN_USE_JSON: Final = json.dumps(IN_USE_STATES)
# The last verdict on a model, and the states that show that it was put to work.
_VERDICTS_JSON: Final = json.dumps((ActivationState.GOOD, ActivationState.ROLLED_BACK, ActivationState.WITHDRAWN))
_SWITCHED_JSON: Final = json.dumps((*IN_USE_STATES, ActivationState.ROLLED_BACK, ActivationState.WITHDRAWN))


class JournalQueries:
    """The read-only part of the journal.

    Attributes:
        device: digest of the device that models are tested on.
    """

    def __init__(self, database: Database) -> None:
        self._db = database
        self.device = device_profile.digest()

    def row(self, number: int) -> sqlite3.Row:
        """Return one activation; raises ActivationError ``model.unknown``."""
        row = self._db.one("SELECT * FROM activations WHERE id = ?", number)
        if row is None:
            raise ActivationError("model.unknown", f"activation {number}")
        return row

    def pending(self, name: str | None = None) -> sqlite3.Row | None:
        """Return the oldest activation before its switch, of one model line or of any."""
        return self._db.one(
            "SELECT * FROM activations WHERE state IN (SELECT value FROM json_each(?1)) AND (?2 IS NULL OR name = ?2) ORDER BY id LIMIT 1",
            PENDING_JSON, name,
        )  # fmt: skip

    def running_digests(self) -> list[str]:
        """List the models whose jobs were running when the worker crashed; ask before the jobs are recovered.

        An empty digest stands for a job that only checks whether an image can be decoded.
        """
        rows = self._db.query("SELECT DISTINCT model_digest FROM jobs WHERE state = ?", JobState.RUNNING.value)
        return [row["model_digest"] for row in rows]

    def monitored(self) -> list[sqlite3.Row]:
        """List the activations whose models are monitored: on trial, or the first of their model line and new."""
        return self._db.query(
            "SELECT a.*, m.manifest FROM activations a JOIN models m ON m.digest = a.digest"
            " WHERE a.state = ? OR (a.state = ? AND json_extract(a.trial, '$.watching') = 1 AND m.state = ?)",
            ActivationState.TRIAL.value, ActivationState.GOOD.value, ModelState.ACTIVE.value,
        )  # fmt: skip

    def history(self, limit: int = 20) -> list[sqlite3.Row]:
        """List the last activations, newest first."""
        return self._db.query("SELECT * FROM activations ORDER BY id DESC LIMIT ?", limit)

    def active(self, name: str) -> sqlite3.Row | None:
        """Return the active model of a model line, if there is one."""
        return self._db.one("SELECT * FROM models WHERE name = ? AND state = ?", name, ModelState.ACTIVE.value)

    def has_line(self, name: str) -> bool:
        """Whether this box has a model of a model line, or knows what its index forbids."""
        rows = self._db.query("SELECT 1 FROM models WHERE name = ?1 UNION SELECT 1 FROM model_lines WHERE name = ?1", name)
        return bool(rows)

    def find_restriction(self, name: str, version: str) -> Note | None:
        """Find why the signed index of the model line forbids a version: withdrawn, or below the minimum; None when it does not."""
        line = self._db.one("SELECT * FROM model_lines WHERE name = ?", name)
        if line is None:
            return None
        withdrawn = json.loads(line["withdrawn"])
        if version in withdrawn:
            return Note("model.withdrawn", f"{name} {version}: {withdrawn[version]}")
        if is_older(version, line["minimum_version"]):
            return Note("model.below_minimum", f"{version}, minimum {line['minimum_version']}")
        return None

    def find_blocking_failure(self, digest: str) -> Note | None:
        """Find why a model is not tried automatically: a permanent failure on this device, or a temporary one not long ago."""
        rows = self._db.query("SELECT * FROM activations WHERE digest = ? AND device = ? ORDER BY id DESC LIMIT 20", digest, self.device)
        failed: list[sqlite3.Row] = []
        for row in rows:
            if row["state"] not in (ActivationState.FAILED, ActivationState.ROLLED_BACK):
                break
            if reason_code(row) not in REFUSALS and not reason_code(row).startswith("trust."):
                failed.append(row)
        if not failed:
            return None
        reason = reason_of(failed[0])
        if reason.code in PERMANENT_FAILURES:
            return reason
        pause = min(_RETRY * 2 ** (len(failed) - 1), _LONGEST_RETRY)
        since = datetime.now(timezone.utc) - datetime.fromisoformat(failed[0]["ended_at"])
        return reason if timedelta() <= since < pause else None

    def was_interrupted_before(self, digest: str) -> bool:
        """Whether an activation of a model ended because this device booted during its self-test, again and again."""
        rows = self._db.query(
            "SELECT 1 FROM activations WHERE digest = ? AND device = ? AND json_extract(reason, '$.code') = ?",
            digest,
            self.device,
            INTERRUPTED,
        )
        return bool(rows)

    def count_recent_refusals(self, name: str) -> int:
        """Count the requests of the sync agent for a model line that were refused in the last hour, before a self-test."""
        now = datetime.now(timezone.utc)
        row = self._db.one(
            "SELECT count(*) AS n FROM activations WHERE name = ? AND actor = 'model-sync' AND state = ? AND attempts = 0"
            " AND started_at BETWEEN ? AND ?",
            name, ActivationState.FAILED.value, (now - timedelta(hours=1)).isoformat(timespec="milliseconds"),
            now.isoformat(timespec="milliseconds"),
        )  # fmt: skip
        return row["n"] if row else 0

    def is_overridden_by_user(self, name: str, digest: str) -> bool:
        """Whether a person activated another model after this one was activated for the library: the person's decision has priority."""
        row = self._db.one(
            "SELECT max(CASE WHEN digest = ?2 AND source IN ('library', 'usb') AND state IN (SELECT value FROM json_each(?3)) THEN id END)"
            " AS met, max(CASE WHEN digest != ?2 AND source = 'hand' AND state IN (SELECT value FROM json_each(?4)) THEN id END) AS chosen"
            " FROM activations WHERE name = ?1",
            name, digest, _SWITCHED_JSON, _IN_USE_JSON,
        )  # fmt: skip
        return row is not None and row["met"] is not None and row["chosen"] is not None and row["chosen"] > row["met"]

    def successors(self, name: str, digest: str) -> list[sqlite3.Row]:
        """List the models that may take over from a model of their line, best first: tested here, good, and not forbidden."""
        rows = self._db.query(
            "SELECT m.*, (SELECT a.state FROM activations a WHERE a.digest = m.digest AND a.state IN (SELECT value FROM json_each(?3))"
            " ORDER BY a.id DESC LIMIT 1) AS verdict FROM models m WHERE m.name = ?1 AND m.digest != ?2 AND m.state != ?4"
            " ORDER BY m.state = ?5 DESC, m.activated_at DESC",
            name, digest, _VERDICTS_JSON, ModelState.ACTIVE.value, ModelState.PREVIOUS.value,
        )  # fmt: skip
        # A model without an activation is older than the journal.
        return [
            row for row in rows
            if row["verdict"] in (None, ActivationState.GOOD) and self.find_restriction(name, row["version"]) is None
        ]  # fmt: skip

    def installed_digests(self) -> list[str]:
        """List the models that analysed scans: their copies stay on the disk, so that any result can be reproduced."""
        return [row["digest"] for row in self._db.query("SELECT digest FROM models")]

    def find_withdrawn(self) -> list[tuple[sqlite3.Row, Note]]:
        """List the models that their line withdrew and that are still active or not marked as withdrawn, with the reason."""
        rows = self._db.query(
            "SELECT m.*, w.value AS why FROM model_lines l JOIN json_each(l.withdrawn) w"
            " JOIN models m ON m.name = l.name AND m.version = w.key"
            " WHERE m.state = ? OR NOT EXISTS (SELECT 1 FROM activations a WHERE a.digest = m.digest AND a.state = ?)",
            ModelState.ACTIVE.value, ActivationState.WITHDRAWN.value,
        )  # fmt: skip
        return [(row, Note("model.withdrawn", str(row["why"]))) for row in rows]


def is_older(version: str, than: str) -> bool:
    """Whether a version has lower precedence than another by Semantic Versioning 2.0, clause 11.

    A text that is no semantic version is older than every version.
    """
    if not semver.Version.is_valid(than):
        return False
    return not semver.Version.is_valid(version) or semver.Version.parse(version).compare(than) < 0


def reason_of(row: sqlite3.Row) -> Note:
    """Return the reason why an activation ended."""
    return Note(**json.loads(row["reason"]))


def reason_code(row: sqlite3.Row) -> str:
    """Return the code of the reason why an activation ended; empty when it has none."""
    return reason_of(row).code if row["reason"] else ""
