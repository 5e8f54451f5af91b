"""What makes this box this box to a model: processor, GPU and its driver, runtimes, appliance version. A failed self-test belongs to all.

A model that failed is not tried again on the same device; a new processor, GPU, driver, runtime or appliance is another device. All of
it is read from files in milliseconds: no library of a runtime is loaded and no GPU is woken.
"""

from __future__ import annotations

import hashlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from appliance import __version__

# A runtime, and the packages it may come in: TensorRT's wheels are named for the CUDA they are for.
_RUNTIMES: Final = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu12", "tensorrt-cu12-bindings"),
    "tritonclient": ("tritonclient",),
}
_CPU_INFO: Final = Path("/proc/cpuinfo")
_BOARD: Final = Path("/proc/device-tree/model")  # a Jetson names itself here
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_GPUS: Final = Path("/proc/driver/nvidia/gpus")
_TEGRA: Final = Path("/etc/nv_tegra_release")  # a Jetson's driver is that of its Jetson Linux
_MAX_CHARS: Final = 1 << 16


def profile() -> str:
    """The device in words: processor, GPUs with their driver, runtimes with their versions, appliance version; no serial numbers."""
    gpus = [f"GPU {name}" for name in gpu_names()]
    driver = gpu_driver()
    runtimes = [f"{name} {found}" for name, packages in _RUNTIMES.items() if (found := _version(packages))]
    return "; ".join((_processor(), *gpus, *([f"driver {driver}"] if driver else []), *runtimes, f"appliance {__version__}"))


def digest() -> str:
    """What stands for the device in the journal: 16 hex digits."""
    return hashlib.sha256(profile().encode()).hexdigest()[:16]


def gpu_names() -> list[str]:
    """The NVIDIA GPUs that the driver knows, in the order of their places; empty where there are none (a Jetson is its board)."""
    try:
        places = sorted(_GPUS.iterdir())
    except OSError:
        return []
    named = (re.search(r"^Model:\s*(.+)$", _read(place / "information"), re.MULTILINE) for place in places)
    return [found[1].strip() for found in named if found]


def gpu_driver() -> str:
    """The version of NVIDIA's driver ("580.65.06"), or of Jetson Linux ("R36.4.3"); empty where there is none."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", _read(_DRIVER))
    if found:
        return found[1]
    release = re.search(r"(R\d+).*?REVISION:\s*([\d.]+)", _read(_TEGRA))
    return f"{release[1]}.{release[2]}" if release else ""


def _processor() -> str:
    """The processor's name, without what changes from start to start."""
    if board := _read(_BOARD).strip("\0\n "):
        return board
    named = re.search(r"^model name\s*:\s*(.+)$", _read(_CPU_INFO), re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def _read(path: Path) -> str:
    """A small file of the system; empty when it is not there."""
    try:
        with open(path, errors="replace") as file:
            return file.read(_MAX_CHARS)
    except OSError:
        return ""


def _version(packages: tuple[str, ...]) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""
