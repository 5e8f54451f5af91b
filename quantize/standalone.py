"""Single steps of the pipeline as commands: make variants without a gate; gate a bundle, run its golden cases, or measure its speed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from appliance.core.errors import InferenceError
from appliance.imaging.golden_cases import Case, cases
from appliance.runtime import open_runtime
from model_sync.bundle import InputSpec, Manifest, ModelBundle, Variant
from model_sync.errors import BundleError
from quantize.draft import Draft
from quantize.errors import QuantizeError
from quantize.gate import image_sets, predictions, preparation, verdicts
from quantize.gate.predictions import REFERENCE, Heads, Predictions, RuntimeTarget
from quantize.gate.verdicts import Limits
from quantize.graph import model_checks
from quantize.messages import Code
from quantize.progress import Progress, no_progress
from quantize.recipes import modelopt, variant_makers
from quantize.recipes.variant_makers import Source, all_makers
from quantize.work_directory import WorkDirectory


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
    model_checks.require_file(model)
    draft = Draft.load(draft_path)
    progress = Progress({"model": 1, "calibration set": 2, "calibration": 10})
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantize.") as directory, WorkDirectory(Path(directory)) as work:
        result = preparation.read_float(model, draft, work, progress.begin("model", "checking and cleaning up the float model"))
        images = image_sets.read_calibration(
            calibration, draft.input, draft.applies_to.modality, work.directory / "tensors",
            on_progress=progress.begin("calibration set", "reading the calibration pictures"),
        )  # fmt: skip
        on_progress = progress.begin("calibration", "measuring the ranges of the activations")
        measured = variant_makers.measure_calibration(work, result.clean, images.tensors, [images.digest], on_progress)
        source = Source(result.clean, images.tensors, images.digest, lambda: measured)
        for maker in (*all_makers(), *modelopt.makers(optimizer)):
            name = f"{draft.name.replace('-', '_')}_{maker.name}.onnx"
            try:
                maker.make(source, out / name, no_progress)
            except QuantizeError as error:
                yield name, f"not made: {error.message}"
            else:
                yield name, maker.recipe


def gate(bundle_path: Path, evaluation: Path, limits: Limits) -> tuple[dict[str, Any], bool]:
    """Compare every variant of a bundle with its fp32, on every runtime of this computer that the manifest does not exclude.

    Returns:
        Variant file -> place -> verdict, and whether all passed.

    Raises:
        QuantizeError: there is no bundle, it has no fp32, or the pictures are wrong.
    """
    bundle, spec = _bundle(bundle_path)
    manifest = bundle.manifest
    labels = [label.name for label in manifest.labels] if manifest.operating_points else []
    thresholds = [manifest.operating_point(label).threshold for label in labels]
    heads = Heads.of(manifest.outputs)
    targets, unavailable = predictions.runtime_targets()
    result: dict[str, Any] = {"not_measured_here": unavailable, "variants": {}}
    with tempfile.TemporaryDirectory(prefix="quantize.") as directory:
        images = image_sets.read_evaluation(evaluation, spec, manifest.applies_to.modality, labels, Path(directory))

        def answers(variant: Variant, target: RuntimeTarget) -> Predictions:
            candidate = target.candidate(variant.file, variant.precision, 1)
            return predictions.predict(bundle.path(variant.file), spec, candidate, images.tensors, heads)

        try:
            reference = answers(bundle.variant("fp32"), REFERENCE)
        except InferenceError as error:
            raise QuantizeError(f"fp32 does not run: {error.detail}", hint="check the bundle", code=Code.MODEL_RUNS) from error
        passed = True
        for variant, target in _pairs(manifest, targets):
            try:
                verdict = verdicts.judge(reference, answers(variant, target), images, labels, thresholds, limits)
            except InferenceError as error:
                verdict = verdicts.failed_verdict(error.code, error.detail)
            result["variants"].setdefault(variant.file, {})[target.title] = verdict.to_json()
            passed &= verdict.passed
    return result, passed


def golden(bundle_path: Path) -> tuple[dict[str, Any], bool]:
    """Run every variant of a bundle on its golden cases, as a box does, in this process.

    ONNX Runtime on the CPU is used, the baseline of every box; a variant that must not run there is run by another runtime here.

    Returns:
        The digest of the bundle and, per variant file, the runtime, the difference and the tolerance of each case, and the code and detail
        of an error; and whether every variant is within its tolerances. A difference is None where there is no valid result.

    Raises:
        QuantizeError: there is no valid bundle.
    """
    try:
        bundle = ModelBundle.load(bundle_path)
        prepared = cases(bundle)
    except BundleError as error:
        raise QuantizeError(error.message, hint=error.hint, code=error.code) from error
    targets, _ = predictions.runtime_targets()
    results: dict[str, Any] = {}
    for variant in bundle.manifest.variants:
        allowed = [target for target in (REFERENCE, *targets) if target.runtime not in variant.not_on]
        results[variant.file] = _golden_results(bundle, variant, allowed, prepared)
    passed = all(not result["error"] and all(case["passed"] for case in result["cases"]) for result in results.values())
    return {"digest": bundle.digest, "variants": results}, passed


def _golden_results(bundle: ModelBundle, variant: Variant, targets: list[RuntimeTarget], prepared: list[Case]) -> dict[str, Any]:
    if not targets:
        return {"runtime": None, "cases": [], "error": {"code": "runtime.unavailable", "detail": "no runtime that may run it is here"}}
    spec, candidate = bundle.manifest.input, targets[0].candidate(variant.file, variant.precision, 1)
    results: list[dict[str, Any]] = []
    error = None
    try:
        runtime = open_runtime(bundle.path(variant.file), spec, candidate)
        try:
            for case in prepared:
                difference = case.difference(lambda tensor: runtime.infer({spec.name: tensor}))
                tolerance = case.tolerance[variant.precision]
                value = round(difference, 6) if math.isfinite(difference) else None
                results.append({"name": case.name, "difference": value, "tolerance": tolerance, "passed": bool(difference <= tolerance)})
        finally:
            runtime.close()
    except InferenceError as failed:
        error = {"code": failed.code, "detail": failed.detail}
    except KeyError as failed:
        error = {"code": str(Code.GATE_OUTPUT), "detail": f"it has no output {failed}"}
    return {"runtime": targets[0].title, "cases": results, "error": error}


def bench(bundle_path: Path) -> list[dict[str, Any]]:
    """Time every variant of a bundle on every runtime here, interleaved; the fastest first.

    Raises:
        QuantizeError: there is no bundle, or a variant does not run where the manifest says that it may.
    """
    bundle, spec = _bundle(bundle_path)
    targets, _ = predictions.runtime_targets()
    pairs = list(_pairs(bundle.manifest, targets))
    tensor = np.random.default_rng(0).random((1, *spec.shape), np.float32)
    runs = [(bundle.path(variant.file), target.candidate(variant.file, variant.precision)) for variant, target in pairs]
    try:
        times = predictions.measure_interleaved(runs, spec, tensor)
    except InferenceError as error:
        raise QuantizeError(f"a variant does not run: {error}", hint=error.hint, code=Code.SPEED_FAILED) from error
    rows = [
        {"file": variant.file, "precision": variant.precision, "place": target.title, **asdict(timing)}
        for (variant, target), timing in zip(pairs, times, strict=True)
    ]
    return sorted(rows, key=lambda row: float(row["median_ms"]))


def _bundle(path: Path) -> tuple[ModelBundle, InputSpec]:
    try:
        bundle = ModelBundle.load(path)
        return bundle, bundle.manifest.image_input
    except BundleError as error:
        raise QuantizeError(error.message, hint=error.hint, code=error.code) from error


def _pairs(manifest: Manifest, targets: list[RuntimeTarget]) -> Iterator[tuple[Variant, RuntimeTarget]]:
    for variant in manifest.variants:
        yield from ((variant, target) for target in targets if target.runtime not in variant.not_on)
