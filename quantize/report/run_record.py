"""The record of a run: all data of the report as JSON, without patients, images or file names."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from model_sync.bundle import Manifest
from quantize.bundle.assembly import OperatingPoints
from quantize.gate.gate_runs import GateContext
from quantize.gate.image_sets import ImageSet
from quantize.gate.predictions import RuntimeTarget
from quantize.gate.selection import VariantResult

_LIBRARIES: Final = ("numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "tritonclient")
_DIGITS: Final = 4


def make_record(
    context: GateContext, variants: Sequence[VariantResult], operating: OperatingPoints, calibration_set: ImageSet, manifest: Manifest
) -> dict[str, Any]:
    """Return the record of a finished run."""
    draft = context.float_model.draft
    return {
        "schema": 1,
        "name": draft.name,
        "version": draft.version,
        "title": draft.title.model_dump(),
        "made_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "labels": [{"name": label, "title": draft.labels[i].title.model_dump()} for i, label in enumerate(draft.label_names)],
        "notes": list(context.float_model.notes),
        "limits": asdict(context.limits),
        "thresholds": list(context.thresholds),
        "points": [point.model_dump() for point in operating.points],
        "positive": context.evaluation.positive.astype(int).tolist(),
        "reference": context.reference.score.round(_DIGITS).tolist(),
        "calibration": _set(calibration_set),
        "evaluation": _set(context.evaluation),
        "places": [_place(target) for target in context.targets],
        "absent": dict(context.unavailable),
        "variants": [_variant(entry, context) for entry in variants],
        "tolerance": dict(manifest.golden[0].tolerance),
        "files": {variant.file: [variant.precision, variant.activations] for variant in manifest.variants},
    }


def environment() -> dict[str, str]:
    """Return the processor, the system and the library versions of this computer."""
    result = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "processor": _processor()}
    result["cores"] = str(len(os.sched_getaffinity(0)))
    for name in _LIBRARIES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "–"
    return result


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith(("model name", "Model"))]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown"


def _set(images: ImageSet) -> dict[str, Any]:
    positive = images.positive
    return {
        "directory": images.directory.name,
        "n": len(images),
        "digest": images.digest,
        "positive": positive.sum(axis=0).tolist() if positive.size else [],
        "sources": dict(Counter(row.source or "–" for row in images.rows)),
        "with_patient": sum(bool(row.patient) for row in images.rows),
    }


def _place(target: RuntimeTarget) -> dict[str, str]:
    return {"title": target.title, **asdict(target)}


def _variant(entry: VariantResult, context: GateContext) -> dict[str, Any]:
    return {
        "name": entry.name,
        "precision": entry.precision,
        "activations": entry.activations,
        "recipe": entry.recipe,
        "bytes": entry.path.stat().st_size if entry.path is not None else None,
        "refused": None if entry.refused is None else asdict(entry.refused),
        "not_on": entry.not_on,
        "layers": [{"name": cost.layer, "op_type": cost.op_type, "error": cost.cost} for cost in entry.layers],
        "places": {target.title: _on(entry, target, context) for target in entry.verdicts},
    }


def _on(entry: VariantResult, target: RuntimeTarget, context: GateContext) -> dict[str, Any]:
    score = context.scores.get((entry.name, target))
    return {
        **entry.verdicts[target].to_json(),
        "scores": None if score is None else score.round(_DIGITS).tolist(),
        "describe": context.described.get((entry.name, target), {}),
        "timed": asdict(entry.timing[target]) if target in entry.timing else None,
    }
