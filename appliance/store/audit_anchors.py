"""Anchors of the audit: its head at intervals, in a file of its own beside the database, append-only and flushed (requirement R10).

A database that was replaced by an older copy, or emptied, does not match them. Each line has a MAC over itself and the line before it;
the database knows how many lines there were, so that a shortened file is found as well. The sync agent takes the newest head to the
centre in its signed report (``model_sync.agent.report``).
"""

from __future__ import annotations

import fcntl
import hmac
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, Annotated, Final

from pydantic import BaseModel, Field, StringConstraints

from appliance.core.domain import utc_now
from appliance.store import audit
from appliance.store.audit import Head, Problem
from model_sync import atomic_files

logger = logging.getLogger(__name__)

ANCHORS_NAME: Final = "audit.anchors"
CONFIRMED_NAME: Final = "audit-anchor.json"
_INTERVAL: Final = timedelta(hours=1)
_MAX_ENTRIES: Final = 500
_META: Final = "audit_anchors"
_LINE: Final = re.compile(
    r"(\d{4}(?:-\d\d){2}T\d\d(?::\d\d){2}\.\d{3}\+00:00) ([1-9]\d{0,17}) ([0-9a-f]{64}) ([0-9a-f]{16}) ([0-9a-f]{64})", re.ASCII
)
_MAX_CONFIRMED_BYTES: Final = 1 << 20
_NEVER: Final = "1970-01-01T00:00:00.000+00:00"
# A larger number in a line whose MAC cannot be checked is no number of a box: at a thousand entries a second it takes 30,000 years.
_MAX_CREDIBLE: Final = 10**15


@dataclass(frozen=True)
class Anchor:
    """One line: when it was written, the head, the key that sealed it, and its MAC."""

    at: str
    head: Head
    key: str
    mac: str

    @property
    def sealed(self) -> str:
        """What the MAC is over, with the MAC of the line before it."""
        return f"{self.at} {self.head} {self.key}"


class ConfirmedAnchor(BaseModel, frozen=True):
    """The file ``audit-anchor.json``: the head of the audit in the last report that the centre took."""

    entries: Annotated[int, Field(ge=0, lt=2**53)]
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class AnchorFile:
    """The anchors of one box.

    Args:
        data_dir: where the file is, beside the database.
        exchange_dir: where the sync agent says what the centre has confirmed; None on a box without one.
        key: the audit key.
        snapshot: opens a read transaction.
        transaction: opens a durable write transaction.
    """

    def __init__(
        self,
        data_dir: Path,
        exchange_dir: Path | None,
        key: bytes,
        snapshot: Callable[[], AbstractContextManager[sqlite3.Connection]],
        transaction: Callable[[], AbstractContextManager[sqlite3.Connection]],
    ) -> None:
        self.path, self._exchange_dir = data_dir / ANCHORS_NAME, exchange_dir
        self._key, self._snapshot, self._transaction = key, snapshot, transaction
        self._key_name = audit.seal(key, "key").rpartition(" ")[2][:16]

    def read(self) -> list[Anchor]:
        """Every complete line; a torn last one, of a power cut, was never in use."""
        return _read(self.path)

    def confirmed(self) -> Head | None:
        """The head of the audit that the centre has; None where the sync agent has not said so."""
        return _confirmed_head(self._exchange_dir)

    def verify(self) -> audit.Inspection:
        """Inspect the audit of this moment, with the anchors and with the head that the centre confirmed last.

        The chain and its head are read in one transaction, so that a box at work is never taken for a changed one.
        """
        known, anchors = self._known_and_lines()  # before the snapshot, which therefore contains whatever they name
        heads = self._heads(anchors)
        with self._snapshot() as connection:
            return audit.inspect(connection, heads, self._problems(connection, anchors, known))

    def _known_and_lines(self) -> tuple[str, list[Anchor]]:
        """What the database knows of the lines, and the lines, of which there are at least as many."""
        for _ in range(2):  # the very first line may have been written in between: what it follows is known by then
            with self._snapshot() as connection:
                known = audit.unseal(connection, _META)
            anchors = self.read()
            if known or not anchors:
                break
        return known, anchors

    def take(self) -> bool:
        """Write the head of this moment where the last anchor is an hour or 500 entries old; returns whether it was written."""
        with self._locked() as file:
            anchors = _lines(file)
            if not self._is_due(anchors[-1] if anchors else None):
                return False
            with self._transaction() as tx:  # its commit makes every entry before it durable, before an anchor names them
                known = audit.unseal(tx, _META)
                if _is_shortened(anchors, known):
                    audit.record_break(tx, f"anchors {_state(anchors)}", f"anchors {known}")
                _remember(tx, anchors)
                head = audit.head(tx)
            previous = anchors[-1].mac if anchors else audit.GENESIS
            unsigned = Anchor(utc_now(), head, self._key_name, "")
            anchor = replace(unsigned, mac=self._mac(previous, unsigned.sealed))
            file.write(f"{anchor.sealed} {anchor.mac}\n".encode())
            atomic_files.flush(file)
            with self._transaction() as tx:  # where a power cut prevents this, the next anchor makes up for it
                _remember(tx, [*anchors, anchor])
        return True

    def acknowledge(self, actor: str, reason: str) -> list[Problem]:
        """Record that a person has seen every problem that there is; returns them. What happens later is found again."""
        with self._locked() as file, self._transaction() as tx:
            anchors = _lines(file)
            problems = audit.acknowledge(tx, actor, reason, self._heads(anchors), self._problems(tx, anchors, audit.unseal(tx, _META)))
            _remember(tx, anchors)
        return problems

    def _heads(self, anchors: list[Anchor]) -> list[Head]:
        """Every head that was kept outside the database."""
        confirmed = self.confirmed()
        return [anchor.head for anchor in anchors] + ([confirmed] if confirmed else [])

    def _is_due(self, last: Anchor | None) -> bool:
        with self._snapshot() as connection:
            head = audit.head(connection)
        if last is None or not head.seq:
            return head.seq > 0
        age = abs(datetime.now(timezone.utc) - datetime.fromisoformat(last.at))  # a clock may be set back
        return head != last.head and (age >= _INTERVAL or not 0 <= head.seq - last.head.seq < _MAX_ENTRIES)

    def _problems(self, connection: sqlite3.Connection, anchors: list[Anchor], known: str) -> list[Problem]:
        """The lines that were changed, and a file that does not begin with the lines that the database knows.

        A line of another key is one from before the key was replaced, which the chain says. Only its head can be compared.
        """
        replaced = audit.last_key_replacement(connection)
        previous, is_of_present, problems = audit.GENESIS, False, []
        for number, anchor in enumerate(anchors, 1):
            if anchor.key == self._key_name:
                is_of_present, is_whole = True, hmac.compare_digest(anchor.mac, self._mac(previous, anchor.sealed))
            else:
                is_whole = not is_of_present and 0 < anchor.head.seq < replaced
            if not is_whole:
                problems.append(audit.problem("audit.anchor_changed", anchor.sealed, anchor.mac, number=number, name=ANCHORS_NAME))
            previous = anchor.mac
        if _is_shortened(anchors, known):
            problems.append(audit.problem("audit.anchors_shortened", known, _state(anchors), name=ANCHORS_NAME))
        return problems

    def _mac(self, previous: str, line: str) -> str:
        return hmac.new(self._key, f"{previous}\n{line}".encode(), "sha256").hexdigest()

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, open for appending, and for no other process at the same time."""
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(descriptor, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_new:
                atomic_files.sync_directory(self.path.parent)
            yield file


def highest_number(data_dir: Path, exchange_dir: Path | None) -> int:
    """The highest number of an entry that is known outside the database, whoever wrote it: no entry gets a lower one after a break."""
    confirmed = _confirmed_head(exchange_dir)
    try:
        heads = [anchor.head for anchor in _read(data_dir / ANCHORS_NAME)] + ([confirmed] if confirmed else [])
    except OSError:  # the entry about the break is the more important one
        logger.exception("the anchors of the audit cannot be read")
        return 0
    return max((head.seq for head in heads if head.seq < _MAX_CREDIBLE), default=0)


def _confirmed_head(exchange_dir: Path | None) -> Head | None:
    if exchange_dir is None:
        return None
    try:
        anchor = ConfirmedAnchor.model_validate_json(atomic_files.read(exchange_dir / CONFIRMED_NAME, _MAX_CONFIRMED_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("invalid file of the sync agent", extra={"code": "exchange.invalid", "status": type(error).__name__})
        return None
    return Head(anchor.entries, anchor.digest)


def _read(path: Path) -> list[Anchor]:
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return []


def _lines(file: IO[bytes]) -> list[Anchor]:
    """Every complete line; the rest of a torn one is cut off, so that the next line begins where it should."""
    data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.ftruncate(file.fileno(), len(whole))
    return _parse(whole)


def _parse(data: bytes) -> list[Anchor]:
    return [_parse_line(line) for line in data.decode("latin-1").split("\n")[:-1]]


def _parse_line(line: str) -> Anchor:
    """An anchor; a line that is none gives one with the number 0, which no line of the box has."""
    if fields := _LINE.fullmatch(line):
        with suppress(ValueError):
            datetime.fromisoformat(fields[1])
            return Anchor(fields[1], Head(int(fields[2]), fields[3]), fields[4], fields[5])
    return Anchor(_NEVER, Head(0, line), "", "")


def _state(anchors: list[Anchor]) -> str:
    """How many lines there are, and a digest of all of them."""
    digest = audit.GENESIS
    for anchor in anchors:
        digest = audit.chain(digest, f"{anchor.sealed} {anchor.mac}")
    return f"{len(anchors)} {digest}"


def _is_shortened(anchors: list[Anchor], known: str) -> bool:
    """Whether the file does not begin with the lines that the database knows; from the first line on it always knows them."""
    if not known:
        return bool(anchors)
    count = int(known.partition(" ")[0])
    by_mac = f"{count} {anchors[count - 1].mac}" if 0 < count <= len(anchors) else ""  # as development versions of 0.2.0 sealed it
    return known not in (_state(anchors[:count]), by_mac)


def _remember(tx: sqlite3.Connection, anchors: list[Anchor]) -> None:
    tx.execute("INSERT OR REPLACE INTO meta VALUES (?, audit_seal(?))", (_META, _state(anchors)))
