"""From the logits of a model of volumes to masks in the patient: which class each voxel is, and how many millilitres a class has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from appliance.core.errors import InferenceError
from appliance.imaging.volumes.geometry import Grid
from appliance.imaging.volumes.sliding_window import Told, padded, slide, unpadded
from appliance.imaging.volumes.volume import PreparedVolume, Series, mask_on_slices, prepare
from model_sync.bundle import BACKGROUND, SlidingWindow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from model_sync.bundle import GoldenVolume, Manifest, OutputSpec

    Mask: TypeAlias = NDArray[np.uint8]
    Tensors: TypeAlias = "dict[str, NDArray[np.float32]]"

Infer: TypeAlias = "Callable[[Tensors], Tensors]"


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a model drew in a series.

    Attributes:
        drawn: uint8 [depth, height, width] in the model's own voxels: index into ``classes``.
        mask: uint8 [slices, rows, columns], the same on the series' own pixels, slices in the order of their positions.
        classes: the classes' names, background first.
        volumes_ml: label -> millilitres of ``mask``: what a model says beside the scanned volume is not of the patient.
    """

    drawn: Mask
    mask: Mask
    classes: tuple[str, ...]
    volumes_ml: dict[str, float]


def segment(
    prepared: PreparedVolume, slices: Grid, manifest: Manifest, infer: Infer, *, batch: int = 1, told: Told | None = None
) -> Segmentation:
    """Run a model over a prepared volume and bring its mask back to the series' pixels.

    Args:
        prepared: the volume.
        slices: where the pixels of the series are.
        manifest: of a model of volumes.
        infer: ``Runtime.infer`` of the loaded model.
        batch: how many windows it takes at a time.
        told: called with the part (0 to 1) of the windows that are done.

    Raises:
        InferenceError: the model failed, or gave something else than the manifest says.
    """
    drawn = classify_voxels(prepared, manifest, infer, batch=batch, told=told)
    output = logits_of(manifest)
    mask = mask_on_slices(drawn, prepared.grid, slices)
    return Segmentation(drawn, mask, tuple(output.classes or ()), volumes_ml(mask, slices, output))


def logits_of(manifest: Manifest) -> OutputSpec:
    """The output that holds the logits."""
    for output in manifest.outputs:
        if output.kind == "segmentation_logits":
            return output
    raise InferenceError("job.error", "the model has no segmentation logits")


def classify_voxels(prepared: PreparedVolume, manifest: Manifest, infer: Infer, *, batch: int = 1, told: Told | None = None) -> Mask:
    """The class of every voxel of a prepared volume: the greatest logit's, uint8 [depth, height, width]."""
    spec, output = manifest.volume_input, logits_of(manifest)
    window, last = (spec.depth, spec.height, spec.width), spec.pipeline[-1]
    classes = len(output.classes or ())

    def run(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        return checked(infer({spec.name: tensor}), output, classes)

    if isinstance(last, SlidingWindow):
        logits = slide(
            prepared.values, window, run, classes=classes, overlap=last.overlap, weight=last.weight, fill=last.fill, batch=batch, told=told
        )
    else:
        logits = run(prepared.values[None, None])[0]
    drawn = np.empty(logits.shape[1:], np.uint8)
    for place in range(len(drawn)):  # plane by plane: indices of a whole volume would take eight bytes each
        drawn[place] = logits[:, place].argmax(axis=0)
    return drawn


def checked(outputs: Tensors, output: OutputSpec, classes: int) -> NDArray[np.float32]:
    """The logits among a model's outputs, [n, classes, depth, height, width]."""
    logits = outputs.get(output.name)
    if logits is None or logits.ndim != 5 or logits.shape[1] != classes:
        shape = None if logits is None else logits.shape
        raise InferenceError("job.error", f"output {output.name!r} has the shape {shape}, the manifest says {classes} classes")
    return logits


def volumes_ml(mask: Mask, grid: Grid, output: OutputSpec) -> dict[str, float]:
    """Millilitres of each class but the background."""
    names = output.classes or []
    counts = np.bincount(mask.ravel(), minlength=len(names))
    return {name: float(count) * grid.voxel_ml for name, count in zip(names, counts, strict=True) if name != BACKGROUND}


def dice(first: Mask, second: Mask, value: int) -> float:
    """How far two masks agree on one class: twice what they share by what they have; 1 where neither has any."""
    a, b = first == value, second == value
    together = int(a.sum()) + int(b.sum())
    return 1.0 if together == 0 else 2.0 * int((a & b).sum()) / together


def golden_tensor(golden: GoldenVolume, manifest: Manifest) -> tuple[NDArray[np.float32], Callable[[Tensors], float]]:
    """A golden volume as the model is given it, in one window, and how far an answer is from the known one.

    Returns:
        float32 [1, 1, depth, height, width]; and a function from the model's outputs to the largest deviation of a label's Dice.

    Raises:
        InferenceError: ``job.error``: the volume is larger than one window.
    """
    spec, output = manifest.volume_input, logits_of(manifest)
    where = Grid(golden.values.shape, golden.affine)
    prepared = prepare(Series(golden.values, 1.0, 0.0, where, ()), spec)
    window = (spec.depth, spec.height, spec.width)
    if any(size > side for size, side in zip(prepared.values.shape, window, strict=True)):
        raise InferenceError("job.error", f"the golden case {golden.name} is larger than one window")
    last, names = spec.pipeline[-1], list(output.classes or ())
    tensor = padded(prepared.values, window, last.fill if isinstance(last, SlidingWindow) else 0.0)[None, None]

    def difference(outputs: Tensors) -> float:
        logits = checked(outputs, output, len(names))
        if not np.isfinite(logits).all():
            return float("nan")
        inside = unpadded(logits[0], prepared.values.shape)
        mask = mask_on_slices(np.asarray(inside.argmax(axis=0), np.uint8), prepared.grid, where)
        return max(abs(dice(mask, golden.mask, names.index(label)) - expected) for label, expected in golden.expected.items())

    return tensor, difference
