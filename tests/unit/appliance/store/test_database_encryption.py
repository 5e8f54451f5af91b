"""The database is encrypted; a plain one of an older appliance is migrated, whole or not at all (R13)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.store.database import APPLICATION_ACTIVITY, Database, migrations
from appliance.store.database_encryption import encrypt_plain, is_encrypted, is_plain
from appliance.store.keys import RECORD_NAME
from appliance.store.store import DATABASE_NAME, Store
from tests.support.box_database import TEST_KEY, raw_connection
from tests.support.old_database import old_database
from tests.support.paths import ROOT

CANARY = "王小明^canary"
VERSION = 10
ROWS = 3000


def old_box(data_dir: Path, rows: int = ROWS) -> Settings:
    """A box of an older appliance with a plain database in WAL mode, of which a part is in the log only."""
    data_dir.mkdir(parents=True)
    raw = old_database(data_dir / DATABASE_NAME, VERSION)
    raw.commit()
    assert raw.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal"
    raw.execute("PRAGMA wal_autocheckpoint = 50")
    for number in range(rows):
        raw.execute(
            "INSERT INTO studies (study_instance_uid, patient_key, patient_id, patient_name, patient_birth_date, patient_sex, study_date,"
            " study_time, accession_number, study_description, received_at, revision)"
            " VALUES (?, 'k', '', ?, '', '', '', '', '', '', '', 1)",
            (f"1.{number}", CANARY),
        )
        if number % 100 == 0:
            raw.commit()
    raw.commit()
    path = data_dir / DATABASE_NAME
    for suffix in ("", "-wal"):  # as a power cut leaves them: closing would empty the log
        shutil.copy(f"{path}{suffix}", f"{path}{suffix}.kept")
    raw.close()
    for suffix in ("", "-wal"):
        os.replace(f"{path}{suffix}.kept", f"{path}{suffix}")
    return Settings.parse({"data_dir": data_dir, "disk_reserve_bytes": 0})


def studies(data_dir: Path) -> int:
    """How many studies the box has when it is opened; all have the canary's name."""
    with closing(Store(Settings.parse({"data_dir": data_dir, "disk_reserve_bytes": 0}))) as store:
        return store.database.number("SELECT count(*) FROM studies WHERE patient_name = ?", CANARY)


def leftovers(data_dir: Path) -> list[str]:
    return sorted(path.name for path in data_dir.iterdir() if path.name.endswith((".plain", ".encrypting", "-journal")))


def is_canary_on_disk(data_dir: Path) -> bool:
    return any(CANARY.encode() in path.read_bytes() for path in data_dir.rglob("*") if path.is_file())


def test_r13_the_bytes_of_the_write_ahead_log_are_destroyed_too(tmp_path: Path) -> None:
    old_box(tmp_path / "box")
    log = tmp_path / "box" / f"{DATABASE_NAME}-wal"
    blocks = tmp_path / "blocks"  # what a scan of the raw disk would find after SQLite deleted the log
    os.link(log, blocks)
    assert CANARY.encode() in blocks.read_bytes()
    assert studies(tmp_path / "box") == ROWS
    assert CANARY.encode() not in blocks.read_bytes()
    assert leftovers(tmp_path / "box") == []


def test_r13_a_plain_database_is_encrypted_at_the_first_start(tmp_path: Path) -> None:
    old_box(tmp_path / "box")
    assert is_canary_on_disk(tmp_path / "box")
    assert studies(tmp_path / "box") == ROWS
    assert is_encrypted(tmp_path / "box" / DATABASE_NAME)
    assert not is_canary_on_disk(tmp_path / "box")
    assert leftovers(tmp_path / "box") == []
    assert studies(tmp_path / "box") == ROWS
    with closing(raw_connection(tmp_path / "box")) as raw:
        assert raw.execute("PRAGMA user_version").fetchone()[0] == migrations()[-1][0]
        assert raw.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_r13_the_old_bytes_are_overwritten_before_the_file_is_deleted(tmp_path: Path) -> None:
    old_box(tmp_path / "box")
    with open(tmp_path / "box" / DATABASE_NAME, "rb") as held:  # another name of the same bytes: what a raw disk shows
        Database(tmp_path / "box" / DATABASE_NAME, b"key", TEST_KEY).close()
        assert CANARY.encode() not in held.read()


def test_r13_nothing_that_the_database_writes_is_plain(tmp_path: Path) -> None:
    with closing(Database(tmp_path / "new.sqlite3", b"key", TEST_KEY)) as database:
        for number in range(200):
            with database.transaction() as tx:
                tx.execute("INSERT INTO meta VALUES (?, ?)", (f"{CANARY}{number}", CANARY * 200))
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"new.sqlite3", "new.sqlite3-wal"} <= files.keys()
    assert [name for name, data in files.items() if CANARY.encode() in data or b"SQLite format" in data] == []


@pytest.mark.parametrize("at", ["link", "replace", "destroy"])
def test_a_crash_around_the_renaming_is_finished_at_the_next_start(tmp_path: Path, at: str) -> None:
    old_box(tmp_path / "box", 50)
    path, old = (tmp_path / "box" / name for name in (DATABASE_NAME, f"{DATABASE_NAME}.plain"))
    if at == "link":
        os.link(path, old)
    else:
        plain = path.read_bytes()
        assert studies(tmp_path / "box") == 50
        old.write_bytes(plain if at == "replace" else os.urandom(8192) + plain[8192:])
    assert studies(tmp_path / "box") == 50
    assert (is_encrypted(path), leftovers(tmp_path / "box"), is_canary_on_disk(tmp_path / "box")) == (True, [], False)


MIGRATE = """
import sys
from pathlib import Path
from appliance.core.settings import Settings
from appliance.store.store import Store
print("ready", flush=True)
sys.stdin.readline()
Store(Settings.parse({"data_dir": Path(sys.argv[1]), "disk_reserve_bytes": 0})).close()
print("done", flush=True)
"""


def kill_during_migration(data_dir: Path, delay_s: float) -> None:
    """Start the migration in a process and kill it after so many seconds."""
    command = [sys.executable, "-c", MIGRATE, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)


def check_kills(tmp_path: Path, kills: int, seed: int) -> None:
    """After each kill the database is plain or encrypted, complete; the next start has every row."""
    chosen = random.Random(seed)
    seen = set()
    for number in range(kills):
        data_dir = tmp_path / f"box{number}"
        old_box(data_dir, 1500)
        kill_during_migration(data_dir, chosen.uniform(0, 0.25))
        path = data_dir / DATABASE_NAME
        assert is_plain(path) != is_encrypted(path)
        seen.add(is_plain(path))
        assert studies(data_dir) == 1500
        assert (is_encrypted(path), leftovers(data_dir), is_canary_on_disk(data_dir)) == (True, [], False)
    assert seen


def test_a_migration_killed_at_any_point_loses_no_row(tmp_path: Path) -> None:
    check_kills(tmp_path, 5, seed=1)


@pytest.mark.long
def test_a_migration_killed_at_100_random_points_loses_no_row(tmp_path: Path) -> None:
    check_kills(tmp_path, 100, seed=2)


FULL = """
import contextlib, sys
from pathlib import Path
from contextlib import closing
from appliance.core.errors import StoreError
from tests.unit.appliance.store.test_database_encryption import is_plain, old_box, studies, leftovers, ROWS, DATABASE_NAME
box = Path(sys.argv[1]) / "box"
old_box(box)
ballast = box.parent / "ballast"
room = int(sys.argv[2])
with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
    while file.write(bytes(4096)):
        continue
import os
os.truncate(ballast, max(0, ballast.stat().st_size - room))
try:
    print(studies(box))
except StoreError as error:
    print(error.code)
print(is_plain(box / DATABASE_NAME), len(leftovers(box)))
ballast.unlink()
print(studies(box) == ROWS, leftovers(box))
"""


@pytest.mark.parametrize("room_bytes", [8192, 65_536, 300_000])
def test_a_disk_that_is_full_keeps_the_database_whole(tmp_path: Path, room_bytes: int) -> None:
    script = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1" "$4"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, FULL, str(room_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("this kernel lets no user mount a file system of its own")
    first, *rest = done.stdout.split()
    # With little room SQLite cannot even make its index of the log, which it reports as an I/O error; with much there is enough.
    assert first in {8192: ("store.failed", "ingest.disk_full"), 65_536: ("ingest.disk_full",)}.get(room_bytes, (str(ROWS),)), done.stderr
    assert rest == [str(first != str(ROWS)), "0", "True", "[]"], done.stdout + done.stderr


def test_two_programs_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    settings, failures = old_box(tmp_path / "box", 200), []

    def start() -> None:
        try:
            Store(settings).close()
        except StoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failures, studies(tmp_path / "box")) == ([], 200)


def test_a_copy_that_differs_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.store import database_encryption

    old_box(tmp_path / "box", 50)
    copied = database_encryption._copy

    def lose_a_row(path: Path, fresh: Path, key: bytes) -> None:
        copied(path, fresh, key)
        with closing(database_encryption.connect(fresh, key)) as copy:
            copy.execute("DELETE FROM studies WHERE id = 50")

    monkeypatch.setattr(database_encryption, "_copy", lose_a_row)
    with pytest.raises(StoreError, match="differs"):
        encrypt_plain(tmp_path / "box" / DATABASE_NAME, TEST_KEY)
    assert (is_plain(tmp_path / "box" / DATABASE_NAME), leftovers(tmp_path / "box")) == (True, [])


OLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("BEGIN")
print(connection.execute("SELECT count(*) FROM studies").fetchone()[0], flush=True)
sys.stdin.read()
"""


def test_an_old_box_that_an_older_program_still_uses_is_not_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.store import database_encryption

    connect = database_encryption.connect
    monkeypatch.setattr(database_encryption, "connect", lambda path, key, **options: connect(path, key, **(options | {"timeout": 0.1})))
    settings = old_box(tmp_path / "box", 50)
    command = [sys.executable, "-c", OLDER, str(settings.data_dir / DATABASE_NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as older:  # locks are between processes
        assert older.stdout is not None
        assert older.stdout.readline().split() == [b"50"]
        with pytest.raises(StoreError, match=r"store\.failed"):
            Database(settings.data_dir / DATABASE_NAME, b"key", TEST_KEY)
        older.communicate(b"end")
    assert is_plain(settings.data_dir / DATABASE_NAME)


@pytest.mark.parametrize("how", ["lost", "empty", "other bytes"])
@pytest.mark.parametrize("is_recorded", [True, False])
def test_r46_a_database_whose_key_does_not_open_it_is_refused(tmp_path: Path, how: str, is_recorded: bool) -> None:
    settings = Settings.parse({"data_dir": tmp_path / "box"})
    with closing(Store(settings)) as store:
        store.record(APPLICATION_ACTIVITY, "test", "E", "x:1")
    key = settings.data_dir / "keys" / "database.key"
    kept = key.read_bytes()
    if not is_recorded:
        (settings.data_dir / RECORD_NAME).unlink()
    if how == "lost":
        key.unlink()
    else:
        key.write_bytes(b"" if how == "empty" else os.urandom(32))
    with pytest.raises(StoreError) as refused:
        Store(settings)
    assert refused.value.code == ("key.wrong" if how == "other bytes" else "key.missing")
    key.write_bytes(kept)
    with closing(Store(settings)) as store:
        assert store.database.verify_audit() == 1


HOLD = """
import sys
from pathlib import Path
from appliance.store.database import Database
database = Database(Path(sys.argv[1]), b"key", bytes(range(32)))
for line in sys.stdin:
    database.close()
    database.connection().execute("SELECT count(*) FROM meta").fetchone()
    database.close()
    print("closed", flush=True)
"""


def test_a_second_opening_in_one_process_keeps_the_locks_of_the_first(tmp_path: Path) -> None:
    """Else another program, which takes itself for the last one, deletes the log that the first still writes."""
    path = tmp_path / "box.sqlite3"
    first = Database(path, b"key", TEST_KEY)
    with first.transaction() as tx:
        tx.execute("INSERT INTO meta VALUES ('a', '1')")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        Database(path, b"key", TEST_KEY).close()
        other.stdin.write(b"go\n")
        other.stdin.flush()
        assert other.stdout.readline() == b"closed\n"
        assert path.with_name("box.sqlite3-wal").exists()
        with first.transaction() as tx:
            tx.execute("INSERT INTO meta VALUES ('b', '2')")
        first.close()
        other.communicate()
    with closing(Database(path, b"key", TEST_KEY)) as again:
        assert again.number("SELECT count(*) FROM meta WHERE key IN ('a', 'b')") == 2


def test_every_thread_has_its_own_connection_and_rows_have_names(tmp_path: Path) -> None:
    with closing(Database(tmp_path / "box.sqlite3", b"key", TEST_KEY)) as database:
        found = []

        def write(number: int) -> None:
            with database.transaction() as tx:
                Database.insert(tx, "meta", key=f"k{number}", value=str(number))
            found.append(database.require("k", "SELECT value AS v FROM meta WHERE key = ?", f"k{number}")["v"])
            database.close()

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [str(number) for number in range(8)]
