"""What this box can run models with, and why not with the rest.

Each runtime is looked for without importing it, and asked in a process of its own: libraries that were built for another driver, C library
or processor end a process more often than they raise. That takes half a second where all are installed, and loads no model.
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

from appliance.core.child_process import ENVIRONMENT, plain
from appliance.core.errors import InferenceError
from appliance.core.process import die_with_parent
from appliance.runtime import CPU, RUNTIMES, RuntimeName
from appliance.runtime.cpu_features import X86

_ASK_S: Final = 60.0
_WHY_CHARS: Final = 200
_CUDA_EP: Final = "CUDAExecutionProvider"
_PACKAGES: Final[dict[RuntimeName, str]] = {
    "onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt", "triton": "tritonclient",
}  # fmt: skip
# What a GPU's driver makes: a card's, and an Orin's and its predecessors'.
_DEVICE_FILES: Final = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0/as", "/dev/nvhost-as-gpu")


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can run here.

    Attributes:
        runtime: which.
        version: its version; empty when it is not installed.
        providers: where it can run, for ``Candidate.provider``; empty when it cannot run.
        why: why it cannot, or cannot on a GPU; empty when there is nothing to say.
    """

    runtime: RuntimeName
    version: str
    providers: tuple[str, ...]
    why: str = ""


def available(triton_url: str | None = None) -> tuple[Availability, ...]:
    """Every runtime that we know, with what it can run on here. Whether a Triton server answers is not asked.

    Args:
        triton_url: address of a Triton server, as configured.
    """
    return tuple(_triton(triton_url) if runtime == "triton" else _ask(runtime) for runtime in RUNTIMES)


def _triton(url: str | None) -> Availability:
    if not url:
        return Availability("triton", "", (), "not configured")
    asked = _ask("triton")
    return asked if asked.why else Availability("triton", asked.version, (url,))


def _ask(runtime: RuntimeName) -> Availability:
    """Import a runtime in a process of its own and hear what it says of itself."""
    if importlib.util.find_spec(_PACKAGES[runtime]) is None:
        return Availability(runtime, "", (), "not installed")
    if runtime == "tensorrt" and (why := no_gpu()):  # it is large: not even imported where nothing could come of it
        return Availability(runtime, "", (), why)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "appliance.runtime.availability", runtime, str(os.getpid())], stdin=subprocess.DEVNULL,
            capture_output=True, timeout=_ASK_S, check=False, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Availability(runtime, "", (), f"did not answer in {_ASK_S:g} s")
    except OSError as error:
        return Availability(runtime, "", (), f"could not be asked: {error.strerror}")
    return _understood(runtime, done.stdout, done.returncode)


def _understood(runtime: RuntimeName, said: bytes, exit_code: int) -> Availability:
    """What the process said, in its last line: libraries may print before it."""
    try:
        answer = json.loads(said.strip().rsplit(b"\n", 1)[-1])
        providers = tuple(plain(provider, _WHY_CHARS) for provider in answer["providers"])
        return Availability(runtime, plain(answer["version"], _WHY_CHARS), providers, plain(answer["why"], _WHY_CHARS))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Availability(runtime, "", (), f"crashes when it is imported (exit code {exit_code})")


def no_gpu() -> str:
    """Why no NVIDIA GPU can be used here; empty when one seems to be there. Looks at files only."""
    if not any(Path(name).exists() for name in _DEVICE_FILES):
        return "no GPU: no device file of an NVIDIA driver"
    return ""


def _gpus() -> tuple[int, str]:
    """How many GPUs CUDA's driver counts, and why none. Called in the process that may die."""
    if why := no_gpu():
        return 0, why
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, "no GPU: libcuda.so.1 is not installed"
    count = ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error or not count.value:
        return 0, f"no GPU: CUDA's driver says error {error}"
    return count.value, ""


def _ask_onnxruntime() -> dict[str, Any]:
    ort = importlib.import_module("onnxruntime")
    why, providers = "", [CPU]
    if _CUDA_EP in ort.get_available_providers():
        gpus, why = _gpus()
        providers += [_CUDA_EP] if gpus else []
    return {"version": ort.__version__, "providers": providers, "why": why}


def _ask_openvino() -> dict[str, Any]:
    if platform.machine() not in X86:
        return {"version": "", "providers": [], "why": f"used on x86 only, this is {platform.machine()}"}
    from appliance.runtime.openvino import import_openvino, version

    devices = import_openvino().Core().available_devices
    return {"version": version(), "providers": [name for name in devices if name == "CPU"], "why": ""}


def _ask_tensorrt() -> dict[str, Any]:
    tensorrt = importlib.import_module("tensorrt")
    gpus, why = _gpus()
    if gpus:
        from appliance.runtime.cuda import Cuda

        Cuda()  # says so when its bindings are missing
    return {"version": tensorrt.__version__, "providers": [f"GPU:{index}" for index in range(gpus)], "why": why}


def _ask_triton() -> dict[str, Any]:
    importlib.import_module("tritonclient.http")
    return {"version": importlib.import_module("importlib.metadata").version("tritonclient"), "providers": [], "why": ""}


_ASKED: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "onnxruntime": _ask_onnxruntime, "openvino": _ask_openvino, "tensorrt": _ask_tensorrt, "triton": _ask_triton,
}  # fmt: skip


def main(runtime: str, parent: str) -> int:
    """The process that asks; prints its answer as JSON, then leaves without destructors, which crash too."""
    die_with_parent()
    if os.getppid() != int(parent):
        return 1
    try:
        answer = _ASKED[runtime]()
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
