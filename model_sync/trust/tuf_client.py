"""One library as this box follows it: python-tuf's ``Updater``, a fresh one per target, and what it leaves open closed.

The Updater judges expiry by the system clock, remembers versions only by the files it keeps, writes them without flushing,
and accepts a role it has loaded before for any delegator. So after each operation the metadata directory is flushed, verified
again as a chain from the provisioned root, and compared with the floors. Its errors, the line's and the disk's come out apart.
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
from tuf.api.metadata import Root, TargetFile
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from model_sync import atomic_files
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.transport.errors import RangeViolation, Refused, TooLong
from model_sync.transport.fetcher import LIBRARY_SCHEME
from model_sync.trust import metadata, trusted_metadata
from model_sync.trust.rollback_protection import BUILT_AT, Clocks, Floors, utc_now

_RETRY = "nothing is wrong with the model in use; the next look goes on where this one stopped"


def received_bytes(fetcher: FetcherInterface) -> int:
    """Return the bytes that came over the line so far; a stick has none to count."""
    return int(getattr(fetcher, "received_bytes", 0))


def of_one_file(error: LibraryUnreachable) -> bool:
    """Say whether an error is an answer about one file alone, such as a 404: the line and the other files are as good as ever."""
    return isinstance(error, (Refused, TooLong, RangeViolation)) and error.final


class _Capped(FetcherInterface):
    """A fetcher that refuses metadata which is announced with more than can be read again: signed or not, it is held in memory."""

    def __init__(self, fetcher: FetcherInterface) -> None:
        self._fetcher = fetcher

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return one metadata file; python-tuf asks with the length that the role before it has signed."""
        if max_length > metadata.MAX_METADATA_BYTES:
            raise TrustError(
                f"{url.rpartition('/')[2]} is announced with {max_length} bytes; no metadata has more than {metadata.MAX_METADATA_BYTES}",
                hint="tell the central team: it was signed by mistake or in bad faith; the model in use stays",
                code="trust.too_large",
            )
        return self._fetcher.download_bytes(url, max_length)

    @contextlib.contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """Pass on a target."""
        with self._fetcher.download_file(url, max_length) as stream:
            yield stream

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._fetcher.fetch(url)


class Upstream:
    """Refreshes the trusted metadata of one library and downloads its targets.

    Attributes:
        chain: the metadata as it was last verified; None before the first success.
    """

    def __init__(
        self,
        metadata_dir: Path,
        root: bytes,
        fetcher: FetcherInterface,
        floors: Path,
        other_floors: Sequence[Path] = (),
        *,
        metadata_url: str = f"{LIBRARY_SCHEME}metadata/",
        target_url: str = f"{LIBRARY_SCHEME}targets/",
        now: Callable[[], datetime] = utc_now,
        built_at: datetime = BUILT_AT,
    ) -> None:
        """Prepare; nothing is fetched.

        Args:
            metadata_dir: python-tuf's directory.
            root: the bytes of the provisioned root.
            fetcher: the line.
            floors: the file of floors that is raised here.
            other_floors: copies to fall back to when that one is lost.
            metadata_url: where metadata is.
            target_url: where targets are.
            now: the wall clock.
            built_at: when the running program was built.
        """
        self._metadata_dir = metadata_dir
        self._root = root
        self._fetcher = fetcher
        self._floor_file = floors
        self._floor_files = (floors, *other_floors)
        self._urls = (metadata_url, target_url)
        self._now = now
        self._built_at = built_at
        self._flushed: dict[Path, bytes] = {}
        self.chain: trusted_metadata.Chain | None = None

    def view(self) -> AbstractContextManager[None]:
        """Within it a fresh Updater costs nothing on the wire: answers about metadata are remembered for a while."""
        view = getattr(self._fetcher, "view", None)
        return cast("AbstractContextManager[None]", view()) if view else contextlib.nullcontext()

    def refresh(self) -> trusted_metadata.Chain:
        """Bring root, timestamp, snapshot and targets up to date.

        A mirror that is behind or damaged is passed over for the next one; only when none does better is it an alarm, and one
        that is merely behind, while the others do not answer, is none.

        Raises:
            LibraryUnreachable: the line, the disk or the state directory failed.
            TrustError: what came cannot be believed.
        """
        first: TrustError | None = None
        try:
            while True:
                try:
                    with self._guarded():
                        self._updater().refresh()
                    return self._accept()
                except LibraryUnreachable:
                    if first is not None and first.code != "trust.rollback":
                        raise first from None
                    raise
                except TrustError as error:
                    first = first or error
                    if not self._elsewhere():
                        raise first from error
        finally:
            self._ask_all()

    def fetch(
        self, path: str, to: Path, role: str | None = None, *, before: Callable[[str, int], None] = lambda _path, _length: None
    ) -> TargetFile | None:
        """Download one target to ``to``, verified and flushed; a file that is right already is not fetched again.

        Returns None when the library has no such target. Wrong bytes are fetched once more: that heals noise on the line.

        Args:
            path: the target.
            to: the file.
            role: the one role that may sign it, delegated to by the targets role alone; None accepts whom TUF's search finds.
            before: told the path and the signed length before a download begins; raises to refuse it.

        Raises:
            LibraryUnreachable: the line, the disk or the state directory failed.
            TrustError: what came cannot be believed; ``trust.digest`` when the bytes were wrong twice.
        """
        with self._guarded():
            updater = self._updater()
            target = updater.get_targetinfo(path)
        chain = self._accept()
        if role is not None and chain.target(path, role) != target:
            raise TrustError(
                f"{path} is not signed by {role}, which alone may sign it",
                hint="tell the central team: who may sign a line must be beyond doubt; the model in use stays",
                code="trust.ambiguous",
            )
        chain.refuse_expired(self.clocks(), *([role] if role else chain.delegated_names()))
        if target is None:
            return None
        with self._guarded():
            if updater.find_cached_target(target, str(to)) is None:
                before(path, target.length)
                self._download(updater, target, to)
        return target

    def clocks(self) -> Clocks:
        """Return what is known about the time, by the metadata as it was last verified."""
        floors, server = Floors.load(self._floor_files), getattr(self._fetcher, "last_server_date", None)
        if self.chain is not None:
            return self.chain.clocks(floors, self._now(), server, self._built_at)
        return Clocks(self._now(), floors.time(self._newest_root(), self._built_at), server)

    def _download(self, updater: Updater, target: TargetFile, to: Path) -> None:
        part = to.with_name(f".{to.name}.part")
        try:
            if updater.find_cached_target(target, str(part)) is None:  # there when the process was killed before the rename
                self._download_anew(updater, target, part)
            atomic_files.sync_file(part)
            part.replace(to)
        finally:
            part.unlink(missing_ok=True)
        atomic_files.sync_directory(to.parent)

    def _download_anew(self, updater: Updater, target: TargetFile, part: Path) -> None:
        """Download; wrong bytes, which the fetcher has thrown away, are fetched once more, and then from each other mirror."""
        once_more = True
        try:
            while True:
                try:
                    updater.download_target(target, str(part))
                    return
                except tuf_errors.LengthOrHashMismatchError:
                    if not once_more and not self._elsewhere():
                        raise
                    once_more = False
        finally:
            self._ask_all()

    def _elsewhere(self) -> bool:
        """Pass over the mirror that answered last; returns whether there is another."""
        pass_over = getattr(self._fetcher, "pass_over", None)
        return bool(pass_over and pass_over())

    def _ask_all(self) -> None:
        getattr(self._fetcher, "ask_all", lambda: None)()

    def _updater(self) -> Updater:
        metadata_url, target_url = self._urls
        self._metadata_dir.mkdir(parents=True, exist_ok=True)
        return Updater(
            str(self._metadata_dir),
            metadata_url,
            target_base_url=target_url,
            fetcher=_Capped(self._fetcher),
            config=UpdaterConfig(
                app_user_agent="model-sync",
                snapshot_max_length=metadata.MAX_METADATA_BYTES,
                targets_max_length=metadata.MAX_METADATA_BYTES,
            ),
            bootstrap=self._root,
        )

    def _accept(self) -> trusted_metadata.Chain:
        """Verify what the Updater left, as a whole, against the floors and the effective time; then raise the floors."""
        with self._guarded():
            chain = trusted_metadata.Chain.load(self._metadata_dir, self._root)
            floors = Floors.load(self._floor_files)
            chain.refuse_older(floors)
            self.chain = chain
            clocks = self.clocks()
            chain.refuse_expired(clocks)
            raised = floors.advanced(chain.root, chain.timestamp, chain.snapshot, clocks, chain.valid_until())
            if raised is not floors:
                raised.save(self._floor_file)
        return chain

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Flush whatever the operation wrote, and say in our own errors what stopped it."""
        try:
            try:
                yield
            finally:
                self._flush()
        except LibraryUnreachable:
            raise  # the fetcher's own errors are python-tuf's and ours at once
        except tuf_errors.DownloadError as error:
            raise LibraryUnreachable(f"the library cannot be reached: {error}", hint=_RETRY) from error
        except tuf_errors.RepositoryError as error:
            raise self._untrusted(error) from error
        except OSError as error:
            raise atomic_files.disk_trouble(error) from error

    def _flush(self) -> None:
        """Flush the metadata files whose content this process has not flushed yet, and their names.

        By content, because python-tuf lays the provisioned root anew each time; that one is never read from there.
        """
        changed = False
        for file in atomic_files.files_below(self._metadata_dir):
            content = hashlib.sha256(file.read_bytes()).digest()
            if not file.is_symlink() and self._flushed.get(file) != content:
                atomic_files.sync_file(file)
                self._flushed[file] = content
                changed = True
        if changed:
            atomic_files.sync_directory(self._metadata_dir / "root_history")
            atomic_files.sync_directory(self._metadata_dir)

    def _newest_root(self) -> Root:
        return metadata.newest_root(self._metadata_dir, self._root)

    def _untrusted(self, error: tuf_errors.RepositoryError) -> TrustError:
        """Return what python-tuf refused, in our words."""
        what, stays = str(error), "the model in use stays"
        if isinstance(error, tuf_errors.ExpiredMetadataError):
            clocks = self.clocks()
            return TrustError(f"the library's metadata has expired ({what}): {clocks.describe()}", hint=clocks.hint(), code="trust.expired")
        if isinstance(error, tuf_errors.BadVersionNumberError):
            return TrustError(
                f"the library offers older metadata than this box has seen ({what})",
                hint=f"an old copy: use the newest USB stick, or tell the central team that a server is behind; {stays}",
                code="trust.rollback",
            )
        if isinstance(error, tuf_errors.LengthOrHashMismatchError):
            return metadata.altered(f"a file of the library ({what})")
        if isinstance(error, tuf_errors.UnsignedMetadataError):
            return TrustError(
                f"metadata is not signed by those who may sign it ({what})",
                hint=f"tell the central team: somebody may be forging models; {stays}",
                code="trust.signature",
            )
        return TrustError(
            f"the library's metadata cannot be used ({what})",
            hint=f"tell the central team: the library is inconsistent or damaged; {stays}",
            code="trust.metadata",
        )
