"""What the journal of models says, without changing it: what is under way, what is forbidden, what failed before, who may take over."""

from __future__ import annotations

import json
import sqlite3
from datetime import datetime, timedelta, timezone
from typing import Final

import semver

from appliance.core import device_profile
from appliance.core.domain import Note
from appliance.core.errors import ActivationError
from appliance.store.database import Database

PROVING: Final = ("staged", "building", "self-test")
# What a model did on this device will happen again: it is not tried again unless somebody asks for it, or the device changes.
LASTING: Final = frozenset(
    {
        "model.self_test", "model.too_new", "activation.crash_loop", "activation.reboot_loop", "activation.deadline", "activation.memory",
        "activation.failures", "activation.latency", "activation.drift", "activation.by_hand",
    }
)  # fmt: skip
# What was refused before its proof began: asked again whenever it is wanted, which costs nothing.
REFUSALS: Final = frozenset(
    {
        "activation.superseded", "model.absent", "model.not_signed", "model.mismatch", "model.below_minimum", "model.withdrawn",
    }
)  # fmt: skip
_RETRY: Final = timedelta(minutes=10)
_LONGEST_RETRY: Final = timedelta(days=1)


class Ledger:
    """The reading side of the journal.

    Args:
        database: the box's database; the connection of the thread that asks is used.

    Attributes:
        device: digest of the device that models are proven on.
    """

    def __init__(self, database: Database) -> None:
        self._db = database
        self.device = device_profile.digest()

    def row(self, number: int) -> sqlite3.Row:
        """One activation; raises ActivationError ``model.unknown``."""
        row = self._db.one("SELECT * FROM activations WHERE id = ?", number)
        if row is None:
            raise ActivationError("model.unknown", f"activation {number}")
        return row

    def coming(self, name: str | None = None) -> sqlite3.Row | None:
        """The oldest activation that is not at the switch yet; of one line, or of any."""
        where = "state IN ('staged', 'building', 'self-test') AND (?1 IS NULL OR name = ?1)"
        return self._db.one(f"SELECT * FROM activations WHERE {where} ORDER BY id LIMIT 1", name)  # noqa: S608

    def at_work(self) -> list[str]:
        """What a worker was reading with when it fell: digests of models, and empty for a look without a model; asked at the next start."""
        return [row["model_digest"] for row in self._db.query("SELECT DISTINCT model_digest FROM jobs WHERE state = 'running'")]

    def watched(self) -> list[sqlite3.Row]:
        """Activations whose model's work is watched: on trial, or alone in its line and new."""
        return self._db.query(
            "SELECT a.*, m.manifest FROM activations a JOIN models m ON m.digest = a.digest"
            " WHERE a.state = 'trial' OR (a.state = 'good' AND json_extract(a.trial, '$.watching') = 1 AND m.state = 'active')"
        )

    @staticmethod
    def reason(row: sqlite3.Row) -> tuple[str, str]:
        """Code and detail of why an activation ended."""
        note = Note(**json.loads(row["reason"]))
        return note.code, note.detail

    def history(self, limit: int = 20) -> list[sqlite3.Row]:
        """The last activations, newest first."""
        return self._db.query("SELECT * FROM activations ORDER BY id DESC LIMIT ?", limit)

    def active(self, name: str) -> sqlite3.Row | None:
        """The model of a line that reads patients, if there is one."""
        return self._db.one("SELECT * FROM models WHERE name = ? AND state = 'active'", name)

    def knows(self, name: str) -> bool:
        """Whether a line is one of this box: it has a model of it, or has learnt what its index forbids."""
        rows = self._db.query("SELECT 1 FROM models WHERE name = ?1 UNION SELECT 1 FROM model_lines WHERE name = ?1", name)
        return bool(rows)

    def barred(self, name: str, version: str) -> Note | None:
        """Why the signed index of the line forbids a version: withdrawn, or below the minimum; None when it does not."""
        line = self._db.one("SELECT * FROM model_lines WHERE name = ?", name)
        if line is None:
            return None
        withdrawn = json.loads(line["withdrawn"])
        if version in withdrawn:
            return Note("model.withdrawn", f"{name} {version}: {withdrawn[version]}")
        return (
            Note("model.below_minimum", f"{version}, minimum {line['minimum_version']}")
            if older(version, line["minimum_version"])
            else None
        )

    def remembered(self, digest: str) -> Note | None:
        """Why a model is not tried by itself: it failed on this device for good, or failed just now for want of something."""
        rows = self._db.query("SELECT * FROM activations WHERE digest = ? AND device = ? ORDER BY id DESC LIMIT 20", digest, self.device)
        failed: list[sqlite3.Row] = []
        for row in rows:
            if row["state"] not in ("failed", "rolled-back"):
                break
            if code_of(row) not in REFUSALS and not code_of(row).startswith("trust."):
                failed.append(row)
        if not failed:
            return None
        reason = Note(**json.loads(failed[0]["reason"]))
        if reason.code in LASTING:
            return reason
        pause = min(_RETRY * 2 ** (len(failed) - 1), _LONGEST_RETRY)
        since = datetime.now(timezone.utc) - datetime.fromisoformat(failed[0]["ended_at"])
        return reason if timedelta() <= since < pause else None

    def refused_lately(self, name: str) -> int:
        """How many wishes of the agent for a line were refused within the last hour, before anything was begun."""
        now = datetime.now(timezone.utc)
        row = self._db.one(
            "SELECT count(*) AS n FROM activations WHERE name = ? AND actor = 'model-sync' AND state = 'failed' AND attempts = 0"
            " AND started_at BETWEEN ? AND ?",
            name, (now - timedelta(hours=1)).isoformat(timespec="milliseconds"), now.isoformat(timespec="milliseconds"),
        )  # fmt: skip
        return row["n"] if row else 0

    def overruled(self, name: str, digest: str) -> bool:
        """Whether a person put another model to work after the library's wish for this one was met: the person's word holds."""
        row = self._db.one(
            "SELECT max(CASE WHEN digest = ?2 AND source IN ('library', 'usb') AND state IN ('trial', 'good', 'rolled-back', 'withdrawn')"
            " THEN id END) AS met,"
            " max(CASE WHEN digest != ?2 AND source = 'hand' AND state IN ('trial', 'good') THEN id END) AS chosen"
            " FROM activations WHERE name = ?1",
            name,
            digest,
        )
        return row is not None and row["met"] is not None and row["chosen"] is not None and row["chosen"] > row["met"]

    def successors(self, name: str, digest: str) -> list[sqlite3.Row]:
        """The models that may take over from one of their line, best first: proven good here, not forbidden, not it itself."""
        rows = self._db.query(
            "SELECT m.*, (SELECT a.state FROM activations a WHERE a.digest = m.digest AND a.state IN ('good', 'rolled-back', 'withdrawn')"
            " ORDER BY a.id DESC LIMIT 1) AS verdict FROM models m WHERE m.name = ? AND m.digest != ? AND m.state != 'active'"
            " ORDER BY m.state = 'previous' DESC, m.activated_at DESC",
            name,
            digest,
        )
        # One without an entry was put to work before there was a journal.
        return [row for row in rows if row["verdict"] in (None, "good") and self.barred(name, row["version"]) is None]

    def kept(self) -> list[str]:
        """Digests of models that have read patients: their copies stay, so that any result can be replayed."""
        return [row["digest"] for row in self._db.query("SELECT digest FROM models")]

    def withdrawn(self) -> list[tuple[sqlite3.Row, Note]]:
        """Models that their line withdrew and that are not switched off yet, with the reason."""
        rows = self._db.query(
            "SELECT m.*, w.value AS why FROM model_lines l JOIN json_each(l.withdrawn) w"
            " JOIN models m ON m.name = l.name AND m.version = w.key"
            " WHERE m.state = 'active' OR NOT EXISTS (SELECT 1 FROM activations a WHERE a.digest = m.digest AND a.state = 'withdrawn')"
        )
        return [(row, Note("model.withdrawn", str(row["why"]))) for row in rows]


def older(version: str, than: str) -> bool:
    """Whether a version comes before another by the precedence of semantic versioning 2.0 (clause 11).

    One that is no semantic version comes before all others: it is never newer than what it is held against.
    """
    if not semver.Version.is_valid(than):
        return False
    return not semver.Version.is_valid(version) or semver.Version.parse(version).compare(than) < 0


def code_of(row: sqlite3.Row) -> str:
    """The coded reason an activation ended with; empty when there is none."""
    return str(json.loads(row["reason"])["code"]) if row["reason"] else ""
