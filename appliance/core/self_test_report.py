"""The report of a self-test, as it is stored with a model and with its activation (columns ``self_test``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from appliance.core.domain import Note

if TYPE_CHECKING:
    from model_sync.bundle import Watch

FIXED_BY_USER: Final = "choice.by_hand"
NOT_MEASURED: Final = "choice.untuned"
# A faster model is compared as if it took this long: a busy box turns tenths of a millisecond into several.
LATENCY_FLOOR_MS: Final = 20.0
_OPTIONAL: Final = ("busy", "fallback", "runs", "watch_ms")


@dataclass(frozen=True)
class SelfTestReport:
    """What a self-test measured, which candidate it chose, and what the worker added since.

    Attributes:
        precision: of the variant that runs.
        runtime: name and version of the runtime.
        details: what ran, as the runtime describes it (``Runtime.describe``).
        max_difference: golden case -> largest difference to its expected output.
        median_ms: median time of one inference.
        worst_ms: longest time of one inference.
        load_ms: time to load and warm up.
        peak_rss_bytes: peak resident memory of the process that ran it.
        choice: the chosen candidate as JSON; None in reports that are older than the choice of candidates.
        reason: why this candidate runs.
        table: one JSON object per measured candidate.
        tuned_at: time of the measurement (UTC).
        profile: the device that it was measured on.
        hub: address of the remote runtime that was configured; empty when none was.
        busy: the coded reason ``tune.busy`` when other work went on while it was measured; None when not.
        fallback: why the baseline runs instead of the choice, with ``at``; written by the worker.
        runs: what runs now and since when; written by the worker.
        watch_ms: time of an inference that the trial allows in place of ``median_ms``, after a fallback; written by the worker.
    """

    precision: str = ""
    runtime: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    max_difference: Mapping[str, float] = field(default_factory=dict)
    median_ms: float = 0.0
    worst_ms: float | None = None
    load_ms: float | None = None
    peak_rss_bytes: int | None = None
    choice: Mapping[str, Any] | None = None
    reason: Note | None = None
    table: tuple[Mapping[str, Any], ...] = ()
    tuned_at: str = ""
    profile: str = ""
    hub: str = ""
    busy: Mapping[str, Any] | None = None
    fallback: Mapping[str, Any] | None = None
    runs: Mapping[str, Any] | None = None
    watch_ms: float | None = None

    @property
    def is_fixed_by_user(self) -> bool:
        """Whether a person chose the precision, so that measuring must not change it."""
        return self.reason is not None and self.reason.code == FIXED_BY_USER

    @property
    def is_measured(self) -> bool:
        """Whether the candidates of this box were measured; reports without a reason are older than that and count as measured."""
        return self.reason is None or self.reason.code != NOT_MEASURED

    @property
    def expected_ms(self) -> float:
        """The time of an inference that a trial is compared with."""
        return max(self.median_ms, self.watch_ms or 0.0)

    def to_json(self) -> dict[str, Any]:
        """The report as it is stored and sent."""
        value = asdict(self) | {"reason": self.reason.to_json() if self.reason else None}
        return {name: item for name, item in value.items() if name not in _OPTIONAL or item is not None}

    @classmethod
    def from_json(cls, stored: str | Mapping[str, Any] | None) -> SelfTestReport:
        """Read a stored report of this or another version of the appliance.

        Unknown fields are ignored, missing ones have their defaults; what is not a JSON object is read as an empty report.
        """
        if isinstance(stored, str):
            try:
                stored = json.loads(stored)
            except (ValueError, RecursionError):
                stored = None
        value: dict[str, Any] = dict(stored) if isinstance(stored, Mapping) else {}
        known = {item.name: value[item.name] for item in fields(cls) if value.get(item.name) is not None}
        reason, table = value.get("reason"), value.get("table")
        for name in ("details", "max_difference", "choice", "busy", "fallback", "runs"):
            if name in known and not isinstance(known[name], Mapping):
                del known[name]
        known["reason"] = Note(str(reason.get("code", "")), str(reason.get("detail", ""))) if isinstance(reason, Mapping) else None
        known["table"] = tuple(row for row in table if isinstance(row, Mapping)) if isinstance(table, list) else ()
        return cls(**known)


def allowed_latency_ms(watch: Watch, expected_ms: float) -> float:
    """Compute the longest median latency that the manifest allows for a model that took ``expected_ms`` in the self-test."""
    return watch.max_latency_ratio * max(expected_ms, LATENCY_FLOOR_MS)
