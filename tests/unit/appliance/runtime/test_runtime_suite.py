"""One suite for every runtime that can run here, in every precision: what one adapter promises, all keep."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import InferenceError
from appliance.runtime import Candidate, Runtime, open_runtime
from appliance.runtime.availability import available
from appliance.runtime.cpu_features import saturates
from appliance.tuning.candidate_process import CandidateProcess
from tests.support import small_networks as networks

BATCH = 4
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.15}
HERE = [(item.runtime, provider) for item in available(os.environ.get("APPLIANCE_TRITON_URL")) for provider in item.providers]


@dataclass(frozen=True)
class Spec:
    name: str = "image"
    shape: tuple[int, ...] = (networks.CHANNELS, networks.SIDE, networks.SIDE)


@dataclass(frozen=True)
class Way:
    """A runtime on a provider, as the suite opens it."""

    runtime: Any
    provider: str

    def candidate(self, precision: str = "fp32", *, batch: int = 1, threads: int = 1) -> Candidate:
        return Candidate(self.runtime, "model.onnx", precision, self.provider, threads, batch)

    def open(self, path: Path, spec: Any = Spec(), precision: str = "fp32", **more: Any) -> Runtime:
        return open_runtime(path, spec, self.candidate(precision, **more))

    def clips_8_bits(self) -> bool:
        """Whether int8 with weights of 8 bits is refused on the processor that this suite runs on: OpenVINO cannot avoid saturation."""
        return self.runtime == "openvino" and saturates()


@pytest.fixture(scope="module", params=HERE, ids="-".join)
def way(request: pytest.FixtureRequest) -> Way:
    return Way(*request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    fp32 = networks.classifier(folder / "fp32.onnx")
    return {
        "fp32": fp32,
        "fp16": networks.half(fp32, folder / "fp16.onnx"),
        "int8": networks.int8(fp32, folder / "int8.onnx"),
        "int8_7_bit_weights": networks.int8(fp32, folder / "int8_7.onnx", weight_bits=7),
    }


@pytest.fixture(scope="module")
def truth(models: dict[str, Path]) -> Callable[[Any], dict[str, Any]]:
    """What bare ONNX Runtime says in fp32."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(models["fp32"]), providers=["CPUExecutionProvider"])
    return lambda tensor: dict(zip(["probability", "map"], session.run(["probability", "map"], {"image": tensor}), strict=True))


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def opened(way: Way, precision: str, models: dict[str, Path]) -> Iterator[Runtime]:
    """The network in this precision; where int8 with weights of 8 bits is refused, the refusal, then one with weights of 7 bits."""
    path = models[precision]
    if precision == "int8" and way.clips_8_bits():
        check_int8_refusal(lambda: way.open(path, precision=precision, batch=BATCH))
        path = models["int8_7_bit_weights"]
    runtime = way.open(path, precision=precision, batch=BATCH)
    yield runtime
    runtime.close()


def refusal(call: Callable[[], Any]) -> InferenceError:
    with pytest.raises(InferenceError) as caught:
        call()
    return caught.value


def check_int8_refusal(call: Callable[[], Any]) -> None:
    error = refusal(call)
    assert (error.code, "may be clipped on this processor, which has no VNNI" in error.detail) == ("runtime.precision", True)


def test_describes_what_runs(opened: Runtime, way: Way, precision: str) -> None:
    described = opened.describe()
    assert {name: described[name] for name in ("runtime", "precision", "threads", "batch")} == {
        "runtime": way.runtime, "precision": precision, "threads": 1, "batch": BATCH,
    }  # fmt: skip
    assert described["version"] and described["version"] == opened.version
    assert (opened.name, opened.precision, opened.provider) == (way.runtime, precision, described["provider"])
    assert opened.provider.split()[0] == way.provider  # a GPU has its name behind it


def test_layers_that_ran_are_of_the_precision_it_says(opened: Runtime, way: Way, precision: str) -> None:
    layers = opened.describe().get("layers")
    if way.runtime in ("onnxruntime", "openvino"):
        assert layers and "bf16" not in layers
        assert bool({"u8", "i8"} & set(layers)) == (precision == "int8")


def test_says_in_the_manifests_words_what_layers_with_weights_ran_in(opened: Runtime, way: Way, precision: str) -> None:
    """A page that says "fp16" where a CPU ran float32 would be believed."""
    if way.provider in ("CPU", "CPUExecutionProvider"):
        assert opened.describe()["ran"] == {"fp32": "fp32", "fp16": "fp32", "int8": "int8"}[precision]


def test_input_that_may_not_be_written_to(opened: Runtime) -> None:
    tensor = networks.pictures(1)
    expected = opened.infer({"image": tensor})
    tensor.flags.writeable = False
    assert all(np.array_equal(output, expected[name]) for name, output in opened.infer({"image": tensor}).items())


def test_agrees_with_float(opened: Runtime, precision: str, truth: Any) -> None:
    tensor = networks.pictures(1)
    outputs, expected = opened.infer({"image": tensor}), truth(tensor)
    assert set(outputs) == {"probability", "map"}
    for name, output in outputs.items():
        assert output.dtype == np.float32
        assert output.shape == expected[name].shape
        assert np.max(np.abs(output - expected[name])) <= TOLERANCE[precision], name


@pytest.mark.parametrize("n", [2, 3, BATCH])
def test_a_batch_is_its_images_one_by_one(opened: Runtime, precision: str, n: int) -> None:
    tensor = networks.pictures(n)
    together = opened.infer({"image": tensor})
    single = [opened.infer({"image": tensor[index : index + 1]}) for index in range(n)]
    for name, output in together.items():
        alone = np.concatenate([outputs[name] for outputs in single])
        assert np.max(np.abs(output - alone)) <= (1e-5 if precision != "int8" else 1e-3), name


def test_an_output_stays_what_it_was(opened: Runtime) -> None:
    first = opened.infer({"image": networks.pictures(1)})
    kept = {name: output.copy() for name, output in first.items()}
    opened.infer({"image": 1 - networks.pictures(1)})
    assert all(np.array_equal(first[name], kept[name]) for name in kept)


def test_same_input_same_output(opened: Runtime) -> None:
    tensor = networks.pictures(1)
    once, again = opened.infer({"image": tensor}), opened.infer({"image": tensor})
    assert all(np.array_equal(once[name], again[name]) for name in once)


def test_input_that_is_not_contiguous(opened: Runtime) -> None:
    tensor = networks.pictures(1)
    mirrored = np.ascontiguousarray(tensor[..., ::-1])[..., ::-1]
    assert not mirrored.flags.c_contiguous
    whole, strided = opened.infer({"image": tensor}), opened.infer({"image": mirrored})
    assert all(np.array_equal(whole[name], strided[name]) for name in whole)


def test_wrong_inputs_are_refused(opened: Runtime) -> None:
    good = networks.pictures(1)
    for inputs in (
        {}, {"other": good}, {"image": good, "more": good}, {"image": good.astype(np.float64)}, {"image": good[:, :, :8]},
        {"image": good[:, :1]}, {"image": good[0]}, {"image": good[:0]}, {"image": good[None]},
    ):  # fmt: skip
        error = refusal(lambda inputs=inputs: opened.infer(inputs))  # type: ignore[misc]
        assert error.code == "job.error" and "float32 [n, 3, 16, 16]" in error.detail
    opened.infer({"image": good})


@pytest.mark.parametrize("numerator", [0.0, 1.0], ids=["nan", "inf"])
def test_output_that_is_no_number_is_refused(way: Way, tmp_path: Path, numerator: float) -> None:
    runtime = way.open(networks.reciprocal(tmp_path / "model.onnx", numerator))
    assert refusal(lambda: runtime.infer({"image": np.ones((1, *Spec().shape), np.float32)})).code == "job.error"
    runtime.infer({"image": np.zeros((1, *Spec().shape), np.float32)})
    runtime.close()


def test_closed_is_closed(way: Way, models: dict[str, Path]) -> None:
    runtime = way.open(models["fp32"])
    runtime.close()
    runtime.close()
    assert "closed" in refusal(lambda: runtime.infer({"image": networks.pictures(1)})).detail


def test_close_frees(way: Way, shared: Path) -> None:
    """Ten times the reference model's 13.6 MB of weights; the first loads fill pools that stay."""
    path = shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx"

    def load() -> int:
        way.open(path, Spec("image", (1, 224, 224)), batch=2).close()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    after = [load() for _ in range(12)]
    assert max(after[9:]) - after[2] < 40 << 20


def test_reference_model_agrees_with_bare_onnxruntime(way: Way, shared: Path) -> None:
    import onnxruntime

    path = shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx"
    tensor = np.random.default_rng(0).random((2, 1, 224, 224), np.float32)
    expected = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["probability", "cam"], {"image": tensor})
    runtime = way.open(path, Spec("image", (1, 224, 224)), batch=2)
    outputs = runtime.infer({"image": tensor})
    assert outputs["probability"] == pytest.approx(expected[0], abs=1e-4)
    assert outputs["cam"] == pytest.approx(expected[1], abs=1e-3)
    runtime.close()


def test_volume(way: Way, shared: Path) -> None:
    """Five dimensions: a crop of a head, three classes a voxel."""
    import onnxruntime

    path = shared / "models" / "brain_t1_meshnet5_gwm.onnx"
    volume = np.random.default_rng(0).random((1, 1, 24, 32, 40), np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    runtime = way.open(path, Spec(name, (1, 24, 32, 40)))
    outputs = runtime.infer({name: volume})
    (expected,) = session.run(None, {name: volume})
    (logits,) = outputs.values()
    assert logits.shape == (1, 3, 24, 32, 40)
    assert np.max(np.abs(logits - expected)) < 1e-3 * np.max(np.abs(expected))
    runtime.close()


def test_int8_model_of_another_toolchain(way: Way, shared: Path) -> None:
    """Against the graph as it is written; where int8 is refused, its answers show why: with sums clipped they are far off."""
    path = shared / "models" / "cxr_semobilenetv2_covid_int8_qdq.onnx"
    tensor = np.random.default_rng(0).random((1, 1, 224, 224), np.float32)
    (expected,) = networks.run_node_by_node(path, tensor).values()
    with pytest.MonkeyPatch.context() as patch:
        if way.clips_8_bits():
            check_int8_refusal(lambda: way.open(path, Spec("image", (1, 224, 224)), precision="int8"))
            patch.setattr("appliance.runtime.openvino.saturates", lambda: False)
        runtime = way.open(path, Spec("image", (1, 224, 224)), precision="int8")
    (logits,) = runtime.infer({"image": tensor}).values()
    is_right = np.max(np.abs(logits - expected)) < 0.1 * np.ptp(expected)
    assert is_right != way.clips_8_bits()
    runtime.close()


@pytest.mark.parametrize("spec", [Spec("picture"), Spec(shape=(1, 16, 16)), Spec(shape=(3, 16, 8)), Spec(shape=(3, 16, 16, 16))])
def test_model_that_takes_another_input_is_refused(way: Way, models: dict[str, Path], spec: Spec) -> None:
    error = refusal(lambda: way.open(models["fp32"], spec))
    assert (error.code, "the manifest says" in error.detail) == ("job.error", True)


@pytest.mark.parametrize("write", [networks.of_two_inputs, networks.of_no_input])
def test_model_of_two_inputs_or_none_is_refused(way: Way, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    error = refusal(lambda: way.open(write(tmp_path / "model.onnx")))
    assert error.code == "job.error" and "the manifest says 'image'" in error.detail


def test_model_for_one_image_at_once_is_not_opened_for_more(way: Way, tmp_path: Path) -> None:
    path = networks.classifier(tmp_path / "model.onnx", batch=1)
    runtime = way.open(path)
    assert runtime.infer({"image": networks.pictures(1)})["probability"].shape == (1, 2)
    runtime.close()
    assert refusal(lambda: way.open(path, batch=BATCH)).code in ("job.error", "runtime.build")


def test_output_of_another_batch_is_refused(way: Way, tmp_path: Path) -> None:
    assert "shape" in refusal(lambda: way.open(networks.of_other_batch(tmp_path / "model.onnx"))).detail


def broken_files(folder: Path, whole: Path) -> dict[str, Path]:
    content = whole.read_bytes()
    files = {"junk": b"no model at all", "empty": b"", "truncated": content[: len(content) // 2], "short": content[:-100]}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files} | {"absent": folder / "absent", "directory": folder}


@pytest.mark.parametrize("kind", ["junk", "empty", "truncated", "short", "absent", "directory"])
def test_file_that_is_no_model_is_refused(way: Way, models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    error = refusal(lambda: way.open(broken_files(tmp_path, models["fp32"])[kind]))
    assert error.code in ("job.error", "runtime.build")
    assert str(tmp_path) not in error.detail


def test_weights_that_are_missing_are_said(way: Way, models: dict[str, Path], tmp_path: Path) -> None:
    error = refusal(lambda: way.open(networks.without_its_weights(models["fp32"], tmp_path / "model.onnx")))
    assert error.code in ("job.error", "runtime.build")
    assert "weights.bin" in error.detail and str(tmp_path) not in error.detail


def test_operator_that_it_does_not_know_is_named(way: Way, tmp_path: Path) -> None:
    error = refusal(lambda: way.open(networks.of_unknown_operator(tmp_path / "model.onnx")))
    assert error.code in ("job.error", "runtime.build") and "Nonsense" in error.detail


def test_provider_that_is_not_there_is_an_error_and_no_fallback(way: Way, models: dict[str, Path]) -> None:
    if way.runtime == "triton":
        pytest.skip("a provider is an address there")
    candidate = Candidate(way.runtime, "model.onnx", "fp32", "GPU:7", 1)
    assert refusal(lambda: open_runtime(models["fp32"], Spec(), candidate)).code == "runtime.unavailable"


def test_same_answers_in_a_process_of_its_own(way: Way, models: dict[str, Path], precision: str, opened: Runtime) -> None:
    """Refusals too: a child process knows its processor by itself."""
    tensor = networks.pictures(2)
    expected = opened.infer({"image": tensor})
    if precision == "int8" and way.clips_8_bits():
        with CandidateProcess(models[precision], Spec(), way.candidate(precision, batch=BATCH), deadline_s=120) as attempt:
            check_int8_refusal(attempt.load)
        return
    with CandidateProcess(models[precision], Spec(), way.candidate(precision, batch=BATCH), deadline_s=120) as attempt:
        there, here = attempt.load(), opened.describe()
        steady = set(here) - {"build", "cuda_graph", "cuda_graph_why"}  # TensorRT's are of this load and this batch
        assert {name: there[name] for name in steady} == {name: here[name] for name in steady}
        outputs = attempt.infer(tensor)
        assert all(np.allclose(outputs[name], expected[name], atol=1e-5) for name in expected)
        assert attempt.peak_rss_bytes > 20 << 20


@pytest.mark.parametrize("memory_mib", [32, 64, 128])
def test_too_little_memory_ends_the_attempt_and_nothing_else(way: Way, shared: Path, memory_mib: int) -> None:
    """Too little for the library, for the model, for a batch."""
    if way.runtime == "tensorrt":
        pytest.skip("its memory is the GPU's, and its batch 16 at most: tests/hardware")
    path = shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx"
    attempt = CandidateProcess(path, Spec("image", (1, 224, 224)), way.candidate(batch=64), deadline_s=120, memory_bytes=memory_mib << 20)
    error = refusal(attempt.load)
    assert error.code == "runtime.memory", error
