"""What this box may believe, from the metadata it has on its disk alone: offline, read-only, from the provisioned root.

``check`` is asked right before a model is put to work, by an account that cannot write here: which versions the library's
line roles have signed, which of them are withdrawn, and until when that holds. It trusts nothing that an earlier pull
concluded: root by root, then timestamp, snapshot, targets and each line's role, signatures, versions and hashes are checked
again, with the time and the versions that the floor knows. The refresh (``model_sync.trust.tuf_client``) is checked by the same chain.
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
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.trust import documents
from model_sync.trust.metadata import HISTORY, KEEP, foreign, missing, read_root
from model_sync.trust.rollback_protection import FLOOR_FILE, Floors, iso, utc_now
from model_sync.trust.trusted_metadata import Chain, read_index

CURRENT = "trust"  # a link to the newest whole set of metadata and documents


@dataclass(frozen=True)
class LineFacts:
    """What a line's role signs about its versions."""

    index: documents.LineIndex
    valid_until: datetime

    def to_dict(self, now: datetime) -> dict[str, Any]:
        """Return the JSON form; ``expired`` says it of this line alone, whatever has become of the others."""
        return {
            "minimum_version": self.index.minimum_version,
            "withdrawn": {item.version: {"reason": item.reason, "at": iso(item.at)} for item in self.index.withdrawn},
            "versions": {item.version: item.digest for item in self.index.versions},
            "valid_until": iso(self.valid_until),
            "expired": now >= self.valid_until,
        }


@dataclass(frozen=True)
class Facts:
    """What may be believed about every line; ``troubles`` are lines that cannot be believed, and why."""

    now: datetime
    valid_until: datetime
    lines: Mapping[str, LineFacts]
    troubles: Mapping[str, TrustError]

    @property
    def expired(self) -> bool:
        """Say whether anything has expired: its withdrawals and minimum still hold, nothing new of it may be put to work."""
        return self.now >= self.valid_until

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that ``model-sync check`` prints."""
        return {
            "ok": True,
            "now": iso(self.now),
            "valid_until": iso(self.valid_until),
            "expired": self.expired,
            "lines": {name: line.to_dict(self.now) for name, line in self.lines.items()},
            "troubles": {name: {"code": error.code, "message": error.message} for name, error in self.troubles.items()},
        }


def check(exchange_dir: Path, root: Path, now: datetime | None = None) -> Facts:
    """Verify what lies in the exchange directory; writes nothing, asks nobody.

    Args:
        exchange_dir: the directory that the agent shares with the box.
        root: the provisioned root.json.
        now: the system clock, for tests.

    Raises:
        TrustError: the metadata cannot be believed.
        LibraryUnreachable: ``trust.unreadable``: a file cannot be read.
    """
    system = now or utc_now()
    try:
        floors = Floors.load([exchange_dir / FLOOR_FILE])
        return _facts(exchange_dir, read_root(root), floors, system)
    except OSError as error:
        raise atomic_files.disk_trouble(error, code="trust.unreadable") from error


def _facts(exchange_dir: Path, root: bytes, floors: Floors, system: datetime) -> Facts:
    base = _current(exchange_dir)
    if foreign(base / "metadata", root):
        raise missing("what lies here is of the library that this box followed before; nothing of its new one has been received")
    chain = Chain.load(base / "metadata", root)
    chain.refuse_older(floors)
    return facts_of(chain, base / "documents", chain.clocks(floors, system).effective)


def _current(exchange_dir: Path) -> Path:
    """Return the newest set. Its link is followed once, so that a pull that ends meanwhile cannot mix two; no other is followed.

    Raises:
        OSError: a link leads out of the exchange directory, or stands where none belongs.
    """
    link = exchange_dir / CURRENT
    name = os.readlink(link) if link.is_symlink() else CURRENT  # without a link no pull has ended yet
    if "/" in name or name in ("", ".", ".."):
        raise OSError(errno.ELOOP, "its link leads out of the exchange directory", str(link))
    base = exchange_dir / name
    for directory in (base, base / "metadata", base / "metadata" / HISTORY, base / "documents"):
        if directory.is_symlink():
            raise OSError(errno.ELOOP, "a link stands where a directory belongs", str(directory))
    return base


def facts_of(chain: Chain, directory: Path, now: datetime) -> Facts:
    """Read the index of every line whose role is here; a line without one is left out, with the reason."""
    lines: dict[str, LineFacts] = {}
    troubles: dict[str, TrustError] = {}
    for name in chain.line_names():
        try:
            lines[name] = LineFacts(read_index(chain, directory, name), chain.valid_until(name))
        except TrustError as error:
            troubles[name] = error
    valid_until = min((line.valid_until for line in lines.values()), default=chain.valid_until())
    return Facts(now, valid_until, lines, troubles)


def print_check(exchange_dir: Path, root: Path) -> int:
    """Print the facts as one JSON object, whatever it meets; returns 0 when they are verified, 1 when not."""
    try:
        facts = check(exchange_dir, root).to_dict()
    except (TrustError, LibraryUnreachable) as error:
        facts = {"ok": False, "code": error.code, "message": error.message, "hint": error.hint}
    except Exception as error:  # noqa: BLE001  (whoever asks reads one JSON object: no answer would stop every line, with no reason)
        facts = {
            "ok": False,
            "code": "trust.unchecked",
            "message": f"the check met what it cannot reckon with ({type(error).__name__}): nothing is verified",
            "hint": f"run `model-sync pull`; if it stays, send this line to the central team; {KEEP}",
        }
    # In ASCII, which every locale writes alike: in GB18030 a reason in Chinese would be no JSON to whoever reads UTF-8.
    print(json.dumps(facts, sort_keys=True))
    return 0 if facts["ok"] else 1
