"""Accounts and their logins: argon2 hashes, lockout after failed attempts, sessions that end on the server (R1-R5).

There is no default account; ``appliance user add`` (or the demo) creates the first one with a one-time password that must be changed at
the first login.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError

from appliance.core.domain import utc_now
from appliance.core.errors import StoreError
from appliance.store import database as db
from appliance.store.database import Database
from appliance.store.store import Store
from model_sync.login_throttle import LOCKOUT_S, MAX_FAILURES_EVERYWHERE, LoginThrottle

Role = Literal["clinician", "technician", "administrator", "auditor"]
MIN_PASSWORD_CHARS: Final = 8
# RFC 9106's second recommended option scaled to a small box: 19 MiB, two passes (the minimum that OWASP recommends).
_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
_UNKNOWN_USER: Final = _HASHER.hash(secrets.token_hex(16))
# Without the letters and digits that people confuse on paper.
_READABLE_CHARS: Final = "abcdefghjkmnpqrstuvwxyz23456789"


@dataclass(frozen=True)
class Account:
    """A person who may log in."""

    id: int
    username: str
    role: str
    must_change: bool


class Accounts:
    """Accounts and sessions in one store.

    Args:
        store: of the box.
        clock: the time in seconds; ``time.time`` by default.
    """

    def __init__(self, store: Store, clock: Callable[[], float] | None = None) -> None:
        self._db = store.database
        self._settings = store.settings
        self._clock = clock or (lambda: time.time())
        self._throttle = LoginThrottle(self._clock)

    def add(self, username: str, role: Role, actor: str) -> str:
        """Create an account, or give an existing one a new one-time password. Returns the password."""
        password = "-".join("".join(secrets.choice(_READABLE_CHARS) for _ in range(4)) for _ in range(3))
        with self._db.transaction() as tx:
            tx.execute(
                "INSERT INTO users (username, password_hash, role, must_change, created_at) VALUES (?, ?, ?, 1, ?)"
                " ON CONFLICT (username) DO UPDATE SET password_hash = excluded.password_hash, must_change = 1,"
                " failures = 0, locked_until = 0",
                (username, _HASHER.hash(password), role, utc_now()),
            )
            tx.execute("DELETE FROM sessions WHERE user_id = (SELECT id FROM users WHERE username = ?)", (username,))
            Database.audit(tx, db.SECURITY_ALERT, actor, "C", f"user:{username}", **db.SECURITY_ATTRIBUTES_CHANGED, role=role)
        return password

    def find(self, username: str) -> Account | None:
        """The account of that name, ignoring case."""
        row = self._db.one("SELECT * FROM users WHERE username = ?", username)
        return _account(row) if row else None

    def login(self, username: str, password: str, peer: str) -> str | None:
        """Check a password; returns a new session token, or None.

        An unknown name, a wrong password and a locked account take the same time and get the same answer (R3). While the machine at
        ``peer`` (an IP address) is blocked for this name, every password counts as wrong.
        """
        row = self._db.one("SELECT * FROM users WHERE username = ?", username)
        is_right = _verify(row["password_hash"] if row else _UNKNOWN_USER, "" if self.is_blocked(username, peer) else password)
        now = self._clock()
        locked = row is not None and row["locked_until"] > now
        if row is None or locked or not is_right:
            self._record_failure(username, peer, known=row is not None, locked=locked)
            return None
        token = secrets.token_urlsafe(32)
        with self._db.transaction() as tx:
            tx.execute("UPDATE users SET failures = 0, locked_until = 0 WHERE id = ?", (row["id"],))
            tx.execute("DELETE FROM sessions WHERE created_at < ?", (now - self._settings.session_absolute_s,))
            tx.execute("INSERT INTO sessions VALUES (?, ?, ?, ?)", (_digest(token), row["id"], now, now))
            Database.audit(tx, db.USER_AUTHENTICATION, row["username"], "E", f"user:{row['id']}", **db.LOGIN, peer=peer)
        self._throttle.clear(username, peer)
        return token

    def is_blocked(self, username: str, peer: str) -> bool:
        """Whether the machine at this address has used up its attempts for this name."""
        return self._throttle.is_blocked(username, self._password_hash(username), peer)

    def record_wrong_password(self, account: Account, peer: str) -> None:
        """Count a wrong old password, entered by a logged-in person who wants a new one."""
        self._record_failure(account.username, peer, known=True, locked=False)

    def _record_failure(self, username: str, peer: str, *, known: bool, locked: bool) -> None:
        """Count a failed attempt for its machine and for the name, and write it to the audit.

        The fiftieth of a name locks it for all machines for 15 minutes. Attempts during a lock do not extend it.
        """
        locked = locked or self.is_blocked(username, peer)
        if known and not locked:
            self._throttle.add_failure(username, self._password_hash(username), peer)
        with self._db.transaction() as tx:
            if known and not locked:
                tx.execute("UPDATE users SET failures = failures + 1 WHERE username = ?", (username,))
                tx.execute(
                    "UPDATE users SET locked_until = ?, failures = 0 WHERE username = ? AND failures >= ?",
                    (self._clock() + LOCKOUT_S, username, MAX_FAILURES_EVERYWHERE),
                )
            who = username[:64] if known else "unknown"
            Database.audit(tx, db.USER_AUTHENTICATION, who, "E", "login", 4, peer=peer, locked=locked, **db.LOGIN)

    def _password_hash(self, username: str) -> str:
        row = self._db.one("SELECT password_hash FROM users WHERE username = ?", username)
        return str(row["password_hash"]) if row else ""

    def resume(self, token: str, *, touch: bool = True) -> Account | None:
        """The account of a session token; None where the session has ended (logout, idle, too old).

        ``touch`` says that a person made the request: a page that refreshes itself must not keep a session open.
        """
        now = self._clock()
        row = self._db.one(
            "SELECT u.*, s.created_at AS session_at, s.seen_at, s.token_sha256 FROM sessions s JOIN users u ON u.id = s.user_id"
            " WHERE s.token_sha256 = ?",
            _digest(token),
        )
        if row is None or now > min(row["seen_at"] + self._settings.session_idle_s, row["session_at"] + self._settings.session_absolute_s):
            return None
        if touch and now - row["seen_at"] > 30:  # one durable write per half minute is enough
            with self._db.transaction() as tx:
                tx.execute("UPDATE sessions SET seen_at = ? WHERE token_sha256 = ?", (now, row["token_sha256"]))
        return _account(row)

    def logout(self, token: str) -> None:
        """End a session on the server."""
        with self._db.transaction() as tx:
            row = tx.execute("DELETE FROM sessions WHERE token_sha256 = ? RETURNING user_id", (_digest(token),)).fetchone()
            if row:
                user = f"user:{row['user_id']}"
                Database.audit(tx, db.USER_AUTHENTICATION, user, "E", user, **db.LOGOUT)

    def change_password(self, account: Account, old: str, new: str) -> None:
        """Set a new password; all other sessions of the account end.

        Raises:
            StoreError: ``account.wrong_password`` or ``account.weak_password``.
        """
        row = self._db.one("SELECT password_hash FROM users WHERE id = ?", account.id)
        if row is None or not _verify(row["password_hash"], old):
            raise StoreError("account.wrong_password")
        if len(new) < MIN_PASSWORD_CHARS or new == old or new.lower() == account.username.lower() or len(set(new)) < 4:
            raise StoreError("account.weak_password")
        with self._db.transaction() as tx:
            tx.execute("UPDATE users SET password_hash = ?, must_change = 0 WHERE id = ?", (_HASHER.hash(new), account.id))
            tx.execute("DELETE FROM sessions WHERE user_id = ?", (account.id,))
            Database.audit(tx, db.SECURITY_ALERT, account.username, "U", f"user:{account.id}", **db.SECURITY_ATTRIBUTES_CHANGED)


def _account(row: sqlite3.Row) -> Account:
    return Account(row["id"], row["username"], row["role"], bool(row["must_change"]))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _verify(password_hash: str, password: str) -> bool:
    try:
        return _HASHER.verify(password_hash, password)
    except (VerifyMismatchError, InvalidHashError):
        return False
