"""The durable state of a box: images and models, with the job queue and the planner.

Every change and its audit entry share one transaction. An image that arrives twice is stored once; an image with the same SOP Instance
UID and other content is stored as well, and both are flagged.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from appliance.core.correction import Correction
from appliance.core.domain import Scan, ScanState, Source, StoredImage, notes_json, utc_now
from appliance.core.errors import ApplianceError, StoreError
from appliance.core.process import Lock
from appliance.core.settings import Settings
from appliance.store import audit, audit_reserve, priority, series_jobs
from appliance.store import database as db
from appliance.store.account_secrets import AccountSecrets
from appliance.store.audit_refusals import Refusals
from appliance.store.database import NOT_A_DATABASE, Database, store_error
from appliance.store.database_encryption import is_encrypted
from appliance.store.encrypted_files import EncryptedFiles, has_content
from appliance.store.job_queue import JobQueue
from appliance.store.keys import AUDIT_KEY, CONTENT_KEY, DATABASE_KEY, Keys, key_id
from appliance.store.master_key import KEY_BYTES
from appliance.store.planning import Planner, next_revision, touch_study

logger = logging.getLogger(__name__)

DATABASE_NAME: Final = "box.sqlite3"
WIPE_MARK: Final = "wipe.json"  # a wipe has begun (:mod:`appliance.store.wipe`)


def open_box(path: Path) -> Store:
    """Open the store of an existing box, for commands that must not create a new one by mistake.

    Args:
        path: its data directory, or a settings file that names it.

    Raises:
        ApplianceError: ``settings.missing``, ``settings.invalid``; ``box.none``: there is no box. Nothing is written in these cases.
    """
    settings = Settings.load(path)
    _refuse_wiped(settings)
    if not (settings.data_dir / DATABASE_NAME).is_file():
        raise ApplianceError("box.none", str(settings.data_dir))
    return Store(settings)


def _refuse_wiped(settings: Settings) -> None:
    """Raise StoreError ``box.wiping`` where a wipe has begun: some keys may be gone, and new ones must not take their place."""
    if (settings.data_dir / WIPE_MARK).exists():
        raise StoreError("box.wiping")


def replace_audit_key(settings: Settings, actor: str, reason: str) -> None:
    """Give a box whose audit key is lost a new one; the audit shows this, and who did it, as a break until it is acknowledged.

    What the old file holds is kept beside the new one.

    Raises:
        ApplianceError: ``box.none``; ``box.busy``: the box runs.
        StoreError: the database cannot be used.
    """
    path, keys = settings.data_dir / DATABASE_NAME, Keys(settings.data_dir)
    if not path.is_file():
        raise ApplianceError("box.none", str(settings.data_dir))
    lock = Lock(settings.data_dir, "supervisor")
    try:
        file = keys.directory / AUDIT_KEY
        if file.exists():
            file.rename(file.with_name(f"{AUDIT_KEY}.replaced-{time.time_ns()}"))
        keys.install(AUDIT_KEY, key := secrets.token_bytes(KEY_BYTES))
        database = _open_database(settings, keys, key, is_audit_key_new=True)
        with database.transaction() as tx:
            audit.record_new_key(tx, actor, reason)
        database.close()
    finally:
        lock.release()


@contextmanager
def _first_start(data_dir: Path, keys: Keys) -> Iterator[None]:
    """Hold a lock while the keys and the database of a new box are created: several of its programs may start at the same moment."""
    is_complete = (data_dir / DATABASE_NAME).exists() and all(map(keys.exists, (AUDIT_KEY, DATABASE_KEY, CONTENT_KEY)))
    descriptor = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not is_complete:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_database(settings: Settings, keys: Keys, audit_key: bytes, *, is_audit_key_new: bool = False) -> Database:
    """Open the database with the key that is recorded for it, or create both."""
    path, is_recorded = settings.data_dir / DATABASE_NAME, bool(keys.recorded(DATABASE_KEY))
    try:
        key = keys.database_key(lambda: is_encrypted(path))
        database = Database(path, audit_key, key, exchange_dir=settings.exchange_dir, is_key_new=is_audit_key_new)
        keys.record(DATABASE_KEY, [key_id(key)])
    except OSError as error:
        raise store_error(error) from error
    except StoreError as error:
        if error.detail == NOT_A_DATABASE and not is_recorded and is_encrypted(path):
            raise StoreError("key.wrong", DATABASE_KEY) from error
        raise
    return database


class Store:
    """The durable state of one box.

    Raises:
        StoreError: it cannot be used; ``key.missing``, ``key.wrong`` or ``key.accounts`` where its data need another key, and then
            nothing was changed; ``box.wiping``.

    Attributes:
        account_secrets: encrypts the secrets of second factors.
        content: the encrypted files.
        database: the database.
        keys: the keys of the box.
        refusals: writes refused requests to the audit.
        planner: creates jobs.
        queue: leases jobs and commits their results.
    """

    def __init__(self, settings: Settings, *, needs_accounts_key: bool = True) -> None:
        _refuse_wiped(settings)
        self.settings = settings
        self.keys = Keys(settings.data_dir)
        try:
            settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _first_start(settings.data_dir, self.keys):
                self._open()
        except OSError as error:
            raise store_error(error) from error
        self.account_secrets = AccountSecrets(self.database, self.keys)
        if needs_accounts_key:
            self.account_secrets.check()
        try:
            self.keys.seal()
        except OSError:  # a full disk: the box works, the status page warns, the next start tries again
            logger.warning("key files not encrypted", exc_info=True, extra={"code": "key.not_sealed"})
        self.refusals = Refusals(self.database)
        self.planner = Planner(settings, self.database)
        self.queue = JobQueue(settings, self.database, self.planner)
        audit_reserve.fill(settings.data_dir)

    def _open(self) -> None:
        """Open database and files with their keys, created only where there are no data that could need others. Raises OSError."""
        data_dir, keys = self.settings.data_dir, self.keys
        has_database, has_files = (data_dir / DATABASE_NAME).exists(), has_content(data_dir)
        if has_files and not keys.exists(CONTENT_KEY):
            raise StoreError("key.missing", CONTENT_KEY)  # before another key is created, which would only hinder the restoring
        is_recorded = bool(keys.recorded(DATABASE_KEY) or keys.recorded(CONTENT_KEY))
        audit_key = keys.load(AUDIT_KEY, lambda: not (has_database or has_files or is_recorded))
        self.database = _open_database(self.settings, keys, audit_key)
        self.content = EncryptedFiles(
            data_dir, keys, lambda: self.database.key_ids(CONTENT_KEY), lambda ids: self.database.record_key_ids(CONTENT_KEY, ids)
        )

    def close(self) -> None:
        """Close this thread's database connection."""
        self.database.close()

    # -- scans -------------------------------------------------------------------------------------------------------

    def check_space(self, incoming_bytes: int) -> None:
        """Raise StoreError ``ingest.disk_full`` where the free space would fall below the reserve; nothing is ever deleted instead."""
        free = shutil.disk_usage(self.settings.data_dir).free
        if free - incoming_bytes < self.settings.disk_reserve_bytes:
            raise StoreError("ingest.disk_full", f"{free >> 20} MiB free")

    def add_instance(self, scan: Scan, digest: Callable[[], str], data: bytes, source: Source, started: float) -> StoredImage:
        """Store one image durably: encrypted file, fsync, rename, fsync; then row and audit entry in one transaction.

        Args:
            scan: its attributes.
            digest: returns the digest of transfer syntax and data set (64 hex digits); may still be computing it.
            data: the DICOM file, byte for byte.
            source: where it came from.
            started: ``time.perf_counter()`` when its last byte arrived, for the ingest time.

        Raises:
            StoreError: nothing was stored and nothing may be acknowledged.
        """
        if self.database.one("SELECT 1 FROM instances WHERE sop_instance_uid = ?", scan.sop_instance_uid) is not None:
            name = digest()
            with self.database.snapshot() as connection:
                known = self._find(connection, scan, name)
            if known and self.content.holds(name):
                return known
        self.check_space(len(data))
        content_sha256 = self.content.write(data, digest)
        with self.database.transaction() as tx:
            if known := self._find(tx, scan, content_sha256):  # the same image was stored meanwhile
                return known
            conflict = self._flag_uid_conflict(tx, scan.sop_instance_uid)
            study_id = self._study(tx, scan)
            series_id = self._series(tx, scan, study_id)
            instance_id = self._insert_instance(tx, scan, series_id, content_sha256, len(data), source, conflict, started)
            particulars: dict[str, Any] = {"source": source.kind, "bytes": len(data), "conflict": conflict}
            event = audit.INSTANCES_TRANSFERRED if source.kind == "dimse" else db.DATA_IMPORT
            Database.audit(tx, event, source.actor, "C", f"instance:{instance_id}", 4 if conflict else 0, **particulars)
            series_jobs.restart_all(tx, series_id)
            if scan.requested_procedure_priority in priority.URGENT_TERMS:
                priority.mark(tx, study_id, "sender", source.actor, scan.requested_procedure_priority)
            return StoredImage(instance_id, series_id, study_id, "conflict" if conflict else "stored")

    @staticmethod
    def _find(tx: sqlite3.Connection, scan: Scan, content_sha256: str) -> StoredImage | None:
        """The same image, where it is stored already."""
        row = tx.execute(
            "SELECT i.id, i.series_id, s.study_id FROM instances i JOIN series s ON s.id = i.series_id"
            " WHERE i.sop_instance_uid = ? AND i.content_sha256 = ?",
            (scan.sop_instance_uid, content_sha256),
        ).fetchone()
        return StoredImage(row["id"], row["series_id"], row["study_id"], "duplicate") if row else None

    @staticmethod
    def _series(tx: sqlite3.Connection, scan: Scan, study_id: int) -> int:
        """Insert or reopen the series of the image; returns its row id."""
        row = tx.execute(
            "INSERT INTO series (study_id, series_instance_uid, modality, series_description, last_received_at) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (study_id, series_instance_uid) DO UPDATE SET last_received_at = excluded.last_received_at, open = 1"
            " RETURNING id",
            (study_id, scan.series_instance_uid, scan.modality, scan.series_description, time.time()),
        ).fetchone()
        return int(row["id"])

    def _study(self, tx: sqlite3.Connection, scan: Scan) -> int:
        patient, revision = scan.patient, next_revision(tx)
        Database.insert(
            tx, "studies", "ON CONFLICT (study_instance_uid, patient_key) DO UPDATE SET revision = excluded.revision",
            study_instance_uid=scan.study_instance_uid, patient_key=patient.key, **asdict(patient),
            patient_age_years=scan.patient_age_years, study_date=scan.study_date, study_time=scan.study_time,
            accession_number=scan.accession_number, study_description=scan.study_description, received_at=utc_now(), revision=revision,
        )  # fmt: skip
        tx.execute(
            "UPDATE studies SET patient_mismatch = 1, revision = ?2"
            " WHERE study_instance_uid = ?1 AND (SELECT count(*) FROM studies WHERE study_instance_uid = ?1) > 1",
            (scan.study_instance_uid, revision),
        )
        row = tx.execute(
            "SELECT id FROM studies WHERE study_instance_uid = ? AND patient_key = ?", (scan.study_instance_uid, patient.key)
        ).fetchone()
        return int(row["id"])

    def _insert_instance(
        self, tx: sqlite3.Connection, scan: Scan, series_id: int, sha256: str, size: int, source: Source, conflict: bool, started: float
    ) -> int:
        return Database.insert(
            tx, "instances", series_id=series_id, sop_instance_uid=scan.sop_instance_uid, sop_class_uid=scan.sop_class_uid,
            transfer_syntax_uid=scan.transfer_syntax_uid, content_sha256=sha256, bytes=size, modality=scan.modality,
            body_part_examined=scan.body_part_examined, view_position=scan.view_position, image_rows=scan.rows, image_columns=scan.columns,
            number_of_frames=scan.number_of_frames, patient_age_years=scan.patient_age_years, source_kind=source.kind,
            source_actor=source.actor, requested_procedure_priority=scan.requested_procedure_priority, received_at=utc_now(),
            conflict=int(conflict), state=ScanState.WAITING.value, reason=None,
            notes=notes_json(scan.notes), ingest_ms=(time.perf_counter() - started) * 1000,
        )  # fmt: skip

    @staticmethod
    def _flag_uid_conflict(tx: sqlite3.Connection, sop_instance_uid: str) -> bool:
        """Flag every other image with that UID, of whichever patient; returns whether there is one."""
        rows = tx.execute("SELECT id FROM instances WHERE sop_instance_uid = ?", (sop_instance_uid,)).fetchall()
        for row in rows:
            tx.execute("UPDATE instances SET conflict = 1 WHERE id = ?", (row["id"],))
            touch_study(tx, row["id"])
        return bool(rows)

    def add_rejection(self, source: Source, size: int, code: str, detail: str) -> None:
        """Record that a file was refused, so that people can see what became of it; its content is not stored."""
        with self.database.transaction() as tx:
            cursor = tx.execute(
                "INSERT INTO rejections (at, source_kind, source_actor, name, bytes, code, detail) VALUES (?,?,?,?,?,?,?)",
                (utc_now(), source.kind, source.actor, source.name, size, code, detail[:500]),
            )
            Database.audit(tx, db.DATA_IMPORT, source.actor, "C", f"rejection:{cursor.lastrowid}", 4, source=source.kind, code=code)

    def read_instance(self, instance_id: int) -> bytes:
        """The DICOM file of one image, byte for byte as received; raises StoreError."""
        return self.content.read(self.content_digest(instance_id))

    def content_digest(self, instance_id: int) -> str:
        """SHA-256 of the DICOM file of one image, in hex; raises StoreError ``store.missing``."""
        row = self.database.require(f"instance {instance_id}", "SELECT content_sha256 FROM instances WHERE id = ?", instance_id)
        return str(row["content_sha256"])

    def correction_of(self, instance_id: int) -> Correction:
        """What a person decided to do with one image before the analysis; raises StoreError ``store.missing``."""
        row = self.database.require(f"instance {instance_id}", "SELECT correction FROM instances WHERE id = ?", instance_id)
        return Correction.parse(row["correction"])

    # -- models ------------------------------------------------------------------------------------------------------

    def models(self) -> list[sqlite3.Row]:
        """Every model this box knows, newest activation first."""
        return self.database.query("SELECT * FROM models ORDER BY activated_at DESC")

    def model(self, digest: str) -> sqlite3.Row:
        """One model's row; raises StoreError ``model.unknown``."""
        row = self.database.one("SELECT * FROM models WHERE digest = ?", digest)
        if row is None:
            raise StoreError("model.unknown", digest[:12])
        return row

    def switch_within(self, tx: sqlite3.Connection, values: dict[str, str], actor: str, *, keep_previous: bool = False) -> None:
        """Change the active model and write the audit entry, inside the caller's transaction.

        Args:
            tx: the open transaction.
            values: the columns of ``models`` except ``state`` and ``activated_at``.
            actor: who requested it.
            keep_previous: never roll back to the model that is replaced now; the one before it stays the previous model.
        """
        name, digest = values["name"], values["digest"]
        if keep_previous:
            tx.execute("UPDATE models SET state = 'retired' WHERE name = ? AND state = 'active' AND digest != ?", (name, digest))
        elif tx.execute("SELECT 1 FROM models WHERE name = ? AND state = 'active' AND digest != ?", (name, digest)).fetchone():
            tx.execute("UPDATE models SET state = 'retired' WHERE name = ? AND state = 'previous'", (name,))
            tx.execute("UPDATE models SET state = 'previous' WHERE name = ? AND state = 'active'", (name,))
        Database.insert(
            tx, "models",
            "ON CONFLICT (digest) DO UPDATE SET state = 'active', self_test = excluded.self_test,"
            " activated_at = excluded.activated_at, precision = excluded.precision, runtime = excluded.runtime",
            **values, state="active", activated_at=utc_now(),
        )  # fmt: skip
        self.planner.replan_unanalysed(tx, digest)
        self._audit_switch(tx, digest, name, values["version"], actor)

    def resume_within(self, tx: sqlite3.Connection, digest: str) -> None:
        """Activate a model again that was active before, inside the caller's transaction; no other of its name is active."""
        row = tx.execute(
            "UPDATE models SET state = 'active', activated_at = ? WHERE digest = ? RETURNING *", (utc_now(), digest)
        ).fetchone()
        self.planner.replan_unanalysed(tx, digest)
        self._audit_switch(tx, digest, row["name"], row["version"], "worker")

    @staticmethod
    def _audit_switch(tx: sqlite3.Connection, digest: str, name: str, version: str, actor: str) -> None:
        particulars = db.SOFTWARE_CONFIGURATION | {"name": name, "version": version}
        Database.audit(tx, db.SECURITY_ALERT, actor, "U", f"model:{digest[:12]}", **particulars)

    def record(self, event: tuple[str, str], actor: str, action: str, obj: str, outcome: int = 0, **detail: Any) -> None:
        """Append an audit entry that belongs to no other change (a study was viewed, a self-test failed)."""
        with self.database.transaction() as tx:
            Database.audit(tx, event, actor, action, obj, outcome, **detail)
