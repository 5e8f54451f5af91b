"""``make bench ARGS="--only encryption"``: what the encrypted database costs, and what encryption and audit cost of a whole scan.

Everything is measured in turns. The database: SQLCipher (AES-256-CBC and HMAC-SHA512 per page), against SQLite3 Multiple Ciphers
(ChaCha20-Poly1305, where ``apsw-sqlite3mc`` is installed) and a plain one by Python's ``sqlite3``, on the same tables with the queries of
the worklist page. The scan: from the last byte to the stored finding in one process, by the box as it is and by one whose database is
plain, whose files are not encrypted, and which writes no audit entry.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import shutil
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from appliance.core.domain import Source
from appliance.core.settings import Settings
from appliance.inference.worker import Worker
from appliance.ingest.ingest import Ingest
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.store import database as database_module
from appliance.store import encrypted_files
from appliance.store.database import Database
from appliance.store.database_encryption import connect
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from tests.bench.page import fill

_ROUNDS = 21
_LATER = 5
_WRITES = 40
_COMMON = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA cache_size = -8000")


def run(directory: Path, studies: int, encode: Callable[[int], bytes], scans: int) -> dict[str, Any]:
    """Measure both.

    Args:
        directory: scratch room on a disk.
        studies: how many studies the worklist has.
        encode: makes the file of a scan by its number.
        scans: how many scans each box analyses.

    Returns:
        ``engines``: for each engine the ratios to the plain database (first page of a connection and later pages in processor time, one
        durable commit); ``scan``: the ratio of the medians of a scan with and without encryption and audit.
    """
    directory.mkdir(parents=True)
    return {"engines": _measure_engines(directory, studies), "scan": _measure_scans(directory, encode, scans)}


def print_rows(results: dict[str, Any]) -> None:
    """Print the ratios."""
    print("\n| database, against plain sqlite3 | first page | later pages | durable commit |\n|---|---|---|---|")
    for row in results["engines"]:
        print(f"| {row['engine']} | {row['first']:.2f} | {row['later']:.2f} | {row['commit']:.2f} |")
    print(f"\nOne scan, with / without encryption and audit: {results['scan']:.3f} (target at most 1.10)")


# -- the engines -----------------------------------------------------------------------------------------------------


def _measure_engines(directory: Path, studies: int) -> list[dict[str, Any]]:
    plain, statements = _prepare(directory, studies)
    key = secrets.token_bytes(32)
    with closing(connect(plain, None)) as source:
        source.execute("ATTACH ? AS encrypted KEY ?", (str(directory / "sqlcipher"), f"x'{key.hex()}'"))
        source.execute("SELECT sqlcipher_export('encrypted')").fetchone()
    openers: dict[str, Callable[[], Any]] = {
        "plain, sqlite3": lambda: sqlite3.connect(plain, isolation_level=None),
        "SQLCipher": lambda: connect(directory / "sqlcipher", key),
    }
    if importlib.util.find_spec("apsw"):
        shutil.copy(plain, directory / "chacha20")
        _chacha20(directory / "chacha20", f"PRAGMA hexrekey = '{key.hex()}'").close()
        openers["ChaCha20-Poly1305"] = lambda: _chacha20(directory / "chacha20", f"PRAGMA hexkey = '{key.hex()}'")
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in openers}
    for _ in range(_ROUNDS):
        for name, opener in openers.items():
            with closing(opener()) as connection:
                times[name].append(_time(connection, statements))
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    base = next(iter(middle.values()))
    ratios = {name: [mine / own for mine, own in zip(row, base, strict=True)] for name, row in middle.items()}
    return [{"engine": name, "first": row[0], "later": row[1], "commit": row[2]} for name, row in ratios.items()]


def _prepare(directory: Path, studies: int) -> tuple[Path, list[str]]:
    """A plain copy of the tables of a box with so many studies, and the statements of its worklist page."""
    plain, statements = directory / "plain", list[str]()
    with closing(Store(Settings.parse({"data_dir": directory / "box", "disk_reserve_bytes": 0}))) as store:
        fill(store, studies)
        connection = store.database.connection()
        connection.set_trace_callback(statements.append)
        Worklist(store).page(before=None, search="", limit=50)
        Worklist(store).count()
        connection.set_trace_callback(None)
        connection.execute("ATTACH ? AS plain KEY ''", (str(plain),))
        connection.execute("SELECT sqlcipher_export('plain')").fetchone()
    return plain, [text for text in statements if text.lstrip().upper().startswith(("SELECT", "WITH"))]


def _chacha20(path: Path, key_statement: str) -> Any:
    connection = importlib.import_module("apsw").Connection(str(path))
    connection.execute("PRAGMA cipher = 'chacha20'")
    connection.execute(key_statement)
    return connection


def _time(connection: Any, statements: list[str]) -> tuple[float, float, float]:
    """Processor seconds of the first page of a fresh connection and of a later one; seconds of one small durable commit."""
    for text in _COMMON:
        list(connection.execute(text))

    def show_page() -> float:
        started = time.process_time()
        for text in statements:
            list(connection.execute(text))
        return time.process_time() - started

    first, later = show_page(), statistics.fmean(show_page() for _ in range(_LATER))
    started = time.perf_counter()
    for _ in range(_WRITES):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('bench', hex(randomblob(200)))")
        connection.execute("COMMIT")
    return first, later, (time.perf_counter() - started) / _WRITES


# -- whole scans -----------------------------------------------------------------------------------------------------


def _measure_scans(directory: Path, encode: Callable[[int], bytes], scans: int) -> float:
    boxes = {}
    for name in ("as it is", "bare"):
        with _bare() if name == "bare" else _as_it_is():
            store = Store(Settings.parse({"data_dir": directory / name, "disk_reserve_bytes": 0, "tune_at_activation": False}))
            activate(store, reference_bundle(), "bench")
            worker = Worker(store, lambda _seconds: None)
            worker.prepare()
        boxes[name] = store, worker, Ingest(store)
    times: dict[str, list[float]] = {name: [] for name in boxes}
    for number in range(scans + 2):
        data = encode(number)
        for name, (store, worker, ingest) in boxes.items():
            with _bare() if name == "bare" else _as_it_is():
                started = time.perf_counter()
                accepted = ingest.accept(data, Source("cli", "bench"), started)
                store.planner.close_series([accepted.stored.series_id])
                while worker.run_once():
                    continue
                times[name].append(time.perf_counter() - started)
    for store, _, _ in boxes.values():
        store.close()
    own, bare = (statistics.median(times[name][2:]) for name in ("as it is", "bare"))
    return own / bare


class _NoCipher:
    """Stands in for AES-256-GCM: the bytes go through as they are."""

    tag = bytes(16)

    def __init__(self, *_: object) -> None:
        """Take the arguments of ``Cipher``."""

    def encryptor(self) -> _NoCipher:
        return self

    decryptor = encryptor

    def authenticate_additional_data(self, _data: bytes) -> None:
        """Authenticate nothing."""

    def update(self, data: bytes) -> bytes:
        return bytes(data)

    def finalize(self) -> bytes:
        return b""


@contextmanager
def _bare() -> Iterator[None]:
    """Neither encryption nor audit, for what is done within."""

    def connect_plain(path: Path, _key: bytes | None, **options: Any) -> sqlite3.Connection:
        return connect(path, None, **options)

    with (
        mock.patch.object(encrypted_files, "Cipher", _NoCipher),
        mock.patch.object(database_module, "connect", connect_plain),
        mock.patch.object(Database, "audit", staticmethod(lambda *_args, **_detail: None)),
    ):
        yield


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
