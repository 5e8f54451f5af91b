"""Encrypted database files: opening one with its key, and the encryption of the plain database that an older appliance left (R13).

SQLCipher encrypts each page with AES-256 and authenticates it with HMAC-SHA512. The key is given as it is, without a key derivation.

A plain database is copied to an encrypted one beside it, compared row by row, flushed, and renamed to its place; the old bytes are then
overwritten. A crash at any point leaves the plain database or the encrypted one, complete, and the next opening goes on.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, cast

from sqlcipher3 import dbapi2 as sqlcipher

from appliance.core.errors import StoreError
from appliance.store import plain_files

logger = logging.getLogger(__name__)

Error: Final = sqlcipher.Error
PLAIN_HEADER: Final = b"SQLite format 3\0"
PAGE_BYTES: Final = 4096


def connect(path: Path, key: bytes | None, **options: Any) -> sqlite3.Connection:
    """Open a database in autocommit mode; its connection has the interface of ``sqlite3``, its errors are those of SQLCipher.

    Args:
        path: the file.
        key: 256 bits; None for a plain database.
        **options: of ``sqlite3.connect``.
    """
    connection = sqlcipher.connect(str(path), isolation_level=None, **options)
    connection.row_factory = sqlcipher.Row
    if key is not None:
        connection.execute("PRAGMA cipher_log_level = NONE")  # it would write to the standard error
        connection.execute(f"PRAGMA key = \"x'{key.hex()}'\"")
    return cast("sqlite3.Connection", connection)


def is_plain(path: Path) -> bool:
    """Whether the file is a plain SQLite database."""
    return _head(path) == PLAIN_HEADER


def is_encrypted(path: Path) -> bool:
    """Whether the file can be an encrypted database, whose bytes look random: whole pages, and not a plain one."""
    head = _head(path)
    return bool(head) and head != PLAIN_HEADER and path.stat().st_size % PAGE_BYTES == 0


def finish_encryption(path: Path) -> None:
    """Finish what a crash left of :func:`encrypt_plain` after the renaming; raises OSError."""
    files = (path, _log(path))
    if any(file.with_name(file.name + plain_files.SUFFIX).exists() for file in files):
        with _lock(path):
            for file in files:
                plain_files.finish(file)


def encrypt_plain(path: Path, key: bytes) -> None:
    """Encrypt the plain database in ``path``; another program may be first.

    Raises:
        StoreError: ``store.failed``: the copy differs; the plain database was kept.
        sqlcipher3 Error, OSError: it cannot be read or written (the disk is full); the plain database was kept.
    """
    fresh = path.with_name(f"{path.name}.encrypting")
    with _lock(path):
        plain_files.finish(path)
        plain_files.finish(_log(path))
        if is_plain(path):
            try:
                _copy(path, fresh, key)
                _compare(path, fresh, key)
            except BaseException:
                _remove(fresh)
                plain_files.finish(_log(path))
                raise
            plain_files.replace(path, fresh)
            logger.info("database encrypted")


def _copy(path: Path, fresh: Path, key: bytes) -> None:
    """Copy the plain database into an encrypted file, in one transaction that excludes every writer."""
    _remove(fresh)
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    if _log(path).exists():  # of a program that was killed; SQLite deletes it without overwriting it
        plain_files.keep(_log(path))
    with closing(connect(path, None)) as source:
        source.execute("PRAGMA journal_mode = DELETE").fetchone()  # a write-ahead log must not survive the renaming
        plain_files.finish(_log(path))
        source.execute("ATTACH ? AS encrypted KEY ?", (str(fresh), f"x'{key.hex()}'"))
        source.execute("BEGIN EXCLUSIVE")
        source.execute("SELECT sqlcipher_export('encrypted')").fetchone()
        version = source.execute("PRAGMA main.user_version").fetchone()[0]
        source.execute(f"PRAGMA encrypted.user_version = {version}")
        source.execute("COMMIT")
    if _log(path).exists():
        raise StoreError("store.failed", "another program uses the database")


def _compare(path: Path, fresh: Path, key: bytes) -> None:
    """Raise StoreError where the copy is damaged, or differs from its source in the schema, the version or any row."""
    schema = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
    with closing(connect(path, None)) as plain, closing(connect(fresh, key)) as copy:
        tables = [row["name"] for row in plain.execute(schema) if row["type"] == "table"]
        queries = [schema, "PRAGMA user_version", *(f'SELECT * FROM "{name}"' for name in tables)]  # noqa: S608 - names of the schema
        is_damaged = any(copy.execute("PRAGMA cipher_integrity_check"))
        for query in queries:
            pairs = zip_longest(plain.execute(query), copy.execute(query), fillvalue=())
            is_damaged = is_damaged or any(tuple(one) != tuple(two) for one, two in pairs)
    if is_damaged:
        raise StoreError("store.failed", "the encrypted copy of the database differs; the plain one was kept")


def _log(path: Path) -> Path:
    """The write-ahead log of a database."""
    return Path(f"{path}-wal")


def _remove(fresh: Path) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        Path(f"{fresh}{suffix}").unlink(missing_ok=True)


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(len(PLAIN_HEADER))
    except FileNotFoundError:
        return b""


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock on the encryption of a database; several programs of the box may open it at the same moment."""
    with open(path.with_name(f"{path.name}.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
