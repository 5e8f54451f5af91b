"""Results of a study for its worklist row: findings, measurements, what ran, and whether a model was withdrawn since."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from appliance.core.run_summary import RunSummary

if TYPE_CHECKING:
    from appliance.store.database import Database

# Notes on a job whose model version was withdrawn or rolled back after the analysis.
RECALLED: Final = ("model.withdrawn", "activation.rolled_back")


@dataclass(frozen=True)
class StudySummary:
    """The summary of one study; attributes as in :class:`appliance.store.worklist.StudyRow`."""

    recalled: bool = False
    scored: bool = False
    measured: tuple[tuple[str, str, float], ...] = ()
    ran: tuple[RunSummary, ...] = ()


def study_summaries(database: Database, ids: str) -> dict[int, StudySummary]:
    """Summaries by study id; ``ids`` is a JSON list of study ids."""
    measured, ran = defaultdict(list), defaultdict(list)
    recalled = database.query(
        "SELECT DISTINCT s.study_id FROM series s JOIN instances i ON i.series_id = s.id JOIN jobs j ON j.instance_id = i.id"
        " JOIN json_each(j.notes) n"
        " WHERE (EXISTS (SELECT 1 FROM findings WHERE job_id = j.id) OR EXISTS (SELECT 1 FROM volumes WHERE job_id = j.id))"
        " AND s.study_id IN (SELECT value FROM json_each(?1))"
        " AND json_extract(n.value, '$.code') IN (SELECT value FROM json_each(?2))",
        ids,
        json.dumps(RECALLED),
    )
    scored = database.query(
        "SELECT DISTINCT s.study_id FROM findings f JOIN instances i ON i.id = f.instance_id JOIN series s ON s.id = i.series_id"
        " WHERE s.study_id IN (SELECT value FROM json_each(?))",
        ids,
    )
    for row in database.query(
        "SELECT s.study_id, m.title_zh, m.title_en, m.value FROM measurements m JOIN volumes v ON v.job_id = m.job_id"
        " JOIN series s ON s.id = v.series_id JOIN jobs j ON j.id = v.job_id"
        " WHERE j.outcome = 'ai_ready' AND s.study_id IN (SELECT value FROM json_each(?)) ORDER BY m.id",
        ids,
    ):
        measured[row["study_id"]].append((row["title_zh"], row["title_en"], row["value"]))
    for row in database.query(
        "SELECT DISTINCT s.study_id, json_extract(j.runtime, '$.runtime') AS runtime,"
        " json_extract(j.runtime, '$.precision') AS precision, json_extract(j.runtime, '$.ran') AS ran,"
        " json_extract(j.runtime, '$.reason') AS reason"
        " FROM jobs j JOIN instances i ON i.id = j.instance_id"
        " JOIN series s ON s.id = i.series_id WHERE json_extract(j.runtime, '$.runtime') IS NOT NULL"
        " AND s.study_id IN (SELECT value FROM json_each(?))",
        ids,
    ):
        if run := RunSummary.of(dict(row)):
            ran[row["study_id"]].append(run)
    studies_recalled, studies_scored = ({row["study_id"] for row in rows} for rows in (recalled, scored))
    return {
        study: StudySummary(study in studies_recalled, study in studies_scored, tuple(measured[study]), tuple(dict.fromkeys(ran[study])))
        for study in {*studies_recalled, *studies_scored, *measured, *ran}
    }
