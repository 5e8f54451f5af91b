"""STAT: run urgent jobs between two steps of a batch or of a volume job, and stop what must not go on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Final

from appliance.core.domain import Job, JobKind
from appliance.inference.job_runner import InterruptedJobError, JobRunner
from appliance.store.store import Store

# After this many urgent images a batch returns to the queue, and the worker does what it does between two jobs.
_MAX_URGENT_JOBS: Final = 4


class Preemption:
    """Runs urgent jobs in the middle of others.

    Args:
        owner: the worker's name in leases.
        held: returns the digests of the models whose jobs must wait.
        withdrawn: looks for withdrawals, and returns the digests of the models that must not be used any more.
        is_stopping: whether the worker is asked to stop.
    """

    def __init__(
        self,
        store: Store,
        owner: str,
        runner: JobRunner,
        *,
        held: Callable[[], set[str]],
        withdrawn: Callable[[], set[str]],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._store, self._owner, self._runner = store, owner, runner
        self._held, self._withdrawn, self._is_stopping = held, withdrawn, is_stopping

    def run(self, job: Job) -> None:
        """Run one job; urgent jobs go first after each step of it.

        Raises:
            InterruptedJobError: see :meth:`run_urgent`.
        """
        self._runner.run(job, lambda: self._after_step(job))

    def _after_step(self, job: Job) -> None:
        if job.priority == 0:
            self.run_urgent(job)
        self._runner.start_deadline()

    def run_urgent(self, current: Job) -> None:
        """Run the urgent jobs that are queued by now, in the middle of ``current``.

        A stop and a withdrawal do not wait for urgent jobs, however many there are: both are checked before each of them. A volume job
        is finished even when the worker is to stop, without further urgent jobs in between.

        Raises:
            InterruptedJobError: the model of ``current`` was withdrawn; or ``current`` is part of a batch, which costs little to repeat,
                and the worker is to stop or has run so many urgent jobs that its other duties must not wait any longer.
        """
        is_volume = current.kind is JobKind.VOLUME
        for done in count():
            withdrawn, is_stopping = self._withdrawn(), self._is_stopping()
            if current.model_digest in withdrawn or (not is_volume and (is_stopping or done == _MAX_URGENT_JOBS)):
                raise InterruptedJobError
            if is_stopping:
                return
            self._store.planner.close_idle_series(urgent=True)  # its sender may keep the association open and never signal the end
            job = self._store.queue.claim_job(self._owner, self._runner.lease_s(), self._held(), urgent=True, volumes=not is_volume)
            if job is None:
                return
            self.run(job)
