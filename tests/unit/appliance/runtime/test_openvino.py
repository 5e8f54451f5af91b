"""What is OpenVINO's own: the precision that really ran, the cache of compiled models, and silence towards its maker."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import InferenceError
from appliance.lifecycle import model_files
from appliance.lifecycle.self_test_child import SelfTestRequest, _sweep_engines
from appliance.runtime import Candidate, open_runtime, openvino_cache
from appliance.runtime.engine_cache import pack, sweep, unpack
from appliance.runtime.openvino import OpenVinoRuntime, import_openvino
from model_sync.bundle import ModelBundle
from tests.conftest import ROOT
from tests.support import small_networks as networks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


@dataclass(frozen=True)
class Spec:
    name: str = "image"
    shape: tuple[int, ...] = (networks.CHANNELS, networks.SIDE, networks.SIDE)


def candidate(precision: str = "fp32", batch: int = 1) -> Candidate:
    return Candidate("openvino", "model.onnx", precision, "CPU", 1, batch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return networks.classifier(tmp_path / "model.onnx")


def answer(model: Path, cache: Path | None = None, **how: Any) -> Any:
    runtime = open_runtime(model, Spec(), candidate(**how), cache=cache)
    try:
        return runtime.infer({"image": networks.pictures(1)})["probability"]
    finally:
        runtime.close()


def test_float_runs_in_float_whatever_the_processor_likes_better(shared: Path) -> None:
    """Where there is bfloat16, OpenVINO as it comes uses it; the reference model is large enough for that."""
    path = shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx"
    runtime = open_runtime(path, Spec("image", (1, 224, 224)), candidate())
    assert set(runtime.describe()["layers"]) == {"f32"}
    assert runtime.describe()["layers"]["f32"] >= 24  # its 23 convolutions and the linear layer


@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_int8_without_a_layer_in_8_bits_is_refused(model: Path, precision: str) -> None:
    with pytest.raises(InferenceError, match=f"{precision} is what the file says; 3 layers run in f32, none in 8 bits") as caught:
        open_runtime(model, Spec(), candidate(precision))
    assert caught.value.code == "runtime.precision"


def test_int8_that_is_called_float_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match="fp32 is what the file says; 3 of 3 layers run in 8 bits") as caught:
        open_runtime(networks.int8(model, tmp_path / "int8.onnx"), Spec(), candidate("fp32"))
    assert caught.value.code == "runtime.precision"


def test_the_model_for_one_image_is_looked_at_and_not_the_batch_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is what nearly every patient is read with."""

    def ran(model: Any) -> list[tuple[str, str]]:
        return [("Convolution", "bf16" if model.inputs[0].shape[0] == 1 else "f32")]

    monkeypatch.setattr("appliance.runtime.openvino.layers_of", ran)
    with pytest.raises(InferenceError, match="bf16 though f32 was asked for"):
        open_runtime(model, Spec(), candidate(batch=4))


def test_a_batch_that_runs_otherwise_than_one_image_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([[("Convolution", "f32")], [("Convolution", "f32"), ("Subgraph", "f32")]])
    monkeypatch.setattr("appliance.runtime.openvino.layers_of", lambda _: next(sizes))
    described = open_runtime(model, Spec(), candidate(batch=4)).describe()
    assert (described["layers"], described["layers_batch"]) == ({"f32": 1}, {"f32": 2})


@pytest.mark.parametrize("batch", [1, 4])
def test_tensor_that_may_not_be_written_to(model: Path, batch: int) -> None:
    runtime = open_runtime(model, Spec(), candidate(batch=batch))
    tensor = networks.pictures(5)
    expected = runtime.infer({"image": tensor})
    tensor.flags.writeable = False
    outputs = runtime.infer({"image": tensor})
    assert all(np.array_equal(outputs[name], expected[name]) for name in expected)


def test_bf16_that_was_not_asked_for_is_refused(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = import_openvino().Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setattr(OpenVinoRuntime, "_settings", lambda _: {"PERFORMANCE_HINT": "LATENCY"})
    path = shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx"
    with pytest.raises(InferenceError, match="bf16 though f32 was asked for") as caught:
        open_runtime(path, Spec("image", (1, 224, 224)), candidate())
    assert caught.value.code == "runtime.precision"


def test_half_precision_runs_and_says_in_what(model: Path, tmp_path: Path) -> None:
    half = networks.half(model, tmp_path / "half.onnx")
    runtime = open_runtime(half, Spec(), candidate("fp16"))
    described = runtime.describe()
    assert (described["precision"], set(described["layers"]), described["ran"]) == ("fp16", {"f32"}, "fp32")
    assert set(runtime.infer({"image": networks.pictures(1)})) == {"probability", "map"}


def test_one_model_for_an_image_and_one_for_the_batch(model: Path) -> None:
    heard: list[float] = []
    runtime = open_runtime(model, Spec(), candidate(batch=4), on_progress=heard.append)
    assert heard == [0.5, 1.0]
    tensor = networks.pictures(11)
    assert runtime.infer({"image": tensor})["probability"].shape == (11, 2)


def test_second_load_reads_what_the_first_compiled(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answer(model, tmp_path / "cache", batch=2)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(OpenVinoRuntime, "_compile", lambda *_: pytest.fail("compiled again"))
    assert np.array_equal(answer(model, tmp_path / "cache", batch=2), first)


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "junk", "header"])
def test_damaged_cache_is_made_again(model: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    first = answer(model, cache)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes({
        "bit": whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:], "truncated": whole[: len(whole) // 2], "empty": b"",
        "junk": os.urandom(5000), "header": whole.replace(b'"way"', b'"wax"'),
    }[damage])  # fmt: skip
    assert np.array_equal(answer(model, cache), first)
    assert len(path.read_bytes()) == pytest.approx(len(whole), abs=200)
    unpack(path)


def test_whole_file_that_openvino_does_not_take_is_made_again(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = answer(model, cache)
    (path,) = cache.iterdir()
    header, data = unpack(path)
    pack(path, header, data[: len(data) // 2])
    assert np.array_equal(answer(model, cache), first)
    assert len(unpack(path)[1]) > len(data) // 2


def test_compiled_for_another_box_is_made_again(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    answer(model, cache)
    (path,) = cache.iterdir()
    header, data = unpack(path)
    pack(path, header | {"box": header["box"] | {"version": "2024.0"}}, data)
    answer(model, cache)
    assert unpack(path)[0] == header


def test_cache_that_cannot_be_written_costs_time_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert answer(model, tmp_path / "cache").shape == (1, 2)


def test_model_with_weights_beside_it_is_not_kept(model: Path, tmp_path: Path) -> None:
    """The digest would be of half the model."""
    import onnx

    beside = tmp_path / "beside.onnx"
    onnx.save_model(onnx.load(model), beside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert np.allclose(answer(beside, tmp_path / "cache"), answer(model))
    assert not (tmp_path / "cache").exists()


def test_compiled_model_goes_with_its_model(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    answer(model, cache)
    kept = openvino_cache.of_file(model, {}, {})
    assert kept is not None
    assert sweep(cache, [kept.onnx_sha256]) == []
    assert len(sweep(cache, [])) == 1


def test_no_more_than_four_are_kept_of_one_file_and_those_used_last(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    other = networks.reciprocal(tmp_path / "other.onnx", 1.0)
    open_runtime(other, Spec(), candidate(), cache=cache).close()
    for batch in (1, 2, 3, 4):  # 1 is used each time
        answer(model, cache, batch=batch)
    before = set(cache.iterdir())
    answer(model, cache, batch=5)
    after = set(cache.iterdir())
    assert len(before) == len(after) == 5
    assert len(before - after) == 1
    single = openvino_cache.of_file(model, {}, {})
    assert single is not None and len(list(cache.glob(f"{single.onnx_sha256[:16]}-*.compiled"))) == 4


def test_a_proof_sweeps_what_was_built_for_models_that_are_gone(tmp_path: Path) -> None:
    source = ModelBundle.load(ROOT / "appliance" / "bundles" / "cxr-pneumonia")
    model_files.install(tmp_path, source.directory, source.digest, lambda _: None)
    cache = model_files.engine_dir(tmp_path)
    cache.mkdir()
    (kept, *_) = (variant.sha256 for variant in source.manifest.variants)
    for digest in (kept, "0" * 64):
        for suffix in ("engine", "compiled"):
            (cache / f"{digest[:16]}-{'1' * 16}.{suffix}").write_bytes(b"x")
    _sweep_engines(SelfTestRequest(tmp_path, source.directory, source.digest, None, 1, 1 << 30, ["f" * 64], 1))
    assert {path.name[:16] for path in cache.iterdir()} == {kept[:16]}


def test_nothing_is_sent_to_its_maker_and_nothing_kept_for_it(tmp_path: Path) -> None:
    """On import alone `openvino_telemetry` would write an identifier to the home directory and send an event."""
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from appliance.runtime.openvino import import_openvino\n"
        "import_openvino().Core().available_devices\n"
        "import openvino\n"
        "print([name for name in sys.modules if 'telemetry' in name and sys.modules[name] is not None])\n"
        "print('openvino.tools' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split("\n")[:2] == ["[]", "False"]
    assert list(tmp_path.iterdir()) == []


def test_only_the_adapter_imports_openvino() -> None:
    """Whoever imports it otherwise may be the first, and brings the telemetry in."""
    importing = re.compile(r"^\s*(import|from) openvino\b", re.MULTILINE)
    rooms = [ROOT / name for name in ("appliance", "model_sync", "quantize", "webui")]
    found = [path.relative_to(ROOT).as_posix() for room in rooms for path in room.rglob("*.py") if importing.search(path.read_text())]
    assert found == ["appliance/runtime/openvino.py"]
