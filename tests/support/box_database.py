"""The encrypted database of a box, opened past the rules of the appliance, as by somebody who has the disk and the keys."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from appliance.store.database_encryption import connect
from appliance.store.keys import DATABASE_KEY, Keys
from appliance.store.store import DATABASE_NAME

TEST_KEY = bytes(range(32))


def raw_connection(data_dir: Path) -> sqlite3.Connection:
    """Another connection to the database of a box, in autocommit mode, without foreign keys; the caller closes it."""
    return connect(data_dir / DATABASE_NAME, Keys(data_dir).load(DATABASE_KEY))


def copy_database(data_dir: Path, target: Path) -> None:
    """Copy the database of a box, encrypted with the same key, as a backup of the disk has it."""
    with closing(raw_connection(data_dir)) as source, closing(connect(target, Keys(data_dir).load(DATABASE_KEY))) as copy:
        source.backup(copy)
