"""Whether a library is whole: every signature, length, hash and delegation of its public tree, and what each role needs next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_sync.repository import Library


@dataclass
class Verified:
    """What ``verify`` found: ``problems`` is empty when boxes can trust the tree."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    targets: int = 0
    bytes: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def status(library: Library) -> dict[str, Any]:
    """Return each role's version, expiry, signatures and keys."""
    return {"roles": {role: library.state(role)._asdict() for role in library.role_names()}}


def verify(public: Path, now: datetime, progress: Callable[[int, int], None] | None = None) -> Verified:
    """Walk the public tree."""
    raise NotImplementedError
