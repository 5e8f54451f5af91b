"""The rollout pause policy: a thread that pauses a rollout when its failure budget is used up.

A report only schedules a check. So no box waits for the library's lock, which a publication may hold for minutes, and a report is
accepted also when the library cannot be read. A check that failed is repeated.
"""

from __future__ import annotations

import logging
import threading

from sqlalchemy.exc import SQLAlchemyError

from model_sync.errors import ModelSyncError
from model_sync.fleet.database import Fleet
from model_sync.fleet.pause import ExpectedRollout
from model_sync.fleet.rollouts import Rollouts
from model_sync.trust.documents import RolloutStep

logger = logging.getLogger(__name__)
SERVER = "failure budget"
_RETRY_S = 10.0
_LOCK_TIMEOUT_S = 5.0


class RolloutPausePolicy:
    """Compares the rollouts of one library with their failure budgets.

    Args:
        fleet: the fleet database.
        rollouts: the public rollouts, and the key to pause them.
        retry_s: seconds before a failed check is repeated.
    """

    def __init__(self, fleet: Fleet, rollouts: Rollouts, retry_s: float = _RETRY_S) -> None:
        self._fleet = fleet
        self._rollouts = rollouts
        self._retry_s = retry_s
        self._changed = threading.Condition()
        self._due: set[str] = set()
        self._failed: set[str] = set()
        self._closed = False
        self._thread: threading.Thread | None = None

    def schedule_check(self, ring: str) -> None:
        """Schedule a check of a ring; never waits and never raises."""
        with self._changed:
            self._due.add(ring)
            self._changed.notify()
            if self._closed or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._run, name="failure budget", daemon=True)
            try:
                self._thread.start()  # not earlier: the server forks after the application was created once
            except RuntimeError:
                self._thread = None
                logger.exception("the failure budget of ring %s was not checked: no thread", ring)

    def close(self) -> None:
        """End the thread after its current check."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def check(self, ring: str) -> bool:
        """Pause each model line of a ring whose budget is used up; without a key record it once.

        Returns False when the check has to be repeated.

        Raises:
            ModelSyncError: the rollouts cannot be read.
            SQLAlchemyError: the database failed.
        """
        published = self._rollouts.published()
        rollout, done = published.rollouts.get(ring), True
        for line, step in (rollout.lines if rollout is not None else {}).items():
            if not step.paused and (figures := self._figures_if_spent(ring, line, step)):
                done &= self._pause(ring, line, ExpectedRollout(step.version, published.serial), figures)
        return done

    def _figures_if_spent(self, ring: str, line: str, step: RolloutStep) -> str:
        tally = self._fleet.tally(ring, line, step.version, at_least=step.failure_budget.min_boxes)
        return f"{tally.failed}/{tally.tried}" if self._rollouts.is_spent(ring, line, step, tally) else ""

    def _pause(self, ring: str, line: str, expected: ExpectedRollout, figures: str) -> bool:
        try:
            self._rollouts.set_paused(ring, line, True, SERVER, expected, figures, lock_timeout_s=_LOCK_TIMEOUT_S)
        except ModelSyncError as error:
            logger.error("the failure budget of ring %s model line %s is used up, but nothing was paused: %s", ring, line, error.message)
            if self._rollouts.can_sign:
                return False
            self._fleet.record(SERVER, "budget-spent", ring=ring, line=line, subject=expected.version, figures=figures, once=True)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._due and not self._closed:
                    self._changed.wait(self._retry_s if self._failed else None)
                if self._closed:
                    return
                rings, self._due, self._failed = self._due or self._failed, set(), self._failed if self._due else set()
            for ring in sorted(rings):
                if not self._check_safely(ring):
                    with self._changed:
                        self._failed.add(ring)

    def _check_safely(self, ring: str) -> bool:
        try:
            return self.check(ring)
        except ModelSyncError as error:
            logger.error("the failure budget of ring %s was not checked: %s", ring, error.message)
        except (OSError, SQLAlchemyError) as error:  # only the type: the statement contains reported values
            logger.error("the failure budget of ring %s was not checked: %s", ring, type(error).__name__)
        return False
