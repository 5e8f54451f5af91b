"""How often a password may be tried (R3): five failures lock a name for the machine they came from, for 15 minutes.

If five failures locked a name everywhere, anybody on the network could lock a doctor out all day. So the strict limit is for name and
machine together, in memory; a restart forgets it. The wide limit, for a name from every address, is in the database of the accounts.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MAX_FAILURES: Final = 5
# Failures of one name from all addresses since its last successful login: stops somebody who guesses from many addresses.
MAX_FAILURES_EVERYWHERE: Final = 50
LOCKOUT_S: Final = 15 * 60.0
_MAX_ENTRIES: Final = 10_000


@dataclass
class _Entry:
    """Failures of one name from one machine; ``secret`` is the password's hash at that time: a new password forgets them."""

    secret: str
    failures: int = 0
    last_at: float = 0.0
    locked_until: float = 0.0


class LoginThrottle:
    """Counts failed logins by name and machine; safe to use from several threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def is_blocked(self, username: str, secret: str, peer: str) -> bool:
        """Whether this machine has used up its attempts for this name."""
        with self._lock:
            entry = self._entries.get(_key(username, peer))
            return entry is not None and entry.secret == secret and entry.locked_until > self._clock()

    def add_failure(self, username: str, secret: str, peer: str) -> None:
        """Count a failed attempt; the fifth within 15 minutes blocks the name for this machine."""
        now, key = self._clock(), _key(username, peer)
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None or entry.secret != secret or now - entry.last_at > LOCKOUT_S:
                entry = _Entry(secret)
            entry.failures, entry.last_at = entry.failures + 1, now
            if entry.failures >= MAX_FAILURES:
                entry.failures, entry.locked_until = 0, now + LOCKOUT_S
            self._entries[key] = entry
            if len(self._entries) > _MAX_ENTRIES:
                self._entries.popitem(last=False)

    def clear(self, username: str, peer: str) -> None:
        """Forget the failures of this name from this machine, after a login that succeeded."""
        with self._lock:
            self._entries.pop(_key(username, peer), None)


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
