"""How often a password may be tried (R3): by name and machine, by name, and by machine.

Five failures lock a name for the machine they came from, for 15 minutes. If they locked a name everywhere, anybody on the network could
keep a doctor out all day; so a name that is guessed from many machines is only slowed, and not at all for the machines from which its owner
has logged in. A machine that fails with many names is slowed as well. Names that do not exist count like those that do. All of it is in
memory and measured by a clock that nobody can set; a restart forgets it.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

MAX_FAILURES: Final = 5
LOCKOUT_S: Final = 15 * 60.0
# Failures of one name, or from one machine, within 15 minutes: from then on each further attempt takes its turn.
SLOW_AFTER: Final = 20
# Failures from one machine after which it does not compete any more with the logins of other machines.
SUSPECT_AFTER: Final = 3
SLOW_S: Final = 1.0
# An attempt that would have to wait longer is refused: many waiting attempts would take the server's threads.
MAX_WAIT_S: Final = 4.0
_MAX_ENTRIES: Final = 10_000
# How long an attempt waits for a place where its password is checked.
_PLACE_WAIT_S: Final = 5.0
# Records of failed logins: so many per machine in a window, then one per minute and machine; and so many per minute over all.
_ROWS_PER_MACHINE: Final = 20
_ROWS_PER_MINUTE: Final = 60
_MINUTE_S: Final = 60.0

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass
class _Entry:
    """Failures of one name from one machine; ``secret`` is the password's hash at that time: a new password forgets them."""

    secret: str
    failures: int = 0
    last_at: float = 0.0
    locked_until: float = 0.0


@dataclass
class _Turns:
    """Failures within a window of 15 minutes that began at ``since``, and when the next attempt may be made."""

    since: float
    failures: int = 0
    next_at: float = 0.0


class RecentEntries(Generic[Key, Value]):
    """The entries that were stored last; the oldest is forgotten when there are too many."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value of a key, or None."""
        return self._entries.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Store a value, which is now the newest."""
        self._entries.pop(key, None)
        self._entries[key] = value
        if len(self._entries) > _MAX_ENTRIES:
            self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)

    def pop(self, key: Key) -> None:
        """Forget a key, known or not."""
        self._entries.pop(key, None)


class LoginThrottle:
    """Counts failed logins; safe to use from several threads.

    Args:
        clock: seconds; one that nobody can set (``time.monotonic``) where there is no reason for another.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: RecentEntries[tuple[str, str], _Entry] = RecentEntries()
        self._turns: RecentEntries[tuple[str, str], _Turns] = RecentEntries()
        self._familiar: RecentEntries[tuple[str, str], bool] = RecentEntries()
        self._lock = threading.Lock()

    def is_blocked(self, username: str, secret: str, peer: str) -> bool:
        """Whether this machine has used up its attempts for this name."""
        with self._lock:
            entry = self._entries.get(_key(username, peer))
            return entry is not None and entry.secret == secret and entry.locked_until > self._clock()

    def is_suspect(self, peer: str) -> bool:
        """Whether several logins failed from this machine in the last 15 minutes, more than a person mistypes."""
        with self._lock:
            return self._window(("", machine_of(peer))).failures >= SUSPECT_AFTER

    def is_familiar(self, username: str, peer: str) -> bool:
        """Whether a login of this name from this machine has succeeded."""
        with self._lock:
            return self._familiar.get(_key(username, peer)) is not None

    def wait_s(self, username: str, peer: str) -> float | None:
        """Seconds that this attempt has to wait for its turn, which it takes by this call; None where too many wait already."""
        name, machine = _key(username, peer)
        with self._lock:
            limits = [("", machine)] if self._familiar.get((name, machine)) else [("", machine), (name, "")]
            slow = [turns for turns in map(self._window, limits) if turns.failures >= SLOW_AFTER]
            now = self._clock()
            at = max([now, *(turns.next_at for turns in slow)])
            if at - now > MAX_WAIT_S:
                return None
            for turns in slow:
                turns.next_at = at + SLOW_S
            return at - now

    def add_failure(self, username: str, secret: str, peer: str) -> None:
        """Count a failed attempt; the fifth within 15 minutes blocks the name for this machine."""
        now, key = self._clock(), _key(username, peer)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.secret != secret or now - entry.last_at > LOCKOUT_S:
                entry = _Entry(secret)
            entry.failures, entry.last_at = entry.failures + 1, now
            if entry.failures >= MAX_FAILURES:
                entry.failures, entry.locked_until = 0, now + LOCKOUT_S
            self._entries.put(key, entry)
            for limit in (("", key[1]), (key[0], "")):
                turns = self._window(limit)
                turns.failures += 1
                self._turns.put(limit, turns)

    def clear(self, username: str, peer: str) -> None:
        """Forget the failures of this name from this machine, after a login that succeeded.

        From now on attempts for this name from this machine are no longer slowed because of other machines.
        """
        with self._lock:
            self._entries.pop(_key(username, peer))
            self._familiar.put(_key(username, peer), True)

    def _window(self, limit: tuple[str, str]) -> _Turns:
        """The failures of the window that is open now."""
        turns, now = self._turns.get(limit), self._clock()
        return turns if turns is not None and now - turns.since <= LOCKOUT_S else _Turns(now)


class TooManyAttemptsError(Exception):
    """Too many attempts wait already; the server answers 429, and nothing was checked."""


class LoginQueue:
    """The places of one server where passwords are checked: a check takes 19 MiB and a core, and guessing must not slow others' logins.

    Args:
        throttle: says who has to wait.
    """

    def __init__(self, throttle: LoginThrottle) -> None:
        self._throttle = throttle
        # Machines from which several logins failed share one place, so that all others always find one free, and few threads wait for it.
        self._checks = threading.BoundedSemaphore(2)
        self._checks_of_suspects = threading.BoundedSemaphore(1)
        self._waiting_suspects = threading.BoundedSemaphore(3)
        # Attempts that wait for their turn, each on a thread of the server.
        self._waiting = threading.BoundedSemaphore(6)

    @contextmanager
    def turn(self, username: str, peer: str) -> Iterator[None]:
        """Wait until a password for this name may be checked.

        The wait depends on the name, known or not, and on the machine at the IP address ``peer``, never on the password.

        Raises:
            TooManyAttemptsError: too many wait already.
        """
        wait_s = self._throttle.wait_s(username, peer)
        if wait_s is None:
            raise TooManyAttemptsError
        if wait_s > 0:
            with _place(self._waiting, 0):
                time.sleep(wait_s)
        if self._throttle.is_suspect(peer):
            with _place(self._waiting_suspects, 0), _place(self._checks_of_suspects, _PLACE_WAIT_S):
                yield
        else:
            with _place(self._checks, _PLACE_WAIT_S):
                yield


@contextmanager
def _place(places: threading.BoundedSemaphore, timeout_s: float) -> Iterator[None]:
    if not places.acquire(timeout=timeout_s):
        raise TooManyAttemptsError
    try:
        yield
    finally:
        places.release()


@dataclass
class _Rows:
    """Rows of one machine in the window that began at ``since``."""

    since: float
    count: int = 0
    next_at: float = 0.0


class FailureRows:
    """Decides which failed logins get a record, so that guessing cannot fill the disk; a record says how many it stands for.

    Args:
        clock: like that of :class:`LoginThrottle`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._machines: RecentEntries[str, _Rows] = RecentEntries()
        self._minute = _Rows(clock())
        self._held = 0

    def take(self, machine: str) -> int:
        """Count a failed attempt; returns the number of attempts that a record written now stands for, 0 for no record."""
        with self._lock:
            now = self._clock()
            self._held += 1
            rows = self._machines.get(machine)
            if rows is None or now - rows.since > LOCKOUT_S:
                rows = _Rows(now)
            if now - self._minute.since > _MINUTE_S:
                self._minute = _Rows(now)
            if self._minute.count >= _ROWS_PER_MINUTE or (rows.count >= _ROWS_PER_MACHINE and now < rows.next_at):
                return 0
            rows.count, rows.next_at = rows.count + 1, now + _MINUTE_S
            self._machines.put(machine, rows)
            self._minute.count += 1
            held, self._held = self._held, 0
            return held


def machine_of(address: str) -> str:
    """The machine behind an IP address: for IPv6 its /64 network, in which one machine has as many addresses as it likes.

    All neighbours on a link share the network ``fe80::``, so there the address itself counts. A text that is no IP address is returned
    unchanged.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address) or parsed.is_link_local or parsed.is_loopback:
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def _key(username: str, peer: str) -> tuple[str, str]:
    return username.casefold()[:64], machine_of(peer)
