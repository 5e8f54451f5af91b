"""A gate record that matches its bundle, for bundles of the tests: their figures are invented, so they cannot be measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

EVALUATION = hashlib.sha256(b"no images").hexdigest()


def gate_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The gate record of schema 2 on the variants, thresholds, figures and input of a manifest."""
    points = manifest["operating_points"]
    figures = {point["label"]: {name: point[name] for name in ("threshold", "sensitivity", "specificity")} for point in points}
    runtimes = {"onnxruntime": {"version": "0", "passed": True, "reasons": [], "labels": figures}}
    variants: dict[str, Any] = {}
    for variant in manifest["variants"]:
        record = variants.setdefault(variant["precision"], {"passed": True, "files": {}})
        record["files"][variant["file"]] = {"sha256": variant["sha256"], "not_on": variant.get("not_on", []), "runtimes": runtimes}
    return {
        "schema": 2,
        "reference": "fp32",
        "evaluation": {"sha256": EVALUATION, "n_images": 706, "name": "tests"},
        "labels": [label["name"] for label in manifest["labels"]],
        "input": manifest["input"],
        "operating_points": points,
        **({"input_check": manifest["input_check"]} if "input_check" in manifest else {}),
        "variants": variants,
    }


def write_gate(bundle: Path) -> None:
    """Write ``gate.json`` for the manifest of a bundle, and name its digest in the manifest; a later change of the manifest undoes it."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    raw = json.dumps(gate_of(manifest), ensure_ascii=False).encode()
    (bundle / "gate.json").write_bytes(raw)
    others = [document for document in manifest["documents"] if document["file"] != "gate.json"]
    manifest["documents"] = [*others, {"file": "gate.json", "sha256": hashlib.sha256(raw).hexdigest()}]
    path.write_text(json.dumps(manifest, ensure_ascii=False, indent=2), "utf-8")
