"""Which bundles a process has found whole, so that megabytes are not hashed at every look, and when to look again all the same.

A disk rots, and another account may write where it should not. A bundle is hashed again when a file of it has another length, time
or inode than before, when the box has refused it since, and once a day in any case: a rotten sector changes none of these.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from model_sync import atomic_files
from model_sync.agent.exchange import REPORT_FILE, Exchange

REVERIFY_INTERVAL_S = 86400.0
_REJECTED_STATES = ("failed", "rolled-back")
Rejections: TypeAlias = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class _Fingerprint:
    """What a bundle was like when it was found whole."""

    files: tuple[tuple[str, int, int, int], ...]
    rejected: Rejections
    at: float


class VerifiedBundleCache:
    """Remembers bundles that were found whole.

    Args:
        ticks: a monotonic clock, in seconds.
    """

    def __init__(self, ticks: Callable[[], float]) -> None:
        """Know nothing yet."""
        self._ticks = ticks
        self._found: dict[str, _Fingerprint] = {}

    def is_verified(self, directory: Path, rejected: Rejections) -> bool:
        """Say whether a bundle needs no hashing; ``refused`` is what the box has against it."""
        found = self._found.get(directory.name)
        if found is None or self._ticks() - found.at >= REVERIFY_INTERVAL_S or not rejected <= found.rejected:
            return False
        return found.files == _files(directory)

    def add(self, directory: Path, rejected: Rejections) -> None:
        """A bundle was hashed just now, and is whole."""
        self._found[directory.name] = _Fingerprint(_files(directory), rejected, self._ticks())

    def remove(self, directory: Path) -> None:
        """A bundle is damaged, or gone."""
        self._found.pop(directory.name, None)


def rejections(exchange: Exchange, digest: str) -> Rejections:
    """Return when and why the box has refused a bundle, by its own report."""
    activations = atomic_files.read_json(exchange.directory / REPORT_FILE).get("activations")
    told = [item for item in activations if isinstance(item, dict)] if isinstance(activations, list) else []
    return frozenset(
        (str(item.get("at")), str(item.get("code")))
        for item in told
        if item.get("digest") == digest and item.get("state") in _REJECTED_STATES
    )


def _files(directory: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, length, time and inode of each file; a bundle that cannot be read now is like none before."""
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found.append((path, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(found))
