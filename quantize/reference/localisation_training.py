"""How the localisation head is trained, in PyTorch on the CPU; imported only where it is trained, never on a box.

Four kinds of pictures train it: the training films with their labels, unchanged and augmented; normal training films with an opacity drawn
into a lung; phantoms with an opacity; phantoms without one. In the second and third kind the place of the opacity is known: the loss makes
the cells inside it higher than the cells outside. The weights before the head do not change, so their features are computed once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import nn

from appliance.imaging.preprocessing import from_display
from quantize.gate.roc_statistics import Scored, auc, per_source
from quantize.reference import anatomy
from quantize.reference.build import INPUT
from quantize.reference.localisation_head import CELLS, CHANNELS, FEATURES, Features, open_trunk, run_trunk
from quantize.reference.phantom import Opacity, Phantom, display, drawn_opacity
from quantize.reference.train import augment, average, expose, sampling_weights
from quantize.reference.training_set import TrainingSet

_SIDE: Final = INPUT.height
_BATCH: Final = 32
# Seeds of the phantoms; tests and bench use others.
_OPAQUE_SEED: Final = 500_000
_NORMAL_SEED: Final = 600_000
# Of the greatest attenuation that an opacity adds: where more is added counts as the opacity.
_IN_OPACITY: Final = 0.25
# Of the area of a cell, covered by the opacity: a cell is in it, or beside it; what lies between is not used.
_COVERED, _FREE = 0.4, 0.05
_WIDTH: Final = 96

Picture = NDArray[np.float32]
Example = tuple[Picture, NDArray[np.bool_]]
"""A picture [224, 224] in 0..1, and the pixels of its drawn opacity."""


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of the shipped head; the kinds' figures are numbers of pictures, ``augmented`` is per training film."""

    epochs: int = 8
    batch: int = 64
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.03
    averaging: float = 0.995
    location: float = 0.3
    augmented: int = 1
    drawn_into_films: int = 2000
    phantoms: int = 1300
    normal_phantoms: int = 600
    balance: float = 0.4
    seed: int = 5


@dataclass(frozen=True)
class Examples:
    """The features of pictures of one kind, and what is to be learnt from them.

    Attributes:
        features: float16 [n, 160, 14, 14].
        target: probability to learn, float32 [n].
        weight: how much an error of the probability counts.
        draws: how often each is drawn, float64 [n].
        covered: part of each cell that the drawn opacity covers, float16 [n, 14, 14]; None where no place is known.
    """

    features: Features
    target: NDArray[np.float32]
    weight: float
    draws: NDArray[np.float64]
    covered: NDArray[np.float16] | None = None


class Head(nn.Module):  # type: ignore[misc]  # torch is no dependency, so its classes are unknown to the checker
    """182,000 parameters; takes features [n, 160, 14, 14] and returns logits [n, 1] and the cells' logits [n, 1, 14, 14]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 4.0
        self.narrow = nn.Conv2d(CHANNELS, _WIDTH, 1)
        self.first = nn.Conv2d(_WIDTH, _WIDTH, 3, 1, 1)
        self.second = nn.Conv2d(_WIDTH, _WIDTH, 3, 1, 1)
        self.cells = nn.Conv2d(_WIDTH, 1, 1)
        nn.init.constant_(self.cells.bias, -2.0 / self.scale)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest cell is taken out of the exponentials, so that they stay in the range of half precision."""
        x = functional.relu(self.first(functional.relu(self.narrow(features))))
        x = functional.relu(self.second(x) + x)
        cells = self.cells(functional.dropout2d(x, 0.1, self.training))
        if self.scale != 1:
            cells = cells * self.scale
        top = cells.amax((2, 3), keepdim=True)
        logits = torch.log(torch.exp(cells - top).mean((2, 3), keepdim=True)) + top
        return logits.flatten(1), cells

    def fold_scale(self) -> None:
        """Multiply the last convolution by its scale, once, for the export."""
        with torch.no_grad():
            self.cells.weight.mul_(self.scale)
            self.cells.bias.mul_(self.scale)
        self.scale = 1.0


class _Exported(nn.Module):  # type: ignore[misc]
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, cells = self.head(features)
        return torch.sigmoid(logits), cells


def train(shared: Path, out: Path, recipe: Recipe | None = None) -> Iterator[str]:
    """Train the head, write it to ``out``, and yield lines for people: the progress, then the AUC on the held-out patients."""
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    pictures = TrainingSet.load(shared / "data" / "cxr_train_224.npz")
    trunk = open_trunk(shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx")
    with tempfile.TemporaryDirectory() as folder:
        examples = []
        for example in _make_examples(pictures, trunk, recipe, Path(folder)):
            examples.append(example)
            yield f"{len(example.features)} pictures of kind {len(examples)} of {4 + recipe.augmented}"
        head = Head()
        mean = Head()
        mean.load_state_dict(head.state_dict())
        yield from _fit(head, mean, examples, recipe)
    mean.eval()
    held_out = np.flatnonzero(pictures.held_out())
    yield from _figures(mean, pictures, trunk, held_out)
    export(mean, out)
    yield f"written: {out}, {out.stat().st_size} bytes"


def export(head: Head, path: Path) -> None:
    """Write ``head`` as ONNX, opset 17, with a free batch size."""
    head.fold_scale()
    names = [FEATURES, "probability", "cam"]
    torch.onnx.export(
        _Exported(head.eval()), (torch.rand(1, CHANNELS, CELLS, CELLS),), str(path), input_names=names[:1], output_names=names[1:],
        opset_version=17, dynamo=False, dynamic_axes={name: {0: "n"} for name in names},
    )  # fmt: skip


def _make_examples(pictures: TrainingSet, trunk: Any, recipe: Recipe, folder: Path) -> Iterator[Examples]:
    """Yield the kinds of examples, the training films first."""
    rng = np.random.default_rng(recipe.seed)
    training = ~pictures.held_out()
    chosen = np.flatnonzero(training)
    positive = pictures.positive[chosen].astype(np.float32)
    draws = sampling_weights(pictures, training, recipe.balance)
    draws = draws / draws.mean()
    films = [_film(pictures, int(index)) for index in chosen]
    for turn in range(1 + recipe.augmented):
        made = (_moved(film) if turn else film for film in films)
        features, logits = _features(trunk, made, len(films), folder / f"films{turn}")
        # Half of what the trained weights said of the very picture, half of its label.
        taught = 0.5 / (1 + np.exp(-logits)) + 0.5 * (0.96 * positive + 0.02)
        yield Examples(features, taught.astype(np.float32), 1.0, draws)
    normal = [film for film, ill in zip(films, positive, strict=True) if not ill]
    for name, target, weight, count, make in (
        ("drawn", 0.90, 0.3, recipe.drawn_into_films, lambda: draw_into_film(normal[rng.integers(len(normal))], rng)),
        ("phantoms", 0.97, 0.5, recipe.phantoms, _phantom_maker(_OPAQUE_SEED, rng, is_opaque=True)),
        ("normal", 0.03, 0.5, recipe.normal_phantoms, _phantom_maker(_NORMAL_SEED, rng, is_opaque=False)),
    ):
        covered = np.zeros((count, CELLS, CELLS), np.float16)
        features, _ = _features(trunk, _exposed(make, covered, rng), count, folder / name)
        yield Examples(features, np.full(count, target, np.float32), weight, np.ones(count), covered if covered.any() else None)


def _features(trunk: Any, pictures: Iterable[Picture], count: int, path: Path) -> tuple[Features, NDArray[np.float32]]:
    """Run the weights before the head on ``count`` pictures; the features lie in a file, since they may exceed the memory."""
    features = np.lib.format.open_memmap(path, "w+", np.float16, (count, CHANNELS, CELLS, CELLS))
    logits = np.zeros(count, np.float32)
    iterator = iter(pictures)
    for start in range(0, count, _BATCH):
        batch = np.stack(list(islice(iterator, min(_BATCH, count - start))))[:, None].astype(np.float32)
        features[start : start + len(batch)], logits[start : start + len(batch)] = run_trunk(trunk, batch)
    return features, logits


def _exposed(make: Callable[[], Example], covered: NDArray[np.float16], rng: np.random.Generator) -> Iterator[Picture]:
    """Yield drawn pictures, six of ten exposed otherwise, and write into ``covered`` where their opacity is."""
    for index in range(len(covered)):
        picture, mask = make()
        cell = _SIDE // CELLS
        covered[index] = mask.reshape(CELLS, cell, CELLS, cell).mean((1, 3))
        if rng.random() < 0.6:
            picture = expose(torch.from_numpy(picture)[None, None]).clamp(0, 1)[0, 0].numpy()
        yield picture


def _film(pictures: TrainingSet, index: int) -> Picture:
    return np.asarray(pictures.picture(index) / 255, np.float32)


def _moved(film: Picture) -> Picture:
    return np.asarray(augment(torch.from_numpy(film)[None, None])[0, 0].numpy(), np.float32)


def draw_into_film(film: Picture, rng: np.random.Generator) -> Example:
    """Draw an opacity into a film, [224, 224] in 0..1, where it is dark within its trunk: mostly in a lung."""
    if rng.random() < 0.5:
        film = film[:, ::-1]
    blurred = Image.fromarray((film * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(5))
    smooth = np.asarray(blurred, np.float32) / 255
    dark, bright = np.percentile(smooth[40:180, 30:194], (10, 90))
    air = np.clip((dark + 0.65 * (bright - dark) - smooth) / (0.35 * (bright - dark) + 1e-3), 0, 1) * (smooth > 0.05)
    coarse = 56
    at = (np.arange(coarse, dtype=np.float32) + 0.5) / coarse
    grid = anatomy.Grid(coarse, coarse, (at - 0.5)[None], at[:, None])
    small_air = np.asarray(Image.fromarray(np.asarray(air, np.float32)).resize((coarse, coarse)))
    candidates = []
    for _ in range(4):
        opacity = Opacity(rng.uniform(-0.36, 0.36), rng.uniform(0.2, 0.78), rng.uniform(0.05, 0.13), rng.uniform(0.5, 1))
        patch = anatomy.patch(grid, opacity, rng)
        candidates.append((float((patch * small_air).sum() / opacity.size), patch, opacity))
    _, patch, opacity = max(candidates, key=lambda candidate: candidate[0])
    large = np.asarray(Image.fromarray(np.asarray(patch, np.float32)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) * air
    added = (0.30 + 0.35 * rng.random()) * opacity.strength * large
    return np.clip(film + added, 0, 1).astype(np.float32), added >= _IN_OPACITY * max(float(added.max()), 1e-3)


def _phantom_maker(first_seed: int, rng: np.random.Generator, *, is_opaque: bool) -> Callable[[], Example]:
    """Return a function that draws another phantom at each call; the opacity lies where a lung is deep enough to show it."""
    depth = anatomy.lung_depth(anatomy.Grid.of(200, 200))
    seeds = iter(range(first_seed, first_seed + 100_000))

    def make() -> Example:
        rows = int(rng.choice((288, 352, 416)))
        opacity = None
        while is_opaque and opacity is None:
            x, y = rng.choice((-1, 1)) * rng.uniform(0.07, 0.31), rng.uniform(0.2, 0.74)
            if depth[int((y - 0.045) / 0.9 * 200), int(x / 0.9 * 200 + 100)] >= 0.5:
                opacity = Opacity(x, y, rng.uniform(0.05, 0.14), rng.uniform(0.5, 1))
        phantom = Phantom(rows, int(rows * rng.uniform(0.78, 1.2)), next(seeds), opacity=opacity)
        picture = from_display(display(phantom), INPUT).tensor[0, 0]
        if opacity is None:
            return picture, np.zeros((_SIDE, _SIDE), np.bool_)
        added = drawn_opacity(phantom)
        return picture, from_display((added >= _IN_OPACITY * added.max()).astype(np.uint8) * 255, INPUT).tensor[0, 0] > 0.5

    return make


def _fit(head: Head, mean: Head, examples: list[Examples], recipe: Recipe) -> Iterator[str]:
    """Train ``head`` and average it into ``mean``; yield a line for each epoch."""
    rng = np.random.default_rng(recipe.seed)
    draws = np.concatenate([kind.draws for kind in examples])
    batches = len(draws) // recipe.batch
    optimiser = torch.optim.AdamW(head.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, total_steps=recipe.epochs * batches, pct_start=0.15)
    head.train()
    for epoch in range(recipe.epochs):
        order = rng.choice(len(draws), batches * recipe.batch, p=draws / draws.sum())
        total = 0.0
        for step, chosen in enumerate(np.split(order, batches)):
            loss = _loss(head, examples, chosen, recipe.location, is_mirrored=bool(rng.random() < 0.3))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            average(mean, head, epoch * batches + step, recipe.averaging)
            total += loss.item()
        yield f"epoch {epoch + 1} of {recipe.epochs}: loss {total / batches:.4f}"


def _loss(head: Head, examples: list[Examples], chosen: NDArray[np.intp], location: float, *, is_mirrored: bool) -> torch.Tensor:
    features, target, weight, covered = [], [], [], []
    firsts = np.cumsum([0, *(len(kind.features) for kind in examples)])
    for index in chosen:
        kind = int(np.searchsorted(firsts, index, "right")) - 1
        own, at = examples[kind], index - firsts[kind]
        features.append(own.features[at])
        target.append(own.target[at])
        weight.append(own.weight)
        covered.append(np.zeros((CELLS, CELLS), np.float16) if own.covered is None else own.covered[at])
    x, places = torch.from_numpy(np.stack(features)).float(), torch.from_numpy(np.stack(covered)).float()
    if is_mirrored:
        x, places = x.flip(3), places.flip(2)
    logits, cells = head(x)
    errors = functional.binary_cross_entropy_with_logits(logits[:, 0], torch.tensor(target), reduction="none")
    return (errors * torch.tensor(weight)).mean() + location * _location_loss(cells[:, 0], places)


def _location_loss(cells: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """How much of the evidence lies beside the drawn opacity; 0 where no picture of the batch has one."""
    inside, outside = (covered > _COVERED).flatten(1), (covered < _FREE).flatten(1)
    known = inside.any(1)
    if not known.any():
        return torch.zeros(())
    values, inside, outside = cells.flatten(1)[known], inside[known], outside[known]
    evidence = functional.softplus(values)
    share = ((evidence * inside).sum(1) + 1e-3) / ((evidence * (inside | outside)).sum(1) + 1e-3)
    both = values.masked_fill(~(inside | outside), -1e4)
    contrast = torch.logsumexp(both, 1) - torch.logsumexp(values.masked_fill(~inside, -1e4), 1)
    return (contrast - 0.5 * torch.log(share)).mean()


def _figures(head: Head, pictures: TrainingSet, trunk: Any, held_out: NDArray[np.intp]) -> Iterator[str]:
    """Compare head and trained weights on the held-out patients."""
    scores: dict[str, list[float]] = {"trained weights": [], "head": []}
    with torch.inference_mode():
        for start in range(0, len(held_out), _BATCH):
            films = np.stack([_film(pictures, int(index)) for index in held_out[start : start + _BATCH]])[:, None]
            features, logits = run_trunk(trunk, films)
            scores["trained weights"] += (1 / (1 + np.exp(-logits))).tolist()
            scores["head"] += torch.sigmoid(head(torch.from_numpy(features).float())[0][:, 0]).tolist()
    for name, values in scores.items():
        scored = Scored(pictures.positive[held_out], pictures.source[held_out], np.array(values))
        yield f"held out, {name}: AUC {auc(scored.positive, scored.score):.4f}"
        for measure in per_source(scored, 0.5):
            yield f"  {measure.source}: {measure.n_positive}+/{measure.n_negative}-  AUC {measure.auc}"
