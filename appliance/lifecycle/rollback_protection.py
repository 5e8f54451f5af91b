"""Rollback protection: what this box verified before is in its own database, and older facts activate nothing.

The sync agent protects against rollback as well, but in its own files: an attacker who controls the agent could give the box older
metadata and delete those files. The protection belongs to one provisioned root: after another library was provisioned it begins
anew. Withdrawn versions and minimum versions are stored separately and for good (``Journal.record_restrictions``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Final

from appliance.lifecycle.journal_queries import is_older
from appliance.lifecycle.trust_facts import LineFacts, TrustFacts, TrustTrouble
from appliance.store.database import Database
from appliance.store.store import Store

_KEY: Final = "facts_floor"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class _Strictest:
    """The strictest index of one model line so far: its minimum version and its withdrawn versions."""

    minimum: str
    withdrawn: frozenset[str]

    def is_stricter_than(self, line: LineFacts) -> bool:
        """Whether this stored index is stricter than ``line``; a library only ever makes its indexes stricter."""
        forgotten = self.withdrawn - line.withdrawn.keys()
        return is_older(line.minimum_version, self.minimum) or any(not is_older(version, line.minimum_version) for version in forgotten)


@dataclass(frozen=True)
class RollbackProtection:
    """What was verified under one provisioned root.

    Attributes:
        database: of the box.
        anchor: SHA-256 of the provisioned root.
        now: the latest time of the box's clock, limited to the validity of what was verified then: a clock that was wrong
            once does not block later metadata, and times that the library signs never change this value.
        lines: model line -> its strictest index.
    """

    database: Database
    anchor: str
    now: datetime = _EPOCH
    lines: dict[str, _Strictest] = field(default_factory=dict)

    @classmethod
    def load(cls, store: Store) -> RollbackProtection:
        """Load what was stored for the current root; it is empty for a new root and for one that cannot be read."""
        root = store.settings.library_root
        try:
            anchor = hashlib.sha256(root.read_bytes()).hexdigest() if root is not None else ""
        except OSError:
            anchor = ""  # the check cannot read it either, and reports that
        empty = cls(store.database, anchor)
        row = store.database.one("SELECT value FROM meta WHERE key = ?", _KEY)
        stored: dict[str, Any] = json.loads(row["value"]) if row else {}
        if stored.get("anchor") != anchor:
            return empty
        lines = {name: _Strictest(item["minimum"], frozenset(item["withdrawn"])) for name, item in stored["lines"].items()}
        return replace(empty, now=datetime.fromisoformat(stored["now"]), lines=lines)

    def check(self, facts: TrustFacts, clock: datetime) -> TrustFacts:
        """Compare the result of a check with what was verified before, and store what it adds; ``clock`` is the time of the box's clock.

        Returns:
            The facts, with a time that is not before the latest known one; a model line that became less strict is a trouble.
        """
        if not facts.ok:
            return facts
        behind = {name for name, line in facts.lines.items() if name in self.lines and self.lines[name].is_stricter_than(line)}
        current = {name: line for name, line in facts.lines.items() if name not in behind}
        # A line that expired long ago must not limit the time of the others.
        valid = max((line.valid_until for line in current.values() if line.valid_until), default=facts.valid_until or _EPOCH)
        now = self.now if behind else max(self.now, min(clock, valid))
        learnt = {name: _Strictest(line.minimum_version, frozenset(line.withdrawn)) for name, line in current.items()}
        updated = replace(self, now=now, lines=self.lines | learnt)
        if (updated.lines, updated.now.date()) != (self.lines, self.now.date()):  # by day: not every check needs a write
            updated.save()
        trouble = TrustTrouble(code="trust.rollback", message="it is less strict than what this box verified before")
        later = max(facts.now or _EPOCH, clock, updated.now)
        return facts.model_copy(update={"lines": current, "troubles": facts.troubles | dict.fromkeys(behind, trouble), "now": later})

    def save(self) -> None:
        """Write this state to the database."""
        lines = {name: {"minimum": line.minimum, "withdrawn": sorted(line.withdrawn)} for name, line in self.lines.items()}
        value = json.dumps({"anchor": self.anchor, "now": self.now.isoformat(), "lines": lines}, sort_keys=True)
        with self.database.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY, value))
