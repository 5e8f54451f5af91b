"""What the boxes of the fleet have reported about versions, for the advice of ``model-library``.

``model-library serve`` keeps the fleet database in the library's directory, or in the one that ``--db`` names. A command without that
option must not take the missing file for a fleet without failures, so the server leaves a note beside the library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from model_sync import atomic_files
from model_sync.errors import SettingsError
from model_sync.library.barred_rollouts import FieldResults

DATABASE_NOTE: Final = "fleet-database.txt"
_NOTE: Final = "`model-library serve --db` names the fleet database of this library; give --db to `withdraw`, `minimum`, `status` too.\n"
_EXTRA: Final = ("sqlalchemy", "psycopg")


def sqlite_url(library: Path) -> str:
    """Return the URL of the database in a library's directory."""
    return f"sqlite:///{(library / 'fleet.db').resolve()}"


def mark_database(directory: Path, db: str) -> None:
    """Leave or remove the note that the fleet database is not in the library's directory; ``db`` itself may hold a password.

    Raises:
        OSError: the directory cannot be written.
    """
    note = directory / DATABASE_NOTE
    if db == sqlite_url(directory):
        note.unlink(missing_ok=True)
    elif not note.is_file():
        atomic_files.write(note, _NOTE.encode())


def read_field_results(directory: Path, db: str | None) -> FieldResults | None:
    """Return what boxes have reported; None when this library has no fleet database.

    Args:
        directory: the library's directory.
        db: the URL of the fleet database; None reads the one in the library's directory.

    Raises:
        SettingsError: the database that ``db`` names cannot be opened.
    """
    if db is None and (directory / DATABASE_NOTE).is_file():
        return FieldResults(unknown="the fleet database is not in the library's directory; give --db URL")
    if db is None and not (directory / "fleet.db").is_file():
        return None
    try:
        return _query(db or sqlite_url(directory))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        return FieldResults(unknown=f"this needs {error.name} (pip install 'clinic-edge-appliance[library]')")
    except SettingsError as error:
        if db is not None:
            raise
        return FieldResults(unknown=f"{error.message}; run it as the account of the server")


def _query(url: str) -> FieldResults:
    from sqlalchemy import func, select

    from model_sync.agent.report import ModelState
    from model_sync.fleet.database import Fleet, failed_by_model
    from model_sync.fleet.rollout_pause_policy import SERVER
    from model_sync.fleet.tables import actions, activations

    here = activations.c
    counted = select(here.line, here.version, func.count()).group_by(here.line, here.version)
    works = here.state.in_((ModelState.GOOD.value, ModelState.ACTIVE.value)), here.running_since.is_not(None), here.ended_at.is_(None)
    stops = actions.c.actor == SERVER, actions.c.action.in_(("paused", "budget-spent"))
    fleet = Fleet(url)
    try:
        with fleet.reading() as tx:
            failed = {(line, version): int(count) for line, version, count in tx.execute(counted.where(failed_by_model()))}
            running = {(line, version): int(count) for line, version, count in tx.execute(counted.where(*works))}
            stopped = frozenset((line, version) for line, version in tx.execute(select(actions.c.line, actions.c.subject).where(*stops)))
    finally:
        fleet.close()
    return FieldResults(failed, stopped, running)
