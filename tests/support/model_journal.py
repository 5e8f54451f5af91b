"""What the worker writes to the journal of activations, and the sync agent to its status file, for tests of the pages."""

from __future__ import annotations

import json
from typing import Any

from appliance import model_queries
from appliance.core.domain import utc_now
from appliance.store.database import Database
from tests.support.web_box import Box
from webui.models.library_view import FILE_NAME


def told(**values: Any) -> dict[str, Any]:
    """What the sync agent writes."""
    now = utc_now()
    return {
        "schema": 1, "at": now, "box_id": "box-7", "state": "ok", "code": "", "message": "", "hint": "", "since": now,
        "last_success_at": now, "last_attempt_at": now, "received_bytes": 31_000_000, "progress": None, "lines": {},
        "clock": {"system": now, "floor": now, "server": now},
    } | values  # fmt: skip


def tell(box: Box, **values: Any) -> None:
    """Write the status file of the sync agent."""
    assert box.settings.exchange_dir
    (box.settings.exchange_dir / FILE_NAME).write_text(json.dumps(told(**values)))


def journal(box: Box, version: str, state: str, digest: str = "", **values: Any) -> int:
    """An entry of the journal as the worker writes it."""
    defaults = {
        "name": "cxr-pneumonia", "version": version, "digest": digest or f"{version.replace('.', ''):0>64}", "device": "d",
        "source": "library", "origin": "", "state": state, "attempts": 1, "progress": 0.4,
        "reason": None, "self_test": None, "trial": None, "actor": "worker",
        "started_at": utc_now(), "updated_at": utc_now(), "ended_at": None if state in model_queries.OPEN else utc_now(),
    }  # fmt: skip
    with box.store.database.transaction() as tx:
        return Database.insert(tx, "activations", **(defaults | values))


def rules(box: Box, minimum: str, withdrawn: object) -> None:
    """Write the rules of the reference model's line."""
    with box.store.database.transaction() as tx:
        Database.insert(
            tx, "model_lines", name="cxr-pneumonia", minimum_version=minimum, withdrawn=json.dumps(withdrawn), updated_at=utc_now()
        )
