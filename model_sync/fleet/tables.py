"""The tables of the fleet database, and its engine: SQLite in WAL mode or PostgreSQL, by SQLAlchemy Core.

Times are whole seconds since the epoch by this server's clock; ``said_at`` is by the clock of the box.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.exc import ArgumentError

SCHEMA: Final = 6
# The statements that bring an older database to each schema.
MIGRATIONS: Final = {
    2: ("ALTER TABLE actions ADD COLUMN note VARCHAR(300) NOT NULL DEFAULT ''",),
    3: ("ALTER TABLE boxes ADD COLUMN device_class VARCHAR(16) NOT NULL DEFAULT ''",),
    4: (
        *(f"ALTER TABLE boxes ADD COLUMN {name} VARCHAR(64) NOT NULL DEFAULT ''" for name in ("alarm", "alarm_line", "alarm_version")),
        "CREATE INDEX boxes_by_alarm ON boxes (alarm, box_id)",
    ),
    5: (
        "ALTER TABLE boxes ADD COLUMN audit_heads TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE boxes ADD COLUMN audit_state VARCHAR(16) NOT NULL DEFAULT ''",
        "CREATE INDEX boxes_by_audit_state ON boxes (audit_state, box_id)",
    ),
    6: tuple(f"ALTER TABLE operators DROP COLUMN {name}" for name in ("failures", "locked_until")),  # a name is slowed, never locked
}
NOTE_CHARS: Final = 300
_BUSY_S: Final = 20

metadata: Final = MetaData()
meta: Final = Table("meta", metadata, Column("key", String(40), primary_key=True), Column("value", Text, nullable=False))
tokens: Final = Table(
    "tokens", metadata,
    Column("sha256", String(64), primary_key=True),
    Column("box_id", String(64), nullable=False),
    Column("ring", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("used_at", BigInteger),
    Column("key_sha256", String(64)),  # of the device that used it, which may repeat the request when the answer was lost
    Column("serial", String(40)),
)  # fmt: skip
boxes: Final = Table(
    "boxes", metadata,
    Column("box_id", String(64), primary_key=True),
    Column("ring", String(64), nullable=False),
    Column("reported_ring", String(64), nullable=False, server_default=""),  # the ring in its settings
    Column("enrolled_at", BigInteger, nullable=False),
    Column("denied_at", BigInteger),
    Column("last_seen", BigInteger),
    Column("sequence", BigInteger, nullable=False, server_default="0"),
    Column("report_sha256", String(64), nullable=False, server_default=""),
    Column("report", Text),
    Column("sync_state", String(16), nullable=False, server_default="unknown"),
    Column("sync_code", String(64), nullable=False, server_default=""),
    Column("sync_since", BigInteger),
    Column("appliance_version", String(40), nullable=False, server_default=""),
    Column("device_class", String(16), nullable=False, server_default=""),  # empty: not reported
    Column("trouble", String(64), nullable=False, server_default=""),  # code of the newest activation, when it failed
    Column("trouble_line", String(64), nullable=False, server_default=""),
    Column("trouble_version", String(64), nullable=False, server_default=""),
    Column("alarm", String(64), nullable=False, server_default=""),  # code of an open alarm of a model that runs
    Column("alarm_line", String(64), nullable=False, server_default=""),
    Column("alarm_version", String(64), nullable=False, server_default=""),
    Column("audit_heads", Text, nullable=False, server_default=""),  # JSON (model_sync/fleet/audit_heads.py)
    Column("audit_state", String(16), nullable=False, server_default=""),  # backwards or changed, until a person acknowledges it
    Column("window_start", BigInteger, nullable=False, server_default="0"),
    Column("window_count", Integer, nullable=False, server_default="0"),
    Index("boxes_by_ring", "ring", "box_id"),
    Index("boxes_by_last_seen", "last_seen"),
    Index("boxes_by_sync_state", "sync_state", "box_id"),
    Index("boxes_by_trouble", "trouble", "box_id"),
    Index("boxes_by_alarm", "alarm", "box_id"),
    Index("boxes_by_audit_state", "audit_state", "box_id"),
)  # fmt: skip
certificates: Final = Table(
    "certificates", metadata,
    Column("serial", String(40), primary_key=True),
    Column("box_id", ForeignKey("boxes.box_id"), nullable=False, index=True),
    Column("not_after", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    Column("pem", Text, nullable=False),
)  # fmt: skip
box_models: Final = Table(
    "box_models", metadata,
    Column("box_id", ForeignKey("boxes.box_id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("line", String(64), nullable=False),
    Column("version", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("precision", String(16), nullable=False),
    Column("runtime", String(80), nullable=False),
    Column("running", Integer, nullable=False),
    Index("models_by_version", "running", "line", "version", "box_id"),
)  # fmt: skip
activations: Final = Table(  # one row per box and version: the basis of the failure budget
    "activations", metadata,
    Column("box_id", ForeignKey("boxes.box_id"), primary_key=True),
    Column("line", String(64), primary_key=True),
    Column("version", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("code", String(64), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("ring", String(64), nullable=False, server_default=""),  # the ring of the box, when it is allowed and follows it
    Column("running_since", BigInteger),
    Column("ended_at", BigInteger),
    Index("activations_by_ring", "ring", "line", "version", "state"),
)  # fmt: skip
events: Final = Table(  # bounded history of one box, for people
    "events", metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("box_id", ForeignKey("boxes.box_id"), nullable=False),
    Column("line", String(64), nullable=False),
    Column("version", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("code", String(64), nullable=False),
    Column("said_at", BigInteger, nullable=False),  # by the box's clock: identifies a repeated event
    Column("at", BigInteger, nullable=False),
    UniqueConstraint("box_id", "digest", "state", "said_at"),
    Index("events_by_box", "box_id", "id"),
)  # fmt: skip
operators: Final = Table(
    "operators", metadata,
    Column("name", String(64), primary_key=True),
    Column("password_hash", Text, nullable=False),
)  # fmt: skip
sessions: Final = Table(
    "sessions", metadata,
    Column("token_sha256", String(64), primary_key=True),
    Column("operator", ForeignKey("operators.name"), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
)  # fmt: skip
actions: Final = Table(  # actions of people and of the failure budget; never deleted
    "actions", metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("ring", String(64), nullable=False, server_default=""),
    Column("line", String(64), nullable=False, server_default=""),
    Column("subject", String(64), nullable=False, server_default=""),  # a version or a box
    Column("figures", String(64), nullable=False, server_default=""),
    Column("note", String(NOTE_CHARS), nullable=False, server_default=""),  # the reason that a person gave
)  # fmt: skip


def open_engine(url: str) -> Engine:
    """Return an engine; a transaction of one with the option ``fleet_writes`` takes SQLite's write lock when it begins.

    Raises:
        ArgumentError: the URL is not valid, or of another database.
        OSError: SQLite's file cannot be created or protected.
    """
    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name not in ("sqlite", "postgresql"):
        raise ArgumentError("neither SQLite nor PostgreSQL")
    if engine.dialect.name == "sqlite":
        _keep_private(engine.url.database)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _keep_private(database: str | None) -> None:
    """Let only the owner read the cookie key and password hashes; SQLite gives its other files the same mode."""
    if not database or database == ":memory:":
        return
    os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for path in (Path(database), Path(f"{database}-wal"), Path(f"{database}-shm")):
        if path.exists() and path.stat().st_mode & 0o077 and path.stat().st_uid == os.geteuid():
            path.chmod(0o600)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # this module begins transactions, not the first statement that writes
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", f"busy_timeout = {_BUSY_S * 1000}"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("fleet_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
