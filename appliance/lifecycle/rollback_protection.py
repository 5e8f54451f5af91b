"""What this box has learnt before, in its own database: facts that are behind it bring nothing new to work.

The agent keeps floors as well, but in files of its own; an agent that was broken into can lay an older set before the box and take
its floors away. All of it counts for one provisioned root: a new library, provisioned by hand, begins anew. What it forbids is not
here: that holds for good (``Journal.restrict``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Final

from appliance.lifecycle.journal_queries import older
from appliance.lifecycle.trust_facts import Facts, LineFacts, Trouble
from appliance.store.database import Database
from appliance.store.store import Store

_KEY: Final = "facts_floor"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class _Seen:
    """The strictest that one line said."""

    minimum: str
    withdrawn: frozenset[str]

    def is_ahead_of(self, line: LineFacts) -> bool:
        """Whether a line says less than it said before: an index only ever gets stricter."""
        forgotten = self.withdrawn - line.withdrawn.keys()
        return older(line.minimum_version, self.minimum) or any(not older(version, line.minimum_version) for version in forgotten)


@dataclass(frozen=True)
class Floor:
    """What was learnt under one provisioned root.

    Attributes:
        now: the latest moment of the box's own clock, as far as what was verified then is valid: a clock that ran ahead for a
            week does not make the good metadata of the day after look old, and no key of the library can move it.
        lines: by line, the strictest that it said.
    """

    database: Database
    anchor: str
    now: datetime = _EPOCH
    lines: dict[str, _Seen] = field(default_factory=dict)

    @classmethod
    def load(cls, store: Store) -> Floor:
        """The floor of the root that is provisioned now; one of another root, or one that cannot be read, is a new beginning."""
        root = store.settings.library_root
        try:
            anchor = hashlib.sha256(root.read_bytes()).hexdigest() if root is not None else ""
        except OSError:
            anchor = ""  # the check cannot read it either, and says so
        fresh = cls(store.database, anchor)
        row = store.database.one("SELECT value FROM meta WHERE key = ?", _KEY)
        kept: dict[str, Any] = json.loads(row["value"]) if row else {}
        if kept.get("anchor") != anchor:
            return fresh
        lines = {name: _Seen(item["minimum"], frozenset(item["withdrawn"])) for name, item in kept["lines"].items()}
        return replace(fresh, now=datetime.fromisoformat(kept["now"]), lines=lines)

    def hold(self, facts: Facts, clock: datetime) -> Facts:
        """Hold facts against the floor, and raise it by them.

        Args:
            facts: what a check verified.
            clock: the box's own clock.

        Returns:
            The facts, judged by a time that is not before the floor; a line that says less than it did is a trouble.
        """
        if not facts.ok:
            return facts
        behind = {name for name, line in facts.lines.items() if name in self.lines and self.lines[name].is_ahead_of(line)}
        current = {name: line for name, line in facts.lines.items() if name not in behind}
        # Of one line that has long expired nothing is said about the time of the others.
        valid = max((line.valid_until for line in current.values() if line.valid_until), default=facts.valid_until or _EPOCH)
        now = self.now if behind else max(self.now, min(clock, valid))
        seen = {name: _Seen(line.minimum_version, frozenset(line.withdrawn)) for name, line in current.items()}
        raised = replace(self, now=now, lines=self.lines | seen)
        if (raised.lines, raised.now.date()) != (self.lines, self.now.date()):  # to the day: it is not written with every look
            raised.save()
        troubles = {name: Trouble(code="trust.rollback", message="it says less than this box has learnt before") for name in behind}
        later = max(facts.now or _EPOCH, clock, raised.now)
        return facts.model_copy(update={"lines": current, "troubles": facts.troubles | troubles, "now": later})

    def save(self) -> None:
        """Keep it."""
        lines = {name: {"minimum": seen.minimum, "withdrawn": sorted(seen.withdrawn)} for name, seen in self.lines.items()}
        value = json.dumps({"anchor": self.anchor, "now": self.now.isoformat(), "lines": lines}, sort_keys=True)
        with self.database.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY, value))
