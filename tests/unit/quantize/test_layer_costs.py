from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import clean_up
from quantize.recipes import calibration as calibrating
from quantize.recipes.int8 import WEIGHTED, Calibration, Recipe, calibrate, quantizable, quantize, recipes
from quantize.recipes.layer_costs import LayerCost, layers, measure_layer_costs, relax
from tests.support.quantize_networks import Net, dense, images, residual, run, unet

BY_NAME = {recipe.name: recipe for recipe in recipes()}
CHAINED, SYMMETRIC = BY_NAME["unsigned-chained-minmax"], BY_NAME["symmetric-minmax"]


@pytest.fixture(autouse=True, scope="module")
def few_bins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "_BINS", 256)
        yield


def fragile() -> Any:
    """Six convolutions, the third of which int8 ruins: its channels differ by a factor of ten thousand, which one scale cannot hold."""
    net = Net(2)
    data = "image"
    for index in range(6):
        data = net.relu(net.conv(data, 6))
        if index == 1:
            spread = np.logspace(0, 4, 6, dtype=np.float32).reshape(1, 6, 1, 1)
            loud = net.add("Mul", data, net.weight(spread), channels=6)
            weight = net.draw(6, 6, 3, 3) / spread
            data = net.relu(net.add("Conv", loud, net.weight(weight.astype(np.float32)), channels=6, pads=[1] * 4))
    net.head(data)
    return clean_up(net.model())


def error(model: Any, path: Path) -> float:
    """The largest change of the output on pictures that calibration did not see."""
    return float(np.abs(run(onnx.load(path), images(8, seed=7))[0] - run(model, images(8, seed=7))[0]).max())


def ruined() -> tuple[Any, Recipe, Calibration, tuple[LayerCost, ...]]:
    model = fragile()
    calibration = calibrate(model, [images(16)])
    return model, SYMMETRIC, calibration, measure_layer_costs(model, SYMMETRIC, calibration, [images(4, seed=5)])


def weighted(model: Any) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in WEIGHTED]


@pytest.mark.parametrize("net", [residual, unet, dense])
@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_layers_part_what_a_recipe_quantizes(net: Any, recipe: Recipe) -> None:
    model = clean_up(net())
    groups = layers(model, recipe)
    assert frozenset().union(*groups.values()) == quantizable(model, recipe)
    assert sum(len(nodes) for nodes in groups.values()) == len(quantizable(model, recipe))
    assert set(weighted(model)) & quantizable(model, recipe) <= set(groups)


def test_a_layer_holds_its_activation_and_a_sum_belongs_to_the_later_branch() -> None:
    model = clean_up(residual(blocks=1))
    kinds = {node.name: node.op_type for node in model.graph.node}
    grouped = [sorted(kinds[name] for name in nodes) for nodes in layers(model, CHAINED).values()]
    assert grouped == [["Conv", "Relu"], ["Conv", "Relu"], ["Add", "Conv", "Relu"], ["Gemm"]]


def test_the_layer_that_int8_ruins_costs_most() -> None:
    model, _, _, costs = ruined()
    assert [cost.cost for cost in costs] == sorted((cost.cost for cost in costs), reverse=True)
    assert len(costs) == len(weighted(model))
    loud = next(node.output[0] for node in model.graph.node if node.op_type == "Mul")
    assert costs[0].layer == next(node.name for node in model.graph.node if loud in node.input)
    assert costs[0].op_type == "Conv"
    assert costs[0].cost > 3 * costs[1].cost


def test_the_dearest_layers_go_back_to_float_until_the_model_is_right(tmp_path: Path) -> None:
    model, recipe, calibration, costs = ruined()
    out = tmp_path / "model.onnx"
    quantize(model, recipe, calibration, out)
    before = error(model, out)
    count, attempt = next(relax(recipe, costs))
    quantize(model, attempt, calibration, out)
    assert count == 1
    assert attempt.precision == "mixed"
    assert attempt.keep == costs[0].nodes
    assert error(model, out) < before / 3


def test_at_most_half_of_the_layers_go_back_in_few_steps() -> None:
    def costs(count: int) -> list[LayerCost]:
        return [LayerCost(str(index), "Conv", frozenset({str(index)}), float(index)) for index in range(count)]

    assert [count for count, _ in relax(SYMMETRIC, costs(8))] == [1, 2, 3, 4]
    assert [sorted(attempt.keep) for _, attempt in relax(SYMMETRIC, costs(4))] == [["3"], ["2", "3"]]
    assert [count for count, _ in relax(SYMMETRIC, costs(120))] == [8, 16, 24, 32, 40, 48, 56]
    assert not list(relax(SYMMETRIC, costs(1)))


def test_costs_need_images_and_something_quantized() -> None:
    model = clean_up(residual())
    calibration = calibrate(model, [images(2)])
    with pytest.raises(QuantizeError, match="nothing to measure"):
        measure_layer_costs(model, SYMMETRIC, calibration, [])
    with pytest.raises(QuantizeError, match="nothing to measure"):
        measure_layer_costs(model, SYMMETRIC.keeping(quantizable(model, SYMMETRIC)), calibration, [images(2)])


def test_the_part_measured_is_told() -> None:
    model = clean_up(residual())
    fractions: list[float] = []
    measure_layer_costs(model, SYMMETRIC, calibrate(model, [images(2)]), [images(2)], on_progress=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
