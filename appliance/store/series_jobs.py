"""Jobs that analyse a series: planned once for all of its images, and restarted when more images arrive.

Such a job refers to the first image of its series; every image of the series shows its result.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

from appliance.core.domain import Job, JobKind, Note, VolumeResult, notes_json, utc_now
from appliance.store.database import Database

# SQL condition on a job: its series is not open, that is, no more images of it are expected.
CLAIMABLE: Final = "NOT EXISTS (SELECT 1 FROM series s WHERE s.id = jobs.series_id AND s.open = 1)"


def images_of(tx: sqlite3.Connection, series_id: int) -> list[sqlite3.Row]:
    """Every image of a series in the order received."""
    return tx.execute("SELECT * FROM instances WHERE series_id = ? ORDER BY id", (series_id,)).fetchall()


def affected_images(tx: sqlite3.Connection, instance_id: int) -> list[int]:
    """The images whose state the jobs of this image decide: its series where one of them analyses that, else itself."""
    rows = tx.execute(
        "SELECT i.id FROM instances i WHERE i.series_id IN (SELECT series_id FROM jobs WHERE instance_id = ?1 AND series_id IS NOT NULL)"
        " UNION SELECT ?1",
        (instance_id,),
    ).fetchall()
    return [row["id"] for row in rows]


def add(tx: sqlite3.Connection, series_id: int, digest: str, notes: Iterable[Note]) -> None:
    """Queue a series for a model. A series that was analysed without its newest images is analysed again; that result is deleted."""
    first, text = images_of(tx, series_id)[0]["id"], notes_json(notes)
    if known := tx.execute("SELECT id FROM jobs WHERE series_id = ? AND model_digest = ?", (series_id, digest)).fetchone():
        _restart(tx, known["id"], text)
        return
    Database.insert(
        tx, "jobs", kind=JobKind.VOLUME.value, instance_id=first, series_id=series_id, model_digest=digest, state="queued", scope_code="",
        created_at=utc_now(), notes=text,
    )  # fmt: skip


def _restart(tx: sqlite3.Connection, job_id: int, notes: str) -> None:
    delete_result(tx, job_id)
    tx.execute(
        "UPDATE jobs SET state = 'queued', attempts = 0, outcome = NULL, reason = NULL, notes = ?, scope_code = '', finished_at = NULL,"
        " lease_owner = '', lease_until = 0, timing_ms = NULL, runtime = NULL WHERE id = ?",
        (notes, job_id),
    )


def restart_all(tx: sqlite3.Connection, series_id: int) -> None:
    """Restart the jobs of a series after another image arrived: a result without that image is not valid, so all images wait again.

    A job of an open series is queued but cannot be claimed; planning decides about it when the series is complete.
    """
    jobs = tx.execute("SELECT id FROM jobs WHERE series_id = ?", (series_id,)).fetchall()
    for job in jobs:
        _restart(tx, job["id"], "[]")
    if jobs:
        tx.execute("UPDATE instances SET state = 'waiting', reason = NULL WHERE series_id = ?", (series_id,))


def delete_other_models(tx: sqlite3.Connection, series_id: int, digests: Iterable[str]) -> None:
    """Delete the queued jobs of a series for all models but these: with its new images the others do not apply any more."""
    tx.execute(
        "DELETE FROM jobs WHERE series_id = ? AND state = 'queued' AND model_digest NOT IN (SELECT value FROM json_each(?))",
        (series_id, json.dumps(list(digests))),
    )


def inherit_urgency(tx: sqlite3.Connection, series_id: int) -> None:
    """Make the queued jobs of a series urgent where its study is urgent."""
    tx.execute(
        "UPDATE jobs SET priority = 1 WHERE state = 'queued' AND priority < 1"
        " AND instance_id IN (SELECT id FROM instances WHERE series_id = ?1)"
        " AND EXISTS (SELECT 1 FROM studies t JOIN series s ON s.study_id = t.id WHERE s.id = ?1 AND t.urgent IS NOT NULL)",
        (series_id,),
    )


def delete_result(tx: sqlite3.Connection, job_id: int) -> None:
    """Delete the volume result of a job."""
    for table in ("key_pictures", "measurements", "volumes"):
        tx.execute(f"DELETE FROM {table} WHERE job_id = ?", (job_id,))  # noqa: S608


def save_result(tx: sqlite3.Connection, job: Job, result: VolumeResult) -> None:
    """Store the volume result of a job in the transaction that ends the job."""
    series_id = tx.execute("SELECT series_id FROM jobs WHERE id = ?", (job.id,)).fetchone()["series_id"]
    delete_result(tx, job.id)
    Database.insert(
        tx, "volumes", job_id=job.id, series_id=series_id, model=result.model, model_version=result.model_version,
        model_digest=result.model_digest, precision=result.precision, runtime=result.runtime,
        geometry=json.dumps(result.geometry), mask=result.mask,
    )  # fmt: skip
    for measurement in result.measurements:
        Database.insert(tx, "measurements", job_id=job.id, **asdict(measurement))
    for plane, png in result.pictures.items():
        Database.insert(tx, "key_pictures", job_id=job.id, plane=plane, png=png)
