"""Finds out which runtimes can run on this box, and why the others cannot.

Each runtime that is installed is imported in a process of its own: libraries that were built for another driver, C library
or processor often crash instead of raising an exception. This takes half a second if all are installed, and loads no model.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.core.child_process import ENVIRONMENT, printable_text
from appliance.core.errors import InferenceError
from appliance.core.process import die_with_parent
from appliance.runtime import CPU, RUNTIMES, RuntimeName
from appliance.runtime.cpu_features import X86

_PROBE_S: Final = 60.0
_REASON_CHARS: Final = 200
_CUDA_EP: Final = "CUDAExecutionProvider"
_PACKAGES: Final[dict[RuntimeName, str]] = {
    "onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt", "triton": "tritonclient",
}  # fmt: skip
# Device files of the GPU drivers: of cards, and of Jetson Orin and earlier.
_DEVICE_FILES: Final = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0/as", "/dev/nvhost-as-gpu")


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can run on this box.

    Attributes:
        runtime: its name.
        version: its version; empty when it is not installed.
        providers: values of ``Candidate.provider`` with which it can run; empty when it cannot run.
        why: why it cannot run, or cannot use a GPU; empty when there is no reason.
    """

    runtime: RuntimeName
    version: str
    providers: tuple[str, ...]
    why: str = ""


def available(triton_url: str | None = None) -> tuple[Availability, ...]:
    """List every known runtime with the providers it can use on this box; does not check whether the Triton server answers."""
    return tuple(_triton(triton_url) if runtime == "triton" else _probe(runtime) for runtime in RUNTIMES)


def _triton(url: str | None) -> Availability:
    if not url:
        return Availability("triton", "", (), "not configured")
    client = _probe("triton")
    return client if client.why else Availability("triton", client.version, (url,))


def _probe(runtime: RuntimeName) -> Availability:
    """Import a runtime in a process of its own and read what it reports."""
    if importlib.util.find_spec(_PACKAGES[runtime]) is None:
        return Availability(runtime, "", (), "not installed")
    if runtime == "tensorrt" and (why := no_gpu()):  # not imported without a GPU: it is large
        return Availability(runtime, "", (), why)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "appliance.runtime.availability", runtime, str(os.getpid())], stdin=subprocess.DEVNULL,
            capture_output=True, timeout=_PROBE_S, check=False, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Availability(runtime, "", (), f"did not answer in {_PROBE_S:g} s")
    except OSError as error:
        return Availability(runtime, "", (), f"could not be started: {error.strerror}")
    return _parse_answer(runtime, done.stdout, done.returncode)


def _parse_answer(runtime: RuntimeName, output: bytes, exit_code: int) -> Availability:
    """Parse the last line of the output; libraries may print lines before it."""
    try:
        answer = json.loads(output.strip().rsplit(b"\n", 1)[-1])
        providers = tuple(printable_text(provider, _REASON_CHARS) for provider in answer["providers"])
        return Availability(
            runtime, printable_text(answer["version"], _REASON_CHARS), providers, printable_text(answer["why"], _REASON_CHARS)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return Availability(runtime, "", (), f"crashes when it is imported (exit code {exit_code})")


def no_gpu() -> str:
    """Find why no NVIDIA GPU can be used; empty when there seems to be one. Looks at files only."""
    if not any(Path(name).exists() for name in _DEVICE_FILES):
        return "no GPU: no device file of an NVIDIA driver"
    return ""


def _gpus() -> tuple[int, str]:
    """Return the number of GPUs of the CUDA driver, or why there is none. Only for the child process: the driver may crash."""
    if why := no_gpu():
        return 0, why
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, "no GPU: libcuda.so.1 is not installed"
    count = ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error or not count.value:
        return 0, f"no GPU: CUDA's driver reports error {error}"
    return count.value, ""


def _probe_onnxruntime() -> dict[str, Any]:
    ort = importlib.import_module("onnxruntime")
    why, providers = "", [CPU]
    if _CUDA_EP in ort.get_available_providers():
        gpus, why = _gpus()
        providers += [_CUDA_EP] if gpus else []
    return {"version": ort.__version__, "providers": providers, "why": why}


def _probe_openvino() -> dict[str, Any]:
    if platform.machine() not in X86:
        return {"version": "", "providers": [], "why": f"used on x86 only, this is {platform.machine()}"}
    from appliance.runtime.openvino import import_openvino, version

    devices = import_openvino().Core().available_devices
    return {"version": version(), "providers": [name for name in devices if name == "CPU"], "why": ""}


def _probe_tensorrt() -> dict[str, Any]:
    tensorrt = importlib.import_module("tensorrt")
    gpus, why = _gpus()
    if gpus:
        from appliance.runtime.cuda import Cuda

        Cuda()  # raises an error when its bindings are missing
    return {"version": tensorrt.__version__, "providers": [f"GPU:{index}" for index in range(gpus)], "why": why}


def _probe_triton() -> dict[str, Any]:
    importlib.import_module("tritonclient.http")
    return {"version": importlib.import_module("importlib.metadata").version("tritonclient"), "providers": [], "why": ""}


_PROBES: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "onnxruntime": _probe_onnxruntime, "openvino": _probe_openvino, "tensorrt": _probe_tensorrt, "triton": _probe_triton,
}  # fmt: skip


def main(runtime: str, parent: str) -> int:
    """Run as the child process: print the answer as JSON and exit without destructors, which may crash."""
    die_with_parent()
    if os.getppid() != int(parent):
        return 1
    try:
        answer = _PROBES[runtime]()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
        answer = {"version": "", "providers": [], "why": reason}
    except InferenceError as error:
        answer = {"version": "", "providers": [], "why": error.detail}
    with suppress(BrokenPipeError):
        print("\n" + json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
