"""The network of the reference model in PyTorch; imported only where it is trained, never on a box.

A compact residual network that ends in global average pooling and one linear layer, so that the class activation map
is exact: the mean of its cells plus the layer's bias is the logit.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as functional
from torch import nn

WIDTHS = (32, 48, 96, 160, 256)
# Centre and spread of a displayed chest X-ray in 0..1; part of the graph, so that the box only divides by 255.
MEAN, SPREAD = 0.5, 0.25


def _convolution(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


class Block(nn.Module):  # type: ignore[misc]  # torch is no dependency, so its classes are unknown to the checker
    """Two convolutions with a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.a = _convolution(before, after, 3, stride)
        self.b = nn.Sequential(nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after))
        changes = stride > 1 or before != after
        around = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.d = around if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [n, before, h, w] to [n, after, h / stride, w / stride]."""
        return functional.relu(self.b(self.a(x)) + self.d(x))


class Network(nn.Module):  # type: ignore[misc]
    """3.4 million parameters; takes [n, 1, 224, 224] in 0..1."""

    def __init__(self, labels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(1, WIDTHS[0], 3, 2), _convolution(WIDTHS[0], WIDTHS[0])]
        for before, after in pairwise(WIDTHS):
            layers += [Block(before, after, 2), Block(after, after, 1)]
        self.f = nn.Sequential(*layers)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(WIDTHS[-1], labels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [n, labels] and the last feature map [n, 256, 7, 7]."""
        features = self.f((x - MEAN) / SPREAD)
        return self.fc(self.drop(features.mean((2, 3)))), features


class Exported(nn.Module):  # type: ignore[misc]
    """What is written as ONNX: probability [n, labels] and class activation map [n, labels, 7, 7]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.n = network

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probability and class activation map, the map before the sigmoid and without the bias."""
        logits, features = self.n(x)
        return torch.sigmoid(logits), functional.conv2d(features, self.n.fc.weight[:, :, None, None])


def export(network: Network, path: str) -> None:
    """Write ``network`` as ONNX, opset 17, with a free batch size."""
    torch.onnx.export(
        Exported(network),
        (torch.rand(1, 1, 224, 224),),
        path,
        input_names=["image"],
        output_names=["probability", "cam"],
        opset_version=17,
        dynamo=False,
        dynamic_axes={name: {0: "n"} for name in ("image", "probability", "cam")},
    )
