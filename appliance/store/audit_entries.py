"""Entries of the audit as they are read: whatever somebody did to the bytes of one, the others can still be shown, sent and searched."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final, NamedTuple

# The fields that every entry has, and those particulars that are more than text to be shown.
_KINDS: Final = {
    "seq": int, "at": str, "event": str, "meaning": str, "actor": str, "action": str, "object": str, "outcome": int, "detail": dict,
}  # fmt: skip
_TEXTS: Final = frozenset({"type", "type_meaning"})
# ``acknowledged`` is a list of problems of the audit, or the code of one alarm.
_LISTS: Final = {"studies": int, "acknowledged": str}
_TIME: Final = re.compile(r"(?:19|2\d)\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", re.ASCII)
_MAX_INTEGER: Final = 2**63 - 1  # of SQLite


class Entry(NamedTuple):
    """One row of the audit; bytes that are no UTF-8 are replacement characters (U+FFFD) in its texts."""

    seq: int
    text: str
    digest: str

    def fields(self) -> dict[str, Any] | None:
        """What ``audit.append`` wrote; None where the text is damaged: it does not parse, or a field is missing or of another type."""
        try:
            fields = json.loads(self.text)
            if not isinstance(fields, dict) or any(type(fields.get(name)) is not kind for name, kind in _KINDS.items()):
                return None
            datetime.fromisoformat(fields["at"])
            if "\\u" in self.text:  # half of a surrogate pair, which UTF-8 cannot carry
                json.dumps(fields, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            return None
        is_whole = fields["seq"] == self.seq and _TIME.fullmatch(fields["at"]) and _has_valid_particulars(fields["detail"])
        return fields if is_whole else None


def read_entries(connection: sqlite3.Connection, clause: str = "ORDER BY seq", *values: int) -> Iterator[Entry]:
    """Read entries of the audit.

    Args:
        connection: of a box; the caller converts its errors.
        clause: what follows the name of the table, of this program's code only.
        *values: bound to its places.
    """
    # As bytes: SQLite's own conversion raises an error where a text is no UTF-8.
    statement = f"SELECT seq, CAST(entry AS BLOB) AS entry, CAST(digest AS BLOB) AS digest FROM audit {clause}"  # noqa: S608
    for row in connection.execute(statement, values):
        yield Entry(row["seq"], row["entry"].decode(errors="replace"), row["digest"].decode(errors="replace"))


def _has_valid_particulars(detail: dict[str, Any]) -> bool:
    texts = all(isinstance(detail[name], str) for name in _TEXTS if name in detail) and len(_TEXTS & detail.keys()) != 1
    lists = all(
        isinstance(detail[name], list) and all(type(item) is kind for item in detail[name])
        for name, kind in _LISTS.items()
        if name in detail and not (name == "acknowledged" and isinstance(detail[name], str))
    )
    return texts and lists and all(0 <= number <= _MAX_INTEGER for number in detail.get("studies", ()))
