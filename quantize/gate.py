"""The gate: a variant against the float model, on a labelled set, on one runtime.

A variant passes where nobody could tell by its answers that it is not the float model: AUC over all pictures and within each large
source, sensitivity and specificity at the float model's threshold, the largest change of a score, the map that explains it, and for
masks Dice's coefficient. What is too small to be judged is listed with its size and does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize import measures
from quantize.measures import Scored

if TYPE_CHECKING:
    from model_sync.bundle import Interval
    from quantize.data import PictureSet
    from quantize.scoring import Answers

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limits:
    """What the gate lets pass.

    Attributes:
        auc: largest difference of an AUC, either way: one that gains is another model too.
        class_minimum: a source with fewer pictures of either class is listed, not gated: its AUC hangs on single pictures.
        score: largest change of a single probability.
        cam: largest mean difference of an activation map, as a share of the float map's range, averaged over the set.
        dice: least Dice's coefficient of a class against the float model's mask, over the set.
    """

    auc: float = 0.01
    class_minimum: int = 25
    score: float = 0.25
    cam: float = 0.10
    dice: float = 0.99


@dataclass(frozen=True)
class Reason:
    """Why something did not pass: a code (texts: ``quantize.messages``) and its particulars in figures."""

    code: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        passed: whether the variant may be shipped for this runtime.
        reasons: why not.
        figures: what was measured, JSON types only.
    """

    passed: bool
    reasons: tuple[Reason, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For ``gate.json``."""
        return {"passed": self.passed, "reasons": [asdict(reason) for reason in self.reasons], **self.figures}


def failed(code: str, detail: str) -> Verdict:
    """The verdict on a variant that did not come so far as to be measured: it does not load, or its process died."""
    return Verdict(False, (Reason(code, detail),))


def judge(
    reference: Answers, variant: Answers, pictures: PictureSet, labels: Sequence[str], thresholds: Sequence[float], limits: Limits
) -> Verdict:
    """Hold a variant against the float model.

    Args:
        reference: what the float model answered to ``pictures``.
        variant: what the variant answered.
        pictures: the labelled set.
        labels: the model's scored labels, in the order of the scores.
        thresholds: the operating point of each.
        limits: what passes.
    """
    if found := _not_finite(variant):
        return failed("gate.not_finite", found)
    reasons: list[Reason] = []
    figures: dict[str, Any] = {}
    if len(labels):
        figures["labels"] = {
            name: _label(pictures.scored(i, reference.score[:, i]), variant.score[:, i], name, thresholds[i], limits, reasons)
            for i, name in enumerate(labels)
        }
        figures["max_abs_delta"] = max(entry["max_abs_delta"] for entry in figures["labels"].values())
    if reference.cam is not None:
        figures["cam_difference"] = _cam(reference.cam, variant.cam, limits, reasons)
    if reference.mask is not None:
        figures["dice"] = _masks(reference.mask, variant.mask, limits, reasons)
    return Verdict(not reasons, tuple(reasons), figures)


def _not_finite(answers: Answers) -> str:
    for name, value in (("probability", answers.score), ("activation map", answers.cam)):
        if value is not None and not np.isfinite(value).all():
            pictures = int((~np.isfinite(value)).reshape(len(value), -1).any(axis=1).sum())
            return f"{name}: NaN or Inf in {pictures} of {len(value)} pictures"
    return ""


def _label(scored: Scored, score: measures.Scores, name: str, threshold: float, limits: Limits, reasons: list[Reason]) -> dict[str, Any]:
    other = Scored(scored.positive, scored.source, score)
    before, after = measures.auc(scored.positive, scored.score), measures.auc(other.positive, other.score)
    assert before is not None
    assert after is not None  # the set was refused otherwise
    _compare_auc(name, "all sources", before, after, limits, reasons)
    for kind, measure in (("sensitivity", measures.sensitivity_of), ("specificity", measures.specificity_of)):
        _compare_rate(name, kind, measure(scored, threshold), measure(other, threshold), reasons)
    delta = np.abs(other.score - scored.score)
    if delta.max() > limits.score + _ROUNDING:
        reasons.append(Reason("gate.score", f"{name}: a score changes by {delta.max():.4f}, allowed {limits.score:g}"))
    return {
        "threshold": threshold,
        "auc": after,
        "auc_float": before,
        "auc_difference": round(abs(after - before), 4),
        "sensitivity": _json(measures.sensitivity_of(other, threshold)),
        "specificity": _json(measures.specificity_of(other, threshold)),
        "max_abs_delta": round(float(delta.max()), 4),
        "mean_abs_delta": round(float(delta.mean()), 5),
        "changed_sides": int(((other.score >= threshold) != (scored.score >= threshold)).sum()),
        "per_source": _sources(scored, other, name, threshold, limits, reasons),
    }


def _sources(scored: Scored, other: Scored, name: str, threshold: float, limits: Limits, reasons: list[Reason]) -> list[dict[str, Any]]:
    found = []
    for before, after in zip(measures.per_source(scored, threshold), measures.per_source(other, threshold), strict=True):
        gated = min(before.n_positive, before.n_negative) >= limits.class_minimum
        if gated and before.auc is not None and after.auc is not None:
            _compare_auc(name, before.source, before.auc, after.auc, limits, reasons)
        found.append({**after.model_dump(), "auc_float": before.auc, "gated": gated})
    return found


def _compare_auc(name: str, where: str, before: float, after: float, limits: Limits, reasons: list[Reason]) -> None:
    if abs(after - before) > limits.auc + _ROUNDING:
        detail = f"{name}, {where}: AUC {after:.4f}, float {before:.4f}, allowed difference {limits.auc:g}"
        reasons.append(Reason("gate.auc", detail))


def _compare_rate(name: str, kind: str, before: Interval | None, after: Interval | None, reasons: list[Reason]) -> None:
    if before is not None and after is not None and not before.low <= after.value <= before.high:
        detail = f"{name}: {kind} {after.value:.4f}, float {before.value:.4f} ({before.low:.4f} to {before.high:.4f})"
        reasons.append(Reason(f"gate.{kind}", detail))


def _cam(before: Any, after: Any, limits: Limits, reasons: list[Reason]) -> float:
    flat, other = (np.asarray(value).reshape(len(value), -1) for value in (before, after))
    span = np.maximum(np.ptp(flat, axis=1), np.finfo(np.float32).eps)
    difference = round(float((np.abs(other - flat).mean(axis=1) / span).mean()), 5)
    if difference > limits.cam:
        reasons.append(Reason("gate.cam", f"the activation map changes by {difference:.4f} of its range, allowed {limits.cam:g}"))
    return difference


def _masks(before: Any, after: Any, limits: Limits, reasons: list[Reason]) -> dict[str, float]:
    """Dice per class over the whole set; class 0 is the background and does not count."""
    found = {}
    for value in range(1, 1 + int(max(before.max(), after.max()))):
        overlap = measures.dice(before, after, value)
        if overlap is None:
            continue
        found[str(value)] = round(overlap, 5)
        if overlap < limits.dice:
            reasons.append(Reason("gate.dice", f"class {value}: Dice {overlap:.4f} against float, at least {limits.dice:g} needed"))
    return found


def _json(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval.model_dump()
