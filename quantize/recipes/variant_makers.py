"""The variants to try: name, function that writes the ONNX file, and the inputs that the file depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from model_sync.bundle import Precision
from quantize.progress import OnProgress
from quantize.recipes import fp16, int8
from quantize.recipes.int8 import Calibration, Recipe
from quantize.work_directory import WorkDirectory

Activations: TypeAlias = Literal["symmetric", "unsigned"] | None


@dataclass(frozen=True)
class Source:
    """The input of every variant: the cleaned float model and its calibration.

    Attributes:
        model: the cleaned model.
        tensors: the calibration set, float32 [n, ...].
        digest: of the calibration set.
        calibration: the calibration; called when it is first needed, because a resumed run may not need it any more.
    """

    model: Any
    tensors: NDArray[np.float32]
    digest: str
    calibration: Callable[[], Calibration]


@dataclass(frozen=True)
class Maker:
    """One variant to try.

    Attributes:
        name: without blanks.
        precision: as in the manifest.
        activations: as in the manifest.
        recipe: how it is made, in words for the manifest.
        make: writes the ONNX file; raises QuantizeError where it cannot be made.
        family: makers of one family differ in calibration alone; "" for none.
        depends: what else the file depends on, JSON types.
    """

    name: str
    precision: Precision
    activations: Activations
    recipe: str
    make: Callable[[Source, Path, OnProgress], None]
    family: str = ""
    depends: Any = None


def all_makers() -> tuple[Maker, ...]:
    """Return the makers of fp16 and of every int8 recipe."""
    fp16 = Maker("fp16", "fp16", None, "quantize.half: float16, what overflows kept float32", _make_fp16)
    return (fp16, *(int8_maker(recipe) for recipe in int8.recipes()))


def int8_maker(recipe: Recipe, words: str = "") -> Maker:
    """Return the maker of an int8 or mixed variant."""

    def make(source: Source, out: Path, on_progress: OnProgress) -> None:
        int8.quantize(source.model, recipe, source.calibration(), out, on_progress=on_progress)

    name = f"{recipe.precision}-{recipe.name}"
    family = name.removesuffix(f"-{recipe.method}") if recipe.precision == "int8" else ""
    words_of_recipe = (
        words
        or f"quantize.ptq: Q/DQ, {recipe.weight_bits}-bit weights, {recipe.activations} activations, {recipe.method} ranges, "
        f"on {', '.join(recipe.op_types)}"
    )
    depends = [recipe.weight_bits, *recipe.op_types, *sorted(recipe.keep)]
    return Maker(name, recipe.precision, recipe.activations, words_of_recipe, make, family, depends)


def _make_fp16(source: Source, out: Path, on_progress: OnProgress) -> None:
    onnx.save(fp16.convert_to_fp16(source.model, [source.tensors], on_progress=on_progress), out)


def measure_calibration(work: WorkDirectory, model: Any, tensors: NDArray[np.float32], inputs: Any, on_progress: OnProgress) -> Calibration:
    """Measure the model on the calibration set, or load the stored result of an interrupted run."""

    def make(directory: Path) -> dict[str, Any]:
        calibration = int8.calibrate(model, [tensors], on_progress=on_progress)
        names = sorted(calibration.histograms)
        np.savez(directory / "histograms.npz", *(calibration.histograms[name] for name in names))
        return {"extremes": {name: list(map(float, limits)) for name, limits in calibration.extremes.items()}, "names": names}

    directory, stored = work.step("calibration", inputs, make)
    with np.load(directory / "histograms.npz", allow_pickle=False) as arrays:
        histograms = {name: arrays[f"arr_{i}"] for i, name in enumerate(stored["names"])}
    return Calibration({name: (low, high) for name, (low, high) in stored["extremes"].items()}, histograms)


def named(makers: Sequence[Maker], name: str) -> Maker:
    """Return the maker with the name ``name``."""
    return next(maker for maker in makers if maker.name == name)
