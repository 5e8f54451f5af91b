"""The fleet database: boxes, their last reports, and the results of their activations.

SQLAlchemy Core on SQLite (WAL, the default) or PostgreSQL. Times are whole seconds since the epoch by this server's clock: the clock
of a box may be wrong, so the times in its report are corrected by the offset of its clock.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, RowMapping, Table, case, delete, func, select, text, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from model_sync.agent.report import ActivationReport, BoxReport, ModelState, StatusReport, canonical
from model_sync.errors import ModelSyncError, SettingsError
from model_sync.fleet import audit_heads
from model_sync.fleet.tables import (
    MIGRATIONS,
    NOTE_CHARS,
    SCHEMA,
    actions,
    activations,
    box_models,
    boxes,
    certificates,
    events,
    meta,
    metadata,
    open_engine,
)

# States of a model that analyses images, and of an activation that failed.
RUNNING: Final = (ModelState.ACTIVE.value, ModelState.TRIAL.value, ModelState.GOOD.value)
FAILED: Final = (ModelState.FAILED.value, ModelState.ROLLED_BACK.value)
# Codes that show that the version is bad. Other codes (disk full, expired, absent, superseded, rolled back by a person) concern the
# box, the library or people, and must not stop a rollout.
MODEL_FAULT_CODES: Final = (
    "activation.crash_loop", "activation.deadline", "activation.drift", "activation.failures", "activation.latency", "activation.memory",
    "activation.reboot_loop", "model.self_test",
)  # fmt: skip
IN_PROGRESS: Final = tuple(s.value for s in (ModelState.STAGED, ModelState.BUILDING, ModelState.SELF_TEST, ModelState.TRIAL))
EVENTS_PER_BOX: Final = 60
ACTIVATIONS_PER_BOX: Final = 64
_LOCK_KEY: Final = 7_032_316  # a number of our own on a shared PostgreSQL server


class SequenceError(ModelSyncError):
    """The number of a report is not above the last one; ``expected`` is the lowest that would be accepted."""

    def __init__(self, expected: int) -> None:
        super().__init__(
            f"the report's sequence must be {expected} or more", hint="send the newest state under that number", code="report.sequence"
        )
        self.expected = expected


class RateError(ModelSyncError):
    """A box reports too often; ``retry_after_s`` is the wait in seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the box reports too often", hint=f"wait {retry_after_s} seconds", code="report.rate")
        self.retry_after_s = retry_after_s


class VersionTally(NamedTuple):
    """The results of a version on the boxes of a ring: boxes that tried it, run it, and failed it by the fault of the model."""

    tried: int
    running: int
    failed: int


class Fleet:
    """The fleet database; each method is one transaction."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open a database, create missing tables, and migrate those of an older version.

        Args:
            url: a URL of SQLAlchemy, such as ``sqlite:////var/lib/fleet.db`` or ``postgresql+psycopg://user@host/fleet``.
            clock: returns seconds since the epoch.

        Raises:
            SettingsError: the URL is wrong, the server does not answer, or the tables are of another version.
            ModuleNotFoundError: PostgreSQL's driver is not installed.
        """
        self._clock = clock
        try:
            self.engine = open_engine(url)
            self._writes = self.engine.execution_options(fleet_writes=True)
            try:
                self._create_tables()
            except BaseException:
                self.close()
                raise
        except (ArgumentError, NoSuchModuleError, SQLAlchemyError, ImportError, OSError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "psycopg":
                raise  # the URL is right: the command prints what to install
            hint = "check --db: sqlite:////path/fleet.db or postgresql+psycopg://user@host/database"
            raise SettingsError(
                f"the fleet database cannot be opened ({type(error).__name__})", hint=hint, code="fleet.database"
            ) from error

    def now(self) -> int:
        """Return this server's time in seconds since the epoch."""
        return int(self._clock())

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction that only reads."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that writes: all of it, or nothing."""
        with self._writes.connect() as connection, connection.begin():
            yield connection

    def insert(self, table: Table) -> Any:
        """Return an INSERT with ON CONFLICT, in the dialect of this database."""
        return postgresql.insert(table) if self.engine.dialect.name == "postgresql" else sqlite.insert(table)

    def secret(self) -> str:
        """Return the key that signs the cookies of the pages; created once, the same in every process."""
        with self.writing() as tx:
            tx.execute(self.insert(meta).values(key="secret", value=secrets.token_hex(32)).on_conflict_do_nothing())
            return str(tx.execute(select(meta.c.value).where(meta.c.key == "secret")).scalar_one())

    def record(
        self, actor: str, action: str, *, ring: str, line: str, subject: str, figures: str, note: str = "", once: bool = False
    ) -> None:
        """Record an action about a version, with the reason in ``note``; with ``once`` not if the same one is recorded already."""
        here = actions.c
        same = here.action == action, here.ring == ring, here.line == line, here.subject == subject
        row = {"actor": actor, "action": action, "ring": ring, "line": line, "subject": subject, "figures": figures, "note": note}
        with self.writing() as tx:
            if not once or tx.execute(select(here.id).where(*same).limit(1)).one_or_none() is None:
                tx.execute(actions.insert().values(at=self.now(), **row))

    def deny(self, box_id: str, actor: str) -> None:
        """Deny a box at once: reports, renewals and enrolments; raise SettingsError when there is no such box."""
        self._set_denied(box_id, self.now(), actor, "deny")

    def allow(self, box_id: str, actor: str) -> None:
        """Allow a denied box again; raise SettingsError when there is no such box."""
        self._set_denied(box_id, None, actor, "allow")

    def move(self, box_id: str, ring: str, actor: str) -> None:
        """Assign a box to another ring; raise SettingsError when there is no such box."""
        with self.writing() as tx:
            if not tx.execute(update(boxes).where(boxes.c.box_id == box_id).values(ring=ring)).rowcount:
                raise _no_box(box_id)
            assign_ring(tx, box_id)
            tx.execute(actions.insert().values(at=self.now(), actor=actor, action="move", ring=ring, subject=box_id))

    def acknowledge_audit(self, box_id: str, actor: str, note: str) -> None:
        """Record that a person knows why the audit of a box went backwards or was changed: the next report begins anew.

        Raises:
            SettingsError: there is no such box.
        """
        with self.writing() as tx:
            if not tx.execute(update(boxes).where(boxes.c.box_id == box_id).values(audit_state="", audit_heads="")).rowcount:
                raise _no_box(box_id)
            tx.execute(actions.insert().values(at=self.now(), actor=actor, action="audit", subject=box_id, note=note[:NOTE_CHARS]))

    def deny_serial(self, serial: str, actor: str) -> None:
        """Revoke one certificate at once, by its serial in hexadecimal; raise SettingsError when there is none."""
        wanted = serial.lower().replace(":", "").lstrip("0")
        with self.writing() as tx:
            done = tx.execute(update(certificates).where(certificates.c.serial == wanted).values(revoked_at=self.now()))
            if not done.rowcount:
                raise SettingsError(f"no certificate has the serial {wanted}", hint="the box's page shows it", code="fleet.unknown")
            tx.execute(actions.insert().values(at=self.now(), actor=actor, action="deny", subject=wanted))

    def store_report(self, report: StatusReport, *, per_hour: int) -> bool:
        """Store a verified report as the newest one of its box; return False when the same report is stored already.

        Raises:
            SequenceError: its number is not above the last one and it is another report.
            RateError: the box sent more than ``per_hour`` reports within an hour.
        """
        digest = hashlib.sha256(canonical(report.to_dict())).hexdigest()
        with self.writing() as tx:
            box = tx.execute(select(boxes).where(boxes.c.box_id == report.box_id).with_for_update()).mappings().one()
            if report.sequence == box["sequence"] and digest == box["report_sha256"]:
                return False
            if report.sequence <= box["sequence"]:
                raise SequenceError(box["sequence"] + 1)
            self._store(tx, box, report, digest, _window(box, self.now(), per_hour))
        return True

    def tally(self, ring: str, line: str, version: str, *, at_least: int = 0) -> VersionTally:
        """Count the results of a version on the boxes that are assigned to a ring and follow it.

        With fewer failures than ``at_least`` the running boxes are not counted: this runs after each report.
        """
        here = activations.c
        query = select(func.count()).select_from(activations).where(here.ring == ring, here.line == line, here.version == version)
        with self.reading() as tx:
            failed = int(tx.execute(query.where(failed_by_model())).scalar_one())
            running = int(tx.execute(query.where(here.state.in_(RUNNING))).scalar_one()) if failed >= at_least else 0
        return VersionTally(failed + running, running, failed)

    def acknowledged_failures(self, ring: str, line: str, version: str) -> int:
        """Return the number of failed boxes that was shown when a person resumed a version; 0 when nobody did.

        A rollout paused by the failure budget resumes only by a person's signature, so the count at that pause is included.
        """
        here = actions.c
        same = here.ring == ring, here.line == line, here.subject == version, here.action.in_(("paused", "resumed")), here.figures != ""
        with self.reading() as tx:
            figures = tx.execute(select(here.figures).where(*same).order_by(here.id.desc()).limit(1)).scalar_one_or_none()
        return int(figures.partition("/")[0]) if figures else 0

    def _store(self, tx: Connection, box: RowMapping, report: StatusReport, digest: str, window: Mapping[str, int]) -> None:
        now = self.now()
        clock_offset_s = now - int(report.at.timestamp())  # the offset of this box's clock
        values: dict[str, Any] = {
            "reported_ring": report.ring, "last_seen": now, "sequence": report.sequence, "report_sha256": digest,
            "report": canonical(report.to_dict()).decode(), "sync_state": report.sync.state.value, "sync_code": report.sync.code,
            "sync_since": min(now, int(report.sync.since.timestamp()) + clock_offset_s) if report.sync.since else None, **window,
        }  # fmt: skip
        if report.box is not None:
            reported = sorted(report.box.activations, key=lambda item: item.at)
            values |= {"appliance_version": report.box.appliance_version, "device_class": report.box.device_class or ""}
            values |= _newest_failure(reported) | _open_alarm(reported, report.box)
            if not box["audit_state"]:  # what was found stays until a person acknowledges it
                values["audit_heads"], state = audit_heads.compare(box["audit_heads"], report.box.audit)
                values["audit_state"] = state.value
            self._store_models(tx, report)
            self._store_activations(tx, report.box_id, reported, clock_offset_s)
            self._reconcile_running(
                tx, report.box_id, {(item.line, item.version) for item in report.box.models if item.state in RUNNING}, now
            )
            _trim(tx, report.box_id)
        tx.execute(update(boxes).where(boxes.c.box_id == box["box_id"]).values(**values))
        assign_ring(tx, report.box_id)

    def _store_models(self, tx: Connection, report: StatusReport) -> None:
        tx.execute(delete(box_models).where(box_models.c.box_id == report.box_id))
        rows = [
            item.model_dump(mode="json") | {"box_id": report.box_id, "position": position, "running": int(item.state in RUNNING)}
            for position, item in enumerate(report.box.models if report.box else [])
        ]
        if rows:
            tx.execute(box_models.insert(), rows)

    def _store_activations(self, tx: Connection, box_id: str, reported: list[ActivationReport], clock_offset_s: int) -> None:
        """Store what is new: a report repeats the last activations, and one on trial changes with every case."""
        seen = {
            tuple(row) for row in tx.execute(select(events.c.digest, events.c.state, events.c.said_at).where(events.c.box_id == box_id))
        }
        here = activations.c
        query = select(here.line, here.version, here.state, here.code).where(here.box_id == box_id)
        latest = {(row.line, row.version): (row.state, row.code) for row in tx.execute(query)}
        for item in reported:
            said_at, state = int(item.at.timestamp()), (item.state.value, item.code or "")
            same = item.state in IN_PROGRESS and latest.get((item.line, item.version)) == state
            if same or (item.digest, item.state.value, said_at) in seen:
                continue
            seen.add((item.digest, item.state.value, said_at))
            latest[item.line, item.version] = state
            self._store_activation(tx, box_id, item, said_at, min(self.now(), said_at + clock_offset_s))

    def _store_activation(self, tx: Connection, box_id: str, item: ActivationReport, said_at: int, at: int) -> None:
        row = {"box_id": box_id, "line": item.line, "version": item.version, "state": item.state.value, "code": item.code or "", "at": at}
        tx.execute(events.insert().values(**row, digest=item.digest, said_at=said_at))
        since, ended = (at if item.state in RUNNING else None), (at if item.state in (*FAILED, ModelState.WITHDRAWN.value) else None)
        fresh = self.insert(activations).values(**row, running_since=since, ended_at=ended)
        latest = {name: fresh.excluded[name] for name in ("state", "code", "at", "ended_at")}
        latest["running_since"] = func.coalesce(activations.c.running_since, fresh.excluded.running_since)
        keys = ["box_id", "line", "version"]
        tx.execute(fresh.on_conflict_do_update(index_elements=keys, set_=latest))

    def _reconcile_running(self, tx: Connection, box_id: str, running: set[tuple[str, str]], now: int) -> None:
        """Update the activations to what the box really runs: a version may be older than the fleet, or replaced since."""
        here = activations.c
        known = {(row["line"], row["version"]): row for row in tx.execute(select(activations).where(here.box_id == box_id)).mappings()}
        for line, version in running - known.keys():
            new = {"box_id": box_id, "line": line, "version": version, "state": ModelState.GOOD.value, "code": ""}
            tx.execute(activations.insert().values(**new, at=now, running_since=now))
        for (line, version), row in known.items():
            this = here.box_id == box_id, here.line == line, here.version == version
            if (line, version) not in running:
                if row["running_since"] is not None and row["ended_at"] is None:
                    tx.execute(update(activations).where(*this).values(ended_at=now))
            elif row["running_since"] is None or row["ended_at"] is not None:
                tx.execute(update(activations).where(*this).values(running_since=now, ended_at=None))

    def _set_denied(self, box_id: str, at: int | None, actor: str, action: str) -> None:
        with self.writing() as tx:
            if not tx.execute(update(boxes).where(boxes.c.box_id == box_id).values(denied_at=at)).rowcount:
                raise _no_box(box_id)
            assign_ring(tx, box_id)
            tx.execute(actions.insert().values(at=self.now(), actor=actor, action=action, subject=box_id))

    def _create_tables(self) -> None:
        with self.writing() as tx:
            if self.engine.dialect.name == "postgresql":
                tx.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
            metadata.create_all(tx)
            tx.execute(self.insert(meta).values(key="schema", value=str(SCHEMA)).on_conflict_do_nothing())
            schema = str(tx.execute(select(meta.c.value).where(meta.c.key == "schema")).scalar_one())
            while schema.isdecimal() and int(schema) + 1 in MIGRATIONS:
                schema = str(int(schema) + 1)
                for statement in MIGRATIONS[int(schema)]:
                    tx.execute(text(statement))
                tx.execute(update(meta).where(meta.c.key == "schema").values(value=schema))
        if schema != str(SCHEMA):
            raise SettingsError(f"the fleet database has tables of version {schema}, this is {SCHEMA}", code="fleet.database")


def failed_by_model() -> ColumnElement[bool]:
    """Return the SQL condition that an activation failed by the fault of the model."""
    return activations.c.state.in_(FAILED) & activations.c.code.in_(MODEL_FAULT_CODES)


def assign_ring(tx: Connection, box_id: str) -> None:
    """Assign a box's activations to its ring, if it is allowed and follows the ring to which it is assigned."""
    here = boxes.c
    counts = here.denied_at.is_(None), here.reported_ring.in_(("", here.ring))
    ring = select(here.ring).where(here.box_id == box_id, *counts).scalar_subquery()
    tx.execute(update(activations).where(activations.c.box_id == box_id).values(ring=func.coalesce(ring, "")))


def _no_box(box_id: str) -> SettingsError:
    return SettingsError(f"no box is called {box_id}", code="fleet.unknown")


def _window(box: RowMapping, now: int, per_hour: int) -> dict[str, int]:
    """Count this report in the current hour of the box."""
    if now - box["window_start"] >= 3600 or now < box["window_start"]:
        return {"window_start": now, "window_count": 1}
    if box["window_count"] >= per_hour:
        raise RateError(3600 - (now - box["window_start"]))
    return {"window_start": box["window_start"], "window_count": box["window_count"] + 1}


def _newest_failure(reported: list[ActivationReport]) -> dict[str, str]:
    """Return the columns of a model line whose newest activation failed."""
    newest = {item.line: item for item in reported}
    bad = next((item for item in reversed(list(newest.values())) if item.state in FAILED), None)
    if bad is None:
        return {"trouble": "", "trouble_line": "", "trouble_version": ""}
    return {"trouble": bad.code or "unlisted", "trouble_line": bad.line, "trouble_version": bad.version}


def _open_alarm(reported: list[ActivationReport], box: BoxReport) -> dict[str, str]:
    """Return the columns of the newest alarm of a model that runs: such an activation has a code only while an alarm is open."""
    running = {item.digest for item in box.models if item.state in RUNNING}
    newest = {item.digest: item for item in reported if item.state in RUNNING}
    alarms = [item for digest, item in newest.items() if item.code and digest in running]
    if not alarms:
        return {"alarm": "", "alarm_line": "", "alarm_version": ""}
    last = max(alarms, key=lambda item: item.at)
    return {"alarm": str(last.code), "alarm_line": last.line, "alarm_version": last.version}


def _trim(tx: Connection, box_id: str) -> None:
    """Limit the rows of one box: the running versions and the last events stay."""
    here = activations.c
    runs = case((here.running_since.is_not(None) & here.ended_at.is_(None), 0), else_=1)
    kept = select(here.line, here.version).where(here.box_id == box_id).order_by(runs, here.at.desc(), here.line, here.version)
    other = tuple_(here.line, here.version).not_in(kept.limit(ACTIVATIONS_PER_BOX))
    tx.execute(delete(activations).where(here.box_id == box_id, other))
    oldest = select(events.c.id).where(events.c.box_id == box_id).order_by(events.c.id.desc()).offset(EVENTS_PER_BOX).limit(1)
    tx.execute(delete(events).where(events.c.box_id == box_id, events.c.id <= oldest.scalar_subquery()))
