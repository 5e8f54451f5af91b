"""How the network of the input check is trained, in PyTorch on the CPU; imported only where it is trained, never on a box.

One picture of 96 x 96 becomes any of the six classes: it is bent, cut, exposed, written on, turned and inverted while it is drawn for a
batch. Pictures that are no frontal chest film are real or drawn ones, and parts of chest films that are none: half a chest folded onto
itself as a lateral film superimposes the lungs, a small part, two films side by side, a film cut and joined the wrong way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from appliance.imaging.preprocessing import from_display
from quantize.gate.roc_statistics import Flags
from quantize.reference import not_chest
from quantize.reference.anatomy import Opacity
from quantize.reference.input_check import CLASSES, SIDE, Class, input_spec, training_parts
from quantize.reference.phantom import Phantom, display
from quantize.reference.train import average, sampling_weights
from quantize.reference.training_set import TrainingSet

# Films are kept larger than the network's input, so that a part of one is still sharp.
FILM_SIDE: Final = 96
_WIDTHS: Final = (16, 24, 40, 56)
TRAINING_SEED: Final = 11
_DRAWN: Final = 250
_PHANTOMS: Final = 120
_PHANTOM_PART: Final = 0.03
# 1 would draw every source and every kind equally often, 0 as often as it occurs.
_BALANCE: Final = 0.6


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of the shipped weights; the four parts are those of a batch, the rest of it is upright films."""

    steps: int = 500
    batch: int = 112
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.02
    averaging: float = 0.985
    turned: float = 0.27
    negative: float = 0.15
    not_chest: float = 0.16
    chest_parts: float = 0.08
    seed: int = 9


@dataclass(frozen=True)
class Weighted:
    """Pictures for training, uint8 [n, 96, 96], and how often each is drawn."""

    pictures: NDArray[np.uint8]
    weights: NDArray[np.float64]


class Network(nn.Module):  # type: ignore[misc]  # torch is no dependency, so its classes are unknown to the checker
    """58,000 parameters; takes [n, 1, 64, 64] in 0..1 and returns logits [n, 6].

    The last feature map is not averaged: where something is in the picture says which side is up.
    """

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = _WIDTHS
        self.stem = _convolution(1, a, 2)
        self.first = nn.Sequential(_convolution(a, b, 2), _Residual(b))
        self.second = nn.Sequential(_convolution(b, c, 2), _Residual(c))
        self.third = _convolution(c, d, 2)
        self.drop = nn.Dropout(0.1)
        self.classes = nn.Linear(d * (SIDE // 16) ** 2, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits; contrast and brightness are taken out first, because films differ in both."""
        mean = x.mean((2, 3), keepdim=True)
        spread = ((x - mean) ** 2).mean((2, 3), keepdim=True)
        x = (x - mean) / torch.sqrt(spread + 0.002)
        return self.classes(self.drop(self.third(self.second(self.first(self.stem(x)))).flatten(1)))


class _Residual(nn.Module):  # type: ignore[misc]
    """A convolution with a way around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [n, width, h, w] to the same shape."""
        return functional.relu(x + self.convolution(x))


class _Exported(nn.Module):  # type: ignore[misc]
    """What is written as ONNX: the six probabilities."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return probabilities [n, 6]."""
        return torch.softmax(self.network(x), 1)


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def export(network: Network, path: str) -> None:
    """Write ``network`` as ONNX, opset 17, with a free batch size."""
    torch.onnx.export(
        _Exported(network.eval()),
        (torch.rand(1, 1, SIDE, SIDE),),
        path,
        input_names=["image"],
        output_names=["probabilities"],
        opset_version=17,
        dynamo=False,
        dynamic_axes={"image": {0: "n"}, "probabilities": {0: "n"}},
    )


def fit(films: Weighted, others: Weighted, recipe: Recipe) -> Network:
    """Train on upright ``films`` and on ``others``; return the averaged network."""
    # One thread: sums are formed in the same order, however many cores there are.
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    x, y = torch.from_numpy(films.pictures), torch.from_numpy(others.pictures)
    writings = torch.from_numpy(_writings(np.random.default_rng(recipe.seed)))
    network = Network()
    mean: Network = Network()
    mean.load_state_dict(network.state_dict())
    optimiser = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.15)
    network.train()
    n_other = round(recipe.batch * recipe.not_chest)
    for step in range(recipe.steps):
        drawn = torch.multinomial(torch.from_numpy(films.weights), recipe.batch - n_other, replacement=True)
        other = torch.multinomial(torch.from_numpy(others.weights), n_other, replacement=True)
        pictures, classes = draw_batch(x[drawn], y[other], writings, recipe)
        loss = functional.cross_entropy(network(pictures), classes, label_smoothing=recipe.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        average(mean, network, step, recipe.averaging)
        if step % 200 == 0:
            print(f"step {step} of {recipe.steps}: loss {loss.item():.4f}", flush=True)
    mean.eval()
    return mean


def draw_batch(films: torch.Tensor, others: torch.Tensor, writings: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a batch: pictures [n, 1, 64, 64] in 0..1 and their classes [n].

    Args:
        films: upright frontal films, uint8 [n, 96, 96].
        others: pictures that are no frontal chest film, the same shape.
        writings: letters to burn in, uint8 [n, 96, 96], 0 where there are none.
        recipe: the parts of the batch.
    """
    n, total = len(films), len(films) + len(others)
    n_parts, n_turned = round(total * recipe.chest_parts), round(total * recipe.turned)
    n_negative = round(total * recipe.negative)
    parts, zoom = _chest_parts(films[:n_parts].float()[:, None] / 255)
    rest = films[n_parts:].float()[:, None] / 255
    x = torch.cat([parts, others.float()[:, None] / 255, rest])
    classes = torch.full((total,), int(Class.UPRIGHT))
    turns = torch.zeros(total, dtype=torch.long)
    n_other = total - n + n_parts
    classes[:n_other] = int(Class.OTHER)
    # Any part of a picture that is no chest film may be turned or inverted: it is none still.
    turns[:n_other] = torch.randint(0, 4, (n_other,)) * (torch.rand(n_other) < 0.5)
    turned = slice(n_other, n_other + n_turned)
    turns[turned] = torch.randint(1, 4, (n_turned,))
    classes[turned] = turns[turned]
    negative = slice(n_other + n_turned, n_other + n_turned + n_negative)
    turns[negative] = torch.randint(0, 4, (n_negative,)) * (torch.rand(n_negative) < 0.6)
    classes[negative] = int(Class.NEGATIVE)
    inverted = classes == int(Class.NEGATIVE)
    inverted[:n_other] = torch.rand(n_other) < 0.2
    zooms = torch.cat([zoom, torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(total - n_parts, 4)])
    return _photograph(x, turns, inverted, zooms, writings), classes


def _uniform(n: int, low: float, high: float) -> torch.Tensor:
    return torch.empty(n, 1, 1, 1).uniform_(low, high)


def _one_in(n: int, part: float) -> torch.Tensor:
    return torch.rand(n, 1, 1, 1) < part


def _chest_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make pictures of films that are none: returns them and, for each, which part to show: half width, half height, centre x and y."""
    n = len(x)
    kind = torch.rand(n)
    zoom = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(n, 1)
    folded = kind < 0.5
    share = _uniform(n, 0.3, 1)
    x = torch.where(folded[:, None, None, None], x * share + x.flip(3) * (1 - share), x)
    half = torch.stack([torch.empty(n).uniform_(0.4, 0.56), torch.empty(n).uniform_(0.8, 1), torch.empty(n).uniform_(0.38, 0.55)], 1)
    side = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    lateral = torch.stack([half[:, 0], half[:, 1], half[:, 2] * side, torch.zeros(n)], 1)
    small = torch.stack([*(torch.empty(n).uniform_(0.18, 0.36) for _ in "xy"), *(torch.empty(n).uniform_(-0.6, 0.6) for _ in "xy")], 1)
    zoom = torch.where(folded[:, None], lateral, zoom)
    zoom = torch.where(((kind >= 0.5) & (kind < 0.75))[:, None], small, zoom)
    by = torch.randint(FILM_SIDE * 3 // 10, FILM_SIDE * 7 // 10, (1,)).item()
    joined = x.roll(int(by), 2)
    pair = functional.interpolate(x, (FILM_SIDE, FILM_SIDE // 2), mode="area")
    pair = torch.cat([pair, pair.roll(1, 0)], 3)
    x = torch.where(((kind >= 0.75) & (kind < 0.87))[:, None, None, None], joined, x)
    return torch.where((kind >= 0.87)[:, None, None, None], pair, x), zoom


def _photograph(x: torch.Tensor, turns: torch.Tensor, inverted: torch.Tensor, zooms: torch.Tensor, writings: torch.Tensor) -> torch.Tensor:
    """Return the pictures as a box might get them: [n, 1, 64, 64] in 0..1."""
    n = len(x)
    mark = writings[torch.randint(0, len(writings), (n,))].float()[:, None] / 255
    x = torch.maximum(x, mark * _uniform(n, 0.4, 1) * _one_in(n, 0.4))
    x, outside = _bend(x, turns, zooms)
    x = _expose(x)
    x = torch.where(inverted[:, None, None, None], 1 - x, x)
    x = torch.where(_one_in(n, 0.25), functional.avg_pool2d(x, 3, 1, 1), x)
    x = x + torch.randn_like(x) * _uniform(n, 0, 0.015)
    return x.clamp(0, 1).masked_fill(outside, 0)


def _expose(x: torch.Tensor) -> torch.Tensor:
    """Change contrast, brightness and gamma, cut the window, and shade three of ten as a photograph of a lit film is."""
    n = len(x)
    low, high = _uniform(n, -0.25, 0.2), _uniform(n, 0.75, 1.35)
    x = ((x - low) / (high - low)).clamp(0, 1) ** torch.exp(_uniform(n, -0.6, 0.6))
    flat = _one_in(n, 0.3)
    x = x * torch.where(flat, _uniform(n, 0.35, 0.8), 1) + torch.where(flat, _uniform(n, 0, 0.25), 0)
    along = torch.linspace(-1, 1, SIDE)
    y, z = along[:, None], along[None, :]
    far = (y - _uniform(n, -0.4, 0.4)) ** 2 + (z - _uniform(n, -0.4, 0.4)) ** 2
    shade = 1 - far * _uniform(n, 0, 0.35) + y * _uniform(n, -0.25, 0.25) + z * _uniform(n, -0.25, 0.25)
    return torch.where(_one_in(n, 0.3), x * shade.clamp(0.1, 1.3), x).clamp(0, 1)


def _bend(x: torch.Tensor, turns: torch.Tensor, zooms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror, tilt, scale, move and view at an angle, turn by quarters clockwise, and put into a square as letterboxing does.

    The margin of four of ten films is covered, black or of one grey, as a collimator or the border of a scanner does.

    Returns:
        The pictures [n, 1, 64, 64], and where letterboxing fills them.
    """
    n = len(x)
    along = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    y, z = torch.meshgrid(along, along, indexing="ij")
    aspect = torch.exp(_uniform(n, -0.36, 0.36)[:, 0])
    across, down = z / aspect.clamp(max=1), y * aspect.clamp(min=1)
    outside = (across.abs() > 1) | (down.abs() > 1)
    # Seen from the picture on the screen: the film is found by turning back, counter-clockwise.
    for turn in range(1, 4):
        chosen = (turns >= turn)[:, None, None]
        across, down = torch.where(chosen, down, across), torch.where(chosen, -across, down)
    angle, scale = _uniform(n, -0.21, 0.21)[:, 0], _uniform(n, 0.74, 1.22)[:, 0]
    depth = 1 + (_uniform(n, -0.12, 0.12)[:, 0] * across + _uniform(n, -0.12, 0.12)[:, 0] * down) * _one_in(n, 0.4)[:, 0]
    cos, sin = torch.cos(angle) * scale / depth, torch.sin(angle) * scale / depth
    mirror = torch.where(_one_in(n, 0.4)[:, 0], -1.0, 1.0)
    wide, high, middle_x, middle_y = zooms[:, :, None, None].unbind(1)
    source_x = mirror * (across * cos - down * sin + _uniform(n, -0.1, 0.1)[:, 0]) * wide + middle_x
    source_y = (across * sin + down * cos + _uniform(n, -0.1, 0.1)[:, 0]) * high + middle_y
    film = functional.grid_sample(x, torch.stack([source_x, source_y], 3), align_corners=False, padding_mode="border")
    left, right, top, bottom = torch.where(_one_in(n, 0.4), 1 - torch.rand(n, 4, 1, 1) * 0.25, 1.0).unbind(1)
    covered = (source_x < -left) | (source_x > right) | (source_y < -top) | (source_y > bottom)
    ground = torch.where(_one_in(n, 0.65), 0.0, _uniform(n, 0, 1))
    return torch.where(covered[:, None] & _one_in(n, 0.8), ground, film), outside[:, None]


def _writings(rng: np.random.Generator, count: int = 400) -> NDArray[np.uint8]:
    """Draw letters near the border, as markers and annotations are: uint8 [count, 96, 96]."""
    drawn = []
    for _ in range(count):
        picture = Image.new("L", (FILM_SIDE, FILM_SIDE))
        draw = ImageDraw.Draw(picture)
        for _ in range(int(rng.integers(1, 5))):
            word = "".join(rng.choice(list("LRAPSITNGDE0123456789 /"), int(rng.integers(1, 10))))
            along, edge = rng.uniform(0, 0.85), float(rng.choice([rng.uniform(0, 0.15), rng.uniform(0.8, 0.95)]))
            at = (along, edge) if rng.random() < 0.5 else (edge, along)
            draw.text((at[0] * FILM_SIDE, at[1] * FILM_SIDE), word, fill=255, font=ImageFont.load_default(rng.uniform(5, 15)))
        drawn.append(np.asarray(picture))
    return np.stack(drawn)


def film_array(pictures: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Letterbox and resize displayed pictures for ``fit``: uint8 [n, 96, 96]."""
    spec = input_spec(FILM_SIDE)
    return np.concatenate([np.rint(from_display(picture, spec).tensor[0] * 255).astype(np.uint8) for picture in pictures])


def training_films(pictures: TrainingSet, training: Flags) -> Weighted:
    """Return the upright films of the training patients and drawn phantoms."""
    films = film_array(pictures.picture(int(index)) for index in np.flatnonzero(training))
    rng = np.random.default_rng(TRAINING_SEED)
    seeds = range(not_chest.FIRST_TRAINING_SEED, not_chest.FIRST_TRAINING_SEED + _PHANTOMS)
    drawn = (Phantom(256, int(rng.integers(190, 300)), seed, opacity=Opacity() if seed % 3 == 0 else None) for seed in seeds)
    phantoms = film_array(display(phantom) for phantom in drawn)
    weights = sampling_weights(pictures, training, _BALANCE)
    weights = np.concatenate([weights / weights.sum(), np.full(len(phantoms), _PHANTOM_PART / len(phantoms))])
    return Weighted(np.concatenate([films, phantoms]), weights)


def training_others(shared: Path) -> Weighted:
    """Return the pictures for training that are no frontal chest film; kinds are drawn more alike than they occur."""
    seeds = range(not_chest.FIRST_TRAINING_SEED, not_chest.FIRST_TRAINING_SEED + _PHANTOMS)
    pictures = [
        *not_chest.real(shared, input_spec(), held_out=False),
        *not_chest.drawn(TRAINING_SEED, _DRAWN),
        *not_chest.lateral_phantoms(seeds),
    ]
    kinds = np.array([picture.kind for picture in pictures])
    names, counts = np.unique(kinds, return_counts=True)
    size = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return Weighted(film_array(picture.pixels for picture in pictures), np.array([size[kind] ** -_BALANCE for kind in kinds.tolist()]))


def train(shared: Path, recipe: Recipe | None = None) -> Network:
    """Train on the pictures of ``shared``: neither the held-out patients nor those of the validation are among them."""
    pictures = TrainingSet.load(shared / "data" / "cxr_train_224.npz")
    return fit(training_films(pictures, training_parts(pictures)[0]), training_others(shared), recipe or Recipe())
