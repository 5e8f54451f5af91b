"""Putting a model to work: verify, copy, prove on this box with its golden cases, switch in one transaction.

Until the switch the model before it goes on reading; whatever fails before leaves it untouched.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np

from appliance import __version__
from appliance.content import fsync_directory
from appliance.database import SECURITY_ALERT
from appliance.errors import ActivationError, ApplianceError, InferenceError
from appliance.postprocess import classify
from appliance.preprocess import from_display
from appliance.runtime import Runtime, open_runtime
from appliance.store import Store
from model_sync.bundle import GoldenCase, ModelBundle, Variant
from model_sync.errors import BundleError

REFERENCE_BUNDLE: Final = "cxr-pneumonia"


def reference_bundle() -> Path:
    """The reference bundle that ships inside the package."""
    return Path(str(resources.files("appliance") / "bundles" / REFERENCE_BUNDLE))


def activate(store: Store, directory: Path, actor: str, precision: str | None = None) -> str:
    """Make a bundle the active model of its name.

    Args:
        store: the box's store.
        directory: the bundle.
        actor: who asked for it, for the audit.
        precision: variant to run; the first of the manifest when None.

    Returns:
        The model's digest. A model that is active already is verified and left as it is; when the box's copy of it is damaged,
        that copy is moved aside and the bundle installed again.

    Raises:
        ActivationError: the bundle is invalid, too new for this appliance, or fails its self-test; the model before it stays.
    """
    try:
        bundle = _load(directory)
        current = store.database.one("SELECT digest FROM models WHERE state = 'active' AND name = ?", bundle.manifest.name)
        if current is not None and current["digest"] == bundle.digest and precision is None and _is_whole(store, bundle.digest):
            return bundle.digest
        own = _install(store, bundle)
        report = self_test(own, precision, store.settings.worker_threads)
    except ApplianceError as error:
        store.record(SECURITY_ALERT, actor, "U", "model", 8, type="110131", type_meaning="Software Configuration", code=error.code)
        raise
    manifest = own.manifest
    values = {
        "digest": own.digest, "name": manifest.name, "version": manifest.version, "directory": f"models/{own.digest}",
        "manifest": own.manifest.to_json().decode(),
        "precision": report["precision"], "runtime": report["runtime"], "self_test": json.dumps(report),
    }  # fmt: skip
    store.switch_model(values, actor)
    return own.digest


def installed(store: Store, digest: str) -> ModelBundle:
    """The box's own copy of a model, its digests checked; raises ActivationError."""
    row = store.model(digest)
    bundle = _load(store.settings.data_dir / row["directory"])
    if bundle.digest != digest:
        raise ActivationError("model.invalid", "the copy on this box is another model")
    return bundle


def self_test(bundle: ModelBundle, precision: str | None, threads: int) -> dict[str, Any]:
    """Run every golden case through the real way (resize, infer, classify) and hold it against its tolerance.

    Returns:
        precision, runtime, per case the largest difference of a probability, and the median latency in ms.

    Raises:
        ActivationError: ``model.self_test``, with the case and the difference.
    """
    try:
        return _measure(bundle, bundle.variant(precision), threads)
    except InferenceError as error:
        raise ActivationError("model.self_test", error.detail) from error
    except BundleError as error:
        raise ActivationError("model.invalid", str(error), hint=error.hint) from error


def _measure(bundle: ModelBundle, variant: Variant, threads: int) -> dict[str, Any]:
    runtime = open_runtime(bundle.path(variant.file), bundle.manifest.input, variant.precision, threads or None)
    try:
        differences: dict[str, float] = {}
        latencies = []
        for case in bundle.golden_cases():
            started = time.perf_counter()
            differences[case.name] = _difference(runtime, bundle, case)
            latencies.append((time.perf_counter() - started) * 1000)
            allowed = case.tolerance[variant.precision]
            if not differences[case.name] <= allowed:  # also true for NaN
                raise ActivationError("model.self_test", f"{case.name}: off by {differences[case.name]:.4g}, allowed {allowed:g}")
        if not differences:
            raise ActivationError("model.self_test", "the bundle has no golden case")
        return {
            "precision": variant.precision, "runtime": f"{runtime.name} {runtime.version}", "details": runtime.describe(),
            "max_difference": differences, "median_ms": float(np.median(latencies)),
        }  # fmt: skip
    finally:
        runtime.close()


def _difference(runtime: Runtime, bundle: ModelBundle, case: GoldenCase) -> float:
    """The largest difference of one case: of its probabilities, and of its activation map relative to the map's range."""
    manifest = bundle.manifest
    prepared = from_display(case.pixels, manifest.input)
    outputs = runtime.infer({manifest.input.name: prepared.tensor})
    scored = {label.label: label.score for label in classify(outputs, manifest, prepared.geometry)}
    worst = max(abs(scored[label] - expected) for label, expected in case.expected.items())
    if manifest.explain is not None and case.cam is not None:
        cam = outputs[manifest.explain.output]
        span = float(np.ptp(case.cam)) or 1.0
        worst = max(worst, float(np.max(np.abs(cam - case.cam))) / span)
    return worst


def _load(directory: Path) -> ModelBundle:
    try:
        bundle = ModelBundle.load(directory)
    except BundleError as error:
        raise ActivationError("model.invalid", str(error), hint=error.hint) from error
    if not bundle.manifest.runs_on(__version__):
        raise ActivationError("model.too_new", f"needs {bundle.manifest.min_appliance_version}, this is {__version__}")
    return bundle


def _is_whole(store: Store, digest: str) -> bool:
    """Whether the box's own copy of a model is there and what it should be."""
    try:
        return _load(store.settings.data_dir / "models" / digest).digest == digest
    except ActivationError:
        return False


def _set_aside(target: Path) -> None:
    """Keep a damaged copy beside, for whoever asks what happened to the disk, and make room for a whole one."""
    number = 1 + sum(1 for _ in target.parent.glob(f"{target.name}.damaged-*"))
    try:
        os.rename(target, target.with_name(f"{target.name}.damaged-{number}"))
        fsync_directory(target.parent)
    except OSError as error:
        raise ActivationError("store.failed", str(error)) from error


def _install(store: Store, bundle: ModelBundle) -> ModelBundle:
    """Copy a bundle under its digest: written beside, fsynced, renamed; then read back from the disk."""
    target = store.settings.data_dir / "models" / bundle.digest
    if os.path.lexists(target) and not _is_whole(store, bundle.digest):
        _set_aside(target)
    if not target.is_dir():
        staging = target.with_suffix(f".{os.getpid()}.part")
        try:
            shutil.copytree(bundle.directory, staging)
            for path in staging.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                else:
                    fsync_directory(path)
            fsync_directory(staging)
            os.rename(staging, target)
            fsync_directory(target.parent)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise ActivationError("store.failed", str(error)) from error
    return _load(target)
