"""API tokens: what a program presents instead of a login, for few endpoints and a limited time.

The security administrator makes a token for the account of a clinician; it is shown once, and only its hash is stored. A program with it
may do what its scopes open and its account may, never more. It ends after its days, by a revocation, when the account is disabled and when
the role changes. A token that a second machine uses has probably been copied: that is a Security Alert of the audit, and the page of the
account shows it.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.errors import StoreError
from appliance.core.roles import TOKEN_ROLES, Scope
from appliance.store import audit
from appliance.store.accounts import Account, Accounts, Actor, audit_change, check_right, require_row
from appliance.store.database import Database
from appliance.store.store import Store
from model_sync.login_throttle import LoginQueue, LoginThrottle, machine_of

MAX_DAYS: Final = 365
USUAL_DAYS: Final = 90
SECOND_ADDRESS: Final = "account.token_second_address"
_PREFIX: Final = "cbx_"  # so that a program that searches files for secrets finds it
_DAY_S: Final = 24 * 3600.0
_TOUCH_S: Final = 30.0
# Machines that are remembered of one token; one that was forgotten counts as new.
_MAX_ADDRESSES: Final = 20


@dataclass(frozen=True)
class ApiToken:
    """A token, without the secret.

    Attributes:
        id: its number.
        account: in whose name the program acts.
        scopes: what it may do.
        created_at, last_used_at: moments (:mod:`appliance.core.moments`); the latter is empty before the first use.
        created_by: the account or program that made it.
        remaining_s: seconds that are left; 0 when it has expired.
        addresses: machines that used it, the latest first.
    """

    id: int
    account: Account
    scopes: frozenset[Scope]
    created_at: str
    created_by: str
    last_used_at: str
    remaining_s: float
    addresses: tuple[str, ...] = ()


class ApiTokens:
    """The API tokens of one box; used by several threads.

    Attributes:
        throttle: how often a machine may present tokens that are not valid.
    """

    def __init__(self, store: Store, accounts: Accounts) -> None:
        self._db = store.database
        self._accounts = accounts
        self._clock = accounts.clock
        self.throttle = LoginThrottle(self._clock.uptime_s)
        self._queue = LoginQueue(self.throttle)

    def issue(self, username: str, scopes: Collection[str], days: int, actor: Actor) -> str:
        """Make a token for an account; returns it, which nobody can do later.

        Args:
            username: of the account.
            scopes: what the program may do (:class:`appliance.core.roles.Scope`).
            days: 1 to ``MAX_DAYS``.
            actor: who makes it.

        Raises:
            StoreError: ``account.unknown``, ``account.disabled``, ``account.scope``, ``account.token_days`` or ``account.not_allowed``.
                Nothing was changed.
        """
        wanted = _scopes(scopes)
        if isinstance(days, bool) or not 1 <= days <= MAX_DAYS:
            raise StoreError("account.token_days", str(days))
        token = _PREFIX + secrets.token_urlsafe(32)
        with self._db.transaction() as tx:
            check_right(tx, actor)
            row = require_row(tx, username)
            if not row["is_active"]:
                raise StoreError("account.disabled", username)
            if row["role"] not in TOKEN_ROLES:
                raise StoreError("account.scope", row["role"])
            who = actor if isinstance(actor, str) else actor.username
            number = Database.insert(
                tx, "api_tokens", token_sha256=_digest(token), user_id=row["id"], scopes=json.dumps(wanted), created_at=self._clock.now(),
                created_by=who, lifetime_s=days * _DAY_S,
            )  # fmt: skip
            audit_change(tx, actor, "U", row["username"], changed="token made", token=number, scopes=wanted, days=days)
        return token

    def revoke(self, number: int, actor: Actor) -> str:
        """Revoke a token; returns the name of its account.

        Raises:
            StoreError: ``account.token_unknown`` or ``account.not_allowed``. Nothing was changed.
        """
        with self._db.transaction() as tx:
            check_right(tx, actor)
            row = tx.execute("SELECT u.username FROM api_tokens t JOIN users u ON u.id = t.user_id WHERE t.id = ?", (number,)).fetchone()
            if row is None:
                raise StoreError("account.token_unknown", str(number))
            tx.execute("DELETE FROM api_tokens WHERE id = ?", (number,))
            audit_change(tx, actor, "U", row["username"], changed="token revoked", token=number)
        return str(row["username"])

    def all(self, account: Account | None = None) -> list[ApiToken]:
        """The tokens of one account or of all, the newest first; those that have expired stay until they are revoked."""
        self._end_expired()
        rows = self._db.query(f"{_TOKENS} ORDER BY t.id DESC")
        return [self._token(row) for row in rows if account is None or row["id"] == account.id]

    def present(self, token: str, peer: str) -> ApiToken | None:
        """Use a token in its turn: a machine that presents many that are not valid is slowed, but not for a token that it has used before.

        Raises:
            TooManyAttemptsError: too many wait already. Nothing was checked.
        """
        if self.throttle.is_familiar(_digest(token), peer):
            return self.use(token, peer)
        with self._queue.turn(_digest(token), peer):
            return self.use(token, peer)

    def use(self, token: str, peer: str) -> ApiToken | None:
        """The token that a program presents from the IP address ``peer``; None where it is not valid, for whatever reason.

        The use is recorded, and the first one of each further machine is a Security Alert.
        """
        self._end_expired()
        row = self._db.one(f"{_TOKENS} WHERE t.token_sha256 = ?", _digest(token))
        if row is None or not row["is_active"] or not self._remaining_s(row):
            self.throttle.add_failure(_digest(token), "", peer)
            return None
        self._record_use(row, peer)
        self.throttle.clear(_digest(token), peer)
        return self._token(row)

    def _record_use(self, row: sqlite3.Row, peer: str) -> None:
        number, machine, now = row["token_id"], machine_of(peer), self._clock.now()
        seen = self._db.one("SELECT last_used_at FROM api_token_addresses WHERE token_id = ? AND address = ?", number, machine)
        if seen is not None and self._clock.age_s(seen["last_used_at"]) <= _TOUCH_S:  # one durable write per half minute is enough
            return
        with self._db.transaction() as tx:
            if not tx.execute("UPDATE api_tokens SET last_used_at = ? WHERE id = ?", (now, number)).rowcount:
                return  # revoked in between: this request was the last
            known = [item["address"] for item in tx.execute(_ADDRESSES, (number,)).fetchall()]
            tx.execute("INSERT OR REPLACE INTO api_token_addresses VALUES (?, ?, ?)", (number, machine, now))
            if machine in known:
                return
            for address in known[_MAX_ADDRESSES - 1 :]:
                tx.execute("DELETE FROM api_token_addresses WHERE token_id = ? AND address = ?", (number, address))
            if known:
                others = known[: _MAX_ADDRESSES - 1]
                particulars: dict[str, Any] = {"code": SECOND_ADDRESS, "peer": peer, "others": others} | audit.NODE_AUTHENTICATION
                Database.audit(tx, audit.SECURITY_ALERT, row["username"], "E", f"token:{number}", 4, **particulars)

    def _remaining_s(self, row: sqlite3.Row) -> float:
        """Seconds that are left; 0 also while the clock is before the last use, so that setting it back stretches nothing."""
        if row["last_used_at"] and self._clock.age_s(row["last_used_at"]) == math.inf:
            return 0.0
        return max(0.0, float(row["lifetime_s"]) - self._clock.age_s(row["made_at"]))

    def _end_expired(self) -> None:
        """End for good the tokens whose days are over: a clock that is set back later does not revive them."""
        rows = self._db.query("SELECT id, created_at, lifetime_s FROM api_tokens WHERE lifetime_s > 0")
        over = [row["id"] for row in rows if row["lifetime_s"] <= self._clock.age_s(row["created_at"]) < math.inf]
        if over:
            with self._db.transaction() as tx:
                tx.executemany("UPDATE api_tokens SET lifetime_s = 0 WHERE id = ?", [(number,) for number in over])

    def _token(self, row: sqlite3.Row) -> ApiToken:
        addresses = tuple(item["address"] for item in self._db.query(_ADDRESSES, row["token_id"]))
        scopes = frozenset(Scope(name) for name in json.loads(row["scopes"]) if name in _SCOPE_NAMES)  # a newer version may know more
        return ApiToken(
            row["token_id"], self._accounts.account(row), scopes, row["made_at"], row["created_by"], row["last_used_at"],
            self._remaining_s(row), addresses,
        )  # fmt: skip


_TOKENS: Final = (
    "SELECT u.*, t.id AS token_id, t.scopes, t.created_at AS made_at, t.created_by, t.lifetime_s, t.last_used_at"
    " FROM api_tokens t JOIN users u ON u.id = t.user_id"
)
# The order of the wall clock is good enough for a list.
_ADDRESSES: Final = "SELECT address FROM api_token_addresses WHERE token_id = ? ORDER BY last_used_at DESC, rowid DESC"
_SCOPE_NAMES: Final = frozenset(map(str, Scope))


def _scopes(names: Collection[str]) -> list[str]:
    """Scopes in a fixed order; raises StoreError ``account.scope`` where there is none, or one that is unknown."""
    wanted = sorted({str(name) for name in names})
    if not wanted or not _SCOPE_NAMES.issuperset(wanted):
        raise StoreError("account.scope", ", ".join(wanted))
    return wanted


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
