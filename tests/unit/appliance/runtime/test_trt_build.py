"""Building engines in a process that may die, hang, or run out of memory; TensorRT and CUDA are stand-ins, the processes are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import InferenceError
from appliance.runtime import Candidate, engine_cache, trt_build
from appliance.runtime.engine_cache import EngineProfile
from appliance.runtime.tensorrt import TensorRtRuntime
from appliance.runtime.trt_build import BuildRequest, explain_build, explain_parse
from appliance.runtime.trt_compat import ParseError
from tests.support import trt_stand_in
from tests.support.paths import ROOT

MODEL = {"input": "image", "shape": [-1, 1, 4, 4]}


class Yard:
    """Where builder processes find stand-ins for TensorRT and CUDA."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        self.packages, self.cache, self.path = tmp_path / "packages", tmp_path / "cache", tmp_path / "model.onnx"
        trt_stand_in.lay(self.packages, version)
        monkeypatch.setenv("PYTHONPATH", f"{self.packages}:{ROOT}")
        self.version = version
        self.profile = EngineProfile("NVIDIA Stand-in", "8.7", version, "580", "fp16", 4, (1, 4, 4), 2, "ab" * 32)

    def build(self, deadline_s: float = 60.0, on_progress: Any = None, profile: EngineProfile | None = None, **how: Any) -> dict[str, Any]:
        self.path.write_text(json.dumps(MODEL | how))
        order = BuildRequest(self.path, "image", profile or self.profile, self.cache)
        return trt_build.build(order, deadline_s=deadline_s, on_progress=on_progress)

    def engine(self, profile: EngineProfile | None = None) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(engine_cache.read(self.cache, profile or self.profile).data)
        return found

    def left(self) -> list[str]:
        """What is in the cache that is no engine, no timings and no lock."""
        known = {".engine", ".timings", ".lock"}
        return [path.name for path in self.cache.iterdir() if path.suffix not in known]


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Yard:
    return Yard(tmp_path, monkeypatch, "10.3.0")


@pytest.fixture
def old_yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Yard:
    return Yard(tmp_path, monkeypatch, "8.6.0")


def test_builds_with_progress_of_the_monitor(yard: Yard) -> None:
    parts: list[float] = []
    notes = yard.build(on_progress=parts.append)
    assert 0.5 in parts
    assert notes.pop("build_s") > 0
    assert notes == {"batch": 4, "dynamic": True, "workspace_bytes": 2 << 30, "progress": "monitor", "timings": "new"}
    made = yard.engine()
    assert (made["range"], made["network"], made["flags"], made["level"]) == ([1, 4], 0b11, [], 2)
    assert made["limits"] == {"WORKSPACE": 2 << 30}
    assert yard.left() == []


def test_on_86_progress_is_the_time_that_is_over_and_said_to_be(old_yard: Yard) -> None:
    parts: list[float] = []
    notes = old_yard.build(on_progress=parts.append, takes_s=0.8, deadline_s=40)
    assert notes["progress"] == "elapsed"
    assert parts == sorted(parts)
    assert 0 < parts[-1] < 0.99
    made = old_yard.engine()
    assert (made["network"], made["flags"]) == (0b1, ["FP16"])


def test_timings_are_kept_and_reused(yard: Yard) -> None:
    assert yard.build(timing="conv")["timings"] == "new"
    assert yard.build(profile=replace(yard.profile, precision="int8"), timing="gemm")["timings"] == "reused"
    assert engine_cache.read_timings(yard.cache, yard.profile) == b"conv gemm"


def test_timings_of_builds_at_the_same_time_are_both_kept(yard: Yard) -> None:
    yard.path.write_text(json.dumps(MODEL | {"timing": "conv"}))
    other = yard.path.with_name("other.onnx")
    other.write_text(json.dumps(MODEL | {"timing": "gemm", "takes_s": 0.5}))
    orders = [
        BuildRequest(yard.path, "image", yard.profile, yard.cache),
        BuildRequest(other, "image", replace(yard.profile, onnx_sha256="cd" * 32), yard.cache),
    ]
    threads = [threading.Thread(target=trt_build.build, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine_cache.read_timings(yard.cache, yard.profile) == b"conv gemm"


def test_unsupported_operator_is_named(yard: Yard) -> None:
    said = {"text": "no importer", "code": "UNSUPPORTED_NODE", "operator": "GridSample", "node": "head/grid"}
    with pytest.raises(InferenceError, match=r"does not support the operator GridSample \(head/grid\)") as caught:
        yard.build(parse=[said])
    assert caught.value.code == "runtime.build"
    assert yard.left() == []


def test_unsupported_operator_is_named_on_86_too(old_yard: Yard) -> None:
    said = {"text": "No importer registered for op: GridSample. Attempting to import as plugin.", "code": "INVALID_NODE"}
    with pytest.raises(InferenceError, match="does not support the operator GridSample:"):
        old_yard.build(parse=[said])


def test_internal_assertion_is_told_word_for_word(yard: Yard) -> None:
    """As TensorRT 8.6 said for a U-Net with Q/DQ on ConvTranspose and Concat."""
    text = "[optimizer.cpp::reformat::123] Error Code 2: Internal Error (Assertion region->isFloat() failed. )"
    with pytest.raises(InferenceError, match="Assertion region->isFloat") as caught:
        yard.build(no_engine=True, says=[["ERROR", text], ["ERROR", "builder failed"]])
    assert caught.value.code == "runtime.build"


@pytest.mark.parametrize("signal_name", ["SIGSEGV", "SIGABRT"])
def test_builder_that_dies_is_a_crash_with_its_last_words(yard: Yard, signal_name: str) -> None:
    with pytest.raises(InferenceError, match=f"{signal_name} in build.*fusing conv1") as caught:
        yard.build(signal=signal_name, says=[["WARNING", "fusing conv1"]])
    assert caught.value.code == "runtime.crashed"
    assert yard.left() == []
    assert engine_cache.read(yard.cache, yard.profile) == engine_cache.CacheEntry(b"")


def test_builder_that_is_killed_ran_out_of_memory(yard: Yard) -> None:
    with pytest.raises(InferenceError, match="killed from outside") as caught:
        yard.build(signal="SIGKILL")
    assert caught.value.code == "runtime.memory"


def test_builder_that_hangs_is_ended(yard: Yard) -> None:
    started = time.monotonic()
    with pytest.raises(InferenceError, match="no engine after 3 s") as caught:
        yard.build(takes_s=100, deadline_s=3)
    assert caught.value.code == "runtime.deadline"
    assert time.monotonic() - started < 20
    assert yard.left() == []


def test_out_of_gpu_memory_is_tried_once_more_with_less(yard: Yard) -> None:
    notes = yard.build(largest_build=2)
    assert (notes["batch"], notes["workspace_bytes"]) == (2, 512 << 20)
    assert engine_cache.read(yard.cache, yard.profile).notes == notes  # kept as the answer to what was asked


def test_out_of_gpu_memory_twice_is_a_clear_failure(yard: Yard) -> None:
    with pytest.raises(InferenceError, match=r"OutOfMemory.*; with batch 2 too") as caught:
        yard.build(largest_build=1)
    assert caught.value.code == "runtime.memory"


def test_out_of_gpu_memory_for_a_fixed_batch(yard: Yard) -> None:
    with pytest.raises(InferenceError, match="OutOfMemory") as caught:
        yard.build(shape=[4, 1, 4, 4], largest_build=2)
    assert caught.value.code == "runtime.memory"


def test_second_try_may_fail_for_another_reason(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [InferenceError("runtime.memory", "too much"), InferenceError("runtime.build", "assertion")]
    monkeypatch.setattr(trt_build, "_run_builder", lambda *_, **__: (_ for _ in ()).throw(answers.pop(0)))
    with pytest.raises(InferenceError, match="assertion"):
        yard.build()


def test_model_that_takes_another_input(yard: Yard) -> None:
    with pytest.raises(InferenceError, match="the manifest says") as caught:
        yard.build(shape=[-1, 3, 4, 4])
    assert caught.value.code == "job.error"


@pytest.mark.parametrize(("shape", "expected"), [([4, 1, 4, 4], (4, False)), ([4, 1, -1, -1], (4, False)), ([-1, 1, -1, 4], (4, True))])
def test_fixed_batch_and_free_sizes(yard: Yard, shape: list[int], expected: tuple[int, bool]) -> None:
    notes = yard.build(shape=shape)
    assert (notes["batch"], notes["dynamic"]) == expected


def test_file_for_one_image_is_not_built_for_more(yard: Yard) -> None:
    with pytest.raises(InferenceError, match="takes 1 image at a time, not 4") as caught:
        yard.build(shape=[1, 1, 4, 4])
    assert caught.value.code == "job.error"


def test_no_gpu_in_the_builder(yard: Yard) -> None:
    runtime = yard.packages / "cuda" / "bindings" / "runtime.py"
    runtime.write_text(runtime.read_text().replace("StandInCuda(", "StandInCuda(gpus=0, "))
    with pytest.raises(InferenceError, match="no device") as caught:
        yard.build()
    assert caught.value.code == "runtime.unavailable"


def test_disk_that_is_full(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InferenceError, match="cannot be stored: No space") as caught:
        yard.build()
    assert caught.value.code == "runtime.build"
    assert yard.left() == []


def test_noise_on_the_builders_pipe_is_no_message() -> None:
    ear = trt_build._BuilderMessages(None)
    for line in (b"", b"malloc(): corrupted", b"[1, 2]", b"3", b"null", b'{"other": 1}', b"\xff\xfe", b'{"failed": {"code": "nonsense"}}'):
        ear.handle(line)
    assert (ear.notes, ear.last_message) == (None, "")


def test_builder_dies_with_its_parent(yard: Yard) -> None:
    yard.path.write_text(json.dumps(MODEL | {"takes_s": 100, "says": [["WARNING", "begun"]]}))
    order = BuildRequest(yard.path, "image", yard.profile, yard.cache)
    code = (
        "import sys; from pathlib import Path; from appliance.runtime import trt_build\n"
        "o = trt_build.BuildRequest.from_text(sys.argv[1]); trt_build.build(o, on_progress=lambda part: print('on_progress', flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, order.to_text()], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    limit = time.monotonic() + 20
    while _running(yard.cache) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not _running(yard.cache)


def _running(cache: Path) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()):
            try:
                line = (process / "cmdline").read_text()
            except OSError:
                continue
            if "trt_build" in line and str(cache) in line:
                found.append(process.name)
    return found


def test_adapter_and_builder_together(yard: Yard) -> None:
    """The whole way: the adapter here, its builder in a process of its own, and the engine from the cache the second time."""
    yard.path.write_text(json.dumps(MODEL))
    cuda = trt_stand_in.StandInCuda()
    compat = trt_build.TrtCompat(trt_stand_in.stand_in(yard.version, cuda))
    given = np.arange(48, dtype=np.float32).reshape(3, 1, 4, 4)
    for engine in ("built", "cached"):
        runtime = TensorRtRuntime(Candidate("tensorrt", "m.onnx", "fp16", "GPU:0", batch=4), tensorrt=lambda: compat, bindings=cuda)
        runtime.load(yard.path, SimpleNamespace(name="image", shape=(1, 4, 4)), cache=yard.cache)
        runtime.warm_up()
        assert np.array_equal(runtime.infer({"image": given})["same"], given)
        assert runtime.describe()["engine"] == engine
        runtime.close()
    assert +cuda.live == {}


def said(*texts: tuple[str, str]) -> Any:
    return SimpleNamespace(entries=list(texts), errors=lambda: [text for severity, text in texts if severity != "WARNING"])


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([("ERROR", "Cuda Runtime (out of memory)")], "runtime.memory"),
        ([("ERROR", "Requested amount of GPU memory (9 bytes) could not be allocated.")], "runtime.memory"),
        ([("ERROR", "std::bad_alloc"), ("ERROR", "builder failed")], "runtime.memory"),
        ([("WARNING", "Tactic Device request: 99MB Available: 1MB. Device memory is insufficient to use tactic."),
          ("ERROR", "Error Code 10: Internal Error (Could not find any implementation for node conv1.)")], "runtime.memory"),
        ([("ERROR", "Error Code 10: Internal Error (Could not find any implementation for node conv1.)")], "runtime.build"),
        ([("ERROR", "Error Code 4: Internal Error (Assertion x failed)")], "runtime.build"),
        ([], "runtime.build"),
    ],
)  # fmt: skip
def test_what_tensorrt_said_becomes_a_code(messages: list[tuple[str, str]], code: str) -> None:
    assert explain_build(said(*messages)).code == code


def test_parser_that_does_not_say_why() -> None:
    assert "it does not say why" in explain_parse([], said()).detail
    assert "ModelImporter" in explain_parse([], said(("ERROR", "ModelImporter: failed"))).detail
    assert explain_parse([ParseError("dims", "Resize")], said()).detail == "TensorRT cannot read the model: Resize dims"


def test_order_survives_the_command_line(yard: Yard) -> None:
    order = BuildRequest(yard.path, "image", yard.profile, yard.cache, gpu=1, memory_bytes=1 << 30, parent=5)
    assert BuildRequest.from_text(order.to_text()) == order
