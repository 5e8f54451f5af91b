"""Builds the reference bundle from the trained weights and the labelled pictures.

``python -m quantize.reference.build --shared ../shared --out appliance/bundles/cxr-pneumonia`` re-derives the held-out
patients, chooses the operating point on them, draws the golden cases, measures the score histogram and writes manifest,
gate record and model card. The golden cases are phantoms, so no picture of a patient gets into the bundle. Figures are
rounded where float noise between processors begins, so that a second run writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from appliance.preprocess import from_display
from model_sync.bundle import (
    MANIFEST_NAME,
    AgeRange,
    AppliesTo,
    Code,
    Document,
    Explain,
    Golden,
    InputSpec,
    Label,
    Letterbox,
    Manifest,
    ModalityLut,
    ModelBundle,
    Monochrome2,
    OperatingPoint,
    OutputSpec,
    Precision,
    Registration,
    Resize,
    Scale,
    ScoreHistogram,
    SourceMeasure,
    Text,
    ToUint8,
    Variant,
    Voi,
)
from quantize import measures
from quantize.errors import QuantizeError
from quantize.reference import card, measure
from quantize.reference.phantom import Opacity, Phantom, display

NAME: Final = "cxr-pneumonia"
VERSION: Final = "0.1.0"
LABEL: Final = "pneumonia"
WEIGHTS: Final = "cxr_pneumonia_fp32.onnx"
SENSITIVITY: Final = 0.95
SIDE: Final = 224
HELD_OUT: Final = "patient-disjoint tenth of cxr_train_224.npz, seed 7"
# Processors and runtimes differ in the sixth digit; TF32 on a GPU in the third.
TOLERANCE: Final[dict[Precision, float]] = {"fp32": 0.002}

GOLDEN: Final[dict[str, Phantom]] = {
    "normal": Phantom(512, 512, seed=1),
    "normal-tall": Phantom(600, 470, seed=8),
    "opacity-right-lower": Phantom(512, 440, seed=2, opacity=Opacity()),
    "opacity-right-upper": Phantom(512, 512, seed=3, opacity=Opacity(x=-0.18, y=0.30, size=0.09)),
    "opacity-left-lower": Phantom(512, 512, seed=1, opacity=Opacity(x=0.20, y=0.60)),
    "opacity-wide-picture": Phantom(420, 520, seed=9, opacity=Opacity(size=0.13)),
}

INPUT: Final = InputSpec(
    name="image",
    layout="NCHW",
    dtype="float32",
    channels=1,
    height=SIDE,
    width=SIDE,
    pipeline=[
        ModalityLut(step="modality_lut"),
        Voi(step="voi", default="percentile"),
        Monochrome2(step="monochrome2"),
        ToUint8(step="to_uint8"),
        Letterbox(step="letterbox", fill=0, align="center"),
        Resize(step="resize", height=SIDE, width=SIDE, filter="antialias_bilinear"),
        Scale(step="scale", divide_by=255.0),
    ],
)

APPLIES_TO: Final = AppliesTo(
    modality=["CR", "DX", "RG"],
    sop_class_uid=[
        "1.2.840.10008.5.1.4.1.1.1",  # Computed Radiography Image Storage
        "1.2.840.10008.5.1.4.1.1.1.1",  # Digital X-Ray Image Storage - For Presentation
        "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture Image Storage: a film that was photographed
    ],
    body_part=["CHEST", "THORAX", "LUNG"],
    view_position=["PA", "AP"],
    when_body_part_absent="assume",
    assumed_body_part="CHEST",
    when_view_absent="assume",
    assumed_view="PA",
    age=AgeRange(min_years=1, max_years=5, outside="caution", absent="caution", note=card.AGE_NOTE),
)


@dataclass(frozen=True)
class Reference:
    """The float model, run the plain way: one session on the CPU, one thread, so that sums are always added alike."""

    session: Any

    @classmethod
    def open(cls, weights: Path) -> Reference:
        """Load the ONNX file.

        Raises:
            QuantizeError: The file is not there.
        """
        if not weights.is_file():
            raise QuantizeError(
                f"the trained weights are not at {weights}",
                hint="point --shared to the directory that holds models/cxr_pneumonia, or train: quantize.reference.train",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return cls(onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"]))

    def __call__(self, tensor: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return probability [n, 1] and class activation map [n, 1, 7, 7] of ``tensor`` [n, 1, 224, 224]."""
        probability, cam = self.session.run(["probability", "cam"], {INPUT.name: tensor})
        return probability, cam

    def score(self, pixels: NDArray[np.uint8]) -> float:
        """Return the probability of one displayed picture, uint8 [rows, columns]."""
        return round(float(self(from_display(pixels, INPUT).tensor)[0][0, 0]), 6)


def held_out_scores(reference: Reference, pictures: measure.TrainingSet) -> measures.Scored:
    """Score the held-out patients' pictures, which are 224 x 224 already."""
    chosen = pictures.held_out()
    parts = []
    for batch in pictures.batches(chosen):
        tensor = batch[:, None].astype(np.float32) / np.float32(255)
        parts.append(reference(tensor)[0][:, 0])
    score = np.asarray(np.round(np.concatenate(parts), 6), dtype=np.float64)
    return measures.Scored(pictures.positive[chosen], pictures.source[chosen], score)


def operating_point(scored: measures.Scored) -> OperatingPoint:
    """Choose the threshold and measure it, overall and per source.

    Raises:
        QuantizeError: A class is missing.
    """
    threshold = measures.threshold_for(scored.positive, scored.score, SENSITIVITY)
    sensitivity = measures.sensitivity_of(scored, threshold)
    specificity = measures.specificity_of(scored, threshold)
    if sensitivity is None or specificity is None:
        raise QuantizeError("an operating point needs positive and negative pictures", hint="check the labels of the set")
    return OperatingPoint(
        label=LABEL,
        threshold=threshold,
        sensitivity=sensitivity,
        specificity=specificity,
        measured_on=f"{HELD_OUT}: {len(scored.score)} pictures, {int(scored.positive.sum())} positive",
        per_source=measures.per_source(scored, threshold),
    )


def histogram(scored: measures.Scored) -> ScoreHistogram:
    """Count the scores in twenty bins from 0 to 1."""
    edges = [round(0.05 * i, 2) for i in range(21)]
    counts, _ = np.histogram(scored.score, bins=edges)
    return ScoreHistogram(label=LABEL, edges=edges, counts=counts.tolist(), measured_on=HELD_OUT)


def golden_cases(reference: Reference, directory: Path) -> list[Golden]:
    """Draw the golden phantoms, let the float model answer, and write ``golden/*.npz``."""
    (directory / "golden").mkdir()
    cases = []
    for name, phantom in GOLDEN.items():
        pixels = display(phantom)
        probability, cam = reference(from_display(pixels, INPUT).tensor)
        buffer = io.BytesIO()
        rounded = np.round(probability, 5)
        np.savez_compressed(buffer, pixels=pixels, probability=rounded, cam=np.round(cam, 4))
        relative = f"golden/{name}.npz"
        digest = _write(directory, relative, buffer.getvalue())
        expected = {LABEL: round(float(rounded[0, 0]), 5)}
        cases.append(Golden(input=relative, sha256=digest, expected=expected, tolerance=dict(TOLERANCE)))
    return cases


def gate_record(scored: measures.Scored, point: OperatingPoint, independent: Sequence[SourceMeasure]) -> dict[str, Any]:
    """Return ``gate.json``: what every other precision will be held against. fp32 is the reference itself."""
    return {
        "schema": 1,
        "reference": "fp32",
        "dataset": point.measured_on,
        "auc_over_all_sources": measures.auc(scored.positive, scored.score),
        "note": "fp32 is the reference: its deviation from itself is 0 by definition. Compare an AUC only within one source.",
        "variants": {
            "fp32": {
                "passed": True,
                "max_abs_delta": 0.0,
                "threshold": point.threshold,
                "sensitivity": point.sensitivity.model_dump(),
                "specificity": point.specificity.model_dump(),
                "per_source": [entry.model_dump() for entry in point.per_source],
            }
        },
        "independent": [entry.model_dump() for entry in independent],
    }


def build(shared: Path, out: Path) -> Manifest:
    """Write the bundle into ``out``, replacing what is there, and return its manifest.

    The files are made beside ``out`` and checked as the box checks them before they take its place.

    Raises:
        QuantizeError: Weights or pictures are missing.
    """
    weights = shared / "models" / "cxr_pneumonia" / WEIGHTS
    reference = Reference.open(weights)
    scored = held_out_scores(reference, measure.TrainingSet.load(shared / "data" / "cxr_train_224.npz"))
    point = operating_point(scored)
    apart = measure.independent(shared / "data", reference.score)
    independent = measures.per_source(apart, point.threshold) if apart else []
    staging = out.with_name(out.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    gate = gate_record(scored, point, independent)
    documents = {
        "MODEL_CARD.md": card.card(VERSION, point, independent),
        "gate.json": json.dumps(gate, ensure_ascii=False, indent=2) + "\n",
    }
    listed = [Document(file=name, sha256=_write(staging, name, text.encode())) for name, text in documents.items()]
    golden = golden_cases(reference, staging)
    digest = _write(staging, WEIGHTS, weights.read_bytes())
    manifest = _manifest(point, histogram(scored), golden, listed, digest)
    _write(staging, MANIFEST_NAME, manifest.to_json())
    ModelBundle.load(staging)
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return manifest


def _manifest(point: OperatingPoint, scores: ScoreHistogram, golden: list[Golden], documents: list[Document], weights: str) -> Manifest:
    code = Code(scheme="SCT", value="233604007", meaning="Pneumonia")
    return Manifest(
        schema=1,
        name=NAME,
        version=VERSION,
        task="classification",
        title=card.TITLE,
        labels=[Label(name=LABEL, title=Text(zh="肺炎", en="Pneumonia"), code=code)],
        applies_to=APPLIES_TO,
        intended_use=card.INTENDED_USE,
        registration=Registration(number=None, device_class=None, pccp_id=None),
        change_kind="algorithm",
        input=INPUT,
        outputs=[
            OutputSpec(name="probability", kind="probability", shape=["n", 1]),
            OutputSpec(name="cam", kind="cam", shape=["n", 1, 7, 7]),
        ],
        explain=Explain(output="cam", kind="cam"),
        operating_points=[point],
        variants=[Variant(precision="fp32", file=WEIGHTS, sha256=weights, recipe="quantize/reference/train.py", gate="gate.json")],
        golden=golden,
        reference_scores=[scores],
        training_data=card.TRAINING_DATA,
        licence="Apache-2.0",
        min_appliance_version="0.1.0",
        documents=documents,
    )


def _write(directory: Path, relative: str, raw: bytes) -> str:
    """Write a file and return its SHA-256."""
    (directory / relative).write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Build the reference bundle and print its operating point."""
    parser = argparse.ArgumentParser(prog="python -m quantize.reference.build", description=main.__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/ and models/")
    parser.add_argument("--out", type=Path, required=True, help="bundle directory; replaced")
    options = parser.parse_args(argv)
    try:
        manifest = build(options.shared, options.out)
    except QuantizeError as error:
        print(error)
        return 1
    point = manifest.operating_point(LABEL)
    print(f"{manifest.name} {manifest.version}: threshold {point.threshold:.4f}")
    print(f"  sensitivity {point.sensitivity.value:.4f} ({point.sensitivity.low:.4f} to {point.sensitivity.high:.4f})")
    print(f"  specificity {point.specificity.value:.4f} ({point.specificity.low:.4f} to {point.specificity.high:.4f})")
    for case in manifest.golden:
        print(f"  {case.input}: {case.expected[LABEL]:.5f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
