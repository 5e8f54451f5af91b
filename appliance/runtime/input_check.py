"""The input check of a bundle: a small network that looks at an image before the model analyses it (manifest schema 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from appliance.core.domain import Note
from appliance.core.errors import InferenceError
from appliance.imaging.preprocessing import from_display
from appliance.runtime import CPU, Candidate, Runtime, open_runtime
from model_sync.bundle import UPRIGHT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from model_sync.bundle import InputCheck, InputClass, ModelBundle

UPSIDE_DOWN: Final = Note("quality.turned", "180")
# The reason of an image that is stopped, by the most probable class.
REASONS: Final[dict[InputClass, Note]] = {
    "turned_90": Note("quality.turned", "90"),
    "turned_180": UPSIDE_DOWN,
    "turned_270": Note("quality.turned", "270"),
    "negative": Note("quality.negative"),
    "other": Note("quality.other_image"),
}
# Probabilities of float32 networks add up to 1 within this.
_SUM_TOLERANCE: Final = 1e-3


class InputChecker:
    """An open input check, on ONNX Runtime with one thread: it takes a few ms and every box has it.

    Raises:
        BundleError: its file is missing from the bundle.
        InferenceError: ``job.error``: the network cannot be opened.
    """

    def __init__(self, bundle: ModelBundle, spec: InputCheck) -> None:
        self._spec = spec
        candidate = Candidate(runtime="onnxruntime", provider=CPU, file=spec.file, precision="fp32", threads=1)
        self._runtime: Runtime = open_runtime(bundle.path(spec.file), spec.input, candidate)

    @classmethod
    def open(cls, bundle: ModelBundle) -> InputChecker | None:
        """Open the input check of a bundle; None where it has none."""
        spec = bundle.manifest.input_check
        return None if spec is None else cls(bundle, spec)

    def probabilities(self, display: NDArray[np.uint8], aspect: float = 1.0) -> dict[InputClass, float]:
        """The probability of each class of a display image, uint8 [rows, columns] with pixels ``aspect`` times as high as wide.

        Raises:
            InferenceError: ``job.error``: the network fails, or its output is no distribution over the classes.
        """
        tensor = from_display(display, self._spec.input, aspect).tensor
        outputs = self._runtime.infer({self._spec.input.name: tensor})
        values = outputs.get(self._spec.output)
        if values is None or values.shape != (1, len(self._spec.classes)) or abs(float(values.sum()) - 1) > _SUM_TOLERANCE:
            raise InferenceError("job.error", f"the input check has no output {self._spec.output} with one probability per class")
        return {name: float(value) for name, value in zip(self._spec.classes, values[0], strict=True)}

    def doubt(self, display: NDArray[np.uint8], aspect: float = 1.0) -> Note | None:
        """Why an image must not be analysed as it is; None where it is upright enough. Arguments and errors as :meth:`probabilities`."""
        probabilities = self.probabilities(display, aspect)
        if probabilities[UPRIGHT] >= self._spec.min_upright:
            return None
        return REASONS[max((name for name in probabilities if name != UPRIGHT), key=probabilities.__getitem__)]

    def close(self) -> None:
        """Free the network."""
        self._runtime.close()
