"""Attempts at what may crash a process, and may take the whole machine down: a power cut is no failure of a model (docs/adr/0017)."""

from __future__ import annotations

from typing import Final, NamedTuple

from model_sync.atomic_files import boot_id

MAX_ATTEMPTS: Final = 3
"""So many attempts may crash."""

MAX_INTERRUPTED: Final = 10
"""So many may be ended by a new boot. A clinic whose power fails is far below it; a model that takes its machine down reaches it."""


class Attempts(NamedTuple):
    """The attempts so far.

    Attributes:
        begun: the one under way included, without those that a new boot ended.
        interrupted: those that a new boot ended.
        boot_id: of the boot in which the one under way began; empty when none is, or where the system has none.
    """

    begun: int = 0
    interrupted: int = 0
    boot_id: str = ""

    def since_boot(self) -> Attempts:
        """Take the attempt under way back where the machine booted since it began."""
        now = boot_id()
        if not self.boot_id or not now or now == self.boot_id:
            return self
        return Attempts(max(0, self.begun - 1), self.interrupted + 1)

    def begin(self) -> Attempts:
        """Begin another one in this boot."""
        return Attempts(self.begun + 1, self.interrupted, boot_id())

    def take_back(self) -> Attempts:
        """Take back the one under way, which was stopped for a reason that is not its fault."""
        return Attempts(max(0, self.begun - 1), self.interrupted)
