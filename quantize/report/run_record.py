"""The record of a run: everything the report shows, as JSON. No patient and no picture is in it; scores stand without names."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from model_sync.bundle import Manifest
    from quantize.bundle.assembly import Measured
    from quantize.gate.gate_runs import Ground
    from quantize.gate.image_sets import PictureSet
    from quantize.gate.predictions import Place
    from quantize.gate.selection import Tried

_LIBRARIES: Final = ("numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "tritonclient")
_DIGITS: Final = 4


def record(ground: Ground, tried: Sequence[Tried], measured: Measured, calibrating: PictureSet, manifest: Manifest) -> dict[str, Any]:
    """Return the record of a finished run."""
    draft = ground.found.draft
    return {
        "schema": 1,
        "name": draft.name,
        "version": draft.version,
        "title": draft.title.model_dump(),
        "made_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "labels": [{"name": label, "title": draft.labels[i].title.model_dump()} for i, label in enumerate(draft.label_names)],
        "notes": list(ground.found.notes),
        "limits": asdict(ground.limits),
        "thresholds": list(ground.thresholds),
        "points": [point.model_dump() for point in measured.points],
        "positive": ground.evaluation.positive.astype(int).tolist(),
        "reference": ground.reference.score.round(_DIGITS).tolist(),
        "calibration": _set(calibrating),
        "evaluation": _set(ground.evaluation),
        "places": [_place(place) for place in ground.places],
        "absent": dict(ground.absent),
        "variants": [_variant(entry, ground) for entry in tried],
        "tolerance": dict(manifest.golden[0].tolerance),
        "files": {variant.file: [variant.precision, variant.activations] for variant in manifest.variants},
    }


def environment() -> dict[str, str]:
    """The machine and the libraries that measured."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "processor": _processor()}
    found["cores"] = str(len(os.sched_getaffinity(0)))
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "–"
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith(("model name", "Model"))]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown"


def _set(pictures: PictureSet) -> dict[str, Any]:
    positive = pictures.positive
    return {
        "directory": pictures.directory.name,
        "n": len(pictures),
        "digest": pictures.digest,
        "positive": positive.sum(axis=0).tolist() if positive.size else [],
        "sources": dict(Counter(row.source or "–" for row in pictures.rows)),
        "with_patient": sum(bool(row.patient) for row in pictures.rows),
    }


def _place(place: Place) -> dict[str, str]:
    return {"title": place.title, "runtime": place.runtime, "provider": place.provider, "version": place.version}


def _variant(entry: Tried, ground: Ground) -> dict[str, Any]:
    return {
        "name": entry.name,
        "precision": entry.precision,
        "activations": entry.activations,
        "recipe": entry.recipe,
        "bytes": entry.path.stat().st_size if entry.path is not None else None,
        "refused": None if entry.refused is None else asdict(entry.refused),
        "not_on": entry.not_on,
        "layers": [asdict(layer) for layer in entry.layers],
        "places": {place.title: _on(entry, place, ground) for place in entry.verdicts},
    }


def _on(entry: Tried, place: Place, ground: Ground) -> dict[str, Any]:
    score = ground.scores.get((entry.name, place))
    return {
        **entry.verdicts[place].to_json(),
        "scores": None if score is None else score.round(_DIGITS).tolist(),
        "describe": ground.described.get((entry.name, place), {}),
        "timed": asdict(entry.timed[place]) if place in entry.timed else None,
    }
