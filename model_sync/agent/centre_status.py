"""``centre.json``: the last answer of the central server to this box, for ``model-sync status``: accepted, denied, or asked to wait."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from model_sync import atomic_files
from model_sync.errors import ModelSyncError
from model_sync.trust.rollback_protection import iso, utc_now

CENTRE_FILE: Final = "centre.json"
logger = logging.getLogger(__name__)


def read_centre_status(state_dir: Path) -> dict[str, Any]:
    """Return ``code``, ``message``, ``hint``, ``at``, ``since`` and ``last_success_at``; an empty one before the first request.

    ``code`` is empty when the last request was accepted; ``since`` is when this code came first.
    """
    return atomic_files.read_json(state_dir / CENTRE_FILE)


@contextmanager
def recorded(state_dir: Path) -> Iterator[None]:
    """Record how a request to the centre ends; the error is raised as it is."""
    try:
        yield
    except ModelSyncError as error:
        _record(state_dir, error, utc_now())
        raise
    _record(state_dir, None, utc_now())


def _record(state_dir: Path, error: ModelSyncError | None, now: datetime) -> None:
    before, at = read_centre_status(state_dir), iso(now)
    code = error.code if error is not None else ""
    since = before.get("since") if before.get("code") == code else at
    value = {"schema": 1, "code": code, "message": error.message if error else "", "hint": error.hint if error else "", "at": at}
    success = before.get("last_success_at") if error is not None else at
    try:
        atomic_files.write_json(state_dir / CENTRE_FILE, value | {"since": since, "last_success_at": success})
    except OSError as problem:
        logger.warning("the answer of the centre could not be recorded: %s", problem)
