"""SQLite as the box uses it: WAL, synchronous=FULL, BEGIN IMMEDIATE, one connection per thread, migrations, audit chain.

Plain ``sqlite3``: a change and its audit entry must share one transaction, and sqlite-utils commits inside its helpers.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Final

from appliance.core.domain import utc_now
from appliance.core.errors import StoreError

BUSY_TIMEOUT_S: Final = 30.0
_MIGRATION_MARK: Final = "-- migration "
_GENESIS: Final = "0" * 64

# Audit events: DICOM PS3.15 A.5.3 (event identifiers) and CID 401 (event types), code value and meaning.
APPLICATION_ACTIVITY: Final = ("110100", "Application Activity")
INSTANCES_ACCESSED: Final = ("110103", "DICOM Instances Accessed")
DATA_IMPORT: Final = ("110107", "Import")
SECURITY_ALERT: Final = ("110113", "Security Alert")
USER_AUTHENTICATION: Final = ("110114", "User Authentication")
# Event types, as particulars of an entry.
LOGIN: Final[dict[str, Any]] = {"type": "110122", "type_meaning": "Login"}
LOGOUT: Final[dict[str, Any]] = {"type": "110123", "type_meaning": "Logout"}
SOFTWARE_CONFIGURATION: Final[dict[str, Any]] = {"type": "110131", "type_meaning": "Software Configuration"}
SECURITY_ATTRIBUTES_CHANGED: Final[dict[str, Any]] = {"type": "110137", "type_meaning": "User security Attributes Changed"}


def migrations() -> list[tuple[int, list[str]]]:
    """The numbered blocks of schema.sql, each as its statements."""
    text = resources.files("appliance.store").joinpath("schema.sql").read_text("utf-8")
    blocks = []
    for block in text.split(_MIGRATION_MARK)[1:]:
        number, _, body = block.partition(":")
        blocks.append((int(number), _statements(body.partition("\n")[2])))
    return blocks


def _statements(script: str) -> list[str]:
    """Split a script at the semicolons that end a statement (a trigger's body has inner ones)."""
    statements, pending = [], ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            statements.append(pending.strip())
            pending = ""
    return statements


def store_error(error: sqlite3.Error | OSError) -> StoreError:
    """Convert an error of the database or the file system to a StoreError, with a code of its own for a full disk."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or (isinstance(error, sqlite3.Error) and "full" in str(error))
    return StoreError("ingest.disk_full" if full else "store.failed", str(error))


class _Connection(sqlite3.Connection):
    """Closes itself when nothing references it any more; without that Python 3.13 gives a ResourceWarning."""

    def __del__(self) -> None:
        with suppress(sqlite3.ProgrammingError):  # destroyed in another thread, or never opened: SQLite frees it all the same
            self.close()


class Database:
    """One SQLite file; each thread that uses it has its own connection.

    Args:
        path: the database file; created, with its schema, when absent.
        audit_key: seals the last entry of the audit, so that removing entries at its end is detected too.

    Raises:
        StoreError: the file is not a database, or a newer appliance wrote it.
    """

    def __init__(self, path: Path, audit_key: bytes) -> None:
        self.path = path
        self._audit_key = audit_key
        self._local = threading.local()
        try:
            self._migrate()
        except sqlite3.Error as error:
            raise store_error(error) from error

    def connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, factory=_Connection)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            # Not a method: SQLite would reference this object, and so the connection would never be closed.
            connection.create_function("audit_seal", 1, partial(_seal, self._audit_key), deterministic=True)
            self._local.connection = connection
        return connection

    def close(self) -> None:
        """Close this thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def query(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        try:
            return self.connection().execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise store_error(error) from error

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query, or None."""
        return next(iter(self.query(sql, *values)), None)

    def require(self, what: str, sql: str, *values: Any) -> sqlite3.Row:
        """The first row of a query; raises StoreError ``store.missing`` with the detail ``what`` where there is none."""
        row = self.one(sql, *values)
        if row is None:
            raise StoreError("store.missing", what)
        return row

    def number(self, sql: str, *values: Any) -> int:
        """The only value of a query as an integer; 0 where it is NULL or there is no row."""
        row = self.one(sql, *values)
        return int(row[0] or 0) if row else 0

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One write: BEGIN IMMEDIATE, COMMIT with fsync, ROLLBACK on any error.

        Args:
            durable: False for data that a power cut may lose (never for what was acknowledged): it survives a crash of the process, and
                the next durable commit makes it durable too.

        Raises:
            StoreError: the transaction was rolled back.
        """
        connection = self.connection()
        try:
            if not durable:
                connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise store_error(error) from error
            raise
        finally:
            if not durable:
                connection.execute("PRAGMA synchronous = FULL")

    @staticmethod
    def insert(tx: sqlite3.Connection, table: str, on_conflict: str = "", **values: Any) -> int:
        """Insert one row by column name, inside the caller's transaction; returns its row id.

        Table and column names come from this package's code only; every value is bound.
        """
        columns, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
        cursor = tx.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks}) {on_conflict}", values)  # noqa: S608
        return int(cursor.lastrowid or 0)

    def key_ids(self, name: str) -> list[str]:
        """The recorded ids of a key (see :mod:`appliance.store.keys`); none where an older appliance wrote the database."""
        row = self.one("SELECT value FROM meta WHERE key = ?", f"key_ids:{name}")
        return list(json.loads(row["value"])) if row else []

    def record_key_ids(self, name: str, ids: list[str]) -> None:
        """Record which ids of a key the data depend on, so that the box notices a lost or foreign key."""
        if self.key_ids(name) != ids:
            with self.transaction() as connection:
                connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"key_ids:{name}", json.dumps(ids)))

    def _migrate(self) -> None:
        blocks = migrations()
        version = self.connection().execute("PRAGMA user_version").fetchone()[0]
        if version > blocks[-1][0]:
            raise StoreError("store.failed", f"database version {version} is newer than this appliance knows", hint="Update the appliance.")
        if version == blocks[-1][0]:
            return
        with self.transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            for number, statements in blocks:
                if number > version:
                    for statement in statements:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {number}")

    # -- audit -------------------------------------------------------------------------------------------------------

    @staticmethod
    def audit(
        connection: sqlite3.Connection, event: tuple[str, str], actor: str, action: str, obj: str, outcome: int = 0, **detail: Any
    ) -> None:
        """Append one entry to the hash chain, inside the caller's transaction (requirements R9, R10).

        Args:
            connection: the open transaction.
            event: event identifier (PS3.15 A.5.3): code value and meaning.
            actor: account, AE title or program that caused the event.
            action: C, R, U, D or E (EventActionCode).
            obj: the object, by its number on the box (``instance:12``), never a patient's name.
            outcome: EventOutcomeIndicator, 0 success, 4 minor, 8 serious, 12 major failure.
            **detail: further particulars.
        """
        last = connection.execute("SELECT seq, digest FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
        seq, previous = (last["seq"] + 1, last["digest"]) if last else (1, _GENESIS)
        fields = {"seq": seq, "at": utc_now(), "event": event[0], "meaning": event[1], "actor": actor, "action": action, "object": obj}
        entry = json.dumps(fields | {"outcome": outcome, "detail": detail}, ensure_ascii=False, sort_keys=True)
        digest = chain(previous, entry)
        connection.execute("INSERT INTO audit VALUES (?, ?, ?)", (seq, entry, digest))
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('audit_head', audit_seal(?))", (f"{seq} {digest}",))

    def verify_audit(self) -> int:
        """Verify the hash chain; returns the number of entries.

        Raises:
            StoreError: ``audit.broken`` with the first entry that does not match.
        """
        previous, expected = _GENESIS, 1
        for row in self.connection().execute("SELECT seq, entry, digest FROM audit ORDER BY seq"):
            if row["seq"] != expected or row["digest"] != chain(previous, row["entry"]):
                raise StoreError("audit.broken", f"entry {expected}")
            previous, expected = row["digest"], expected + 1
        head = self.one("SELECT value FROM meta WHERE key = 'audit_head'")
        if (head["value"] if head else None) != (_seal(self._audit_key, f"{expected - 1} {previous}") if expected > 1 else None):
            raise StoreError("audit.broken", f"the end after entry {expected - 1}")
        return expected - 1


def _seal(key: bytes, head: str) -> str:
    """The head of the chain with a MAC by the audit key."""
    return f"{head} {hmac.new(key, head.encode(), 'sha256').hexdigest()}"


def chain(previous: str, entry: str) -> str:
    """The digest of an entry: SHA-256 over the previous digest and the canonical JSON of the entry."""
    return hashlib.sha256(f"{previous}\n{entry}".encode()).hexdigest()
