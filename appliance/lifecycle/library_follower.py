"""Following the library: what its agent wants is begun when the facts allow it, and said when they do not.

Stepped by the worker; every file is small, and the verification runs in a process of its own.
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
from appliance.lifecycle.exchange import Check, Directive, Exchange
from appliance.lifecycle.journal import Journal, Wanted
from appliance.lifecycle.rollback_protection import Floor
from appliance.lifecycle.trust_facts import Facts
from appliance.store.database import SECURITY_ALERT
from appliance.store.store import Store
from model_sync.messages import current_code

logger = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 1.0
_WANT_EVERY_S: Final = 10.0
_REPORT_EVERY_S: Final = 60.0
_STATUS_EVERY_S: Final = 60.0
# A check that died has said nothing: asked again soon, and in any case now and then, whether or not the agent writes.
_UNCHECKED: Final = frozenset({"trust.unchecked", "trust.unreadable"})
_RETRY_S: Final = 10.0
_LONGEST_RETRY_S: Final = 600.0
_RECHECK_S: Final = 3600.0


def learn(store: Store, journal: Journal, facts: Facts) -> Facts:
    """Take over what the signed indexes forbid, which holds for good; raise the alarm for whatever is not to be trusted, once.

    Returns:
        The facts held against what this box has learnt before: what is behind that is a trouble, and nothing new comes of it.
    """
    for name, line in facts.lines.items():
        journal.restrict(name, line.minimum_version, {version: item.reason for version, item in line.withdrawn.items()})
    facts = Floor.load(store).hold(facts, datetime.now(timezone.utc))
    known = store.database.one("SELECT value FROM meta WHERE key = 'facts_troubles'")
    before: dict[str, str] = json.loads(known["value"]) if known else {}
    if facts.ok:  # that a line which this box has nothing of has not been received is no trouble of this box
        troubles = ((name, trouble.code) for name, trouble in facts.troubles.items())
        bad = {name: code for name, code in troubles if code != "trust.missing" or journal.knows(name)}
    else:
        bad = before | {"": facts.code}
    if bad == before:
        return facts
    with store.database.transaction() as tx:
        tx.execute("INSERT OR REPLACE INTO meta VALUES ('facts_troubles', ?)", (json.dumps(bad, sort_keys=True),))
        for name in sorted(before.keys() | bad.keys()):
            if (code := bad.get(name, "")) != before.get(name, ""):
                which = {"line": name} if name else {"message": facts.message} if code else {}
                store.database.audit(tx, SECURITY_ALERT, "worker", "E", "library", 8 if code else 0, code=code, **which)
    return facts


class Follower:
    """Follows one exchange directory.

    Args:
        store: the box's store.
        journal: its journal of models.
        exchange: the directory.
        clock: seconds that only rise.
    """

    def __init__(self, store: Store, journal: Journal, exchange: Exchange, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._journal = journal
        self._exchange = exchange
        self._clock = clock
        self._root = store.settings.library_root
        self._check: Check | None = None
        self._facts: Facts | None = None
        self._new_facts = False
        self._seen: object = None
        self._status_seen: object = None
        self._reported = (-1, 0.0)
        self._next_look = self._next_want = self._next_status = 0.0
        self._retry_s, self._again_at = _RETRY_S, 0.0

    @property
    def busy(self) -> bool:
        """Whether something the agent wrote has not been answered yet."""
        return self._check is not None or self._new_facts or self._unanswered()

    def look(self) -> None:
        """Once a second: what did the agent write? Has a check something to say?"""
        now = self._clock()
        if self._check is not None and (facts := self._check.facts()) is not None:
            self._check = None
            self.learned(facts)
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY_S
        if now >= self._next_status and (mark := self._exchange.status_mark()) != self._status_seen:
            self._next_status = now + (_STATUS_EVERY_S if self._exchange.note_status() else 0.0)  # one that flaps does not fill the audit
            self._status_seen = mark
        if self._check is None and self._unanswered():
            self._begin_check()

    def begin(self) -> None:
        """Begin what the agent wants and the facts allow; say what they do not."""
        now = self._clock()
        if self._facts is None or self._check is not None or (now < self._next_want and not self._new_facts):
            return
        self._new_facts, self._next_want = False, now + _WANT_EVERY_S
        directives = self._exchange.directives()
        for name, directive in sorted(directives.lines.items()) if directives else ():
            if name in self._facts.lines or name in self._facts.troubles or self._journal.knows(name):  # not what anybody may invent
                self._consider(self._facts, name, directive)

    def report(self) -> None:
        """Tell the agent how the box is, at every change and once a minute."""
        now = self._clock()
        if self._journal.changes != self._reported[0] or now >= self._reported[1]:
            self._reported = (self._journal.changes, now + _REPORT_EVERY_S)
            self._exchange.write_report()

    def learned(self, facts: Facts) -> Facts:
        """Take over what a check said, see :func:`learn`: what is forbidden at once, what may begin with the next :meth:`begin`."""
        again = not facts.ok and current_code(facts.code, "box") in _UNCHECKED
        self._again_at = self._clock() + (self._retry_s if again else _RECHECK_S)
        self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S) if again else _RETRY_S
        self._facts, self._new_facts = learn(self._store, self._journal, facts), True
        return self._facts

    def stop(self) -> None:
        """End a check that runs, and tell the agent how the box is left."""
        if self._check is not None:
            self._check.end()
            self._check = None
        self._exchange.write_report()

    def _unanswered(self) -> bool:
        if self._root is None or not self._exchange.has_metadata():
            return False
        return self._exchange.mark() != self._seen or self._clock() >= self._again_at

    def _begin_check(self) -> None:
        assert self._root is not None
        self._seen = self._exchange.mark()  # before it starts: what changes meanwhile is checked again
        try:
            self._check = Check(self._exchange.directory, self._root)
        except OSError as error:  # no process, no memory: asked again with the next look
            logger.error("the check cannot be started", extra={"status": error.errno})
            self._seen = None

    def _consider(self, facts: Facts, name: str, directive: Directive) -> None:
        active, coming = self._journal.active(name), self._journal.coming(name)
        if directive.digest in (row["digest"] for row in (active, coming) if row is not None):
            return
        if self._journal.remembered(directive.digest) or self._journal.overruled(name, directive.digest):
            return
        origin = self._exchange.bundle(directive.digest)
        wanted = Wanted(name, directive.version, directive.digest, directive.source, origin, "model-sync")
        note = self._journal.barred(name, directive.version) or facts.refusal(name, directive.version, directive.digest)
        if note is None and not os.path.isdir(origin):
            note = Note("model.absent", f"{name} {directive.version}")
        if note is not None:
            self._journal.refuse(wanted, note)
        else:
            self._journal.enter(wanted)
