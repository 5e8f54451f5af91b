"""The device profile: everything about this box that a self-test or a measurement depends on.

A model that failed is not tried again on the same device; a new processor, GPU, driver, runtime or appliance makes another device. The
profile is read from files in milliseconds: no runtime library is loaded and no GPU is initialised.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from appliance import __version__

# A runtime, and the packages that may contain it: the names of TensorRT's wheels contain the CUDA version.
_RUNTIMES: Final = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu12", "tensorrt-cu12-bindings"),
    "tritonclient": ("tritonclient",),
}
# The instructions that inference uses, by the kernel's names for x86 and Arm.
_FEATURES: Final = frozenset((
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "amx_fp16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
))  # fmt: skip
_CPU_INFO: Final = Path("/proc/cpuinfo")
_BOARD: Final = Path("/proc/device-tree/model")  # the name of a Jetson
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_GPUS: Final = Path("/proc/driver/nvidia/gpus")
_TEGRA: Final = Path("/etc/nv_tegra_release")  # a Jetson's driver belongs to its Jetson Linux release
_MAX_CHARS: Final = 1 << 16


def profile() -> str:
    """The device profile as text: processor, GPUs, driver, runtimes with versions, appliance version; no serial numbers."""
    gpus = [f"GPU {name}" for name in gpu_names()]
    driver = gpu_driver()
    runtimes = [f"{name} {installed}" for name, packages in _RUNTIMES.items() if (installed := _version(packages))]
    return "; ".join((_processor(), *gpus, *([f"driver {driver}"] if driver else []), *runtimes, f"appliance {__version__}"))


def device_class() -> str:
    """The identifier of boxes with the same processor, features, number of cores and GPUs: 16 hex digits.

    Driver, runtimes and appliance do not count, and there is no serial number in it, so that it names a kind of box and never one.
    """
    features = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(_CPU_INFO), re.MULTILINE)
    known = sorted(_FEATURES.intersection(features[1].split())) if features else []
    parts = (_processor(), " ".join(known), str(os.cpu_count()), *gpu_names())
    return hashlib.sha256("; ".join(parts).encode()).hexdigest()[:16]


def digest() -> str:
    """The identifier of the device in the journal: 16 hex digits."""
    return hashlib.sha256(profile().encode()).hexdigest()[:16]


def gpu_names() -> list[str]:
    """The NVIDIA GPUs that the driver lists, ordered by bus address; empty where there are none, and on a Jetson."""
    try:
        directories = sorted(_GPUS.iterdir())
    except OSError:
        return []
    matches = (re.search(r"^Model:\s*(.+)$", _read(directory / "information"), re.MULTILINE) for directory in directories)
    return [match[1].strip() for match in matches if match]


def gpu_driver() -> str:
    """The version of the NVIDIA driver ("580.65.06") or of Jetson Linux ("R36.4.3"); empty where there is neither."""
    if driver := re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", _read(_DRIVER)):
        return driver[1]
    release = re.search(r"(R\d+).*?REVISION:\s*([\d.]+)", _read(_TEGRA))
    return f"{release[1]}.{release[2]}" if release else ""


def _processor() -> str:
    """The name of the board or processor, without values that change at each start."""
    name = re.search(r"^model name\s*:\s*(.+)$", _read(_CPU_INFO), re.MULTILINE)
    return _read(_BOARD).strip("\0\n ") or (name[1].strip() if name else platform.machine())


def _read(path: Path) -> str:
    """Read a small system file; empty where it does not exist."""
    try:
        with open(path, errors="replace") as file:
            return file.read(_MAX_CHARS)
    except OSError:
        return ""


def _version(packages: tuple[str, ...]) -> str:
    for package in packages:
        with suppress(PackageNotFoundError):
            return version(package)
    return ""
