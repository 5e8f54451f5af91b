"""The table of what was measured on this box before the runtime of a model was chosen, ready to print."""

from __future__ import annotations

from dataclasses import dataclass

from flask_babel import gettext

from appliance.core.domain import Note
from appliance.core.run_summary import CandidateSummary, RuntimeStatus
from webui.formatting import format_count, format_difference, format_milliseconds, format_time
from webui.messages import reason_hint, reason_text
from webui.view_models import DASH, NoteView


@dataclass(frozen=True)
class CandidateRow:
    """One candidate (runtime, variant, threads and batch); ``layers`` holds precisions with the number of layers."""

    state: str
    is_chosen: bool
    runtime: str
    provider: str
    precision: str
    threads: str
    batch: str
    per_image: str
    median: str
    difference: str
    layers: tuple[tuple[str, str], ...]
    has_failed: bool
    verdict: str
    detail: str

    @classmethod
    def of(cls, candidate: CandidateSummary) -> CandidateRow:
        """The row of a candidate; a dash stands for what was not measured."""
        is_usable, per_image_ms = candidate.threads >= 0, candidate.per_image_ms
        return cls(
            state=candidate.state,
            is_chosen=candidate.state == "chosen",
            runtime=candidate.runtime,
            provider=candidate.provider,
            precision=candidate.precision.upper() or DASH,
            threads=str(candidate.threads or gettext("all")) if is_usable else DASH,
            batch=str(candidate.batch or DASH),
            per_image=gettext("%(time)s each", time=format_milliseconds(per_image_ms)) if per_image_ms is not None else "",
            median=format_milliseconds(candidate.median_ms) if candidate.median_ms is not None else DASH,
            difference=format_difference(candidate.max_difference) if candidate.max_difference is not None else DASH,
            layers=tuple((name, format_count(count)) for name, count in candidate.layers),
            has_failed=candidate.state in ("wrong", "failed"),
            verdict=reason_text(candidate.code),
            detail=candidate.detail,
        )


@dataclass(frozen=True)
class CandidateTable:
    """All candidates.

    Attributes:
        is_open: unfolded, because something is wrong.
        incomplete: that there was no time to measure all; None if all were measured.
        untuned: what to do where nothing was measured.
    """

    is_open: bool
    incomplete: NoteView | None
    untuned: str
    caption: str
    profile: str
    rows: tuple[CandidateRow, ...]

    @classmethod
    def of(cls, running: RuntimeStatus) -> CandidateTable:
        """The table of a model."""
        has_untimed = any(candidate.code == "tune.no_time" for candidate in running.table)
        return cls(
            is_open=bool(running.fallback or running.other or running.stopped),
            incomplete=NoteView.of(Note("choice.measured_part")) if has_untimed else None,
            untuned=reason_hint("choice.untuned"),
            caption=gettext("Measured %(when)s", when=format_time(running.tuned_at)) if running.tuned_at else gettext("Measured"),
            profile=running.profile,
            rows=tuple(CandidateRow.of(candidate) for candidate in running.table),
        )
