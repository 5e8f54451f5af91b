"""The job that analyses one series with a volume model: from the stored images to volumes in ml, mask and key images."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.core.domain import Job, JobResult, Measurement, Note, ScanState, VolumeResult
from appliance.core.errors import InferenceError, PixelError, VolumeError
from appliance.imaging.dicom_files import PARSE_ERRORS, read_dataset
from appliance.imaging.volumes.acquisition import acquisitions, applies_to_sequence
from appliance.imaging.volumes.key_images import draw_key_images
from appliance.imaging.volumes.limits import check_memory, cropped_tissue_note
from appliance.imaging.volumes.segmentation import Segmentation, segment
from appliance.imaging.volumes.volume import PreparedVolume, Series, prepare, read_series
from appliance.store.store import Store

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from appliance.inference.image_job import Timer
    from appliance.inference.model_session import ModelSession
    from model_sync.bundle import Manifest

logger = logging.getLogger(__name__)

# The state of the images after an error whose code starts like this; after every other one they are not analysed.
_STATES: Final = {"quality": ScanState.QUALITY_REJECTED, "scope": ScanState.OUT_OF_SCOPE}
_MAX_RESTARTS: Final = 3


def analyse_volume(store: Store, model: ModelSession, job: Job, timer: Timer, on_step: Callable[[], object]) -> JobResult:
    """Analyse the series of a job with a volume model.

    ``on_step`` is called after each step, such as one slice or one window of the model: the deadline of a job applies to one step, not to
    the series, and urgent jobs may run in between.

    Raises:
        InferenceError: the model failed, or ``job.memory`` before the inference.
        StoreError: a file is missing or was tampered with.
    """
    try:
        series, prepared, sop_uids = _prepare(store, model, job, timer, on_step)
    except (VolumeError, PixelError) as error:
        state = _STATES.get(error.code.split(".")[0], ScanState.NOT_ANALYSED)
        return JobResult(state, Note(error.code, error.detail), timing_ms=timer.ms)
    except MemoryError as error:
        raise InferenceError("job.memory_input") from error
    except PARSE_ERRORS as error:
        return JobResult(ScanState.NOT_ANALYSED, Note("pixel.undecodable", type(error).__name__), timing_ms=timer.ms)
    windows = _WindowInference(model, on_step)
    with timer.part("infer"):
        segmentation = _segment(model, series, prepared, windows)
    timer.ms["window"] = windows.seconds * 1000 / windows.count  # the trial compares it with the self-test, which runs one window
    with timer.part("postprocess"):
        volume = _build_volume_result(model, windows.run, series, prepared, segmentation, sop_uids)
    return JobResult(ScanState.AI_READY, None, (), series.notes, timer.ms, windows.run, volume)


def _segment(model: ModelSession, series: Series, prepared: PreparedVolume, windows: _WindowInference) -> Segmentation:
    """Segment the volume with one runtime for all windows; raises InferenceError where the runtime changes again and again."""
    for _ in range(_MAX_RESTARTS):
        windows.restart()
        try:
            return segment(prepared, series.grid, model.manifest, windows, batch=model.candidate.batch)
        except _RuntimeChangedError:
            logger.warning("another runtime runs the model now: the series is started again")
    raise InferenceError("runtime.unavailable", f"what runs the model changed {_MAX_RESTARTS} times in one series")


def _prepare(
    store: Store, model: ModelSession, job: Job, timer: Timer, on_step: Callable[[], object]
) -> tuple[Series, PreparedVolume, list[str]]:
    rows = store.database.query(
        "SELECT id, sop_instance_uid, modality FROM instances WHERE series_id = (SELECT series_id FROM jobs WHERE id = ?) ORDER BY id",
        job.id,
    )
    spec = model.manifest.volume_input

    def read(number: int, *, pixels: bool = True) -> Dataset:
        return read_dataset(store.read_instance(number), stop_before_pixels=not pixels)

    def headers() -> Iterator[Dataset]:
        for row in rows:
            on_step()
            yield read(row["id"], pixels=False)

    check_shape = partial(
        check_memory, manifest=model.manifest, batch=model.candidate.batch, memory_bytes=store.settings.process_memory_max_bytes
    )
    with timer.part("decode"):
        notes = _check_acquisition(model.manifest, headers(), {row["modality"] for row in rows})
        series = read_series([partial(read, row["id"]) for row in rows], spec, on_step, check_shape)
    on_step()
    with timer.part("preprocess"):
        prepared = prepare(series, spec)
        check_shape(prepared.grid.shape)
        cut = cropped_tissue_note(series, prepared, spec)
    on_step()
    empty = np.empty((0, 0, 0), series.values.dtype)  # free the slices before the inference
    series = replace(series, values=empty, notes=(*notes, *series.notes, *([cut] if cut else [])))
    return series, prepared, [row["sop_instance_uid"] for row in rows]


def _check_acquisition(manifest: Manifest, headers: Iterable[Dataset], modalities: set[str]) -> tuple[Note, ...]:
    """Check that the series was acquired as the model requires; returns the notes that a person must see.

    Raises:
        VolumeError: ``scope.*``, or ``volume.mixed_scope``.
    """
    rule = manifest.applies_to.sequence
    if rule is None:
        return (Note("caution.sequence_unverified"),) if "MR" in modalities else ()
    verdict = applies_to_sequence(rule, [frame for header in headers for frame in acquisitions(header)])
    if verdict.refusal is not None:
        raise VolumeError(verdict.refusal.code, verdict.refusal.detail)
    return verdict.notes


class _RuntimeChangedError(Exception):
    """The runtime changed between two windows."""


class _WindowInference:
    """Infers the windows of a volume, counts them and their time, and calls ``on_step`` after each.

    Attributes:
        run: what computed the outputs, and whether any window left the box.
    """

    def __init__(self, model: ModelSession, on_step: Callable[[], object]) -> None:
        self._model, self._name, self._on_step = model, model.manifest.input.name, on_step
        self._runtime: object = None
        self.run: dict[str, Any] = {}
        self.count, self.seconds = 0, 0.0

    def restart(self) -> None:
        """Start again with the first window; that earlier windows left the box stays recorded."""
        self._runtime = None
        self.run = {key: value for key, value in self.run.items() if key == "leaves_box"}

    def __call__(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Infer some windows; raises _RuntimeChangedError where another runtime answers than for the windows before."""
        started = time.perf_counter()
        outputs, run = self._model.infer(inputs[self._name])
        self.seconds += time.perf_counter() - started
        self.count += len(inputs[self._name])
        self.run = self.run | run
        if self._runtime not in (None, self._model.runtime):
            raise _RuntimeChangedError
        self._runtime = self._model.runtime
        self._on_step()
        return outputs


def _build_volume_result(
    model: ModelSession, run: dict[str, Any], series: Series, prepared: PreparedVolume, found: Segmentation, sop_uids: list[str]
) -> VolumeResult:
    manifest = model.manifest
    measurements = tuple(
        Measurement(label.name, f"{label.code.scheme}:{label.code.value}", label.title.zh, label.title.en, found.volumes_ml[label.name])
        for label in manifest.labels
    )
    geometry: dict[str, Any] = {
        "shape": list(series.grid.shape), "affine": series.grid.affine.tolist(), "classes": list(found.classes),
        "slices": [[sop_uids[source], frame] for source, frame in series.frames], "tilt": series.tilt, "steps": list(prepared.steps),
    }  # fmt: skip
    return VolumeResult(
        measurements, manifest.name, manifest.version, model.digest, run["precision"],
        f"{run['runtime']} {run['version']} {run['provider']}", draw_key_images(prepared.values, found.voxel_classes, prepared.grid),
        zlib.compress(found.mask.tobytes(), 1), geometry,
    )  # fmt: skip
