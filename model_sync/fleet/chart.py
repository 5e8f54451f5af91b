"""The picture of a rollout: where the ring's boxes should be by plan, where they are, and how many failed.

Only the geometry is made here, in the coordinates of the SVG; the template draws it and says the same in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from model_sync.fleet.database import Tally
from model_sync.fleet.views import Progress
from model_sync.trust.documents import RolloutStep

WIDTH: Final = 720
HEIGHT: Final = 250
LEFT: Final = 50
RIGHT: Final = 700
TOP: Final = 14
BOTTOM: Final = 206
_TICKS: Final = 4
_SHORTEST_S: Final = 3600


@dataclass(frozen=True)
class Chart:
    """Paths and places in SVG coordinates."""

    plan: str
    actual: str
    area: str
    failed: str
    now_x: float | None
    x_ticks: list[tuple[float, int]]
    y_ticks: list[tuple[float, int]]
    end: tuple[float, float]


def span(step: RolloutStep, now: int) -> tuple[int, int]:
    """Return the time that the picture covers: from the start to the end of the plan, or to now when that is later."""
    begin = int(step.start.timestamp())
    planned = int((step.start + timedelta(hours=step.duration_h)).timestamp())
    return begin, max(planned, now, begin + _SHORTEST_S)


def draw(step: RolloutStep, progress: Progress, now: int) -> Chart:
    """Return the geometry of one rollout."""
    begin, end = span(step, now)

    def x(moment: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (moment - begin) / (end - begin), 1)

    def steps(counts: list[int], last: int) -> str:
        past = [(moment, count) for moment, count in zip(progress.times, counts, strict=True) if moment < now]
        return _steps([(x(at), _y(_share(count, progress.total))) for at, count in [*past, (min(now, end), last)] if now >= begin])

    actual, failed = steps(progress.running, progress.now), steps(progress.failed, progress.tally.failed)
    return Chart(
        plan=_plan(step, x, end),
        actual=actual,
        area=f"{actual} V{BOTTOM} H{LEFT} Z" if actual else "",
        failed=failed if progress.tally.failed else "",
        now_x=x(now) if begin < now < end else None,
        x_ticks=[(x(moment), moment) for moment in (begin + (end - begin) * tick // _TICKS for tick in range(_TICKS + 1))],
        y_ticks=[(_y(percent), percent) for percent in (0, 25, 50, 75, 100)],
        end=(x(min(max(now, begin), end)), _y(_share(progress.now, progress.total))),
    )


def planned_share(step: RolloutStep, at: datetime) -> float:
    """Return the percentage of the ring's boxes that the plan wants on the version at a time."""
    passed = (at - step.start).total_seconds() / 3600
    if passed < 0:
        return 0.0
    return step.percent * min(1.0, passed / step.duration_h) if step.duration_h else step.percent


def pausing_failures(step: RolloutStep, tally: Tally, known: int = 0) -> int:
    """Return the number of failed boxes at which the rollout is paused, for the boxes that tried it so far.

    ``known`` failures a human has looked at before they let it go on: they are not counted again.
    """
    tried = max(0, tally.tried - known)
    return known + max(step.failure_budget.min_boxes, int(step.failure_budget.max_fraction * tried) + 1)


def _plan(step: RolloutStep, x: object, end: int) -> str:
    assert callable(x)
    full = (step.start + timedelta(hours=step.duration_h)).timestamp()
    top = _y(step.percent)
    return f"M{LEFT} {BOTTOM} L{x(full)} {top} L{x(end)} {top}"


def _steps(points: list[tuple[float, float]]) -> str:
    if not points:
        return ""
    return f"M{points[0][0]} {points[0][1]}" + "".join(f" H{at} V{height}" for at, height in points[1:])


def _y(percent: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * percent / 100, 1)


def _share(count: int, total: int) -> float:
    return 100 * count / total if total else 0.0
