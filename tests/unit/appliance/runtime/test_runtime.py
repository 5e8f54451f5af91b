"""The ONNX Runtime adapter: what it runs is what it says, and nothing wrong passes for a result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.core.errors import InferenceError
from appliance.runtime import CPU, Candidate, Runtime, open_runtime
from appliance.runtime.onnxruntime import OnnxRuntime, check_placement, kernels_of, layers_of
from model_sync.bundle import InputSpec
from tests.support import small_networks as networks

PIPELINE = [
    {"step": "modality_lut"},
    {"step": "voi", "default": "minmax"},
    {"step": "monochrome2"},
    {"step": "to_uint8"},
    {"step": "resize", "height": 8, "width": 8, "filter": "area"},
]


def make_spec(side: int = 8, name: str = "image") -> InputSpec:
    size = {"height": side, "width": side}
    pipeline = [*PIPELINE[:4], PIPELINE[4] | size]
    return InputSpec.model_validate({"name": name, "layout": "NCHW", "dtype": "float32", "channels": 1, "pipeline": pipeline} | size)


def save(path: Path, nodes: list[Any], outputs: list[Any], shape: tuple[Any, ...] = ("n", 1, 8, 8), constants: Any = ()) -> Path:
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)], outputs, list(constants))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def plain(threads: int = 0, provider: str = CPU, precision: str = "fp32") -> Candidate:
    return Candidate("onnxruntime", "model.onnx", precision, provider, threads)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """probability = sigmoid(mean(image)), cam = image."""
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Sigmoid", ["mean"], ["probability"]),
        helper.make_node("Identity", ["image"], ["cam"]),
    ]
    outputs = [
        helper.make_tensor_value_info("probability", TensorProto.FLOAT, ("n", 1)),
        helper.make_tensor_value_info("cam", TensorProto.FLOAT, ("n", 1, 8, 8)),
    ]
    return save(tmp_path / "model.onnx", nodes, outputs)


def test_runs_and_describes_itself(model: Path) -> None:
    runtime: Runtime = open_runtime(model, make_spec(), plain(1))
    image = np.full((1, 1, 8, 8), 2.0, np.float32)
    outputs = runtime.infer({"image": image})
    assert outputs["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert np.array_equal(outputs["cam"], image)
    assert runtime.describe() == {
        "runtime": "onnxruntime", "version": runtime.version, "provider": "CPUExecutionProvider", "precision": "fp32", "threads": 1,
        "batch": 1, "layers": {"f32": 2}, "ran": "",
    }  # fmt: skip
    assert (runtime.name, runtime.precision, runtime.provider) == ("onnxruntime", "fp32", "CPUExecutionProvider")
    runtime.close()
    with pytest.raises(InferenceError):
        runtime.infer({"image": image})


def test_threads_default_to_the_cores_of_the_process(model: Path) -> None:
    assert open_runtime(model, make_spec(), plain()).describe()["threads"] >= 1


def test_provider_that_is_not_there_is_an_error_and_no_fallback(model: Path) -> None:
    with pytest.raises(InferenceError, match="CUDAExecutionProvider"):
        open_runtime(model, make_spec(), plain(provider="CUDAExecutionProvider"))


def test_session_on_another_provider_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself falls back with no more than a log line."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["XyzExecutionProvider", "CPUExecutionProvider"])
    real = onnxruntime.InferenceSession

    def fallen_back(path: str, options: Any, providers: list[str], provider_options: list[Any]) -> Any:
        assert (providers, provider_options) == (["XyzExecutionProvider"], [{}])
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    with pytest.raises(InferenceError, match="runs on CPUExecutionProvider"):
        open_runtime(model, make_spec(), plain(provider="XyzExecutionProvider"))


@pytest.mark.parametrize("spec", [make_spec(16), make_spec(name="picture")])
def test_model_that_takes_another_input_is_refused(model: Path, spec: InputSpec) -> None:
    with pytest.raises(InferenceError, match="the manifest says"):
        open_runtime(model, spec, plain())


def test_inputs_that_are_not_the_models_are_refused(model: Path) -> None:
    runtime = open_runtime(model, make_spec(), plain())
    good = np.zeros((1, 1, 8, 8), np.float32)
    for inputs in ({}, {"other": good}, {"image": good, "more": good}, {"image": good.astype(np.float64)}, {"image": good[:, :, :4]}):
        with pytest.raises(InferenceError):
            runtime.infer(inputs)


def test_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(InferenceError) as caught:
        open_runtime(path, make_spec(), plain())
    assert caught.value.code == "job.error"
    with pytest.raises(InferenceError):
        open_runtime(tmp_path / "absent.onnx", make_spec(), plain())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_output_that_is_no_number_is_an_error(tmp_path: Path, value: float) -> None:
    """An image of ones divides by zero; the warm-up image of zeros does not."""
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    top = numpy_helper.from_array(np.array(0 if np.isnan(value) else 1, np.float32), "top")
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Sub", ["mean", "one"], ["rest"]),
        helper.make_node("Div", ["top", "rest"], ["probability"]),
    ]
    outputs = [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ("n", 1))]
    runtime = open_runtime(save(tmp_path / "m.onnx", nodes, outputs, constants=[one, top]), make_spec(), plain())
    with pytest.raises(InferenceError, match="no numbers"):
        runtime.infer({"image": np.ones((1, 1, 8, 8), np.float32)})


def test_output_of_another_batch_is_an_error(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([8, 8], np.int64), "shape")
    nodes = [helper.make_node("Reshape", ["image", "shape"], ["probability"])]
    outputs = [helper.make_tensor_value_info("probability", TensorProto.FLOAT, (8, 8))]
    with pytest.raises(InferenceError, match="has the shape"):
        open_runtime(save(tmp_path / "m.onnx", nodes, outputs, (1, 1, 8, 8), [shape]), make_spec(), plain())


def test_failure_inside_the_runtime_is_an_inference_error(tmp_path: Path) -> None:
    """A reshape that fits the warm-up's batch of one only."""
    shape = numpy_helper.from_array(np.array([1, 64], np.int64), "shape")
    nodes = [helper.make_node("Reshape", ["image", "shape"], ["probability"])]
    outputs = [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ("n", 64))]
    runtime = open_runtime(save(tmp_path / "m.onnx", nodes, outputs, constants=[shape]), make_spec(), plain())
    with pytest.raises(InferenceError, match="ONNX Runtime"):
        runtime.infer({"image": np.zeros((2, 1, 8, 8), np.float32)})


def test_reference_model_gives_a_probability_and_its_map(shared: Path) -> None:
    runtime = open_runtime(shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx", make_spec(224), plain(1))
    image = np.random.default_rng(0).random((1, 1, 224, 224), np.float32)
    outputs = runtime.infer({"image": image})
    assert outputs["probability"].shape == (1, 1)
    assert outputs["cam"].shape == (1, 1, 7, 7)
    assert np.array_equal(outputs["cam"], runtime.infer({"image": image})["cam"])


def test_int8_model_of_another_toolchain_runs(shared: Path) -> None:
    path = shared / "models" / "cxr_semobilenetv2_covid_int8_qdq.onnx"
    name = onnx.load(path).graph.input[0].name
    runtime = open_runtime(path, make_spec(224, name), plain(precision="int8"))
    outputs = runtime.infer({name: np.zeros((1, 1, 224, 224), np.float32)})
    assert next(iter(outputs.values())).shape == (1, 3)


def test_port_is_importable_without_any_runtime() -> None:
    check = "import sys, appliance.runtime; print('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "False"


def kernel(op_name: str, provider: str = "CUDAExecutionProvider", kind: str = "float") -> dict[str, Any]:
    """As in a profile of ONNX Runtime."""
    args = {"op_name": op_name, "provider": provider, "input_type_shape": [{kind: [1, 3, 8, 8]}], "node_index": "1"}
    return {"cat": "Node", "name": f"{op_name}_1_kernel_time", "ph": "X", "dur": 3, "args": args}


def test_heavy_layer_that_ran_elsewhere_is_an_error() -> None:
    """ONNX Runtime moves what a provider lacks to the CPU and says nothing."""

    good = [kernel("Conv"), kernel("Shape", CPU, "int64"), kernel("Gather", CPU, "int64")]
    check_placement(kernels_of(good), "CUDAExecutionProvider")
    with pytest.raises(InferenceError, match=r"2 layers ran on CPUExecutionProvider \(the first: FusedConv\)"):
        check_placement(kernels_of([*good, kernel("FusedConv", CPU), kernel("MatMulInteger", CPU, "uint8")]), "CUDAExecutionProvider")


def test_layers_are_counted_by_what_they_took() -> None:

    ran = [kernel("QLinearConv", kind="uint8"), kernel("Conv", kind="float16"), kernel("QuantizeLinear"), kernel("Softmax")]
    assert layers_of(kernels_of(ran)) == [("QLinearConv", "u8"), ("Conv", "f16"), ("Softmax", "f32")]
    assert layers_of(kernels_of([kernel("DynamicQuantizeMatMul")])) == [("DynamicQuantizeMatMul", "u8")]
    assert layers_of([{"op_name": "Conv"}, {"op_name": "Conv", "input_type_shape": []}]) == []


@pytest.mark.parametrize("events", [None, {}, [], [1, None, "x"], [{"name": "a_kernel_time"}], [{"name": 5, "args": {}}]])
def test_profile_of_another_kind_tells_nothing(events: Any) -> None:

    assert kernels_of(events) == []


def test_no_profile_is_left_behind(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    runtime = open_runtime(model, make_spec(), plain())
    assert list((tmp_path / "t").iterdir()) == []
    runtime.close()
    cold = OnnxRuntime(plain())
    cold.load(model, make_spec())
    cold.close()
    assert list((tmp_path / "t").iterdir()) == []


def test_without_room_for_a_profile_it_runs_all_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    runtime = open_runtime(model, make_spec(), plain())
    assert not {"layers", "ran"} & set(runtime.describe())


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime with a GPU's provider, as far as this machine can have it: the session runs on the CPU and says otherwise."""
    import onnxruntime

    class Session:
        def __init__(self, path: str, options: Any, **_: Any) -> None:
            self._real = real(path, options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", CPU]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)


def test_on_a_gpu_without_a_profile_it_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: nothing would tell that its layers run on the CPU."""
    on_a_gpu(monkeypatch)
    open_runtime(model, make_spec(), plain(provider="CUDAExecutionProvider")).close()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(InferenceError, match="there is no profile") as caught:
        open_runtime(model, make_spec(), plain(provider="CUDAExecutionProvider"))
    assert caught.value.code == "runtime.unavailable"


def test_on_a_gpu_with_a_profile_that_is_too_long_it_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr("appliance.runtime.onnxruntime._MAX_PROFILE_BYTES", 10)
    with pytest.raises(InferenceError, match="there is no profile"):
        open_runtime(model, make_spec(), plain(provider="CUDAExecutionProvider"))


@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_float_file_that_is_called_quantized_is_refused(tmp_path: Path, precision: str) -> None:
    path = networks.classifier(tmp_path / "float.onnx")
    with pytest.raises(InferenceError, match=f"{precision} is what the file says; 3 layers run in f32, none in 8 bits") as caught:
        open_runtime(path, networks.Spec(), plain(1, precision=precision))
    assert caught.value.code == "runtime.precision"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_quantized_file_that_is_called_float_is_refused(tmp_path: Path, precision: str) -> None:
    path = networks.int8(networks.classifier(tmp_path / "float.onnx"), tmp_path / "int8.onnx")
    with pytest.raises(InferenceError, match=f"{precision} is what the file says; 3 of 3 layers run in 8 bits"):
        open_runtime(path, networks.Spec(), plain(1, precision=precision))


def test_quantized_graph_that_runs_in_float_runs_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime is what every box falls back to: it runs, with the numbers that were gated, and tells."""
    import onnxruntime

    path = networks.int8(networks.classifier(tmp_path / "float.onnx"), tmp_path / "int8.onnx")
    real = onnxruntime.InferenceSession

    def unfused(path: str, options: Any, **more: Any) -> Any:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return real(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", unfused)
    runtime = open_runtime(path, networks.Spec(), plain(1, precision="int8"))
    assert (runtime.describe()["precision"], runtime.describe()["ran"]) == ("int8", "fp32")


def test_layers_that_went_back_to_float_are_told(tmp_path: Path) -> None:
    path = networks.int8(networks.classifier(tmp_path / "float.onnx"), tmp_path / "mixed.onnx", keep=["second"])
    runtime = open_runtime(path, networks.Spec(), plain(1, precision="mixed"))
    assert runtime.describe()["ran"] == "int8 + fp32"


def test_adapter_that_is_not_installed_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino", "appliance.runtime.openvino"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("appliance.runtime.openvino", None, raising=False)  # put back afterwards: the import below leaves another there
    with pytest.raises(InferenceError, match="openvino is not installed") as caught:
        open_runtime(model, make_spec(), Candidate("openvino", "model.onnx", "fp32", "CPU"))
    assert caught.value.code == "runtime.unavailable"


def test_library_that_is_missing_only_when_it_loads_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    def load(*_: Any, **__: Any) -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(OnnxRuntime, "load", load)
    monkeypatch.setattr(OnnxRuntime, "close", lambda _: closed.append(True))
    with pytest.raises(InferenceError, match=r"libcudart\.so\.12") as caught:
        open_runtime(model, make_spec(), plain())
    assert (caught.value.code, closed) == ("runtime.unavailable", [True])
