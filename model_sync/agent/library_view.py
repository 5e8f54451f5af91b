"""A look at the library: what it says at one moment about the ring, and about each line that matters to this box.

A line whose documents are missing, expired or wrong is a trouble of that line alone: the others are looked at all the same, and
what was learned, a withdrawal above all, is laid before the box. Only a line, a disk or a library that fails as a whole ends a look.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from model_sync.agent.exchange import Exchange, Source
from model_sync.errors import LibraryUnreachable, ModelSyncError, SettingsError, TrustError
from model_sync.settings import SyncSettings
from model_sync.transport.errors import Refused
from model_sync.trust import documents, trusted_metadata
from model_sync.trust.documents import LineIndex, Rollout
from model_sync.trust.rollback_protection import Floors
from model_sync.trust.trusted_metadata import Chain
from model_sync.trust.tuf_client import Upstream, of_one_file

# More than the fullest index or rollout that `documents` takes; each has to be read whole into memory, here and by `check`.
MAX_DOCUMENT_BYTES = 2 * 1024 * 1024
# Up to this length a document may use the disk's reserve: a withdrawal must arrive on a disk that is nearly full as well.
_SMALL_DOCUMENT_BYTES = 256 * 1024
_KEEP = "the model in use stays"


@dataclass(frozen=True)
class Look:
    """What the library says at one moment.

    Attributes:
        rollout: that of this ring; None when there is none, or none that can be had and believed.
        indexes: of the lines that could be had and believed.
        problems: by line (or ``rollout``), why something of it could not.
        absent: lines that a stick does not carry.
    """

    chain: Chain
    rollout: Rollout | None
    indexes: Mapping[str, LineIndex]
    problems: Mapping[str, ModelSyncError]
    absent: frozenset[str] = frozenset()


class Looker:
    """Looks at one library, and lays what it says before the box.

    Args:
        settings: the agent's.
        exchange: the box's directory.
        upstream: the library.
        source: whether that is a stick.
        metadata: python-tuf's directory.
        copies: where verified documents are kept.
        floor_files: the copies of the floors.
    """

    def __init__(
        self,
        settings: SyncSettings,
        exchange: Exchange,
        upstream: Upstream,
        source: Source,
        metadata: Path,
        copies: Path,
        floor_files: tuple[Path, ...],
    ) -> None:
        """Prepare; nothing is fetched."""
        self._settings = settings
        self._exchange = exchange
        self._upstream = upstream
        self._source = source
        self._metadata = metadata
        self._copies = copies
        self._floor_files = floor_files

    def look(self) -> Look:
        """Refresh, read the rollout and the index of every line that matters here, and lay the whole set before the box.

        Raises:
            LibraryUnreachable: the line, the disk or the state directory failed.
            TrustError: the library as a whole cannot be believed.
        """
        chain = self._upstream.refresh()
        problems: dict[str, ModelSyncError] = {}
        rollout = self._rollout(chain, problems)
        asked = set(self._settings.lines or (rollout.lines if rollout else ()))
        here, known = self._exchange.installed_lines(), set(chain.line_names())
        indexes, absent = {}, set()
        for line in sorted((asked | here) & known):
            try:
                index = self._index(line)
            except (TrustError, LibraryUnreachable) as error:
                if self._source == "usb" and line not in self._settings.lines and _is_absent(error):
                    absent.add(line)  # a stick need not carry every line; what is not on it stays as it is
                else:
                    problems[line] = self._of_part(line, error)
            else:
                if index is not None:
                    indexes[line] = index
        # A line that the box merely reports may never have been the library's: it may have come with the box.
        told = set(self._exchange.directives()) | {bundle.manifest.name for bundle in self._exchange.bundles()}
        for line in (asked | told) - known:
            problems[line] = _ended(line) if line in here or (rollout and line in rollout.lines) else _unknown(line)
        chain = self._upstream.chain or chain
        self._exchange.publish(self._metadata, self._copies, chain, Floors.load(self._floor_files))
        return Look(chain, rollout, indexes, problems, frozenset(absent))

    def _rollout(self, chain: Chain, problems: dict[str, ModelSyncError]) -> Rollout | None:
        """Return this ring's rollout; None when the library has none, or one that cannot be had or believed."""
        path, role = documents.rollout_path(self._settings.ring), documents.ROLLOUT_ROLE
        if role not in chain.delegated_names():
            return None
        try:
            raw = self._document(path, role)
            rollout = Rollout.parse(raw) if raw is not None else None
            if rollout is not None and rollout.ring != self._settings.ring:
                raise TrustError(
                    f"{path} is signed for the ring {rollout.ring}", hint=f"tell the central team; {_KEEP}", code="trust.document"
                )
        except (TrustError, LibraryUnreachable) as error:
            problems[role] = self._of_part(role, error)
            return None
        return rollout

    def _index(self, line: str) -> LineIndex | None:
        if self._document(documents.line_path(line), line) is None:
            return None
        return trusted_metadata.read_index(cast("Chain", self._upstream.chain), self._copies, line)

    def _document(self, path: str, role: str) -> bytes | None:
        (self._copies / path).parent.mkdir(parents=True, exist_ok=True)
        if self._upstream.fetch(path, self._copies / path, role, before=self._require_small) is None:
            return None
        return trusted_metadata.read_document(cast("Chain", self._upstream.chain), self._copies, path, role)

    def _require_small(self, path: str, length: int) -> None:
        """Refuse a document that is none, or that would take the disk's reserve, before its first byte."""
        if length > MAX_DOCUMENT_BYTES:
            raise TrustError(
                f"{path} is signed with {length} bytes; no document has more than {MAX_DOCUMENT_BYTES}",
                hint=f"tell the central team: it was signed by mistake or in bad faith; {_KEEP}",
                code="trust.too_large",
            )
        free = shutil.disk_usage(self._copies).free - self._settings.disk_reserve_bytes
        if length > _SMALL_DOCUMENT_BYTES and length > free:
            raise LibraryUnreachable(
                f"{path} needs {length} bytes of disk space, and {max(0, free)} are free above the reserve",
                hint=f"free some disk space; it then comes by itself; {_KEEP}",
                code="sync.disk_full",
            )

    def _of_part(self, part: str, error: TrustError | LibraryUnreachable) -> ModelSyncError:
        """Return what is wrong with one line, or with the rollout, alone; raises what is wrong with everything."""
        if isinstance(error, LibraryUnreachable):
            if not of_one_file(error):
                raise error
            return lacking(part, error) if is_missing(error) else error
        if error.code != "trust.expired":
            return error
        clocks = self._upstream.clocks()
        wrong_clock = not clocks.plausible or clocks.system < clocks.floor
        return TrustError(
            f"what {part} has signed is no longer valid: {error.message}",
            hint=clocks.hint() if wrong_clock else f"the central team has to sign it anew (`model-library renew LIB {part}`); {_KEEP}",
            code="trust.part_expired",
        )


def is_missing(error: ModelSyncError) -> bool:
    """Say whether a server or a stick answered that it has not got a file."""
    return isinstance(error, Refused) and error.status_code in (403, 404, 410)


def lacking(part: str, error: ModelSyncError) -> LibraryUnreachable:
    """Return the error for a file that the library has signed and its server does not have."""
    return LibraryUnreachable(
        f"the library's server lacks a file of {part}: {error.message}",
        hint=f"the central team has to look at the web server, or to copy the library there again; it then comes by itself; {_KEEP}",
        code="sync.incomplete",
    )


def _is_absent(error: ModelSyncError) -> bool:
    return isinstance(error, LibraryUnreachable) and of_one_file(error)


def _ended(line: str) -> TrustError:
    return TrustError(
        f"the library has ended the line {line}: validly signed, it names the line no more",
        hint=f"nothing: there are no new versions of it; {_KEEP}",
        code="trust.line_ended",
    )


def _unknown(line: str) -> SettingsError:
    return SettingsError(
        f"the settings follow the line {line}, which the library does not have",
        hint=f"compare `lines` in sync.toml with the central team's list; {_KEEP}",
    )
