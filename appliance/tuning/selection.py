"""What was chosen to run a model on this box, and why: the table of everything measured, kept with the model it was chosen for.

Pure data and one rule (:func:`choose`); the measuring is in :mod:`appliance.tuning.tuner`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from appliance.core.domain import Note
from appliance.core.errors import InferenceError
from appliance.runtime.candidate import CPU, Candidate

if TYPE_CHECKING:
    from model_sync.bundle import ModelBundle, Variant

State = Literal["chosen", "right", "wrong", "failed", "unavailable"]

# Times nearer than this are the same time: the more exact of them is taken, and nothing slower than this ever is.
SAME_TIME: Final = 1.03
# A batch has to save so much of an image's time to be worth waiting for its other images.
BATCH_GAIN: Final = 0.95
EXACTNESS: Final = ("fp32", "fp16", "mixed", "int8")


@dataclass(frozen=True)
class Row:
    """One line of the table: a candidate, what became of it and why.

    Attributes:
        candidate: what was tried; without a file where its whole runtime cannot run.
        state: ``right`` (measured, within the tolerance, not taken), ``wrong`` (outside), ``failed`` (did not load or run).
        code: the coded reason, registered in :mod:`appliance.messages`.
        detail: its particulars in figures or in the runtime's own words.
        median_ms: of one image at a time; None where it was not measured.
        worst_ms: the longest of them.
        per_image_ms: of one image in a batch of the candidate's size.
        noise: how far that, as a part of what an image alone takes, lies apart between rounds: the middle half of them.
        max_difference: the largest difference to the golden answers, of those cases that were tried.
        load_ms: loading and warming up, an engine's build included.
        peak_rss_bytes: of the process that ran it.
        layers: how many layers ran in which precision, where the runtime tells.
    """

    candidate: Candidate
    state: State
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
        """As stored."""
        return asdict(self) | {"candidate": self.candidate.to_json(), "layers": dict(self.layers)}


@dataclass(frozen=True)
class Choice:
    """How a model is run on this box.

    Attributes:
        candidate: what runs it.
        reason: ``choice.measured``, ``choice.by_hand`` or ``choice.untuned``.
        table: everything that was tried.
        details: what the runtime says it runs (``Runtime.describe``).
        differences: golden case -> largest difference, of the chosen.
    """

    candidate: Candidate
    reason: Note
    table: tuple[Row, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    differences: Mapping[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Row:
        """The line of the table that was taken; raises StopIteration where nothing was measured."""
        return next(row for row in self.table if row.state == "chosen")


@dataclass(frozen=True)
class Plan:
    """What a worker has to load, read from what was stored when the model was proven.

    Attributes:
        precision: the variant's.
        candidate: what was chosen; None for a model that was proven before there was a choice.
        reason: why.
        plain_barred: why the plain candidate must not take over; None when it may.
        profile: the device it was measured on.
    """

    precision: str | None
    candidate: Candidate | None = None
    reason: Note = field(default_factory=lambda: Note("choice.untuned"))
    plain_barred: Note | None = None
    profile: str = ""

    @classmethod
    def of(cls, precision: str | None, report: Mapping[str, Any]) -> Plan:
        """Read a stored self-test; one that cannot be read is as none."""
        reason, table = report.get("reason"), report.get("table")
        try:
            candidate = Candidate.from_json(report["choice"]) if "choice" in report else None
        except (InferenceError, TypeError, KeyError):
            return cls(precision)
        if candidate is None or not isinstance(reason, dict):
            return cls(precision)
        rows = table if isinstance(table, list) else []
        why = Note(str(reason.get("code", "")), str(reason.get("detail", "")))
        return cls(candidate.precision, candidate, why, _barred(rows), str(report.get("profile", "")))


def _barred(rows: Sequence[Any]) -> Note | None:
    """Why the plain candidate may not read: it was tried here, and was wrong or did not run."""
    plain = [row for row in rows if isinstance(row, dict) and _is_plain(row.get("candidate"), str(row.get("code")))]
    row = min(plain, key=lambda row: exactness(str(row["candidate"].get("precision"))), default=None)
    if row is None or row.get("state") not in ("wrong", "failed"):
        return None
    return Note(str(row.get("code", "")), str(row.get("detail", "")))


def _is_plain(candidate: Any, code: str) -> bool:
    if not isinstance(candidate, dict) or code == "tune.not_on":
        return False
    return (candidate.get("runtime"), candidate.get("provider"), candidate.get("batch")) == ("onnxruntime", CPU, 1)


def plain_variant(bundle: ModelBundle, precision: str | None = None) -> Variant:
    """The variant that ONNX Runtime runs where nothing was measured: of one precision, or the most exact that it is not known to fail on.

    Raises:
        BundleError: the bundle has no such precision.
    """
    fits = [
        variant for variant in bundle.manifest.variants
        if precision in (None, variant.precision) and "onnxruntime" not in variant.not_on
    ]  # fmt: skip
    return min(fits, key=lambda variant: exactness(variant.precision)) if fits else bundle.variant(precision)


def exactness(precision: str) -> int:
    """Rank of a precision, 0 the most exact."""
    return EXACTNESS.index(precision) if precision in EXACTNESS else len(EXACTNESS)


def choose(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Take the fastest that is right, and say of every other why it was not taken.

    Ways of reading one image are compared first: among those within 3 % of the fastest the most exact is taken, so that the chosen is
    never slower than the best by more than that. Then a batch of that very way is taken where it costs a single image nothing and
    saves each of several at least 5 %, and more than its own times lay apart; of the batches that save about the same, the smallest.

    Returns:
        The rows in their order, at most one of them ``chosen``: none when no way of reading one image is right.
    """
    single = [row for row in rows if _measured(row) and row.candidate.batch == 1]
    if not single:
        return tuple(rows)
    fastest = min(_ms(row) for row in single)
    near = [row for row in single if _ms(row) <= SAME_TIME * fastest]
    base = min(near, key=lambda row: (exactness(row.candidate.precision), _ms(row)))
    chosen = _batched(base, rows, fastest)
    return tuple(_judged(row, chosen, base, fastest) if _measured(row) else row for row in rows)


def _measured(row: Row) -> bool:
    """Whether it is right and has a time that is one."""
    return row.state == "right" and row.median_ms is not None and 0.0 < row.median_ms < math.inf


def _gains(row: Row, base: Row) -> bool:
    """Whether an image in a batch takes clearly less than one alone: by 5 %, and by more than chance."""
    return row.per_image_ms is not None and row.per_image_ms <= _allowed(row) * _ms(base)


def _allowed(row: Row) -> float:
    """The share of an image's time alone that it may take in a batch, for the batch to count as faster."""
    return min(BATCH_GAIN, 1.0 - (row.noise or 0.0))


def _batched(base: Row, rows: Sequence[Row], fastest: float) -> Row:
    same = [
        row for row in rows
        if _measured(row) and row.candidate.batch > 1 and replace(row.candidate, batch=1) == base.candidate
        and _ms(row) <= SAME_TIME * fastest and _gains(row, base)
    ]  # fmt: skip
    if not same:
        return base
    best = min(_per_image(row) for row in same)
    return min((row for row in same if _per_image(row) <= SAME_TIME * best), key=lambda row: row.candidate.batch)


def _judged(row: Row, chosen: Row, base: Row, fastest: float) -> Row:
    if row.candidate.batch > 1:
        return _judged_batch(row, chosen, base, fastest)
    ratio = f"{_ms(row) / _ms(base):.2f}"
    if row is chosen:
        code = "tune.fastest" if _ms(row) <= fastest else "tune.more_exact"
        return replace(row, state="chosen", code=code, detail="" if _ms(row) <= fastest else f"{_ms(row) / fastest:.3f}")
    if row is base:
        return replace(row, code="tune.batch_taken", detail=ratio)
    less_exact = exactness(row.candidate.precision) > exactness(base.candidate.precision)
    if _ms(row) <= SAME_TIME * _ms(base):
        return replace(row, code="tune.less_exact" if less_exact else "tune.no_faster", detail=ratio)
    return replace(row, code="tune.slower_less_exact" if less_exact else "tune.slower", detail=ratio)


def _judged_batch(row: Row, chosen: Row, base: Row, fastest: float) -> Row:
    """Of several images at once; the detail is what one of them takes against one alone, or what it saves and would have to save."""
    gain = "" if row.per_image_ms is None else f"{row.per_image_ms / _ms(base):.2f}"
    if row is chosen:
        return replace(row, state="chosen", code="tune.faster_together", detail=gain)
    if not _gains(row, base):
        if row.per_image_ms is None or row.per_image_ms >= _ms(base):
            return replace(row, code="tune.batch_no_faster", detail=gain)
        saved, needed = 1.0 - row.per_image_ms / _ms(base), 1.0 - _allowed(row)
        return replace(row, code="tune.no_batch_gain", detail=f"{saved * 100:.1f} % < {needed * 100:.1f} %")
    if _ms(row) > SAME_TIME * fastest:  # a single image would pay for it
        return replace(row, code="tune.slower", detail=f"{_ms(row) / _ms(base):.2f}")
    return replace(row, code="tune.other_batch", detail=gain)


def _ms(row: Row) -> float:
    assert row.median_ms is not None
    return row.median_ms


def _per_image(row: Row) -> float:
    assert row.per_image_ms is not None
    return row.per_image_ms
