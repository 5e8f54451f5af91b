"""Build the reference bundle with the pipeline of ``quantize run``, from the trained weights, the localisation head and the pictures.

``python -m quantize.reference.build --shared ../shared --out appliance/bundles/cxr-pneumonia`` writes the pictures of the held-out
patients as the evaluation set and some of the others as the calibration set, draws the golden phantoms (no picture of a patient gets into
the bundle), and runs the pipeline on ``draft.toml``. Figures are rounded where float noise between processors begins, so that a second
run on the same machine writes the same bytes.

It builds on any processor. Without VNNI, int8 with weights of 7 bits is gated and timed as on any other; int8 with weights of 8 bits is
gated in float on OpenVINO, which would clip its sums (``quantize.gate.processor_kinds``).
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from appliance.imaging.preprocessing import from_display
from model_sync.bundle import InputSpec, SourceMeasure
from quantize.bundle.model_card import gate_chapter
from quantize.draft import Draft
from quantize.errors import DONE, QuantizeError, run_command
from quantize.gate import roc_statistics
from quantize.pipeline import BundleRecipe, CardInputs, RunResult, run, write_report
from quantize.progress import Progress
from quantize.recipes import modelopt
from quantize.recipes.variant_makers import all_makers
from quantize.reference import localisation_head, model_card, training_set
from quantize.reference.phantom import Opacity, Phantom, display
from quantize.report import plots

DRAFT: Final = Path(__file__).with_name("draft.toml")
_WRITTEN: Final = Draft.load(DRAFT)
NAME: Final = _WRITTEN.name
VERSION: Final = _WRITTEN.version
LABEL: Final = _WRITTEN.label_names[0]
SENSITIVITY: Final = _WRITTEN.operating_points[0].sensitivity
INPUT: Final[InputSpec] = _WRITTEN.input
WEIGHTS: Final = "cxr_pneumonia_fp32.onnx"
HELD_OUT: Final = "patient-disjoint tenth of cxr_train_224.npz, seed 7"
CALIBRATION: Final = 256
CALIBRATION_SEED: Final = 7

GOLDEN: Final[dict[str, Phantom]] = {
    "normal": Phantom(512, 512, seed=1),
    "normal-tall": Phantom(600, 470, seed=8),
    "opacity-right-lower": Phantom(512, 440, seed=2, opacity=Opacity()),
    "opacity-right-upper": Phantom(512, 512, seed=3, opacity=Opacity(x=-0.18, y=0.30, size=0.09)),
    "opacity-left-lower": Phantom(512, 512, seed=1, opacity=Opacity(x=0.20, y=0.60)),
    "opacity-wide-picture": Phantom(420, 520, seed=9, opacity=Opacity(size=0.13)),
}


@dataclass(frozen=True)
class Reference:
    """The float model in one ONNX Runtime session on the CPU with one thread, so that results are reproducible."""

    session: Any

    @classmethod
    def open(cls, weights: Path) -> Reference:
        """Load the ONNX file.

        Raises:
            QuantizeError: the file does not exist.
        """
        if not weights.is_file():
            raise QuantizeError(f"there is no model at {weights}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return cls(onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"]))

    def __call__(self, tensor: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return probability [n, 1] and class activation map [n, 1, 14, 14] of ``tensor`` [n, 1, 224, 224]."""
        probability, cam = self.session.run(["probability", "cam"], {INPUT.name: tensor})
        return probability, cam

    def score(self, pixels: NDArray[np.uint8]) -> float:
        """Return the probability of one displayed picture, uint8 [rows, columns]."""
        return round(float(self(from_display(pixels, INPUT).tensor)[0][0, 0]), 6)


def write_image_sets(shared: Path, directory: Path) -> None:
    """Write calibration, evaluation and golden pictures below ``directory``, as any team would give them.

    The JPEG files are those of the training set, byte for byte; golden pictures that exist already are kept.

    Raises:
        QuantizeError: the training pictures do not exist.
    """
    images = training_set.TrainingSet.load(shared / "data" / "cxr_train_224.npz")
    held_out = images.held_out()
    others = np.flatnonzero(~held_out)
    drawn = np.sort(np.random.default_rng(CALIBRATION_SEED).choice(others, CALIBRATION, replace=False))
    for name, indices in (("evaluation", np.flatnonzero(held_out)), ("calibration", drawn)):
        _write_image_set(images, indices, directory / name)
    golden = directory / "golden"
    if not golden.is_dir():
        golden.mkdir(parents=True)
        for name, phantom in GOLDEN.items():
            Image.fromarray(display(phantom)).save(golden / f"{name}.png")


def _write_image_set(images: training_set.TrainingSet, indices: NDArray[np.intp], directory: Path) -> None:
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with (part / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", LABEL, "source", "patient"])
        for index in indices.tolist():
            name = f"{index:05d}.jpg"
            (part / name).write_bytes(images.blob[images.offsets[index] : images.offsets[index + 1]])
            writer.writerow([name, int(images.positive[index]), images.source[index], images.patient[index]])
    shutil.rmtree(directory, ignore_errors=True)
    part.rename(directory)


def build(
    shared: Path, out: Path, progress: Progress | None = None, *, only: Sequence[str] = (), optimizer: modelopt.Optimizer | str = ""
) -> RunResult:
    """Write the bundle into ``out``, replacing an earlier one; an interrupted build is resumed.

    Args:
        shared: directory with ``data`` and ``models``.
        out: the bundle's directory.
        progress: shows the progress; standard error by default.
        only: names of the candidates to try (``quantize.recipes.variant_makers.all_makers``); all when empty.
        optimizer: the nvidia-modelopt whose variants are tried too, or why there is none.

    Raises:
        QuantizeError: weights or pictures are missing; or see ``quantize.pipeline.run``.
    """
    makers = tuple(maker for maker in (*all_makers(), *modelopt.makers(optimizer)) if not only or maker.name in only)
    sets = out.with_name(out.name + ".sets")
    write_image_sets(shared, sets)
    weights = localisation_head.compose(shared / "models" / "cxr_pneumonia" / WEIGHTS, sets / WEIGHTS)
    reference = Reference.open(weights)
    apart = training_set.independent(shared / "data", reference.score)

    def independent(results: CardInputs) -> list[SourceMeasure]:
        return roc_statistics.per_source(apart, results.context.thresholds[0]) if apart else []

    def write_card(results: CardInputs) -> str:
        point = results.operating.points[0]
        return model_card.card(VERSION, point, independent(results), gate_chapter(results.context, results.shipped))

    recipe = BundleRecipe(
        weights, DRAFT, sets / "calibration", sets / "evaluation", out, golden=sets / "golden", one_int8=True, replace=True,
        measured_on=HELD_OUT, makers=makers, optimizer=optimizer, write_card=write_card,
        more=lambda results: {"independent": [entry.model_dump() for entry in independent(results)]},
    )  # fmt: skip
    result = run(recipe, progress)
    shutil.rmtree(sets)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Build the reference bundle; its report comes beside it, or where --report says."""
    parser = argparse.ArgumentParser(prog="python -m quantize.reference.build", description=main.__doc__)
    parser.add_argument(
        "--shared",
        type=Path,
        required=True,
        help="directory with data/cxr_train_224.npz (pictures) and models/cxr_pneumonia/ (weights); not in the repository",
    )
    parser.add_argument("--out", type=Path, required=True, help="bundle directory; replaced")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="try these candidates only, such as fp16; all otherwise")
    modelopt.add_options(parser)
    parser.add_argument("--report", type=Path, help="directory for the report and its record; that of --out otherwise")
    options = parser.parse_args(argv)
    return run_command(lambda: _build(options))


def _build(options: argparse.Namespace) -> int:
    plots.require()
    result = build(options.shared, options.out, only=options.only, optimizer=modelopt.find_from_options(options))
    write_report(result, options.out if options.report is None else options.report / options.out.name)
    point = result.manifest.operating_point(LABEL)
    print(f"threshold {point.threshold:.4f}")
    print(f"  sensitivity {point.sensitivity.value:.4f} ({point.sensitivity.low:.4f} to {point.sensitivity.high:.4f})")
    print(f"  specificity {point.specificity.value:.4f} ({point.specificity.low:.4f} to {point.specificity.high:.4f})")
    for case in result.manifest.golden:
        print(f"  {case.input}: {case.expected[LABEL]:.5f}")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
