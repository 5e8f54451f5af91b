"""Post-training quantization to int8 as explicit Q/DQ in the ONNX, by recipes that are tried rather than believed.

The base is ``onnxruntime.quantization``: its calibrators measure, its ``QDQQuantizer`` writes. ``quantize_static``, which joins the
two, is not called, because it would calibrate again for every recipe; here calibration is done once per model (``calibrate``) and read
by every recipe.

Two kinds of activations are written:

- ``symmetric``: int8 with zero point 0, the only kind TensorRT takes on a GPU. Q/DQ stands in front of what multiplies (Conv, Gemm,
  MatMul) and on the shortcut of a residual Add, nowhere else: none between a convolution and its activation, none behind it, no
  quantized bias (TensorRT's documentation, "Working with quantized types", Q/DQ placement recommendations). ConvTranspose and Concat
  stay float: with Q/DQ on them TensorRT 8.6 did not build.
- ``unsigned``: uint8 with a zero point, what x86 multiplies with signed weights in one instruction (VNNI). Outputs are quantized as
  well, so that ONNX Runtime can keep whole chains in uint8.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quantize.errors import QuantizeError
from quantize.graph import (
    Model,
    Node,
    attribute,
    consumers,
    drop_unused,
    float_tensors,
    initializers,
    input_name,
    producers,
    sort_nodes,
    with_shapes,
)

Activations: TypeAlias = Literal["symmetric", "unsigned"]
Method: TypeAlias = Literal["minmax", "percentile", "entropy"]
Tensors: TypeAlias = Sequence[NDArray[np.float32]]
Told: TypeAlias = Callable[[float], None]
Range: TypeAlias = tuple[float, float]

METHODS: Final[tuple[Method, ...]] = ("minmax", "percentile", "entropy")
WEIGHTED: Final = ("Conv", "Gemm", "MatMul")
# What passes a residual network on between its convolutions; quantized too, a chain never leaves uint8.
CHAINED: Final = (*WEIGHTED, "Relu", "Clip", "Add", "MaxPool")
EVERYTHING: Final = (
    *CHAINED, "ConvTranspose", "Concat", "AveragePool", "GlobalAveragePool", "Mul", "Sigmoid", "LeakyRelu", "Resize",
)  # fmt: skip
# The share of values, in per cent, that a range must hold.
PERCENTILE: Final = 99.99
_BINS: Final = 1024
# What the tensors of one calibration step may take together; a large volume goes in one by one.
_STEP_BYTES: Final = 256 * 2**20


@dataclass(frozen=True)
class Recipe:
    """One way to quantize.

    Attributes:
        name: tells it in reports, such as ``unsigned-chained-minmax``.
        precision: ``mixed`` where layers were put back to float for accuracy, else ``int8``.
        activations: see the module's docstring.
        method: how ranges are chosen from what calibration measured: all values; ``PERCENTILE`` of them; or the range that loses
            the least information (Kullback-Leibler).
        op_types: the operators that are quantized.
        keep: names of nodes that stay float.
    """

    name: str
    precision: Literal["int8", "mixed"]
    activations: Activations
    method: Method
    op_types: tuple[str, ...]
    keep: frozenset[str] = frozenset()

    def keeping(self, nodes: frozenset[str]) -> Recipe:
        """Return this recipe with more nodes left in float: it is then called mixed."""
        return replace(self, precision="mixed", keep=self.keep | nodes)


@dataclass(frozen=True)
class Calibration:
    """What was measured of each float tensor over the calibration set.

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
        from onnxruntime.quantization.calibrate import HistogramCollector

        collector = HistogramCollector(method, False, _BINS, 128, PERCENTILE, "same")
        for name, counts in self.histograms.items():
            low, high = self.extremes[name]
            reach = max(abs(low), abs(high))
            edges = np.linspace(-reach, reach, len(counts) + 1, dtype=np.float32)
            collector.histogram_dict[name] = (counts, edges, np.float32(low), np.float32(high), np.float32(reach))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how it is getting on
            found = collector.compute_collection_result()
        return {name: (float(value[0]), float(value[1])) for name, value in found.items()}


def recipes() -> tuple[Recipe, ...]:
    """Return the recipes to be tried, those that were best most often first.

    One kind of activations is not derived from the other: the best placement differs by graph and engine, and so does the best
    calibration.
    """
    made = []
    for method in METHODS:
        made.append(Recipe(f"unsigned-weighted-{method}", "int8", "unsigned", method, WEIGHTED))
        made.append(Recipe(f"unsigned-chained-{method}", "int8", "unsigned", method, CHAINED))
        made.append(Recipe(f"symmetric-{method}", "int8", "symmetric", method, WEIGHTED))
    made.append(Recipe("unsigned-everything-minmax", "int8", "unsigned", "minmax", EVERYTHING))
    return tuple(made)


def calibrate(model: Model, tensors: Tensors, *, told: Told | None = None) -> Calibration:
    """Measure every float tensor of ``model`` over the calibration tensors, once for all recipes.

    Two passes: the extremes first, because a histogram whose range is known never has to grow.

    Args:
        model: a cleaned float model (``graph.clean_up``).
        tensors: calibration tensors, float32 [n, ...] each, the size the model takes.
        told: called with the part (0 to 1) that is done.

    Raises:
        QuantizeError: There are no tensors, one of them does not fit the model, or the model computes NaN or Inf on one.
    """
    if not sum(len(tensor) for tensor in tensors):
        raise QuantizeError("the calibration set is empty", hint="give a directory with scans like those the clinics make")
    step = images_per_step(model)
    batches = [tensor[start : start + step] for tensor in tensors for start in range(0, len(tensor), step)]
    extremes = _extremes(model, batches, _part(told, 0.0, 0.4))
    return Calibration(extremes, _histograms(model, batches, extremes, _part(told, 0.4, 1.0)))


def quantize(model: Model, recipe: Recipe, tensors: Tensors | Calibration, out: Path, *, told: Told | None = None) -> frozenset[str]:
    """Write ``model`` quantized by ``recipe`` to ``out``; inputs and outputs stay float32 and keep their names.

    Args:
        model: a cleaned float model (``graph.clean_up``); it is not changed.
        recipe: how.
        tensors: what to calibrate on, or the ``Calibration`` of this very model, which saves measuring it again.
        out: the ONNX file to write.
        told: called with the part (0 to 1) that is done.

    Returns:
        The names of the nodes that are quantized.

    Raises:
        QuantizeError: See ``calibrate``; or the recipe leaves nothing quantized, or a tensor it quantizes was not calibrated.
    """
    calibration = tensors if isinstance(tensors, Calibration) else calibrate(model, tensors, told=_part(told, 0.0, 0.9))
    chosen = quantizable(model, recipe)
    if not chosen:
        raise QuantizeError(
            f"the recipe {recipe.name} quantizes nothing: the model has no {', '.join(recipe.op_types)} that is not kept",
            hint="leave this recipe out",
        )
    quantized = _written(model, recipe, chosen, calibration.ranges(recipe.method))
    if recipe.activations == "symmetric":
        _quantize_shortcuts(quantized, chosen, calibration.ranges(recipe.method))
    quantized.ir_version = model.ir_version
    sort_nodes(quantized)
    drop_unused(quantized)
    onnx.checker.check_model(quantized)
    onnx.save(quantized, out)
    if told is not None:
        told(1.0)
    return chosen


def quantizable(model: Model, recipe: Recipe) -> frozenset[str]:
    """Return the names of the nodes that ``recipe`` quantizes in ``model``."""
    held = initializers(model)
    chosen = set()
    for node in model.graph.node:
        # A product of two computed tensors (attention) has no weights to shrink, and symmetric int8 loses most there.
        weightless = node.op_type in WEIGHTED and node.input[1] not in held
        # ONNX has no per-channel scales for it: its output channels are not one axis of its weights.
        grouped = node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1
        if node.op_type in recipe.op_types and node.name not in recipe.keep and not (weightless or grouped):
            chosen.add(str(node.name))
    return frozenset(chosen)


def _part(told: Told | None, start: float, end: float) -> Told | None:
    return None if told is None else lambda part: told(start + (end - start) * part)


class _Reader:
    """One batch, once, in the shape the calibrators ask for (``CalibrationDataReader``)."""

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


def _collect(kind: str, model: Model, batches: list[NDArray[np.float32]], prepare: Callable[[Any], None], told: Told | None) -> Any:
    """Run one of ONNX Runtime's calibrators over the batches, telling after each."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

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
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN: said below as the model's fault, by the tensor's name
        for index, batch in enumerate(batches):
            try:
                calibrator.collect_data(_Reader(input_name(model), batch))
            except Exception as error:  # port wrapper: the exceptions of ONNX Runtime have no public base
                raise QuantizeError(
                    f"the model does not run on a calibration tensor of shape {list(batch.shape)}: {str(error).splitlines()[0][:200]}",
                    hint="the tensors must be float32 and of the size that the manifest's input says",
                ) from error
            if told is not None:
                told((index + 1) / len(batches))
        return calibrator


def _extremes(model: Model, batches: list[NDArray[np.float32]], told: Told | None) -> dict[str, Range]:
    found = _collect("MinMax", model, batches, lambda _: None, told).compute_data()
    extremes = {name: (float(np.min(value.lowest)), float(np.max(value.highest))) for name, value in found.items()}
    for name in [input_name(model), *float_tensors(model)]:
        if not np.isfinite(extremes.get(name, (0.0, 0.0))).all():
            raise QuantizeError(f"the model computes NaN or Inf in {name!r}", hint="it overflows in float32; it cannot be trusted at all")
    return extremes


def _histograms(
    model: Model, batches: list[NDArray[np.float32]], extremes: dict[str, Range], told: Told | None
) -> dict[str, NDArray[np.int64]]:
    from onnxruntime.quantization.calibrate import HistogramCollector

    def seed(calibrator: Any) -> None:
        # Empty histograms of the full reach: what is merged into them never makes them grow.
        calibrator.collector = HistogramCollector("entropy", False, _BINS, 128, PERCENTILE, "same")
        for name, (low, high) in extremes.items():
            reach = np.float32(max(abs(low), abs(high), np.finfo(np.float32).tiny))
            edges = np.linspace(-reach, reach, _BINS + 1, dtype=np.float32)
            calibrator.collector.histogram_dict[name] = (np.zeros(_BINS, np.int64), edges, np.float32(low), np.float32(high), reach)

    calibrator = _collect("Entropy", model, batches, seed, told)
    return {name: value[0] for name, value in calibrator.collector.histogram_dict.items()}


def _written(model: Model, recipe: Recipe, chosen: frozenset[str], ranges: dict[str, Range]) -> Model:
    """The model with the Q/DQ that ONNX Runtime's quantizer writes for the chosen nodes."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    symmetric = recipe.activations == "symmetric"
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    options: dict[str, Any] = {"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not symmetric}
    if symmetric:
        options["OpTypesToExcludeOutputQuantization"] = list(recipe.op_types)
    with _quiet():
        quantizer = QDQQuantizer(
            with_shapes(model),
            True,  # weights per channel
            False,  # all 8 bits: without VNNI pairs of products saturate, but there float32 is chosen anyway
            QuantType.QInt8,
            QuantType.QInt8 if symmetric else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            sorted(chosen),
            [],
            list(recipe.op_types),
            options,
        )
        return quantizer.quantize_model()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantizer warns through the root logger of things that are meant here."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def _quantize_shortcuts(model: Model, chosen: frozenset[str], ranges: dict[str, Range]) -> None:
    """Put Q/DQ on the shortcut of each residual Add that has none yet, so that TensorRT fuses the Add into the int8 convolution.

    Where the block keeps its size, the shortcut is what the block's first convolution takes, and is quantized with it. Where a
    convolution on the shortcut changes the size, its output still is float: the Add would then be float, too.
    """
    made, readers = producers(model), consumers(model)
    for node in [node for node in model.graph.node if node.op_type == "Add"]:
        sources = [made.get(name) for name in node.input]
        both = all(source is not None and source.op_type == "Conv" and source.name in chosen for source in sources)
        if not both:
            continue
        # The one with fewer convolutions behind it is the shortcut; either would be right.
        shortcut = min(node.input, key=lambda name: _depth(made, name))
        if shortcut in ranges and len(readers[shortcut]) == 1:
            _insert_pair(model, node, shortcut, ranges[shortcut])


def _depth(made: dict[str, Node], tensor: str, limit: int = 8) -> int:
    """How many convolutions lie one behind the other in front of a tensor, back to the next Add."""
    depth = 0
    while depth < limit and (node := made.get(tensor)) is not None and node.op_type != "Add":
        depth += node.op_type == "Conv"
        tensor = node.input[0]
    return depth


def _insert_pair(model: Model, reader: Node, tensor: str, limits: Range) -> None:
    scale = np.float32(max(abs(limits[0]), abs(limits[1]), float(np.finfo(np.float32).tiny) * 128) / 127)
    names = [f"{tensor}_shortcut_scale", f"{tensor}_shortcut_zero_point"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), names[0]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), names[1]))
    whole, back = f"{tensor}_shortcut_quantized", f"{tensor}_shortcut_dequantized"
    pair = [
        helper.make_node("QuantizeLinear", [tensor, *names], [whole], name=f"{tensor}_shortcut_QuantizeLinear"),
        helper.make_node("DequantizeLinear", [whole, *names], [back], name=f"{tensor}_shortcut_DequantizeLinear"),
    ]
    at = next(index for index, node in enumerate(model.graph.node) if node.name == reader.name)
    for node in reversed(pair):
        model.graph.node.insert(at, node)
    reader.input[:] = [back if name == tensor else name for name in reader.input]
