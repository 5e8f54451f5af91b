"""Frames for the viewer, decoded one at a time and kept for a moment: a page asks for the description and then the pixels.

What decodes is imported with the first image, so that an idle page costs nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from werkzeug.exceptions import ServiceUnavailable

from appliance.store.store import Store

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from appliance.imaging.display_frame import DisplayFrame

# Enough for the largest plain radiographs and the frame beside; not enough to matter beside the worker.
_KEPT_FILE_BYTES: Final = 32 << 20
_KEPT_PIXEL_BYTES: Final = 32 << 20
_WAIT_S: Final = 30.0


class ImageCache:
    """The frames of stored images; at most one is being decoded at any moment, which bounds the memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._busy = threading.Lock()
        self._files: OrderedDict[int, tuple[int, Dataset]] = OrderedDict()
        self._frames: OrderedDict[tuple[int, int], DisplayFrame] = OrderedDict()

    def frame(self, instance_id: int, number: int) -> DisplayFrame:
        """One frame as the viewer draws it.

        Raises:
            StoreError: the image is missing or was tampered with.
            PixelError: its pixels cannot be decoded.
            IndexError: it has no such frame.
            ServiceUnavailable: too many wait for frames.
        """
        if not self._busy.acquire(timeout=_WAIT_S):
            raise ServiceUnavailable(retry_after=10)
        try:
            return self._known(instance_id, number) or self._decoded(instance_id, number)
        finally:
            self._busy.release()

    def _known(self, instance_id: int, number: int) -> DisplayFrame | None:
        known = self._frames.get((instance_id, number))
        if known is not None:
            self._frames.move_to_end((instance_id, number))
        return known

    def _decoded(self, instance_id: int, number: int) -> DisplayFrame:
        from appliance.imaging.display_frame import display_frame
        from appliance.imaging.pixels import register_decoders

        register_decoders()
        frame = display_frame(self._dataset(instance_id), number)
        if frame.pixels.base is not None:  # a view would keep the whole film in memory for one frame of it
            frame = replace(frame, pixels=frame.pixels.copy())
        _keep(self._frames, (instance_id, number), frame, lambda item: int(item.pixels.nbytes), _KEPT_PIXEL_BYTES)
        return frame

    def _dataset(self, instance_id: int) -> Dataset:
        """The parsed file; that of the last images is kept, since frames of one series are asked for one by one."""
        from appliance.imaging.dicom_files import read_dataset

        if instance_id in self._files:
            self._files.move_to_end(instance_id)
            return self._files[instance_id][1]
        data = self._store.read_instance(instance_id)
        dataset = read_dataset(data)
        _keep(self._files, instance_id, (len(data), dataset), lambda item: item[0], _KEPT_FILE_BYTES)
        return dataset


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, weight: Any, limit: int) -> None:
    """Put a value in and let the oldest go until all fit; one that does not fit by itself is not kept."""
    if weight(value) > limit:
        return
    kept[key] = value
    while sum(weight(item) for item in kept.values()) > limit:
        kept.popitem(last=False)


def description(frame: DisplayFrame, frames: int) -> dict[str, Any]:
    """What the viewer must know to draw a frame (DICOM PS3.3 C.7.6.3, C.11.1, C.11.2)."""
    rows, columns = frame.pixels.shape[:2]
    finite = frame.minimum == frame.minimum and frame.maximum == frame.maximum  # neither is NaN, which JSON has no word for
    return {
        "rows": rows, "columns": columns, "frames": frames, "samples": 3 if frame.pixels.ndim == 3 else 1,
        "dtype": frame.pixels.dtype.name, "slope": frame.slope, "intercept": frame.intercept,
        "windows": [[window.center, window.width] for window in frame.windows],
        "voi_function": frame.windows[0].function if frame.windows else "LINEAR",
        "photometric": frame.photometric, "spacing": list(frame.spacing) if frame.spacing else None,
        "min": frame.minimum if finite else None, "max": frame.maximum if finite else None,
    }  # fmt: skip
