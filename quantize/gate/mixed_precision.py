"""Layers back to float where no int8 variant passes the gate, the costliest first; and what each layer costs, for the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from model_sync.bundle import sha256_of
from quantize.gate.selection import LayerError, Tried
from quantize.recipes import int8
from quantize.recipes.int8 import Recipe
from quantize.recipes.layer_costs import LayerCost, layer_costs, relaxed
from quantize.recipes.variant_makers import Maker, Source, quantized

if TYPE_CHECKING:
    from quantize.gate.gate_runs import Ground

# Layers are told apart by few pictures.
_PICTURES: Final = 16

Told = Callable[[float], None]


def recipe_of(entry: Tried) -> Recipe | None:
    """The int8 recipe that a variant was made by."""
    return next((recipe for recipe in int8.recipes() if entry.name == quantized(recipe).name), None)


def costs(entry: Tried, source: Source, ground: Ground, told: Told) -> list[LayerCost]:
    """What each layer of a variant costs, measured on evaluation pictures, the costliest first; kept for a run that goes on."""
    recipe = recipe_of(entry)
    if recipe is None or entry.path is None:
        return []
    pictures = ground.evaluation.tensors[:: max(1, len(ground.evaluation) // _PICTURES)][:_PICTURES]

    def make(_: object) -> list[dict[str, object]]:
        found = layer_costs(source.model, recipe, source.measured(), [pictures], told=told)
        return [asdict(cost) | {"nodes": sorted(cost.nodes)} for cost in found]

    _, remembered = ground.work.step(f"layers-{entry.name}", [sha256_of(entry.path), ground.evaluation.digest], make)
    return [LayerCost(cost["layer"], cost["op_type"], frozenset(cost["nodes"]), cost["cost"]) for cost in remembered]


def shown(found: Sequence[LayerCost]) -> tuple[LayerError, ...]:
    """The costs as the report shows them."""
    return tuple(LayerError(cost.layer, cost.op_type, cost.cost) for cost in found)


def nearest(tried: Sequence[Tried]) -> list[Tried]:
    """Of each kind of activations the int8 variant that failed least, of those whose layers can be put back one by one."""
    best: dict[object, Tried] = {}
    for entry in sorted(tried, key=_failure):
        if entry.precision == "int8" and recipe_of(entry) is not None and math.isfinite(_failure(entry)):
            best.setdefault(entry.activations, entry)
    return list(best.values())


def makers(entry: Tried, found: Sequence[LayerCost]) -> Iterator[Maker]:
    """Yield makers with ever more of the costliest layers in float, up to half of them: more would leave no gain."""
    recipe = recipe_of(entry)
    if recipe is None:
        return
    for count, kept in relaxed(recipe, found):
        maker = quantized(kept, f"quantize.ptq: Q/DQ by {recipe.name}, {count} of {len(found)} layers in float")
        yield Maker(f"{maker.name}-{count}", "mixed", maker.activations, maker.recipe, maker.make, "", maker.depends)


def _failure(entry: Tried) -> float:
    """How far a variant is from the float model: its worst mean change of a score or loss of overlap; infinite where it did not run."""
    figures = [verdict.figures for verdict in entry.verdicts.values()]
    changes = [float(label["mean_abs_delta"]) for one in figures for label in one.get("labels", {}).values()]
    losses = [1 - float(value) for one in figures for value in one.get("dice", {}).values()]
    return max([*changes, *losses], default=math.inf)
