"""Three well-known networks with random weights, as a PyTorch export would write them: the speed of a runtime does not need real ones.

ResNet-50 v1.5 (He et al. 2016, stride in the 3x3), DenseNet-121 (Huang et al. 2017) and a U-Net (Ronneberger et al. 2015 with padded
convolutions and transposed convolutions on the way up; 32 features at the first level, 7.8 M parameters, a quarter of the original's
31 M: the size that brain and lung segmenters are published in). The weights are He's, the statistics of the BatchNorms those of a
network that was trained: the signal neither dies nor explodes, so a difference between float and int8 means something.

``folded`` says what an export in eval mode does: a BatchNorm right behind a convolution becomes part of it; the ones in front of
DenseNet's convolutions cannot and stay. Parameters as PyTorch counts them: only the unfolded graph has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

OPSET: Final = 17
EPSILON: Final = 1e-5
_RESIDUAL_GAIN: Final = 0.5
"""Of the last BatchNorm of a residual branch: 16 blocks at gain 1 would double the variance 16 times."""


class Graph:
    """An ONNX graph being written, node by node; a tensor is its name."""

    def __init__(self, seed: int, *, folded: bool) -> None:
        self._folded = folded
        self._random = np.random.default_rng(seed)
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns that output's name."""
        from onnx import helper

        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: NDArray[np.float32]) -> str:
        """Append an initializer; returns its name."""
        from onnx import numpy_helper

        name = f"weight_{len(self._initializers)}"
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
        return name

    def weights(self, *shape: int, fan_in: int) -> NDArray[Any]:
        """He's initialisation for what a ReLU follows."""
        return (self._random.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    def statistics(self, channels: int, gain: float = 1.0) -> list[NDArray[np.float32]]:
        """Gamma, beta, running mean and running variance [channels] of a BatchNorm."""
        draw = self._random
        gamma, variance = gain * draw.uniform(0.8, 1.2, channels), draw.uniform(0.8, 1.2, channels)
        beta, mean = 0.1 * draw.standard_normal(channels), 0.1 * draw.standard_normal(channels)
        return [value.astype(np.float32) for value in (gamma, beta, mean, variance)]

    def norm(self, x: str, statistics: list[NDArray[np.float32]]) -> str:
        """A BatchNorm of its own."""
        return self.node("BatchNormalization", x, *map(self.constant, statistics), epsilon=EPSILON)

    def conv(self, x: str, i: int, o: int, size: int, stride: int = 1, *, norm: bool = True, gain: float = 1.0, bias: bool = False) -> str:
        """A square convolution that keeps the size (but for its stride), with a BatchNorm behind it where ``norm``."""
        kernel, shift = self.weights(o, i, size, size, fan_in=i * size * size), np.zeros(o, np.float32)
        statistics = self.statistics(o, gain) if norm else []
        if norm and self._folded:
            gamma, beta, mean, variance = statistics
            scale = gamma / np.sqrt(variance + EPSILON)
            kernel, shift = kernel * scale[:, None, None, None], beta - mean * scale
        inputs = [self.constant(kernel)] + ([self.constant(shift)] if bias or (norm and self._folded) else [])
        x = self.node("Conv", x, *inputs, kernel_shape=[size, size], strides=[stride, stride], pads=[size // 2] * 4)
        return self.norm(x, statistics) if norm and not self._folded else x

    def conv_relu(self, x: str, i: int, o: int, size: int, stride: int = 1) -> str:
        """Convolution, BatchNorm, ReLU."""
        return self.node("Relu", self.conv(x, i, o, size, stride))

    def pool(self, x: str, kind: str, size: int, stride: int, pad: int = 0) -> str:
        """A square pooling."""
        return self.node(kind, x, kernel_shape=[size, size], strides=[stride, stride], pads=[pad] * 4)

    def classifier(self, x: str, i: int, classes: int) -> str:
        """Global pooling and one linear layer."""
        x = self.node("Flatten", self.node("GlobalAveragePool", x), axis=1)
        weight = self.constant(self.weights(classes, i, fan_in=i))
        return self.node("Gemm", x, weight, self.constant(np.zeros(classes, np.float32)), transB=1)

    def model(self, output: str, shape: tuple[int, ...], output_shape: tuple[int, ...]) -> Any:
        """The finished, checked ModelProto; input ``image``, output ``output``, any batch size."""
        import onnx
        from onnx import TensorProto, helper

        self._nodes.append(helper.make_node("Identity", [output], ["output"], name="output"))
        graph = helper.make_graph(
            self._nodes, "network",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", *shape])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", *output_shape])],
            self._initializers,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def resnet50(*, folded: bool = True, seed: int = 0) -> Any:
    """ResNet-50: [n, 3, 224, 224] -> 1000 logits; 25.6 M parameters."""
    graph = Graph(seed, folded=folded)
    x = graph.pool(graph.conv_relu("image", 3, 64, 7, 2), "MaxPool", 3, 2, 1)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            branch = graph.conv_relu(graph.conv_relu(x, channels, width, 1), width, width, 3, stride)
            branch = graph.conv(branch, width, 4 * width, 1, gain=_RESIDUAL_GAIN)
            short = x if block else graph.conv(x, channels, 4 * width, 1, stride)
            x, channels = graph.node("Relu", graph.node("Add", branch, short)), 4 * width
    return graph.model(graph.classifier(x, channels, 1000), (3, 224, 224), (1000,))


def densenet121(*, folded: bool = True, seed: int = 0) -> Any:
    """DenseNet-121: [n, 3, 224, 224] -> 1000 logits; 8.0 M parameters."""
    graph, growth = Graph(seed, folded=folded), 32
    x = graph.pool(graph.conv_relu("image", 3, 64, 7, 2), "MaxPool", 3, 2, 1)
    channels = 64
    for stage, layers in enumerate((6, 12, 24, 16)):
        features = [x]
        for _ in range(layers):
            joined = graph.node("Concat", *features, axis=1) if len(features) > 1 else x
            branch = graph.node("Relu", graph.norm(joined, graph.statistics(channels)))
            branch = graph.conv_relu(branch, channels, 4 * growth, 1)
            features.append(graph.conv(branch, 4 * growth, growth, 3, norm=False))
            channels += growth
        x = graph.norm(graph.node("Concat", *features, axis=1), graph.statistics(channels))
        x = graph.node("Relu", x)
        if stage < 3:
            x = graph.pool(graph.conv(x, channels, channels // 2, 1, norm=False), "AveragePool", 2, 2)
            channels //= 2
    return graph.model(graph.classifier(x, channels, 1000), (3, 224, 224), (1000,))


def unet(*, folded: bool = True, seed: int = 0, features: int = 32, size: int = 512) -> Any:
    """U-Net of five levels: [n, 1, size, size] -> probability [n, 1, size, size]; 7.8 M parameters with 32 features."""
    graph = Graph(seed, folded=folded)
    x, channels, skips = "image", 1, []
    for level in range(5):
        width = features << level
        if level:
            skips.append((x, channels))
            x = graph.pool(x, "MaxPool", 2, 2)
        x, channels = graph.conv_relu(graph.conv_relu(x, channels, width, 3), width, width, 3), width
    while skips:
        skip, width = skips.pop()
        # Each output pixel of a 2x2 transposed convolution with stride 2 is made by one tap: its fan-in is the channels alone.
        weight = graph.constant(graph.weights(channels, width, 2, 2, fan_in=channels))
        shift = graph.constant(np.zeros(width, np.float32))
        x = graph.node("ConvTranspose", x, weight, shift, kernel_shape=[2, 2], strides=[2, 2])
        x = graph.node("Concat", x, skip, axis=1)
        x, channels = graph.conv_relu(graph.conv_relu(x, 2 * width, width, 3), width, width, 3), width
    x = graph.node("Sigmoid", graph.conv(x, channels, 1, 1, norm=False, bias=True))
    return graph.model(x, (1, size, size), (1, size, size))


def parameters(model: Any) -> int:
    """The trainable parameters of a model: all its weights but the running statistics of its BatchNorms."""
    statistics = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}
    return sum(int(np.prod(item.dims)) for item in model.graph.initializer if item.name not in statistics)


NETWORKS: Final[dict[str, tuple[Callable[[], Any], tuple[int, ...]]]] = {
    "ResNet-50 224²": (resnet50, (3, 224, 224)),
    "DenseNet-121 224²": (densenet121, (3, 224, 224)),
    "U-Net 512²": (unet, (1, 512, 512)),
}
"""Title -> who builds it, and the shape of one input."""
