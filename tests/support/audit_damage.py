"""Damaged entries of the audit: what somebody who has the disk and the keys, or a failing disk, can make of a row."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from tests.support.box_database import raw_connection


def _changed(number: int, **values: Any) -> str:
    """An entry that is whole but for these fields; None removes one."""
    fields: dict[str, Any] = {
        "seq": number, "at": "2026-01-01T00:00:00.000+00:00", "event": "110100", "meaning": "Application Activity", "actor": "t",
        "action": "E", "object": "x:1", "outcome": 0, "detail": {},
    }  # fmt: skip
    return json.dumps({name: value for name, value in (fields | values).items() if value is not None}, sort_keys=True)


FIRST: Final = 2
# What is wrong with entry 2 and those after it.
DAMAGES: Final[tuple[str | bytes | dict[str, Any], ...]] = (
    "no JSON", "", b'{"at": "\xff\xfe', _changed(6)[:-30], "[]", "[" * 200_000, {"at": None}, {"at": "2026-13-01T00:00:00.000+00:00"},
    {"at": 12}, {"at": "2026-01-01T00:00:00.000"}, {"detail": None}, {"detail": [1]}, {"outcome": "bad"}, {"outcome": True},
    {"actor": {"a": 1}}, {"actor": "\ud800"}, {"detail": {"type": "110122"}}, {"detail": {"type": 1, "type_meaning": "x"}},
    {"detail": {"studies": ["x"]}}, {"detail": {"studies": [2**70]}}, {"detail": {"studies": 7}},
    {"object": "audit", "detail": {"acknowledged": [{}]}}, {"seq": 1},
)  # fmt: skip
LAST: Final = FIRST + len(DAMAGES) - 1


def damage_entries(data_dir: Path) -> None:
    """Replace the texts of the entries FIRST to LAST."""
    with closing(raw_connection(data_dir)) as raw:
        raw.execute("DROP TRIGGER IF EXISTS audit_no_update")
        for seq, wrong in enumerate(DAMAGES, FIRST):
            text = _changed(seq, **wrong) if isinstance(wrong, dict) else wrong
            raw.execute("UPDATE audit SET entry = CAST(? AS TEXT) WHERE seq = ?", (text if isinstance(text, bytes) else text.encode(), seq))
