"""What the GPU checks need of their own is tried without a GPU: their hand-written ONNX files, and the checks on stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.hardware import tiny_onnx
from tests.support import trt_stand_in
from tests.support.paths import ROOT


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("batch", ["n", 2])
def test_files_written_by_hand(tmp_path: Path, precision: str, tolerance: float, batch: int | str) -> None:
    path = tiny_onnx.write(tmp_path / "tiny.onnx", precision, batch)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    images = np.random.default_rng(1).random((2, 1, 32, 32), np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = dict(zip(["map", "mean"], session.run(["map", "mean"], {"image": images}), strict=True))
    for name, value in tiny_onnx.expected(images).items():
        assert found[name].shape == value.shape
        assert np.max(np.abs(found[name] - value)) < tolerance


def test_checks_import_with_numpy_alone() -> None:
    heavy = ("pytest", "pydantic", "onnx", "onnxruntime", "cryptography", "model_sync.bundle", "typing_extensions", "tensorrt", "cuda")
    check = f"import sys, tests.hardware.gpu_check; print([m for m in {heavy!r} if sys.modules.get(m)])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_without_a_gpu_the_checks_say_so() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.hardware.gpu_check"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU with TensorRT")
    assert done.returncode == 2
    assert "runtime.unavailable" in done.stderr


def test_checks_on_stand_ins(tmp_path: Path) -> None:
    """So that the checks themselves are right the day a GPU is at hand; what takes a real one (speed, its memory) is not shown by this."""
    trt_stand_in.lay(tmp_path, trt_stand_in.VERSIONS[0], capacity=64 << 20)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "STAND_IN_BUILD_S": "0.8"}
    command = [sys.executable, "-m", "tests.hardware.gpu_check", "--out", str(tmp_path), "--only"]
    checks = ["precisions", "cache", "batches", "graph", "memory", "leaks", "failures"]
    done = subprocess.run([*command, *checks], capture_output=True, text=True, check=False, env=environment)
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [["ok", name] for name in checks], done.stdout + done.stderr
    assert done.returncode == 0
