"""The queries of the fleet page; each uses an index."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, RowMapping, and_, case, func, not_, or_, select

from model_sync.agent.report import ModelState
from model_sync.fleet.database import RUNNING, Fleet, VersionTally, failed_by_model
from model_sync.fleet.tables import actions, activations, box_models, boxes, certificates, events
from model_sync.trust.documents import RolloutStep, place_of

SILENT_S: Final = 24 * 3600
PAGE_ROWS: Final = 50
STATES: Final = ("attention", "audit", "failed", "alarm", "untrusted", "unreachable", "outdated", "silent", "never", "denied", "fine")
# What needs a person, the worst first. A box with none of them, and not denied, is fine.
TROUBLES: Final = ("audit", "untrusted", "failed", "alarm", "error", "silent", "unreachable", "outdated", "never", "unknown")
_SYNC_TROUBLES: Final = ("untrusted", "error", "unreachable", "outdated", "unknown")
_POINTS: Final = 48


@dataclass(frozen=True)
class Filters:
    """The filters of the fleet page; an empty text means no filter. ``differs`` keeps the boxes that differ from their device class."""

    ring: str = ""
    line: str = ""
    version: str = ""
    state: str = ""
    name: str = ""
    differs: str = ""


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


class PlanTally(NamedTuple):
    """The boxes of a rollout's plan: on the version and well, in its trial, on it and in need of attention, and not on it."""

    boxes: int
    well: int
    trial: int
    troubled: int
    missing: int


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


def list_boxes(fleet: Fleet, filters: Filters, page: int, differing: Collection[str] = ()) -> BoxPage:
    """Return one page of boxes with their ``health``: those that need attention the worst and longest silent first, others by name.

    ``differing`` are the names of the boxes that differ from their device class, for that filter.
    """
    where = _where(fleet, filters)
    if filters.differs:
        where.append(boxes.c.box_id.in_(differing))
    wanted = (
        boxes.c.box_id, boxes.c.ring, boxes.c.reported_ring, boxes.c.last_seen, boxes.c.sync_state, boxes.c.sync_code, boxes.c.trouble,
        boxes.c.trouble_line, boxes.c.trouble_version, boxes.c.alarm, boxes.c.alarm_line, boxes.c.alarm_version, boxes.c.denied_at,
        boxes.c.appliance_version, _health(fleet.now()),
    )  # fmt: skip
    order = (_severity(fleet.now()), boxes.c.last_seen, boxes.c.box_id) if filters.state == "attention" else (boxes.c.box_id,)
    with fleet.reading() as tx:
        total = tx.execute(select(func.count()).select_from(boxes).where(*where)).scalar_one()
        page = min(max(1, page), max(1, -(-total // PAGE_ROWS)))
        query = select(*wanted).where(*where).order_by(*order).limit(PAGE_ROWS).offset((page - 1) * PAGE_ROWS)
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
    """Return everything about one box, its ``health`` too, or None."""
    mine = select(box_models).where(box_models.c.box_id == box_id).order_by(box_models.c.position)
    happened = select(events).where(events.c.box_id == box_id).order_by(events.c.at.desc(), events.c.id.desc())
    issued = select(certificates).where(certificates.c.box_id == box_id).order_by(certificates.c.not_after.desc()).limit(5)
    with fleet.reading() as tx:
        row = tx.execute(select(boxes, _health(fleet.now())).where(boxes.c.box_id == box_id)).mappings().one_or_none()
        lists = {"models": mine, "events": happened, "certificates": issued}
        return {"box": row} | {name: list(tx.execute(query).mappings()) for name, query in lists.items()} if row is not None else None


def plan_tally(fleet: Fleet, ring: str, line: str, step: RolloutStep) -> PlanTally:
    """Count the boxes of a rollout's plan: those of the ring whose place is below its percentage, however far they are."""
    here, now = activations.c, fleet.now()
    same = here.box_id == boxes.c.box_id, here.line == line, here.version == step.version
    on_it = case((and_(here.running_since.is_not(None), here.ended_at.is_(None)), here.state), else_="").label("state")
    query = select(boxes.c.box_id, _health(now), on_it).outerjoin(activations, and_(*same))
    with fleet.reading() as tx:
        rows = tx.execute(query.where(boxes.c.ring == ring, boxes.c.denied_at.is_(None))).all()
    planned = [(health, state) for box_id, health, state in rows if place_of(line, step.version, box_id) < step.percent]
    on = [health for health, state in planned if state in (ModelState.GOOD.value, ModelState.ACTIVE.value)]
    well = sum(health == "fine" for health in on)
    trial = sum(state == ModelState.TRIAL.value for _health_of_box, state in planned)
    return PlanTally(len(planned), well, trial, len(on) - well, len(planned) - len(on) - trial)


def pause_reason(fleet: Fleet, ring: str, line: str, version: str) -> RowMapping | None:
    """Return the recorded action that paused a version; None when it was signed as paused elsewhere."""
    here = actions.c
    same = here.ring == ring, here.line == line, here.subject == version, here.action.in_(("paused", "resumed"))
    with fleet.reading() as tx:
        row = tx.execute(select(actions).where(*same).order_by(here.id.desc()).limit(1)).mappings().one_or_none()
    return row if row is not None and row["action"] == "paused" else None


def failure_codes(fleet: Fleet, ring: str, line: str, version: str) -> list[tuple[str, int]]:
    """Return the reasons for which a version failed on a ring's boxes by the fault of the model, and how often, the most frequent first."""
    here, count = activations.c, func.count()
    query = select(here.code, count).where(here.ring == ring, here.line == line, here.version == version, failed_by_model())
    with fleet.reading() as tx:
        return [(str(code), int(number)) for code, number in tx.execute(query.group_by(here.code).order_by(count.desc(), here.code))]


def latest_actions(fleet: Fleet, limit: int) -> list[RowMapping]:
    """Return the last actions."""
    with fleet.reading() as tx:
        return list(tx.execute(select(actions).order_by(actions.c.id.desc()).limit(limit)).mappings())


def count_actions(fleet: Fleet) -> int:
    """Return the number of recorded actions."""
    with fleet.reading() as tx:
        return int(tx.execute(select(func.count()).select_from(actions)).scalar_one())


def in_state(state: str, now: int) -> ColumnElement[bool]:
    """Return the SQL condition that a box is in one of ``STATES``; ``attention`` is true for all that need a person."""
    is_allowed, each = boxes.c.denied_at.is_(None), _troubles(now)
    if state == "denied":
        return boxes.c.denied_at.is_not(None)
    if state == "attention":
        return and_(is_allowed, or_(*each.values()))
    if state == "fine":
        return and_(is_allowed, not_(or_(*each.values())))
    if state == "untrusted":
        return and_(is_allowed, or_(each["untrusted"], each["error"]))
    return and_(is_allowed, each[state])


def _troubles(now: int) -> dict[str, ColumnElement[bool]]:
    """Return the SQL condition of each of ``TROUBLES``, in that order; none of them is ever NULL."""
    here, seen = boxes.c, boxes.c.last_seen.is_not(None)
    each = {state: and_(seen, here.sync_state == state) for state in _SYNC_TROUBLES}
    each |= {
        "failed": here.trouble != "",
        "alarm": here.alarm != "",
        "audit": here.audit_state != "",
        "silent": and_(seen, here.last_seen < now - SILENT_S),
        "never": here.last_seen.is_(None),
    }
    return {trouble: each[trouble] for trouble in TROUBLES}


def _health(now: int) -> ColumnElement[str]:
    """Return the SQL column ``health``: ``denied``, the worst trouble of a box, or ``fine``."""
    whens = [(boxes.c.denied_at.is_not(None), "denied"), *((condition, name) for name, condition in _troubles(now).items())]
    return case(*whens, else_="fine").label("health")


def _severity(now: int) -> ColumnElement[int]:
    conditions = enumerate(_troubles(now).values())
    return case(*((condition, number) for number, condition in conditions), else_=len(TROUBLES))


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
