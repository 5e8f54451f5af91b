"""The worker process: the only one that decodes for a model and touches the accelerator. One job at a time, under a lease.

Where this box measured a batch to be faster, as many of one model as it holds, with urgent ones before and in between.

A job that hangs, in Python or in native code, is ended by the kernel: ``setitimer`` with the default SIGALRM kills the whole
process whatever holds the interpreter, the supervisor starts a new one, and the job is retried or poisoned from its lease.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Final, TypeVar

from appliance.core.domain import Job, JobKind, JobResult, Note, ScanState
from appliance.core.errors import ActivationError, ApplianceError, InferenceError, PixelError, StoreError
from appliance.core.process import Lock, give_back_memory
from appliance.core.self_test_report import SelfTestReport
from appliance.core.settings import Settings
from appliance.core.wakeup import Bell
from appliance.imaging.pixels import iter_frames
from appliance.inference.batch_job import Batch
from appliance.inference.image_job import Timer, conclude, dataset_of, prepare
from appliance.inference.model_session import Loaded
from appliance.inference.remote_retry import Comeback
from appliance.inference.remote_runtime import ELSEWHERE, START_S
from appliance.inference.volume_job import read_volume
from appliance.lifecycle.activation import Activator
from appliance.lifecycle.background_loader import Beside, Load
from appliance.store.store import Store
from appliance.tuning.selection import Plan

logger = logging.getLogger(__name__)

_IDLE_S: Final = 0.5
_LEASE_MARGIN_S: Final = 30.0
_CHECK_SHARE: Final = 0.3
_BUSY_IDLE_S: Final = 0.05
_PLAN_EVERY_S: Final = 1.0
_DROP_EVERY_S: Final = 1.0

# A batch that so much has overtaken goes back to the queue, and the worker does what it does between two jobs.
_MOST_FIRST: Final = 4

_T = TypeVar("_T")


class _MakeWayError(Exception):
    """What is under way must not be gone on with now, which is no fault of its jobs."""


class Worker:
    """Claims jobs and does them.

    Args:
        store: the box's store.
        on_deadline: arms the deadline before a job (seconds) and disarms it after (0); the process's alarm by default.
        wait_s: how long a scan waits for a model that is run elsewhere to be reached, before the plain way begins.
        stopping: whether the worker is asked to stop.
    """

    def __init__(
        self,
        store: Store,
        on_deadline: Callable[[float], object] | None = None,
        *,
        wait_s: float = START_S,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._owner = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._loaded: dict[str, Loaded] = {}
        self._broken: dict[str, str] = {}
        self._arm = on_deadline or (lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds))
        self._next_drop = 0.0
        self._wait_s = wait_s
        self._stopping = stopping
        self._distrusted: set[str] = set()
        self._said: dict[str, Note | None] = {}
        self._beside = Beside()
        self.activator = Activator(store, self._load, self._take, load_now=self._load_now)
        self._comeback = Comeback(self.activator.retuner.request)

    def distrust(self, digests: list[str]) -> None:
        """The worker before this one fell while it loaded these: this one loads them the plain way, and has them measured again."""
        self._distrusted |= set(digests)

    @property
    def loading(self) -> bool:
        """Whether a model that is run elsewhere is being loaded, whose scans wait meanwhile."""
        return bool(self._beside.loading)

    def prepare(self) -> None:
        """Load and warm up every active model, and drop those that nobody needs any more; what is run elsewhere is loaded beside."""
        active = {row["digest"]: row["activated_at"] for row in self._store.models() if row["state"] == "active"}
        self._drop(set(active))
        absent = set(active) - set(self._loaded)
        elsewhere = {digest for digest in absent if self._runs_elsewhere(digest)}
        for digest in elsewhere:
            if self._beside.why_not(digest) is None:
                self._load_beside(digest)
        for digest in absent - elsewhere:
            if self._broken.get(digest) == active[digest]:
                continue
            try:
                self._model(digest)
            except ApplianceError as error:  # its jobs fail with this reason; the other models go on
                logger.error("model not ready", extra={"code": error.code})
                self._broken[digest] = active[digest]
            give_back_memory()

    def step(self) -> None:
        """Between two jobs: go on with a new model, without waiting for anything. A disk that hangs under it ends the worker."""
        self._arm(self._store.settings.job_deadline_s)
        try:
            self.activator.tick()
            self._comeback.look(self._loaded)
            self._take_beside()
            self._say_changes()
            if time.monotonic() >= self._next_drop and len(self._loaded) > 1:
                self._next_drop = time.monotonic() + _DROP_EVERY_S
                self._drop({row["digest"] for row in self._store.models() if row["state"] == "active"})
        finally:
            self._arm(0)

    def _drop(self, active: set[str]) -> None:
        """Let go of models that read no more; one that was replaced stays for as long as a job names it."""
        if not set(self._loaded) - active:
            return
        for digest in set(self._loaded) - active - self._named():
            self._loaded.pop(digest).runtime.close()
            give_back_memory()

    def _named(self) -> set[str]:
        """The models that waiting jobs name."""
        return {row["model_digest"] for row in self._store.database.query("SELECT model_digest FROM jobs WHERE state = 'queued'")}

    # -- models that are run elsewhere, loaded beside the reading ----------------------------------------------------

    def _plan(self, digest: str) -> Plan:
        row = self._store.model(digest)
        return Plan.of(row["precision"], SelfTestReport.from_json(row["self_test"]))

    def _runs_elsewhere(self, digest: str) -> bool:
        """Whether loading it may have to wait for another machine."""
        chosen, hub = self._plan(digest).candidate, self._store.settings.triton_url
        return chosen is not None and chosen.runtime in ELSEWHERE and chosen.provider == hub != "" and digest not in self._distrusted

    def _load_beside(self, digest: str, load: Load | None = None) -> None:
        wait_s, settings = self._wait_s, self._store.settings
        self._beside.begin(load or (lambda digest, plan: Loaded(settings, digest, plan, wait_s=wait_s)), digest, self._plan(digest))

    def _take_beside(self) -> None:
        """What has been loaded beside reads from now on; what could not be is said, and tried again."""
        for digest, came in self._beside.come():
            if isinstance(came, ActivationError):
                self._cannot(digest, came)
            elif isinstance(came, Loaded) and digest in self._loaded:  # measured anew meanwhile
                came.runtime.close()
            elif isinstance(came, Loaded):
                self._loaded[digest] = came
                self._say_how(came)
        if due := self._beside.due():
            needed = self._named() | {row["digest"] for row in self._store.models() if row["state"] == "active"}
            for digest in due:
                self._beside.forget(digest)
                if digest in needed - set(self._loaded):
                    self._load_beside(digest)

    def _reach_beside(self, lost: Loaded) -> None:
        """Nothing runs it now; it is reached for at once, and its scans wait so long."""
        if lost.away is not None and lost.away.lost is not None:
            self.activator.retuner.tunings.cannot_run(lost.digest, Note(lost.away.lost.code, lost.away.lost.detail))
            self._load_beside(lost.digest, lambda *_: lost.reach_again())

    def _lost(self) -> set[str]:
        """Models that nothing runs any more: what is elsewhere does not answer, and the plain way must not."""
        return {digest for digest, loaded in self._loaded.items() if loaded.away is not None and loaded.away.lost is not None}

    def _held(self) -> set[str]:
        """Models whose jobs wait."""
        return self.activator.held | self._beside.loading | self._lost()

    def _cannot(self, digest: str, error: ApplianceError) -> None:
        """Nothing runs a model: say so, and measure, for perhaps there is another way."""
        self.activator.retuner.tunings.cannot_run(digest, Note(error.code, error.detail))
        self.activator.retuner.request(digest)

    def _load(self, digest: str, plan: Plan) -> Loaded:
        """A model beside the one that reads, in a thread of the activator's."""
        loaded = self._loaded.get(digest)
        if loaded is not None and loaded.fallback is None and loaded.plan == plan:
            return loaded
        return Loaded(self._store.settings, digest, plan)

    def _load_now(self, digest: str, plan: Plan) -> Loaded:
        """The same, where nothing reads meanwhile: what is far away is not waited for."""
        loaded = self._loaded.get(digest)
        return loaded if loaded is not None and loaded.plan == plan else Loaded(self._store.settings, digest, plan, wait_s=self._wait_s)

    def _take(self, loaded: Loaded) -> None:
        """The model that was put to work in this moment."""
        before = self._loaded.get(loaded.digest)
        if before is not None and before is not loaded:
            before.runtime.close()
        self._loaded[loaded.digest] = loaded
        self._beside.forget(loaded.digest)
        self._say_how(loaded)

    def _say_how(self, loaded: Loaded) -> None:
        """Keep what runs the model, for people; where that is not what was chosen, it is measured again, or what is away waited for."""
        self._said[loaded.digest] = loaded.fallback
        if loaded.fallback is None:
            self.activator.retuner.tunings.runs_as_chosen(loaded.digest, loaded.describe())
        else:
            self.activator.retuner.tunings.fell_back(loaded.digest, loaded.fallback, loaded.describe())
            if loaded.away is None:
                self.activator.retuner.request(loaded.digest)

    def _say_changes(self) -> None:
        """What ran elsewhere does not answer any more, or answers again: that can come with every inference."""
        for digest in self._lost():
            self._reach_beside(self._loaded.pop(digest))
        for loaded in self._loaded.values():
            if loaded.away is not None and self._said.get(loaded.digest) != loaded.fallback:
                self._say_how(loaded)

    def run_once(self) -> bool:
        """Do one job, or a batch of them. Returns False when there was none."""
        job = self._store.claim_job(self._owner, self._lease_s(1), self._held())
        if job is None:
            return False
        model = self._loaded.get(job.model_digest)
        size = model.candidate.batch if model is not None else 1
        others = self._store.claim_company(job, size - 1, self._lease_s(size)) if size > 1 else []
        if model is not None and others:
            work = partial(Batch(self._store, model, self._guarded, self._alone, partial(self._urgent_first, job)).read, [job, *others])
        else:
            work = partial(self._alone, job)
        try:
            work()
        except _MakeWayError:
            self._store.give_back([job, *others])
        self._say_changes()
        return True

    def _lease_s(self, images: int) -> float:
        """Before, in and after the model each image of a batch has the whole deadline of a job, as it has alone."""
        return (3 * images - 2) * self._store.settings.job_deadline_s + _LEASE_MARGIN_S

    def _alone(self, job: Job) -> None:
        self._guarded(job, lambda: self._do(job))

    def _urgent_first(self, under_way: Job) -> None:
        """Between two steps of a batch or series: whatever is urgent has come meanwhile and does not wait for its end.

        Nor do a stop and a withdrawal, however much comes: each is looked for before every urgent image, as between any two jobs. A
        series is finished all the same when the worker is to stop, without more urgent images in between.

        Raises:
            _MakeWayError: its model was withdrawn; or a batch, which loses next to nothing by it, is in the way of a stop or has been
                overtaken by so many that what is done between two jobs must not wait any longer.
        """
        series = under_way.kind is JobKind.VOLUME
        for overtaken in count():
            self.activator.check_withdrawals()
            stop = self._stopping()
            if under_way.model_digest in self.activator.held or (not series and (stop or overtaken == _MOST_FIRST)):
                raise _MakeWayError
            if stop:
                return
            self._store.close_idle_series(urgent=True)  # its sender may keep the association open, and say no end
            job = self._store.claim_job(self._owner, self._lease_s(1), self._held(), urgent=True, volumes=not series)
            if job is None:
                return
            self._alone(job)

    def _between(self, job: Job) -> None:
        """Between two steps of a series, which takes minutes: what is urgent goes first, and its deadline begins anew."""
        if job.priority == 0:
            self._urgent_first(job)
        self._arm(self._store.settings.job_deadline_s)

    def _guarded(self, job: Job, step: Callable[[], _T]) -> _T | None:
        """One step of a job under its deadline; what goes wrong ends this job alone, and gives None."""
        self._arm(self._store.settings.job_deadline_s)
        try:
            return step()
        except _MakeWayError:
            raise
        except MemoryError:
            self._store.fail_job(job, Note("job.memory"))
        except StoreError as error:
            if error.code not in ("store.missing", "store.tampered"):
                raise  # the disk failed: the lease gives the job back when it works again
            self._store.finish_job(job, JobResult(ScanState.NOT_ANALYSED, Note(error.code, error.detail)))
        except ApplianceError as error:
            logger.warning("job failed", extra={"job": job.id, "code": error.code})
            self._store.fail_job(job, Note(error.code, error.detail))
        except Exception as error:  # top of the worker loop: one bad scan never stops the queue
            logger.exception("job failed", extra={"job": job.id})
            self._store.fail_job(job, Note("job.error", type(error).__name__))
        finally:
            self._arm(0)
        return None

    def _do(self, job: Job) -> None:
        timer = Timer()
        started = time.perf_counter()
        result = self._check(job, timer) if job.kind is JobKind.CHECK else self._infer(job, timer)
        with timer.part("store"):
            kept = self._store.finish_job(job, result)
        if kept:
            timer.ms["total"] = (time.perf_counter() - started) * 1000
            self._store.record_store_time(job, timer.ms)
            logger.info("job done", extra={"job": job.id, "state": result.state.value, "seconds": round(timer.ms["total"] / 1000, 3)})

    def _check(self, job: Job, timer: Timer) -> JobResult:
        """Prove that the pixels of an image no model reads can be decoded, frame by frame."""
        reason = job.notes[0]
        state = ScanState.NOT_ANALYSED if job.scope_code == "scope.no_model" else ScanState.OUT_OF_SCOPE
        try:
            dataset = dataset_of(self._store, job, timer)
            with timer.part("decode"):
                limit = time.perf_counter() + self._store.settings.job_deadline_s * _CHECK_SHARE
                for _frame in iter_frames(dataset):
                    if time.perf_counter() > limit:  # a long film: so much of it is whole, and no model waits for the rest
                        break
        except PixelError as error:
            return JobResult(ScanState.NOT_ANALYSED, Note(error.code, error.detail), timing_ms=timer.ms)
        return JobResult(state, reason, timing_ms=timer.ms)

    def _infer(self, job: Job, timer: Timer) -> JobResult:
        model = self._model(job.model_digest)
        if job.kind is JobKind.VOLUME:
            return read_volume(self._store, model, job, timer, lambda: self._between(job))
        spec = model.manifest.image_input
        film = prepare(self._store, job, spec, timer)
        if isinstance(film, JobResult):
            return film
        with timer.part("infer"):
            outputs, ran = model.ask(film.prepared.tensor)
        return conclude(model, film, outputs, ran)

    def _model(self, digest: str) -> Loaded:
        if digest not in self._loaded:
            if (why := self._beside.why_not(digest)) is not None:
                raise InferenceError(why.code, why.detail)
            distrust = Note("runtime.crashed", "the worker died while it loaded the model") if digest in self._distrusted else None
            try:
                self._loaded[digest] = Loaded(self._store.settings, digest, self._plan(digest), distrust, wait_s=self._wait_s)
            except ApplianceError as error:
                self._cannot(digest, error)
                raise
            self._say_how(self._loaded[digest])
        return self._loaded[digest]


def run(settings: Settings, *, until_idle: bool = False) -> None:
    """The worker's life: one per data directory, until SIGTERM (or until nothing is left to do).

    Raises:
        ApplianceError: ``box.busy`` when another worker serves this data directory.
    """
    lock = Lock(settings.data_dir, "worker")
    stop = _stop_on_signal()
    store = Store(settings)
    bell = Bell(settings)
    worker = Worker(store, stopping=stop)
    try:
        store.content.sweep()
        at_work = worker.activator.journal.running_digests()
        store.recover_jobs()
        worker.distrust(worker.activator.recover(at_work))
        worker.prepare()
        worker.activator.confirm_loaded()
        if not until_idle:
            worker.activator.retuner.request_outdated()
        logger.info("worker ready")
        planned = 0.0
        while not stop():
            if time.monotonic() - planned > _PLAN_EVERY_S:  # under load too: a silent series must not wait for an empty queue
                store.close_idle_series()
                planned = time.monotonic()
            worker.step()
            if worker.run_once():
                continue
            if store.close_idle_series() or (until_idle and _close_all(store)):
                continue
            busy = worker.activator.is_busy or worker.loading
            if until_idle and not busy:
                break
            worker.prepare()
            bell.wait(_BUSY_IDLE_S if busy else _IDLE_S)
        worker.activator.stop()
    finally:
        store.close()
        bell.close()
        lock.release()


def _close_all(store: Store) -> int:
    """Without a server nobody else will come: every open series is complete."""
    return store.close_series([row["id"] for row in store.database.query("SELECT id FROM series WHERE open = 1")])


def _stop_on_signal() -> Callable[[], bool]:
    """SIGTERM and SIGINT let the job at hand finish, then end the loop."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return lambda: bool(asked)
