"""How a model is run, as people see it: runtime, precision and reason, parsed from the JSON that the worker stored.

Fields that another version of the appliance wrote are used as far as they are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.domain import Note

FALLBACK: Final = "choice.fallback"
# The product names.
_NAMES: Final = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT", "triton": "Triton"}


@dataclass(frozen=True)
class RunSummary:
    """What ran one model.

    Attributes:
        runtime: product name.
        precision: of the variant's file.
        code: the reason for this candidate; empty where unknown.
        detail: of the reason.
        ran_in: the precision of the layers with weights, where the runtime reports another one; else empty.
    """

    runtime: str
    precision: str
    code: str = ""
    detail: str = ""
    ran_in: str = ""

    @property
    def fallback(self) -> bool:
        """Whether it is a fallback."""
        return self.code == FALLBACK

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> RunSummary | None:
        """Parse the ``runtime`` column of a job; None where nothing ran."""
        if not stored.get("runtime"):
            return None
        reason = _object(stored.get("reason"))
        runtime, precision = name_of(str(stored["runtime"])), str(stored.get("precision", ""))
        ran_in = str(stored.get("ran") or "")
        return cls(runtime, precision, str(reason.get("code", "")), str(reason.get("detail", "")), "" if ran_in == precision else ran_in)


@dataclass(frozen=True)
class CandidateSummary:
    """One row of the table of measured candidates; see :class:`appliance.tuning.selection.Row`."""

    runtime: str
    provider: str
    precision: str
    threads: int
    batch: int
    state: str
    code: str
    detail: str
    median_ms: float | None
    per_image_ms: float | None
    max_difference: float | None
    layers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class RuntimeStatus:
    """How an active model is run: the chosen candidate and its ``reason``, all measured candidates, and what runs now.

    Attributes:
        now: what runs the model, as in a result; None where no worker has reported it, or where nothing runs it.
        fallback: why the baseline runs in place of the chosen candidate.
        other: the reason for what runs now, where it is neither a fallback nor ``reason``: measured on another device.
        stopped: why nothing can run the model.
        tuned_at: when it was measured.
        profile: of the device it was measured on.
        busy: that other work slowed the measurement.
    """

    reason: Note | None
    chosen: CandidateSummary | None
    table: tuple[CandidateSummary, ...]
    now: RunSummary | None
    since: str
    fallback: Note | None
    other: Note | None
    stopped: Note | None
    tuned_at: str
    profile: str
    busy: Note | None = None

    @classmethod
    def of(cls, self_test: str | None) -> RuntimeStatus:
        """Parse a stored self-test report."""
        report = _object(self_test)
        reason, fallback = _note(report.get("reason")), _object(report.get("fallback"))
        runs = _object(report.get("runs")) or fallback | {"reason": fallback}  # an older version stored a fallback only
        now, why = RunSummary.of(runs), _note(runs.get("reason"))
        differs = why is not None and why.code not in (FALLBACK, reason.code if reason else why.code)
        rows = report.get("table")
        table = sorted((item for item in map(_candidate, rows if isinstance(rows, list) else []) if item), key=_order)
        return cls(
            reason=reason,
            chosen=next((item for item in table if item.state == "chosen"), None),
            table=tuple(table),
            now=now,
            since=str(fallback.get("at") or runs.get("at") or ""),
            fallback=_note(fallback),
            other=why if now is not None and differs else None,
            stopped=why if now is None else None,
            tuned_at=str(report.get("tuned_at", "")),
            profile=str(report.get("profile", "")),
            busy=_note(report.get("busy")),
        )


def name_of(runtime: str) -> str:
    """The product name of a runtime, with its version where there is one."""
    first, _, rest = runtime.partition(" ")
    return f"{_NAMES.get(first, first)} {rest}".strip()


def _note(value: Any) -> Note | None:
    """Parse a stored note; None where it is not one."""
    note = _object(value)
    return Note(str(note["code"]), str(note.get("detail", ""))) if "code" in note else None


def _order(row: CandidateSummary) -> tuple[bool, bool, float]:
    """Sort key: the chosen candidate, then by duration, then those without one."""
    return (row.state != "chosen", row.median_ms is None, row.median_ms or 0.0)


def _candidate(row: Any) -> CandidateSummary | None:
    row = _object(row)
    candidate, layers = _object(row.get("candidate")), _object(row.get("layers"))
    if not candidate or "state" not in row:
        return None
    has_file = bool(candidate.get("file"))
    counts = ((str(name), int(count)) for name, count in layers.items() if isinstance(count, int))
    return CandidateSummary(
        runtime=name_of(str(candidate.get("runtime", ""))),
        provider=str(candidate.get("provider", "")),
        precision=str(candidate.get("precision", "")),
        threads=int(candidate.get("threads") or 0) if has_file else -1,
        batch=int(candidate.get("batch") or 1) if has_file else 0,
        state=str(row["state"]),
        code=str(row.get("code", "")),
        detail=str(row.get("detail", "")),
        median_ms=_number(row.get("median_ms")),
        per_image_ms=_number(row.get("per_image_ms")),
        max_difference=_number(row.get("max_difference")),
        layers=tuple(sorted(counts, key=lambda item: -item[1])),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf") else None


def _object(value: Any) -> dict[str, Any]:
    """Parse a JSON object or its text; empty where it is not one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return dict(value) if isinstance(value, Mapping) else {}
