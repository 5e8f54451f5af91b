"""What a box can run, and why not the rest; whoever asks is not harmed by a library that crashes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.runtime import CPU, RUNTIMES, availability
from tests.conftest import ROOT


def broken_package(folder: Path, name: str, body: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(body)


def asked(runtime: str, triton_url: str | None = None) -> availability.Availability:
    (found,) = (item for item in availability.available(triton_url) if item.runtime == runtime)
    return found


def test_every_runtime_is_named_once_and_the_plain_one_can_run() -> None:
    found = availability.available()
    assert [item.runtime for item in found] == list(RUNTIMES)
    assert all(item.why for item in found if not item.providers)
    assert found[0].providers[0] == CPU and found[0].version


def test_nothing_is_imported_by_whoever_asks() -> None:
    code = (
        "import sys; from appliance.runtime.availability import available; available('http://127.0.0.1:1'); "
        "print([name for name in ('onnxruntime', 'openvino', 'tensorrt', 'tritonclient') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert {item.why for item in availability.available()} == {"not installed", "not configured"}


def test_triton_is_where_it_was_configured() -> None:
    assert asked("triton").why == "not configured"
    pytest.importorskip("tritonclient")
    assert asked("triton", "hub.example:8000").providers == ("hub.example:8000",)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("import ctypes; ctypes.string_at(0)", "crashes when it is imported"),
        ("import os; print('{\"providers\": 1}', flush=True); os._exit(3)", "crashes when it is imported (exit code 3)"),
        ("raise ImportError('libcudnn.so.9: cannot open shared object file')", "libcudnn.so.9"),
        ("import no_such_package", "no_such_package is not installed"),
        ("__version__ = '9'", "available_devices|Core|get_version"),
    ],
)
def test_library_that_fails_says_why_and_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, why: str) -> None:
    broken_package(tmp_path, "openvino", body)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = asked("openvino")
    assert found.providers == ()
    assert any(words in found.why for words in why.split("|")), found.why


def test_library_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_package(tmp_path, "openvino", "import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(availability, "_PROBE_S", 3.0)
    assert asked("openvino").why == "did not answer in 3 s"


def test_tensorrt_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said by looking at files: nothing of its gigabytes is loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr(availability, "_DEVICE_FILES", ())
    assert "no GPU" in asked("tensorrt").why


def test_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_DEVICE_FILES", ("/dev/null",))
    count, why = availability._gpus()
    assert (count == 0 and why.startswith("no GPU: ")) or (count > 0 and why == "")


@pytest.mark.parametrize(
    "said", [b"", b"{", b"[]", b"null", b"[" * 100000, b'{"providers": 3}', b'{"providers": [], "why": ""}', b"\xff\xfe"]
)
def test_answer_that_is_none(said: bytes) -> None:
    assert "crashes" in availability._parse_answer("openvino", said, -11).why


class Driver:
    """libcuda.so.1 as ctypes gives it."""

    def __init__(self, gpus: int, error: int = 0) -> None:
        self._gpus, self._error = gpus, error

    def cuInit(self, _flags: int) -> int:  # noqa: N802 - CUDA's name
        return self._error

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802 - CUDA's name
        count._obj.value = self._gpus
        return 0


@pytest.mark.parametrize(
    ("driver", "found"),
    [(Driver(2), (2, "")), (Driver(0), (0, "no GPU: CUDA's driver reports error 0")), (Driver(1, 100), (0, "error 100"))],
)
def test_gpus_are_counted_by_the_driver(monkeypatch: pytest.MonkeyPatch, driver: Driver, found: tuple[int, str]) -> None:
    monkeypatch.setattr(availability, "_DEVICE_FILES", ("/dev/null",))
    monkeypatch.setattr("ctypes.CDLL", lambda _: driver)
    count, why = availability._gpus()
    assert count == found[0] and found[1] in why


def answered(monkeypatch: pytest.MonkeyPatch, runtime: str) -> dict[str, Any]:
    """What the process that asks would print."""
    said: list[str] = []
    monkeypatch.setattr(availability, "die_with_parent", lambda: None)
    monkeypatch.setattr("os.getppid", lambda: 7)
    monkeypatch.setattr("os._exit", lambda code: said.append(str(code)))
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
    availability.main(runtime, "7")
    answer: dict[str, Any] = json.loads(said[0])
    assert said[1:] == ["0"]
    return answer


def test_tensorrt_runs_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr(availability, "_gpus", lambda: (2, ""))
    monkeypatch.setattr("appliance.runtime.cuda.Cuda", lambda: None)
    assert answered(monkeypatch, "tensorrt") == {"version": "10.3.0", "providers": ["GPU:0", "GPU:1"], "why": ""}


def test_tensorrt_without_cudas_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr(availability, "_gpus", lambda: (1, ""))
    for module in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, module, None)
    answer = answered(monkeypatch, "tensorrt")
    assert answer["providers"] == [] and "cuda" in answer["why"].lower()


def test_tensorrt_whose_gpu_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr(availability, "_gpus", lambda: (0, "no GPU: gone"))
    assert answered(monkeypatch, "tensorrt") == {"version": "10.3.0", "providers": [], "why": "no GPU: gone"}


@pytest.mark.parametrize(("gpus", "providers"), [(1, [CPU, "CUDAExecutionProvider"]), (0, [CPU])])
def test_cuda_only_where_onnxruntime_has_it_and_a_gpu_is_there(monkeypatch: pytest.MonkeyPatch, gpus: int, providers: list[str]) -> None:
    found = ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: found)
    monkeypatch.setattr(availability, "_gpus", lambda: (gpus, "" if gpus else "no GPU: none"))
    answer = answered(monkeypatch, "onnxruntime")
    assert answer["providers"] == providers
    assert bool(answer["why"]) == (gpus == 0)


def test_openvino_is_for_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    answer = answered(monkeypatch, "openvino")
    assert answer == {"version": "", "providers": [], "why": "used on x86 only, this is aarch64"}


def test_asking_for_a_parent_that_has_died() -> None:
    assert subprocess.run([sys.executable, "-m", "appliance.runtime.availability", "triton", "1"], check=False, cwd=ROOT).returncode == 1
