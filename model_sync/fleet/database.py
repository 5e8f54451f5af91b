"""What the centre knows of its boxes: who may report, what each said last, and how its activations went.

SQLAlchemy Core over SQLite (WAL, the default) or PostgreSQL. Moments are whole seconds since the epoch by this server's clock:
a box's clock may stand anywhere, so what it says about a time is moved by how far its clock is off.
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

from model_sync.agent.report import ActivationReport, StatusReport, canonical
from model_sync.errors import ModelSyncError, SettingsError
from model_sync.fleet.tables import SCHEMA, actions, activations, box_models, boxes, certificates, events, meta, metadata, open_engine

# States of a model that reads patients, and of an activation that went wrong.
RUNNING: Final = ("active", "trial", "good")
FAILED: Final = ("failed", "rolled-back")
# What says that the version is bad. Anything else that ends an activation (no room, expired, absent, superseded, taken back by hand)
# speaks of the box, of the library or of people, and must not stop a rollout.
BLAMED: Final = (
    "activation.crash_loop", "activation.deadline", "activation.drift", "activation.failures", "activation.latency", "activation.memory",
    "activation.reboot_loop", "model.self_test",
)  # fmt: skip
UNDER_WAY: Final = ("staged", "building", "self-test", "trial")
EVENTS_PER_BOX: Final = 60
ACTIVATIONS_PER_BOX: Final = 64
_LOCK_KEY: Final = 7_032_316  # any number that is ours on a shared PostgreSQL


class SequenceError(ModelSyncError):
    """A report came with a number that is not above the last one; ``expected`` is the lowest that would be taken."""

    def __init__(self, expected: int) -> None:
        """Name the number."""
        super().__init__(
            f"the report's sequence must be {expected} or more", hint="send the newest state under that number", code="report.sequence"
        )
        self.expected = expected


class RateError(ModelSyncError):
    """A box reports too often; ``retry_after_s`` says when it may again."""

    def __init__(self, retry_after_s: int) -> None:
        """Name the wait."""
        super().__init__("the box reports too often", hint=f"wait {retry_after_s} seconds", code="report.rate")
        self.retry_after_s = retry_after_s


class Tally(NamedTuple):
    """How a version did on the boxes of a ring: how many finished or began it, run it, and failed it by its own fault."""

    tried: int
    running: int
    failed: int


class Fleet:
    """The fleet's database; its methods are transactions of their own."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open a database and lay its tables where there are none.

        Args:
            url: SQLAlchemy's, such as ``sqlite:////var/lib/fleet.db`` or ``postgresql+psycopg://user@host/fleet``.
            clock: seconds since the epoch.

        Raises:
            SettingsError: the address is wrong, the server does not answer, or the tables are of another version.
            ModuleNotFoundError: PostgreSQL's driver is not installed.
        """
        self._clock = clock
        try:
            self.engine = open_engine(url)
            self._writes = self.engine.execution_options(fleet_writes=True)
            self._lay_tables()
        except (ArgumentError, NoSuchModuleError, SQLAlchemyError, ImportError, OSError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "psycopg":
                raise  # the address is right: the command says what to install
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
        """Return an INSERT that knows ON CONFLICT, in the dialect of this database."""
        return postgresql.insert(table) if self.engine.dialect.name == "postgresql" else sqlite.insert(table)

    def secret(self) -> str:
        """Return the key that signs the pages' cookies; made once, the same for every process."""
        with self.writing() as tx:
            tx.execute(self.insert(meta).values(key="secret", value=secrets.token_hex(32)).on_conflict_do_nothing())
            return str(tx.execute(select(meta.c.value).where(meta.c.key == "secret")).scalar_one())

    def record(self, actor: str, action: str, *, ring: str = "", line: str = "", subject: str = "", figures: str = "") -> None:
        """Write down what somebody did."""
        row = {"at": self.now(), "actor": actor, "action": action, "ring": ring, "line": line, "subject": subject, "figures": figures}
        with self.writing() as tx:
            tx.execute(actions.insert().values(**row))

    def record_once(self, actor: str, action: str, *, ring: str, line: str, subject: str, figures: str) -> None:
        """Write down what cannot be done about a version, unless that stands there already."""
        here = actions.c
        same = here.action == action, here.ring == ring, here.line == line, here.subject == subject
        with self.writing() as tx:
            if tx.execute(select(here.id).where(*same).limit(1)).one_or_none() is None:
                row = {"actor": actor, "action": action, "ring": ring, "line": line, "subject": subject, "figures": figures}
                tx.execute(actions.insert().values(at=self.now(), **row))

    def deny(self, box_id: str, actor: str) -> None:
        """Shut a box out at once: reports, renewals and enrolments; raises SettingsError when there is no such box."""
        self._set_denied(box_id, self.now(), actor, "deny")

    def allow(self, box_id: str, actor: str) -> None:
        """Let a denied box in again; raises SettingsError when there is no such box."""
        self._set_denied(box_id, None, actor, "allow")

    def move(self, box_id: str, ring: str, actor: str) -> None:
        """Count a box to another ring; raises SettingsError when there is no such box."""
        with self.writing() as tx:
            if not tx.execute(update(boxes).where(boxes.c.box_id == box_id).values(ring=ring)).rowcount:
                raise _no_box(box_id)
            count_ring(tx, box_id)
            tx.execute(actions.insert().values(at=self.now(), actor=actor, action="move", ring=ring, subject=box_id))

    def deny_serial(self, serial: str, actor: str) -> None:
        """Revoke one certificate at once, by its serial in hexadecimal; raises SettingsError when none has it."""
        wanted = serial.lower().replace(":", "").lstrip("0")
        with self.writing() as tx:
            done = tx.execute(update(certificates).where(certificates.c.serial == wanted).values(revoked_at=self.now()))
            if not done.rowcount:
                raise SettingsError(f"no certificate has the serial {wanted}", hint="take it from the box's page", code="fleet.unknown")
            tx.execute(actions.insert().values(at=self.now(), actor=actor, action="deny", subject=wanted))

    def take(self, report: StatusReport, *, per_hour: int) -> bool:
        """Keep a verified report as the box's newest. Returns False when this very report was taken before.

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
            self._keep(tx, box, report, digest, _window(box, self.now(), per_hour))
        return True

    def tally(self, ring: str, line: str, version: str, *, at_least: int = 0) -> Tally:
        """Count how a version did on the boxes that the centre put into a ring and that follow it.

        With fewer failures than ``at_least`` the rest is not counted: with each report somebody asks.
        """
        here = activations.c
        query = select(func.count()).select_from(activations).where(here.ring == ring, here.line == line, here.version == version)
        with self.reading() as tx:
            failed = int(tx.execute(query.where(blamed())).scalar_one())
            running = int(tx.execute(query.where(here.state.in_(RUNNING))).scalar_one()) if failed >= at_least else 0
        return Tally(failed + running, running, failed)

    def acknowledged(self, ring: str, line: str, version: str) -> int:
        """Return how many failed boxes a human knew of when they let a version go on; 0 when nobody did.

        What the failure budget paused goes on only when a human signed that, here or at the command line: its own count is known too.
        """
        here = actions.c
        same = here.ring == ring, here.line == line, here.subject == version, here.action.in_(("paused", "resumed")), here.figures != ""
        with self.reading() as tx:
            figures = tx.execute(select(here.figures).where(*same).order_by(here.id.desc()).limit(1)).scalar_one_or_none()
        return int(figures.partition("/")[0]) if figures else 0

    def _keep(self, tx: Connection, box: RowMapping, report: StatusReport, digest: str, window: Mapping[str, int]) -> None:
        now = self.now()
        off = now - int(report.at.timestamp())  # how far this box's clock is behind
        values: dict[str, Any] = {
            "reported_ring": report.ring, "last_seen": now, "sequence": report.sequence, "report_sha256": digest,
            "report": canonical(report.to_dict()).decode(), "sync_state": report.sync.state, "sync_code": report.sync.code,
            "sync_since": min(now, int(report.sync.since.timestamp()) + off) if report.sync.since else None, **window,
        }  # fmt: skip
        if report.box is not None:
            said = sorted(report.box.activations, key=lambda item: item.at)
            values |= {"appliance_version": report.box.appliance_version} | _trouble(said)
            self._keep_models(tx, report)
            self._keep_activations(tx, report.box_id, said, off)
            self._settle(tx, report.box_id, {(item.line, item.version) for item in report.box.models if item.state in RUNNING}, now)
            _trim(tx, report.box_id)
        tx.execute(update(boxes).where(boxes.c.box_id == box["box_id"]).values(**values))
        count_ring(tx, report.box_id)

    def _keep_models(self, tx: Connection, report: StatusReport) -> None:
        tx.execute(delete(box_models).where(box_models.c.box_id == report.box_id))
        rows = [
            item.model_dump() | {"box_id": report.box_id, "position": position, "running": int(item.state in RUNNING)}
            for position, item in enumerate(report.box.models if report.box else [])
        ]
        if rows:
            tx.execute(box_models.insert(), rows)

    def _keep_activations(self, tx: Connection, box_id: str, said: list[ActivationReport], off: int) -> None:
        """Keep what is new: a report repeats the last activations, and one on trial is touched with every case."""
        seen = {
            tuple(row) for row in tx.execute(select(events.c.digest, events.c.state, events.c.said_at).where(events.c.box_id == box_id))
        }
        here = activations.c
        query = select(here.line, here.version, here.state, here.code).where(here.box_id == box_id)
        latest = {(row.line, row.version): (row.state, row.code) for row in tx.execute(query)}
        for item in said:
            said_at, state = int(item.at.timestamp()), (item.state, item.code or "")
            same = item.state in UNDER_WAY and latest.get((item.line, item.version)) == state
            if same or (item.digest, item.state, said_at) in seen:
                continue
            seen.add((item.digest, item.state, said_at))
            latest[item.line, item.version] = state
            self._keep_activation(tx, box_id, item, said_at, min(self.now(), said_at + off))

    def _keep_activation(self, tx: Connection, box_id: str, item: ActivationReport, said_at: int, at: int) -> None:
        row = {"box_id": box_id, "line": item.line, "version": item.version, "state": item.state, "code": item.code or "", "at": at}
        tx.execute(events.insert().values(**row, digest=item.digest, said_at=said_at))
        since, ended = (at if item.state in RUNNING else None), (at if item.state in (*FAILED, "withdrawn") else None)
        fresh = self.insert(activations).values(**row, running_since=since, ended_at=ended)
        latest = {name: fresh.excluded[name] for name in ("state", "code", "at", "ended_at")}
        latest["running_since"] = func.coalesce(activations.c.running_since, fresh.excluded.running_since)
        keys = ["box_id", "line", "version"]
        tx.execute(fresh.on_conflict_do_update(index_elements=keys, set_=latest))

    def _settle(self, tx: Connection, box_id: str, running: set[tuple[str, str]], now: int) -> None:
        """Let the activations say what the box really runs: a version may have been there before us, or been replaced since."""
        here = activations.c
        known = {(row["line"], row["version"]): row for row in tx.execute(select(activations).where(here.box_id == box_id)).mappings()}
        for line, version in running - known.keys():
            new = {"box_id": box_id, "line": line, "version": version, "state": "good", "code": "", "at": now, "running_since": now}
            tx.execute(activations.insert().values(**new))
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
            count_ring(tx, box_id)
            tx.execute(actions.insert().values(at=self.now(), actor=actor, action=action, subject=box_id))

    def _lay_tables(self) -> None:
        with self.writing() as tx:
            if self.engine.dialect.name == "postgresql":
                tx.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
            metadata.create_all(tx)
            tx.execute(self.insert(meta).values(key="schema", value=str(SCHEMA)).on_conflict_do_nothing())
            found = tx.execute(select(meta.c.value).where(meta.c.key == "schema")).scalar_one()
        if found != str(SCHEMA):
            raise SettingsError(
                f"the fleet database has tables of version {found}, this is {SCHEMA}",
                hint="use the matching release",
                code="fleet.database",
            )


def blamed() -> ColumnElement[bool]:
    """Return the condition that an activation failed by the model's own fault."""
    return activations.c.state.in_(FAILED) & activations.c.code.in_(BLAMED)


def count_ring(tx: Connection, box_id: str) -> None:
    """Count a box's activations to its ring: when it is let in, and follows the ring that the centre put it into."""
    here = boxes.c
    counts = here.denied_at.is_(None), here.reported_ring.in_(("", here.ring))
    ring = select(here.ring).where(here.box_id == box_id, *counts).scalar_subquery()
    tx.execute(update(activations).where(activations.c.box_id == box_id).values(ring=func.coalesce(ring, "")))


def _no_box(box_id: str) -> SettingsError:
    return SettingsError(f"no box is called {box_id}", hint="the fleet page lists the boxes", code="fleet.unknown")


def _window(box: RowMapping, now: int, per_hour: int) -> dict[str, int]:
    """Count this report into the box's hour."""
    if now - box["window_start"] >= 3600 or now < box["window_start"]:
        return {"window_start": now, "window_count": 1}
    if box["window_count"] >= per_hour:
        raise RateError(3600 - (now - box["window_start"]))
    return {"window_start": box["window_start"], "window_count": box["window_count"] + 1}


def _trouble(said: list[ActivationReport]) -> dict[str, str]:
    """Say what ails a box: a line whose newest activation failed."""
    newest = {item.line: item for item in said}
    bad = next((item for item in reversed(list(newest.values())) if item.state in FAILED), None)
    if bad is None:
        return {"trouble": "", "trouble_line": "", "trouble_version": ""}
    return {"trouble": bad.code or "unlisted", "trouble_line": bad.line, "trouble_version": bad.version}


def _trim(tx: Connection, box_id: str) -> None:
    """Bound what one box can make the centre keep, and read with each report: what it runs and what it did last stay."""
    here = activations.c
    runs = case((here.running_since.is_not(None) & here.ended_at.is_(None), 0), else_=1)
    kept = select(here.line, here.version).where(here.box_id == box_id).order_by(runs, here.at.desc(), here.line, here.version)
    other = tuple_(here.line, here.version).not_in(kept.limit(ACTIVATIONS_PER_BOX))
    tx.execute(delete(activations).where(here.box_id == box_id, other))
    oldest = select(events.c.id).where(events.c.box_id == box_id).order_by(events.c.id.desc()).offset(EVENTS_PER_BOX).limit(1)
    tx.execute(delete(events).where(events.c.box_id == box_id, events.c.id <= oldest.scalar_subquery()))
