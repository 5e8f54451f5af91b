"""Convert the logits of a volume model to a mask of classes, and to the volume of each class in ml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from appliance.core.errors import InferenceError
from appliance.imaging.volumes.geometry import Grid
from appliance.imaging.volumes.resampling import resample_nearest
from appliance.imaging.volumes.sliding_window import OnProgress, crop, pad, slide
from appliance.imaging.volumes.volume import PreparedVolume, Series, prepare
from model_sync.bundle import BACKGROUND, SlidingWindow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from model_sync.bundle import GoldenVolume, Manifest, OutputSpec

    Mask: TypeAlias = NDArray[np.uint8]
    Tensors: TypeAlias = "dict[str, NDArray[np.float32]]"

Infer: TypeAlias = "Callable[[Tensors], Tensors]"


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segmentation of a series.

    Attributes:
        voxel_classes: uint8 [depth, height, width] on the grid of the model: index into ``classes``.
        mask: uint8 [slices, rows, columns], the same on the pixels of the series, slices in the order of positions.
        classes: names of the classes, background first.
        volumes_ml: label -> volume in ``mask`` (ml); voxels outside the scanned volume do not count.
    """

    voxel_classes: Mask
    mask: Mask
    classes: tuple[str, ...]
    volumes_ml: dict[str, float]


def segment(
    prepared: PreparedVolume, slices: Grid, manifest: Manifest, infer: Infer, *, batch: int = 1, on_progress: OnProgress | None = None
) -> Segmentation:
    """Run a model over a prepared volume and resample its mask to the pixels of the series.

    Args:
        prepared: the volume.
        slices: grid of the pixels of the series.
        manifest: of the model.
        infer: ``Runtime.infer`` of the loaded model.
        batch: number of windows per inference.
        on_progress: called with the completed share (0 to 1) of the windows.

    Raises:
        InferenceError: the model failed, or its output contradicts the manifest.
    """
    voxel_classes = classify_voxels(prepared, manifest, infer, batch=batch, on_progress=on_progress)
    output = logits_of(manifest)
    mask = resample_nearest(voxel_classes, prepared.grid, slices)
    return Segmentation(voxel_classes, mask, tuple(output.classes or ()), volumes_ml(mask, slices, output))


def logits_of(manifest: Manifest) -> OutputSpec:
    """The output with the logits; raises InferenceError where there is none."""
    for output in manifest.outputs:
        if output.kind == "segmentation_logits":
            return output
    raise InferenceError("job.error", "the model has no segmentation logits")


def classify_voxels(
    prepared: PreparedVolume, manifest: Manifest, infer: Infer, *, batch: int = 1, on_progress: OnProgress | None = None
) -> Mask:
    """Assign each voxel of a prepared volume the class with the highest logit: uint8 [depth, height, width]."""
    spec, output = manifest.volume_input, logits_of(manifest)
    window, last = (spec.depth, spec.height, spec.width), spec.pipeline[-1]
    classes = len(output.classes or ())

    def run(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        return check_logits(infer({spec.name: tensor}), output, classes)

    if isinstance(last, SlidingWindow):
        logits = slide(
            prepared.values, window, run, classes=classes, overlap=last.overlap, weight=last.weight, fill=last.fill, batch=batch,
            on_progress=on_progress,
        )  # fmt: skip
    else:
        logits = run(prepared.values[None, None])[0]
    voxel_classes = np.empty(logits.shape[1:], np.uint8)
    for index in range(len(voxel_classes)):  # plane by plane, because argmax makes indices of eight bytes
        voxel_classes[index] = logits[:, index].argmax(axis=0)
    return voxel_classes


def check_logits(outputs: Tensors, output: OutputSpec, classes: int) -> NDArray[np.float32]:
    """Return the logits [n, classes, depth, height, width]; raises InferenceError where they are missing or have another shape."""
    logits = outputs.get(output.name)
    if logits is None or logits.ndim != 5 or logits.shape[1] != classes:
        shape = None if logits is None else logits.shape
        raise InferenceError("job.error", f"output {output.name!r} has the shape {shape}, the manifest says {classes} classes")
    return logits


def volumes_ml(mask: Mask, grid: Grid, output: OutputSpec) -> dict[str, float]:
    """The volume (ml) of each class except the background."""
    names = output.classes or []
    counts = np.bincount(mask.ravel(), minlength=len(names))
    return {name: float(count) * grid.voxel_ml for name, count in zip(names, counts, strict=True) if name != BACKGROUND}


def dice(first: Mask, second: Mask, value: int) -> float:
    """The Dice coefficient of one class in two masks; 1 where neither has a voxel of it."""
    a, b = first == value, second == value
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def golden_tensor(golden: GoldenVolume, manifest: Manifest) -> tuple[NDArray[np.float32], Callable[[Tensors], float]]:
    """Prepare a golden volume as one window, and the comparison with its known mask.

    Returns:
        float32 [1, 1, depth, height, width]; a function from the outputs to the largest deviation of a label's Dice coefficient.

    Raises:
        InferenceError: ``job.error``: the volume is larger than one window.
    """
    spec, output = manifest.volume_input, logits_of(manifest)
    depth, rows, cols = golden.values.shape
    where = Grid((depth, rows, cols), golden.affine)
    prepared = prepare(Series(golden.values, 1.0, 0.0, where, ()), spec)
    window = (spec.depth, spec.height, spec.width)
    if any(size > side for size, side in zip(prepared.values.shape, window, strict=True)):
        raise InferenceError("job.error", f"the golden case {golden.name} is larger than one window")
    last, names = spec.pipeline[-1], list(output.classes or ())
    tensor = pad(prepared.values, window, last.fill if isinstance(last, SlidingWindow) else 0.0)[None, None]

    def difference(outputs: Tensors) -> float:
        logits = check_logits(outputs, output, len(names))
        if not np.isfinite(logits).all():
            return float("nan")
        inside = crop(logits[0], prepared.values.shape)
        mask = resample_nearest(np.asarray(inside.argmax(axis=0), np.uint8), prepared.grid, where)
        return max(abs(dice(mask, golden.mask, names.index(label)) - expected) for label, expected in golden.expected.items())

    return tensor, difference
