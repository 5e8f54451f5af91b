"""The chart of a rollout: planned, running and failed boxes over time, in SVG coordinates; the template draws it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from model_sync.fleet.database import VersionTally
from model_sync.fleet.views import Progress
from model_sync.trust.documents import RolloutStep

LEFT: Final = 50
RIGHT: Final = 700
TOP: Final = 14
BOTTOM: Final = 206
_TICKS: Final = 4
_SHORTEST_S: Final = 3600


@dataclass(frozen=True)
class Chart:
    """Paths and positions in SVG coordinates."""

    plan: str
    actual: str
    area: str
    failed: str
    now_x: float | None
    x_ticks: list[tuple[float, int]]
    y_ticks: list[tuple[float, int]]
    end: tuple[float, float]


def span(step: RolloutStep, now: int) -> tuple[int, int]:
    """Return the time range of the chart: from the start to the end of the plan, or to now when that is later."""
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
        plan=f"M{LEFT} {BOTTOM} L{x(begin + step.duration_h * 3600)} {_y(step.percent)} L{x(end)} {_y(step.percent)}",
        actual=actual,
        area=f"{actual} V{BOTTOM} H{LEFT} Z" if actual else "",
        failed=failed if progress.tally.failed else "",
        now_x=x(now) if begin < now < end else None,
        x_ticks=[(x(moment), moment) for moment in (begin + (end - begin) * tick // _TICKS for tick in range(_TICKS + 1))],
        y_ticks=[(_y(percent), percent) for percent in (0, 25, 50, 75, 100)],
        end=(x(min(max(now, begin), end)), _y(_share(progress.now, progress.total))),
    )


def planned_share(step: RolloutStep, at: datetime) -> float:
    """Return the planned percentage of the ring's boxes on the version at a time."""
    passed = (at - step.start).total_seconds() / 3600
    if passed < 0:
        return 0.0
    return step.percent * min(1.0, passed / step.duration_h) if step.duration_h else step.percent


def pausing_failures(step: RolloutStep, tally: VersionTally, known: int = 0) -> int:
    """Return the number of failed boxes at which the rollout is paused; ``known`` failures were acknowledged by a person."""
    tried = max(0, tally.tried - known)
    return known + max(step.failure_budget.min_boxes, int(step.failure_budget.max_fraction * tried) + 1)


def _steps(points: list[tuple[float, float]]) -> str:
    if not points:
        return ""
    return f"M{points[0][0]} {points[0][1]}" + "".join(f" H{at} V{height}" for at, height in points[1:])


def _y(percent: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * percent / 100, 1)


def _share(count: int, total: int) -> float:
    return 100 * count / total if total else 0.0
