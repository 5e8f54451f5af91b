"""nvidia-modelopt in a process of its own: how it is found, what it is given, what may come of it; and itself, where it is installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from quantize import cli
from quantize.errors import QuantizeError
from quantize.graph.onnx_graph import clean_up, initializers, producers
from quantize.recipes import modelopt
from quantize.recipes.modelopt import Optimizer
from quantize.recipes.modelopt_graph import load_quantized
from tests.support.processes import children_running, has_ended
from tests.support.quantize_networks import Net, images, residual, run, unet

Environment = Callable[[str], Optimizer]

# --- a stand-in: an environment of its own, whose modelopt does what a test wants of it --------------------------------

_STAND_IN = """
import os, signal, time
import numpy as np, onnx
from onnx import helper, numpy_helper
from modelopt.onnx import utils

def quantize(onnx_path, **options):
    out = options["output_path"]
    model = onnx.load(onnx_path)
    {body}
    onnx.save(model, out)
"""


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    def make(body: str) -> Optimizer:
        directory = tmp_path / "environment"
        venv.create(directory, symlinks=True)
        packages = next(directory.glob("lib/python*/site-packages"))
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
        package = packages / "modelopt" / "onnx"
        package.mkdir(parents=True)
        (package / "utils.py").write_text("QDQ_PRECISION_MIN_OPSET = {'int8': 19}\n")
        (package / "quantization.py").write_text(_STAND_IN.format(body=body))
        described = packages / "nvidia_modelopt-0.47.9.dist-info"
        described.mkdir()
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-modelopt\nVersion: 0.47.9\n")
        found = modelopt.find_optimizer(directory / "bin" / "python")
        assert isinstance(found, Optimizer)
        return found

    return make


def failing(optimizer: Optimizer, out: Path, model: Any = None) -> str:
    with pytest.raises(QuantizeError) as caught:
        modelopt.quantize(clean_up(residual()) if model is None else model, images(4), "max", optimizer, out)
    assert not out.exists()
    return caught.value.message


def test_an_environment_says_its_version(environment: Environment) -> None:
    assert environment("pass").version == "0.47.9"


def test_an_environment_is_named_from_where_one_stands(environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = environment("raise RuntimeError('it was started')").python
    monkeypatch.chdir(tmp_path)
    here = modelopt.find_optimizer(python.relative_to(tmp_path))
    assert isinstance(here, Optimizer)
    assert "it was started" in failing(here, tmp_path / "int8.onnx")
    monkeypatch.setenv("PATH", str(python.parent))
    named = modelopt.find_optimizer(Path("python"))
    assert isinstance(named, Optimizer)
    assert "it was started" in failing(named, tmp_path / "int8.onnx")


def test_an_environment_without_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    assert modelopt.find_optimizer(tmp_path / "bare" / "bin" / "python") == "not installed"


@pytest.mark.parametrize(
    ("python", "why"), [("/nowhere/python", "does not start"), ("/bin/false", "ended with exit code 1"), ("/bin/true", "not installed")]
)
def test_what_is_no_python(python: str, why: str) -> None:
    found = modelopt.find_optimizer(Path(python))
    assert isinstance(found, str)
    assert why in found


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("raise RuntimeError('no such\\nlayer')", "ended with exit code 1: RuntimeError: no such layer"),
        ("os._exit(7)", "ended with exit code 7: no output"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("return", "wrote no model that can be read"),
        ("open(out, 'wb').write(b'no model'); return", "wrote no model that can be read"),
        ("pass", "wrote a model without Q/DQ"),
        ("del model.graph.output[0]", "wrote a model with other inputs or outputs"),
        ("model.opset_import[0].version = 19", "wrote opset ai.onnx 19 where the float model has ai.onnx 17"),
        ("import socket; socket.create_connection(('192.0.2.1', 80))", "PermissionError: the quantizer opens no connection"),
        ("import socket; socket.getaddrinfo('models.example', 80)", "PermissionError: the quantizer opens no connection"),
    ],
)
def test_whatever_its_process_dies_of_is_the_reason(environment: Environment, tmp_path: Path, body: str, reason: str) -> None:
    assert reason in failing(environment(body), tmp_path / "int8.onnx")


def test_a_model_that_is_not_symmetric_is_refused(environment: Environment, tmp_path: Path) -> None:
    body = """
    model.graph.initializer.extend([numpy_helper.from_array(np.float32(0.01), "s"), numpy_helper.from_array(np.uint8(128), "z")])
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    for kind, source, to in (("Dequantize", "q", "d"), ("Quantize", "image", "q")):
        model.graph.node.insert(0, helper.make_node(kind + "Linear", [source, "s", "z"], [to], to))
    first.input[0] = "d"
    """
    assert "not symmetric int8, at q" in failing(environment(body.strip()), tmp_path / "int8.onnx")


def test_a_model_none_of_whose_weights_are_quantized_is_refused(environment: Environment, tmp_path: Path) -> None:
    """modelopt leaves narrow convolutions in float, and may put Q/DQ around a pooling alone: nothing is smaller or faster for it."""
    body = """
    model.graph.initializer.extend([numpy_helper.from_array(np.float32(0.01), "s"), numpy_helper.from_array(np.int8(0), "z")])
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    for kind, source, to in (("Dequantize", "q", "d"), ("Quantize", "image", "q")):
        model.graph.node.insert(0, helper.make_node(kind + "Linear", [source, "s", "z"], [to], to))
    first.input[0] = "d"
    """
    assert "no weights in 8 bits" in failing(environment(body.strip()), tmp_path / "int8.onnx")


def test_one_that_hangs_is_ended_with_all_that_it_started(environment: Environment, tmp_path: Path) -> None:
    body = "import subprocess; subprocess.Popen(['sleep', '4321']); time.sleep(4321)"
    optimizer = environment(body)
    assert "was ended after 5 s" in failing(Optimizer(optimizer.python, optimizer.version, limit_s=5), tmp_path / "int8.onnx")
    assert not children_running("4321")


def test_a_python_that_is_gone_by_then(tmp_path: Path) -> None:
    assert "does not start" in failing(Optimizer(Path("/nowhere/python"), "0.47.0"), tmp_path / "int8.onnx")


def test_it_gets_what_every_recipe_gets_and_leaves_nothing_behind(environment: Environment, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    body = f"""
    np.save({str(kept / "given.npy")!r}, options["calibration_data"])
    onnx.save(model, {str(kept / "given.onnx")!r})
    import json, tempfile
    asked = {{name: options[name] for name in ("calibration_method", "calibration_eps", "high_precision_dtype", "quantize_mode")}}
    asked |= {{"opset": utils.QDQ_PRECISION_MIN_OPSET["int8"], "temporary": tempfile.mkstemp()[1], "beside": os.path.dirname(onnx_path)}}
    open({str(kept / "asked.json")!r}, "w").write(json.dumps(asked))
    """
    model, tensors = clean_up(residual()), images(6)
    fractions: list[float] = []
    with pytest.raises(QuantizeError, match="without Q/DQ"):
        modelopt.quantize(model, tensors, "entropy", environment(body.strip()), tmp_path / "int8.onnx", on_progress=fractions.append)
    assert np.array_equal(np.load(kept / "given.npy"), tensors)
    assert onnx.load(kept / "given.onnx") == model
    asked = json.loads((kept / "asked.json").read_text())
    assert asked["opset"] == 17
    assert not Path(asked.pop("temporary")).exists()
    assert not Path(asked.pop("beside")).exists()
    assert asked["calibration_method"] == "entropy"
    assert asked["calibration_eps"] == ["cpu"]
    assert all(0 <= part <= 1 for part in fractions)


_ORPHAN = """
import sys
from pathlib import Path
from quantize.recipes import modelopt
from quantize.graph.onnx_graph import clean_up
from tests.support.quantize_networks import images, residual
modelopt.quantize(clean_up(residual()), images(4), "max", modelopt.Optimizer(Path(sys.argv[1]), "0"), Path(sys.argv[2]))
"""


def test_it_ends_with_the_run_that_started_it(environment: Environment, tmp_path: Path) -> None:
    optimizer = environment("time.sleep(4321)")
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, "-c", _ORPHAN, optimizer.python, tmp_path / "x.onnx"], cwd=root)
    limit = time.monotonic() + 60
    while not (found := children_running("modelopt_child", process.pid)):
        assert time.monotonic() < limit
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert has_ended(found[0].pid, 60)


# --- what is taken over -----------------------------------------------------------------------------------------------


def with_float_weights(model: Any, path: Path) -> Any:
    """What nvidia-modelopt writes is of this form: ONNX Runtime's quantizer with a QuantizeLinear behind each weight."""
    from onnxruntime.quantization import QuantType, quantize_static

    class Reader:
        def __init__(self) -> None:
            self.feeds = iter([{"image": images(8)}])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    onnx.save(model, path.with_name("float.onnx"))
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}
    quantize_static(
        path.with_name("float.onnx"), path, Reader(), per_channel=True, activation_type=QuantType.QInt8, extra_options=options,
        op_types_to_quantize=["Conv", "ConvTranspose"],
    )  # fmt: skip
    return onnx.load(path)


@pytest.mark.parametrize("net", [residual, unet])
def test_weights_are_stored_in_8_bits_and_nothing_else_changes(net: Any, tmp_path: Path) -> None:
    model = clean_up(net())
    made = with_float_weights(model, tmp_path / "made.onnx")
    small = load_quantized(tmp_path / "made.onnx", model)
    assert len(small.SerializeToString()) < len(made.SerializeToString())
    held, sources = initializers(small), producers(small)
    for node in small.graph.node:
        assert node.op_type != "QuantizeLinear" or node.input[0] not in held
        if node.op_type == "Conv":
            assert held[sources[node.input[1]].input[0]].dtype == np.int8
    for before, after in zip(run(made, images(4), optimised=False), run(small, images(4), optimised=False), strict=True):
        assert np.array_equal(before, after)
    assert small.ir_version == model.ir_version


def test_a_weight_outside_the_range_of_its_scale_is_cut_off(tmp_path: Path) -> None:
    names = ["w", "s", "z"]
    nodes = [
        helper.make_node("QuantizeLinear", names, ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("Add", ["image", "d"], ["y"], "add"),
    ]
    values = [np.array([-9.0, 0.5, 1.5, 2.5, 9.0], np.float32), np.float32(0.05), np.int8(0)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [5]) for name in ("image", "y")]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(np.asarray(v), n) for n, v in zip(names, values, strict=True)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "made.onnx")
    assert initializers(load_quantized(tmp_path / "made.onnx", model))["q"].tolist() == [-128, 10, 30, 50, 127]


# --- the commands -----------------------------------------------------------------------------------------------------


def test_asking_for_one_that_is_not_there_is_an_error_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for name in ("model", "manifest", "calibration", "evaluation", "out") for word in (f"--{name}", str(tmp_path / name))]
    assert cli.main(["run", *given, "--modelopt", "/nowhere/python"]) == 1
    said = capsys.readouterr().err
    assert "/nowhere/python does not start" in said
    assert "hint: pip install" in said
    with pytest.raises(SystemExit):
        cli.main(["run", *given, "--modelopt", "/nowhere/python", "--no-modelopt"])


def test_what_is_said_of_one_that_is_not_tried() -> None:
    assert modelopt.makers("not installed") == ()
    assert modelopt.explain_absence("not installed") == ("未试 nvidia-modelopt；nvidia-modelopt was not tried: not installed",)
    assert modelopt.explain_absence("") == ()
    assert modelopt.explain_absence(Optimizer(Path("python"), "0.47.0")) == ()
    names = [maker.name for maker in modelopt.makers(Optimizer(Path("python"), "0.47.0"))]
    assert names == ["int8-modelopt-max", "int8-modelopt-entropy"]


# --- itself -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Optimizer:
    given = os.environ.get("MODELOPT_PYTHON")
    found = modelopt.find_optimizer(Path(given) if given else None)
    if isinstance(found, str):
        pytest.skip(f"nvidia-modelopt: {found} (the extra [modelopt]; MODELOPT_PYTHON names the Python of another environment)")
    return found


def wide() -> Any:
    """A residual network of 16 channels: its rules leave convolutions with fewer in float, but for the first."""
    net = Net()
    data = net.relu(net.norm(net.conv("image", 16, bias=False)))
    inner = net.norm(net.conv(net.relu(net.norm(net.conv(data, 16, bias=False))), 16, bias=False))
    net.head(net.relu(net.add("Add", inner, data)))
    return net.model()


@pytest.mark.parametrize(("net", "method"), [(wide, "max"), (wide, "entropy"), (residual, "max"), (unet, "max")])
def test_itself_makes_a_model_that_is_near_the_float_one(real: Optimizer, net: Any, method: str, tmp_path: Path) -> None:
    model = clean_up(net())
    modelopt.quantize(model, images(16), method, real, tmp_path / "int8.onnx")
    small = onnx.load(tmp_path / "int8.onnx")
    assert {entry.version for entry in small.opset_import if entry.domain == ""} == {17}
    held, made = initializers(small), producers(small)
    shrunk = [node for node in small.graph.node if node.op_type == "Conv" and node.input[1] in made]
    assert shrunk
    assert all(held[made[node.input[1]].input[0]].dtype == np.int8 for node in shrunk)
    assert net is not wide or len(shrunk) == 3
    (right,), (now,) = run(model, images(4, seed=9)), run(small, images(4, seed=9))
    assert now.dtype == np.float32
    allowed = 0.2 if method == "entropy" else 0.1
    assert np.sqrt(np.mean((now - right) ** 2)) < allowed * np.sqrt(np.mean(right**2))
