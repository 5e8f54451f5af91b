"""The brake that nobody presses: a thread that pauses a rollout when its version cost more boxes than its failure budget.

A report only wakes it. So no box waits for the library's lock, which a publication may hold for minutes, and whatever is wrong with
the library or the database, a report that was kept is answered as kept. What could not be done is tried again.
"""

from __future__ import annotations

import logging
import threading

from sqlalchemy.exc import SQLAlchemyError

from model_sync.errors import ModelSyncError
from model_sync.fleet.database import Fleet
from model_sync.fleet.pause import Seen
from model_sync.fleet.rollouts import Rollouts
from model_sync.trust.documents import RolloutStep

logger = logging.getLogger(__name__)
SERVER = "failure budget"
_RETRY_S = 10.0
_LOCK_TIMEOUT_S = 5.0


class Brake:
    """Holds the rollouts of one library against their failure budgets.

    Args:
        fleet: what the boxes said.
        rollouts: what is public, and the key that pauses it.
        retry_s: pause before something that failed is tried again.
    """

    def __init__(self, fleet: Fleet, rollouts: Rollouts, retry_s: float = _RETRY_S) -> None:
        self._fleet = fleet
        self._rollouts = rollouts
        self._retry_s = retry_s
        self._changed = threading.Condition()
        self._due: set[str] = set()
        self._again: set[str] = set()
        self._closed = False
        self._thread: threading.Thread | None = None

    def wake(self, ring: str) -> None:
        """Let a ring be looked at soon; it never waits and never raises."""
        with self._changed:
            self._due.add(ring)
            self._changed.notify()
            if self._closed or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._run, name="failure budget", daemon=True)
            try:
                self._thread.start()  # not before: a server forks after the application was tried out
            except RuntimeError:
                self._thread = None
                logger.exception("the failure budget of ring %s was not looked at: no thread", ring)

    def close(self) -> None:
        """End the thread, after what it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def check(self, ring: str) -> bool:
        """Pause each line of a ring whose budget is spent; without a key, say so once. Returns False when it has to be tried again.

        Raises:
            ModelSyncError: the rollouts cannot be read.
            SQLAlchemyError: the database is away.
        """
        published = self._rollouts.published()
        rollout, done = published.rollouts.get(ring), True
        for line, step in (rollout.lines if rollout is not None else {}).items():
            if not step.paused and (figures := self._spent(ring, line, step)):
                done &= self._pause(ring, line, Seen(step.version, published.serial), figures)
        return done

    def _spent(self, ring: str, line: str, step: RolloutStep) -> str:
        tally = self._fleet.tally(ring, line, step.version, at_least=step.failure_budget.min_boxes)
        return f"{tally.failed}/{tally.tried}" if self._rollouts.is_spent(ring, line, step, tally) else ""

    def _pause(self, ring: str, line: str, seen: Seen, figures: str) -> bool:
        try:
            self._rollouts.set_paused(ring, line, True, SERVER, seen, figures, lock_timeout_s=_LOCK_TIMEOUT_S)
        except ModelSyncError as error:
            logger.error("the failure budget of ring %s line %s is spent but nothing was paused: %s", ring, line, error.message)
            if self._rollouts.can_sign:
                return False
            self._fleet.record_once(SERVER, "budget-spent", ring=ring, line=line, subject=seen.version, figures=figures)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._due and not self._closed:
                    self._changed.wait(self._retry_s if self._again else None)
                if self._closed:
                    return
                rings, self._due, self._again = self._due or self._again, set(), self._again if self._due else set()
            for ring in sorted(rings):
                if not self._checked(ring):
                    with self._changed:
                        self._again.add(ring)

    def _checked(self, ring: str) -> bool:
        try:
            return self.check(ring)
        except ModelSyncError as error:
            logger.error("the failure budget of ring %s was not looked at: %s", ring, error.message)
        except (OSError, SQLAlchemyError) as error:  # the kind alone: a statement holds what was reported
            logger.error("the failure budget of ring %s was not looked at: %s", ring, type(error).__name__)
        return False
