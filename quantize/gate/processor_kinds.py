"""The two kinds of processor that differ in 8-bit sums, and how the gate knows a variant's results on each of them.

- ``exact``: 8-bit products are added in 32 bits: x86 with VNNI, Arm.
- ``saturating``: x86 without VNNI adds pairs of products in 16 bits, which may clip them (``appliance.runtime.cpu_features``).

Whatever processor the gate runs on, it states both. A box never computes a clipped sum: a variant whose weights cannot cause one runs
everywhere; of the others ONNX Runtime adds exactly in its slower mode, and OpenVINO is refused (``appliance.runtime.weight_range``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, TypeAlias

from appliance.runtime.candidate import CPU
from appliance.runtime.cpu_features import saturates
from appliance.runtime.weight_range import fits_16_bits
from quantize.gate.predictions import RuntimeTarget

Kind: TypeAlias = Literal["exact", "saturating"]
Evidence: TypeAlias = Literal["measured", "same", "simulated", "refused"]
"""``measured`` on this processor; the ``same`` sums as on the measured kind, by arithmetic; ``simulated`` in float on the runtime, whose
own 8-bit kernels did not run; ``refused`` by the box on that kind of processor."""

KINDS: Final[tuple[Kind, ...]] = ("exact", "saturating")
NOTE: Final = (
    "exact: 8-bit products are added in 32 bits (x86 with VNNI, Arm). saturating: pairs of them are added in 16 bits (x86 without VNNI). "
    "measured: on this kind of processor; same: the same sums by arithmetic, because the weights are small or the runtime adds exactly; "
    "simulated: in float, the golden cases decide on the box; refused: a box does not run it there."
)


def kind_here() -> Kind:
    """Return the kind of the processor that this process runs on."""
    return "saturating" if saturates() else "exact"


def find_evidence(model: Path, target: RuntimeTarget) -> dict[Kind, Evidence]:
    """Return how the results of an 8-bit variant are known on each kind of processor; empty where no CPU computes them.

    Args:
        model: the ONNX file of an int8 or mixed variant.
        target: the runtime that the gate runs it on.
    """
    if target.provider not in (CPU, "CPU"):
        return {}
    here = kind_here()
    if target.runtime == "openvino" and not fits_16_bits(model):
        return {"exact": "measured" if here == "exact" else "simulated", "saturating": "refused"}
    return {kind: "measured" if kind == here else "same" for kind in KINDS}
