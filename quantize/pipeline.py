"""From a float model and two sets of pictures to a gated bundle: ``run(recipe)``.

1. Check and clean up the model, add its class activation map; read both image sets.
2. Compute the float scores and the operating points.
3. Make fp16 and every int8 recipe; run the gate for each on every runtime here, each in a process of its own.
4. Where no int8 passes, put layers back to float.
5. Measure the speed of what passed, and select what is shipped.
6. Write golden cases, histograms, ``gate.json``, model card and manifest; check them as a box does, and replace ``out`` in one step.

An interrupted run is resumed: see ``quantize.work_directory``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model_sync.bundle import Manifest
from model_sync.errors import BundleError
from quantize.bundle import assembly, golden_cases, model_card
from quantize.bundle.assembly import OperatingPoints
from quantize.draft import MODEL_CARD, Draft
from quantize.errors import QuantizeError
from quantize.gate import gate_runs, mixed_precision, predictions, preparation, selection
from quantize.gate.gate_runs import GateContext
from quantize.gate.image_sets import ImageSet
from quantize.gate.selection import VariantResult
from quantize.gate.verdicts import Limits
from quantize.graph import model_checks
from quantize.messages import Code
from quantize.progress import Progress
from quantize.recipes import modelopt
from quantize.recipes.calibration import Calibration
from quantize.recipes.variant_makers import Maker, Source, all_makers, measure_calibration
from quantize.report import html_report
from quantize.report.run_record import make_record
from quantize.work_directory import WorkDirectory

_WEIGHTS: Final = {
    "model": 2.0,
    "calibration set": 3.0,
    "evaluation set": 4.0,
    "float": 3.0,
    "calibration": 12.0,
    "speed": 10.0,
    "bundle": 4.0,
}
_MAKE, _GATE = 2.0, 8.0


@dataclass(frozen=True)
class CardInputs:
    """The data from which a model card or an addition to ``gate.json`` is written.

    Attributes:
        context: the float model, its answers, the sets.
        operating: operating points and histograms.
        shipped: what is shipped.
    """

    context: GateContext
    operating: OperatingPoints
    shipped: Sequence[VariantResult]


@dataclass(frozen=True)
class BundleRecipe:
    """The input files and options of a run.

    Attributes:
        model: the float ONNX file.
        draft: ``draft.toml``; a ``MODEL_CARD.md`` beside it goes into the bundle as it is.
        calibration: directory of pictures.
        evaluation: directory of labelled pictures.
        out: the bundle's directory.
        golden: pictures for the golden cases, free of patients; averages of evaluation pictures when None.
        limits: of the gate.
        calibration_limit: how many calibration pictures are used at most.
        one_int8: ship one int8 variant only, the fastest here.
        replace: whether ``out`` may exist already.
        keep_work: whether the work directory stays after success.
        measured_on: names the evaluation set in the manifest; its directory's name when empty.
        makers: the variants to try; all when None.
        optimizer: the nvidia-modelopt whose variants are tried beside all others, or why there is none.
        write_card: writes the model card; the general one when None.
        more: adds to ``gate.json``.
    """

    model: Path
    draft: Path
    calibration: Path
    evaluation: Path
    out: Path
    golden: Path | None = None
    limits: Limits = field(default_factory=Limits)
    calibration_limit: int = 256
    one_int8: bool = False
    replace: bool = False
    keep_work: bool = False
    measured_on: str = ""
    makers: tuple[Maker, ...] | None = None
    optimizer: modelopt.Optimizer | str = ""
    write_card: Callable[[CardInputs], str] | None = None
    more: Callable[[CardInputs], dict[str, Any]] | None = None


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        manifest: of the bundle.
        variants: every variant, shipped or not.
        record: what the report is drawn from.
    """

    manifest: Manifest
    variants: tuple[VariantResult, ...]
    record: dict[str, Any]


def run(recipe: BundleRecipe, progress: Progress | None = None) -> RunResult:
    """Make a bundle and put it at ``recipe.out`` only after it is complete and checked.

    Raises:
        QuantizeError: an input is wrong, or nothing can be shipped; the hint says what to do.
    """
    if recipe.out.exists() and not recipe.replace:
        raise QuantizeError(f"{recipe.out} exists already", code=Code.OUT_EXISTS)
    model_checks.require_file(recipe.model)
    draft = Draft.load(recipe.draft)
    draft.read_input_check(recipe.draft.parent)  # an error now, not after minutes of work
    with WorkDirectory(recipe.out.with_name(recipe.out.name + ".work")) as work:
        progress = progress or Progress({})
        progress.expect(_WEIGHTS)
        made = _run(recipe, draft, work, progress)
        progress.end()
        if not recipe.keep_work:
            work.remove()
    return made


def _run(recipe: BundleRecipe, draft: Draft, work: WorkDirectory, progress: Progress) -> RunResult:
    float_model = preparation.read_float(recipe.model, draft, work, progress.begin("model", "checking and cleaning up the float model"))
    float_model = replace(float_model, notes=(*float_model.notes, *modelopt.explain_absence(recipe.optimizer)))
    calibration_set, evaluation = preparation.read_sets(
        float_model, recipe.calibration, recipe.evaluation, recipe.calibration_limit, work, progress
    )
    targets, unavailable = predictions.runtime_targets()
    on_progress = progress.begin("float", "the float model's answers")
    reference = gate_runs.predict_reference(float_model, evaluation, work, on_progress)
    context = GateContext(float_model, evaluation, recipe.limits, targets, unavailable, work, reference)
    context.thresholds = assembly.thresholds(evaluation, reference, _aims(draft))
    variants, source = _try_all(recipe, context, calibration_set, progress)
    selection.refuse_failed(variants)
    _need_float(variants)
    selection.keep_best_calibration(variants)
    gate_runs.measure_speed(variants, context, progress.begin("speed", "measuring the speed of what passed"))
    selection.refuse_slow(variants, unavailable)
    selection.keep_fastest(variants, one_int8=recipe.one_int8)
    for entry in variants:
        if entry.refused is None and entry.precision == "int8":
            on_progress = progress.begin("layers", f"what each layer of {entry.name} costs")
            entry.layers = mixed_precision.measure_costs(entry, source, context, on_progress)
    manifest, operating = _assemble(recipe, context, variants, progress)
    return RunResult(manifest, tuple(variants), make_record(context, variants, operating, calibration_set, manifest))


def _aims(draft: Draft) -> list[float]:
    aims = {aim.label: aim.sensitivity for aim in draft.operating_points}
    return [aims[label] for label in draft.label_names]


def _try_all(
    recipe: BundleRecipe, context: GateContext, calibration_set: ImageSet, progress: Progress
) -> tuple[list[VariantResult], Source]:
    makers = (*all_makers(), *modelopt.makers(recipe.optimizer)) if recipe.makers is None else recipe.makers
    names = [maker.name for maker in makers]
    progress.expect({f"make {name}": _MAKE for name in names} | {f"gate {name}": _GATE for name in ("fp32", *names)})
    source = _source(context, calibration_set, progress)
    variants = [VariantResult("fp32", "fp32", None, context.float_model.path, "the float model as given")]
    _run_gate(variants[0], context, progress)
    variants += [_try(maker, source, context, progress) for maker in makers]
    if not any(entry.run_here for entry in variants if entry.precision == "int8"):
        variants += _try_mixed(variants, source, context, progress)
    return variants, source


def _try_mixed(variants: Sequence[VariantResult], source: Source, context: GateContext, progress: Progress) -> list[VariantResult]:
    mixed = []
    for entry in mixed_precision.find_nearest(variants):
        on_progress = progress.begin(f"layers {entry.name}", f"what each layer of {entry.name} costs")
        entry.layers = mixed_precision.measure_costs(entry, source, context, on_progress)
        for maker in mixed_precision.make_mixed(entry, entry.layers):
            mixed.append(_try(maker, source, context, progress))
            if mixed[-1].run_here:
                break
    return mixed


def _source(context: GateContext, calibration_set: ImageSet, progress: Progress) -> Source:
    model = context.float_model

    @functools.cache
    def calibrate() -> Calibration:
        on_progress = progress.begin("calibration", "measuring the ranges of the activations")
        inputs = [model.digest, calibration_set.digest]
        return measure_calibration(context.work, model.clean, calibration_set.tensors, inputs, on_progress)

    return Source(model.clean, calibration_set.tensors, calibration_set.digest, calibrate)


def _try(maker: Maker, source: Source, context: GateContext, progress: Progress) -> VariantResult:
    entry = gate_runs.make_variant(maker, source, context, progress.begin(f"make {maker.name}", f"making {maker.name}"))
    _run_gate(entry, context, progress)
    return entry


def _run_gate(entry: VariantResult, context: GateContext, progress: Progress) -> None:
    where = ", ".join(target.title for target in context.targets)
    gate_runs.run_gate(entry, context, progress.begin(f"gate {entry.name}", f"the gate for {entry.name} on {where}"))


def _need_float(variants: Sequence[VariantResult]) -> None:
    if variants[0].refused is not None:
        raise QuantizeError(
            f"the float model itself does not pass on ONNX Runtime: {variants[0].refused.detail}",
            hint="report this with the model: the reference cannot differ from itself",
            code=Code.MODEL_RUNS,
        )


def _assemble(
    recipe: BundleRecipe, context: GateContext, variants: Sequence[VariantResult], progress: Progress
) -> tuple[Manifest, OperatingPoints]:
    on_progress = progress.begin("bundle", "golden cases, manifest, last check")
    shipped = [entry for entry in variants if entry.refused is None]
    named = recipe.measured_on or recipe.evaluation.resolve().name
    operating = OperatingPoints.of(context, named)
    results = CardInputs(context, operating, shipped)
    input_check = context.float_model.draft.read_input_check(recipe.draft.parent)
    size = f"{named}: {len(context.evaluation)} pictures"
    gate = assembly.gate_record(context, variants, shipped, operating, size, input_check[1] if input_check else None)
    if recipe.more is not None:
        gate |= recipe.more(results)
    recipe.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    try:
        images, card = _golden(recipe, context), _card(recipe, results)
        return assembly.write(context, shipped, operating, images, card, gate, input_check, recipe.out, on_progress), operating
    except BundleError as error:
        raise QuantizeError(f"the result is not a valid bundle: {error.message}", hint=error.hint, code=Code.BUNDLE_INVALID) from error


def _card(recipe: BundleRecipe, results: CardInputs) -> str:
    if recipe.write_card is not None:
        return recipe.write_card(results)
    own = recipe.draft.with_name(MODEL_CARD)
    if own.is_file():
        return own.read_text(encoding="utf-8")
    return model_card.write_card(
        results.context.float_model.draft, results.operating, model_card.gate_chapter(results.context, results.shipped)
    )


def _golden(recipe: BundleRecipe, context: GateContext) -> dict[str, NDArray[np.uint8]]:
    spec = context.float_model.draft.input
    if recipe.golden is not None:
        return golden_cases.read_golden_images(recipe.golden, spec)
    score = context.reference.score[:, 0] if context.reference.score.size else np.zeros(len(context.evaluation))
    return golden_cases.average_images(context.evaluation, score, spec)


def write_report(made: RunResult, out: Path) -> None:
    """Write the record and the HTML report of a finished run beside the bundle; print one line per variant.

    Raises:
        QuantizeError: ``report.matplotlib``: matplotlib is not installed.
    """
    record_path, page = out.with_name(out.name + ".report.json"), out.with_name(out.name + ".report.html")
    record_path.write_text(json.dumps(made.record, ensure_ascii=False), encoding="utf-8")
    html_report.write(made.record, page)
    print(f"{made.manifest.name} {made.manifest.version}: {out}")
    for entry in made.variants:
        times = ", ".join(f"{target.title} {timing.median_ms:.2f} ms" for target, timing in entry.timing.items())
        outcome = "shipped" if entry.refused is None else f"left out: {entry.refused.code}: {entry.refused.detail}"
        print(f"  {entry.name}: {outcome}" + (f" ({times})" if times and entry.refused is None else ""))
    print(f"report: {page}")
