"""A database as an older version of the appliance left it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from appliance.store import audit
from appliance.store.database import migrations
from appliance.store.keys import AUDIT_KEY, Keys


def old_database(path: Path, version: int) -> sqlite3.Connection:
    """Create a database with the schema of a version, and the key of its audit; the caller inserts rows, commits and closes it."""
    connection = sqlite3.connect(path)
    audit.prepare(connection, Keys(path.parent).load(AUDIT_KEY, lambda: True), path.parent, lambda: 0)
    for number, statements in migrations():
        if number <= version:
            for statement in statements:
                connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {version}")
    return connection
