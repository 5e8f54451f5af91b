"""The candidate that was chosen to run a model on this box, and the table of all measured candidates.

Pure data and one rule (:func:`select`); the measurement is in :mod:`appliance.tuning.tuner`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from appliance.core.domain import Note
from appliance.core.errors import InferenceError
from appliance.core.self_test_report import NOT_MEASURED, SelfTestReport
from appliance.core.states import CandidateState
from appliance.runtime.candidate import CPU, Candidate

if TYPE_CHECKING:
    from model_sync.bundle import ModelBundle, Variant

# Times within this ratio count as equal: the most exact of them is chosen, and nothing slower than this ratio ever is.
SAME_TIME: Final = 1.03
# A batch must reduce the time per image to this ratio to be worth waiting for more images.
BATCH_GAIN: Final = 0.95
Established: TypeAlias = tuple[str, str]
"""Runtime and precision of the candidate that ran this model line on this box before."""

EXACTNESS: Final = ("fp32", "fp16", "mixed", "int8")


@dataclass(frozen=True)
class CandidateResult:
    """One row of the table: a candidate, what became of it and why.

    Attributes:
        candidate: what was measured; without a file when the runtime cannot run at all.
        state: what became of it.
        code: the coded reason, registered in :mod:`appliance.messages`.
        detail: numbers, or the message of the runtime.
        median_ms: of one image at a time; None when it was not measured.
        worst_ms: the longest inference.
        per_image_ms: of one image in a full batch of the candidate.
        noise: interquartile range over the rounds of (time per image in a batch / time of a single image), relative to its median.
        max_difference: largest difference to the expected outputs of the golden cases that were run.
        load_ms: time to load and warm up, with building an engine.
        peak_rss_bytes: peak resident memory of its process.
        layers: precision -> number of layers, when the runtime reports it.
    """

    candidate: Candidate
    state: CandidateState
    code: str
    detail: str = ""
    median_ms: float | None = None
    worst_ms: float | None = None
    per_image_ms: float | None = None
    noise: float | None = None
    max_difference: float | None = None
    load_ms: float | None = None
    peak_rss_bytes: int | None = None
    layers: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The row as it is stored."""
        return asdict(self) | {"candidate": self.candidate.to_json(), "state": str(self.state), "layers": dict(self.layers)}


@dataclass(frozen=True)
class Selection:
    """The candidate that was chosen to run a model on this box.

    Attributes:
        candidate: the chosen candidate.
        reason: ``choice.measured``, ``choice.by_hand`` or ``choice.untuned``.
        table: every candidate that was tried.
        details: ``Runtime.describe`` of the chosen candidate.
        differences: golden case -> largest difference of the chosen candidate.
    """

    candidate: Candidate
    reason: Note
    table: tuple[CandidateResult, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    differences: Mapping[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> CandidateResult:
        """The row of the chosen candidate; raises StopIteration when nothing was measured."""
        return next(row for row in self.table if row.state == CandidateState.CHOSEN)


@dataclass(frozen=True)
class Plan:
    """How a worker has to load a model, from the stored report of its self-test.

    Attributes:
        precision: of the variant.
        candidate: the chosen candidate; None for a model that is older than the choice of candidates.
        reason: why it was chosen.
        baseline_refusal: why the baseline must not be the fallback; None when it may.
        profile: the device that the candidate was measured on.
    """

    precision: str | None
    candidate: Candidate | None = None
    reason: Note = field(default_factory=lambda: Note(NOT_MEASURED))
    baseline_refusal: Note | None = None
    profile: str = ""

    @classmethod
    def of(cls, precision: str | None, report: SelfTestReport) -> Plan:
        """Read the plan from a report; a report without a valid choice gives a plan with the precision alone."""
        try:
            candidate = Candidate.from_json(dict(report.choice)) if report.choice is not None else None
        except (InferenceError, TypeError, KeyError):
            return cls(precision)
        if candidate is None or report.reason is None:
            return cls(precision)
        return cls(candidate.precision, candidate, report.reason, _find_refusal(report.table), report.profile)


def _find_refusal(rows: Sequence[Mapping[str, Any]]) -> Note | None:
    """Find why the baseline must not run: it was measured on this box, and was wrong or did not run."""
    baseline = [row for row in rows if _is_baseline(row.get("candidate"), str(row.get("code")))]
    row = min(baseline, key=lambda row: exactness(str(row["candidate"].get("precision"))), default=None)
    if row is None or row.get("state") not in (CandidateState.WRONG, CandidateState.FAILED):
        return None
    return Note(str(row.get("code", "")), str(row.get("detail", "")))


def _is_baseline(candidate: Any, code: str) -> bool:
    if not isinstance(candidate, dict) or code == "tune.not_on":
        return False
    return (candidate.get("runtime"), candidate.get("provider"), candidate.get("batch")) == ("onnxruntime", CPU, 1)


def baseline_variant(bundle: ModelBundle, precision: str | None = None) -> Variant:
    """Return the variant of the baseline: of one precision, or the most exact one that ONNX Runtime is not known to fail with.

    Raises:
        BundleError: the bundle has no such precision.
    """
    fits = [
        variant for variant in bundle.manifest.variants
        if precision in (None, variant.precision) and "onnxruntime" not in variant.not_on
    ]  # fmt: skip
    return min(fits, key=lambda variant: exactness(variant.precision)) if fits else bundle.variant(precision)


def exactness(precision: str) -> int:
    """Return the rank of a precision; 0 is the most exact."""
    return EXACTNESS.index(precision) if precision in EXACTNESS else len(EXACTNESS)


def select(rows: Sequence[CandidateResult], established: Established | None = None, *, keeps: bool = False) -> tuple[CandidateResult, ...]:
    """Choose the fastest correct candidate, and record for every other one why it was not chosen.

    ``established`` (runtime, precision) is preferred to a more exact candidate within 3 % of the fastest. With ``keeps`` the times decide
    nothing, because they were not stable: the established candidate is chosen, else the baseline, else the most exact one.

    Candidates with batch size 1 are compared first: the most exact of those within 3 % of the fastest is chosen. Then a larger batch of
    the same candidate is chosen if it makes a single image no slower and reduces the time per image by at least 5 % and by more than the
    variation of its times; of the batches that reduce it about equally, the smallest.

    Returns:
        The rows in their order, at most one of them CHOSEN; none when no candidate with batch size 1 is correct.
    """
    single = [row for row in rows if _measured(row) and row.candidate.batch == 1]
    if not single:
        return tuple(rows)
    fastest = min(_ms(row) for row in single)
    near = single if keeps else [row for row in single if _ms(row) <= SAME_TIME * fastest]
    base = min(near, key=lambda row: _preference(row, established, keeps=keeps))
    if keeps:
        return tuple(_judge_kept(row, base) if _measured(row) else row for row in rows)
    chosen = _best_batch(base, rows, fastest)
    return tuple(_judge(row, chosen, base, fastest) if _measured(row) else row for row in rows)


def _preference(row: CandidateResult, established: Established | None, *, keeps: bool) -> tuple[bool, bool, int, float]:
    """Return the rank of a candidate among those that the times do not tell apart; the least is chosen."""
    candidate = row.candidate
    is_other_runtime = keeps and (candidate.runtime, candidate.provider) != ("onnxruntime", CPU)
    return (candidate.runtime, candidate.precision) != established, is_other_runtime, exactness(candidate.precision), _ms(row)


def _judge_kept(row: CandidateResult, base: CandidateResult) -> CandidateResult:
    if row is base:
        return replace(row, state=CandidateState.CHOSEN, code="tune.kept")
    return replace(row, code="tune.not_stable", detail=f"{_ms(row) / _ms(base):.2f}")


def _measured(row: CandidateResult) -> bool:
    """Whether it is correct and has a valid time."""
    return row.state == CandidateState.CORRECT and row.median_ms is not None and 0.0 < row.median_ms < math.inf


def _gains(row: CandidateResult, base: CandidateResult) -> bool:
    """Whether an image in a batch takes clearly less time than a single image: by 5 %, and by more than chance."""
    return row.per_image_ms is not None and row.per_image_ms <= _max_ratio(row) * _ms(base)


def _max_ratio(row: CandidateResult) -> float:
    """The largest ratio of time in a batch to time of a single image with which the batch counts as faster."""
    return min(BATCH_GAIN, 1.0 - (row.noise or 0.0))


def _best_batch(base: CandidateResult, rows: Sequence[CandidateResult], fastest: float) -> CandidateResult:
    same = [
        row for row in rows
        if _measured(row) and row.candidate.batch > 1 and replace(row.candidate, batch=1) == base.candidate
        and _ms(row) <= SAME_TIME * fastest and _gains(row, base)
    ]  # fmt: skip
    if not same:
        return base
    best = min(_per_image(row) for row in same)
    return min((row for row in same if _per_image(row) <= SAME_TIME * best), key=lambda row: row.candidate.batch)


def _judge(row: CandidateResult, chosen: CandidateResult, base: CandidateResult, fastest: float) -> CandidateResult:
    if row.candidate.batch > 1:
        return _judge_batch(row, chosen, base, fastest)
    ratio = f"{_ms(row) / _ms(base):.2f}"
    if row is chosen:
        code = "tune.fastest" if _ms(row) <= fastest else "tune.more_exact"
        return replace(row, state=CandidateState.CHOSEN, code=code, detail="" if _ms(row) <= fastest else f"{_ms(row) / fastest:.3f}")
    if row is base:
        return replace(row, code="tune.batch_taken", detail=ratio)
    less_exact = exactness(row.candidate.precision) > exactness(base.candidate.precision)
    if _ms(row) <= SAME_TIME * _ms(base):
        return replace(row, code="tune.less_exact" if less_exact else "tune.no_faster", detail=ratio)
    return replace(row, code="tune.slower_less_exact" if less_exact else "tune.slower", detail=ratio)


def _judge_batch(row: CandidateResult, chosen: CandidateResult, base: CandidateResult, fastest: float) -> CandidateResult:
    """Judge a batch; the detail is the ratio of time per image to time of a single image, or the reached and the required gain."""
    gain = "" if row.per_image_ms is None else f"{row.per_image_ms / _ms(base):.2f}"
    if row is chosen:
        return replace(row, state=CandidateState.CHOSEN, code="tune.faster_together", detail=gain)
    if not _gains(row, base):
        if row.per_image_ms is None or row.per_image_ms >= _ms(base):
            return replace(row, code="tune.batch_no_faster", detail=gain)
        saved, needed = 1.0 - row.per_image_ms / _ms(base), 1.0 - _max_ratio(row)
        return replace(row, code="tune.no_batch_gain", detail=f"{saved * 100:.1f} % < {needed * 100:.1f} %")
    if _ms(row) > SAME_TIME * fastest:  # a single image would take longer
        return replace(row, code="tune.slower", detail=f"{_ms(row) / _ms(base):.2f}")
    return replace(row, code="tune.other_batch", detail=gain)


def _ms(row: CandidateResult) -> float:
    assert row.median_ms is not None
    return row.median_ms


def _per_image(row: CandidateResult) -> float:
    assert row.per_image_ms is not None
    return row.per_image_ms
