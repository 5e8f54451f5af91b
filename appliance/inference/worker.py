"""The worker process: the only one that infers and uses the accelerator. It runs one job at a time, under a lease.

Where tuning measured that a batch is faster, it runs as many jobs of one model as the batch holds; urgent jobs still go first.

A job that hangs, in Python or in native code, is ended by the kernel: ``setitimer`` with the default SIGALRM action kills the process
whatever holds the interpreter lock. The supervisor starts a new worker, and the expired lease retries the job or marks it as failed.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from appliance.core.errors import StoreError
from appliance.core.job_activity import JobActivity
from appliance.core.process import Lock, stop_on_signal
from appliance.core.settings import Settings
from appliance.core.states import ModelState
from appliance.core.wakeup import Wakeup
from appliance.imaging import decoder_process
from appliance.inference.batch_job import BatchJob
from appliance.inference.job_runner import InterruptedJobError, JobRunner
from appliance.inference.model_pool import CONNECT_WAIT_S, ModelPool
from appliance.lifecycle.activation import Activator
from appliance.lifecycle.background_loader import LOAD_DEADLINE_S
from appliance.store import audit_check, audit_reserve
from appliance.store.store import Store

logger = logging.getLogger(__name__)

_IDLE_S: Final = 0.5
_BUSY_IDLE_S: Final = 0.05
_PLAN_INTERVAL_S: Final = 1.0
_ANCHOR_INTERVAL_S: Final = 60.0


class Worker:
    """Claims jobs and runs them; between two jobs it continues activations and the loading of models.

    Args:
        set_deadline: kills the process after so many seconds; 0 cancels that. The process's own alarm by default.
        wait_s: how long scans wait for a remote runtime before the baseline takes over.
        is_stopping: whether the worker is asked to stop.

    Attributes:
        models: the models it has loaded.
        activator: activates, tries and withdraws models.
    """

    def __init__(
        self,
        store: Store,
        set_deadline: Callable[[float], object] | None = None,
        *,
        wait_s: float = CONNECT_WAIT_S,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._owner = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._activity = JobActivity(store.settings.data_dir)
        self._set_deadline = set_deadline or (lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds))
        self.models = ModelPool(store, lambda digest: self.activator.retuner.request(digest), wait_s)
        self.activator = Activator(store, self.models.load, self.models.use, load_now=self.models.load_successor)
        self._runner = JobRunner(
            store, self._owner, self.models, self._set_deadline, held=self._held, withdrawn=self._withdrawn, is_stopping=is_stopping
        )  # fmt: skip

    def prepare(self) -> None:
        """Load and warm up every active model, and close those that nobody needs."""
        self.models.load_active()

    def prepare_first(self) -> None:
        """Load the active models at the start of the process; a load that hangs ends it, and the next worker skips what was chosen."""
        active = sum(row["state"] == ModelState.ACTIVE for row in self._store.models())
        self._set_deadline(LOAD_DEADLINE_S * max(1, active))
        try:
            self.prepare()
        finally:
            self._set_deadline(0)

    def step(self) -> None:
        """Between two jobs: continue activations and the loading of models, without waiting; the deadline of a job applies."""
        self._set_deadline(self._store.settings.job_deadline_s)
        try:
            self.activator.tick()
            self.models.update()
        finally:
            self._set_deadline(0)

    def run_once(self) -> bool:
        """Run one job, or a batch of jobs. Returns False when there was none."""
        job = self._store.queue.claim_job(self._owner, self._runner.lease_s(), self._held())
        if job is None:
            self._activity.end()
            return False
        self._activity.begin()
        model = self.models.sessions.get(job.model_digest)
        size = model.candidate.batch if model is not None else 1
        others = self._store.queue.claim_batch(job, size - 1, self._runner.lease_s(size)) if size > 1 else []
        try:
            if model is not None and others:
                BatchJob(self._store, model, self._runner, [job, *others]).run()
            else:
                self._runner.run(job)
        except InterruptedJobError:
            self._store.queue.return_jobs([job, *others])
        self.models.record_changes()
        return True

    def _held(self) -> set[str]:
        """Digests of the models whose jobs must wait."""
        return self.activator.held | self.models.held

    def _withdrawn(self) -> set[str]:
        """Digests of the models that must not be used any more, as of now."""
        self.activator.check_withdrawals()
        return self.activator.held


def run(settings: Settings, *, until_idle: bool = False) -> None:
    """Run the one worker of a data directory until SIGTERM, or with ``until_idle`` until nothing is left to do.

    Raises:
        ApplianceError: ``box.busy`` when another worker serves this data directory.
    """
    lock = Lock(settings.data_dir, "worker")
    is_stopping = stop_on_signal()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    store = Store(settings)
    wakeup = Wakeup(settings)
    worker = Worker(store, is_stopping=is_stopping)
    try:
        _recover(store, worker)
        decoder_process.set_deadline(settings.job_deadline_s * decoder_process.JOB_SHARE)
        if not until_idle:
            with suppress(MemoryError):  # the first compressed frame tries it again
                decoder_process.start()
            worker.activator.retuner.request_outdated()
        logger.info("worker ready")
        _loop(store, worker, wakeup, is_stopping, until_idle=until_idle)
        worker.activator.stop()
    finally:
        store.close()
        wakeup.close()
        lock.release()


def _recover(store: Store, worker: Worker) -> None:
    """Clean up after the previous worker, load the models, then clear the crash marker."""
    store.content.sweep()
    at_work = worker.activator.journal.running_digests()
    store.queue.recover_jobs()
    worker.models.skip_tuned_runtime(worker.activator.recover(at_work))
    worker.prepare_first()
    worker.activator.confirm_loaded()


def _anchor_audit(store: Store) -> None:
    """Write an anchor of the audit where one is due, and reserve space for it again; a full disk delays both."""
    try:
        store.database.anchors().take()
    except (OSError, StoreError) as error:
        logger.error("the audit cannot be anchored", extra={"code": getattr(error, "code", "store.failed")})
    audit_reserve.fill(store.settings.data_dir)


def _check_audit(store: Store) -> float:
    """Search the audit for changes while there is no work; returns the seconds until the next search."""
    try:
        return audit_check.check_audit(store.database).interval_s
    except (OSError, StoreError) as error:
        logger.error("the audit cannot be searched", extra={"code": getattr(error, "code", "store.failed")})
        return audit_check.BROKEN_INTERVAL_S


def _loop(store: Store, worker: Worker, wakeup: Wakeup, is_stopping: Callable[[], bool], *, until_idle: bool) -> None:
    planned_at = anchored_at = check_at = float("-inf")
    while not is_stopping():
        if time.monotonic() - anchored_at > _ANCHOR_INTERVAL_S:
            _anchor_audit(store)
            anchored_at = time.monotonic()
        if time.monotonic() - planned_at > _PLAN_INTERVAL_S:  # under load too: an idle series must not wait for an empty queue
            store.planner.close_idle_series()
            planned_at = time.monotonic()
        worker.step()
        if worker.run_once():
            continue
        if store.planner.close_idle_series():
            continue
        # Without a receiver no further image can arrive.
        if until_idle and store.planner.close_series([row["id"] for row in store.database.query("SELECT id FROM series WHERE open = 1")]):
            continue
        is_busy = worker.activator.is_busy or worker.models.is_loading
        if until_idle and not is_busy:
            return
        worker.prepare()
        if time.monotonic() >= check_at and not until_idle:
            check_at = time.monotonic() + _check_audit(store)
        wakeup.wait(_BUSY_IDLE_S if is_busy else _IDLE_S)
