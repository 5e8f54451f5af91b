"""Put layers back to float, the most expensive first, when no int8 variant passes the gate; list the cost of each layer for the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from model_sync.bundle import sha256_of
from quantize.gate.selection import LayerError, VariantResult
from quantize.recipes import int8
from quantize.recipes.int8 import Recipe
from quantize.recipes.layer_costs import LayerCost, measure_layer_costs, relax
from quantize.recipes.variant_makers import Maker, Source, int8_maker

if TYPE_CHECKING:
    from quantize.gate.gate_runs import GateContext

# Layers are told apart by few pictures.
_PICTURES: Final = 16

OnProgress = Callable[[float], None]


def find_recipe(entry: VariantResult) -> Recipe | None:
    """Return the int8 recipe of a variant; None for variants made by other means."""
    return next((recipe for recipe in int8.recipes() if entry.name == int8_maker(recipe).name), None)


def measure_costs(entry: VariantResult, source: Source, context: GateContext, on_progress: OnProgress) -> list[LayerCost]:
    """What each layer of a variant costs, measured on evaluation pictures, the costliest first; kept for a run that goes on."""
    recipe = find_recipe(entry)
    if recipe is None or entry.path is None:
        return []
    images = context.evaluation.tensors[:: max(1, len(context.evaluation) // _PICTURES)][:_PICTURES]

    def make(_: object) -> list[dict[str, object]]:
        costs_of_layers = measure_layer_costs(source.model, recipe, source.calibration(), [images], on_progress=on_progress)
        return [asdict(cost) | {"nodes": sorted(cost.nodes)} for cost in costs_of_layers]

    _, remembered = context.work.step(f"layers-{entry.name}", [sha256_of(entry.path), context.evaluation.digest], make)
    return [LayerCost(cost["layer"], cost["op_type"], frozenset(cost["nodes"]), cost["cost"]) for cost in remembered]


def to_layer_errors(costs_of_layers: Sequence[LayerCost]) -> tuple[LayerError, ...]:
    """Return the costs in the form that the report shows."""
    return tuple(LayerError(cost.layer, cost.op_type, cost.cost) for cost in costs_of_layers)


def find_nearest(variants: Sequence[VariantResult]) -> list[VariantResult]:
    """Of each kind of activations the int8 variant that failed least, of those whose layers can be put back one by one."""
    best: dict[object, VariantResult] = {}
    for entry in sorted(variants, key=_failure):
        if entry.precision == "int8" and find_recipe(entry) is not None and math.isfinite(_failure(entry)):
            best.setdefault(entry.activations, entry)
    return list(best.values())


def make_mixed(entry: VariantResult, costs_of_layers: Sequence[LayerCost]) -> Iterator[Maker]:
    """Yield makers with ever more of the costliest layers in float, up to half of them: more would leave no gain."""
    recipe = find_recipe(entry)
    if recipe is None:
        return
    for count, relaxed_recipe in relax(recipe, costs_of_layers):
        maker = int8_maker(relaxed_recipe, f"quantize.ptq: Q/DQ by {recipe.name}, {count} of {len(costs_of_layers)} layers in float")
        yield Maker(f"{maker.name}-{count}", "mixed", maker.activations, maker.recipe, maker.make, "", maker.depends)


def _failure(entry: VariantResult) -> float:
    """How far a variant is from the float model: its worst mean change of a score or loss of overlap; infinite where it did not run."""
    figures = [verdict.figures for verdict in entry.verdicts.values()]
    changes = [float(label["mean_abs_delta"]) for one in figures for label in one.get("labels", {}).values()]
    losses = [1 - float(value) for one in figures for value in one.get("dice", {}).values()]
    return max([*changes, *losses], default=math.inf)
