"""The worker process: the only one that decodes for a model and touches the accelerator. One job at a time, under a lease.

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
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pydicom
from pydicom.filebase import DicomBytesIO

from appliance import copies
from appliance.activation import Activator
from appliance.domain import Finding, Job, JobKind, JobResult, Note, ScanState
from appliance.errors import ApplianceError, InferenceError, PixelError, StoreError
from appliance.ingest import PARSE_ERRORS
from appliance.pixels import decode_frame, iter_frames
from appliance.postprocess import ScoredLabel, classify
from appliance.preprocess import quality, to_tensor
from appliance.process import Lock, give_back_memory
from appliance.runtime import Runtime, open_runtime, plain_candidate
from appliance.settings import Settings
from appliance.signal import Bell
from appliance.store import Store
from appliance.watch import BEFORE_MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model_sync.bundle import Manifest, ModelBundle

logger = logging.getLogger(__name__)

_IDLE_S: Final = 0.5
_LEASE_MARGIN_S: Final = 30.0
_CHECK_SHARE: Final = 0.3
_BUSY_IDLE_S: Final = 0.05
_PLAN_EVERY_S: Final = 1.0
_DROP_EVERY_S: Final = 1.0
# No radiograph is five times as long as wide; letterboxing one that claims so would cost gigabytes.
_MAX_ASPECT: Final = 5.0


class Timer:
    """Milliseconds per named part of a job."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - started) * 1000


class Loaded:
    """A model ready to read: verified on disk, session open, warmed up.

    Args:
        settings: where the box's own copies are, and how many threads an inference gets.
        digest: which model.
        precision: which variant; the most exact when None.
    """

    def __init__(self, settings: Settings, digest: str, precision: str | None) -> None:
        bundle: ModelBundle = copies.own_copy(settings.data_dir, digest)
        self.manifest: Manifest = bundle.manifest
        self.digest = digest
        variant = bundle.variant(precision)
        self.runtime: Runtime = open_runtime(
            bundle.path(variant.file), bundle.manifest.input, plain_candidate(variant, settings.worker_threads)
        )


class Worker:
    """Claims jobs and does them.

    Args:
        store: the box's store.
        on_deadline: arms the deadline before a job (seconds) and disarms it after (0); the process's alarm by default.
    """

    def __init__(self, store: Store, on_deadline: Callable[[float], object] | None = None) -> None:
        self._store = store
        self._owner = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._loaded: dict[str, Loaded] = {}
        self._broken: dict[str, str] = {}
        self._arm = on_deadline or (lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds))
        self._next_drop = 0.0
        self.activator = Activator(store, self._load, self._take)

    def prepare(self) -> None:
        """Load and warm up every active model, and drop those that nobody needs any more."""
        active = {row["digest"]: row["activated_at"] for row in self._store.models() if row["state"] == "active"}
        self._drop(set(active))
        for digest in set(active) - set(self._loaded):
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
            if time.monotonic() >= self._next_drop and len(self._loaded) > 1:
                self._next_drop = time.monotonic() + _DROP_EVERY_S
                self._drop({row["digest"] for row in self._store.models() if row["state"] == "active"})
        finally:
            self._arm(0)

    def _drop(self, active: set[str]) -> None:
        """Let go of models that read no more; one that was replaced stays for as long as a job names it."""
        if not set(self._loaded) - active:
            return
        named = {row["model_digest"] for row in self._store.database.query("SELECT model_digest FROM jobs WHERE state = 'queued'")}
        for digest in set(self._loaded) - active - named:
            self._loaded.pop(digest).runtime.close()
            give_back_memory()

    def _load(self, digest: str, precision: str | None) -> Loaded:
        """A model beside the one that reads, in a thread of the activator's."""
        loaded = self._loaded.get(digest)
        if loaded is not None and precision in (None, loaded.runtime.precision):
            return loaded
        return Loaded(self._store.settings, digest, precision)

    def _take(self, loaded: Loaded) -> None:
        """The model that was put to work in this moment."""
        before = self._loaded.get(loaded.digest)
        if before is not None and before is not loaded:
            before.runtime.close()
        self._loaded[loaded.digest] = loaded

    def run_once(self) -> bool:
        """Do one job. Returns False when there was none."""
        deadline_s = self._store.settings.job_deadline_s
        job = self._store.claim_job(self._owner, deadline_s + _LEASE_MARGIN_S, self.activator.held)
        if job is None:
            return False
        self._arm(deadline_s)
        try:
            self._do(job)
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
        return True

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

    def _dataset(self, job: Job, timer: Timer) -> pydicom.Dataset:
        with timer.part("decode"):
            data = self._store.read_instance(job.instance_id)
            return pydicom.dcmread(DicomBytesIO(data))

    def _check(self, job: Job, timer: Timer) -> JobResult:
        """Prove that the pixels of an image no model reads can be decoded, frame by frame."""
        reason = job.notes[0]
        state = ScanState.NOT_ANALYSED if job.scope_code == "scope.no_model" else ScanState.OUT_OF_SCOPE
        try:
            dataset = self._dataset(job, timer)
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
        spec = model.manifest.image_input
        try:
            dataset = self._dataset(job, timer)
            with timer.part("decode"):
                frame = decode_frame(dataset, 0)
            if max(frame.shape[:2]) > _MAX_ASPECT * min(frame.shape[:2]):
                return JobResult(
                    ScanState.QUALITY_REJECTED, Note("quality.shape", f"{frame.shape[1]} x {frame.shape[0]}"), timing_ms=timer.ms
                )
            with timer.part("preprocess"):
                prepared = to_tensor(dataset, spec, pixels=frame)
                verdict = quality(prepared.display)
        except PixelError as error:
            return JobResult(ScanState.NOT_ANALYSED, Note(error.code, error.detail), timing_ms=timer.ms)
        except MemoryError as error:  # no fault of the scan's, nor of the model's: retried, then shown as failed
            raise InferenceError("job.memory", BEFORE_MODEL) from error
        except PARSE_ERRORS as error:
            return JobResult(ScanState.NOT_ANALYSED, Note("pixel.undecodable", type(error).__name__), timing_ms=timer.ms)
        if verdict.code is not None:
            return JobResult(ScanState.QUALITY_REJECTED, Note(verdict.code), timing_ms=timer.ms)
        with timer.part("infer"):
            outputs = model.runtime.infer({spec.name: prepared.tensor})
        with timer.part("postprocess"):
            scored = classify(outputs, model.manifest, prepared.geometry)
            findings = tuple(_finding(model, label) for label in scored)
        return JobResult(ScanState.AI_READY, None, findings, prepared.assumptions, timer.ms, model.runtime.describe())

    def _model(self, digest: str) -> Loaded:
        if digest not in self._loaded:
            self._loaded[digest] = Loaded(self._store.settings, digest, self._store.model(digest)["precision"])
        return self._loaded[digest]


def _finding(model: Loaded, scored: ScoredLabel) -> Finding:
    manifest, runtime = model.manifest, model.runtime
    label = manifest.label(scored.label)
    point = manifest.operating_point(scored.label)
    interval: Any = lambda value: (value.value, value.low, value.high)  # noqa: E731 - three numbers of one interval, used twice here
    place = scored.localisation
    return Finding(
        label=scored.label, code=f"{label.code.scheme}:{label.code.value}", title_zh=label.title.zh, title_en=label.title.en,
        score=scored.score, threshold=scored.threshold, positive=scored.positive,
        sensitivity=interval(point.sensitivity), specificity=interval(point.specificity), measured_on=point.measured_on,
        model=manifest.name, model_version=manifest.version, model_digest=model.digest,
        precision=runtime.precision, runtime=f"{runtime.name} {runtime.version} {runtime.provider}",
        peak=place.peak if place else None, outline=place.outline if place else (), heatmap_png=place.heatmap_png if place else b"",
    )  # fmt: skip


def run(settings: Settings, *, until_idle: bool = False) -> None:
    """The worker's life: one per data directory, until SIGTERM (or until nothing is left to do).

    Raises:
        ApplianceError: ``box.busy`` when another worker serves this data directory.
    """
    lock = Lock(settings.data_dir, "worker")
    stop = _stop_on_signal()
    store = Store(settings)
    bell = Bell(settings)
    worker = Worker(store)
    try:
        store.content.sweep()
        at_work = worker.activator.journal.at_work()
        store.recover_jobs()
        worker.activator.recover(at_work)
        worker.prepare()
        worker.activator.ready()
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
            if until_idle and not worker.activator.busy:
                break
            worker.prepare()
            bell.wait(_BUSY_IDLE_S if worker.activator.busy else _IDLE_S)
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
