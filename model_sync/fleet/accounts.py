"""Accounts of operators, who may see the fleet and pause a rollout: argon2 hashes, slowed guessing, server-side sessions.

There is no default account: ``model-library operator add NAME`` creates one and prints its password once.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from sqlalchemy import RowMapping, delete, select, update

from model_sync.errors import SettingsError
from model_sync.fleet.database import Fleet
from model_sync.fleet.tables import actions, operators, sessions
from model_sync.login_throttle import FailureRows, LoginQueue, LoginThrottle, machine_of

MAX_PASSWORD_CHARS: Final = 256
_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
# RFC 9106's second recommended option with OWASP's floor of memory: 19 MiB, two passes.
_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
_DUMMY_HASH: Final = _HASHER.hash(secrets.token_hex(16))
_TOUCH_S: Final = 30


class Accounts:
    """Operators and their sessions, which end after ``idle_s`` without a request, and after ``absolute_s`` in any case.

    Args:
        fleet: the fleet's database.
        clock: for the limits of guessing: seconds, by a clock that nobody can set.
    """

    def __init__(
        self, fleet: Fleet, *, idle_s: int = 30 * 60, absolute_s: int = 12 * 3600, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fleet = fleet
        self._idle_s, self._absolute_s = idle_s, absolute_s
        self._throttle = LoginThrottle(clock)
        self._queue = LoginQueue(self._throttle)
        self._rows = FailureRows(clock)

    def add(self, name: str) -> str:
        """Create an operator; return the password of 80 random bits.

        Raises:
            SettingsError: the name is not valid, or exists already.
        """
        if not _NAME.match(name):
            hint = "letters, digits, dot, dash and underscore; 64 at most"
            raise SettingsError(f"{name!r} cannot be a name", hint=hint, code="library.name")
        password, values = _new_password()
        with self._fleet.writing() as tx:
            new = self._fleet.insert(operators).values(name=name, **values).on_conflict_do_nothing(index_elements=["name"])
            # RETURNING and not rowcount, which PostgreSQL's driver may not know for an INSERT.
            if tx.execute(new.returning(operators.c.name)).first() is None:
                hint = f"nothing was changed; `model-library operator reset {name}` gives a new password and ends the sessions"
                raise SettingsError(f"{name} is an operator already", hint=hint, code="library.exists")
            tx.execute(actions.insert().values(at=self._fleet.now(), actor="command line", action="operator", subject=name))
        return password

    def reset(self, name: str) -> str:
        """Set a new password, which ends every lock of the name, and end its sessions; return the password.

        Raises:
            SettingsError: there is no such operator.
        """
        password, values = _new_password()
        with self._fleet.writing() as tx:
            if not tx.execute(update(operators).where(operators.c.name == name).values(**values)).rowcount:
                raise _unknown_operator(name)
            tx.execute(delete(sessions).where(sessions.c.operator == name))
            tx.execute(actions.insert().values(at=self._fleet.now(), actor="command line", action="operator", subject=name))
        return password

    def remove(self, name: str) -> None:
        """Remove an operator; raise SettingsError when there is no such one."""
        with self._fleet.writing() as tx:
            tx.execute(delete(sessions).where(sessions.c.operator == name))
            if not tx.execute(delete(operators).where(operators.c.name == name)).rowcount:
                raise _unknown_operator(name)
            tx.execute(actions.insert().values(at=self._fleet.now(), actor="command line", action="operator-removed", subject=name))

    def login(self, name: str, password: str, peer: str = "") -> str | None:
        """Check a password that came from the IP address ``peer``; return the token of a new session, or None.

        An unknown name, a wrong password and a locked name take the same time and have the same result. Five failures lock the name for
        their machine; guessing from many machines slows it, and locks nobody out.

        Raises:
            TooManyAttemptsError: too many attempts wait already. Nothing was checked.
        """
        with self._fleet.reading() as tx:
            row = tx.execute(select(operators).where(operators.c.name == name)).mappings().one_or_none()
        with self._queue.turn(name, peer):
            is_blocked = self._throttle.is_blocked(name, row["password_hash"] if row else "", peer)
            fits = _verify(row["password_hash"] if row else _DUMMY_HASH, password[:MAX_PASSWORD_CHARS])
        if row is None or is_blocked or not fits:
            if not is_blocked:
                self._count_failure(name, row, peer)
            return None
        self._throttle.clear(name, peer)
        token, now = secrets.token_urlsafe(32), self._fleet.now()
        with self._fleet.writing() as tx:
            tx.execute(delete(sessions).where(sessions.c.created_at < now - self._absolute_s))
            tx.execute(sessions.insert().values(token_sha256=_digest(token), operator=name, created_at=now, seen_at=now))
        return token

    def resume(self, token: str) -> str | None:
        """Return the operator of a session token, or None when the session has ended."""
        now, digest = self._fleet.now(), _digest(token)
        with self._fleet.reading() as tx:
            row = tx.execute(select(sessions).where(sessions.c.token_sha256 == digest)).mappings().one_or_none()
        if row is None or now - row["seen_at"] > self._idle_s or now - row["created_at"] > self._absolute_s:
            return None
        if now - row["seen_at"] > _TOUCH_S:
            with self._fleet.writing() as tx:
                tx.execute(update(sessions).where(sessions.c.token_sha256 == digest).values(seen_at=now))
        return str(row["operator"])

    def logout(self, token: str) -> None:
        """End a session."""
        with self._fleet.writing() as tx:
            tx.execute(delete(sessions).where(sessions.c.token_sha256 == _digest(token)))

    def _count_failure(self, name: str, row: RowMapping | None, peer: str) -> None:
        """Count a failure, of a name that exists or not; a lock of an operator is recorded, but not each one of a flood."""
        secret = row["password_hash"] if row else ""
        self._throttle.add_failure(name, secret, peer)
        if row is not None and self._throttle.is_blocked(name, secret, peer) and self._rows.take(machine_of(peer)):
            with self._fleet.writing() as tx:
                tx.execute(actions.insert().values(at=self._fleet.now(), actor="server", action="locked", subject=name))


def _unknown_operator(name: str) -> SettingsError:
    hint = "upper and lower case differ; `model-library operator add` creates one"
    return SettingsError(f"no operator is called {name}", hint=hint, code="fleet.unknown")


def _new_password() -> tuple[str, dict[str, Any]]:
    """Return a new password, and the columns that are stored."""
    password = "-".join(secrets.token_hex(2) for _ in range(5))
    return password, {"password_hash": _HASHER.hash(password)}


def _verify(password_hash: str, password: str) -> bool:
    try:
        return _HASHER.verify(password_hash, password)
    except (VerifyMismatchError, InvalidHashError):
        return False


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
