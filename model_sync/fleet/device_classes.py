"""Finds the boxes that run a model otherwise than the other boxes of their device class.

Boxes of one class measured the same candidates on the same hardware, so they should have chosen the same runtime and precision.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import select

from model_sync.fleet.database import Fleet
from model_sync.fleet.tables import box_models, boxes


class RunningModel(NamedTuple):
    """What runs one model on one box; ``runtime`` as reported, a name and perhaps a version."""

    box_id: str
    device_class: str
    line: str
    digest: str
    runtime: str
    precision: str


def find_differing(models: Iterable[RunningModel]) -> dict[str, frozenset[str]]:
    """Find the boxes whose runtime or precision of a model is not that of more than half of the boxes of their class.

    Where no choice has more than half, all boxes of the class differ. The versions of runtimes do not count: they change with every
    update of the appliance.

    Returns:
        Box -> the model lines in which it differs.
    """
    groups: defaultdict[tuple[str, str], list[tuple[RunningModel, tuple[str, str]]]] = defaultdict(list)
    for model in models:
        if model.device_class:
            groups[model.device_class, model.digest].append((model, (model.runtime.partition(" ")[0], model.precision)))
    differing: defaultdict[str, set[str]] = defaultdict(set)
    for group in groups.values():
        ((usual, count),) = Counter(choice for _, choice in group).most_common(1)
        for model, choice in group:
            if choice != usual or (2 * count <= len(group) and count < len(group)):
                differing[model.box_id].add(model.line)
    return {box_id: frozenset(lines) for box_id, lines in differing.items()}


def differing_boxes(fleet: Fleet) -> dict[str, frozenset[str]]:
    """Return the boxes of a fleet that differ from their class, with the model lines; denied boxes do not count."""
    query = (
        select(boxes.c.box_id, boxes.c.device_class, box_models.c.line, box_models.c.digest, box_models.c.runtime, box_models.c.precision)
        .join(boxes, boxes.c.box_id == box_models.c.box_id)
        .where(box_models.c.running == 1, boxes.c.denied_at.is_(None), boxes.c.device_class != "")
    )
    with fleet.reading() as tx:
        return find_differing(RunningModel(*row) for row in tx.execute(query))
