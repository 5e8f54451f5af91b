"""The Triton adapter against a real Triton Inference Server where one can run, and against a small one that can be told to misbehave."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import requests
from onnx import TensorProto, helper

from appliance.core.errors import ApplianceError, InferenceError
from appliance.core.settings import Settings
from appliance.runtime import CPU, Candidate, open_runtime
from appliance.runtime.triton import TritonRuntime
from tests.support import triton_server
from tests.support.kserve_server import KserveServer

# gevent, below tritonclient, leaves its loop's signal watcher and a socket to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@dataclasses.dataclass
class Spec:
    name: str = "image"
    shape: tuple[int, ...] = (1, 8, 8)


def make_model(path: Path, batch: Any = "n", bias: float = 0.0) -> Path:
    """probability = sigmoid(mean(image) + bias), cam = image."""
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["mean", "bias"], ["sum"]),
        helper.make_node("Sigmoid", ["sum"], ["probability"]),
        helper.make_node("Identity", ["image"], ["cam"]),
    ]
    outputs = [
        helper.make_tensor_value_info("probability", TensorProto.FLOAT, (batch, 1)),
        helper.make_tensor_value_info("cam", TensorProto.FLOAT, (batch, 1, 8, 8)),
    ]
    bias_value = helper.make_tensor("bias", TensorProto.FLOAT, [1], [bias])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, (batch, 1, 8, 8))
    graph = helper.make_graph(nodes, "g", [image], outputs, [bias_value])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[triton_server.TritonServer]:
    if why := triton_server.why_not():
        pytest.skip(why)
    server = triton_server.TritonServer(tmp_path_factory.mktemp("triton"))
    yield server
    server.close()


@pytest.fixture
def small() -> Iterator[KserveServer]:
    server = KserveServer()
    yield server
    server.close()


@pytest.fixture(params=["real", "small"])
def address(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param).address)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model.onnx")


def candidate(address: str, batch: int = 4) -> Candidate:
    return Candidate("triton", "model.onnx", "fp32", address, batch=batch)


def opened(model: Path, address: str, batch: int = 4, **how: Any) -> TritonRuntime:
    runtime = TritonRuntime(candidate(address, batch), **how)
    try:
        runtime.load(model, Spec())
        runtime.warm_up()
    except BaseException:
        runtime.close()
        raise
    return runtime


def is_ready(address: str, name: str) -> bool:
    return requests.get(f"http://{address}/v2/models/{name}/ready", timeout=5).ok


def images(n: int) -> Any:
    return np.random.default_rng(n).random((n, 1, 8, 8), np.float32)


@pytest.mark.parametrize("batch", ["n", 4])
def test_answers_as_onnx_runtime_does(address: str, tmp_path: Path, batch: Any) -> None:
    model = make_model(tmp_path / "model.onnx", batch)
    runtime = opened(model, address)
    here = open_runtime(make_model(tmp_path / "free.onnx"), Spec(), Candidate("onnxruntime", "m.onnx", "fp32", CPU))
    for n in (1, 2, 3, 4, 7):
        given = images(n)
        there, expected = runtime.infer({"image": given}), here.infer({"image": given})
        assert set(there) == set(expected)
        for name in expected:
            assert np.allclose(there[name], expected[name], atol=1e-6)
            assert there[name].shape == expected[name].shape
    here.close()
    runtime.close()


def test_file_for_one_image_is_not_opened_for_more(small: KserveServer, tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match="takes 1 image at a time, not 4"):
        opened(make_model(tmp_path / "model.onnx", 1), small.address)
    assert small.seen == []


def test_model_is_named_for_its_digest_and_unloaded_at_the_end(address: str, model: Path) -> None:
    runtime = opened(model, address)
    said = runtime.describe()
    assert said == json.loads(json.dumps(said))
    assert {"model_repository", "binary_tensor_data"} <= set(said["extensions"])
    assert (said["runtime"], said["provider"], said["batch"], said["leaves_box"]) == ("triton", address, 4, True)
    assert said["version"].split()[0] in ("triton", "small")
    assert is_ready(address, said["model"])
    runtime.close()
    runtime.close()
    assert not is_ready(address, said["model"])
    with pytest.raises(InferenceError, match="closed"):
        runtime.infer({"image": images(1)})


def test_two_versions_are_two_models(address: str, tmp_path: Path) -> None:
    one, two = (opened(make_model(tmp_path / f"{bias}.onnx", bias=bias), address) for bias in (0.0, 5.0))
    given = images(1)
    assert one.infer({"image": given})["probability"] < two.infer({"image": given})["probability"]
    assert one.describe()["model"] != two.describe()["model"]
    one.close()
    two.close()


def test_what_is_open_twice_here_is_unloaded_with_the_last(address: str, model: Path) -> None:
    """As when a model is measured anew, and taken once more: who comes uses what is there, then the one before goes."""
    before, after = opened(model, address), opened(model, address)
    before.close()
    after.infer({"image": images(1)})
    after.close()
    assert not is_ready(address, runtime_name(model))


def test_what_another_box_loaded_is_used_and_left(address: str, model: Path) -> None:
    first, second = opened(model, address), opened(model, address)
    second.close()
    assert is_ready(address, first.describe()["model"])
    first.infer({"image": images(1)})
    first.close()


def test_model_that_the_server_lost_is_not_given_to_it_while_it_reads(address: str, model: Path) -> None:
    """What a server that was started anew makes of the file, nobody has seen: it is loaded, and proven, by whoever opens it again."""
    runtime = opened(model, address)
    name = runtime.describe()["model"]
    requests.post(f"http://{address}/v2/repository/models/{name}/unload", timeout=10).raise_for_status()
    with pytest.raises(InferenceError, match="does not have the model") as caught:
        runtime.infer({"image": images(2)})
    assert caught.value.code == "runtime.unavailable"
    assert not is_ready(address, name)
    other = opened(model, address)
    runtime.close()
    assert is_ready(address, name)  # another's now
    other.close()
    assert not is_ready(address, name)


def test_every_thread_has_its_own_connection(address: str, model: Path) -> None:
    """Loaded in one thread, used in another, as a worker may: gevent's sockets belong to the thread that made them."""
    runtime, answers = opened(model, address), []
    given = images(1)
    threads = [threading.Thread(target=lambda: answers.append(runtime.infer({"image": given})["cam"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 3
    assert all(np.array_equal(answer, given) for answer in answers)
    runtime.close()


def test_file_that_the_server_cannot_load(address: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model.onnx")
    proto = onnx.load(path)
    proto.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(proto, path)
    with pytest.raises(InferenceError, match="NoSuchOperator") as caught:
        opened(path, address)
    assert caught.value.code == "runtime.build"


def test_reference_model(address: str, shared: Path) -> None:
    path = shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx"
    given = np.random.default_rng(0).random((2, 1, 224, 224), np.float32)
    there = open_runtime(path, Spec(shape=(1, 224, 224)), candidate(address))
    here = open_runtime(path, Spec(shape=(1, 224, 224)), Candidate("onnxruntime", "m.onnx", "fp32", CPU))
    answers, expected = there.infer({"image": given}), here.infer({"image": given})
    for name in expected:
        assert np.allclose(answers[name], expected[name], atol=1e-3)
    there.close()
    here.close()


def test_only_the_tensor_is_sent(small: KserveServer, model: Path) -> None:
    runtime = opened(model, small.address)
    small.seen.clear()
    given = images(1)
    runtime.infer({"image": given})
    runtime.close()
    (method, path, headers, body), *_ = small.seen
    length = int(headers["Inference-Header-Content-Length"])
    head = json.loads(body[:length])
    assert (method, path) == ("POST", f"/v2/models/{runtime_name(model)}/infer")
    assert body[length:] == given.tobytes()
    assert set(head) == {"inputs", "outputs"}
    assert head["inputs"] == [{"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": 256}}]
    allowed = {"host", "user-agent", "accept", "connection", "content-length", "content-type", "inference-header-content-length"}
    assert {name.lower() for name in headers} <= allowed
    assert socket.gethostname() not in json.dumps(headers)


def runtime_name(model: Path) -> str:
    import hashlib

    return f"edge-{hashlib.sha256(model.read_bytes()).hexdigest()[:40]}-b4"


FAULTS = {
    "wrong shape": ("job.error", "as .*, not"),
    "wrong batch": ("job.error", "has the shape"),
    "no number": ("job.error", "no numbers"),
    "missing output": ("job.error", "answered|cannot be read"),
    "answers for another": ("job.error", "answered with the model 'another'"),
    "short data": ("job.error", "cannot be read"),
    "nonsense": ("job.error", "cannot be read"),
    "500": ("job.error", "the backend died"),
    "slow": ("runtime.deadline", "no answer from .* in 1 s"),
    "cut": ("runtime.unavailable", "cannot be reached"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_server_that_misbehaves_is_an_error_and_the_next_answer_is_right(small: KserveServer, model: Path, fault: str) -> None:
    runtime = opened(model, small.address, answer_s=1)
    small.fault = fault
    code, words = FAULTS[fault]
    with pytest.raises(InferenceError, match=words) as caught:
        runtime.infer({"image": images(2)})
    assert caught.value.code == code
    small.fault = ""
    given = images(2)
    assert np.array_equal(runtime.infer({"image": given})["cam"], given)
    runtime.close()


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("another model", "job.error", "describes the model"),
        ("another type", "job.error", "the file FP32"),
        ("another input", "job.error", "the server has 'image'"),
        ("no output", "job.error", "the server has 'probability'"),
        ("never ready", "job.error", "does not have the model ready"),
        ("out of memory", "runtime.memory", "out of memory"),
    ],
)
def test_server_that_has_something_else_is_refused_and_nothing_left_there(
    small: KserveServer, model: Path, fault: str, code: str, words: str
) -> None:
    small.fault = fault
    with pytest.raises(InferenceError, match=words) as caught:
        opened(model, small.address)
    assert caught.value.code == code
    assert small.models == {}


def test_server_without_the_repository_extension(small: KserveServer, model: Path) -> None:
    small.extensions = ["binary_tensor_data"]
    with pytest.raises(InferenceError, match="has no model_repository") as caught:
        opened(model, small.address)
    assert caught.value.code == "runtime.unavailable"


def test_hub_that_is_not_there(model: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(InferenceError, match="cannot be reached") as caught:
        opened(model, address)
    assert caught.value.code == "runtime.unavailable"


def test_hub_whose_name_nobody_knows(model: Path) -> None:
    with pytest.raises(InferenceError) as caught:
        opened(model, "hub.invalid:8000")
    assert caught.value.code == "runtime.unavailable"


def test_hub_that_goes_away(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = KserveServer()
    runtime = opened(model, server.address)
    server.close()
    with pytest.raises(InferenceError) as caught:
        runtime.infer({"image": images(1)})
    assert caught.value.code == "runtime.unavailable"
    with caplog.at_level(logging.WARNING):
        runtime.close()
    assert "may still hold the model" in caplog.text


def test_hub_that_never_answers(model: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InferenceError, match="in 1 s") as caught:
            opened(model, f"127.0.0.1:{silent.getsockname()[1]}", answer_s=1)
    assert caught.value.code == "runtime.deadline"


def test_certificate_that_nobody_vouches_for(tmp_path: Path, model: Path) -> None:
    pem = tmp_path / "hub.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", pem,
         "-out", tmp_path / "c",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    pem.write_bytes(pem.read_bytes() + (tmp_path / "c").read_bytes())
    server = KserveServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    server._server.handle_error = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(InferenceError, match="certificate") as caught:
        opened(model, f"https://{server.address}")
    assert caught.value.code == "runtime.unavailable"
    assert server.seen == []
    server.close()


@pytest.mark.parametrize("address", ["", "ftp://hub:21", "http://", "https://user:secret@hub:8000"])
def test_addresses_that_are_none(model: Path, address: str) -> None:
    with pytest.raises(InferenceError, match="no address of a server") as caught:
        opened(model, address)
    assert caught.value.code == "job.error"


@pytest.mark.parametrize("how", ["other input", "other name", "no model", "absent"])
def test_files_that_do_not_fit_are_refused_before_anything_is_sent(small: KserveServer, tmp_path: Path, how: str) -> None:
    path = make_model(tmp_path / "model.onnx")
    spec = {"other input": Spec(shape=(1, 16, 16)), "other name": Spec(name="picture")}.get(how, Spec())
    if how == "no model":
        path.write_bytes(b"no model")
    elif how == "absent":
        path.unlink()
    with pytest.raises(InferenceError) as caught:
        TritonRuntime(candidate(small.address)).load(path, spec)
    assert caught.value.code == "job.error"
    assert small.seen == []


@pytest.mark.parametrize(
    "url", ["https://hub.county.example:8000", "hub:8000", "10.1.2.3:8000", "http://[fd00::1]:8000", "https://hub/triton"]
)
def test_setting(tmp_path: Path, url: str) -> None:
    assert Settings.parse({"data_dir": tmp_path, "triton_url": url}).triton_url == url
    assert Settings.parse({"data_dir": tmp_path}).triton_url == ""


@pytest.mark.parametrize("url", ["https://user:secret@hub:8000", "ftp://hub", "hub:8000?x=1", "hub 8000", "https://", "[hub]"])
def test_setting_that_is_no_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(ApplianceError, match="triton_url"):
        Settings.parse({"data_dir": tmp_path, "triton_url": url})
