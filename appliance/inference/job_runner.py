"""Run one job: load what it needs, infer, and commit its result; an error ends this job alone, and urgent jobs (STAT) go first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import count
from typing import Final, TypeVar

from appliance.core.domain import Job, JobKind, JobResult, Note, ScanState
from appliance.core.errors import ApplianceError, PixelError, StoreError
from appliance.imaging.pixels import iter_frames
from appliance.inference.image_job import PreparedImage, Timer, build_result, prepare_image, read_image
from appliance.inference.model_pool import ModelPool
from appliance.inference.volume_job import analyse_volume
from appliance.store.store import Store

logger = logging.getLogger(__name__)

_LEASE_MARGIN_S: Final = 30.0
_CHECK_SHARE: Final = 0.2
# After this many urgent images a batch returns to the queue, and the worker does what it does between two jobs.
_MAX_URGENT_JOBS: Final = 4

T = TypeVar("T")


class InterruptedJobError(Exception):
    """The job must not continue now, through no fault of its own: it returns to the queue."""


class JobRunner:
    """Runs jobs that are leased to this worker, and urgent jobs in the middle of others.

    Args:
        owner: the worker's name in leases.
        set_deadline: kills the process after the given number of seconds; 0 cancels that.
        held: returns the digests of the models whose jobs must wait.
        withdrawn: checks for withdrawals, and returns the digests of the models that must not be used any more.
        is_stopping: whether the worker is asked to stop.
    """

    def __init__(
        self, store: Store, owner: str, models: ModelPool, set_deadline: Callable[[float], object], *,
        held: Callable[[], set[str]], withdrawn: Callable[[], set[str]], is_stopping: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._store, self._owner, self._models, self._set_deadline = store, owner, models, set_deadline
        self._held, self._withdrawn, self._is_stopping = held, withdrawn, is_stopping

    def lease_s(self, images: int = 1) -> float:
        """The lease for a batch: each image has the full deadline before, in and after the inference, as in a job of its own."""
        return (3 * images - 2) * self._store.settings.job_deadline_s + _LEASE_MARGIN_S

    def run(self, job: Job) -> None:
        """Run one job from its image to the commit; raises InterruptedJobError, see :meth:`run_urgent`."""
        self.guard(job, lambda: self._run(job))

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
            job = self._store.queue.claim_job(self._owner, self.lease_s(), self._held(), urgent=True, volumes=not is_volume)
            if job is None:
                return
            self.run(job)

    def guard(self, job: Job, step: Callable[[], T]) -> T | None:
        """Run one step of a job under its deadline.

        Returns:
            What the step returns; None when it failed, which has ended or re-queued the job.

        Raises:
            InterruptedJobError: the job must not continue now.
            StoreError: the disk failed; the lease returns the job to the queue when it works again.
        """
        self._start_deadline()
        try:
            return step()
        except InterruptedJobError:
            raise
        except MemoryError:
            self._store.queue.fail_job(job, Note("job.memory"))
        except StoreError as error:
            if error.code not in ("store.missing", "store.tampered"):
                raise
            self._store.queue.finish_job(job, JobResult(ScanState.NOT_ANALYSED, Note(error.code, error.detail)))
        except ApplianceError as error:
            logger.warning("job failed", extra={"job": job.id, "code": error.code})
            self._store.queue.fail_job(job, Note(error.code, error.detail))
        except Exception as error:  # top of the worker loop: one bad scan never stops the queue
            logger.exception("job failed", extra={"job": job.id})
            self._store.queue.fail_job(job, Note("job.error", type(error).__name__))
        finally:
            self._set_deadline(0)
        return None

    def _start_deadline(self) -> None:
        self._set_deadline(self._store.settings.job_deadline_s)

    def _after_step(self, job: Job) -> None:
        """Between two steps of a volume job, which takes minutes: run urgent jobs, and give the next step the full deadline."""
        if job.priority == 0:
            self.run_urgent(job)
        self._start_deadline()

    def _run(self, job: Job) -> None:
        timer, started = Timer(), time.perf_counter()
        result = self._check(job, timer) if job.kind is JobKind.CHECK else self._analyse(job, timer)
        commit(self._store, job, result, timer, started)

    def _check(self, job: Job, timer: Timer) -> JobResult:
        """Decode the frames of an image that no model applies to, so that damaged pixels are detected."""
        state = ScanState.NOT_ANALYSED if job.scope_code == "scope.no_model" else ScanState.OUT_OF_SCOPE
        try:
            dataset = read_image(self._store, job, timer)
            with timer.part("decode"):
                end = time.perf_counter() + self._store.settings.job_deadline_s * _CHECK_SHARE
                for _frame in iter_frames(dataset):
                    if time.perf_counter() > end:  # a long cine: the frames so far are undamaged, and no model waits for the rest
                        break
        except PixelError as error:
            return JobResult(ScanState.NOT_ANALYSED, Note(error.code, error.detail), timing_ms=timer.ms)
        return JobResult(state, job.notes[0], timing_ms=timer.ms)

    def _analyse(self, job: Job, timer: Timer) -> JobResult:
        model = self._models.get(job.model_digest)
        if job.kind is JobKind.VOLUME:
            return analyse_volume(self._store, model, job, timer, lambda: self._after_step(job))
        image = prepare_image(self._store, job, model.manifest.image_input, timer, model.input_checker)
        if not isinstance(image, PreparedImage):
            return image
        with timer.part("infer"):
            outputs, run = model.infer(image.prepared.tensor)
        return build_result(model, image, outputs, run)


def commit(store: Store, job: Job, result: JobResult, timer: Timer, started: float | None = None) -> None:
    """Commit a job's result; changes nothing when the lease was lost meanwhile.

    ``started`` is ``time.perf_counter()`` at its start; None where other jobs ran in between, and only its own parts count.
    """
    with timer.part("store"):
        is_committed = store.queue.finish_job(job, result)
    if is_committed:
        timer.ms["total"] = timer.total_ms() if started is None else (time.perf_counter() - started) * 1000
        store.queue.record_store_time(job, timer.ms)
        logger.info("job done", extra={"job": job.id, "state": result.state.value, "seconds": round(timer.ms["total"] / 1000, 3)})
