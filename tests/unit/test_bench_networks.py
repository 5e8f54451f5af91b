"""The networks that the bench measures are the ones they say they are."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from tests.bench import networks


@pytest.mark.parametrize(
    ("build", "expected"),
    [(networks.resnet50, 25_557_032), (networks.densenet121, 7_978_856), (networks.unet, 7_762_465)],
)
def test_parameters_are_those_of_the_published_network(build, expected) -> None:
    # ResNet-50 25.6 M and DenseNet-121 8.0 M as in their papers; the U-Net's 7.8 M as published for 32 features.
    assert networks.parameters(build(folded=False)) == expected


@pytest.mark.parametrize("title", networks.NETWORKS)
def test_network_runs_and_its_signal_lives(title) -> None:
    build, shape = networks.NETWORKS[title]
    output = _run(build(), shape, batch=1)
    assert np.isfinite(output).all()
    assert 0.1 < output.std() < 100


def test_folding_changes_no_value() -> None:
    folded, unfolded = (_run(networks.densenet121(folded=folded), (3, 224, 224), batch=2) for folded in (True, False))
    assert folded.shape == (2, 1000)
    np.testing.assert_allclose(folded, unfolded, atol=1e-3)


def test_folded_resnet_has_no_norm_left_and_densenet_those_before_its_convolutions() -> None:
    counts = [
        sum(node.op_type == "BatchNormalization" for node in build().graph.node) for build in (networks.resnet50, networks.densenet121)
    ]
    assert counts == [0, 62]  # 58 dense layers, three transitions and the last


def _run(model, shape, *, batch: int):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": np.random.default_rng(1).random((batch, *shape), dtype=np.float32)})[0]
