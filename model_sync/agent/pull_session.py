"""One pull: poll the library, decide, stage what is wanted, poll again, and only then write the directives for the box.

A box runs only what the role of a model line has signed: the rollout chooses among signed versions, every byte is verified against the
trusted metadata, the library is polled again after the last byte, and the box verifies everything again before it activates a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from model_sync.agent.decision import Decision, LineOutcome, PullResult, decide, decision_for_problem, failed_outcome
from model_sync.agent.download_rules import DownloadRules
from model_sync.agent.exchange import Exchange, Source
from model_sync.agent.library_view import LibraryPoller, LibraryView, is_missing_on_server, missing_on_server_error
from model_sync.agent.staging import Stager, StagingJob, require_still_signed
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.settings import SyncSettings
from model_sync.trust.tuf_client import TufClient, received_bytes

if TYPE_CHECKING:
    from tuf.ngclient import FetcherInterface


@dataclass
class PullSession:
    """Carries out one pull from one source.

    Attributes:
        settings: the agent's settings.
        exchange: the directory shared with the box.
        source: whether the library is reached over the link or read from a USB stick.
        fetcher: the fetcher of that source.
        tuf_client: the TUF client on that fetcher.
        poller: polls the library.
        stager: stages bundles.
        rules: the rules of downloads over the link.
        outcomes: the outcome of each model line so far; complete only after ``run``.
    """

    settings: SyncSettings
    exchange: Exchange
    source: Source
    fetcher: FetcherInterface
    tuf_client: TufClient
    poller: LibraryPoller
    stager: Stager
    rules: DownloadRules
    outcomes: dict[str, LineOutcome] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._received_before = received_bytes(self.fetcher)

    @property
    def received_bytes(self) -> int:
        """Bytes received over the link in this pull."""
        return received_bytes(self.fetcher) - self._received_before

    def run(self, now: datetime, add_note: Callable[[str], None]) -> PullResult:
        """Download what this box should have, and write its directives.

        Args:
            now: the time that the directives carry.
            add_note: receives remarks for a technician.

        Raises:
            LibraryUnreachable: the link, the disk or the state directory failed.
            TrustError: the library is not trusted.
            OSError: the exchange directory cannot be written.
        """
        with self.tuf_client.cached_metadata():
            view = self.poller.poll()
            ready = self._stage(view, self._decide(view))
        changed = False
        directives = self.exchange.directives()
        new = {line for line, job in ready.items() if directives.get(line, {}).get("digest") != job.release.digest}
        if new:
            # A new cache: a role may have been revoked while the bundle was downloaded.
            with self.tuf_client.cached_metadata():
                latest = self.poller.poll()
            ready = self._confirm(latest, ready)
            wanted = {line: (job.release.version, job.release.digest, self.source) for line, job in ready.items()}
            changed = self.exchange.set_directives(wanted, now)
        ended = {line for line, outcome in self.outcomes.items() if outcome.decision is Decision.ENDED}
        changed |= self.exchange.remove_directives(ended, now)
        self._remove_old_files(add_note)
        code = "sync.no_rollout" if view.rollout is None and not self.outcomes else "sync.ok"
        return PullResult(dict(sorted(self.outcomes.items())), changed, self.received_bytes, code, frozenset(new & set(ready)))

    def _decide(self, view: LibraryView) -> dict[str, StagingJob]:
        """Return the jobs of the model lines that are ready; the outcomes say why the others are not."""
        jobs: dict[str, StagingJob] = {}
        for line, problem in view.problems.items():
            self.outcomes[line] = LineOutcome(decision_for_problem(problem), problem=problem)
        for line in sorted(set(view.indexes) | set(view.rollout.lines if view.rollout else ())):
            if line in self.outcomes:
                continue
            outcome = self.outcomes[line] = self._outcome(view, line)
            if outcome.decision is Decision.READY:
                index = view.indexes[line]
                release = index.release(outcome.version)
                assert release is not None, "an unknown version is never ready"
                jobs[line] = StagingJob(line, release, tuple(index.deltas))
        return jobs

    def _outcome(self, view: LibraryView, line: str) -> LineOutcome:
        return decide(view, self.settings, self.source, line, self.tuf_client.clocks().effective)

    def _stage(self, view: LibraryView, jobs: Mapping[str, StagingJob]) -> dict[str, StagingJob]:
        """Stage the bundles that are not here yet and return the jobs that are complete.

        A link that fails stops the other model lines too; a missing file of one line does not.
        """
        ready: dict[str, StagingJob] = {}
        stopped_by: LibraryUnreachable | None = None
        for line, job in jobs.items():
            if self.stager.is_staged(job.release.digest):
                ready[line] = job
                continue
            try:
                if stopped_by is not None:
                    raise stopped_by
                with contextlib.nullcontext() if self.source == "usb" else self.rules.bundle():
                    self.stager.stage(self.tuf_client.trusted or view.trusted, job)
                ready[line] = job
            except TrustError as error:
                self.outcomes[line] = failed_outcome(job, error)
            except LibraryUnreachable as error:
                is_missing = is_missing_on_server(error)
                self.outcomes[line] = failed_outcome(job, missing_on_server_error(line, error) if is_missing else error)
                # When one file is missing or too large for the disk, the other model lines may still be complete.
                if not is_missing and error.code != "sync.disk_full":
                    stopped_by = error
        return ready

    def _confirm(self, latest: LibraryView, ready: Mapping[str, StagingJob]) -> dict[str, StagingJob]:
        """Return the jobs that are still signed, wanted and not withdrawn after the last byte was received."""
        confirmed = {}
        problems = {line: LineOutcome(decision_for_problem(problem), problem=problem) for line, problem in latest.problems.items()}
        self.outcomes.update(problems)
        for line, job in ready.items():
            if line in latest.problems:
                continue
            outcome = self.outcomes[line] = self._outcome(latest, line)
            if outcome.decision is not Decision.READY:
                continue
            if outcome.digest != job.release.digest:
                self.outcomes[line] = LineOutcome(Decision.NOT_YET, outcome.version, outcome.digest)  # the next pull fetches it
                continue
            try:
                require_still_signed(latest.trusted, job, self.stager.manifest(job.release.digest))
            except TrustError as error:
                self.outcomes[line] = failed_outcome(job, error)
            else:
                confirmed[line] = job
        return confirmed

    def _remove_old_files(self, add_note: Callable[[str], None]) -> None:
        wanted = {outcome.digest for outcome in self.outcomes.values()}
        self.stager.remove_unwanted(wanted - {bundle.digest for bundle in self.exchange.bundles()})
        for bundle in self.exchange.remove_old_bundles():
            add_note(f"removed {bundle.manifest.name} {bundle.manifest.version}: it is not in use, and three newer ones are here")
