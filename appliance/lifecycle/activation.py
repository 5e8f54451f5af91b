"""Activates models step by step while the active models continue to work; the worker process calls :meth:`Activator.tick`.

``tick()`` runs between two jobs and never waits: self-test, trust check and loading run in processes and threads of their own. All
state that matters is in the journal, so that after a crash at any moment the next start continues from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Final

from appliance.core.domain import Note
from appliance.core.errors import StoreError
from appliance.core.states import ModelState
from appliance.lifecycle.background_loader import Load
from appliance.lifecycle.exchange import Exchange
from appliance.lifecycle.installer import Installer
from appliance.lifecycle.journal import Journal
from appliance.lifecycle.library_follower import LibraryFollower
from appliance.lifecycle.retuning import Retuner
from appliance.lifecycle.score_monitor import ScoreMonitors
from appliance.lifecycle.takeover import Takeovers
from appliance.lifecycle.trial_monitor import Trials
from appliance.store.store import Store

logger = logging.getLogger(__name__)
# An activator that runs inside a command does not log: the command prints the error.
_silent_logger = logging.getLogger(f"{__name__}.command")
_silent_logger.setLevel(logging.CRITICAL)

_TICK_S: Final = 0.25
_BUSY_TICK_S: Final = 0.02
_TRIAL_CHECK_S: Final = 1.0
_AFTER_STORE_ERROR_S: Final = 5.0
_AFTER_UNKNOWN_ERROR_S: Final = 60.0


class Activator:
    """Coordinates installation, trials, takeovers, retuning and the library; for the one process that holds the worker's lock.

    Args:
        load: loads a model while others are active; called in a thread.
        on_activated: called with a loaded model in the moment it becomes active.
        load_now: loads a successor while its model line has no model that may run; ``load`` when None.
        follow: whether to follow the library and to retry after errors of the disk; False for commands.

    Attributes:
        retuner: measures active models again when nothing else is to do.
    """

    def __init__(
        self,
        store: Store,
        load: Load,
        on_activated: Callable[[Any], None] = lambda _model: None,
        *,
        load_now: Load | None = None,
        follow: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._clock, self._follow_library = store, clock, follow
        self._log = logger if follow else _silent_logger
        self.journal = Journal(store)
        exchange = Exchange(store, store.settings.exchange_dir) if store.settings.exchange_dir and follow else None
        self._follower = LibraryFollower(store, self.journal, exchange, clock) if exchange else None
        self.retuner = Retuner(store, self.journal, load, on_activated, clock)
        self._installer = Installer(store, self.journal, load, on_activated, self._follower, self._log)
        self._takeovers = Takeovers(store, self.journal, load_now or load, on_activated, self._log)
        self._trials = Trials(store.database, self.journal, self._takeovers, self._log)
        self._scores = ScoreMonitors(store.database)
        self._next_tick = self._next_trial_check = self._follow_from = 0.0

    @property
    def held(self) -> set[str]:
        """Digests of withdrawn models that nobody replaced yet: their jobs must wait."""
        return self._takeovers.held

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do now besides monitoring trials."""
        follows = self._follower is not None and self._follower.is_busy
        return bool(self._is_changing() or self._takeovers.needs_annotation or self.journal.pending() or follows or self.retuner.is_busy)

    @property
    def self_test_pid(self) -> int | None:
        """Process number of the running self-test."""
        return self._installer.self_test_pid

    def recover(self, running: Collection[str] = ()) -> list[str]:
        """Roll back models that crash the worker and replace withdrawn ones; called before the worker loads any model.

        Args:
            running: digests of the models whose jobs ran when the last worker crashed, see ``JournalQueries.running_digests``; empty
                after a clean stop.

        Returns:
            Digests of the models that were being loaded when the last worker crashed.
        """
        self._trials.count_all()
        pending = self.journal.pending()
        if running and pending is not None and pending["self_test"] is None:  # a job crashed the worker, not the self-test
            self.journal.cancel_attempts([pending["id"]])
        active = [row["digest"] for row in self._store.models() if row["state"] == ModelState.ACTIVE]
        crashed_loading = self.journal.replace_loading_marker(active)
        for row in self.journal.count_worker_crash({*running, *crashed_loading}):
            self._takeovers.roll_back(
                row, Note("activation.reboot_loop", f"{row['attempts']} crashes, {row['interrupted']} reboots without a finished case")
            )
        self._takeovers.hold_withdrawn()
        while self._takeovers:
            self._takeovers.step()
            time.sleep(_BUSY_TICK_S)
        return crashed_loading

    def confirm_loaded(self) -> None:
        """Clear the crash marker: the worker has loaded its models."""
        self.journal.replace_loading_marker(())

    def tick(self) -> None:
        """Do every step that needs no waiting; a disk error is tried again after some seconds.

        Raises:
            StoreError: the journal could not be written (only when the library is not followed); nothing has changed.
        """
        now = self._clock()
        if now < self._next_tick:
            return
        self._next_tick = now + (_BUSY_TICK_S if self._is_changing() else _TICK_S)
        try:
            self._tick(now)
        except StoreError as error:
            if not self._follow_library:
                raise
            self._log_store_error(error)
            self._next_tick = now + _AFTER_STORE_ERROR_S

    def check_withdrawals(self) -> None:
        """Between the images of a batch or series: stop the use of withdrawn models. Loads, activates and closes nothing."""
        try:
            self._follow(LibraryFollower.poll)
            self._takeovers.hold_withdrawn()
        except StoreError as error:  # the next tick tries again
            self._log_store_error(error)

    def stop(self) -> None:
        """Stop what is under way for a clean stop of the box; the next start begins it again and counts no failed attempt."""
        under_way = [self._installer.number] if self._installer.number is not None else []
        self._installer.stop()
        try:
            self.retuner.stop()
            self.journal.cancel_attempts(under_way)
            if self._follower is not None:
                self._follower.stop()
        except StoreError as error:
            self._log_store_error(error)

    def _is_changing(self) -> bool:
        return self._installer.number is not None or len(self._takeovers) > 0

    def _tick(self, now: float) -> None:
        self._follow(LibraryFollower.poll)
        self._takeovers.hold_withdrawn()
        self._takeovers.step()
        if not self._takeovers:  # wait: the successor may be the version that the library requests
            self._follow(LibraryFollower.start_wanted)
        self._installer.step()
        self.retuner.tick(may_run=not self._is_changing())
        if now >= self._next_trial_check:
            self._next_trial_check = now + _TRIAL_CHECK_S
            self._trials.check()
            self.journal.changes += self._scores.check()
        self._takeovers.annotate_findings()
        self._follow(LibraryFollower.report)

    def _follow(self, step: Callable[[LibraryFollower], None]) -> None:
        """Do a step with the library; an unknown error there must not stop the analysis of scans."""
        if self._follower is None or self._clock() < self._follow_from:
            return
        try:
            step(self._follower)
        except StoreError:
            raise
        except Exception:  # the files are written by another account
            logger.exception("the library cannot be followed", extra={"code": "exchange.invalid"})
            self._follow_from = self._clock() + _AFTER_UNKNOWN_ERROR_S

    def _log_store_error(self, error: StoreError) -> None:
        self._log.error("the journal of models cannot be written", extra={"code": error.code})
