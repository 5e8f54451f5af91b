"""The gate: a variant against the float model, on a labelled set, on one runtime.

A variant passes when its results agree with the float model's within ``Limits``: AUC over all images and within each large source,
sensitivity and specificity at the float model's threshold, the largest change of a score, the class activation map, and Dice's
coefficient for masks. A source with too few images is listed, but not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from model_sync.bundle import Interval
from quantize.gate import roc_statistics
from quantize.gate.image_sets import ImageSet
from quantize.gate.predictions import Predictions
from quantize.gate.roc_statistics import Scored
from quantize.messages import Code

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limits:
    """The largest differences that the gate allows.

    Attributes:
        auc: largest difference of an AUC, up or down: a variant that gains is another model too.
        class_minimum: a source with fewer pictures of either class is listed, not gated: single pictures decide its AUC.
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
class RefusalReason:
    """Why a variant was refused: a ``Code`` or a runtime's code, and its particulars in figures."""

    code: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The result of the gate for one variant on one runtime.

    Attributes:
        passed: whether the variant may be shipped for this runtime.
        reasons: why not.
        figures: what was measured, JSON types only.
    """

    passed: bool
    reasons: tuple[RefusalReason, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For ``gate.json``."""
        return {"passed": self.passed, "reasons": [asdict(reason) for reason in self.reasons], **self.figures}


def failed_verdict(code: str, detail: str) -> Verdict:
    """Return the verdict for a variant that could not be measured, because it does not load or its process died."""
    return Verdict(False, (RefusalReason(code, detail),))


def judge(
    reference: Predictions, variant: Predictions, images: ImageSet, labels: Sequence[str], thresholds: Sequence[float], limits: Limits
) -> Verdict:
    """Compare a variant with the float model.

    Args:
        reference: the float model's predictions on ``images``.
        variant: the variant's.
        images: the labelled set.
        labels: the model's scored labels, in the order of the scores.
        thresholds: the operating point of each.
        limits: what passes.
    """
    if result := _not_finite(variant):
        return failed_verdict(Code.GATE_NOT_FINITE, result)
    reasons: list[RefusalReason] = []
    figures: dict[str, Any] = {}
    if len(labels):
        figures["labels"] = {
            name: _label(images.scored(i, reference.score[:, i]), variant.score[:, i], name, thresholds[i], limits, reasons)
            for i, name in enumerate(labels)
        }
        figures["max_abs_delta"] = max(entry["max_abs_delta"] for entry in figures["labels"].values())
    if reference.cam is not None:
        figures["cam_difference"] = _cam(reference.cam, variant.cam, limits, reasons)
    if reference.mask is not None:
        figures["dice"] = _masks(reference.mask, variant.mask, limits, reasons)
    return Verdict(not reasons, tuple(reasons), figures)


def _not_finite(answers: Predictions) -> str:
    for name, value in (("probability", answers.score), ("activation map", answers.cam)):
        if value is not None and not np.isfinite(value).all():
            images = int((~np.isfinite(value)).reshape(len(value), -1).any(axis=1).sum())
            return f"{name}: NaN or Inf in {images} of {len(value)} pictures"
    return ""


def _label(
    scored: Scored, score: roc_statistics.Scores, name: str, threshold: float, limits: Limits, reasons: list[RefusalReason]
) -> dict[str, Any]:
    other = Scored(scored.positive, scored.source, score)
    before, after = roc_statistics.auc(scored.positive, scored.score), roc_statistics.auc(other.positive, other.score)
    assert before is not None
    assert after is not None  # the set was refused otherwise
    _compare_auc(name, "all sources", before, after, limits, reasons)
    for code, measure in ((Code.GATE_SENSITIVITY, roc_statistics.sensitivity_of), (Code.GATE_SPECIFICITY, roc_statistics.specificity_of)):
        _compare_rate(name, code, measure(scored, threshold), measure(other, threshold), reasons)
    delta = np.abs(other.score - scored.score)
    if delta.max() > limits.score + _ROUNDING:
        reasons.append(RefusalReason(Code.GATE_SCORE, f"{name}: a score changes by {delta.max():.4f}, allowed {limits.score:g}"))
    return {
        "threshold": threshold,
        "auc": after,
        "auc_float": before,
        "auc_difference": round(abs(after - before), 4),
        "sensitivity": _json(roc_statistics.sensitivity_of(other, threshold)),
        "specificity": _json(roc_statistics.specificity_of(other, threshold)),
        "max_abs_delta": round(float(delta.max()), 4),
        "mean_abs_delta": round(float(delta.mean()), 5),
        "changed_sides": int(((other.score >= threshold) != (scored.score >= threshold)).sum()),
        "per_source": _sources(scored, other, name, threshold, limits, reasons),
    }


def _sources(
    scored: Scored, other: Scored, name: str, threshold: float, limits: Limits, reasons: list[RefusalReason]
) -> list[dict[str, Any]]:
    result = []
    for before, after in zip(roc_statistics.per_source(scored, threshold), roc_statistics.per_source(other, threshold), strict=True):
        gated = min(before.n_positive, before.n_negative) >= limits.class_minimum
        if gated and before.auc is not None and after.auc is not None:
            _compare_auc(name, before.source, before.auc, after.auc, limits, reasons)
        result.append({**after.model_dump(), "auc_float": before.auc, "gated": gated})
    return result


def _compare_auc(name: str, where: str, before: float, after: float, limits: Limits, reasons: list[RefusalReason]) -> None:
    if abs(after - before) > limits.auc + _ROUNDING:
        detail = f"{name}, {where}: AUC {after:.4f}, float {before:.4f}, allowed difference {limits.auc:g}"
        reasons.append(RefusalReason(Code.GATE_AUC, detail))


def _compare_rate(name: str, code: Code, before: Interval | None, after: Interval | None, reasons: list[RefusalReason]) -> None:
    if before is not None and after is not None and not before.low <= after.value <= before.high:
        detail = f"{name}: {code.removeprefix('gate.')} {after.value:.4f}, float {before.value:.4f} ({before.low:.4f} to {before.high:.4f})"
        reasons.append(RefusalReason(code, detail))


def _cam(before: Any, after: Any, limits: Limits, reasons: list[RefusalReason]) -> float:
    flat, other = (np.asarray(value).reshape(len(value), -1) for value in (before, after))
    span = np.maximum(np.ptp(flat, axis=1), np.finfo(np.float32).eps)
    difference = round(float((np.abs(other - flat).mean(axis=1) / span).mean()), 5)
    if difference > limits.cam:
        reasons.append(RefusalReason(Code.GATE_CAM, f"the activation map changes by {difference:.4f} of its range, allowed {limits.cam:g}"))
    return difference


def _masks(before: Any, after: Any, limits: Limits, reasons: list[RefusalReason]) -> dict[str, float]:
    """Dice per class over the set; class 0 is the background and does not count."""
    result = {}
    for value in range(1, 1 + int(max(before.max(), after.max()))):
        overlap = roc_statistics.dice(before, after, value)
        if overlap is None:
            continue
        result[str(value)] = round(overlap, 5)
        if overlap < limits.dice:
            reasons.append(
                RefusalReason(Code.GATE_DICE, f"class {value}: Dice {overlap:.4f} against float, at least {limits.dice:g} needed")
            )
    return result


def _json(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval.model_dump()
