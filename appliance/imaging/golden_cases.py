"""The golden cases of a bundle, checked through the complete pipeline: from the display image to the probability and its map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model_sync.bundle import GoldenCase, GoldenVolume, Manifest, ModelBundle


Infer: TypeAlias = "Callable[[NDArray[np.float32]], dict[str, NDArray[np.float32]]]"


@dataclass(frozen=True)
class Case:
    """One prepared golden case.

    Attributes:
        name: of the case.
        tensor: the input of the model, float32 [1, ...]; durations are measured with it too.
        difference: takes a function that runs the model on a tensor [1, ...]; returns the difference to the known answer, NaN where
            there is no valid one.
        tolerance: precision -> the largest difference allowed.
    """

    name: str
    tensor: NDArray[np.float32]
    difference: Callable[[Infer], float]
    tolerance: Mapping[str, float]


def cases(bundle: ModelBundle) -> list[Case]:
    """Prepare the golden cases of a bundle; raises BundleError."""
    if bundle.manifest.input.layout == "NCDHW":
        return [_volume_case(bundle.manifest, volume) for volume in bundle.golden_volumes()]
    return [_case(bundle.manifest, golden) for golden in bundle.golden_cases()]


def _volume_case(manifest: Manifest, golden: GoldenVolume) -> Case:
    """The difference is the largest deviation of a label's Dice coefficient."""
    from appliance.imaging.volumes.segmentation import golden_tensor

    tensor, difference = golden_tensor(golden, manifest)
    return Case(golden.name, tensor, lambda infer: difference(infer(tensor)), {str(k): value for k, value in golden.tolerance.items()})


def _case(manifest: Manifest, golden: GoldenCase) -> Case:
    """The difference is the largest of the probabilities, and of the activation map relative to the range of its values."""
    import numpy as np

    from appliance.imaging.postprocessing import classify
    from appliance.imaging.preprocessing import from_display

    prepared = from_display(golden.pixels, manifest.image_input)

    def difference(infer: Infer) -> float:
        outputs = infer(prepared.tensor)
        scored = {label.label: label.score for label in classify(outputs, manifest, prepared.geometry)}
        worst = max(abs(scored[label] - expected) for label, expected in golden.expected.items())
        if manifest.explain is not None and golden.cam is not None:
            cam = outputs[manifest.explain.output]
            span = float(np.ptp(golden.cam)) or 1.0
            worst = max(worst, float(np.max(np.abs(cam - golden.cam))) / span)
        return worst

    return Case(golden.name, prepared.tensor, difference, {str(name): value for name, value in golden.tolerance.items()})
