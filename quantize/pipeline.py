"""From a float model and two sets of pictures to a gated bundle: ``run(recipe)``.

read and check -> clean up, activation map -> float scores, operating points -> fp16 and every int8 recipe, each before the gate on
every runtime here, each in a process that may die -> layers back to float where no int8 passes -> times -> what is shipped -> golden
cases, histograms, ``gate.json``, model card, manifest -> checked as a box checks it, put in place in one go. A run that was
interrupted goes on where it was: see ``quantize.work_directory``.
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
from quantize.bundle.assembly import Documents, Measured
from quantize.draft import MODEL_CARD, Draft
from quantize.errors import QuantizeError
from quantize.gate import gate_runs, mixed_precision, predictions, preparation, selection
from quantize.gate.gate_runs import Ground
from quantize.gate.selection import Tried
from quantize.gate.verdicts import Limits
from quantize.graph import model_checks
from quantize.progress import Progress
from quantize.recipes import modelopt
from quantize.recipes.variant_makers import Maker, Source, all_makers, calibration
from quantize.report import html_report
from quantize.report.run_record import record
from quantize.work_directory import Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from model_sync.bundle import Manifest
    from quantize.gate.image_sets import PictureSet

_WEIGHTS: Final = {
    "model": 2.0,
    "calibration set": 3.0,
    "evaluation set": 4.0,
    "float": 3.0,
    "calibration": 12.0,
    "speed": 10.0,
    "bundle": 4.0,
}
_MAKE, _PROVE = 2.0, 8.0


@dataclass(frozen=True)
class Results:
    """What a card or an addition to ``gate.json`` may be written from.

    Attributes:
        ground: the float model, its answers, the sets.
        measured: operating points and histograms.
        kept: what is shipped.
    """

    ground: Ground
    measured: Measured
    kept: Sequence[Tried]


@dataclass(frozen=True)
class BundleRecipe:
    """What a bundle is made of.

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
    write_card: Callable[[Results], str] | None = None
    more: Callable[[Results], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Made:
    """A finished run.

    Attributes:
        manifest: of the bundle.
        tried: every variant, shipped or not.
        record: what the report is drawn from.
    """

    manifest: Manifest
    tried: tuple[Tried, ...]
    record: dict[str, Any]


def run(recipe: BundleRecipe, progress: Progress | None = None) -> Made:
    """Make a bundle; either it is whole and checked in the place of ``recipe.out``, or nothing is there.

    Raises:
        QuantizeError: something that was given is wrong, or nothing can be shipped; it says what to do.
    """
    if recipe.out.exists() and not recipe.replace:
        raise QuantizeError(f"{recipe.out} is there already", hint="name another directory, or allow it with --replace", code="out.exists")
    model_checks.need_file(recipe.model)
    draft = Draft.load(recipe.draft)
    with Work(recipe.out.with_name(recipe.out.name + ".work")) as work:
        progress = progress or Progress({})
        progress.expect(_WEIGHTS)
        made = _run(recipe, draft, work, progress)
        progress.end()
        if not recipe.keep_work:
            work.remove()
    return made


def _run(recipe: BundleRecipe, draft: Draft, work: Work, progress: Progress) -> Made:
    found = preparation.read_float(recipe.model, draft, work, progress.begin("model", "checking and cleaning up the float model"))
    found = replace(found, notes=(*found.notes, *modelopt.remark(recipe.optimizer)))
    calibrating, evaluation = preparation.read_sets(found, recipe.calibration, recipe.evaluation, recipe.calibration_limit, work, progress)
    places, absent = predictions.places()
    told = progress.begin("float", "the float model's answers")
    reference = gate_runs.reference_answers(found, evaluation, work, told)
    ground = Ground(found, evaluation, recipe.limits, places, absent, work, reference)
    ground.thresholds = assembly.thresholds(evaluation, reference, _aims(draft))
    tried, source = _try_all(recipe, ground, calibrating, progress)
    selection.refuse_failed(tried)
    _need_float(tried)
    selection.best_calibration(tried)
    gate_runs.measure(tried, ground, progress.begin("speed", "measuring the speed of what passed"))
    selection.refuse_slow(tried, absent)
    selection.keep_fastest(tried, one_int8=recipe.one_int8)
    for entry in tried:
        if entry.refused is None and entry.precision == "int8":
            told = progress.begin("layers", f"what each layer of {entry.name} costs")
            entry.layers = mixed_precision.shown(mixed_precision.costs(entry, source, ground, told))
    manifest, measured = _assemble(recipe, ground, tried, progress)
    return Made(manifest, tuple(tried), record(ground, tried, measured, calibrating, manifest))


def _aims(draft: Draft) -> list[float]:
    aims = {aim.label: aim.sensitivity for aim in draft.operating_points}
    return [aims[label] for label in draft.label_names]


def _try_all(recipe: BundleRecipe, ground: Ground, calibrating: PictureSet, progress: Progress) -> tuple[list[Tried], Source]:
    makers = (*all_makers(), *modelopt.makers(recipe.optimizer)) if recipe.makers is None else recipe.makers
    progress.expect({f"make {maker.name}": _MAKE for maker in makers} | {f"gate {name}": _PROVE for name in _names(makers)})
    source = _source(ground, calibrating, progress)
    tried = [Tried("fp32", "fp32", None, ground.found.path, "the float model as given")]
    _prove(tried[0], ground, progress)
    for maker in makers:
        tried.append(_try(maker, source, ground, calibrating, progress))
    if not any(entry.passed for entry in tried if entry.precision == "int8"):
        tried += _try_mixed(tried, source, ground, calibrating, progress)
    return tried, source


def _try_mixed(tried: Sequence[Tried], source: Source, ground: Ground, calibrating: PictureSet, progress: Progress) -> list[Tried]:
    more = []
    for entry in mixed_precision.nearest(tried):
        found = mixed_precision.costs(
            entry, source, ground, progress.begin(f"layers {entry.name}", f"what each layer of {entry.name} costs")
        )
        entry.layers = mixed_precision.shown(found)
        for maker in mixed_precision.makers(entry, found):
            more.append(_try(maker, source, ground, calibrating, progress))
            if more[-1].passed:
                break
    return more


def _names(makers: Sequence[Maker]) -> list[str]:
    return ["fp32", *(maker.name for maker in makers)]


def _source(ground: Ground, calibrating: PictureSet, progress: Progress) -> Source:
    held: list[Any] = []

    def measured() -> Any:
        if not held:
            told = progress.begin("calibration", "measuring the ranges of the activations")
            inputs = [ground.found.digest, calibrating.digest]
            held.append(calibration(ground.work, ground.found.clean, calibrating.tensors, inputs, told))
        return held[0]

    return Source(ground.found.clean, calibrating.tensors, measured)


def _try(maker: Maker, source: Source, ground: Ground, calibrating: PictureSet, progress: Progress) -> Tried:
    entry = gate_runs.make(maker, source, ground, calibrating.digest, progress.begin(f"make {maker.name}", f"making {maker.name}"))
    _prove(entry, ground, progress)
    return entry


def _prove(entry: Tried, ground: Ground, progress: Progress) -> None:
    where = ", ".join(place.title for place in ground.places)
    gate_runs.prove(entry, ground, progress.begin(f"gate {entry.name}", f"{entry.name} before the gate on {where}"))


def _need_float(tried: Sequence[Tried]) -> None:
    if tried[0].refused is not None:
        raise QuantizeError(
            f"the float model itself does not pass on ONNX Runtime: {tried[0].refused.detail}",
            hint="report this with the model: the reference cannot differ from itself",
            code="model.runs",
        )


def _assemble(recipe: BundleRecipe, ground: Ground, tried: Sequence[Tried], progress: Progress) -> tuple[Manifest, Measured]:
    told = progress.begin("bundle", "golden cases, manifest, last check")
    kept = [entry for entry in tried if entry.refused is None]
    named = recipe.measured_on or recipe.evaluation.resolve().name
    measured = Measured.of(ground, named)
    results = Results(ground, measured, kept)
    gate = assembly.gate_record(ground, tried, kept, _sized(named, ground))
    if recipe.more is not None:
        gate |= recipe.more(results)
    documents = Documents(_card(recipe, results), gate)
    recipe.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    try:
        return assembly.write(ground, kept, measured, _golden(recipe, ground), documents, recipe.out, told), measured
    except BundleError as error:
        raise QuantizeError(f"what was made is no bundle: {error.message}", hint=error.hint, code="bundle.invalid") from error


def _sized(named: str, ground: Ground) -> str:
    return f"{named}: {len(ground.evaluation)} pictures"


def _card(recipe: BundleRecipe, results: Results) -> str:
    if recipe.write_card is not None:
        return recipe.write_card(results)
    own = recipe.draft.with_name(MODEL_CARD)
    if own.is_file():
        return own.read_text(encoding="utf-8")
    return model_card.card(results.ground.found.draft, results.measured, model_card.gate_chapter(results.ground, results.kept))


def _golden(recipe: BundleRecipe, ground: Ground) -> dict[str, NDArray[np.uint8]]:
    spec = ground.found.draft.input
    if recipe.golden is not None:
        return golden_cases.given_pictures(recipe.golden, spec)
    score = ground.reference.score[:, 0] if ground.reference.score.size else np.zeros(len(ground.evaluation))
    return golden_cases.averaged_pictures(ground.evaluation, score, spec)


def write_report(made: Made, out: Path) -> None:
    """Write the record and the HTML report of a finished run beside the bundle; print one line per variant.

    Raises:
        QuantizeError: ``report.matplotlib``: matplotlib is not installed.
    """
    record_path, page = out.with_name(out.name + ".report.json"), out.with_name(out.name + ".report.html")
    record_path.write_text(json.dumps(made.record, ensure_ascii=False), encoding="utf-8")
    html_report.write(made.record, page)
    print(f"{made.manifest.name} {made.manifest.version}: {out}")
    for entry in made.tried:
        times = ", ".join(f"{place.title} {timed.median_ms:.2f} ms" for place, timed in entry.timed.items())
        said = "shipped" if entry.refused is None else f"left out: {entry.refused.code}: {entry.refused.detail}"
        print(f"  {entry.name}: {said}" + (f" ({times})" if times and entry.refused is None else ""))
    print(f"report: {page}")
