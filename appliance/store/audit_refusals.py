"""Audit entries for refused requests, bounded so that nobody can fill the disk with them.

What a logged-in person is refused is always written, one entry each. Of everybody else the first requests of a period get an entry of
their own; the others are counted, and one entry at the end of the period says how many there were of each kind, and from where.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from appliance.core.domain import utc_now
from appliance.store import audit
from appliance.store.database import Database

PERIOD_S: Final = 900.0
MAX_ENTRIES: Final = 30
_MAX_PEERS: Final = 20
SUMMARY_CODE: Final = "refusals.counted"


class Refusals:
    """Writes the refusals of one process.

    Args:
        database: of the box.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database, self._clock = database, clock
        self._lock = threading.Lock()
        self._period_began = -PERIOD_S
        self._entries = 0
        self._counted: Counter[str] = Counter()
        self._peers: set[str] = set()
        self._since = ""

    def record(
        self, account: str, peer: str, code: str, event: tuple[str, str] = audit.SECURITY_ALERT, obj: str = "web", **detail: Any
    ) -> None:
        """Record that a request was refused.

        Args:
            account: the name of the logged-in person; an empty one for everybody else.
            peer: network address that it came from.
            code: why it was refused.
            event: event identifier of PS3.15 A.5.3.
            obj: what was asked for.
            **detail: further particulars, such as the event's type.

        Raises:
            StoreError: the entry cannot be written.
        """
        with self._lock:
            self._end_period()
            if not account:
                if self._entries >= MAX_ENTRIES:
                    self._count(peer, code)
                    return
                self._entries += 1
        with self._database.transaction() as tx:
            Database.audit(tx, event, account or "unknown", "E", obj, 4, code=code, peer=peer, **detail)

    def flush(self) -> None:
        """Write what was counted, whether or not the period is over: the process ends."""
        with self._lock:
            self._write_summary()

    def _count(self, peer: str, code: str) -> None:
        if not self._counted:
            self._since = utc_now()
            timer = threading.Timer(PERIOD_S, self.flush)  # nobody may come after the last one who was refused
            timer.daemon = True
            timer.start()
        self._counted[code] += 1
        if len(self._peers) < _MAX_PEERS:
            self._peers.add(peer)

    def _end_period(self) -> None:
        now = self._clock()
        if now - self._period_began >= PERIOD_S:
            self._write_summary()
            self._period_began, self._entries = now, 0

    def _write_summary(self) -> None:
        if not self._counted:
            return
        detail = {"code": SUMMARY_CODE, "since": self._since, "refused": dict(self._counted), "peers": sorted(self._peers)}
        with self._database.transaction() as tx:
            Database.audit(tx, audit.SECURITY_ALERT, "unknown", "E", "web", 4, **audit.USE_OF_RESTRICTED_FUNCTION, **detail)
        self._counted.clear()
        self._peers.clear()
