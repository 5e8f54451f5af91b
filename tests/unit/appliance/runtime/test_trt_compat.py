"""The compat between TensorRT 8.6, 10 and 11, against the names that their real bindings have (``trt_api.json``)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import InferenceError
from appliance.runtime.trt_compat import BuildPhases, ParseError, TrtCompat, find, layer_types
from tests.support.trt_stand_in import API, VERSIONS, StandInCuda, stand_in


def seam_of(version: str) -> TrtCompat:
    return TrtCompat(stand_in(version, StandInCuda()))


def network_flag(version: str, name: str) -> int:
    return 1 << int(API[version]["enums"]["NetworkDefinitionCreationFlag"][name])


def test_versions_that_were_read() -> None:
    assert VERSIONS == ("8.6.0", "10.3.0", "11.4.0.106")


def test_network_flags() -> None:
    assert seam_of("8.6.0").network_flags() == network_flag("8.6.0", "EXPLICIT_BATCH")
    assert seam_of("10.3.0").network_flags() == network_flag("10.3.0", "EXPLICIT_BATCH") | network_flag("10.3.0", "STRONGLY_TYPED")
    assert seam_of("11.4.0.106").network_flags() == 0


def test_precision_flags_only_where_the_version_needs_them() -> None:
    old = seam_of("8.6.0")
    assert [old.builder_flags(name) for name in ("fp32", "fp16", "int8", "mixed")] == [(), ("FP16",), ("INT8",), ("FP16", "INT8")]
    for version in ("10.3.0", "11.4.0.106"):
        assert [seam_of(version).builder_flags(name) for name in ("fp32", "fp16", "int8", "mixed")] == [()] * 4
    assert not {"FP16", "INT8"} & set(API["11.4.0.106"]["enums"]["BuilderFlag"])  # they would be an AttributeError there


@pytest.mark.parametrize("version", VERSIONS)
def test_configuration(version: str) -> None:
    compat = seam_of(version)
    config = compat.trt.Builder(compat.messages()).create_builder_config()
    compat.configure(config, "fp16", workspace_bytes=1 << 26, level=1)
    assert config._flags == ({"FP16"} if version == "8.6.0" else set())  # TF32, on as it comes, is off
    assert (config._limits, config.builder_optimization_level) == ({"WORKSPACE": 1 << 26}, 1)
    assert config.profiling_verbosity.name == "DETAILED"


def test_tactics_of_libraries_that_are_not_there() -> None:
    old, sources = seam_of("8.6.0"), API["8.6.0"]["enums"]["TacticSource"]
    everything = sum(1 << value for value in sources.values())
    kept = old.tactic_sources(everything, lambda name: name == "CUDNN")
    assert kept == everything & ~(1 << sources["CUBLAS"]) & ~(1 << sources["CUBLAS_LT"])
    assert old.tactic_sources(everything, lambda _: True) is None
    assert seam_of("10.3.0").tactic_sources(everything, lambda _: False) is None


def test_libraries_are_asked_themselves() -> None:
    """This machine has neither cuBLAS nor cuDNN; with them their tactics stay."""
    old = seam_of("8.6.0")
    assert old.tactic_sources(0b11111) in (None, 0b11000)


@pytest.mark.parametrize("version", VERSIONS)
def test_timings_are_attached_merged_and_refused(version: str) -> None:
    compat = seam_of(version)
    config = compat.trt.Builder(compat.messages()).create_builder_config()
    assert not compat.attach_timings(config, b"")
    assert compat.attach_timings(config, b"gemm")
    assert compat.timings(config, b"conv pool") == b"conv gemm pool"
    assert not compat.attach_timings(config, b"foreign")
    assert compat.timings(config) == b""


@pytest.mark.parametrize("version", VERSIONS)
def test_messages_are_kept_told_and_forgotten(version: str) -> None:
    compat, on_progress = seam_of(version), []
    messages = compat.messages()
    messages.on_message = lambda severity, text: on_progress.append((severity, text))
    severity = compat.trt.ILogger.Severity
    messages.log(severity.VERBOSE, "nobody cares")
    messages.log(severity.WARNING, "hm")
    messages.log(severity.ERROR, "no\n  engine " + "x" * 1000)
    assert on_progress[0] == ("WARNING", "hm")
    assert [text[:10] for text in messages.errors()] == ["no engine "]
    assert len(messages.errors()[0]) == 400
    for _ in range(100):
        messages.log(severity.ERROR, "again")
    assert len(messages.entries) == 40
    messages.clear()
    assert messages.errors() == []


def test_only_later_versions_have_a_progress_monitor() -> None:
    assert seam_of("8.6.0").monitor(print) is None
    assert seam_of("10.3.0").monitor(print) is not None
    assert seam_of("11.4.0.106").has_progress
    assert seam_of("8.6.0").title == "TensorRT 8.6.0, precision by builder flags, no progress monitor"
    assert seam_of("11.4.0.106").title == "TensorRT 11.4.0.106, strongly typed, progress monitor"


def test_progress_of_nested_phases() -> None:
    on_progress: list[float] = []
    phases = BuildPhases(on_progress.append)
    phases.phase_start("build", None, 4)
    phases.phase_start("tactics", "build", 2)
    assert phases.step_complete("tactics", 0)
    phases.step_complete("tactics", 1)
    phases.phase_finish("tactics")
    phases.step_complete("build", 0)  # as far as it was
    phases.step_complete("build", 1)
    phases.step_complete("never begun", 0)
    phases.phase_start("afterwards", None, 10)
    phases.step_complete("afterwards", 0)
    assert on_progress == [0.125, 0.25, 0.5]


_phase = st.sampled_from("abcd")
_event = st.one_of(
    st.tuples(st.just("phase_start"), _phase, st.none() | _phase, st.integers(-1, 5)),
    st.tuples(st.just("step_complete"), _phase, st.integers(-1, 9)),
    st.tuples(st.just("phase_finish"), _phase),
)


@given(st.lists(_event, max_size=40))
def test_progress_only_grows_whatever_is_said(events: list[tuple[Any, ...]]) -> None:
    on_progress: list[float] = []
    phases = BuildPhases(on_progress.append)
    for name, *arguments in events:
        getattr(phases, name)(*arguments)
    assert on_progress == sorted(on_progress)
    assert all(0 < value <= 1 for value in on_progress)


@pytest.mark.parametrize(("version", "ok"), [("8.5.3", False), ("7.1.0", False), ("8.6.2.3", True), ("10.13.3.9", True), ("12.0.0", True)])
def test_versions_spoken(version: str, ok: bool) -> None:
    module = SimpleNamespace(__version__=version)
    if ok:
        assert TrtCompat(module).version == version
    else:
        with pytest.raises(InferenceError, match="older than"):
            TrtCompat(module)


def error_of(text: str, code: str, **more: str) -> Any:
    return SimpleNamespace(
        desc=lambda: text, code=lambda: f"ErrorCode.{code}", **{name: (lambda v=value: v) for name, value in more.items()}
    )


def test_operator_is_named_where_the_version_tells() -> None:
    new = ParseError.of(error_of("[8] no importer", "UNSUPPORTED_NODE", node_operator="Foo", node_name="head/foo"))
    assert (new.operator, new.node, new.unsupported) == ("Foo", "head/foo", True)
    old = ParseError.of(error_of("No importer registered for op: Foo. Attempting to import as plugin.", "INVALID_NODE"))
    assert (old.operator, old.node, old.unsupported) == ("Foo", "", True)
    other = ParseError.of(error_of("Assertion failed: dims.nbDims == 4", "INVALID_NODE"))
    assert (other.operator, other.unsupported) == ("", False)


def test_types_of_layers() -> None:
    layers = [
        {"Weights": {"Type": "Int8"}, "Inputs": [{"Format/Datatype": "Float"}]},
        {"Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}]},
        {"Inputs": [{"Format/Datatype": "Half"}]},
        {"Inputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
        {"Inputs": []}, {"Weights": [], "Inputs": [3]}, "only a name", None,
    ]  # fmt: skip
    assert layer_types(json.dumps({"Layers": layers, "Bindings": []})) == {"fp16": 2, "int8": 2}
    assert layer_types(json.dumps({"Layers": layers}), heavy=True) == {"int8": 1}
    assert layer_types(json.dumps({"Layers": ["conv", "relu"]})) == {}
    assert layer_types("no JSON") == layer_types("[]") == {}


def test_no_tensorrt_is_said() -> None:
    pytest.importorskip("onnxruntime")
    if "tensorrt" in sys.modules:
        pytest.skip("this environment has TensorRT")
    with pytest.raises(InferenceError, match="not installed") as caught:
        find()
    assert caught.value.code == "runtime.unavailable"


def test_bindings_without_their_libraries_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InferenceError, match=r"libnvinfer\.so\.10") as caught:
        find()
    assert caught.value.code == "runtime.unavailable"


def test_gpu_modules_import_with_numpy_alone() -> None:
    """The portable package for a bare GPU machine has TensorRT, cuda-bindings and NumPy, and nothing else."""
    heavy = ("pydantic", "onnx", "onnxruntime", "cryptography", "model_sync.bundle", "typing_extensions", "tensorrt", "cuda")
    check = f"import sys, appliance.runtime.tensorrt; print([m for m in {heavy!r} if sys.modules.get(m)])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"
