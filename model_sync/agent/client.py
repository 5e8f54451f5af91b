"""The client of the sync agent: one pull at a time from the library or from a USB stick, with its status on the disk.

Whatever stops a pull, the model in use stays, and the bytes that were received are kept for the next one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_sync import atomic_files
from model_sync.agent import process_lock, usb_import
from model_sync.agent.decision import PullResult
from model_sync.agent.download_rules import DownloadRules
from model_sync.agent.exchange import Exchange, Source
from model_sync.agent.library_view import LibraryPoller
from model_sync.agent.pull_session import PullSession
from model_sync.agent.staging import Stager
from model_sync.agent.sync_status import Progress, StatusFile
from model_sync.agent.verified_bundle_cache import VerifiedBundleCache
from model_sync.errors import Action, LibraryUnreachable, ModelSyncError, TrustError
from model_sync.settings import SyncSettings
from model_sync.trust import metadata
from model_sync.trust.rollback_protection import BUILT_AT, ROLLBACK_FILE, Clocks, RollbackState, utc_now
from model_sync.trust.tuf_client import TufClient, received_bytes

if TYPE_CHECKING:
    from tuf.ngclient import FetcherInterface

_USB_LOCK_WAIT_S = 20.0  # a pull over the link checks about once a second whether a USB import waits


@dataclass(frozen=True)
class _LibraryAccess:
    """How the library is reached, and how its errors are worded for the person who uses it."""

    source: Source
    make_fetcher: Callable[[], FetcherInterface]
    reword: Callable[[ModelSyncError], ModelSyncError] = lambda error: error


class Client:
    """Pulls the models of one box from its library; one pull at a time per state directory.

    Args:
        settings: the agent's settings.
        fetcher: how to reach the library; by default the URLs of the settings.
        now: the wall clock.
        local_now: the wall clock in local time, for the download windows.
        ticks: a monotonic clock, in seconds.
        check_stop: called between two chunks of a file; raises LibraryUnreachable to stop, and the received part is kept.
        on_retry: receives the error of a failed attempt and the seconds until the next one.
    """

    def __init__(
        self,
        settings: SyncSettings,
        fetcher: FetcherInterface | None = None,
        *,
        now: Callable[[], datetime] = utc_now,
        local_now: Callable[[], datetime] = datetime.now,
        ticks: Callable[[], float] = time.monotonic,
        check_stop: Callable[[], None] | None = None,
        on_retry: Callable[[LibraryUnreachable, float], None] | None = None,
    ) -> None:
        self._settings = settings
        self._given_fetcher = fetcher
        self._now = now
        self._ticks = ticks
        self._on_retry = on_retry or (lambda _error, _pause_s: None)
        self._rules = DownloadRules(settings, check_stop or (lambda: None), local_now)
        self._exchange = Exchange(settings.exchange_dir)
        self._metadata = settings.state_dir / "metadata"
        self._documents = settings.state_dir / "documents"
        self._rollback_files = (settings.state_dir / ROLLBACK_FILE, settings.exchange_dir / ROLLBACK_FILE)
        self._own_fetcher: FetcherInterface | None = None
        self._stager: Stager | None = None
        self._status: StatusFile | None = None
        self._verified = VerifiedBundleCache(ticks)

    def pull(self, on_progress: Callable[[Progress], None] | None = None) -> PullResult:
        """Poll the library and download what this box should have.

        Raises:
            LibraryUnreachable: the link or the disk failed; the next pull continues where this one stopped.
            TrustError: the library is not trusted.
        """
        return self._attempt(_LibraryAccess("library", self._fetcher), on_progress)

    def import_usb(self, directory: Path, on_progress: Callable[[Progress], None] | None = None) -> PullResult:
        """Import from a USB stick what ``pull`` would download, without any network.

        A box with a stick takes part in the rollout: its percentage, start and window are not checked. Its version, its pause, the
        minimum version and withdrawals apply as over the link.

        Raises:
            UsbIncomplete: files are missing on the stick.
            LibraryUnreachable: the box's disk failed.
            TrustError: the stick is older than the box, expired, of another library, or altered.
        """
        from model_sync.transport.directory_fetcher import DirectoryFetcher

        tree, root = usb_import.find_tree(directory), self._settings.root
        access = _LibraryAccess(
            "usb", lambda: DirectoryFetcher(tree), lambda error: usb_import.reword_error(error, tree, root, self._known_timestamp())
        )
        return self._attempt(access, on_progress)

    def status(self) -> dict[str, Any]:
        """Return the content of sync-status.json, and the earlier results under ``history``."""
        file = self._status_file()
        return {**file.value, "history": file.history()}

    def working_process(self) -> str | None:
        """Return the process id of the agent that is working now, or None."""
        return process_lock.holder_pid(self._settings.state_dir)

    def _attempt(self, access: _LibraryAccess, on_progress: Callable[[Progress], None] | None) -> PullResult:
        status = self._status_file()
        with self._locked(status, _USB_LOCK_WAIT_S if access.source == "usb" else 0.0):
            status.begin()
            session: PullSession | None = None
            try:
                session = self._open_session(access, status, on_progress)
                result = session.run(self._now(), status.add_note).with_reworded_problems(access.reword)
            except (ModelSyncError, OSError) as error:
                problem = access.reword(atomic_files.disk_error(error) if isinstance(error, OSError) else error)
                lines = {name: outcome.status() for name, outcome in session.outcomes.items()} if session else {}
                status.end(problem, lines, self._clocks(session), session.received_bytes if session else 0)
                raise problem from error
            except (Exception, KeyboardInterrupt) as error:
                # A defect of this program: the status must not stay ``ok``.
                status.end(_program_error(error), {}, Clocks(self._now(), BUILT_AT), session.received_bytes if session else 0)
                raise
            finally:
                if session is not None and session.fetcher is not self._given_fetcher:
                    getattr(session.fetcher, "close", lambda: None)()
            lines = {name: outcome.status() for name, outcome in result.lines.items()}
            status.end(result.worst_problem, lines, self._clocks(session), result.received_bytes, result.code)
            return result

    def _open_session(self, access: _LibraryAccess, status: StatusFile, on_progress: Callable[[Progress], None] | None) -> PullSession:
        settings = self._settings
        settings.exchange_dir.mkdir(parents=True, exist_ok=True)
        self._remove_temporary_metadata()
        root = metadata.read_root(settings.root)
        if metadata.set_aside(self._metadata, root):
            status.add_note("this box was given another library's root.json: signatures of the earlier library no longer count")
        fetcher = access.make_fetcher()
        tuf_client = TufClient(self._metadata, root, fetcher, self._rollback_files[0], self._rollback_files[1:], now=self._now)
        poller = LibraryPoller(settings, self._exchange, tuf_client, access.source, self._metadata, self._documents, self._rollback_files)
        received_before = received_bytes(fetcher)

        def report(progress: Progress) -> None:
            status.report_progress(progress, received_bytes(fetcher) - received_before)
            if on_progress is not None:
                on_progress(progress)

        deltas = settings.state_dir / "deltas"
        stager = Stager(tuf_client, self._exchange, deltas, settings.disk_reserve_bytes, report, status.add_note, self._verified)
        self._stager, self._status = stager, status
        return PullSession(settings, self._exchange, access.source, fetcher, tuf_client, poller, stager, self._rules)

    def _fetcher(self) -> FetcherInterface:
        if self._given_fetcher is not None:
            return self._given_fetcher
        if self._own_fetcher is None:
            from model_sync.transport.fetcher import Fetcher

            # The stager enforces the disk reserve for bundles; a withdrawal of a few bytes must arrive on a nearly full disk too.
            self._own_fetcher = Fetcher(
                self._settings.model_copy(update={"disk_reserve_bytes": 0}),
                self._settings.state_dir / "parts",
                on_progress=lambda done_bytes: self._stager.report_received(done_bytes) if self._stager else None,
                check_stop=self._rules.check,
                on_retry=self._report_retry,
            )
        return self._own_fetcher

    def _report_retry(self, error: LibraryUnreachable, pause_s: float) -> None:
        if self._status:
            self._status.report_retry(error, pause_s)
        self._on_retry(error, pause_s)

    def _status_file(self) -> StatusFile:
        return StatusFile(self._settings.exchange_dir, self._settings.state_dir, self._settings.box_id, self._now, self._ticks)

    def _known_timestamp(self) -> int:
        known = RollbackState.load(self._rollback_files).roles.get("timestamp")
        return known.version if known is not None else 0

    def _clocks(self, session: PullSession | None) -> Clocks:
        if session is not None:
            with contextlib.suppress(TrustError):
                return session.tuf_client.clocks()
        state = RollbackState.load(self._rollback_files)
        return Clocks(self._now(), max(state.system, state.issued))

    def _remove_temporary_metadata(self) -> None:
        """Remove what a killed process left half-written in the metadata directory."""
        for path in self._metadata.glob("tmp*"):
            if path.suffix != ".json":  # a role may have such a name
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, status: StatusFile, wait_s: float) -> Iterator[None]:
        """Lock the state directory; an error of the disk is written to the status."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(process_lock.hold(self._settings.state_dir, wait_s))
            except LibraryUnreachable as error:
                if error.code != "sync.busy":  # otherwise the status belongs to the other process
                    status.end(error, {}, self._clocks(None), 0)
                raise
            yield


def _program_error(error: BaseException) -> LibraryUnreachable:
    """Return the error for an unexpected exception."""
    if isinstance(error, KeyboardInterrupt):
        return LibraryUnreachable("a person stopped it", code="sync.stopped", action=Action.WAIT)
    return LibraryUnreachable(
        f"the sync agent failed with {type(error).__name__}; this is a fault of the program", code="sync.error", action=Action.OPERATOR
    )
