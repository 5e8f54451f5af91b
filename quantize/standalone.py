"""Parts of the pipeline on their own: candidates without a gate, a gate without a bundle, times without either."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from appliance.errors import InferenceError
from model_sync.bundle import InputSpec, Manifest, ModelBundle, Variant
from model_sync.errors import BundleError
from quantize.draft import Draft
from quantize.errors import QuantizeError
from quantize.gate import image_sets, predictions, preparation
from quantize.gate import verdicts as gates
from quantize.gate.predictions import REFERENCE, Heads, Place, answers
from quantize.graph import model_checks
from quantize.progress import Progress
from quantize.recipes import modelopt, variant_makers
from quantize.recipes.variant_makers import Source, all_makers
from quantize.work_directory import Work

if TYPE_CHECKING:
    from quantize.gate.verdicts import Limits


def calibrate(
    model: Path, draft_path: Path, calibration: Path, out: Path, optimizer: modelopt.Optimizer | str = ""
) -> Iterator[tuple[str, str]]:
    """Write every candidate of a model into ``out``; yields its file name and how it was made, or why it could not be.

    Args:
        model: the float ONNX file.
        draft_path: ``draft.toml``.
        calibration: directory of pictures.
        out: the directory to write into.
        optimizer: the nvidia-modelopt whose variants are made too, or why there is none.

    Raises:
        QuantizeError: the model, the draft or the pictures are wrong.
    """
    model_checks.need_file(model)
    draft = Draft.load(draft_path)
    progress = Progress({"model": 1, "calibration set": 2, "calibration": 10})
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantize.") as directory, Work(Path(directory)) as work:
        found = preparation.read_float(model, draft, work, progress.begin("model", "checking and cleaning up the float model"))
        told = progress.begin("calibration set", "reading the calibration pictures")
        pictures = image_sets.read_calibration(
            calibration, draft.input, draft.applies_to.modality, work.directory / "tensors", told=lambda done, of: told(done / of)
        )
        told_ranges = progress.begin("calibration", "measuring the ranges of the activations")
        measured = variant_makers.calibration(work, found.clean, pictures.tensors, [pictures.digest], told_ranges)
        source = Source(found.clean, pictures.tensors, lambda: measured)
        for maker in (*all_makers(), *modelopt.makers(optimizer)):
            name = f"{draft.name.replace('-', '_')}_{maker.name}.onnx"
            try:
                maker.make(source, out / name, lambda _: None)
            except QuantizeError as error:
                yield name, f"not made: {error.message}"
                continue
            yield name, maker.recipe


def gate(bundle_path: Path, evaluation: Path, limits: Limits) -> tuple[dict[str, Any], bool]:
    """Hold every variant of a bundle against its fp32, on every runtime here that the manifest does not exclude.

    Returns:
        Variant file -> place -> verdict, and whether all passed.

    Raises:
        QuantizeError: there is no bundle, it has no fp32, or the pictures are wrong.
    """
    bundle, spec = _bundle(bundle_path)
    manifest = bundle.manifest
    labels = [label.name for label in manifest.labels] if manifest.operating_points else []
    thresholds = [manifest.operating_point(label).threshold for label in labels]
    heads = _heads(manifest)
    reference = bundle.variant("fp32")
    here, absent = predictions.places()
    found: dict[str, Any] = {"not_measured_here": absent, "variants": {}}
    passed = True
    with tempfile.TemporaryDirectory(prefix="quantize.") as directory:
        pictures = image_sets.read_evaluation(evaluation, spec, manifest.applies_to.modality, labels, Path(directory))
        right = _answers(bundle, reference, REFERENCE, spec, pictures.tensors, heads)
        if isinstance(right, gates.Verdict):
            raise QuantizeError(f"fp32 does not run: {right.reasons[0].detail}", hint="check the bundle", code="model.runs")
        for variant, place in _pairs(manifest, here):
            said = _answers(bundle, variant, place, spec, pictures.tensors, heads)
            verdict = said if isinstance(said, gates.Verdict) else gates.judge(right, said, pictures, labels, thresholds, limits)
            found["variants"].setdefault(variant.file, {})[place.title] = verdict.to_json()
            passed &= verdict.passed
    return found, passed


def bench(bundle_path: Path) -> list[dict[str, Any]]:
    """Time every variant of a bundle on every runtime here, interleaved; the fastest first.

    Raises:
        QuantizeError: there is no bundle, or a variant does not run where the manifest says that it may.
    """
    bundle, spec = _bundle(bundle_path)
    here, _ = predictions.places()
    pairs = list(_pairs(bundle.manifest, here))
    tensor = np.random.default_rng(0).random((1, *spec.shape), np.float32)
    runs = [(bundle.path(variant.file), place.candidate(variant.file, variant.precision)) for variant, place in pairs]
    try:
        times = predictions.interleaved(runs, spec, tensor)
    except InferenceError as error:
        raise QuantizeError(f"a variant does not run: {error}", hint=error.hint, code="speed.failed") from error
    rows = [
        {"file": variant.file, "precision": variant.precision, "place": place.title, **asdict(timed)}
        for (variant, place), timed in zip(pairs, times, strict=True)
    ]
    return sorted(rows, key=lambda row: float(row["median_ms"]))


def _bundle(path: Path) -> tuple[ModelBundle, InputSpec]:
    try:
        bundle = ModelBundle.load(path)
        return bundle, bundle.manifest.image_input
    except BundleError as error:
        raise QuantizeError(error.message, hint=error.hint, code=error.code) from error


def _heads(manifest: Manifest) -> Heads:
    names: dict[str, str] = {}
    for output in manifest.outputs:
        names.setdefault(output.kind, output.name)
    return Heads(names.get("probability"), names.get("cam"), names.get("segmentation_logits"))


def _pairs(manifest: Manifest, here: list[Place]) -> Iterator[tuple[Variant, Place]]:
    for variant in manifest.variants:
        yield from ((variant, place) for place in here if place.runtime not in variant.not_on)


def _answers(
    bundle: ModelBundle, variant: Variant, place: Place, spec: InputSpec, tensors: Any, heads: Heads
) -> predictions.Answers | gates.Verdict:
    try:
        return answers(bundle.path(variant.file), spec, place.candidate(variant.file, variant.precision, 1), tensors, heads)
    except InferenceError as error:
        return gates.failed(error.code, error.detail)
