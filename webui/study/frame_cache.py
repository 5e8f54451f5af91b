"""Frames for the viewer, decoded one at a time and cached, since a page asks for the description and then for the pixels.

What decodes is imported, and the decoder process started, with the first image, to save memory while no image is shown.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from flask import Flask, current_app
from werkzeug.exceptions import ServiceUnavailable

from appliance.core.correction import Correction
from appliance.core.errors import PixelError
from appliance.imaging import decoder_process
from appliance.store.store import Store

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from appliance.imaging.display_frame import DisplayFrame

# Enough for the largest plain radiographs; little beside the memory of the worker.
_MAX_FILE_BYTES: Final = 32 << 20
_MAX_PIXEL_BYTES: Final = 32 << 20
_WAIT_S: Final = 30.0
# A decoder that failed is not tried again at once: each time the page is loaded again, other people would wait for it.
_FAILURE_KEPT_S: Final = 300.0
_MAX_FAILURES: Final = 200


class FrameCache:
    """The frames of stored images; at most one is decoded at a time, which limits the memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._files: OrderedDict[int, tuple[int, Dataset]] = OrderedDict()
        self._frames: OrderedDict[tuple[int, int, Correction], DisplayFrame] = OrderedDict()
        self._failures: OrderedDict[tuple[int, int], tuple[float, PixelError]] = OrderedDict()

    def frame(self, instance_id: int, number: int) -> DisplayFrame:
        """One frame, numbered from 0, as the viewer draws it: turned by its header and corrected as a person decided.

        Raises:
            StoreError: the image is missing or was tampered with.
            PixelError: its pixels cannot be decoded.
            IndexError: it has no such frame.
            ServiceUnavailable: too many wait for frames, or the machine is short of memory.
        """
        correction = self._store.correction_of(instance_id)
        if not self._lock.acquire(timeout=_WAIT_S):
            raise ServiceUnavailable(retry_after=10)
        try:
            return self._cached((instance_id, number, correction)) or self._decode(instance_id, number, correction)
        finally:
            self._lock.release()

    def _cached(self, key: tuple[int, int, Correction]) -> DisplayFrame | None:
        frame = self._frames.get(key)
        if frame is not None:
            self._frames.move_to_end(key)
        return frame

    def _decode(self, instance_id: int, number: int, correction: Correction) -> DisplayFrame:
        from appliance.imaging.display_frame import display_frame

        failed_at, failure = self._failures.pop((instance_id, number), (0.0, None))
        if failure is not None and time.monotonic() < failed_at + _FAILURE_KEPT_S:
            self._failures[instance_id, number] = failed_at, failure
            raise PixelError(failure.code, failure.detail)
        try:
            frame = display_frame(self._dataset(instance_id), number, correction)
        except MemoryError as error:
            raise ServiceUnavailable(retry_after=10) from error
        except PixelError as error:
            if error.code.startswith("pixel.decoder"):
                self._failures[instance_id, number] = time.monotonic(), PixelError(error.code, error.detail)  # without its frames
                while len(self._failures) > _MAX_FAILURES:
                    self._failures.popitem(last=False)
            raise
        if frame.pixels.base is not None:  # a view would keep all frames of the image in memory
            frame = replace(frame, pixels=frame.pixels.copy())
        _put(self._frames, (instance_id, number, correction), frame, lambda item: int(item.pixels.nbytes), _MAX_PIXEL_BYTES)
        return frame

    def _dataset(self, instance_id: int) -> Dataset:
        """The parsed file, cached because a viewer asks for the frames of one image one by one."""
        from appliance.imaging.dicom_files import read_dataset

        if instance_id in self._files:
            self._files.move_to_end(instance_id)
            return self._files[instance_id][1]
        data = self._store.read_instance(instance_id)
        dataset = read_dataset(data)
        _put(self._files, instance_id, (len(data), dataset), lambda item: item[0], _MAX_FILE_BYTES)
        return dataset


def _put(cache: OrderedDict[Any, Any], key: Any, value: Any, size: Any, limit: int) -> None:
    """Add a value and remove the oldest until all fit; a value larger than the limit is not added."""
    if size(value) > limit:
        return
    cache[key] = value
    while sum(size(item) for item in cache.values()) > limit:
        cache.popitem(last=False)


def init_app(app: Flask, store: Store) -> None:
    """Make the cache of an application, and limit the time of its decoders."""
    decoder_process.set_deadline(store.settings.job_deadline_s * decoder_process.JOB_SHARE)
    app.extensions["frames"] = FrameCache(store)


def current_frames() -> FrameCache:
    """The cache of the application that serves this request."""
    cache: FrameCache = current_app.extensions["frames"]
    return cache


def describe_frame(frame: DisplayFrame, frames: int) -> dict[str, Any]:
    """The parameters that the viewer needs to draw a frame (DICOM PS3.3 C.7.6.3, C.11.1, C.11.2)."""
    rows, columns = frame.pixels.shape[:2]
    is_finite = frame.minimum == frame.minimum and frame.maximum == frame.maximum  # neither is NaN, which JSON cannot express
    return {
        "rows": rows, "columns": columns, "frames": frames, "samples": 3 if frame.pixels.ndim == 3 else 1,
        "dtype": frame.pixels.dtype.name, "slope": frame.slope, "intercept": frame.intercept,
        "windows": [[window.center, window.width] for window in frame.windows],
        "voi_function": frame.windows[0].function if frame.windows else "LINEAR",
        "photometric": frame.photometric, "spacing": list(frame.spacing) if frame.spacing else None,
        "min": frame.minimum if is_finite else None, "max": frame.maximum if is_finite else None,
        "orientation": [frame.orientation.transpose, frame.orientation.flip_rows, frame.orientation.flip_columns],
    }  # fmt: skip
