"""Train the reference model, on a machine with a GPU and PyTorch; kept so that the training can be repeated.

``python -m quantize.reference.train --shared ../shared --out DIR`` writes ``cxr_pneumonia_fp32.onnx``. It takes about
ten minutes on a data-centre GPU and is not run by the tests. Nothing is chosen by looking at the held-out patients:
the weights of the last step, averaged over the run, are what is exported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantize.gate.roc_statistics import Flags, Scored, auc, per_source
from quantize.reference.training_set import TrainingSet

if TYPE_CHECKING:
    import torch

    from quantize.reference.network import Network


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of the shipped weights."""

    epochs: int = 120
    batch: int = 256
    learning_rate: float = 2e-3
    peak_learning_rate: float = 3e-3
    warm_up_part: float = 0.15
    weight_decay: float = 0.05
    label_smoothing: float = 0.04
    averaging: float = 0.999
    # 1 would draw every group equally often, 0 as often as it occurs.
    balance: float = 0.6


def sampling_weights(pictures: TrainingSet, training: Flags, balance: float) -> NDArray[np.float64]:
    """Return how often each training picture is drawn, so that no source and label dominates.

    A group is the source up to its first bracket, with the label: mirrors of one collection count as one source.
    """
    groups = np.array([f"{name.split('(')[0][:20]}|{int(y)}" for name, y in zip(pictures.source, pictures.positive, strict=True)])
    names, counts = np.unique(groups[training], return_counts=True)
    size = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return np.array([1 / size[group] ** balance for group in groups[training].tolist()])


def augment(x: torch.Tensor) -> torch.Tensor:
    """Return the pictures [n, 1, 224, 224] turned, scaled, moved, mirrored, re-exposed, blurred, noisy and masked.

    The exposure varies most: clinics send photographed films, and windows that a person has set.
    """
    x = _move(x)
    x = expose(x)
    return _mask(x).clamp(0, 1)


def _uniform(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    import torch

    return torch.empty(x.shape[0], device=x.device).uniform_(low, high)


def _move(x: torch.Tensor) -> torch.Tensor:
    import torch
    import torch.nn.functional as functional

    angle = _uniform(x, -0.25, 0.25)
    scale_x, scale_y = _uniform(x, 0.72, 1.12), _uniform(x, 0.72, 1.12)
    shift_x, shift_y = _uniform(x, -0.15, 0.15), _uniform(x, -0.15, 0.15)
    mirror = torch.where(_uniform(x, 0, 1) < 0.3, -1.0, 1.0)
    first = torch.stack([scale_x * torch.cos(angle) * mirror, -scale_y * torch.sin(angle), shift_x], 1)
    second = torch.stack([scale_x * torch.sin(angle) * mirror, scale_y * torch.cos(angle), shift_y], 1)
    grid = functional.affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False, padding_mode="zeros")


def expose(x: torch.Tensor) -> torch.Tensor:
    """Return the pictures [n, 1, h, w] with another contrast, brightness and gamma, some blurred, with noise."""
    import torch
    import torch.nn.functional as functional

    def each(values: torch.Tensor) -> torch.Tensor:
        return values[:, None, None, None]

    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * each(_uniform(x, 0.6, 1.5)) + mean + each(_uniform(x, -0.15, 0.15))
    x = x.clamp(0, 1) ** each(_uniform(x, 0.6, 1.6))
    x = torch.where(each(_uniform(x, 0, 1) < 0.3), functional.avg_pool2d(x, 3, 1, 1), x)
    return x + torch.randn_like(x) * each(_uniform(x, 0, 0.03))


def _mask(x: torch.Tensor) -> torch.Tensor:
    """Black out a rectangle in four of ten pictures, so that no single corner decides."""
    import torch

    side = x.shape[-1]
    along = torch.arange(side, device=x.device)
    half = _uniform(x, 10, 50)[:, None]
    columns = (along[None] - _uniform(x, 0, side)[:, None]).abs() < half
    rows = (along[None] - _uniform(x, 0, side)[:, None]).abs() < half
    chosen = (_uniform(x, 0, 1) < 0.4)[:, None, None]
    return x.masked_fill((columns[:, None, :] & rows[:, :, None] & chosen)[:, None], 0)


def average(mean: Network, network: Network, step: int, limit: float) -> None:
    """Move the averaged weights towards the present ones; early steps weigh more, or the initial weights would remain in the mean."""
    import torch

    decay = min(limit, (1 + step) / (10 + step))
    with torch.no_grad():
        for kept, new in zip(mean.state_dict().values(), network.state_dict().values(), strict=True):
            if kept.dtype.is_floating_point:
                kept.mul_(decay).add_(new, alpha=1 - decay)
            else:
                kept.copy_(new)


def fit(pictures: NDArray[np.uint8], positive: Flags, weights: NDArray[np.float64], recipe: Recipe, device: str) -> Network:
    """Train on ``pictures`` (uint8 [n, 224, 224]) and return the averaged network, on the CPU."""
    import torch

    from quantize.reference.network import Network

    x, y = torch.from_numpy(pictures).to(device), torch.from_numpy(positive.astype(np.float32)).to(device)
    network: Network = Network().to(device).to(memory_format=torch.channels_last)
    mean: Network = Network().to(device)
    mean.load_state_dict(network.state_dict())
    steps = -(-len(pictures) // recipe.batch)
    optimiser = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.peak_learning_rate, total_steps=recipe.epochs * steps, pct_start=recipe.warm_up_part
    )
    draw = torch.from_numpy(weights)
    for epoch in range(recipe.epochs):
        network.train()
        order = torch.multinomial(draw, steps * recipe.batch, replacement=True).to(device)
        for step, chosen in enumerate(order.split(recipe.batch)):
            _one_step(network, optimiser, x[chosen], y[chosen], recipe)
            schedule.step()
            average(mean, network, epoch * steps + step, recipe.averaging)
    mean.eval().float().cpu()
    return mean


def _one_step(network: Network, optimiser: Any, x: torch.Tensor, y: torch.Tensor, recipe: Recipe) -> None:
    import torch
    import torch.nn.functional as functional

    x = augment(x.float()[:, None] / 255).to(memory_format=torch.channels_last)
    target = y[:, None] * (1 - recipe.label_smoothing) + recipe.label_smoothing / 2
    with torch.autocast(x.device.type, torch.bfloat16):
        logits, _ = network(x)
    loss = functional.binary_cross_entropy_with_logits(logits.float(), target)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def predict(network: Network, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the probabilities [n] of ``pictures`` (uint8 [n, 224, 224])."""
    import torch

    scores = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 256):
            x = torch.from_numpy(pictures[start : start + 256]).float()[:, None] / 255
            scores.append(torch.sigmoid(network(x)[0][:, 0]).double().numpy())
    return np.concatenate(scores)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the reference model, export it, and print its AUC per source on the held-out patients."""
    parser = argparse.ArgumentParser(prog="python -m quantize.reference.train", description=main.__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="directory that holds data/cxr_train_224.npz")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the ONNX file into")
    parser.add_argument("--device", default="cuda", help="where PyTorch computes; without a GPU it takes days")
    options = parser.parse_args(argv)
    from quantize.reference.network import export

    pictures = TrainingSet.load(options.shared / "data" / "cxr_train_224.npz")
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(pictures.picture, range(len(pictures.positive)))))
    held_out = pictures.held_out()
    recipe = Recipe()
    weights = sampling_weights(pictures, ~held_out, recipe.balance)
    network = fit(pixels[~held_out], pictures.positive[~held_out], weights, recipe, options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    export(network, str(options.out / "cxr_pneumonia_fp32.onnx"))
    scored = Scored(pictures.positive[held_out], pictures.source[held_out], predict(network, pixels[held_out]))
    print(f"held out: AUC {auc(scored.positive, scored.score)} over all sources")
    for measure in per_source(scored, 0.5):
        print(f"  {measure.source}: {measure.n_positive}+/{measure.n_negative}-  AUC {measure.auc}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
