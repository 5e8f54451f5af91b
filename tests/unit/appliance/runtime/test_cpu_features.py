"""On a processor whose 8-bit sums are clipped, nothing runs that a gate on another processor let pass."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import InferenceError
from appliance.runtime import CPU, Candidate, cpu_features, open_runtime
from tests.support import small_networks as networks


@dataclass(frozen=True)
class Spec:
    name: str = "image"
    shape: tuple[int, ...] = (networks.CHANNELS, networks.SIDE, networks.SIDE)


def cpu_info(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, machine: str = "x86_64") -> None:
    (folder / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu_features, "_CPU_INFO", folder / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: machine)


@pytest.mark.parametrize(
    ("text", "machine", "vnni", "saturates"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", "x86_64", True, False),
        ("flags : fpu avx2 avx_vnni", "x86_64", True, False),
        ("flags : fpu avx2 avx512f avx512bw", "x86_64", False, True),
        ("flags : avx512_vnni_not_quite", "x86_64", False, True),
        ("", "x86_64", False, True),
        ("Features : fp asimd asimddp", "aarch64", False, False),
    ],
)
def test_processor_with_vnni_does_not_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, machine: str, vnni: bool, saturates: bool
) -> None:
    cpu_info(tmp_path, monkeypatch, text, machine)
    assert (cpu_features.has_vnni(), cpu_features.saturates()) == (vnni, saturates)


def test_kernel_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "_CPU_INFO", tmp_path / "absent")
    assert cpu_features.instructions() == frozenset()


@pytest.fixture
def int8(tmp_path: Path) -> Path:
    return networks.int8(networks.classifier(tmp_path / "fp32.onnx"), tmp_path / "int8.onnx")


def test_onnxruntime_takes_the_way_that_does_not_clip(int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact on every processor when it is told to be; when it is not, exact only on a processor that does not saturate."""
    import onnxruntime

    has_clipped_sums = cpu_features.saturates()  # of the processor that this test really runs on
    tensor, answers = networks.pictures(1), []
    right = networks.run_node_by_node(int8, tensor)["map"]
    asked: list[Any] = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, **more: asked.append(options) or real(path, options, **more))
    for flags in ("flags : avx2 avx512_vnni", "flags : avx2"):
        cpu_info(tmp_path, monkeypatch, flags)
        runtime = open_runtime(int8, Spec(), Candidate("onnxruntime", "int8.onnx", "int8", CPU, 1))
        answers.append(runtime.infer({"image": tensor})["map"])
        assert "u8" in runtime.describe()["layers"]
    assert asked[1].get_session_config_entry("session.x64quantprecision") == "1"
    with pytest.raises(RuntimeError):
        asked[0].get_session_config_entry("session.x64quantprecision")
    assert np.allclose(answers[1], right, atol=0.05)
    assert np.allclose(answers[0], right, atol=0.05) is not has_clipped_sums


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_openvino_has_no_such_way_and_is_refused_what_runs_in_8_bits(
    int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Whatever it is called: the layers decide."""
    cpu_info(tmp_path, monkeypatch, "flags : avx2")
    with pytest.raises(InferenceError, match=r"of 3 layers, may be clipped on this processor, which has no VNNI") as caught:
        open_runtime(int8, Spec(), Candidate("openvino", "int8.onnx", precision, "CPU", 1))
    assert caught.value.code == "runtime.precision"
    open_runtime(tmp_path / "fp32.onnx", Spec(), Candidate("openvino", "fp32.onnx", "fp32", "CPU", 1)).close()
