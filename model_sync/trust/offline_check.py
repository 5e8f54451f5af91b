"""The check without a network: which versions are signed and which are withdrawn, from the files on this disk alone.

The box calls ``check`` right before it activates a model, from an account that cannot write here. The check does not rely on an earlier
pull: roots, timestamp, snapshot, targets and the role of each model line are verified again, with signatures, versions, hashes and the
rollback state.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from model_sync import atomic_files
from model_sync.errors import MODEL_STAYS, LibraryUnreachable, TrustError
from model_sync.trust import documents
from model_sync.trust.metadata import HISTORY, is_of_other_root, missing, read_root
from model_sync.trust.rollback_protection import ROLLBACK_FILE, RollbackState, iso, utc_now
from model_sync.trust.trusted_metadata import TrustedMetadata, read_index

CURRENT = "trust"  # a link to the newest complete set of metadata and documents


@dataclass(frozen=True)
class ModelLineFacts:
    """What the role of a model line signs about its versions."""

    index: documents.LineIndex
    valid_until: datetime

    def to_dict(self, now: datetime) -> dict[str, Any]:
        """Return the JSON form; ``expired`` is about this model line alone."""
        return {
            "minimum_version": self.index.minimum_version,
            "withdrawn": {item.version: {"reason": item.reason, "at": iso(item.at)} for item in self.index.withdrawn},
            "versions": {item.version: item.digest for item in self.index.versions},
            "valid_until": iso(self.valid_until),
            "expired": now >= self.valid_until,
        }


@dataclass(frozen=True)
class TrustFacts:
    """What is verified about every model line; ``problems`` holds the reason for each line that failed a check."""

    now: datetime
    valid_until: datetime
    lines: Mapping[str, ModelLineFacts]
    problems: Mapping[str, TrustError]

    @property
    def expired(self) -> bool:
        """Whether anything has expired: withdrawals and minimum versions still hold, but nothing new may be activated."""
        return self.now >= self.valid_until

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that ``model-sync check`` prints."""
        return {
            "ok": True,
            "now": iso(self.now),
            "valid_until": iso(self.valid_until),
            "expired": self.expired,
            "lines": {name: line.to_dict(self.now) for name, line in self.lines.items()},
            "troubles": {name: {"code": error.code, "message": error.message} for name, error in self.problems.items()},
        }


def check(exchange_dir: Path, root: Path, now: datetime | None = None) -> TrustFacts:
    """Verify the files in the exchange directory; write nothing, use no network.

    Args:
        exchange_dir: the directory that the agent shares with the box.
        root: the provisioned root.json.
        now: the system clock, for tests.

    Raises:
        TrustError: the metadata failed a check.
        LibraryUnreachable: ``trust.unreadable``: a file cannot be read.
    """
    system = now or utc_now()
    try:
        rollback_state, root_bytes, base = RollbackState.load([exchange_dir / ROLLBACK_FILE]), read_root(root), _current(exchange_dir)
        if is_of_other_root(base / "metadata", root_bytes):
            raise missing("the metadata is of the library that this box followed before; nothing of its new library has been received")
        trusted = TrustedMetadata.load(base / "metadata", root_bytes)
        trusted.refuse_older(rollback_state)
        return collect_facts(trusted, base / "documents", trusted.clocks(rollback_state, system).effective)
    except OSError as error:
        raise atomic_files.disk_error(error, code="trust.unreadable") from error


def _current(exchange_dir: Path) -> Path:
    """Return the directory of the newest set.

    Its link is followed once, so that a pull that ends meanwhile cannot mix two sets; no other link is followed.

    Raises:
        OSError: a link points out of the exchange directory, or replaces a directory.
    """
    link = exchange_dir / CURRENT
    name = os.readlink(link) if link.is_symlink() else CURRENT  # no link yet: no pull has ended
    if "/" in name or name in ("", ".", ".."):
        raise OSError(errno.ELOOP, "its link points out of the exchange directory", str(link))
    base = exchange_dir / name
    for directory in (base, base / "metadata", base / "metadata" / HISTORY, base / "documents"):
        if directory.is_symlink():
            raise OSError(errno.ELOOP, "it is a link instead of a directory", str(directory))
    return base


def collect_facts(trusted: TrustedMetadata, directory: Path, now: datetime) -> TrustFacts:
    """Read the index of every model line whose role is here; where it cannot be verified, the reason is stored."""
    lines: dict[str, ModelLineFacts] = {}
    problems: dict[str, TrustError] = {}
    for name in trusted.line_names():
        try:
            lines[name] = ModelLineFacts(read_index(trusted, directory, name), trusted.valid_until(name))
        except TrustError as error:
            problems[name] = error
    valid_until = min((line.valid_until for line in lines.values()), default=trusted.valid_until())
    return TrustFacts(now, valid_until, lines, problems)


def print_check(exchange_dir: Path, root: Path) -> int:
    """Print one JSON object in every case; return 0 when the facts are verified, 1 when not."""
    try:
        facts = check(exchange_dir, root).to_dict()
    except (TrustError, LibraryUnreachable) as error:
        facts = {"ok": False, "code": error.code, "message": error.message, "hint": error.hint}
    except Exception as error:  # noqa: BLE001  (the caller expects one JSON object: no output would stop every model line without a reason)
        facts = {
            "ok": False,
            "code": "trust.unchecked",
            "message": f"the check failed unexpectedly ({type(error).__name__}): nothing is verified",
            "hint": f"run `model-sync pull`; if it fails again, send this text to the central team; {MODEL_STAYS}",
        }
    # ASCII is the same in every locale; Chinese text in GB18030 would not be valid JSON for a reader of UTF-8.
    print(json.dumps(facts, sort_keys=True))
    return 0 if facts["ok"] else 1
