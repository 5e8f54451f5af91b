"""Take back a person's decision about an image after its result: the image is analysed again as it came (docs/adr/0039).

The results that rest on the decision are moved to ``superseded_findings``: no list, filter, statistic or alarm counts them any more, and
the page of the study shows them as earlier results. Nothing is deleted.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Final

from appliance.core.correction import Correction
from appliance.core.domain import JobKind, JobState, notes_json, parse_notes, utc_now
from appliance.store import database as db
from appliance.store.database import Database
from appliance.store.planning import Planner

# Cautions of a result that say what a person decided about its image (appliance/inference/image_job.py).
_OF_A_DECISION: Final = ("caution.turned_by_person", "caution.inverted_by_person", "caution.input_doubted")


@dataclass(frozen=True)
class SupersededFinding:
    """A result that does not count any more: the finding in brief, what was decided about its image, and who took that back when."""

    title_zh: str
    title_en: str
    score: float
    threshold: float
    positive: bool
    model_version: str
    correction: Correction
    at: str
    actor: str


def take_back(database: Database, planner: Planner, instance_id: int, actor: str) -> bool:
    """Forget what a person decided about an image, supersede its results, and queue it again.

    Returns whether there was a decision to take back; nothing is changed where there was none, or while the image is being analysed.
    """
    with database.transaction() as tx:
        image = tx.execute("SELECT correction FROM instances WHERE id = ?", (instance_id,)).fetchone()
        jobs = tx.execute("SELECT * FROM jobs WHERE instance_id = ? AND kind = ?", (instance_id, JobKind.INFER.value)).fetchall()
        is_running = any(job["state"] == JobState.RUNNING.value for job in jobs)
        if image is None or is_running or not jobs or not Correction.parse(image["correction"]).is_confirmed:
            return False
        for row in tx.execute("SELECT * FROM findings WHERE instance_id = ?", (instance_id,)).fetchall():
            _supersede(tx, row, image["correction"], actor)
        tx.execute("UPDATE instances SET correction = '' WHERE id = ?", (instance_id,))
        for job in jobs:
            notes = notes_json(note for note in parse_notes(job["notes"]) if note.code not in _OF_A_DECISION)
            tx.execute(
                "UPDATE jobs SET state = 'queued', attempts = 0, outcome = NULL, reason = NULL, finished_at = NULL, notes = ?,"
                " timing_ms = NULL, runtime = NULL WHERE id = ?",
                (notes, job["id"]),
            )
        planner.update_state(tx, instance_id)
        Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"instance:{instance_id}", correction="", taken_back=image["correction"])
    return True


def superseded(database: Database, instance_id: int) -> tuple[SupersededFinding, ...]:
    """List the results of an image that do not count any more, newest first."""
    rows = database.query("SELECT * FROM superseded_findings WHERE instance_id = ? ORDER BY id DESC", instance_id)
    names = ("title_zh", "title_en", "score", "threshold", "model_version")
    found = []
    for row in rows:
        finding = json.loads(row["finding"])
        same = {name: finding[name] for name in names}
        correction = Correction.parse(row["correction"])
        found.append(SupersededFinding(**same, positive=bool(finding["positive"]), correction=correction, at=row["at"], actor=row["actor"]))
    return tuple(found)


def next_finding_id(tx: sqlite3.Connection) -> int:
    """Return an id that no finding ever had: pages and heat maps are known by it."""
    (last,) = tx.execute(
        "SELECT max((SELECT coalesce(max(id), 0) FROM findings), (SELECT coalesce(max(id), 0) FROM superseded_findings))"
    ).fetchone()
    return int(last) + 1


def _supersede(tx: sqlite3.Connection, row: sqlite3.Row, correction: str, actor: str) -> None:
    values = dict(row)
    heatmap = values.pop("heatmap_png")
    Database.insert(
        tx, "superseded_findings", id=row["id"], instance_id=row["instance_id"], correction=correction, at=utc_now(), actor=actor,
        finding=json.dumps(values, ensure_ascii=False), heatmap_png=heatmap,
    )  # fmt: skip
    tx.execute("DELETE FROM findings WHERE id = ?", (row["id"],))
