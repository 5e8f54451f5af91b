"""What is urgent (STAT) and who said so: a person, the command line, or the sender in the image's header.

A study is urgent once and for all: what waits of it is read first, and so is what comes later. Among what is urgent the oldest goes
first, so that a sender that marks everything loses nothing but its privilege.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from appliance import database as db
from appliance.database import Database
from appliance.domain import JobState, utc_now
from appliance.planning import next_revision

Origin = Literal["person", "cli", "sender"]

# Of the defined terms of Requested Procedure Priority (0040,1003), PS3.3 Table C.4-11.
URGENT_TERMS: Final = ("STAT", "HIGH")


@dataclass(frozen=True)
class Urgency:
    """Why a study is read first.

    Attributes:
        origin: whether a person asked (by page or API), somebody at the box's command line, or the sender did in the header.
        actor: the account, program or AE title.
        at: when, ISO 8601 in UTC.
        term: of a sender, the Requested Procedure Priority that the image carries.
    """

    origin: Origin
    actor: str
    at: str
    term: str = ""

    @classmethod
    def of(cls, text: str | None) -> Urgency | None:
        """As the store keeps it (JSON); None of a study that is not urgent."""
        return cls(**json.loads(text)) if text else None


def mark(tx: sqlite3.Connection, study_id: int, origin: Origin, actor: str, term: str = "") -> int:
    """Make a study urgent, inside the caller's transaction; who said so first stays on record.

    Done and failed jobs are marked too: one that is begun anew is as urgent as what waits.

    Returns:
        How many jobs that wait, or are taken and have no result yet, it concerned; 0 where the study was urgent already, for planning
        makes every job of such a study urgent.
    """
    why = json.dumps(asdict(Urgency(origin, actor, utc_now(), term)), ensure_ascii=False)
    if tx.execute("UPDATE studies SET urgent = ? WHERE id = ? AND urgent IS NULL", (why, study_id)).rowcount == 0:
        return 0
    changed = tx.execute(
        "UPDATE jobs SET priority = 1 WHERE priority < 1 AND instance_id IN"
        " (SELECT i.id FROM instances i JOIN series s ON s.id = i.series_id WHERE s.study_id = ?) RETURNING state",
        (study_id,),
    ).fetchall()
    waiting = sum(row["state"] in (JobState.QUEUED.value, JobState.RUNNING.value) for row in changed)
    told: dict[str, Any] = {"term": term} if term else {}
    Database.audit(tx, db.APPLICATION_ACTIVITY, actor, "E", f"study:{study_id}", urgent=waiting, origin=origin, **told)
    tx.execute("UPDATE studies SET revision = ? WHERE id = ?", (next_revision(tx), study_id))
    return waiting
