"""The queries of the fleet page; each uses an index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

from sqlalchemy import ColumnElement, RowMapping, and_, case, func, or_, select

from model_sync.fleet.database import RUNNING, Fleet, VersionTally, failed_by_model
from model_sync.fleet.tables import actions, activations, box_models, boxes, certificates, events

SILENT_S: Final = 24 * 3600
PAGE_ROWS: Final = 50
STATES: Final = ("attention", "failed", "untrusted", "unreachable", "silent", "never", "denied", "fine")
_TROUBLED_SYNC: Final = ("untrusted", "error")
_POINTS: Final = 48


@dataclass(frozen=True)
class Filters:
    """The filters of the fleet page; an empty text means no filter."""

    ring: str = ""
    line: str = ""
    version: str = ""
    state: str = ""
    name: str = ""


@dataclass(frozen=True)
class BoxPage:
    """One page of boxes."""

    boxes: list[RowMapping]
    models: dict[str, list[RowMapping]]
    total: int
    page: int

    @property
    def pages(self) -> int:
        """The number of pages; at least one."""
        return max(1, -(-self.total // PAGE_ROWS))


@dataclass(frozen=True)
class Progress:
    """A rollout over time: at ``times``, in seconds since the epoch, how many of ``total`` boxes ran the version or had failed."""

    total: int
    times: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    now: int = 0
    tally: VersionTally = VersionTally(0, 0, 0)  # noqa: RUF009 - immutable


def counts(fleet: Fleet) -> dict[str, int]:
    """Return the number of boxes, in all and in each of ``STATES``."""
    now = fleet.now()
    columns = [func.count().label("total")]
    columns += [func.sum(case((in_state(state, now), 1), else_=0)).label(state) for state in STATES]
    with fleet.reading() as tx:
        row = tx.execute(select(*columns)).mappings().one()
    return {name: int(row[name] or 0) for name in ("total", *STATES)}


def versions(fleet: Fleet) -> list[RowMapping]:
    """Return how many boxes of each ring run each version of each model line."""
    columns = box_models.c.line, box_models.c.version, boxes.c.ring
    query = (
        select(*columns, func.count().label("boxes"))
        .join(boxes, boxes.c.box_id == box_models.c.box_id)
        .where(box_models.c.running == 1, boxes.c.denied_at.is_(None))
        .group_by(*columns)
        .order_by(*columns)
    )
    with fleet.reading() as tx:
        return list(tx.execute(query).mappings())


def rings(fleet: Fleet) -> dict[str, int]:
    """Return the rings and how many boxes each has."""
    query = select(boxes.c.ring, func.count()).where(boxes.c.denied_at.is_(None)).group_by(boxes.c.ring).order_by(boxes.c.ring)
    with fleet.reading() as tx:
        return {ring: int(count) for ring, count in tx.execute(query)}


def list_boxes(fleet: Fleet, filters: Filters, page: int) -> BoxPage:
    """Return one page of boxes, by name."""
    where = _where(fleet, filters)
    wanted = (
        boxes.c.box_id, boxes.c.ring, boxes.c.reported_ring, boxes.c.last_seen, boxes.c.sync_state, boxes.c.sync_code, boxes.c.trouble,
        boxes.c.trouble_line, boxes.c.trouble_version, boxes.c.denied_at, boxes.c.appliance_version,
    )  # fmt: skip
    with fleet.reading() as tx:
        total = tx.execute(select(func.count()).select_from(boxes).where(*where)).scalar_one()
        page = min(max(1, page), max(1, -(-total // PAGE_ROWS)))
        query = select(*wanted).where(*where).order_by(boxes.c.box_id).limit(PAGE_ROWS).offset((page - 1) * PAGE_ROWS)
        rows = list(tx.execute(query).mappings())
        names = [row["box_id"] for row in rows]
        running = select(box_models).where(box_models.c.box_id.in_(names), box_models.c.running == 1)
        models: dict[str, list[RowMapping]] = {}
        for model in tx.execute(running.order_by(box_models.c.line)).mappings():
            models.setdefault(model["box_id"], []).append(model)
    return BoxPage(rows, models, total, page)


def progress(fleet: Fleet, ring: str, line: str, version: str, begin: int, end: int) -> Progress:
    """Count, at evenly spaced moments from ``begin`` to ``end``, the ring's boxes that ran a version and those that failed it."""
    step = max(1, -(-(end - begin) // _POINTS))
    times = [*range(begin, end, step), end]
    here = activations.c

    def slot(moment: ColumnElement[Any]) -> ColumnElement[Any]:
        return case((moment.is_(None), None), (moment <= begin, 0), else_=(moment - begin + step - 1) // step)  # not before it happened

    fault = case((failed_by_model(), 1), else_=0).label("fault")
    columns = here.state, fault, slot(here.running_since).label("began"), slot(here.ended_at).label("ended")
    query = select(*columns, func.count().label("count")).where(here.ring == ring, here.line == line, here.version == version)
    size = select(func.count()).select_from(boxes).where(boxes.c.ring == ring, boxes.c.denied_at.is_(None))
    with fleet.reading() as tx:
        total = tx.execute(size).scalar_one()
        rows = tx.execute(query.group_by(here.state, "fault", "began", "ended")).mappings().all()
    began = _running_sum(((row["began"], row["count"]) for row in rows), len(times))
    ended = _running_sum(((row["ended"], row["count"]) for row in rows if row["began"] is not None), len(times))
    failed = _running_sum(((row["ended"], row["count"]) for row in rows if row["fault"]), len(times))
    good = sum(row["count"] for row in rows if row["state"] in RUNNING)
    bad = sum(row["count"] for row in rows if row["fault"])
    now = sum(row["count"] for row in rows if row["began"] is not None and row["ended"] is None)
    return Progress(
        total, times, [on - off for on, off in zip(began, ended, strict=True)], failed, now, VersionTally(good + bad, good, bad)
    )


def box(fleet: Fleet, box_id: str) -> dict[str, Any] | None:
    """Return everything about one box, or None."""
    mine = select(box_models).where(box_models.c.box_id == box_id).order_by(box_models.c.position)
    happened = select(events).where(events.c.box_id == box_id).order_by(events.c.at.desc(), events.c.id.desc())
    issued = select(certificates).where(certificates.c.box_id == box_id).order_by(certificates.c.not_after.desc()).limit(5)
    with fleet.reading() as tx:
        row = tx.execute(select(boxes).where(boxes.c.box_id == box_id)).mappings().one_or_none()
        lists = {"models": mine, "events": happened, "certificates": issued}
        return {"box": row} | {name: list(tx.execute(query).mappings()) for name, query in lists.items()} if row is not None else None


def latest_actions(fleet: Fleet, limit: int = 15) -> list[RowMapping]:
    """Return the last actions."""
    with fleet.reading() as tx:
        return list(tx.execute(select(actions).order_by(actions.c.id.desc()).limit(limit)).mappings())


def in_state(state: str, now: int) -> ColumnElement[bool]:
    """Return the SQL condition that a box is in one of ``STATES``; ``attention`` covers all that need a person."""
    here = boxes.c
    is_allowed = here.denied_at.is_(None)
    each = {
        "failed": here.trouble != "",
        "untrusted": here.sync_state.in_(_TROUBLED_SYNC),
        "unreachable": here.sync_state == "unreachable",
        "silent": here.last_seen < now - SILENT_S,
        "never": here.last_seen.is_(None),
    }
    if state == "denied":
        return here.denied_at.is_not(None)
    if state == "attention":
        return and_(is_allowed, or_(each["failed"], each["untrusted"], each["silent"]))
    if state == "fine":
        return and_(
            is_allowed, here.last_seen >= now - SILENT_S, here.trouble == "", here.sync_state.not_in((*_TROUBLED_SYNC, "unreachable"))
        )
    return and_(is_allowed, each[state])


def _where(fleet: Fleet, filters: Filters) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if filters.ring:
        conditions.append(boxes.c.ring == filters.ring)
    if filters.state in STATES:
        conditions.append(in_state(filters.state, fleet.now()))
    if filters.name:
        conditions.append(boxes.c.box_id.contains(filters.name, autoescape=True))
    if filters.line:
        same = [box_models.c.running == 1, box_models.c.line == filters.line]
        same += [box_models.c.version == filters.version] if filters.version else []
        conditions.append(boxes.c.box_id.in_(select(box_models.c.box_id).where(*same)))
    return conditions


def _running_sum(slots: Iterable[tuple[Any, int]], length: int) -> list[int]:
    by_slot = [0] * length
    for slot, count in slots:
        if slot is not None:
            by_slot[min(length - 1, int(slot))] += count
    return list(accumulate(by_slot))
