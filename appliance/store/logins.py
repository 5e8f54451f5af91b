"""Logins and the sessions that they begin: limits for guessing, sessions that end on the server (R3, R5)."""

from __future__ import annotations

import hashlib
import math
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.errors import StoreError
from appliance.store import database as db
from appliance.store import passwords
from appliance.store.accounts import Account, Accounts
from appliance.store.database import Database
from appliance.store.second_factor import SecondFactors
from appliance.store.store import Store
from model_sync.login_throttle import MAX_FAILURES, FailureRows, LoginQueue, LoginThrottle, TooManyAttemptsError, machine_of

__all__ = ["Logins", "Session", "TooManyAttemptsError"]
_TOUCH_S: Final = 30.0
# From the right password to the code of the second factor.
_CODE_S: Final = 300.0


@dataclass(frozen=True)
class Session:
    """A login of an account.

    Attributes:
        id: its number, for lists.
        account: who logged in.
        confirmed_s: seconds since the password was last typed.
        needs_code: the password was right, the code of the second factor is still outstanding.
        created_at, seen_at: moments (:mod:`appliance.core.moments`) of the login and of the last request that a person made.
        peer: address it was begun from.
    """

    id: int
    account: Account
    confirmed_s: float
    needs_code: bool
    created_at: str
    seen_at: str
    peer: str


class Logins:
    """Checks passwords and codes, and keeps the sessions of one store; used by several threads.

    Attributes:
        second_factors: of the accounts.
        throttle: how often a password may be tried.
        queue: whose turn it is to try one.
    """

    def __init__(self, store: Store, accounts: Accounts) -> None:
        self._db = store.database
        self._settings = store.settings
        self._accounts = accounts
        self._clock = accounts.clock
        self.second_factors = SecondFactors(store, accounts)
        self.throttle = LoginThrottle(self._clock.uptime_s)
        self.queue = LoginQueue(self.throttle)
        self._rows = FailureRows(self._clock.uptime_s)

    def login(self, username: str, password: str, peer: str) -> str | None:
        """Check a password; returns a new session token, or None.

        An unknown name, a wrong or expired password, a disabled account and a locked name take the same time and get the same answer
        (R3). While the machine at ``peer`` (an IP address) is blocked for this name, every password counts as wrong.
        """
        row = self._db.one("SELECT * FROM users WHERE username = ?", username)
        is_blocked = self.throttle.is_blocked(username, row["password_hash"] if row else "", peer)
        is_right = passwords.verify_password(row["password_hash"] if row else passwords.UNKNOWN_HASH, password)
        if row is None or not is_right or is_blocked or not row["is_active"] or self._is_expired(row):
            self._record_failure(username, row, peer, is_blocked=is_blocked)
            return None
        if row["totp_secret"] is None:
            self.throttle.clear(username, peer)
        return self._begin(row, peer, needs_code=row["totp_secret"] is not None)

    def begin_again(self, session: Session) -> str | None:
        """Begin a new session for a person who has just proved who it is, when all sessions ended with the old password."""
        row = self._db.require("account", "SELECT * FROM users WHERE id = ?", session.account.id)
        if row["totp_secret"] is not None and not session.account.has_second_factor:  # set up since, by somebody else
            return None
        return self._begin(row, session.peer, needs_code=False)

    def complete(self, session: Session, token: str, code: str) -> bool:
        """Complete a login by the code of the second factor; a wrong one counts like a wrong password."""
        account = session.account
        row = self._db.require("account", "SELECT * FROM users WHERE id = ?", account.id)
        is_blocked = self.throttle.is_blocked(account.username, row["password_hash"], session.peer)
        kind = "" if is_blocked else self.second_factors.take(account, code)
        if not kind:
            self._record_failure(account.username, row, session.peer, is_blocked=is_blocked)
            return False
        self.throttle.clear(account.username, session.peer)
        now = self._clock.now()
        with self._db.transaction() as tx:
            changed = tx.execute("UPDATE sessions SET needs_code = 0 WHERE token_sha256 = ?", (_digest(token),)).rowcount
            tx.execute("UPDATE users SET last_login_at = ? WHERE id = ?", (now, account.id))
            self._audit_login(tx, account.username, account.id, session.peer, kind)
        return changed == 1

    def confirm(self, session: Session, token: str, password: str, code: str) -> bool:
        """Check password, and second factor where there is one, again, before what is dangerous (R8).

        Wrong ones count for this session, and the fifth ends it: who sits at an open session cannot lock its owner out of the login.
        """
        account = session.account
        row = self._db.require("account", "SELECT * FROM users WHERE id = ?", account.id)
        try:
            with self._attempt(session):
                is_right = passwords.verify_password(row["password_hash"], password)
                if not is_right or (account.has_second_factor and not self.second_factors.take(account, code)):
                    raise StoreError("account.wrong_password")
        except StoreError as refusal:
            if refusal.code != "account.wrong_password":
                raise
            return False
        with self._db.transaction() as tx:
            values = (self._clock.now(), _digest(token))
            return tx.execute("UPDATE sessions SET confirmed_at = ? WHERE token_sha256 = ?", values).rowcount == 1

    def change_password(self, session: Session, old: str, new: str) -> None:
        """Set a new password of one's own, as :meth:`Accounts.change_password`; wrong present ones count as in :meth:`confirm`."""
        with self._attempt(session):
            self._accounts.change_password(session.account, old, new)

    def resume(self, token: str, *, touch: bool = True) -> Session | None:
        """The session of a token; None where it has ended (logout, idle, too old, account disabled).

        ``touch`` says that a person made the request: a page that refreshes itself must not keep a session open.
        """
        row = self._db.one(f"{_SESSIONS} WHERE s.token_sha256 = ?", _digest(token))
        if row is None or not self._is_alive(row):
            return None
        if touch and self._clock.age_s(row["seen_at"]) > _TOUCH_S:  # one durable write per half minute is enough
            with self._db.transaction() as tx:
                tx.execute("UPDATE sessions SET seen_at = ? WHERE id = ?", (self._clock.now(), row["session_id"]))
        return self._session(row)

    def logout(self, token: str) -> None:
        """End a session on the server."""
        with self._db.transaction() as tx:
            row = tx.execute("DELETE FROM sessions WHERE token_sha256 = ? RETURNING user_id", (_digest(token),)).fetchone()
            if row:
                user = f"user:{row['user_id']}"
                Database.audit(tx, db.USER_AUTHENTICATION, user, "E", user, **db.LOGOUT)

    def sessions(self, account: Account | None = None) -> list[Session]:
        """The sessions that have not ended, of one account or of all; the newest first."""
        rows = self._db.query(f"{_SESSIONS} ORDER BY s.id DESC")
        return [self._session(row) for row in rows if self._is_alive(row) and (account is None or row["id"] == account.id)]

    def _begin(self, row: sqlite3.Row, peer: str, *, needs_code: bool) -> str | None:
        token, now = secrets.token_urlsafe(32), self._clock.now()
        with self._db.transaction() as tx:
            current = tx.execute("SELECT password_hash, totp_secret, is_active FROM users WHERE id = ?", (row["id"],)).fetchone()
            # Changed, or disabled, while the password was being checked.
            if tuple(current) != (row["password_hash"], row["totp_secret"], 1):
                return None
            if self._clock.age_s(row["password_set_at"]) == math.inf:  # set under another clock: its age counts from now
                tx.execute("UPDATE users SET password_set_at = ? WHERE id = ?", (now, row["id"]))
            for session in tx.execute(_SESSIONS).fetchall():
                if not self._is_alive(session):
                    tx.execute("DELETE FROM sessions WHERE id = ?", (session["session_id"],))
            values = {"token_sha256": _digest(token), "user_id": row["id"], "created_at": now, "seen_at": now, "confirmed_at": now}
            Database.insert(tx, "sessions", **values, needs_code=int(needs_code), peer=peer)
            if not needs_code:
                tx.execute("UPDATE users SET last_login_at = ? WHERE id = ?", (now, row["id"]))
                self._audit_login(tx, row["username"], row["id"], peer, "password")
        return token

    def _audit_login(self, tx: sqlite3.Connection, username: str, user_id: int, peer: str, kind: str) -> None:
        Database.audit(tx, db.USER_AUTHENTICATION, username, "E", f"user:{user_id}", **db.LOGIN, peer=peer, proved_by=kind)

    def _is_expired(self, row: sqlite3.Row) -> bool:
        """Whether the password is a one-time password whose time is over."""
        return bool(row["must_change"]) and self._clock.age_s(row["password_set_at"]) > self._settings.one_time_password_s

    def _is_alive(self, row: sqlite3.Row) -> bool:
        is_idle = self._clock.age_s(row["seen_at"]) > self._settings.session_idle_s
        limit_s = _CODE_S if row["needs_code"] else self._settings.session_absolute_s
        is_old = self._clock.age_s(row["session_at"]) > limit_s
        return bool(row["is_active"]) and not is_idle and not is_old

    def _session(self, row: sqlite3.Row) -> Session:
        confirmed_s = self._clock.age_s(row["confirmed_at"])
        account = self._accounts.account(row)
        return Session(row["session_id"], account, confirmed_s, bool(row["needs_code"]), row["session_at"], row["seen_at"], row["peer"])

    def _record_failure(self, username: str, row: sqlite3.Row | None, peer: str, *, is_blocked: bool) -> None:
        """Count a failed attempt for its machine and for the name, and audit it. An attempt during a lock does not extend it."""
        if not is_blocked:
            self.throttle.add_failure(username, row["password_hash"] if row else "", peer)
        self._audit_failure(row["username"] if row else "unknown", peer, locked=is_blocked)

    def _audit_failure(self, who: str, peer: str, **particulars: Any) -> None:
        attempts = self._rows.take(machine_of(peer))
        if attempts:
            with self._db.transaction() as tx:
                particulars |= {"peer": peer} | ({"attempts": attempts} if attempts > 1 else {})
                Database.audit(tx, db.USER_AUTHENTICATION, who, "E", "login", 4, **particulars, **db.LOGIN)

    @contextmanager
    def _attempt(self, session: Session) -> Iterator[None]:
        """One try at the secrets of an account from within its session; the fifth wrong one in a row ends the session.

        It is counted before it is checked, so that tries at the same moment count too.
        """
        with self._db.transaction() as tx:
            row = tx.execute(_COUNT_ATTEMPT, (session.id, MAX_FAILURES)).fetchone()
        if row is None:
            raise StoreError("account.wrong_password")
        try:
            yield
        except StoreError as refusal:
            if refusal.code == "account.wrong_password":
                self._fail(session, row["wrong_secrets"])
                raise
            self._forget_attempts(session)
            raise
        self._forget_attempts(session)

    def _fail(self, session: Session, count: int) -> None:
        username, peer = session.account.username, session.peer
        self._audit_failure(username, peer, session=session.id)
        if count >= MAX_FAILURES:
            with self._db.transaction() as tx:
                tx.execute("DELETE FROM sessions WHERE id = ?", (session.id,))
                particulars = {"peer": peer, "session": session.id, "code": "account.session_ended"}
                Database.audit(tx, db.USER_AUTHENTICATION, username, "E", f"user:{username}", 4, **particulars, **db.LOGOUT)

    def _forget_attempts(self, session: Session) -> None:
        with self._db.transaction() as tx:
            tx.execute("UPDATE sessions SET wrong_secrets = 0 WHERE id = ?", (session.id,))


_SESSIONS: Final = (
    "SELECT u.*, s.id AS session_id, s.created_at AS session_at, s.seen_at, s.confirmed_at, s.needs_code, s.peer"
    " FROM sessions s JOIN users u ON u.id = s.user_id"
)


_COUNT_ATTEMPT: Final = "UPDATE sessions SET wrong_secrets = wrong_secrets + 1 WHERE id = ? AND wrong_secrets < ? RETURNING wrong_secrets"


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
