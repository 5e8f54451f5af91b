"""Emergency access ("break-glass", R7): a role without patients sees them for a short time, with a reason, and everybody learns of it.

It ends by itself. The start is a Security Alert of the audit (PS3.15 A.5.3.11, type Emergency Override Started); the status page shows it
until a security administrator has looked at it.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.errors import StoreError
from appliance.core.roles import EMERGENCY_ROLES
from appliance.store import audit
from appliance.store.accounts import Account, Accounts, Actor, audit_change, check_right
from appliance.store.database import Database
from appliance.store.store import Store

MIN_REASON_CHARS: Final = 10
MAX_REASON_CHARS: Final = 200


@dataclass(frozen=True)
class Emergency:
    """One use of the emergency access.

    Attributes:
        id: its number.
        username: who asked for it.
        reason: why, in the person's words.
        began_at: moment (:mod:`appliance.core.moments`).
        remaining_s: seconds that are left; 0 when it has ended.
    """

    id: int
    username: str
    reason: str
    began_at: str
    remaining_s: float


class EmergencyAccesses:
    """The emergency accesses of one box, each for ``emergency_access_s``."""

    def __init__(self, store: Store, accounts: Accounts) -> None:
        self._db = store.database
        self._duration_s = store.settings.emergency_access_s
        self._clock = accounts.clock

    def begin(self, account: Account, reason: str) -> None:
        """Begin an emergency access, or a new one when the last has ended.

        Raises:
            StoreError: ``emergency.reason``: no reason of ``MIN_REASON_CHARS`` characters; ``account.not_allowed``. Nothing was changed.
        """
        reason = " ".join(reason.split())[:MAX_REASON_CHARS]
        if len(reason) < MIN_REASON_CHARS:
            raise StoreError("emergency.reason")
        with self._db.transaction() as tx:
            check_right(tx, account, EMERGENCY_ROLES)
            if self._active(tx, account.id):
                return
            began_at, duration_s = self._clock.now(), self._duration_s
            number = Database.insert(tx, "emergency_accesses", user_id=account.id, reason=reason, began_at=began_at, duration_s=duration_s)
            _audit(tx, account.username, number, audit.EMERGENCY_OVERRIDE_STARTED | {"reason": reason, "duration_s": duration_s})

    def end(self, account: Account) -> None:
        """End the emergency access of an account before its time; nothing happens where there is none."""
        with self._db.transaction() as tx:
            for row in self._active(tx, account.id):
                tx.execute("UPDATE emergency_accesses SET has_ended = 1 WHERE id = ?", (row["id"],))
                _audit(tx, account.username, row["id"], audit.EMERGENCY_OVERRIDE_STOPPED)

    def remaining_s(self, account: Account) -> float:
        """Seconds for which an account sees patients; 0 where it has no emergency access."""
        if account.role not in EMERGENCY_ROLES:
            return 0.0
        with self._db.snapshot() as connection:
            return max((self._remaining(row) for row in self._active(connection, account.id)), default=0.0)

    def open_alarms(self) -> list[Emergency]:
        """The emergency accesses that no security administrator has looked at, the newest first."""
        rows = self._db.query(
            "SELECT e.*, u.username FROM emergency_accesses e JOIN users u ON u.id = e.user_id WHERE e.seen_by = '' ORDER BY e.id DESC"
        )
        return [Emergency(row["id"], row["username"], row["reason"], row["began_at"], self._remaining(row)) for row in rows]

    def acknowledge(self, number: int, actor: Actor) -> None:
        """Take an emergency access off the status page; it must have ended.

        Raises:
            StoreError: ``store.missing``, ``emergency.running`` or ``account.not_allowed``. Nothing was changed.
        """
        with self._db.transaction() as tx:
            check_right(tx, actor)
            row = tx.execute(
                "SELECT e.*, u.username FROM emergency_accesses e JOIN users u ON u.id = e.user_id WHERE e.id = ?", (number,)
            ).fetchone()
            if row is None:
                raise StoreError("store.missing", "emergency access")
            if self._remaining(row):
                raise StoreError("emergency.running")
            who = actor if isinstance(actor, str) else actor.username
            tx.execute("UPDATE emergency_accesses SET seen_by = ? WHERE id = ?", (who, number))
            audit_change(tx, actor, "U", row["username"], changed="emergency access acknowledged", number=number)

    def _active(self, tx: sqlite3.Connection, user_id: int) -> list[sqlite3.Row]:
        rows = tx.execute("SELECT * FROM emergency_accesses WHERE user_id = ? AND has_ended = 0 ORDER BY id DESC LIMIT 1", (user_id,))
        return [row for row in rows if self._remaining(row)]

    def _remaining(self, row: sqlite3.Row) -> float:
        return 0.0 if row["has_ended"] else max(0.0, row["duration_s"] - self._clock.age_s(row["began_at"]))


def _audit(tx: sqlite3.Connection, who: str, number: int, particulars: dict[str, Any]) -> None:
    Database.audit(tx, audit.SECURITY_ALERT, who, "E", f"emergency:{number}", **particulars)
