"""The accounts of a box: who has one, with which role and password (R1, R2).

There is no default account: ``appliance user add`` (or the demo) creates the first one with a one-time password, which must be changed at
the first login and expires. Every change is audited in its own transaction and ends the sessions that it concerns.
"""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.domain import utc_now
from appliance.core.errors import StoreError
from appliance.core.moments import Clock
from appliance.core.roles import PASSWORD_HELPERS, Role
from appliance.store import database as db
from appliance.store import passwords
from appliance.store.database import Database
from appliance.store.store import Store

# Words of the command `appliance user`, which would be ambiguous as names.
COMMAND_WORDS: Final = ("list", "add", "role", "disable", "enable", "password", "sessions", "second-factor", "token")
_NAME: Final = re.compile(r"[\w.@-]{1,64}")


@dataclass(frozen=True)
class Account:
    """A person who may log in.

    Attributes:
        must_change: the password is a one-time password, or too old for the profile ``mlps3``.
        is_one_time: the password is a one-time password.
        created_at, last_login_at: ISO 8601 in UTC, and a moment (:mod:`appliance.core.moments`), empty before the first login.
    """

    id: int
    username: str
    role: Role
    must_change: bool
    is_one_time: bool = False
    is_active: bool = True
    has_second_factor: bool = False
    created_at: str = ""
    last_login_at: str = ""


Actor = Account | str
"""Who changes an account: an account on the pages, whose right is checked within the transaction, or the name of a program."""


class Accounts:
    """The accounts in one store.

    Args:
        store: of the box.
        clock: the time.
    """

    def __init__(self, store: Store, clock: Clock | None = None) -> None:
        self._db = store.database
        self._settings = store.settings
        self.clock = clock or Clock()
        self._audit_migrated_roles()

    def add(self, username: str, role: Role | str, actor: Actor) -> str:
        """Create an account; returns its one-time password.

        Raises:
            StoreError: ``account.exists``, ``account.name``, ``account.role`` or ``account.not_allowed``. Nothing was changed.
        """
        username, role = unicodedata.normalize("NFC", username.strip()), _role(role)
        if not _NAME.fullmatch(username) or username.casefold() in COMMAND_WORDS:
            raise StoreError("account.name", username)
        password = passwords.readable_secret()
        password_hash = passwords.hash_password(password)
        with self._db.transaction() as tx:
            check_right(tx, actor)
            if _find(tx, username):
                raise StoreError("account.exists", username)
            Database.insert(
                tx, "users", username=username, password_hash=password_hash, role=role, must_change=1, created_at=utc_now(),
                password_set_at=self.clock.now(),
            )  # fmt: skip
            audit_change(tx, actor, "C", username, role=role)
        return password

    def issue_one_time_password(self, username: str, actor: Actor) -> str:
        """Give an account a new one-time password; its sessions end, its second factor stays. Returns the password.

        Raises:
            StoreError: ``account.unknown`` or ``account.not_allowed``. Nothing was changed.
        """
        password = passwords.readable_secret()
        password_hash = passwords.hash_password(password)
        with self._db.transaction() as tx:
            row = require_row(tx, username)
            check_right(tx, actor, PASSWORD_HELPERS if row["role"] == Role.CLINICIAN else frozenset({Role.SECURITY_ADMINISTRATOR}))
            self._set_password(tx, row, password_hash, must_change=1)
            audit_change(tx, actor, "U", row["username"], changed="one-time password")
        return password

    def set_role(self, username: str, role: Role | str, actor: Actor) -> None:
        """Give an account another role; its sessions end and its API tokens are revoked.

        Raises:
            StoreError: ``account.unknown``, ``account.role``, ``account.last_administrator`` or ``account.not_allowed``; nothing was
                changed.
        """
        role = _role(role)
        with self._db.transaction() as tx:
            check_right(tx, actor)
            row = require_row(tx, username)
            if row["role"] == role:
                return
            had_administrator = _has_administrator(tx)
            tx.execute("UPDATE users SET role = ? WHERE id = ?", (role, row["id"]))
            _keep_an_administrator(tx, had_administrator)
            revoked = _end_access(tx, row["id"])
            audit_change(tx, actor, "U", row["username"], changed="role", role=role, former_role=row["role"], **revoked)

    def set_active(self, username: str, is_active: bool, actor: Actor) -> None:
        """Disable an account, whose sessions end and whose API tokens are revoked, or enable it again.

        Raises:
            StoreError: ``account.unknown``, ``account.last_administrator`` or ``account.not_allowed``. Nothing was changed.
        """
        with self._db.transaction() as tx:
            check_right(tx, actor)
            row = require_row(tx, username)
            if bool(row["is_active"]) == is_active:
                return
            had_administrator = _has_administrator(tx)
            tx.execute("UPDATE users SET is_active = ? WHERE id = ?", (int(is_active), row["id"]))
            _keep_an_administrator(tx, had_administrator)
            revoked = _end_access(tx, row["id"])
            audit_change(tx, actor, "U", row["username"], changed="enabled" if is_active else "disabled", **revoked)

    def end_sessions(self, username: str, actor: Actor, session_id: int | None = None) -> int:
        """End all sessions of an account, or one of them; returns their number.

        Raises:
            StoreError: ``account.unknown`` or ``account.not_allowed``. Nothing was changed.
        """
        with self._db.transaction() as tx:
            check_right(tx, actor)
            row = require_row(tx, username)
            condition, values = ("", (row["id"],)) if session_id is None else (" AND id = ?", (row["id"], session_id))
            count = tx.execute(f"DELETE FROM sessions WHERE user_id = ?{condition}", values).rowcount  # noqa: S608 - constant texts
            if count:
                audit_change(tx, actor, "U", row["username"], changed="sessions ended", count=count)
        return count

    def find(self, username: str) -> Account | None:
        """The account of that name, ignoring case."""
        row = self._db.one("SELECT * FROM users WHERE username = ?", username)
        return self.account(row) if row else None

    def require(self, username: str) -> Account:
        """The account of that name; raises StoreError ``account.unknown`` where there is none."""
        with self._db.snapshot() as connection:
            row = require_row(connection, username)
        return self.account(row)

    def by_id(self, number: int) -> Account:
        """The account of that number; raises StoreError ``store.missing`` where there is none."""
        return self.account(self._db.require("account", "SELECT * FROM users WHERE id = ?", number))

    def all(self) -> list[Account]:
        """Every account, by name."""
        return [self.account(row) for row in self._db.query("SELECT * FROM users ORDER BY username")]

    def is_empty(self) -> bool:
        """Whether nobody has an account yet."""
        return self._db.one("SELECT 1 FROM users LIMIT 1") is None

    def has_security_administrator(self) -> bool:
        """Whether somebody can manage accounts on the pages."""
        with self._db.snapshot() as connection:
            return _has_administrator(connection)

    def change_password(self, account: Account, old: str, new: str) -> None:
        """Set a new password of one's own; all sessions of the account end.

        Raises:
            StoreError: ``account.wrong_password``, or why the new one is refused (:func:`appliance.store.passwords.weakness`).
        """
        row = self._db.one("SELECT * FROM users WHERE id = ?", account.id)
        if row is None or not passwords.verify_password(row["password_hash"], old):
            raise StoreError("account.wrong_password")
        former = [row["password_hash"], *json.loads(row["former_hashes"])]
        code = passwords.weakness(self._settings.password_profile, new, account.username, former)
        if code:
            raise StoreError(code)
        password_hash = passwords.hash_password(new)
        with self._db.transaction() as tx:
            current = require_row(tx, account.username)
            if current["password_hash"] != row["password_hash"]:  # somebody gave a one-time password in between
                raise StoreError("account.wrong_password")
            self._set_password(tx, current, password_hash, must_change=0)
            audit_change(tx, account.username, "U", account.username, changed="password")

    def account(self, row: sqlite3.Row) -> Account:
        """An account from its row of ``users``."""
        age = self.clock.age_s(row["password_set_at"])
        is_old = passwords.is_due(self._settings.password_profile, age)
        is_one_time = bool(row["must_change"])
        return Account(
            row["id"], row["username"], Role(row["role"]), is_one_time or is_old, is_one_time, bool(row["is_active"]),
            row["totp_secret"] is not None, row["created_at"], row["last_login_at"],
        )  # fmt: skip

    def _set_password(self, tx: sqlite3.Connection, row: sqlite3.Row, password_hash: str, *, must_change: int) -> None:
        """Store a new hash, keep the former ones for the rule against reuse, and end the sessions."""
        former = json.loads(row["former_hashes"])
        if not row["must_change"]:
            former = [row["password_hash"], *former][: passwords.HISTORY - 1]
        values = (password_hash, must_change, self.clock.now(), json.dumps(former), row["id"])
        tx.execute("UPDATE users SET password_hash = ?, must_change = ?, password_set_at = ?, former_hashes = ? WHERE id = ?", values)
        tx.execute("DELETE FROM sessions WHERE user_id = ?", (row["id"],))

    def _audit_migrated_roles(self) -> None:
        """Write the changes of role that migration 11 made to the audit, once."""
        if self._db.number("SELECT count(*) FROM users WHERE former_role IS NOT NULL"):
            with self._db.transaction() as tx:
                for row in tx.execute("SELECT id, username, role, former_role FROM users WHERE former_role IS NOT NULL").fetchall():
                    audit_change(tx, "migration", "U", row["username"], changed="role", role=row["role"], former_role=row["former_role"])
                    tx.execute("UPDATE users SET former_role = NULL WHERE id = ?", (row["id"],))


def _end_access(tx: sqlite3.Connection, user_id: int) -> dict[str, Any]:
    """End the sessions of an account and revoke its API tokens; returns the numbers of those tokens, as particulars for the audit."""
    tx.execute("DELETE FROM sessions WHERE user_id = ?", (user_id,))
    revoked = [row["id"] for row in tx.execute("DELETE FROM api_tokens WHERE user_id = ? RETURNING id", (user_id,)).fetchall()]
    return {"tokens_revoked": sorted(revoked)} if revoked else {}


def _role(role: Role | str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise StoreError("account.role", str(role)) from None


def _find(tx: sqlite3.Connection, username: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = tx.execute("SELECT * FROM users WHERE username = ?", (username,)).fetchone()
    return row


def require_row(tx: sqlite3.Connection, username: str) -> sqlite3.Row:
    """The row of an account; raises StoreError ``account.unknown`` where there is none."""
    row = _find(tx, username)
    if row is None:
        raise StoreError("account.unknown", username)
    return row


def check_right(tx: sqlite3.Connection, actor: Actor, roles: frozenset[Role] = frozenset({Role.SECURITY_ADMINISTRATOR})) -> None:
    """Refuse an account that may not do this now, whatever it was allowed when its page was shown."""
    if isinstance(actor, str):
        return
    row = tx.execute("SELECT role, is_active FROM users WHERE id = ?", (actor.id,)).fetchone()
    if row is None or not row["is_active"] or row["role"] not in roles:
        raise StoreError("account.not_allowed")


def _has_administrator(tx: sqlite3.Connection) -> bool:
    role = Role.SECURITY_ADMINISTRATOR
    return tx.execute("SELECT 1 FROM users WHERE role = ? AND is_active = 1 LIMIT 1", (role,)).fetchone() is not None


def _keep_an_administrator(tx: sqlite3.Connection, had_administrator: bool) -> None:
    """Refuse the change, which the caller's transaction then undoes, where nobody could manage the accounts after it."""
    if had_administrator and not _has_administrator(tx):
        raise StoreError("account.last_administrator")


def audit_change(tx: sqlite3.Connection, actor: Actor, action: str, username: str, **detail: Any) -> None:
    """Write a change of an account to the audit, in the caller's transaction."""
    who = actor if isinstance(actor, str) else actor.username
    Database.audit(tx, db.SECURITY_ALERT, who, action, f"user:{username}", **db.SECURITY_ATTRIBUTES_CHANGED, **detail)
