"""The last search of the whole audit, which the worker makes at intervals: the status page shows its result and waits for none."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.core.domain import utc_now
from appliance.store.database import Database
from model_sync import atomic_files

logger = logging.getLogger(__name__)
INTERVAL_S: Final = 3600.0
# After one that found something: a person who acknowledges it does not see the warning for another hour.
BROKEN_INTERVAL_S: Final = 300.0
CHECK_NAME: Final = "audit-check.json"


@dataclass(frozen=True)
class AuditCheck:
    """When the audit was searched (ISO 8601 in UTC), and the number of problems that nobody has acknowledged."""

    at: str
    problems: int

    @property
    def interval_s(self) -> float:
        """Seconds until the next search."""
        return BROKEN_INTERVAL_S if self.problems else INTERVAL_S


def check_audit(database: Database) -> AuditCheck:
    """Search the whole audit and record the result beside the database.

    Raises:
        OSError: the result cannot be written.
        StoreError: the database cannot be read.
    """
    done = AuditCheck(utc_now(), len(database.anchors().verify().problems))
    path = _path(database.path.parent)
    path.parent.mkdir(exist_ok=True)
    atomic_files.write(path, json.dumps({"at": done.at, "problems": done.problems}).encode(), mode=0o600)
    if done.problems:
        logger.error("the audit was changed", extra={"code": "audit.broken", "count": done.problems})
    return done


def last_check(data_dir: Path) -> AuditCheck | None:
    """The last search; None where there has been none yet."""
    state = atomic_files.read_json(_path(data_dir))
    at, problems = state.get("at"), state.get("problems")
    return AuditCheck(at, problems) if isinstance(at, str) and isinstance(problems, int) else None


def _path(data_dir: Path) -> Path:
    return data_dir / "run" / CHECK_NAME
