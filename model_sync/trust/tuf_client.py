"""The TUF client: python-tuf's ``Updater``, a new one per target, with the checks that it does not make.

The Updater checks expiry by the system clock, knows earlier versions only from its own files, writes them without flushing, and
accepts a role that it has loaded before for any delegator. So after each operation the metadata directory is flushed, verified
again from the provisioned root, and compared with the rollback state. Errors of trust, of the link and of the disk stay separate.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import IO, cast

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from model_sync import atomic_files
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.transport.directory_fetcher import LIBRARY_SCHEME
from model_sync.transport.errors import RangeViolation, Refused, TooLong
from model_sync.trust import metadata, trusted_metadata
from model_sync.trust.rollback_protection import BUILT_AT, Clocks, RollbackState, utc_now


def received_bytes(fetcher: FetcherInterface) -> int:
    """Return the bytes received over the link so far; 0 for a USB stick."""
    return int(getattr(fetcher, "received_bytes", 0))


def concerns_one_file(error: LibraryUnreachable) -> bool:
    """Return whether an error concerns one file alone, such as a 404: the link and the other files are not affected."""
    return isinstance(error, (Refused, TooLong, RangeViolation)) and error.final


class _SizeLimitedFetcher(FetcherInterface):
    """A fetcher that refuses metadata announced as too large, which would be held in memory."""

    def __init__(self, fetcher: FetcherInterface) -> None:
        self._fetcher = fetcher

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return one metadata file; ``max_length`` is the length that the role before it has signed."""
        if max_length > metadata.MAX_METADATA_BYTES:
            raise TrustError(
                f"{url.rpartition('/')[2]} is announced with {max_length} bytes; no metadata has more than {metadata.MAX_METADATA_BYTES}",
                code="trust.too_large",
            )
        return self._fetcher.download_bytes(url, max_length)

    @contextlib.contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """Open a target with the inner fetcher."""
        with self._fetcher.download_file(url, max_length) as stream:
            yield stream

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._fetcher.fetch(url)


class TufClient:
    """Refreshes the trusted metadata of one library and downloads its targets.

    Args:
        metadata_dir: python-tuf's directory.
        root: the bytes of the provisioned root.
        fetcher: how files are fetched.
        rollback_state: the file of the rollback state, which is updated here.
        other_rollback_files: copies of it, used when that one is lost.
        metadata_url: where metadata is.
        target_url: where targets are.
        now: the wall clock.
        built_at: when the running program was built.

    Attributes:
        trusted: the metadata as it was last verified; None before the first success.
    """

    def __init__(
        self,
        metadata_dir: Path,
        root: bytes,
        fetcher: FetcherInterface,
        rollback_state: Path,
        other_rollback_files: Sequence[Path] = (),
        *,
        metadata_url: str = f"{LIBRARY_SCHEME}metadata/",
        target_url: str = f"{LIBRARY_SCHEME}targets/",
        now: Callable[[], datetime] = utc_now,
        built_at: datetime = BUILT_AT,
    ) -> None:
        self._metadata_dir = metadata_dir
        self._root = root
        self._fetcher = fetcher
        self._rollback_file = rollback_state
        self._rollback_files = (rollback_state, *other_rollback_files)
        self._urls = (metadata_url, target_url)
        self._now = now
        self._built_at = built_at
        self._flushed: dict[Path, bytes] = {}
        self.trusted: trusted_metadata.TrustedMetadata | None = None

    def cached_metadata(self) -> AbstractContextManager[None]:
        """Cache metadata within the block, so that a new Updater per target downloads nothing again."""
        cached = getattr(self._fetcher, "cached_metadata", None)
        return cast("AbstractContextManager[None]", cached()) if cached else contextlib.nullcontext()

    def refresh(self) -> trusted_metadata.TrustedMetadata:
        """Bring root, timestamp, snapshot and targets up to date.

        After a mirror with old or damaged files the next one is asked. It is an alarm only if no mirror has better files; it is none
        if the files are only old and the other mirrors do not answer.

        Raises:
            LibraryUnreachable: the link, the disk or the state directory failed.
            TrustError: what was received failed a check.
        """
        first: TrustError | None = None
        try:
            while True:
                try:
                    with self._flushed_and_translated():
                        self._updater().refresh()
                    return self._accept()
                except LibraryUnreachable:
                    if first is not None and first.code != "trust.rollback":
                        raise first from None
                    raise
                except TrustError as error:
                    first = first or error
                    if not self._try_next_mirror():
                        raise first from error
        finally:
            self._include_all_mirrors()

    def fetch(
        self, path: str, to: Path, role: str | None = None, *, before: Callable[[str, int], None] = lambda _path, _length: None
    ) -> TargetFile | None:
        """Download one target to ``to``, verified and flushed; a file that is right already is not fetched again.

        Returns None when the library has no such target. Wrong bytes are fetched once more, because the link may have damaged them.

        Args:
            path: the target.
            to: the file to write.
            role: the only role that may sign it; None accepts the role that TUF's search finds.
            before: called with the path and the signed length before a download; raises to refuse it.

        Raises:
            LibraryUnreachable: the link, the disk or the state directory failed.
            TrustError: what was received failed a check; ``trust.digest`` when the bytes were wrong twice.
        """
        with self._flushed_and_translated():
            updater = self._updater()
            target = updater.get_targetinfo(path)
        trusted = self._accept()
        if role is not None and trusted.target(path, role) != target:
            raise TrustError(f"{path} is not signed by {role}, which alone may sign it", code="trust.ambiguous")
        trusted.refuse_expired(self.clocks(), *([role] if role else trusted.delegated_names()))
        if target is None:
            return None
        with self._flushed_and_translated():
            if updater.find_cached_target(target, str(to)) is None:
                before(path, target.length)
                self._download(updater, target, to)
        return target

    def clocks(self) -> Clocks:
        """Return the clocks, by the metadata as it was last verified."""
        rollback_state, server = RollbackState.load(self._rollback_files), getattr(self._fetcher, "last_server_date", None)
        if self.trusted is not None:
            return self.trusted.clocks(rollback_state, self._now(), server, self._built_at)
        newest_root = metadata.load_newest_root(self._metadata_dir, self._root)
        return Clocks(self._now(), rollback_state.earliest_time(newest_root, self._built_at), server)

    def _download(self, updater: Updater, target: TargetFile, to: Path) -> None:
        part = to.with_name(f".{to.name}.part")
        try:
            if updater.find_cached_target(target, str(part)) is None:  # true when the process was killed before the rename
                self._download_with_retries(updater, target, part)
            atomic_files.sync_file(part)
            part.replace(to)
        finally:
            part.unlink(missing_ok=True)
        atomic_files.sync_directory(to.parent)

    def _download_with_retries(self, updater: Updater, target: TargetFile, part: Path) -> None:
        """Download; wrong bytes, which the fetcher has deleted, are fetched once more, and then from each other mirror."""
        may_repeat = True
        try:
            while True:
                try:
                    updater.download_target(target, str(part))
                    return
                except tuf_errors.LengthOrHashMismatchError:
                    if not may_repeat and not self._try_next_mirror():
                        raise
                    may_repeat = False
        finally:
            self._include_all_mirrors()

    def _try_next_mirror(self) -> bool:
        """Exclude the mirror that answered last; return whether there is another."""
        exclude_last_mirror = getattr(self._fetcher, "exclude_last_mirror", None)
        return bool(exclude_last_mirror and exclude_last_mirror())

    def _include_all_mirrors(self) -> None:
        getattr(self._fetcher, "include_all_mirrors", lambda: None)()

    def _updater(self) -> Updater:
        metadata_url, target_url = self._urls
        self._metadata_dir.mkdir(parents=True, exist_ok=True)
        return Updater(
            str(self._metadata_dir),
            metadata_url,
            target_base_url=target_url,
            fetcher=_SizeLimitedFetcher(self._fetcher),
            config=UpdaterConfig(
                app_user_agent="model-sync",
                snapshot_max_length=metadata.MAX_METADATA_BYTES,
                targets_max_length=metadata.MAX_METADATA_BYTES,
            ),
            bootstrap=self._root,
        )

    def _accept(self) -> trusted_metadata.TrustedMetadata:
        """Verify the Updater's files, the rollback state and expiry; then update the rollback state."""
        with self._flushed_and_translated():
            trusted = trusted_metadata.TrustedMetadata.load(self._metadata_dir, self._root)
            rollback_state = RollbackState.load(self._rollback_files)
            trusted.refuse_older(rollback_state)
            self.trusted = trusted
            clocks = self.clocks()
            trusted.refuse_expired(clocks)
            updated = rollback_state.advance(trusted.root, trusted.timestamp, trusted.snapshot, clocks, trusted.valid_until())
            if updated is not rollback_state:
                updated.save(self._rollback_file)
        return trusted

    @contextlib.contextmanager
    def _flushed_and_translated(self) -> Iterator[None]:
        """Flush what the operation wrote, and translate its errors."""
        try:
            try:
                yield
            finally:
                self._flush()
        except LibraryUnreachable:
            raise  # the fetcher's errors are both python-tuf's and ours
        except tuf_errors.DownloadError as error:
            raise LibraryUnreachable(f"the library cannot be reached: {error}") from error
        except tuf_errors.RepositoryError as error:
            raise self._trust_error(error) from error
        except OSError as error:
            raise atomic_files.disk_error(error) from error

    def _flush(self) -> None:
        """Flush the metadata files whose content this process has not flushed yet, and their directories.

        The content is compared because python-tuf writes the provisioned root again each time.
        """
        changed = False
        for file in atomic_files.iterate_files(self._metadata_dir):
            content = hashlib.sha256(file.read_bytes()).digest()
            if not file.is_symlink() and self._flushed.get(file) != content:
                atomic_files.sync_file(file)
                self._flushed[file] = content
                changed = True
        if changed:
            atomic_files.sync_directory(self._metadata_dir / "root_history")
            atomic_files.sync_directory(self._metadata_dir)

    def _trust_error(self, error: tuf_errors.RepositoryError) -> TrustError:
        """Return our error for an error of python-tuf."""
        if isinstance(error, tuf_errors.ExpiredMetadataError):
            clocks = self.clocks()
            message = f"the library's metadata has expired ({error}): {clocks.describe()}"
            return TrustError(message, hint=clocks.hint(), code="trust.expired")
        if isinstance(error, tuf_errors.BadVersionNumberError):
            return TrustError(f"the library offers older metadata than this box has seen ({error})", code="trust.rollback")
        if isinstance(error, tuf_errors.LengthOrHashMismatchError):
            return metadata.altered(f"a file of the library ({error})")
        if isinstance(error, tuf_errors.UnsignedMetadataError):
            return TrustError(f"metadata is not signed by those who may sign it ({error})", code="trust.signature")
        return TrustError(f"the library's metadata cannot be used ({error})", code="trust.metadata")
