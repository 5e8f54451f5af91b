"""Who may try a password how often (R3): five failures lock a name for the machine they came from, fifty lock it everywhere.

Locking a name everywhere after five failures, as :class:`appliance.store.accounts.Accounts` by itself does, lets anybody on the clinic's
network keep a doctor out all day. So the strict limit is for name and address together, and lives in this process; a restart
forgives it. The wide one stands in the database, counts failures from every address since the last login that succeeded, and stops
a guesser who changes addresses: fifty guesses in a quarter of an hour. Wrong present passwords at a change of password count the same.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from appliance.store.accounts import LOCKOUT_S, MAX_FAILURES, Account, Accounts
from appliance.store.database import USER_AUTHENTICATION, Database
from appliance.store.store import Store
from webui.peers import machine

MAX_FAILURES_EVERYWHERE: Final = 50
_MAX_REMEMBERED: Final = 10_000


@dataclass
class _Tries:
    """Failures of one name from one address; ``secret`` is the password's hash they were made against: a new one forgives."""

    secret: str
    failures: int = 0
    last_at: float = 0.0
    locked_until: float = 0.0


class Doorkeeper(Accounts):
    """Accounts, with the limits of a page that a whole network can reach."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        super().__init__(store)
        self._clock = clock
        self._tries: OrderedDict[tuple[str, str], _Tries] = OrderedDict()
        self._lock = threading.Lock()

    def login(self, username: str, password: str, peer: str) -> str | None:
        """Check a password as the accounts do; from a locked address no password is right."""
        token = super().login(username, "" if self.blocked(username, peer) else password, peer)
        if token is not None:
            with self._lock:
                self._tries.pop(_key(username, peer), None)
        return token

    def blocked(self, username: str, peer: str) -> bool:
        """Whether this address has used up its tries for this name."""
        secret = self._secret(username)
        with self._lock:
            tries = self._tries.get(_key(username, peer))
            return tries is not None and tries.secret == secret and tries.locked_until > self._clock()

    def wrong_password(self, account: Account, peer: str) -> None:
        """Somebody who is logged in gave a wrong present password."""
        self._failed(account.username, peer, known=True, locked=self.blocked(account.username, peer))

    def _secret(self, username: str) -> str:
        row = self._db.one("SELECT password_hash FROM users WHERE username = ?", username)
        return str(row["password_hash"]) if row else ""

    def _failed(self, username: str, peer: str, *, known: bool, locked: bool) -> None:
        """Count a failure for its address and for the name as a whole, and write it to the audit."""
        locked = locked or self.blocked(username, peer)
        if known and not locked:
            self._count(username, peer)
        with self._db.transaction() as tx:
            if known and not locked:
                tx.execute("UPDATE users SET failures = failures + 1 WHERE username = ?", (username,))
                tx.execute(
                    "UPDATE users SET locked_until = ?, failures = 0 WHERE username = ? AND failures >= ?",
                    (time.time() + LOCKOUT_S, username, MAX_FAILURES_EVERYWHERE),
                )
            who = username[:64] if known else "unknown"
            kind = {"type": "110122", "type_meaning": "Login"}
            Database.audit(tx, USER_AUTHENTICATION, who, "E", "login", 4, peer=peer, locked=locked, **kind)

    def _count(self, username: str, peer: str) -> None:
        secret, now, key = self._secret(username), self._clock(), _key(username, peer)
        with self._lock:
            tries = self._tries.pop(key, None)
            if tries is None or tries.secret != secret or now - tries.last_at > LOCKOUT_S:
                tries = _Tries(secret)
            tries.failures, tries.last_at = tries.failures + 1, now
            if tries.failures >= MAX_FAILURES:
                tries.failures, tries.locked_until = 0, now + LOCKOUT_S
            self._tries[key] = tries
            if len(self._tries) > _MAX_REMEMBERED:
                self._tries.popitem(last=False)


def _key(username: str, peer: str) -> tuple[str, str]:
    return username.casefold()[:64], machine(peer)
