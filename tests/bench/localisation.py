"""Where the reference model looks: on phantoms, whose opacity is known, and on real positive pictures, how large the outline is.

The peak is right where the drawn opacity has at least a quarter of its greatest strength. An outline touches the background where one of
its points lies in the air that the phantom has beside its body.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from appliance.imaging.body_mask import body_mask
from appliance.imaging.postprocessing import ScoredLabel, classify
from appliance.imaging.preprocessing import from_display
from appliance.lifecycle.model_control import reference_bundle
from appliance.runtime import Candidate, open_runtime
from model_sync.bundle import ModelBundle
from quantize.reference.anatomy import Grid, body_depth, lung_depth
from quantize.reference.phantom import Opacity, Phantom, display, drawn_opacity

ROOT: Final = Path(__file__).resolve().parents[2]
_IN_OPACITY: Final = 0.25
_SIZES: Final = ((448, 448), (512, 436), (480, 552))
# Of the air that a lung has where it is deepest; elsewhere the heart and the chest wall hide an opacity.
_IN_LUNG: Final = 0.6


@dataclass(frozen=True)
class Located:
    """One positive picture.

    Attributes:
        area: the share of the picture that the outline encloses.
        in_opacity: whether the peak lies in the drawn opacity; None for a real picture.
        touches_background: whether a point of an outline lies beside the body of a phantom; None for a real picture.
        outside_body: whether the strongest evidence lay outside the body.
    """

    area: float
    in_opacity: bool | None
    touches_background: bool | None
    outside_body: bool


class Analyser:
    """A model of one label on ONNX Runtime, its variant with the most exact numbers."""

    def __init__(self, directory: Path) -> None:
        bundle = ModelBundle.load(directory)
        self._manifest = bundle.manifest
        variant = bundle.variant("fp32")
        spec = self._manifest.image_input
        self._runtime = open_runtime(bundle.path(variant.file), spec, Candidate("onnxruntime", variant.file, "fp32"))

    def analyse(self, picture: NDArray[np.uint8]) -> ScoredLabel:
        """Score and locate a picture as displayed, uint8 [rows, columns], as the box does."""
        prepared = from_display(picture, self._manifest.image_input)
        outputs = self._runtime.infer({self._manifest.image_input.name: prepared.tensor})
        return classify(outputs, self._manifest, prepared.geometry, body_mask(picture))[0]


def phantoms(count: int, first_seed: int = 20_000) -> Iterator[Phantom]:
    """Frontal chests with an opacity of another place, size and strength each; the same for the same seed."""
    for seed in range(first_seed, first_seed + count):
        rng = np.random.default_rng(seed)
        rows, cols = _SIZES[seed % len(_SIZES)]
        depth = lung_depth(Grid.of(200, 200))
        while True:
            x, y = rng.choice((-1, 1)) * rng.uniform(0.08, 0.30), rng.uniform(0.22, 0.72)
            if depth[int((y - 0.045) / 0.9 * 200), int(x / 0.9 * 200 + 100)] >= _IN_LUNG:
                break
        yield Phantom(rows, cols, seed, opacity=Opacity(x, y, rng.uniform(0.06, 0.13), rng.uniform(0.6, 1.0)))


def locate_phantoms(analyser: Analyser, count: int) -> list[Located]:
    """Analyse ``count`` phantoms and return the positive ones."""
    found = []
    for phantom in phantoms(count):
        scored = analyser.analyse(display(phantom))
        location = scored.localisation
        if not scored.positive or location is None:
            continue
        added = drawn_opacity(phantom)
        air = body_depth(Grid.of(phantom.rows, phantom.cols)) <= 0
        points = [point for polygon in location.outline for point in polygon]
        found.append(
            Located(
                enclosed_share(location.outline, added.shape),
                bool(added[_pixel(location.peak, added.shape)] >= _IN_OPACITY * added.max()),
                any(bool(air[_pixel(point, air.shape)]) for point in points),
                location.outside_body,
            )
        )
    return found


def locate_real(analyser: Analyser, data: Path) -> list[Located]:
    """Analyse the frontal pictures labelled pneumonia of ``cxr_labels.csv`` and return the positive ones."""
    with (data / "cxr_labels.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["view"] != "L" and row["pneumonia"] == "1"]
    found = []
    for row in rows:
        picture = np.asarray(Image.open(data / row["file"]).convert("L"), dtype=np.uint8)
        scored = analyser.analyse(picture)
        if scored.positive and scored.localisation is not None:
            location = scored.localisation
            found.append(Located(enclosed_share(location.outline, picture.shape), None, None, location.outside_body))
    return found


def enclosed_share(polygons: Sequence[Sequence[tuple[float, float]]], shape: tuple[int, ...]) -> float:
    """The share of a picture of ``shape`` [rows, columns] inside closed polygons; one inside another is a hole."""
    total = 0.0
    for polygon in polygons:
        x, y = np.array(polygon).T
        total += float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
    return abs(total) / (shape[0] * shape[1])


def _pixel(point: tuple[float, float], shape: tuple[int, ...]) -> tuple[int, int]:
    return min(int(point[1]), shape[0] - 1), min(int(point[0]), shape[1] - 1)


def run(count: int, bundle: Path | None = None) -> list[dict[str, Any]]:
    """Measure and return rows: name, measured, target (None: to compare with), unit."""
    analyser = Analyser(bundle or reference_bundle())
    drawn = locate_phantoms(analyser, count)
    rows = [
        _row(f"phantoms that are positive, of {count} with an opacity", len(drawn), None),
        _row("peak in the drawn opacity", 100 * np.mean([item.in_opacity for item in drawn]), 95, "%"),
        _row("outline, median share of the picture", 100 * np.median([item.area for item in drawn]), 15, "%"),
        _row("outlines that touch the background", sum(item.touches_background is True for item in drawn), 0),
        _row("strongest evidence outside the body", sum(item.outside_body for item in drawn), None),
    ]
    data = ROOT.parent / "shared" / "data"
    if data.is_dir():
        real = locate_real(analyser, data)
        areas = np.array([item.area for item in real])
        rows += [
            _row("real pictures with pneumonia that are positive", len(real), None),
            _row("their outline, median share of the picture", 100 * np.median(areas), 15, "%"),
            _row("their outline, smallest", 100 * areas.min(), None, "%"),
            _row("their outline, largest", 100 * areas.max(), None, "%"),
            _row("strongest evidence outside the body, real", sum(item.outside_body for item in real), None),
        ]
    return rows


def _row(name: str, measured: float, target: float | None, unit: str = "") -> dict[str, Any]:
    return {"name": name, "measured": float(measured), "target": target, "unit": unit}


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table; a share that is to be high is the peak's."""
    print("\n| localisation | measured | target |\n|---|---|---|")
    for row in rows:
        sign = "≥" if row["target"] == 95 else "≤"
        target = "" if row["target"] is None else f"{sign} {row['target']:g} {row['unit']}".rstrip()
        print(f"| {row['name']} | {row['measured']:.3g} {row['unit']} | {target} |".replace("  |", " |"))
