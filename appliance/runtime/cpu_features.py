"""Features of the CPU that change the results of a runtime.

Without VNNI, x86 multiplies 8-bit numbers in pairs into 16-bit sums that saturate (VPMADDUBSW): two products of 255 x 127 do not fit, and
the sum is clipped silently. Then the results differ from those that the gate measured on a processor with VNNI. Weights of 7 bits cannot
cause that (:mod:`appliance.runtime.weight_range`). For other models ONNX Runtime has a slower mode that does not saturate, which is used
there; OpenVINO has none, so that they are refused on it.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any, Final

X86: Final = ("x86_64", "AMD64")
_CPU_INFO: Final = Path("/proc/cpuinfo")
_VNNI: Final = frozenset({"avx512_vnni", "avx_vnni"})


def instructions() -> frozenset[str]:
    """Return the flags of the processor; empty if the kernel does not report them."""
    try:
        flags = re.search(r"^flags\s*:\s*(.*)$", _CPU_INFO.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(flags[1].split()) if flags else frozenset()


def has_vnni() -> bool:
    """Whether this is an x86 processor that reports VNNI: it multiplies 8-bit numbers fast, and adds the products in 32 bits."""
    return platform.machine() in X86 and bool(_VNNI & instructions())


def saturates() -> bool:
    """Whether sums of 8-bit products may be clipped here: an x86 processor that does not report VNNI."""
    return platform.machine() in X86 and not has_vnni()


def avoid_saturation(options: Any) -> None:
    """Set ONNX Runtime's ``SessionOptions`` so that 8-bit sums are exact on any processor; slower, and only where they may not be."""
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
