"""SQLite as the box uses it: encrypted, WAL, synchronous=FULL, BEGIN IMMEDIATE, one connection per thread, migrations, audit chain.

The interface of ``sqlite3`` (PEP 249), as SQLCipher offers it: a change and its audit entry must share one transaction, and sqlite-utils
commits inside its helpers. Types are named after ``sqlite3``; the objects and the errors are those of ``sqlcipher3``.
"""

from __future__ import annotations

import errno
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Final

from sqlcipher3 import dbapi2 as sqlcipher

from appliance.core.errors import StoreError
from appliance.store import audit, audit_anchors
from appliance.store.audit import (
    APPLICATION_ACTIVITY,
    DATA_IMPORT,
    INSTANCES_ACCESSED,
    LOGIN,
    LOGOUT,
    SECURITY_ALERT,
    SECURITY_ATTRIBUTES_CHANGED,
    SOFTWARE_CONFIGURATION,
    USER_AUTHENTICATION,
)
from appliance.store.audit_anchors import AnchorFile
from appliance.store.database_encryption import Error, connect, encrypt_plain, finish_encryption, is_plain

__all__ = [
    "APPLICATION_ACTIVITY", "DATA_IMPORT", "INSTANCES_ACCESSED", "LOGIN", "LOGOUT", "SECURITY_ALERT", "SECURITY_ATTRIBUTES_CHANGED",
    "SOFTWARE_CONFIGURATION", "USER_AUTHENTICATION", "Database", "migrations", "store_error",
]  # fmt: skip
BUSY_TIMEOUT_S: Final = 30.0
NOT_A_DATABASE: Final = "file is not a database"  # what SQLite says of a damaged file, and of a key that does not decrypt it
_MIGRATION_MARK: Final = "-- migration "
_first_look = threading.Lock()
_seen: set[Path] = set()  # the databases that this process has opened


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
        if sqlcipher.complete_statement(pending):
            statements.append(pending.strip())
            pending = ""
    return statements


def store_error(error: Exception) -> StoreError:
    """Convert an error of the database or the file system to a StoreError, with a code of its own for a full disk."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or (isinstance(error, Error) and "full" in str(error))
    return StoreError("ingest.disk_full" if full else "store.failed", str(error))


class _Connection(sqlcipher.Connection):  # type: ignore[misc]  # sqlcipher3 has no types
    """Closes itself when nothing references it any more; without that Python 3.13 gives a ResourceWarning."""

    def __del__(self) -> None:
        with suppress(sqlcipher.ProgrammingError):  # destroyed in another thread, or never opened: SQLite frees it all the same
            self.close()


class Database:
    """One SQLite file; each thread that uses it has its own connection.

    Args:
        path: the database file; created, with its schema, when absent. A plain one of an older appliance is encrypted first.
        audit_key: seals the last entry of the audit, so that removing entries at its end is detected too.
        key: encrypts the file (256 bits).
        exchange_dir: where the sync agent says which head of the audit the centre has; None on a box without one.
        is_key_new: the key replaces a lost one, which the caller records (``appliance.store.audit.record_new_key``).

    Raises:
        StoreError: the file is not a database, or a newer appliance wrote it; ``key.wrong``: its audit was sealed with another key.
    """

    def __init__(self, path: Path, audit_key: bytes, key: bytes, *, exchange_dir: Path | None = None, is_key_new: bool = False) -> None:
        self.path, self._exchange_dir = path, exchange_dir
        self._audit_key = audit_key
        self._key = key
        self._local = threading.local()
        try:
            self._prepare()
            if not is_key_new:
                audit.require_key(self.connection())
        except (Error, OSError) as error:
            raise store_error(error) from error

    def connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = connect(self.path, self._key, timeout=BUSY_TIMEOUT_S, factory=_Connection)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
                highest = partial(audit_anchors.highest_number, self.path.parent, self._exchange_dir)
                audit.prepare(connection, self._audit_key, self.path.parent, highest)
            except BaseException:
                connection.close()  # it would hold locks for as long as the error is looked at
                raise
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
        except Error as error:
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
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """One read transaction, or the open one: its queries see the data of the same moment, while others write. Raises StoreError."""
        try:
            connection = self.connection()
            is_outer = not connection.in_transaction
            if is_outer:
                connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if is_outer and connection.in_transaction:  # some errors end it
                    connection.execute("ROLLBACK")
        except Error as error:
            raise store_error(error) from error

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One write: BEGIN IMMEDIATE, COMMIT with fsync, ROLLBACK on any error.

        Args:
            durable: False for data that a power cut may lose (never for what was acknowledged): it survives a crash of the process, and
                the next durable commit makes it durable too.

        Raises:
            StoreError: the transaction was rolled back.
        """
        try:
            connection = self.connection()
        except Error as error:
            raise store_error(error) from error
        try:
            if not durable:
                connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if isinstance(error, Error):
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

    def _prepare(self) -> None:
        """Bring the file to this version: encrypted, and with all migrations."""
        finish_encryption(self.path)
        # Before SQLite opens it, which would delete a write-ahead log without overwriting the plain text in it. Only once: closing
        # a file ends the locks that SQLite has on it for this whole process (howtocorrupt.html, 2.2).
        with _first_look:
            if self.path not in _seen and is_plain(self.path):
                encrypt_plain(self.path, self._key)
            _seen.add(self.path)
        try:
            self._migrate()
        except Error as error:
            if str(error) != NOT_A_DATABASE or not is_plain(self.path):
                raise
            self.close()
            encrypt_plain(self.path, self._key)
            self._migrate()

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
        audit.append(connection, event, actor, action, obj, outcome, **detail)

    def anchors(self) -> AnchorFile:
        """The file that keeps the head of the audit at intervals, and what is verified with it."""
        return AnchorFile(self.path.parent, self._exchange_dir, self._audit_key, self.snapshot, self.transaction)

    def verify_audit(self) -> int:
        """Verify hash chain, head and anchors; returns the number of entries.

        Raises:
            StoreError: ``audit.broken`` with what was changed or removed, and not acknowledged since.
        """
        found = self.anchors().verify()
        audit.require_whole(found)
        return found.entries
