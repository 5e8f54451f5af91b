"""Select the variants to ship: pure rules over verdicts and times. Every variant that is left out gets a reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from model_sync.bundle import Precision
from quantize.gate.predictions import RuntimeTarget, Timing
from quantize.gate.verdicts import RefusalReason, Verdict
from quantize.messages import Code
from quantize.recipes.layer_costs import LayerCost
from quantize.recipes.variant_makers import Activations

EXACTNESS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "mixed", "int8")
# Times whose ratio is smaller count as equal, because the computer does other things too.
SAME_TIME: Final = 1.08
# TensorRT takes symmetric activations only (TensorRT documentation, "Explicit quantization"). Half precision and the symmetric
# recipe are made for it, so where it is absent, the times of this computer do not refuse them.
_ACCELERATOR: Final = "tensorrt"


@dataclass
class VariantResult:
    """One variant, with its verdict and speed on each runtime target.

    Attributes:
        name: the recipe in one word: ``int8-unsigned-entropy``.
        precision: as in the manifest.
        activations: as in the manifest.
        path: the ONNX file; None where it could not be made.
        recipe: how it was made, in words for the manifest.
        family: variants of one family differ in calibration alone.
        verdicts: the result of the gate on each target.
        timing: the speed on each target where it passed.
        refused: why it is not shipped; None where it is.
        layers: what quantizing each of its layers alone costs; empty where it was not measured.
        fits_16_bits: whether its sums cannot be clipped on a processor without VNNI, so that its fastest kernels are used there.
    """

    name: str
    precision: Precision
    activations: Activations
    path: Path | None
    recipe: str
    family: str = ""
    verdicts: dict[RuntimeTarget, Verdict] = field(default_factory=dict)
    timing: dict[RuntimeTarget, Timing] = field(default_factory=dict)
    refused: RefusalReason | None = None
    layers: Sequence[LayerCost] = ()
    fits_16_bits: bool = True

    @property
    def passed(self) -> list[RuntimeTarget]:
        """The runtime targets on which it passed the gate."""
        return [target for target, verdict in self.verdicts.items() if verdict.passed]

    @property
    def run_here(self) -> list[RuntimeTarget]:
        """The runtime targets on which it passed and its own 8-bit kernels ran, not a simulation of them."""
        return [target for target in self.passed if self.verdicts[target].figures.get("processors", {}).get("exact") != "simulated"]

    @property
    def not_on(self) -> list[str]:
        """Runtimes on which it passed nowhere, in the manifest's order."""
        return sorted({target.runtime for target in self.verdicts} - {target.runtime for target in self.passed})

    @property
    def change(self) -> float:
        """The mean change of a score where it passed, the largest over the targets: what distinguishes recipes of one speed."""
        return max(self._changes(self.passed), default=0.0)

    @property
    def failure(self) -> float:
        """How far it is from the float model: the same over all targets; infinite where it did not run."""
        return max(self._changes(self.verdicts), default=math.inf)

    def _changes(self, targets: Iterable[RuntimeTarget]) -> Iterator[float]:
        """Yield the mean change of each label's score, and the loss of overlap of each class."""
        for figures in (self.verdicts[target].figures for target in targets):
            yield from (float(label["mean_abs_delta"]) for label in figures.get("labels", {}).values())
            yield from (1 - float(value) for value in figures.get("dice", {}).values())


def refuse_failed(variants: Iterable[VariantResult]) -> None:
    """Refuse the variants that passed on no runtime, with the reason of each runtime."""
    for entry in variants:
        if entry.refused is None and not entry.run_here:
            reasons = [(target.title, verdict.reasons) for target, verdict in entry.verdicts.items()]
            text = "; ".join(f"{title}: {' | '.join(reason.detail for reason in some)}" for title, some in reasons)
            code = next((reason.code for _, some in reasons for reason in some), Code.GATE_UNTESTED)
            entry.refused = RefusalReason(code, text or "it ran nowhere")


def keep_best_calibration(variants: Sequence[VariantResult]) -> None:
    """Of recipes that differ in calibration alone, keep the one that passes on most targets and changes scores least.

    Their graphs are the same but for the numbers in it, so they are equally fast.
    """
    for family in sorted({entry.family for entry in variants} - {""}):
        same = [entry for entry in variants if entry.family == family and entry.refused is None]
        if len(same) < 2:
            continue
        best = min(same, key=lambda entry: (-len(entry.run_here), entry.change, entry.name))
        for entry in same:
            if entry is not best:
                mine, its = (f"{one.change:.5f} on {len(one.run_here)} runtimes" for one in (entry, best))
                entry.refused = RefusalReason(Code.CALIBRATION_OTHER_BETTER, f"mean change of a score {mine}; {best.name}: {its}")


def refuse_slow(variants: Sequence[VariantResult], unavailable: Mapping[str, str]) -> None:
    """Refuse a variant that is no faster than a more exact one on any runtime that it is made for.

    Args:
        variants: all variants, timed where they passed.
        unavailable: runtimes that cannot run here; what is made for one of them is left to the measurement on the box.
    """
    for entry in sorted(variants, key=lambda entry: EXACTNESS.index(entry.precision)):
        if entry.refused is not None or entry.precision == "fp32":
            continue
        if entry.activations != "unsigned" and _ACCELERATOR in unavailable:
            continue
        more_exact = [
            other for other in variants if other.refused is None and EXACTNESS.index(other.precision) < EXACTNESS.index(entry.precision)
        ]
        slower = [_find_faster(entry, target, more_exact) for target in entry.run_here]
        if all(slower):
            entry.refused = RefusalReason(Code.SPEED_SLOWER, "; ".join(slower))


def _find_faster(entry: VariantResult, target: RuntimeTarget, more_exact: Sequence[VariantResult]) -> str:
    """Return why ``entry`` has no advantage on ``target``; empty when it is the fastest so far."""
    if target not in entry.timing:
        return ""
    mine = entry.timing[target].median_ms
    for other in more_exact:
        if target in other.timing and other.timing[target].median_ms <= mine:
            return f"{target.title}: {mine:.2f} ms, the more exact {other.name} {other.timing[target].median_ms:.2f} ms"
    return ""


def keep_fastest(variants: Sequence[VariantResult], *, one_int8: bool = False) -> None:
    """Keep one variant per precision and kind of activations, as a manifest allows: the fastest over the targets here.

    Where a variant did not pass, the float model's time stands for it, because that is what runs there instead. Of variants that
    are equally fast, it is one that processors without VNNI run as fast, and of those the one that changes scores least.

    Args:
        variants: all variants, timed where they passed.
        one_int8: keep one int8 or mixed variant of any activations, for a bundle that has to be small.
    """
    baseline = {target: timing.median_ms for entry in variants if entry.precision == "fp32" for target, timing in entry.timing.items()}
    kinds: dict[object, list[VariantResult]] = {}
    for entry in variants:
        if entry.refused is None and entry.timing:
            small = one_int8 and entry.precision in ("int8", "mixed")
            kinds.setdefault("int8" if small else (entry.precision, entry.activations), []).append(entry)
    for same in kinds.values():
        fastest = min(_mean_log_time(entry, baseline) for entry in same)
        near = [entry for entry in same if _mean_log_time(entry, baseline) <= fastest + np.log(SAME_TIME)]
        best = min(near, key=lambda entry: (-len(entry.passed), not entry.fits_16_bits, entry.change, entry.name))
        for entry in same:
            if entry is not best:
                detail = f"{_times(entry)}, change {entry.change:.5f}; {best.name}: {_times(best)}, change {best.change:.5f}"
                entry.refused = RefusalReason(Code.SPEED_OTHER_BETTER, detail)


def _mean_log_time(entry: VariantResult, baseline: Mapping[RuntimeTarget, float]) -> float:
    """The mean logarithm of its times: a variant twice as fast on one runtime may be twice as slow on another."""
    return float(np.mean([np.log(entry.timing[target].median_ms if target in entry.timing else ms) for target, ms in baseline.items()]))


def _times(entry: VariantResult) -> str:
    return ", ".join(f"{target.title} {timing.median_ms:.2f} ms" for target, timing in entry.timing.items())
