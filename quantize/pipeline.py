"""From a float model and two sets of pictures to a gated bundle: ``run(recipe)``.

read and check -> clean up, activation map -> float scores, operating points -> fp16 and every int8 recipe, each before the gate on
every runtime here, each in a process that may die -> layers back to float where no int8 passes -> times -> what is shipped -> golden
cases, histograms, ``gate.json``, model card, manifest -> checked as a box checks it, put in place in one go. An
interrupted run resumes: see ``quantize.work_directory``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from model_sync.errors import BundleError
from quantize.bundle import assembly, golden_cases, model_card
from quantize.bundle.assembly import Documents, OperatingPoints
from quantize.draft import MODEL_CARD, Draft
from quantize.errors import QuantizeError
from quantize.gate import gate_runs, mixed_precision, predictions, preparation, selection
from quantize.gate.gate_runs import GateContext
from quantize.gate.selection import VariantResult
from quantize.gate.verdicts import Limits
from quantize.graph import model_checks
from quantize.progress import Progress
from quantize.recipes import modelopt
from quantize.recipes.variant_makers import Maker, Source, all_makers, measure_calibration
from quantize.report import html_report
from quantize.report.run_record import make_record
from quantize.work_directory import WorkDirectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from model_sync.bundle import Manifest
    from quantize.gate.image_sets import ImageSet

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
        replace: whether ``out`` may be there already.
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
        QuantizeError: something that was given is wrong, or nothing can be shipped; it says what to do.
    """
    if recipe.out.exists() and not recipe.replace:
        raise QuantizeError(f"{recipe.out} is there already", hint="name another directory, or allow it with --replace", code="out.exists")
    model_checks.require_file(recipe.model)
    draft = Draft.load(recipe.draft)
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
            entry.layers = mixed_precision.to_layer_errors(mixed_precision.measure_costs(entry, source, context, on_progress))
    manifest, operating = _assemble(recipe, context, variants, progress)
    return RunResult(manifest, tuple(variants), make_record(context, variants, operating, calibration_set, manifest))


def _aims(draft: Draft) -> list[float]:
    aims = {aim.label: aim.sensitivity for aim in draft.operating_points}
    return [aims[label] for label in draft.label_names]


def _try_all(
    recipe: BundleRecipe, context: GateContext, calibration_set: ImageSet, progress: Progress
) -> tuple[list[VariantResult], Source]:
    makers = (*all_makers(), *modelopt.makers(recipe.optimizer)) if recipe.makers is None else recipe.makers
    progress.expect({f"make {maker.name}": _MAKE for maker in makers} | {f"gate {name}": _GATE for name in _names(makers)})
    source = _source(context, calibration_set, progress)
    variants = [VariantResult("fp32", "fp32", None, context.float_model.path, "the float model as given")]
    _run_gate(variants[0], context, progress)
    for maker in makers:
        variants.append(_try(maker, source, context, calibration_set, progress))
    if not any(entry.passed for entry in variants if entry.precision == "int8"):
        variants += _try_mixed(variants, source, context, calibration_set, progress)
    return variants, source


def _try_mixed(
    variants: Sequence[VariantResult], source: Source, context: GateContext, calibration_set: ImageSet, progress: Progress
) -> list[VariantResult]:
    more = []
    for entry in mixed_precision.find_nearest(variants):
        costs = mixed_precision.measure_costs(
            entry, source, context, progress.begin(f"layers {entry.name}", f"what each layer of {entry.name} costs")
        )
        entry.layers = mixed_precision.to_layer_errors(costs)
        for maker in mixed_precision.make_mixed(entry, costs):
            more.append(_try(maker, source, context, calibration_set, progress))
            if more[-1].passed:
                break
    return more


def _names(makers: Sequence[Maker]) -> list[str]:
    return ["fp32", *(maker.name for maker in makers)]


def _source(context: GateContext, calibration_set: ImageSet, progress: Progress) -> Source:
    held: list[Any] = []

    def calibrate() -> Any:
        if not held:
            on_progress = progress.begin("calibration", "measuring the ranges of the activations")
            inputs = [context.float_model.digest, calibration_set.digest]
            held.append(measure_calibration(context.work, context.float_model.clean, calibration_set.tensors, inputs, on_progress))
        return held[0]

    return Source(context.float_model.clean, calibration_set.tensors, calibrate)


def _try(maker: Maker, source: Source, context: GateContext, calibration_set: ImageSet, progress: Progress) -> VariantResult:
    entry = gate_runs.make_variant(
        maker, source, context, calibration_set.digest, progress.begin(f"make {maker.name}", f"making {maker.name}")
    )
    _run_gate(entry, context, progress)
    return entry


def _run_gate(entry: VariantResult, context: GateContext, progress: Progress) -> None:
    where = ", ".join(target.title for target in context.targets)
    gate_runs.run_gate(entry, context, progress.begin(f"gate {entry.name}", f"{entry.name} before the gate on {where}"))


def _need_float(variants: Sequence[VariantResult]) -> None:
    if variants[0].refused is not None:
        raise QuantizeError(
            f"the float model itself does not pass on ONNX Runtime: {variants[0].refused.detail}",
            hint="report this with the model: the reference cannot differ from itself",
            code="model.runs",
        )


def _assemble(
    recipe: BundleRecipe, context: GateContext, variants: Sequence[VariantResult], progress: Progress
) -> tuple[Manifest, OperatingPoints]:
    on_progress = progress.begin("bundle", "golden cases, manifest, last check")
    shipped = [entry for entry in variants if entry.refused is None]
    named = recipe.measured_on or recipe.evaluation.resolve().name
    operating = OperatingPoints.of(context, named)
    results = CardInputs(context, operating, shipped)
    gate = assembly.gate_record(context, variants, shipped, _sized(named, context))
    if recipe.more is not None:
        gate |= recipe.more(results)
    documents = Documents(_card(recipe, results), gate)
    recipe.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    try:
        return assembly.write(context, shipped, operating, _golden(recipe, context), documents, recipe.out, on_progress), operating
    except BundleError as error:
        raise QuantizeError(f"what was made is no bundle: {error.message}", hint=error.hint, code="bundle.invalid") from error


def _sized(named: str, context: GateContext) -> str:
    return f"{named}: {len(context.evaluation)} pictures"


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
