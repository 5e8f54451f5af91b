"""The bundles that this process has verified, so that they are not hashed at every poll.

A bundle is hashed again when the length, time or inode of a file changed, when the box has rejected it since, and once a day: a bad
sector changes none of these.
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
    """The state of a bundle when it was verified."""

    files: tuple[tuple[str, int, int, int], ...]
    rejected: Rejections
    at: float


class VerifiedBundleCache:
    """Remembers bundles that were verified.

    Args:
        ticks: a monotonic clock, in seconds.
    """

    def __init__(self, ticks: Callable[[], float]) -> None:
        self._ticks = ticks
        self._fingerprints: dict[str, _Fingerprint] = {}

    def is_verified(self, directory: Path, rejected: Rejections) -> bool:
        """Return whether a bundle needs no hashing; ``rejected`` holds the rejections by the box."""
        fingerprint = self._fingerprints.get(directory.name)
        if fingerprint is None or self._ticks() - fingerprint.at >= REVERIFY_INTERVAL_S or not rejected <= fingerprint.rejected:
            return False
        return fingerprint.files == _files(directory)

    def add(self, directory: Path, rejected: Rejections) -> None:
        """Record that a bundle was hashed just now and is intact."""
        self._fingerprints[directory.name] = _Fingerprint(_files(directory), rejected, self._ticks())

    def remove(self, directory: Path) -> None:
        """Forget a bundle that is damaged or was removed."""
        self._fingerprints.pop(directory.name, None)


def rejections(exchange: Exchange, digest: str) -> Rejections:
    """Return when and why the box has rejected a bundle, by its own report."""
    activations = atomic_files.read_json(exchange.directory / REPORT_FILE).get("activations")
    reported = [item for item in activations if isinstance(item, dict)] if isinstance(activations, list) else []
    return frozenset(
        (str(item.get("at")), str(item.get("code")))
        for item in reported
        if item.get("digest") == digest and item.get("state") in _REJECTED_STATES
    )


def _files(directory: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, length, time and inode of each file."""
    files = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            files.append((path, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(files))
