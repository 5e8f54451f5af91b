"""Select the variants to ship: pure rules over verdicts and times. Every variant that is left out gets a reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from quantize.gate.verdicts import RefusalReason, Verdict

if TYPE_CHECKING:
    from model_sync.bundle import Precision
    from quantize.gate.predictions import RuntimeTarget, Timing
    from quantize.recipes.variant_makers import Activations

EXACTNESS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "mixed", "int8")
# Times nearer than this are the same time, on a machine that does other things too.
SAME_TIME: Final = 1.08
# TensorRT takes symmetric activations only (TensorRT documentation, "Explicit quantization"); half precision and the
# symmetric recipe are made for it, so where there is none here, the clock here cannot speak against them.
_ACCELERATOR: Final = "tensorrt"


@dataclass(frozen=True)
class LayerError:
    """What one layer costs: ``error`` is the change of the outputs with this layer alone in int8 (``precision.LayerCost``)."""

    name: str
    op_type: str
    error: float


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
        verdicts: place -> what the gate found.
        timing: place -> how fast it was; only where it passed.
        refused: why it is not shipped; None where it is.
        layers: what quantizing each of its layers alone costs; empty where nobody measured.
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
    layers: tuple[LayerError, ...] = ()

    @property
    def passed(self) -> list[RuntimeTarget]:
        """The runtime targets on which it passed the gate."""
        return [target for target, verdict in self.verdicts.items() if verdict.passed]

    @property
    def not_on(self) -> list[str]:
        """Runtimes on which it passed nowhere, in the manifest's order."""
        return sorted({target.runtime for target in self.verdicts} - {target.runtime for target in self.passed})

    @property
    def change(self) -> float:
        """The mean change of a score where it passed, the largest over the places: what tells recipes of one speed apart."""
        changes = [
            float(label["mean_abs_delta"]) for target in self.passed for label in self.verdicts[target].figures.get("labels", {}).values()
        ]
        masks = [1 - value for target in self.passed for value in self.verdicts[target].figures.get("dice", {}).values()]
        return max([*changes, *masks], default=0.0)


def refuse_failed(variants: Iterable[VariantResult]) -> None:
    """Refuse the variants that passed on no runtime, with the reason of each runtime."""
    for entry in variants:
        if entry.refused is None and not entry.passed:
            message = {target.title: verdict.reasons for target, verdict in entry.verdicts.items()}
            text = "; ".join(f"{target}: {' | '.join(reason.detail for reason in reasons)}" for target, reasons in message.items())
            first = next((reason.code for reasons in message.values() for reason in reasons), "gate.untested")
            entry.refused = RefusalReason(first, text or "it ran nowhere")


def keep_best_calibration(variants: Sequence[VariantResult]) -> None:
    """Of recipes that differ in calibration alone, keep the one that passes on most places and changes scores least.

    Their graphs are the same but for the numbers in it, so they are equally fast.
    """
    for family in sorted({entry.family for entry in variants} - {""}):
        same = [entry for entry in variants if entry.family == family and entry.refused is None]
        if len(same) < 2:
            continue
        best = min(same, key=lambda entry: (-len(entry.passed), entry.change, entry.name))
        for entry in same:
            if entry is not best:
                mine, its = (f"{one.change:.5f} on {len(one.passed)} runtimes" for one in (entry, best))
                entry.refused = RefusalReason("calibration.other_better", f"mean change of a score {mine}; {best.name}: {its}")


def refuse_slow(variants: Sequence[VariantResult], unavailable: Mapping[str, str]) -> None:
    """Refuse what gains no time over a more exact variant on any runtime that it is made for.

    Args:
        variants: all variants, timed where they passed.
        unavailable: runtimes that cannot run here; what is made for one of them is left to the clock of the box.
    """
    for entry in sorted(variants, key=lambda entry: EXACTNESS.index(entry.precision)):
        if entry.refused is not None or entry.precision == "fp32":
            continue
        if entry.activations != "unsigned" and _ACCELERATOR in unavailable:
            continue
        more_exact = [
            other for other in variants if other.refused is None and EXACTNESS.index(other.precision) < EXACTNESS.index(entry.precision)
        ]
        behind = [_behind(entry, target, more_exact) for target in entry.passed]
        if all(behind):
            entry.refused = RefusalReason("speed.slower", "; ".join(behind))


def _behind(entry: VariantResult, target: RuntimeTarget, more_exact: Sequence[VariantResult]) -> str:
    """Return why ``entry`` has no advantage on ``target``; empty when it is the fastest so far."""
    if target not in entry.timing:
        return ""
    mine = entry.timing[target].median_ms
    for other in more_exact:
        if target in other.timing and other.timing[target].median_ms <= mine:
            return f"{target.title}: {mine:.2f} ms, the more exact {other.name} {other.timing[target].median_ms:.2f} ms"
    return ""


def keep_fastest(variants: Sequence[VariantResult], *, one_int8: bool = False) -> None:
    """Keep one variant per precision and kind of activations, as a manifest allows: the fastest over the places here.

    Where a variant did not pass, the float model's time stands for it, because that is what runs there instead. Of variants that
    are equally fast, it is the one that changes scores least.

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
        fastest = min(_pace(entry, baseline) for entry in same)
        near = [entry for entry in same if _pace(entry, baseline) <= fastest + np.log(SAME_TIME)]
        best = min(near, key=lambda entry: (-len(entry.passed), entry.change, entry.name))
        for entry in same:
            if entry is not best:
                detail = f"{_times(entry)}, change {entry.change:.5f}; {best.name}: {_times(best)}, change {best.change:.5f}"
                entry.refused = RefusalReason("speed.other_better", detail)


def _pace(entry: VariantResult, baseline: Mapping[RuntimeTarget, float]) -> float:
    """The mean logarithm of its times: a variant twice as fast on one runtime may be twice as slow on another."""
    return float(np.mean([np.log(entry.timing[target].median_ms if target in entry.timing else ms) for target, ms in baseline.items()]))


def _times(entry: VariantResult) -> str:
    return ", ".join(f"{target.title} {timing.median_ms:.2f} ms" for target, timing in entry.timing.items())
