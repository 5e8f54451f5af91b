"""Reading one image with one model, in its steps: what stands before the model, and what is made of its answer."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pydicom
from pydicom.filebase import DicomBytesIO

from appliance.core.domain import Finding, Job, JobResult, Note, ScanState
from appliance.core.errors import InferenceError, PixelError
from appliance.imaging.pixels import decode_frame
from appliance.imaging.postprocessing import ScoredLabel, classify
from appliance.imaging.preprocessing import Prepared, quality, to_tensor
from appliance.ingest.ingest import PARSE_ERRORS
from appliance.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from appliance.inference.model_session import Loaded
    from model_sync.bundle import InputSpec

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


@dataclass(frozen=True)
class Film:
    """An image ready for its model, and how long that took so far."""

    job: Job
    prepared: Prepared
    timer: Timer


def dataset_of(store: Store, job: Job, timer: Timer) -> pydicom.Dataset:
    """The image's data set, as it came."""
    with timer.part("decode"):
        return pydicom.dcmread(DicomBytesIO(store.read_instance(job.instance_id)))


def prepare(store: Store, job: Job, spec: InputSpec, timer: Timer) -> Film | JobResult:
    """Everything before the model; a result where the image cannot or must not be read.

    Raises:
        InferenceError: ``job.memory``; no fault of the scan's, nor of the model's: retried, then shown as failed.
        StoreError: the file is gone.
    """
    try:
        dataset = dataset_of(store, job, timer)
        with timer.part("decode"):
            frame = decode_frame(dataset, 0)
        if max(frame.shape[:2]) > _MAX_ASPECT * min(frame.shape[:2]):
            note = Note("quality.shape", f"{frame.shape[1]} x {frame.shape[0]}")
            return JobResult(ScanState.QUALITY_REJECTED, note, timing_ms=timer.ms)
        with timer.part("preprocess"):
            prepared = to_tensor(dataset, spec, pixels=frame)
            verdict = quality(prepared.display)
    except PixelError as error:
        return JobResult(ScanState.NOT_ANALYSED, Note(error.code, error.detail), timing_ms=timer.ms)
    except MemoryError as error:
        raise InferenceError("job.memory_input") from error
    except PARSE_ERRORS as error:
        return JobResult(ScanState.NOT_ANALYSED, Note("pixel.undecodable", type(error).__name__), timing_ms=timer.ms)
    if verdict.code is not None:
        return JobResult(ScanState.QUALITY_REJECTED, Note(verdict.code), timing_ms=timer.ms)
    return Film(job, prepared, timer)


def conclude(model: Loaded, film: Film, outputs: dict[str, NDArray[np.float32]], ran: dict[str, Any], together: int = 1) -> JobResult:
    """What the model's answer to one image [1, ...] means; ``ran`` is what gave it, ``together`` how many images it read at once."""
    with film.timer.part("postprocess"):
        scored = classify(outputs, model.manifest, film.prepared.geometry)
        findings = tuple(_finding(model, ran, label) for label in scored)
    ran = ran | ({"together": together} if together > 1 else {})
    return JobResult(ScanState.AI_READY, None, findings, film.prepared.assumptions, film.timer.ms, ran)


def _finding(model: Loaded, ran: dict[str, Any], scored: ScoredLabel) -> Finding:
    manifest = model.manifest
    label = manifest.label(scored.label)
    point = manifest.operating_point(scored.label)
    interval: Any = lambda value: (value.value, value.low, value.high)  # noqa: E731 - three numbers of one interval, used twice here
    place = scored.localisation
    return Finding(
        label=scored.label, code=f"{label.code.scheme}:{label.code.value}", title_zh=label.title.zh, title_en=label.title.en,
        score=scored.score, threshold=scored.threshold, positive=scored.positive,
        sensitivity=interval(point.sensitivity), specificity=interval(point.specificity), measured_on=point.measured_on,
        model=manifest.name, model_version=manifest.version, model_digest=model.digest,
        precision=ran["precision"], runtime=f"{ran['runtime']} {ran['version']} {ran['provider']}",
        peak=place.peak if place else None, outline=place.outline if place else (), heatmap_png=place.heatmap_png if place else b"",
    )  # fmt: skip
