"""Measure how much accuracy int8 costs per layer, and put the most expensive layers back to float until the gate passes.

A layer is a node with weights and the nodes after it (activation, residual sum, pooling) up to the next node with weights. The cost of a
layer is measured with only that layer quantized, on a few images. The sum over all layers is larger than their common cost; only the
order of the layers is used.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import Model, input_name, output_names, session
from quantize.progress import OnProgress, no_progress
from quantize.recipes.calibration import Calibration, Tensors, images_per_step
from quantize.recipes.int8 import WEIGHTED, Recipe, quantizable, quantize

# With more than half of its layers in float, a model gains next to nothing and pays for the Q/DQ between them.
MAX_KEPT_PART: Final = 0.5
# A run of the gate is expensive: at most so many until ``MAX_KEPT_PART`` is reached.
_STEPS: Final = 8
_TRANSPOSED: Final = ("ConvTranspose",)


@dataclass(frozen=True)
class LayerCost:
    """The accuracy cost of one layer.

    Attributes:
        layer: the name of its node with weights.
        op_type: of that node.
        nodes: the names of all its nodes that are quantized.
        cost: the root mean square change of the outputs with this layer alone quantized, relative to their standard deviation over
            the images; the mean over the outputs.
    """

    layer: str
    op_type: str
    nodes: frozenset[str]
    cost: float


def layers(model: Model, recipe: Recipe) -> dict[str, frozenset[str]]:
    """Return the nodes that ``recipe`` quantizes in ``model`` by layer, in the graph's order; a layer bears its first node's name."""
    chosen = quantizable(model, recipe)
    groups: dict[str, set[str]] = {}
    owner: dict[str, str] = {}
    for node in model.graph.node:
        before = [owner[name] for name in node.input if name in owner]
        weighted = node.op_type in (*WEIGHTED, *_TRANSPOSED) and node.name in chosen
        # A sum belongs to the later of its two branches: when that layer is put back to float, the sum is, too.
        group = str(node.name) if weighted or not before else max(before, key=list(groups).index)
        if node.name in chosen:
            groups.setdefault(group, set()).add(str(node.name))
        if group in groups:
            owner.update(dict.fromkeys(node.output, group))
    return {name: frozenset(nodes) for name, nodes in groups.items()}


def measure_layer_costs(
    model: Model, recipe: Recipe, calibration: Calibration, tensors: Tensors, *, on_progress: OnProgress = no_progress
) -> tuple[LayerCost, ...]:
    """Measure what each layer of ``model`` costs when it alone is quantized by ``recipe``, the most expensive first.

    Args:
        model: a cleaned float model (``graph.clean_up``).
        recipe: how it is quantized.
        calibration: of this model (``calibration.calibrate``).
        tensors: a few images, float32 [n, ...] each, that calibration did not see.
        on_progress: called with the fraction that is done.

    Raises:
        QuantizeError: There are no tensors, or the recipe quantizes nothing.
    """
    groups = layers(model, recipe)
    if not groups or not sum(len(tensor) for tensor in tensors):
        raise QuantizeError("there is nothing to measure layers with", hint="give images, and a recipe that quantizes something")
    kinds = {node.name: node.op_type for node in model.graph.node}
    everything = quantizable(model, recipe)
    reference = _outputs(model, tensors)
    costs = []
    with tempfile.TemporaryDirectory(prefix="quantize.") as directory:
        path = Path(directory, "layer.onnx")
        for index, (name, nodes) in enumerate(groups.items()):
            quantize(model, recipe.keeping(everything - nodes), calibration, path)
            costs.append(LayerCost(name, kinds[name], nodes, _change(reference, _outputs(onnx.load(path), tensors))))
            on_progress((index + 1) / len(groups))
    return tuple(sorted(costs, key=lambda cost: -cost.cost))


def relax(recipe: Recipe, costs: Sequence[LayerCost]) -> Iterator[tuple[int, Recipe]]:
    """Yield how many layers are put back to float, and ``recipe`` with those: the most expensive first, up to ``MAX_KEPT_PART``.

    The first that passes the gate is shipped; where none does, the model has no int8 variant.

    Args:
        recipe: the one that did not pass.
        costs: measured with this recipe.
    """
    ordered = sorted(costs, key=lambda cost: -cost.cost)
    most = int(len(ordered) * MAX_KEPT_PART)
    step = max(1, math.ceil(most / _STEPS))
    for count in range(step, most + 1, step):
        yield count, recipe.keeping(frozenset().union(*(cost.nodes for cost in ordered[:count])))


def _outputs(model: Model, tensors: Tensors) -> list[NDArray[np.float64]]:
    """Return each output of the model over all images."""
    opened = session(model)
    step = images_per_step(model)
    parts = [tensor[start : start + step] for tensor in tensors for start in range(0, len(tensor), step)]
    values = [opened.run(output_names(model), {input_name(model): part}) for part in parts]
    return [np.concatenate(value).astype(np.float64) for value in zip(*values, strict=True)]


def _change(reference: list[NDArray[np.float64]], actual: list[NDArray[np.float64]]) -> float:
    changes = [
        float(np.sqrt(np.mean((new - old) ** 2)) / max(float(old.std()), np.finfo(np.float32).tiny))
        for old, new in zip(reference, actual, strict=True)
    ]
    return float(np.mean(changes))
