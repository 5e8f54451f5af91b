"""What makes this box this box to a model: processor, runtime, appliance version. A failed self-test belongs to all three.

A model that failed is not tried again on the same device; a new processor, runtime or appliance is another device.
"""

from __future__ import annotations

import hashlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from appliance import __version__

_RUNTIMES: Final = ("onnxruntime",)
_CPU_INFO: Final = Path("/proc/cpuinfo")
_BOARD: Final = Path("/proc/device-tree/model")  # a Jetson names itself here


def profile() -> str:
    """The device in words: processor, runtimes with their versions, appliance version."""
    runtimes = [f"{name} {_version(name)}" for name in _RUNTIMES]
    return "; ".join((_processor(), *runtimes, f"appliance {__version__}"))


def digest() -> str:
    """What stands for the device in the journal: 16 hex digits."""
    return hashlib.sha256(profile().encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor's name, without what changes from start to start."""
    try:
        if _BOARD.exists():
            return _BOARD.read_text(errors="replace").strip("\0\n ")
        named = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
