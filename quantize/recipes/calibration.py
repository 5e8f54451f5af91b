"""Measure the value ranges of a model's tensors over the calibration set, once for all recipes, with the calibrators of ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import HistogramCollector, create_calibrator

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import Model, float_tensors, input_name
from quantize.progress import OnProgress, no_progress, part_of

Method: TypeAlias = Literal["minmax", "percentile", "entropy"]
Tensors: TypeAlias = Sequence[NDArray[np.float32]]
Range: TypeAlias = tuple[float, float]

METHODS: Final[tuple[Method, ...]] = ("minmax", "percentile", "entropy")
# The share of values, in per cent, that a range must hold.
PERCENTILE: Final = 99.99
_BINS: Final = 1024
# What the tensors of one calibration step may take together; large volumes are run one by one.
_STEP_BYTES: Final = 256 * 2**20


@dataclass(frozen=True)
class Calibration:
    """The measured values of each float tensor over the calibration set.

    Attributes:
        extremes: the lowest and highest value.
        histograms: counts [bins] over equal bins between minus and plus the largest magnitude.
    """

    extremes: dict[str, Range]
    histograms: dict[str, NDArray[np.int64]]
    _chosen: dict[Method, dict[str, Range]] = field(default_factory=dict, compare=False, repr=False)

    def ranges(self, method: Method) -> dict[str, Range]:
        """Return the range of each tensor that ``method`` chooses; computed once."""
        if method not in self._chosen:
            self._chosen[method] = dict(self.extremes) if method == "minmax" else self._by_histogram(method)
        return self._chosen[method]

    def _by_histogram(self, method: Method) -> dict[str, Range]:
        collector = _collector(method)
        for name, counts in self.histograms.items():
            _set_histogram(collector, name, counts, self.extremes[name])
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            result = collector.compute_collection_result()
        return {name: (float(value[0]), float(value[1])) for name, value in result.items()}


def calibrate(model: Model, tensors: Tensors, *, on_progress: OnProgress = no_progress) -> Calibration:
    """Measure every float tensor of ``model`` over the calibration tensors, once for all recipes.

    Two passes: the extremes first, because a histogram whose range is known never has to grow.

    Args:
        model: a cleaned float model (``graph.clean_up``).
        tensors: calibration tensors, float32 [n, ...] each, the size the model takes.
        on_progress: called with the fraction that is done.

    Raises:
        QuantizeError: There are no tensors, one of them does not fit the model, or the model computes NaN or Inf on one.
    """
    if not sum(len(tensor) for tensor in tensors):
        raise QuantizeError("the calibration set is empty", hint="give a directory with scans like those the clinics make")
    step = images_per_step(model)
    batches = [tensor[start : start + step] for tensor in tensors for start in range(0, len(tensor), step)]
    extremes = _extremes(model, batches, part_of(on_progress, 0.0, 0.4))
    return Calibration(extremes, _histograms(model, batches, extremes, part_of(on_progress, 0.4, 1.0)))


class _Reader:
    """Yield one batch once, with the interface of ONNX Runtime's ``CalibrationDataReader``."""

    def __init__(self, name: str, batch: NDArray[np.float32]) -> None:
        self._feeds: Iterator[dict[str, NDArray[np.float32]]] = iter([{name: batch}])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._feeds, None)


def images_per_step(model: Model) -> int:
    """How many images fit into ``_STEP_BYTES`` with all their tensors; 1 where the model fixes the batch."""
    given = next(value for value in model.graph.input if value.name == input_name(model)).type.tensor_type.shape.dim[0]
    if given.HasField("dim_value"):
        return int(given.dim_value)
    cells = 0
    for value in (*model.graph.value_info, *model.graph.output):
        cells += int(np.prod([max(axis.dim_value, 1) for axis in value.type.tensor_type.shape.dim]))
    return max(1, min(16, _STEP_BYTES // (4 * max(cells, 1))))


def _collect(kind: str, model: Model, batches: list[NDArray[np.float32]], prepare: Callable[[Any], None], on_progress: OnProgress) -> Any:
    """Run one of ONNX Runtime's calibrators over the batches; report progress after each."""
    with (
        tempfile.TemporaryDirectory(prefix="quantize.") as directory,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        path = Path(directory, "model.onnx")
        onnx.save(model, path)
        calibrator = create_calibrator(
            path,
            augmented_model_path=str(Path(directory, "augmented.onnx")),
            calibrate_method=CalibrationMethod[kind],
            extra_options={"num_bins": _BINS, "symmetric": False},
        )
        prepare(calibrator)
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN: reported below as the model's fault, by the name of the tensor
        for index, batch in enumerate(batches):
            try:
                calibrator.collect_data(_Reader(input_name(model), batch))
            except Exception as error:  # port wrapper: the exceptions of ONNX Runtime have no public base
                raise QuantizeError(
                    f"the model does not run on a calibration tensor of shape {list(batch.shape)}: {str(error).splitlines()[0][:200]}",
                    hint="the tensors must be float32 and of the size that the manifest's input says",
                ) from error
            on_progress((index + 1) / len(batches))
        return calibrator


def _extremes(model: Model, batches: list[NDArray[np.float32]], on_progress: OnProgress) -> dict[str, Range]:
    result = _collect("MinMax", model, batches, lambda _: None, on_progress).compute_data()
    extremes = {name: (float(np.min(value.lowest)), float(np.max(value.highest))) for name, value in result.items()}
    for name in [input_name(model), *float_tensors(model)]:
        if not np.isfinite(extremes.get(name, (0.0, 0.0))).all():
            raise QuantizeError(f"the model computes NaN or Inf in {name!r}", hint="it overflows in float32; it cannot be trusted at all")
    return extremes


def _histograms(
    model: Model, batches: list[NDArray[np.float32]], extremes: dict[str, Range], on_progress: OnProgress
) -> dict[str, NDArray[np.int64]]:
    def seed(calibrator: Any) -> None:
        # Empty histograms of the full range: what is merged into them never makes them grow.
        calibrator.collector = _collector("entropy")
        for name, extreme in extremes.items():
            _set_histogram(calibrator.collector, name, np.zeros(_BINS, np.int64), extreme)

    calibrator = _collect("Entropy", model, batches, seed, on_progress)
    return {name: value[0] for name, value in calibrator.collector.histogram_dict.items()}


def _collector(method: Method) -> HistogramCollector:
    return HistogramCollector(method, False, _BINS, 128, PERCENTILE, "same")


def _set_histogram(collector: HistogramCollector, name: str, counts: NDArray[np.int64], extremes: Range) -> None:
    low, high = extremes
    reach = np.float32(max(abs(low), abs(high), float(np.finfo(np.float32).tiny)))
    edges = np.linspace(-reach, reach, len(counts) + 1, dtype=np.float32)
    collector.histogram_dict[name] = (counts, edges, np.float32(low), np.float32(high), reach)
