"""What the processor can do, as far as a runtime's results depend on it.

Without VNNI, x86 multiplies 8-bit numbers in pairs into 16-bit sums that saturate (VPMADDUBSW): two products of 255 x 127 do not fit, and
the sum is clipped without a word. What a gate found on a processor with VNNI is then not what runs. ONNX Runtime has a slower way that
does not saturate, which is taken there; OpenVINO has none, so int8 is refused on it.
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
    """The processor's flags; empty where the kernel does not tell."""
    try:
        found = re.search(r"^flags\s*:\s*(.*)$", _CPU_INFO.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()


def has_vnni() -> bool:
    """Whether this is an x86 processor that says it has VNNI: it multiplies 8-bit numbers fast, and adds the products in 32 bits."""
    return platform.machine() in X86 and bool(_VNNI & instructions())


def saturates() -> bool:
    """Whether sums of 8-bit products may be clipped here: an x86 processor that does not say it has VNNI."""
    return platform.machine() in X86 and not has_vnni()


def avoid_saturation(options: Any) -> None:
    """Set ONNX Runtime's ``SessionOptions`` so that 8-bit sums are exact on any processor; slower, and only where they would not be."""
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
