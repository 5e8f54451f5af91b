"""The steps of a job that analyses one image: decode and preprocess it, and turn the model's outputs into findings."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from appliance.core.applicable_accuracy import accuracy_for
from appliance.core.correction import NOTHING_DECIDED, OTHER_QUARTER_TURN
from appliance.core.domain import Finding, Job, JobResult, Note, ScanState
from appliance.core.errors import InferenceError, PixelError
from appliance.imaging.body_mask import body_mask
from appliance.imaging.dicom_files import PARSE_ERRORS, read_dataset
from appliance.imaging.orientation import orientation_of
from appliance.imaging.pixels import decode_frame
from appliance.imaging.postprocessing import ScoredLabel, classify
from appliance.imaging.preprocessing import PreparedInput, QualityVerdict, check_quality, to_tensor
from appliance.runtime.input_check import UPSIDE_DOWN
from appliance.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from pydicom.dataset import FileDataset

    from appliance.inference.model_session import ModelSession
    from appliance.runtime.input_check import InputChecker
    from model_sync.bundle import InputSpec

# No radiograph is five times as long as wide, and letterboxing such an image would cost gigabytes.
_MAX_ASPECT: Final = 5.0
_OUTSIDE: Final = Note("caution.evidence_outside_body")


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

    def total_ms(self) -> float:
        """All parts together."""
        return sum(self.ms.values())


@dataclass(frozen=True)
class PreparedImage:
    """An image that is ready for its model, how long that took so far, and cautions about what a person decided."""

    job: Job
    prepared: PreparedInput
    timer: Timer
    cautions: tuple[Note, ...] = ()


def read_image(store: Store, job: Job, timer: Timer) -> FileDataset:
    """Read the stored data set of the job's image."""
    with timer.part("decode"):
        return read_dataset(store.read_instance(job.instance_id))


def prepare_image(store: Store, job: Job, spec: InputSpec, timer: Timer, checker: InputChecker | None = None) -> PreparedImage | JobResult:
    """Decode, correct, check and preprocess the image of a job; ``checker`` is the input check of the model's bundle.

    Returns:
        The prepared image; the job's result where the image cannot be decoded or its quality does not allow an analysis.

    Raises:
        InferenceError: ``job.memory``; neither the image nor the model is to blame: retried, then shown as failed.
        StoreError: the file is missing or was tampered with.
    """
    try:
        dataset = read_image(store, job, timer)
        with timer.part("decode"):
            frame = decode_frame(dataset, 0)
        if max(frame.shape[:2]) > _MAX_ASPECT * min(frame.shape[:2]):
            note = Note("quality.shape", f"{frame.shape[1]} x {frame.shape[0]}")
            return JobResult(ScanState.QUALITY_REJECTED, note, timing_ms=timer.ms)
        with timer.part("preprocess"):
            prepared = to_tensor(dataset, spec, pixels=frame, correction=job.correction)
            verdict = check_quality(prepared.display)
        with timer.part("input_check"):
            doubt = checker.doubt(prepared.display, prepared.aspect) if checker and verdict.ok else None
            if checker and doubt == UPSIDE_DOWN and job.correction == NOTHING_DECIDED and orientation_of(dataset).transpose:
                other = to_tensor(dataset, spec, pixels=frame, correction=OTHER_QUARTER_TURN)
                if checker.doubt(other.display, other.aspect) is None:
                    job, prepared, doubt = replace(job, correction=OTHER_QUARTER_TURN), other, None
    except PixelError as error:
        return JobResult(ScanState.NOT_ANALYSED, Note(error.code, error.detail), timing_ms=timer.ms)
    except MemoryError as error:
        raise InferenceError("job.memory_input") from error
    except PARSE_ERRORS as error:
        return JobResult(ScanState.NOT_ANALYSED, Note("pixel.undecodable", type(error).__name__), timing_ms=timer.ms)
    rejection = _rejection(verdict, doubt, job)
    if rejection is not None:
        return JobResult(ScanState.QUALITY_REJECTED, rejection, timing_ms=timer.ms)
    return PreparedImage(job, prepared, timer, _corrections(job, doubt))


def _rejection(verdict: QualityVerdict, doubt: Note | None, job: Job) -> Note | None:
    """Why the image is not analysed; a person outranks the input check, but nobody can analyse a blank image."""
    if verdict.code is not None:
        return Note(verdict.code)
    return None if job.correction.is_confirmed else doubt


def _corrections(job: Job, doubt: Note | None) -> tuple[Note, ...]:
    """How the image was corrected, and who decided that, as cautions of its result."""
    correction = job.correction
    if correction == OTHER_QUARTER_TURN:
        return (Note("caution.orientation_reversed"),)
    notes = [Note("caution.turned_by_person", str(correction.degrees))] if correction.degrees else []
    notes += [Note("caution.inverted_by_person")] if correction.inverts else []
    return (*notes, Note("caution.input_doubted")) if correction.is_confirmed and doubt is not None else tuple(notes)


def build_result(
    model: ModelSession, image: PreparedImage, outputs: dict[str, NDArray[np.float32]], run: dict[str, Any], batch_size: int = 1
) -> JobResult:
    """Turn the outputs for one image [1, ...], by name, into findings; ``run`` describes what computed them, see ``ModelSession.infer``."""
    with image.timer.part("postprocess"):
        scored = classify(outputs, model.manifest, image.prepared.geometry, body_mask(image.prepared.display))
        findings = tuple(_finding(model, run, label, image.job.patient_age_years) for label in scored)
        notes = tuple(_OUTSIDE for label in scored if label.positive and label.localisation and label.localisation.outside_body)[:1]
    run = run | ({"together": batch_size} if batch_size > 1 else {})
    return JobResult(
        ScanState.AI_READY,
        None,
        findings,
        (*image.prepared.notes, *image.cautions, *notes),
        image.timer.ms,
        run,
        correction=image.job.correction,
    )


def _finding(model: ModelSession, run: dict[str, Any], scored: ScoredLabel, age_years: float | None) -> Finding:
    manifest = model.manifest
    label = manifest.label(scored.label)
    point = manifest.operating_point(scored.label)
    interval: Any = lambda value: (value.value, value.low, value.high)  # noqa: E731 - used twice, only here
    localisation = scored.localisation
    return Finding(
        label=scored.label, code=f"{label.code.scheme}:{label.code.value}", title_zh=label.title.zh, title_en=label.title.en,
        score=scored.score, threshold=scored.threshold, positive=scored.positive,
        sensitivity=interval(point.sensitivity), specificity=interval(point.specificity), measured_on=point.measured_on,
        model=manifest.name, model_version=manifest.version, model_digest=model.digest,
        precision=run["precision"], runtime=f"{run['runtime']} {run['version']} {run['provider']}",
        peak=localisation.peak if localisation else None, outline=localisation.outline if localisation else (),
        heatmap_png=localisation.heatmap_png if localisation else b"", has_verified_accuracy=model.has_verified_accuracy,
        inner_contours=localisation.inner_contours if localisation else (),
        accuracy=accuracy_for(point, manifest.applies_to.age, age_years),
    )  # fmt: skip
