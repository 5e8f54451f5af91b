"""Reading one series with one model of volumes: from the stored images to millilitres, mask and key pictures."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from pydicom.filebase import DicomBytesIO

from appliance.domain import Job, JobResult, Measurement, Note, ScanState, VolumeResult
from appliance.errors import InferenceError, PixelError, VolumeError
from appliance.ingest import PARSE_ERRORS
from appliance.key_pictures import key_pictures
from appliance.segmentation import Segmentation, segment
from appliance.store import Store
from appliance.volume import PreparedVolume, Series, prepare, read_series
from appliance.watch import BEFORE_MODEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.loaded import Loaded
    from appliance.reading import Timer


def read_volume(store: Store, model: Loaded, job: Job, timer: Timer, alive: Callable[[], object]) -> JobResult:
    """Read the series of a job.

    Args:
        store: where its images are.
        model: a loaded model of volumes.
        job: of kind ``volume``.
        timer: gets the milliseconds of each part.
        alive: called after each step, each window of the model included: the job's deadline is one step's, not the whole volume's.

    Raises:
        InferenceError: the model failed, or ``job.memory`` before it was asked.
        StoreError: a file is gone.
    """
    try:
        read = _before_model(store, model, job, timer, alive)
    except (VolumeError, PixelError) as error:
        state = ScanState.QUALITY_REJECTED if error.code.startswith("quality.") else ScanState.NOT_ANALYSED
        return JobResult(state, Note(error.code, error.detail), timing_ms=timer.ms)
    except MemoryError as error:
        raise InferenceError("job.memory", BEFORE_MODEL) from error
    except PARSE_ERRORS as error:
        return JobResult(ScanState.NOT_ANALYSED, Note("pixel.undecodable", type(error).__name__), timing_ms=timer.ms)
    series, prepared, sop_uids = read
    asked = _Asked(model, alive)
    with timer.part("infer"):
        found = segment(prepared, series.grid, model.manifest, asked, batch=model.candidate.batch)
    timer.ms["window"] = asked.seconds * 1000 / asked.windows  # what a trial holds against the self-test, which knows one window
    with timer.part("postprocess"):
        volume = _result(model, series, prepared, found, sop_uids)
    return JobResult(ScanState.AI_READY, None, (), series.notes, timer.ms, model.describe(), volume)


def _before_model(
    store: Store, model: Loaded, job: Job, timer: Timer, alive: Callable[[], object]
) -> tuple[Series, PreparedVolume, list[str]]:
    rows = store.database.query(
        "SELECT id, sop_instance_uid FROM instances WHERE series_id = (SELECT series_id FROM jobs WHERE id = ?) ORDER BY id", job.id
    )
    sources = [lambda number=row["id"]: pydicom.dcmread(DicomBytesIO(store.read_instance(number))) for row in rows]
    spec = model.manifest.volume_input
    with timer.part("decode"):
        series = read_series(sources, spec)
    alive()
    with timer.part("preprocess"):
        prepared = prepare(series, spec)
    alive()
    empty = np.empty((0, 0, 0), series.values.dtype)  # the slices as stored are needed no more, their room is
    return replace(series, values=empty), prepared, [row["sop_instance_uid"] for row in rows]


class _Asked:
    """A model's ``infer`` that counts windows and seconds, and says after each that the job is alive."""

    def __init__(self, model: Loaded, alive: Callable[[], object]) -> None:
        self._infer, self._name, self._alive = model.runtime.infer, model.manifest.input.name, alive
        self.windows, self.seconds = 0, 0.0

    def __call__(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        started = time.perf_counter()
        outputs = self._infer(inputs)
        self.seconds += time.perf_counter() - started
        self.windows += len(inputs[self._name])
        self._alive()
        return outputs


def _result(model: Loaded, series: Series, prepared: PreparedVolume, found: Segmentation, sop_uids: list[str]) -> VolumeResult:
    manifest, runtime = model.manifest, model.runtime
    measurements = tuple(
        Measurement(label.name, f"{label.code.scheme}:{label.code.value}", label.title.zh, label.title.en, found.volumes_ml[label.name])
        for label in manifest.labels
    )
    geometry: dict[str, Any] = {
        "shape": list(series.grid.shape), "affine": series.grid.affine.tolist(), "classes": list(found.classes),
        "slices": [[sop_uids[source], frame] for source, frame in series.frames], "tilt": series.tilt, "steps": list(prepared.steps),
    }  # fmt: skip
    return VolumeResult(
        measurements, manifest.name, manifest.version, model.digest, runtime.precision,
        f"{runtime.name} {runtime.version} {runtime.provider}", key_pictures(prepared.values, found.drawn, prepared.grid),
        zlib.compress(found.mask.tobytes(), 1), geometry,
    )  # fmt: skip
