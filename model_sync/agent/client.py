"""The pull: look at the library, decide, bring what is wanted, look again, and only then tell the box.

Nothing here can make a box run what no line role has signed: the rollout chooses among signed versions, every byte is verified
against the chain, the library is asked again after the last byte, and the box itself checks once more before it acts. Whatever
stops a pull, the model in use stays, and what has come is kept.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_sync import atomic_files
from model_sync.agent import process_lock, usb_import
from model_sync.agent.decision import KEEP, Outcome, Pulled, decide, decision_for, instead, job_of
from model_sync.agent.exchange import DIRECTIVES_FILE, Exchange, Source
from model_sync.agent.library_view import Look, Looker, is_missing, lacking
from model_sync.agent.staging import Job, Stager, still_signed
from model_sync.agent.sync_status import Progress, StatusFile
from model_sync.agent.verified_bundle_cache import WholeBundles
from model_sync.errors import LibraryUnreachable, ModelSyncError, TrustError
from model_sync.settings import SyncSettings
from model_sync.trust import metadata
from model_sync.trust.rollback_protection import BUILT_AT, FLOOR_FILE, Clocks, Floors, iso, utc_now
from model_sync.trust.tuf_client import Upstream, received_bytes

if TYPE_CHECKING:
    from tuf.ngclient import FetcherInterface

_MAKE_WAY_S = 20.0  # the line's pull looks about once a second whether somebody with a stick waits


@dataclass(frozen=True)
class _Way:
    """How the library is reached, and how its errors are put into words for those who stand there."""

    source: Source
    make: Callable[[], FetcherInterface]
    words: Callable[[ModelSyncError], ModelSyncError] = lambda error: error


@dataclass
class _Pull:
    """One pull's companions and findings."""

    source: Source
    fetcher: FetcherInterface
    upstream: Upstream
    looker: Looker
    stager: Stager
    received_before: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def received_bytes(self) -> int:
        """Bytes that came over the line in this pull."""
        return received_bytes(self.fetcher) - self.received_before


class Client:
    """Brings one box what its library says; one at a time per state directory.

    Args:
        settings: the agent's settings.
        fetcher: how to reach the library; by default the URLs of the settings.
        now: the wall clock.
        local_now: the wall clock in local time, for the windows.
        ticks: a monotonic clock, in seconds.
        may_continue: called between two pieces of a file; raises LibraryUnreachable to stop, and what has come is kept.
        on_trouble: told what failed and how many seconds the pause before the next attempt is.
    """

    def __init__(
        self,
        settings: SyncSettings,
        fetcher: FetcherInterface | None = None,
        *,
        now: Callable[[], datetime] = utc_now,
        local_now: Callable[[], datetime] = datetime.now,
        ticks: Callable[[], float] = time.monotonic,
        may_continue: Callable[[], None] | None = None,
        on_trouble: Callable[[LibraryUnreachable, float], None] | None = None,
    ) -> None:
        """Prepare; nothing is written or fetched."""
        self._settings = settings
        self._given = fetcher
        self._now = now
        self._local_now = local_now
        self._ticks = ticks
        self._asked = may_continue or (lambda: None)
        self._told_of_trouble = on_trouble or (lambda _error, _pause_s: None)
        self._exchange = Exchange(settings.exchange_dir)
        self._metadata = settings.state_dir / "metadata"
        self._copies = settings.state_dir / "documents"
        self._floor_files = (settings.state_dir / FLOOR_FILE, settings.exchange_dir / FLOOR_FILE)
        self._own: FetcherInterface | None = None
        self._stager: Stager | None = None
        self._status: StatusFile | None = None
        self._whole = WholeBundles(ticks)
        self._in_bundle = False

    # -- what people and the agent call -------------------------------------------------------------------------------

    def pull(self, on_progress: Callable[[Progress], None] | None = None) -> Pulled:
        """Look at the library and bring what this box should have.

        Raises:
            LibraryUnreachable: nothing is wrong with trust; the next pull goes on where this one stopped.
            TrustError: the library as a whole cannot be believed.
        """
        return self._attempt(_Way("library", self._fetcher), on_progress)

    def import_usb(self, directory: Path, on_progress: Callable[[Progress], None] | None = None) -> Pulled:
        """Do the same from a USB stick, without any network.

        A technician who stands there counts as chosen: percentage, start and window of the rollout are not asked. Its version,
        its pause, the minimum and withdrawals hold as they do on the line.

        Raises:
            LibraryUnreachable: ``usb.incomplete``: files are missing on the stick; or the box's disk failed.
            TrustError: the stick is older than the box, expired, of another library, or altered.
        """
        from model_sync.transport.fetcher import DirectoryFetcher

        tree, root = usb_import.tree(directory), self._settings.root
        return self._attempt(_Way("usb", lambda: DirectoryFetcher(tree), lambda error: usb_import.about(error, tree, root)), on_progress)

    def status(self) -> dict[str, Any]:
        """Return the content of sync-status.json, and the outcomes before it under ``history``."""
        file = self._status_file()
        return {**file.value, "history": file.history()}

    def busy(self) -> str | None:
        """Return the process id of the agent that is at work now, or None."""
        return process_lock.holder(self._settings.state_dir)

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _attempt(self, way: _Way, on_progress: Callable[[Progress], None] | None) -> Pulled:
        status = self._status_file()
        with self._locked(status, _MAKE_WAY_S if way.source == "usb" else 0.0):
            status.began()
            pull: _Pull | None = None
            try:
                pull = self._begin(way, status, on_progress)
                pulled = self._run(pull, status).told(way.words)
            except (ModelSyncError, OSError) as error:
                problem = way.words(atomic_files.disk_trouble(error) if isinstance(error, OSError) else error)
                lines = {name: outcome.status() for name, outcome in pull.outcomes.items()} if pull else {}
                status.ended(problem, lines, self._clocks(pull), pull.received_bytes if pull else 0)
                raise problem from error
            except (Exception, KeyboardInterrupt) as error:
                # A fault of this program: whoever reads the status must not be told that all is well.
                status.ended(_fault(error), {}, Clocks(self._now(), BUILT_AT), pull.received_bytes if pull else 0)
                raise
            finally:
                if pull is not None and pull.fetcher is not self._given:
                    getattr(pull.fetcher, "close", lambda: None)()
            lines = {name: outcome.status() for name, outcome in pulled.lines.items()}
            status.ended(pulled.worst, lines, self._clocks(pull), pulled.received_bytes, pulled.code)
            return pulled

    def _begin(self, way: _Way, status: StatusFile, on_progress: Callable[[Progress], None] | None) -> _Pull:
        settings = self._settings
        settings.exchange_dir.mkdir(parents=True, exist_ok=True)
        self._sweep_metadata()
        root = metadata.read_root(settings.root)
        if metadata.set_aside(self._metadata, root):
            status.note("this box was given another library's root.json: what the library before it had signed counts no more")
        fetcher = way.make()
        upstream = Upstream(self._metadata, root, fetcher, self._floor_files[0], self._floor_files[1:], now=self._now)
        looker = Looker(settings, self._exchange, upstream, way.source, self._metadata, self._copies, self._floor_files)
        before = received_bytes(fetcher)

        def report(progress: Progress) -> None:
            status.downloading(progress, received_bytes(fetcher) - before)
            if on_progress is not None:
                on_progress(progress)

        deltas = settings.state_dir / "deltas"
        self._stager = Stager(upstream, self._exchange, deltas, settings.disk_reserve_bytes, report, status.note, self._whole)
        self._status = status
        return _Pull(way.source, fetcher, upstream, looker, self._stager, before)

    def _run(self, pull: _Pull, status: StatusFile) -> Pulled:
        with pull.upstream.view():
            look = pull.looker.look()
            jobs = self._decide(pull, look)
            ready = self._stage(pull, look, jobs)
        changed = False
        told = self._exchange.directives()
        fresh = {line for line, job in ready.items() if told.get(line, {}).get("digest") != job.release.digest}
        if fresh:
            # From the library itself, and not from what was remembered: a role may have been revoked while the bundle came.
            with pull.upstream.view():
                again = pull.looker.look()
            ready = self._confirm(pull, again, ready)
            changed = self._exchange.direct(
                {line: (job.release.version, job.release.digest, pull.source) for line, job in ready.items()}, self._now()
            )
        changed |= self._end({line for line, outcome in pull.outcomes.items() if outcome.decision == "ended"})
        pull.stager.sweep({outcome.digest for outcome in pull.outcomes.values()} - {bundle.digest for bundle in self._exchange.bundles()})
        for bundle in self._exchange.drop_old_bundles():
            status.note(f"dropped {bundle.manifest.name} {bundle.manifest.version}: nothing names it, and three newer ones are here")
        code = "sync.no_rollout" if look.rollout is None and not pull.outcomes else "sync.ok"
        return Pulled(dict(sorted(pull.outcomes.items())), changed, pull.received_bytes, code, frozenset(fresh & set(ready)))

    # -- decisions ----------------------------------------------------------------------------------------------------

    def _decide(self, pull: _Pull, look: Look) -> dict[str, Job]:
        """Return what this box should have now; the outcomes say why the other lines have to wait."""
        jobs: dict[str, Job] = {}
        for line, problem in look.problems.items():
            pull.outcomes[line] = Outcome(decision_for(problem), problem=problem)
        for line in sorted(set(look.indexes) | set(look.rollout.lines if look.rollout else ())):
            if line in pull.outcomes:
                continue
            outcome = pull.outcomes[line] = self._outcome(pull, look, line)
            if outcome.decision == "ready":
                jobs[line] = job_of(look.indexes[line], outcome.version)
        return jobs

    def _outcome(self, pull: _Pull, look: Look, line: str) -> Outcome:
        return decide(look, self._settings, pull.source, line, pull.upstream.clocks().effective)

    def _end(self, lines: set[str]) -> bool:
        """Take back what the box was told about lines that the library has ended; returns whether there was anything."""
        file = self._exchange.directory / DIRECTIVES_FILE
        before, directives = atomic_files.read_json(file), self._exchange.directives()
        if not lines & set(directives):
            return False
        serial = before.get("serial")
        left = {line: told for line, told in directives.items() if line not in lines}
        fresh = {"schema": 1, "serial": serial + 1 if isinstance(serial, int) else 1, "issued_at": iso(self._now()), "lines": left}
        atomic_files.write_json(file, fresh)
        return True

    # -- bringing -----------------------------------------------------------------------------------------------------

    def _stage(self, pull: _Pull, look: Look, jobs: Mapping[str, Job]) -> dict[str, Job]:
        """Bring what is not here yet. A way that breaks stops the other lines as well, one line's missing file does not."""
        ready: dict[str, Job] = {}
        stopped: LibraryUnreachable | None = None
        for line, job in jobs.items():
            if pull.stager.has(job.release.digest):
                ready[line] = job
                continue
            try:
                if stopped is not None:
                    raise stopped
                with self._bundle_rules(pull):
                    pull.stager.stage(pull.upstream.chain or look.chain, job)
                ready[line] = job
            except TrustError as error:
                pull.outcomes[line] = instead(job, error)
            except LibraryUnreachable as error:
                pull.outcomes[line] = instead(job, lacking(line, error) if is_missing(error) else error)
                # What is missing, or too large for the disk, says nothing about the way to the other lines' files.
                if not is_missing(error) and error.code != "sync.disk_full":
                    stopped = error
        return ready

    @contextlib.contextmanager
    def _bundle_rules(self, pull: _Pull) -> Iterator[None]:
        """Within it the window holds; documents may come at any time."""
        if pull.source == "usb":
            yield
            return
        self._in_bundle = True
        try:
            self._require_window()
            yield
        finally:
            self._in_bundle = False

    def _require_window(self) -> None:
        """Stop a bundle's download outside the window, or when asked to; the fetcher asks between two pieces of a file."""
        self._asked()
        if process_lock.wanted(self._settings.state_dir):
            raise LibraryUnreachable(
                "a USB stick is being read; the line makes way", hint=f"it goes on at the next look; {KEEP}", code="sync.stopped"
            )
        if self._in_bundle and not self._settings.in_window(self._local_now()):
            raise LibraryUnreachable(
                f"bundles are fetched only at {', '.join(self._settings.windows)}; this one waits",
                hint=f"it comes by itself in the next window, or widen `windows` in sync.toml; {KEEP}",
                code="sync.window",
            )

    def _confirm(self, pull: _Pull, again: Look, ready: Mapping[str, Job]) -> dict[str, Job]:
        """Keep what is still signed, still wanted and not withdrawn after the last byte has come."""
        confirmed = {}
        pull.outcomes.update({name: Outcome(decision_for(problem), problem=problem) for name, problem in again.problems.items()})
        for line, job in ready.items():
            if line in again.problems:
                continue
            outcome = pull.outcomes[line] = self._outcome(pull, again, line)
            if outcome.decision != "ready":
                continue
            if outcome.digest != job.release.digest:
                pull.outcomes[line] = Outcome("not_yet", outcome.version, outcome.digest)  # the next pull brings it
                continue
            try:
                still_signed(again.chain, job, pull.stager.manifest(job.release.digest))
            except TrustError as error:
                pull.outcomes[line] = instead(job, error)
            else:
                confirmed[line] = job
        return confirmed

    # -- odds and ends ------------------------------------------------------------------------------------------------

    def _fetcher(self) -> FetcherInterface:
        if self._given is not None:
            return self._given
        if self._own is None:
            from model_sync.transport.fetcher import Fetcher

            # The stager keeps the reserve, for bundles; a withdrawal of a few bytes must arrive on a nearly full disk as well.
            self._own = Fetcher(
                self._settings.model_copy(update={"disk_reserve_bytes": 0}),
                self._settings.state_dir / "parts",
                on_progress=lambda progress: self._stager.received(progress.done_bytes) if self._stager else None,
                may_continue=self._require_window,
                on_trouble=self._trouble,
            )
        return self._own

    def _trouble(self, failure: LibraryUnreachable, pause_s: float) -> None:
        if self._status:
            self._status.trying_again(failure, pause_s)
        self._told_of_trouble(failure, pause_s)

    def _status_file(self) -> StatusFile:
        return StatusFile(self._settings.exchange_dir, self._settings.state_dir, self._settings.box_id, self._now, self._ticks)

    def _clocks(self, pull: _Pull | None) -> Clocks:
        if pull is not None:
            with contextlib.suppress(TrustError):
                return pull.upstream.clocks()
        floors = Floors.load(self._floor_files)
        return Clocks(self._now(), max(floors.system, floors.issued))

    def _sweep_metadata(self) -> None:
        """Remove what a killed process left half-written in the metadata directory."""
        for left in self._metadata.glob("tmp*"):
            if left.suffix != ".json":  # a role may be called so
                left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, status: StatusFile, wait_s: float) -> Iterator[None]:
        """Hold the state directory; one that cannot be written is said where it can be read."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(process_lock.hold(self._settings.state_dir, wait_s))
            except LibraryUnreachable as error:
                if error.code != "sync.busy":  # then the status is the other's to write
                    status.ended(error, {}, self._clocks(None), 0)
                raise
            yield


def _fault(error: BaseException) -> LibraryUnreachable:
    """Return the error for what nobody foresaw; it is in nobody's hands but those who make this program."""
    if isinstance(error, KeyboardInterrupt):
        return LibraryUnreachable("it was stopped by hand", hint=f"run it again: it goes on where it stopped; {KEEP}", code="sync.stopped")
    return LibraryUnreachable(
        f"the sync agent failed with {type(error).__name__}; this is a fault of the program",
        hint=f"send its log (`journalctl -u model-sync`) to the central team; it tries again at its next look; {KEEP}",
        code="sync.error",
    )
