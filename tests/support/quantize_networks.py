"""Small networks with random weights, written as ONNX node by node, for the tests of the quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quantize.graph.onnx_graph import input_name, session

FLOAT = onnx.TensorProto.FLOAT


class Net:
    """A graph being written; a tensor is its name, its channels are known."""

    def __init__(self, seed: int = 0, *, channels: int = 1, side: int = 16, opset: int = 17, batch: int | str = "n") -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.channels = {"image": channels}
        self.opset = opset
        self.input = helper.make_tensor_value_info("image", FLOAT, [batch, channels, side, side])

    def weight(self, value: Any, name: str | None = None) -> str:
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, to: str | None = None, channels: int | None = None, **attributes: Any) -> str:
        output = to or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{kind}_{len(self.nodes)}", **attributes))
        self.channels[output] = channels if channels is not None else self.channels.get(inputs[0], 0)
        return output

    def draw(self, *shape: int, scale: float | None = None) -> NDArray[np.float32]:
        spread = scale if scale is not None else float(np.sqrt(2 / np.prod(shape[1:])))
        return (self.random.standard_normal(shape) * spread).astype(np.float32)

    def conv(
        self, data: str, out: int, *, kernel: int = 3, stride: int = 1, bias: bool = True, group: int = 1, to: str | None = None
    ) -> str:
        inputs = [data, self.weight(self.draw(out, self.channels[data] // group, kernel, kernel))]
        inputs += [self.weight(self.draw(out, scale=0.1))] if bias else []
        pads = [kernel // 2] * 4
        return self.add("Conv", *inputs, channels=out, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads, group=group, to=to)

    def up(self, data: str, out: int, *, group: int = 1) -> str:
        inputs = [data, self.weight(self.draw(self.channels[data], out // group, 2, 2, scale=0.2)), self.weight(self.draw(out, scale=0.1))]
        return self.add("ConvTranspose", *inputs, channels=out, kernel_shape=[2, 2], strides=[2, 2], group=group)

    def norm(self, data: str) -> str:
        count = self.channels[data]
        values = [
            self.random.uniform(0.5, 2, count),
            self.draw(count, scale=0.3),
            self.draw(count, scale=0.3),
            self.random.uniform(0.5, 2, count),
        ]
        return self.add("BatchNormalization", data, *(self.weight(np.asarray(value, np.float32)) for value in values), epsilon=1e-3)

    def relu(self, data: str) -> str:
        return self.add("Relu", data)

    def head(self, data: str, labels: int = 1, *, kind: str = "gemm", pool: str = "global", last: str = "Sigmoid") -> str:
        count = self.channels[data]
        if pool == "global":
            pooled = self.add("Flatten", self.add("GlobalAveragePool", data), axis=1)
        else:
            pooled = self.add("ReduceMean", data, axes=[2, 3] if pool == "mean" else [-2, -1], keepdims=0)
        bias = self.weight(self.draw(labels, scale=0.1), "bias")
        if kind == "gemm":
            logit = self.add("Gemm", pooled, self.weight(self.draw(labels, count)), bias, transB=1)
        else:
            logit = self.add("Add", self.add("MatMul", pooled, self.weight(self.draw(count, labels))), bias)
        return self.add(last, logit, to="probability")

    def model(self, *outputs: str) -> Any:
        values = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs or ("probability",)]
        graph = helper.make_graph(self.nodes, "net", [self.input], values, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        del model.graph.value_info[:]
        onnx.checker.check_model(model)
        return model


def residual(seed: int = 0, *, side: int = 16, blocks: int = 2) -> Any:
    """A residual classifier: stem, blocks of which every other changes the size by a convolution on its shortcut, pooling, linear."""
    net = Net(seed, side=side)
    data = net.relu(net.norm(net.conv("image", 8, bias=False)))
    for index in range(blocks):
        wide = net.channels[data] * (1 + index % 2)
        stride = 1 + index % 2
        inner = net.relu(net.norm(net.conv(data, wide, stride=stride, bias=False)))
        inner = net.norm(net.conv(inner, wide, bias=False))
        shortcut = data if stride == 1 else net.norm(net.conv(data, wide, kernel=1, stride=2, bias=False))
        data = net.relu(net.add("Add", inner, shortcut))
    net.head(data)
    return net.model()


def unet(seed: int = 0, *, side: int = 16) -> Any:
    """Down, up by a transposed convolution, joined by a Concat."""
    net = Net(seed, side=side)
    first = net.relu(net.norm(net.conv("image", 8)))
    deep = net.relu(net.norm(net.conv(net.add("MaxPool", first, kernel_shape=[2, 2], strides=[2, 2]), 16)))
    joined = net.add("Concat", net.norm(net.up(deep, 8)), first, axis=1, channels=16)
    net.conv(net.relu(net.conv(joined, 8)), 2, kernel=1, to="logits")
    return net.model("logits")


def dense(seed: int = 0, *, layers: int = 4) -> Any:
    """DenseNet's block: BatchNorm in front of each convolution, everything before concatenated."""
    net = Net(seed)
    data = net.conv("image", 8)
    for _ in range(layers):
        new = net.conv(net.relu(net.norm(data)), 4, bias=False)
        data = net.add("Concat", data, new, axis=1, channels=net.channels[data] + 4)
    net.head(net.relu(net.norm(data)))
    return net.model()


def random_network(data: st.DataObject) -> Any:
    """Any chain of convolutions, transposed ones, norms, activations, sums, concatenations and poolings."""
    net = Net(data.draw(st.integers(0, 1000)), side=8)
    made = [net.conv("image", 4)]
    sides = {made[0]: 8}
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.sampled_from(made))
        step = data.draw(st.sampled_from(["conv", "group", "up", "norm", "relu", "add", "concat", "max", "mean", "identity"]))
        side = sides[at]
        if step in ("conv", "group"):
            new = net.conv(at, 4, bias=data.draw(st.booleans()), group=min(4, net.channels[at] // 4 * 2) if step == "group" else 1)
        elif step == "up" and side <= 8:
            new, side = net.up(at, 4, group=data.draw(st.sampled_from([1, 2]))), side * 2
        elif step == "norm":
            new = net.norm(at)
        elif step in ("add", "concat"):
            other = data.draw(st.sampled_from([name for name in made if sides[name] == side and net.channels[name] == net.channels[at]]))
            joined = net.channels[at] + net.channels[other]
            new = net.add("Add", at, other) if step == "add" else net.add("Concat", at, other, axis=1, channels=joined)
        elif step in ("max", "mean") and side >= 2:
            new = net.add("MaxPool" if step == "max" else "AveragePool", at, kernel_shape=[2, 2], strides=[2, 2])
            side //= 2
        else:
            new = net.add("Identity" if step == "identity" else "Relu", at)
        made.append(new)
        sides[new] = side
    # Any tensor may be an output: what is one cannot be folded away.
    outputs = {made[-1], data.draw(st.sampled_from(made))}
    return net.model(*sorted(outputs))


def images(count: int = 4, *, side: int = 16, channels: int = 1, seed: int = 1) -> NDArray[np.float32]:
    """Random pictures, float32 [count, channels, side, side]."""
    return np.random.default_rng(seed).random((count, channels, side, side), np.float32)


def run(model: Any, data: NDArray[np.float32], *, optimised: bool = True) -> list[NDArray[np.float32]]:
    """The outputs of a model on the CPU."""
    opened = session(model, optimised=optimised, threads=1)
    return [np.asarray(value) for value in opened.run(None, {input_name(model): data})]
