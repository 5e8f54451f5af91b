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

HASH_AGAIN_S = 86400.0
_REFUSED = ("failed", "rolled-back")
Refusals: TypeAlias = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class _Found:
    """What a bundle was like when it was found whole."""

    files: tuple[tuple[str, int, int, int], ...]
    refused: Refusals
    at: float


class WholeBundles:
    """Remembers bundles that were found whole.

    Args:
        ticks: a monotonic clock, in seconds.
    """

    def __init__(self, ticks: Callable[[], float]) -> None:
        """Know nothing yet."""
        self._ticks = ticks
        self._found: dict[str, _Found] = {}

    def knows(self, directory: Path, refused: Refusals) -> bool:
        """Say whether a bundle needs no hashing; ``refused`` is what the box has against it."""
        found = self._found.get(directory.name)
        if found is None or self._ticks() - found.at >= HASH_AGAIN_S or not refused <= found.refused:
            return False
        return found.files == _files(directory)

    def add(self, directory: Path, refused: Refusals) -> None:
        """A bundle was hashed just now, and is whole."""
        self._found[directory.name] = _Found(_files(directory), refused, self._ticks())

    def forget(self, directory: Path) -> None:
        """A bundle is damaged, or gone."""
        self._found.pop(directory.name, None)


def refusals(exchange: Exchange, digest: str) -> Refusals:
    """Return when and why the box has refused a bundle, by its own report."""
    activations = atomic_files.read_json(exchange.directory / REPORT_FILE).get("activations")
    told = [item for item in activations if isinstance(item, dict)] if isinstance(activations, list) else []
    return frozenset(
        (str(item.get("at")), str(item.get("code"))) for item in told if item.get("digest") == digest and item.get("state") in _REFUSED
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
