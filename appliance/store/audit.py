"""The audit: append-only entries in a hash chain whose head is sealed, and the search for whatever was changed (R9, R10).

The head (number and digest of the last entry, with a MAC by the audit key) is checked before every entry. Where it does not match, an
entry that says so comes first: the break stays visible until a person acknowledges it. Numbers are never used twice: after a cut the
next entry follows the sealed head, so that a gap remains.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from appliance.core.domain import utc_now
from appliance.core.errors import StoreError
from appliance.store.audit_entries import Entry, read_entries
from appliance.store.audit_reserve import make_room
from model_sync import messages
from model_sync.messages import Language

GENESIS: Final = "0" * 64
# The object of entries about the audit itself.
AUDIT_OBJECT: Final = "audit"
BROKEN: Final = "audit.broken"
UNREADABLE: Final = "audit.entry_unreadable"
KEY_REPLACED: Final = "audit.key_replaced"
_SHOWN_PROBLEMS: Final = 5
_MAX_DIGITS: Final = 15  # no box has more entries; a larger number in a damaged place is none

# Audit events: DICOM PS3.15 A.5.3 (event identifiers) and CID 401 (event types), code value and meaning.
APPLICATION_ACTIVITY: Final = ("110100", "Application Activity")
AUDIT_LOG_USED: Final = ("110101", "Audit Log Used")
INSTANCES_ACCESSED: Final = ("110103", "DICOM Instances Accessed")
INSTANCES_TRANSFERRED: Final = ("110104", "DICOM Instances Transferred")
STUDY_DELETED: Final = ("110105", "DICOM Study Deleted")
DATA_EXPORT: Final = ("110106", "Export")
DATA_IMPORT: Final = ("110107", "Import")
QUERY: Final = ("110112", "Query")
SECURITY_ALERT: Final = ("110113", "Security Alert")
USER_AUTHENTICATION: Final = ("110114", "User Authentication")
# Event types, as particulars of an entry.
LOGIN: Final[dict[str, Any]] = {"type": "110122", "type_meaning": "Login"}
LOGOUT: Final[dict[str, Any]] = {"type": "110123", "type_meaning": "Logout"}
NODE_AUTHENTICATION: Final[dict[str, Any]] = {"type": "110126", "type_meaning": "Node Authentication"}
USE_OF_RESTRICTED_FUNCTION: Final[dict[str, Any]] = {"type": "110132", "type_meaning": "Use of Restricted Function"}
SOFTWARE_CONFIGURATION: Final[dict[str, Any]] = {"type": "110131", "type_meaning": "Software Configuration"}
SECURITY_CONFIGURATION: Final[dict[str, Any]] = {"type": "110129", "type_meaning": "Security Configuration"}
EMERGENCY_OVERRIDE_STARTED: Final[dict[str, Any]] = {"type": "110127", "type_meaning": "Emergency Override Started"}
EMERGENCY_OVERRIDE_STOPPED: Final[dict[str, Any]] = {"type": "110138", "type_meaning": "Emergency Override Stopped"}
SECURITY_ATTRIBUTES_CHANGED: Final[dict[str, Any]] = {"type": "110137", "type_meaning": "User security Attributes Changed"}
# Entries of these events are written on a full disk too: from the space that is reserved for them.
_RESERVED_EVENTS: Final = frozenset({SECURITY_ALERT, USER_AUTHENTICATION, AUDIT_LOG_USED})


class Head(NamedTuple):
    """The last entry of the chain, or (0, zeros) before the first one."""

    seq: int
    digest: str

    def __str__(self) -> str:
        return f"{self.seq} {self.digest}"


@dataclass(frozen=True)
class Problem:
    """Something that was changed or removed.

    Attributes:
        identity: 32 hex digits that name this very state: another change of the same entry is another problem.
        code: what it is, for the security administrator; its text is in :mod:`appliance.messages`, with places for ``values``.
    """

    identity: str
    code: str
    values: Mapping[str, object]

    @property
    def text(self) -> str:
        """What it is, in English."""
        return self.describe("en")

    def describe(self, language: Language) -> str:
        """What it is."""
        return messages.text(self.code, language, **self.values)


@dataclass(frozen=True)
class Inspection:
    """The result of :func:`inspect`: the number of entries, the head of the chain, and what nobody has acknowledged yet."""

    entries: int
    head: Head
    problems: list[Problem]


def seal(key: bytes, text: str) -> str:
    """A text with its MAC by the audit key."""
    return f"{text} {hmac.new(key, text.encode(), 'sha256').hexdigest()}"


def chain(previous: str, entry: str) -> str:
    """The digest of an entry: SHA-256 over the previous digest and the canonical JSON of the entry."""
    return hashlib.sha256(f"{previous}\n{entry}".encode()).hexdigest()


def prepare(connection: sqlite3.Connection, key: bytes, data_dir: Path, highest: Callable[[], int]) -> None:
    """Give a new connection the functions that :func:`append` needs.

    ``highest`` returns the highest number of an entry that is known outside the database.

    They reference no Database: SQLite would keep it, and so the connection would never be closed.
    """
    connection.create_function("audit_seal", 1, partial(seal, key), deterministic=True)
    connection.create_function("audit_make_room", 0, partial(make_room, data_dir))
    connection.create_function("audit_highest", 0, highest)


def require_key(connection: sqlite3.Connection) -> None:
    """Raise StoreError ``key.wrong`` where the key of this connection is not the one that the database was sealed with."""
    row = connection.execute("SELECT value = audit_seal('key') AS matches FROM meta WHERE key = 'audit_key_check'").fetchone()
    if row is None or not row["matches"]:
        raise StoreError("key.wrong", "audit.key")


def append(connection: sqlite3.Connection, event: tuple[str, str], actor: str, action: str, obj: str, outcome: int, **detail: Any) -> None:
    """Append one entry, inside the caller's transaction; see ``Database.audit`` for the arguments."""
    if event in _RESERVED_EVENTS:
        connection.execute("SELECT audit_make_room()")
    end, sealed = _end(connection), _sealed_head(connection)
    if sealed != end:
        alert = {"code": BROKEN, "found": str(end), "sealed": str(sealed) if sealed else ""}
        end = _insert(connection, end, _number_after_break(connection), SECURITY_ALERT, "audit", "E", AUDIT_OBJECT, 12, alert)
    _insert(connection, end, end.seq + 1, event, actor, action, obj, outcome, detail)


def _insert(
    connection: sqlite3.Connection, end: Head, seq: int, event: tuple[str, str], actor: str, action: str, obj: str, outcome: int,
    detail: dict[str, Any],
) -> Head:  # fmt: skip
    fields = {"seq": seq, "at": utc_now(), "event": event[0], "meaning": event[1], "actor": actor, "action": action, "object": obj}
    entry = json.dumps(fields | {"outcome": outcome, "detail": detail}, ensure_ascii=False, sort_keys=True)
    head = Head(seq, chain(end.digest, entry))
    connection.execute("INSERT INTO audit VALUES (?, ?, ?)", (seq, entry, head.digest))
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('audit_head', audit_seal(?))", (str(head),))
    return head


def _end(connection: sqlite3.Connection) -> Head:
    """The last entry that the table has."""
    last = next(read_entries(connection, "ORDER BY seq DESC LIMIT 1"), None)
    return Head(last.seq, last.digest) if last else Head(0, GENESIS)


def _sealed_head(connection: sqlite3.Connection) -> Head | None:
    """The sealed head; None where there is none or its MAC is wrong."""
    text = unseal(connection, "audit_head")
    seq, _, digest = text.partition(" ")
    return Head(int(seq), digest) if text else None


def _number_after_break(connection: sqlite3.Connection) -> int:
    """The number of the entry about a break: after the last entry, and after every other number that is known, with a right MAC or not."""
    sealed = _stored(connection, "audit_head").partition(" ")[0]
    known = int(sealed) if sealed.isascii() and sealed.isdigit() and len(sealed) <= _MAX_DIGITS else 0
    return max(_end(connection).seq, known, int(connection.execute("SELECT audit_highest()").fetchone()[0])) + 1


def unseal(connection: sqlite3.Connection, name: str) -> str:
    """The text that is stored sealed under a name in ``meta``; an empty one where there is none or its MAC is wrong."""
    value = _stored(connection, name)
    text = value.rpartition(" ")[0]
    is_whole = text and connection.execute("SELECT audit_seal(?)", (text,)).fetchone()[0] == value
    return text if is_whole else ""


def _stored(connection: sqlite3.Connection, name: str) -> str:
    row = connection.execute("SELECT CAST(value AS BLOB) AS value FROM meta WHERE key = ?", (name,)).fetchone()
    return row["value"].decode(errors="replace") if row else ""


def inspect(connection: sqlite3.Connection, anchored: Iterable[Head] = (), others: Iterable[Problem] = ()) -> Inspection:
    """Search the whole chain for changes, inside one transaction of the caller: a running box writes meanwhile.

    Args:
        connection: with an open transaction, so that chain and head are of the same moment.
        anchored: heads that were kept in another place before this transaction began.
        others: problems that were found in another place, and may be acknowledged in this chain.
    """
    marks: dict[int, set[str]] = {}
    for head in anchored:
        marks.setdefault(head.seq, set()).add(head.digest)
    problems, acknowledged = list(others), set()
    end, entries = Head(0, GENESIS), 0
    for entry in read_entries(connection):
        seq, text, digest = entry
        if seq != end.seq + 1:
            problems.append(problem("audit.entries_missing", digest, first=end.seq + 1, last=seq - 1))
        if digest != chain(end.digest, text):
            problems.append(problem("audit.entry_changed", digest, text, seq=seq))
        elif (fields := entry.fields()) is None:
            problems.append(problem(UNREADABLE, digest, seq=seq))
        elif fields["object"] == AUDIT_OBJECT:
            acknowledged |= set(fields["detail"].get("acknowledged", ()))
            problems.extend(_recorded_break(fields, digest))
        for mark in sorted(marks.pop(seq, set()) - {digest}):
            problems.append(problem("audit.entry_differs", mark, seq=seq))
        end, entries = Head(seq, digest), entries + 1
    if _sealed_head(connection) != end:
        problems.append(problem("audit.end_changed", end.digest, seq=end.seq))
    problems.extend(problem("audit.anchored_entry_missing", *sorted(marks[seq]), seq=seq) for seq in sorted(marks) if seq)
    return Inspection(entries, end, [item for item in problems if item.identity not in acknowledged])


def problem(kind: str, *state: str, **values: object) -> Problem:
    """A problem, named by its English text, which therefore must never change, and by what was found in this place.

    Args:
        kind: its code.
        *state: what was found.
        **values: what the text of the code has places for.
    """
    text = messages.text(kind, "en", **values)
    return Problem(hashlib.sha256("\n".join((text, *state)).encode()).hexdigest()[:32], kind, values)


def _recorded_break(fields: dict[str, Any], digest: str) -> Iterator[Problem]:
    """The problem that an entry of :func:`append` or of :func:`record_new_key` records."""
    if fields["detail"].get("code") in (BROKEN, KEY_REPLACED):
        values = {"seq": fields["seq"], "at": fields["at"], "code": fields["detail"]["code"]}
        yield problem("audit.break_recorded", digest, **values)


def require_whole(found: Inspection) -> None:
    """Raise StoreError ``audit.broken``, which names the first problems."""
    if found.problems:
        more = len(found.problems) - _SHOWN_PROBLEMS
        texts = [problem.text for problem in found.problems[:_SHOWN_PROBLEMS]] + ([f"{more} more"] if more > 0 else [])
        raise StoreError(BROKEN, "; ".join(texts))


def acknowledge(
    connection: sqlite3.Connection, actor: str, reason: str, anchored: Iterable[Head], others: Iterable[Problem]
) -> list[Problem]:
    """Record in the open transaction that a person has seen every problem that there is; returns them. They stay in the audit."""
    append(connection, AUDIT_LOG_USED, actor, "R", AUDIT_OBJECT, 0, purpose="acknowledge")  # records the break of an unchecked end first
    problems = inspect(connection, anchored, others).problems
    if problems:
        detail = {"acknowledged": [item.identity for item in problems], "reason": reason}
        append(connection, SECURITY_ALERT, actor, "U", AUDIT_OBJECT, 4, **detail, **SECURITY_CONFIGURATION)
    return problems


def record_break(connection: sqlite3.Connection, found: str, sealed: str) -> None:
    """Append an entry about a break that was found outside the chain, inside the caller's transaction."""
    append(connection, SECURITY_ALERT, "audit", "E", AUDIT_OBJECT, 12, code=BROKEN, found=found, sealed=sealed)


def record_new_key(connection: sqlite3.Connection, actor: str, reason: str) -> None:
    """Seal the chain with the key of this connection, which replaces a lost one; the entry about it is a break until acknowledged."""
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('audit_key_check', audit_seal('key'))")
    end, number = _end(connection), _number_after_break(connection)
    alert = {"code": KEY_REPLACED, "reason": reason, "found": str(end)}
    _insert(connection, end, number, SECURITY_ALERT, actor, "U", AUDIT_OBJECT, 12, alert | SECURITY_CONFIGURATION)


def last_key_replacement(connection: sqlite3.Connection) -> int:
    """The number of the last entry about a replaced key; 0 where there is none."""
    text = f'%"code": "{KEY_REPLACED}"%'  # inside a value its quotation marks would be escaped
    return int(connection.execute("SELECT coalesce(max(seq), 0) FROM audit WHERE entry LIKE ?", (text,)).fetchone()[0])


def head(connection: sqlite3.Connection) -> Head:
    """The last entry of the chain."""
    return _end(connection)


def digest_at(connection: sqlite3.Connection, seq: int) -> str:
    """The digest of one entry; an empty text where there is none."""
    entry = next(read_entries(connection, "WHERE seq = ?", seq), None)
    return entry.digest if entry else ""


def fields_of(entry: Entry) -> dict[str, Any]:
    """The fields of an entry; for a damaged one those of a security alert that says so."""
    alert = {
        "seq": entry.seq, "at": utc_now(), "event": SECURITY_ALERT[0], "meaning": SECURITY_ALERT[1], "actor": "audit", "action": "E",
        "object": AUDIT_OBJECT, "outcome": 12, "detail": {"code": UNREADABLE, "entry": entry.seq},
    }  # fmt: skip
    return entry.fields() or alert
