"""Put layers back to float, the most expensive first, when no int8 variant passes the gate; list the cost of each layer for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Final

from model_sync.bundle import sha256_of
from quantize.gate.gate_runs import GateContext
from quantize.gate.selection import VariantResult
from quantize.progress import OnProgress
from quantize.recipes import int8
from quantize.recipes.int8 import Recipe
from quantize.recipes.layer_costs import LayerCost, measure_layer_costs, relax
from quantize.recipes.variant_makers import Maker, Source, int8_maker

# A few pictures are enough to order the layers by their cost.
_PICTURES: Final = 16


def find_recipe(entry: VariantResult) -> Recipe | None:
    """Return the int8 recipe of a variant; None for variants made by other means."""
    return next((recipe for recipe in int8.recipes() if entry.name == int8_maker(recipe).name), None)


def measure_costs(entry: VariantResult, source: Source, context: GateContext, on_progress: OnProgress) -> list[LayerCost]:
    """Measure what each layer of a variant costs on evaluation pictures, the costliest first; stored for a resumed run."""
    recipe = find_recipe(entry)
    if recipe is None or entry.path is None:
        return []
    images = context.evaluation.tensors[:: max(1, len(context.evaluation) // _PICTURES)][:_PICTURES]

    def make(_: object) -> list[dict[str, object]]:
        costs = measure_layer_costs(source.model, recipe, source.calibration(), [images], on_progress=on_progress)
        return [asdict(cost) | {"nodes": sorted(cost.nodes)} for cost in costs]

    _, stored = context.work.step(f"layers-{entry.name}", [sha256_of(entry.path), context.evaluation.digest], make)
    return [LayerCost(**cost | {"nodes": frozenset(cost["nodes"])}) for cost in stored]


def find_nearest(variants: Sequence[VariantResult]) -> list[VariantResult]:
    """Return, for each kind of activations and width of weights, the int8 variant nearest to the gate.

    Only variants whose layers can be put back to float are among them.
    """
    best: dict[object, VariantResult] = {}
    for entry in sorted(variants, key=lambda entry: entry.failure):
        recipe = find_recipe(entry)
        if entry.precision == "int8" and recipe is not None and math.isfinite(entry.failure):
            best.setdefault((entry.activations, recipe.weight_bits), entry)
    return list(best.values())


def make_mixed(entry: VariantResult, costs: Sequence[LayerCost]) -> Iterator[Maker]:
    """Yield makers with ever more of the costliest layers in float, up to half of them: more would leave no gain."""
    recipe = find_recipe(entry)
    if recipe is None:
        return
    for count, relaxed_recipe in relax(recipe, costs):
        maker = int8_maker(relaxed_recipe, f"quantize.ptq: Q/DQ by {recipe.name}, {count} of {len(costs)} layers in float")
        yield Maker(f"{maker.name}-{count}", "mixed", maker.activations, maker.recipe, maker.make, "", maker.depends)
