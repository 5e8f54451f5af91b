"""A bundle of a model of volumes for tests: any ONNX file, any window, the pipeline of a T1 brain segmentation."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WEB = {"zh": "测试", "en": "Test"}
MR = "1.2.840.10008.5.1.4.1.1.4"

# Gradient echoes with a short echo time, prepared by an inversion or not: MPRAGE, FLASH and their like.
T1_SEQUENCE: dict[str, Any] = {
    "echo_time_ms": {"low": 0.0, "high": 15.0}, "repetition_time_ms": {"low": 0.0, "high": 3000.0}, "scanning_sequence": ["GR", "IR"],
    "image_type_not": ["DERIVED", "SECONDARY", "PROJECTION IMAGE", "MIP", "MPR", "ADC"], "contrast_agent": "out_of_scope",
}  # fmt: skip


def pipeline(
    *, axes: str = "LIA", spacing: Sequence[float] = (1.0, 1.0, 1.0), scale: Sequence[dict[str, Any]] = (), overlap: float = 0.5,
    min_slices: int = 16, apart: float = 3.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """The steps of ``brain_t1_meshnet.json``: conform, cut off, whole numbers up to 255, and 0 to 1."""
    grey = [
        {"step": "clip_quantile", "low": 0.0, "high": 0.998},
        {"step": "min_max", "low": 0.0, "high": 255.0, "round": True},
        {"step": "min_max", "low": 0.0, "high": 1.0, "round": False},
    ]
    return [
        {"step": "stack", "by": "position", "min_slices": min_slices, "max_slice_spacing_mm": apart},
        {"step": "modality_lut"},
        {"step": "orient", "axes": axes},
        {"step": "resample", "spacing_mm": list(spacing), "interpolation": "linear"},
        *(scale or grey),
        {"step": "sliding_window", "overlap": overlap, "weight": "gaussian", "fill": 0.0},
    ]


def volume_input(side: int | tuple[int, int, int] = 32, **steps: Any) -> dict[str, Any]:
    """The input part of the manifest."""
    depth, height, width = (side,) * 3 if isinstance(side, int) else side
    return {
        "name": "volume", "layout": "NCDHW", "dtype": "float32", "channels": 1, "depth": depth, "height": height, "width": width,
        "pipeline": pipeline(**steps),
    }  # fmt: skip


def label(name: str, zh: str, en: str, code: str) -> dict[str, Any]:
    """One label of the manifest."""
    return {"name": name, "title": {"zh": zh, "en": en}, "code": {"scheme": "SCT", "value": code, "meaning": en}}


LABELS = (label("white_matter", "白质", "White matter", "68523003"), label("grey_matter", "灰质", "Grey matter", "389080008"))


def golden_npz(values: np.ndarray[Any, Any], affine: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> bytes:
    """The file of one golden volume."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, values=values, affine=affine, mask=mask)
    return buffer.getvalue()


def small_golden(shape: tuple[int, int, int] = (6, 7, 8), classes: int = 3) -> bytes:
    """A golden volume of no meaning."""
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return golden_npz(values, np.diag([1.0, 1.0, 1.0, 1.0]), (np.arange(np.prod(shape)) % classes).astype(np.uint8).reshape(shape))


def manifest_of(files: dict[str, bytes], **changes: Any) -> dict[str, Any]:
    """A manifest that lists ``files``: ``*.onnx`` are variants (the first is fp32), ``golden/*`` golden cases, the rest documents."""
    digest = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    labels = changes.get("labels", list(LABELS))
    age = {"min_years": 0, "max_years": 120, "outside": "caution", "absent": "caution", "note": WEB}
    weights = [name for name in files if name.endswith(".onnx")]
    return {
        "schema": 1, "name": "brain-t1", "version": "1.0.0", "task": "segmentation", "title": {"zh": "脑组织分割", "en": "Brain tissue"},
        "labels": labels,
        "applies_to": {
            "modality": ["MR"], "sop_class_uid": [MR, "1.2.840.10008.5.1.4.1.1.4.1"], "body_part": ["HEAD", "BRAIN"], "view_position": [],
            "when_body_part_absent": "out_of_scope", "assumed_body_part": "", "when_view_absent": "assume", "assumed_view": "", "age": age,
        },
        "intended_use": WEB, "registration": {"number": None, "device_class": None, "pccp_id": None}, "change_kind": "algorithm",
        "input": volume_input(),
        "outputs": [
            {"name": "logits", "kind": "segmentation_logits", "shape": ["n", "c", "d", "h", "w"],
             "classes": ["background", *(item["name"] for item in labels)]},
        ],
        "explain": None, "operating_points": [],
        "variants": [
            {"precision": precision, "file": name, "sha256": digest[name], "recipe": "as it came", "gate": "gate.json"}
            for precision, name in zip(("fp32", "fp16", "int8"), weights, strict=False)
        ],
        "golden": [
            {"input": name, "sha256": digest[name], "expected": {item["name"]: 1.0 for item in labels},
             "tolerance": dict.fromkeys(("fp32", "fp16", "int8")[: len(weights)], 0.01)}
            for name in files if name.startswith("golden/")
        ],
        "reference_scores": [], "training_data": {"description": WEB, "n_images": 1, "sources": []}, "licence": "MIT",
        "min_appliance_version": "0.1.0",
        "documents": [{"file": name, "sha256": digest[name]} for name in files if not name.endswith((".onnx", ".npz"))],
    } | changes  # fmt: skip


def write(directory: Path, weights: bytes = b"weights", golden: bytes | None = None, **changes: Any) -> dict[str, Any]:
    """Lay a bundle into ``directory``; returns its manifest."""
    files = {"model_fp32.onnx": weights, "golden/a.npz": golden or small_golden(), "MODEL_CARD.md": b"# card", "gate.json": b"{}"}
    (directory / "golden").mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (directory / name).write_bytes(raw)
    manifest = manifest_of(files, **changes)
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return manifest
