"""The view of the library at one moment: the rollout of the ring, and the index of each model line that matters to this box.

A model line whose documents are missing, expired or wrong is a problem of that line alone: the other lines are still read, and their
new documents, such as a withdrawal, are given to the box. Only a failure of the link, the disk or the complete library ends a poll.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from model_sync.agent.exchange import Exchange, Source
from model_sync.errors import MODEL_STAYS, Action, LibraryUnreachable, ModelSyncError, SettingsError, TrustError
from model_sync.settings import SyncSettings
from model_sync.transport.errors import Refused
from model_sync.trust import documents, trusted_metadata
from model_sync.trust.documents import LineIndex, Rollout
from model_sync.trust.rollback_protection import RollbackState
from model_sync.trust.trusted_metadata import TrustedMetadata
from model_sync.trust.tuf_client import TufClient, concerns_one_file

# More than the largest index or rollout that `documents` accepts; each is read into memory, here and by `check`.
MAX_DOCUMENT_BYTES = 2 * 1024 * 1024
# Up to this length a document may use the disk reserve: a withdrawal must arrive on a nearly full disk too.
_SMALL_DOCUMENT_BYTES = 256 * 1024


@dataclass(frozen=True)
class LibraryView:
    """The library at one moment.

    Attributes:
        trusted: the verified metadata.
        rollout: the rollout of this ring; None when there is none, or none that could be fetched and verified.
        indexes: the indexes of the model lines that could be fetched and verified.
        problems: by model line (or ``rollout``), why its document could not be fetched or verified.
        absent: model lines that a USB stick does not carry.
    """

    trusted: TrustedMetadata
    rollout: Rollout | None
    indexes: Mapping[str, LineIndex]
    problems: Mapping[str, ModelSyncError]
    absent: frozenset[str] = frozenset()


@dataclass
class LibraryPoller:
    """Polls one library, and gives its verified metadata and documents to the box.

    Attributes:
        settings: the agent's settings.
        exchange: the directory shared with the box.
        tuf_client: the TUF client of the library.
        source: whether the library is on a USB stick.
        metadata: python-tuf's directory.
        documents_dir: where verified documents are stored.
        rollback_files: the copies of the rollback state.
    """

    settings: SyncSettings
    exchange: Exchange
    tuf_client: TufClient
    source: Source
    metadata: Path
    documents_dir: Path
    rollback_files: tuple[Path, ...]

    def poll(self) -> LibraryView:
        """Refresh, read the rollout and the index of every model line that matters here, and give the complete set to the box.

        Raises:
            LibraryUnreachable: the link, the disk or the state directory failed.
            TrustError: the library is not trusted.
        """
        trusted = self.tuf_client.refresh()
        problems: dict[str, ModelSyncError] = {}
        rollout = self._rollout(trusted, problems)
        followed = set(self.settings.lines or (rollout.lines if rollout else ()))
        here, known = self.exchange.known_lines(), set(trusted.line_names())
        indexes, absent = {}, set()
        for line in sorted((followed | here) & known):
            try:
                index = self._index(line)
            except (TrustError, LibraryUnreachable) as error:
                if self.source == "usb" and line not in self.settings.lines and _is_absent(error):
                    absent.add(line)  # a stick need not carry every model line
                else:
                    problems[line] = self._problem_of_part(line, error)
            else:
                if index is not None:
                    indexes[line] = index
        # A model line that the box only reports may never have been in the library: it may have been installed with the box.
        managed = set(self.exchange.directives()) | {bundle.manifest.name for bundle in self.exchange.bundles()}
        for line in (followed | managed) - known:
            problems[line] = _ended_error(line) if line in here or (rollout and line in rollout.lines) else _unknown_error(line)
        trusted = self.tuf_client.trusted or trusted
        self.exchange.publish_metadata(self.metadata, self.documents_dir, trusted, RollbackState.load(self.rollback_files))
        return LibraryView(trusted, rollout, indexes, problems, frozenset(absent))

    def _rollout(self, trusted: TrustedMetadata, problems: dict[str, ModelSyncError]) -> Rollout | None:
        """Return the rollout of this ring; None when there is none, or when it could not be fetched or verified."""
        path, role = documents.rollout_path(self.settings.ring), documents.ROLLOUT_ROLE
        if role not in trusted.delegated_names():
            return None
        try:
            raw = self._document(path, role)
            rollout = Rollout.parse(raw) if raw is not None else None
            if rollout is not None and rollout.ring != self.settings.ring:
                raise TrustError(f"{path} is signed for the ring {rollout.ring}", code="trust.document", action=Action.OPERATOR)
        except (TrustError, LibraryUnreachable) as error:
            problems[role] = self._problem_of_part(role, error)
            return None
        return rollout

    def _index(self, line: str) -> LineIndex | None:
        if self._document(documents.line_path(line), line) is None:
            return None
        return trusted_metadata.read_index(cast("TrustedMetadata", self.tuf_client.trusted), self.documents_dir, line)

    def _document(self, path: str, role: str) -> bytes | None:
        (self.documents_dir / path).parent.mkdir(parents=True, exist_ok=True)
        if self.tuf_client.fetch(path, self.documents_dir / path, role, before=self._require_small) is None:
            return None
        return trusted_metadata.read_document(cast("TrustedMetadata", self.tuf_client.trusted), self.documents_dir, path, role)

    def _require_small(self, path: str, length: int) -> None:
        """Raise before the first byte when a document is too large, or would use up the disk reserve."""
        if length > MAX_DOCUMENT_BYTES:
            raise TrustError(
                f"{path} is signed with {length} bytes; no document has more than {MAX_DOCUMENT_BYTES}", code="trust.too_large"
            )
        free = shutil.disk_usage(self.documents_dir).free - self.settings.disk_reserve_bytes
        if length > _SMALL_DOCUMENT_BYTES and length > free:
            raise LibraryUnreachable(
                f"{path} needs {length} bytes of disk space, and {max(0, free)} are free above the reserve",
                code="sync.disk_full",
                action=Action.OPERATOR,
            )

    def _problem_of_part(self, part: str, error: TrustError | LibraryUnreachable) -> ModelSyncError:
        """Return the problem of one model line or of the rollout; raise an error that concerns the complete library."""
        if isinstance(error, LibraryUnreachable):
            if not concerns_one_file(error):
                raise error
            return missing_on_server_error(part, error) if is_missing_on_server(error) else error
        if error.code != "trust.expired":
            return error
        clocks = self.tuf_client.clocks()
        wrong_clock = not clocks.is_plausible or clocks.system < clocks.earliest
        return TrustError(
            f"what {part} has signed is no longer valid: {error.message}",
            hint=clocks.hint()
            if wrong_clock
            else f"the central team has to sign it again (`model-library renew LIB {part}`); {MODEL_STAYS}",
            code="trust.part_expired",
            action=Action.WAIT,
        )


def is_missing_on_server(error: ModelSyncError) -> bool:
    """Return whether a server or a stick answered that it does not have a file."""
    return isinstance(error, Refused) and error.status_code in (403, 404, 410)


def missing_on_server_error(part: str, error: ModelSyncError) -> LibraryUnreachable:
    """Return the error for a file that is signed and that the library's server does not have."""
    return LibraryUnreachable(f"the library's server lacks a file of {part}: {error.message}", code="sync.incomplete")


def _is_absent(error: ModelSyncError) -> bool:
    return isinstance(error, LibraryUnreachable) and concerns_one_file(error)


def _ended_error(line: str) -> TrustError:
    return TrustError(
        f"the library has ended the model line {line}: its valid metadata no longer names it", code="trust.line_ended", action=Action.NONE
    )


def _unknown_error(line: str) -> SettingsError:
    return SettingsError(
        f"the settings follow the model line {line}, which the library does not have",
        hint=f"compare `lines` in sync.toml with the central team's list; {MODEL_STAYS}",
    )
