"""Reading one series with one model of volumes: from the stored images to millilitres, mask and key pictures."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pydicom
from pydicom.filebase import DicomBytesIO

from appliance.core.domain import Job, JobResult, Measurement, Note, ScanState, VolumeResult
from appliance.core.errors import InferenceError, PixelError, VolumeError
from appliance.imaging.volumes.acquisition import acquired, applies_to_sequence
from appliance.imaging.volumes.key_images import key_pictures
from appliance.imaging.volumes.limits import check_room, cut_off
from appliance.imaging.volumes.segmentation import Segmentation, segment
from appliance.imaging.volumes.volume import PreparedVolume, Series, prepare, read_series
from appliance.ingest.ingest import PARSE_ERRORS
from appliance.store.store import Store

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from appliance.inference.image_job import Timer
    from appliance.inference.model_session import Loaded
    from model_sync.bundle import Manifest

logger = logging.getLogger(__name__)

# What a refusal of each kind means for the images; every other one leaves them not analysed.
_STATES: Final = {"quality": ScanState.QUALITY_REJECTED, "scope": ScanState.OUT_OF_SCOPE}
_MOST_TURNS: Final = 3


def read_volume(store: Store, model: Loaded, job: Job, timer: Timer, alive: Callable[[], object]) -> JobResult:
    """Read the series of a job.

    Args:
        store: where its images are.
        model: a loaded model of volumes.
        job: of kind ``volume``.
        timer: gets the milliseconds of each part.
        alive: called after each step, each slice and each window of the model included: the job's deadline is one step's, not the
            whole volume's, and what is urgent may be done in between.

    Raises:
        InferenceError: the model failed, or ``job.memory`` before it was asked.
        StoreError: a file is gone.
    """
    try:
        read = _before_model(store, model, job, timer, alive)
    except (VolumeError, PixelError) as error:
        state = _STATES.get(error.code.split(".")[0], ScanState.NOT_ANALYSED)
        return JobResult(state, Note(error.code, error.detail), timing_ms=timer.ms)
    except MemoryError as error:
        raise InferenceError("job.memory_input") from error
    except PARSE_ERRORS as error:
        return JobResult(ScanState.NOT_ANALYSED, Note("pixel.undecodable", type(error).__name__), timing_ms=timer.ms)
    series, prepared, sop_uids = read
    asked = _Asked(model, alive)
    with timer.part("infer"):
        found = _segmented(model, series, prepared, asked)
    timer.ms["window"] = asked.seconds * 1000 / asked.windows  # what a trial holds against the self-test, which knows one window
    with timer.part("postprocess"):
        volume = _result(model, asked.ran, series, prepared, found, sop_uids)
    return JobResult(ScanState.AI_READY, None, (), series.notes, timer.ms, asked.ran, volume)


def _segmented(model: Loaded, series: Series, prepared: PreparedVolume, asked: _Asked) -> Segmentation:
    """Every window by one and the same way; raises InferenceError where that changed again and again."""
    for _ in range(_MOST_TURNS):
        asked.begin()
        try:
            return segment(prepared, series.grid, model.manifest, asked, batch=model.candidate.batch)
        except _TurnedError:
            logger.warning("something else has come to run the model: the series is begun again")
    raise InferenceError("runtime.unavailable", f"what runs the model changed {_MOST_TURNS} times in one series")


def _before_model(
    store: Store, model: Loaded, job: Job, timer: Timer, alive: Callable[[], object]
) -> tuple[Series, PreparedVolume, list[str]]:
    rows = store.database.query(
        "SELECT id, sop_instance_uid, modality FROM instances WHERE series_id = (SELECT series_id FROM jobs WHERE id = ?) ORDER BY id",
        job.id,
    )
    spec, files = model.manifest.volume_input, _Files(store, [row["id"] for row in rows], alive)
    fits = partial(check_room, manifest=model.manifest, batch=model.candidate.batch, memory_bytes=store.settings.process_memory_max_bytes)
    with timer.part("decode"):
        notes = _in_scope(model.manifest, files, {row["modality"] for row in rows})
        series = read_series(files.sources(), spec, alive, fits)
    alive()
    with timer.part("preprocess"):
        prepared = prepare(series, spec)
        fits(prepared.grid.shape)
        cut = cut_off(series, prepared, spec)
    alive()
    empty = np.empty((0, 0, 0), series.values.dtype)  # the slices as stored are needed no more, their room is
    series = replace(series, values=empty, notes=(*notes, *series.notes, *([cut] if cut else [])))
    return series, prepared, [row["sop_instance_uid"] for row in rows]


class _Files:
    """The images of a series, read from the store one at a time."""

    def __init__(self, store: Store, ids: list[int], alive: Callable[[], object]) -> None:
        self._store, self._ids, self._alive = store, ids, alive

    def _read(self, number: int, *, pixels: bool = True) -> Dataset:
        return pydicom.dcmread(DicomBytesIO(self._store.read_instance(number)), stop_before_pixels=not pixels)

    def headers(self) -> Iterator[Dataset]:
        """Each image without its pixels; before each the job is alive."""
        for number in self._ids:
            self._alive()
            yield self._read(number, pixels=False)

    def sources(self) -> list[Callable[[], Dataset]]:
        """As :func:`appliance.imaging.volumes.volume.read_series` takes them."""
        return [partial(self._read, number) for number in self._ids]


def _in_scope(manifest: Manifest, files: _Files, modalities: set[str]) -> tuple[Note, ...]:
    """Hold the series against what the model says about how it must have been acquired; returns what a person must see.

    Raises:
        VolumeError: ``scope.*``, or ``volume.mixed_scope``.
    """
    rule = manifest.applies_to.sequence
    if rule is None:
        return (Note("caution.sequence_unverified"),) if "MR" in modalities else ()
    verdict = applies_to_sequence(rule, [frame for header in files.headers() for frame in acquired(header)])
    if verdict.refusal is not None:
        raise VolumeError(verdict.refusal.code, verdict.refusal.detail)
    return verdict.notes


class _TurnedError(Exception):
    """Another window was answered by something else than this one."""


class _Asked:
    """A model's ``infer`` that counts windows and seconds, and says after each that the job is alive.

    Attributes:
        ran: what answered, and whether any window left the box.
    """

    def __init__(self, model: Loaded, alive: Callable[[], object]) -> None:
        self._model, self._name, self._alive = model, model.manifest.input.name, alive
        self._turns: int | None = None
        self.ran: dict[str, Any] = {}
        self.windows, self.seconds = 0, 0.0

    def begin(self) -> None:
        """The first window comes next; what left the box before has left it."""
        self._turns = None
        self.ran = {key: value for key, value in self.ran.items() if key == "leaves_box"}

    def __call__(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run it; raises _TurnedError where something else answers than answered the windows before."""
        started = time.perf_counter()
        outputs, ran = self._model.ask(inputs[self._name])
        self.seconds += time.perf_counter() - started
        self.windows += len(inputs[self._name])
        self.ran = self.ran | ran
        if self._turns not in (None, self._model.turns):
            raise _TurnedError
        self._turns = self._model.turns
        self._alive()
        return outputs


def _result(
    model: Loaded, ran: dict[str, Any], series: Series, prepared: PreparedVolume, found: Segmentation, sop_uids: list[str]
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
        measurements, manifest.name, manifest.version, model.digest, ran["precision"],
        f"{ran['runtime']} {ran['version']} {ran['provider']}", key_pictures(prepared.values, found.drawn, prepared.grid),
        zlib.compress(found.mask.tobytes(), 1), geometry,
    )  # fmt: skip
