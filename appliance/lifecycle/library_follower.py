"""Follows the model library: activates what the sync agent requests when the verified facts allow it, and records refusals.

The worker calls it between jobs. Every file it reads is small, and the verification runs in a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Final

from appliance.core.domain import Note
from appliance.lifecycle.exchange import Directive, Exchange, TrustCheck
from appliance.lifecycle.journal import ActivationRequest, Journal
from appliance.lifecycle.rollback_protection import RollbackProtection
from appliance.lifecycle.trust_facts import TrustFacts
from appliance.store.database import SECURITY_ALERT
from appliance.store.store import Store
from model_sync.messages import current_code

logger = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_REQUESTS_S: Final = 10.0
_REPORT_S: Final = 60.0
_STATUS_S: Final = 60.0
# Codes of a check that verified nothing: it is repeated soon. Every check is repeated from time to time, even if no file changes.
_UNCHECKED: Final = frozenset({"trust.unchecked", "trust.unreadable"})
_RETRY_S: Final = 10.0
_LONGEST_RETRY_S: Final = 600.0
_RECHECK_S: Final = 3600.0


def apply_facts(store: Store, journal: Journal, facts: TrustFacts) -> TrustFacts:
    """Store what the signed indexes forbid, and raise the alarm once for whatever cannot be trusted.

    Returns:
        The facts after the check for rollback: a model line whose index is less strict than the one verified before is a trouble,
        and nothing of it is activated.
    """
    for name, line in facts.lines.items():
        journal.record_restrictions(name, line.minimum_version, {version: item.reason for version, item in line.withdrawn.items()})
    facts = RollbackProtection.load(store).check(facts, datetime.now(timezone.utc))
    known = store.database.one("SELECT value FROM meta WHERE key = 'facts_troubles'")
    before: dict[str, str] = json.loads(known["value"]) if known else {}
    if facts.ok:  # ignore `trust.missing` for model lines of which this box has no model
        troubles = ((name, trouble.code) for name, trouble in facts.troubles.items())
        now = {name: code for name, code in troubles if code != "trust.missing" or journal.has_line(name)}
    else:
        now = before | {"": facts.code}
    if now == before:
        return facts
    with store.database.transaction() as tx:
        tx.execute("INSERT OR REPLACE INTO meta VALUES ('facts_troubles', ?)", (json.dumps(now, sort_keys=True),))
        for name in sorted(before.keys() | now.keys()):
            if (code := now.get(name, "")) != before.get(name, ""):
                detail = {"line": name} if name else {"message": facts.message} if code else {}
                store.database.audit(tx, SECURITY_ALERT, "worker", "E", "library", 8 if code else 0, code=code, **detail)
    return facts


class LibraryFollower:
    """Follows the exchange directory of one sync agent; no step waits.

    Args:
        exchange: the directory shared with the sync agent.
    """

    def __init__(self, store: Store, journal: Journal, exchange: Exchange, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._journal, self._exchange, self._clock = store, journal, exchange, clock
        self._root = store.settings.library_root
        self._check: TrustCheck | None = None
        self._facts: TrustFacts | None = None
        self._has_new_facts = False
        self._checked_version: object = None
        self._reported_changes = -1
        self._next_poll = self._next_requests = self._next_status = self._next_report = self._recheck_at = 0.0
        self._retry_s = _RETRY_S

    @property
    def is_busy(self) -> bool:
        """Whether something that the sync agent wrote is not handled yet."""
        return self._check is not None or self._has_new_facts or self._needs_check()

    def poll(self) -> None:
        """Collect the result of a check, and once a second check for new files of the sync agent."""
        now = self._clock()
        if self._check is not None and (facts := self._check.poll()) is not None:
            self._check = None
            self.accept_facts(facts)
        if now < self._next_poll:
            return
        self._next_poll = now + _POLL_S
        if now >= self._next_status and self._exchange.record_status():
            self._next_status = now + _STATUS_S  # a state that changes all the time must not fill the audit
        if self._check is None and self._needs_check():
            self._start_check()

    def start_wanted(self) -> None:
        """Start the activations that the sync agent requests and the facts allow; record refusals of the others."""
        now = self._clock()
        if self._facts is None or self._check is not None or (now < self._next_requests and not self._has_new_facts):
            return
        self._has_new_facts, self._next_requests = False, now + _REQUESTS_S
        directives = self._exchange.directives()
        for name, directive in sorted(directives.lines.items()) if directives else ():
            # Ignore names that only the sync agent knows: it could invent any number of them.
            if name in self._facts.lines or name in self._facts.troubles or self._journal.has_line(name):
                self._handle(self._facts, name, directive)

    def report(self) -> None:
        """Write the report for the sync agent after every change and once a minute."""
        now = self._clock()
        if self._journal.changes != self._reported_changes or now >= self._next_report:
            self._reported_changes, self._next_report = self._journal.changes, now + _REPORT_S
            self._exchange.write_report()

    def accept_facts(self, facts: TrustFacts) -> TrustFacts:
        """Take over the result of a check, see :func:`apply_facts`; activations start with the next :meth:`start_wanted`."""
        is_unchecked = not facts.ok and current_code(facts.code, "box") in _UNCHECKED
        self._recheck_at = self._clock() + (self._retry_s if is_unchecked else _RECHECK_S)
        self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S) if is_unchecked else _RETRY_S
        self._facts, self._has_new_facts = apply_facts(self._store, self._journal, facts), True
        return self._facts

    def stop(self) -> None:
        """End a running check and write the last report."""
        if self._check is not None:
            self._check.end()
            self._check = None
        self._exchange.write_report()

    def _needs_check(self) -> bool:
        if self._root is None or not os.path.isdir(self._exchange.directory / "metadata"):
            return False
        return self._exchange.version() != self._checked_version or self._clock() >= self._recheck_at

    def _start_check(self) -> None:
        assert self._root is not None
        self._checked_version = self._exchange.version()  # taken before the start: what changes meanwhile is checked again
        try:
            self._check = TrustCheck(self._exchange.directory, self._root)
        except OSError as error:  # out of processes or memory: the next poll tries again
            logger.error("the check cannot be started", extra={"status": error.errno})
            self._checked_version = None

    def _handle(self, facts: TrustFacts, name: str, directive: Directive) -> None:
        known = (self._journal.active(name), self._journal.pending(name))
        if directive.digest in (row["digest"] for row in known if row is not None):
            return
        if self._journal.find_blocking_failure(directive.digest) or self._journal.is_overridden_by_user(name, directive.digest):
            return
        origin = self._exchange.directory / "bundles" / directive.digest
        request = ActivationRequest(name, directive.version, directive.digest, directive.source, origin, "model-sync")
        restriction = self._journal.find_restriction(name, directive.version)
        note = restriction or facts.find_refusal(name, directive.version, directive.digest)
        if note is None and not os.path.isdir(origin):
            note = Note("model.absent", f"{name} {directive.version}")
        if note is not None:
            self._journal.record_refusal(request, note)
        else:
            self._journal.start(request)
