"""What is measured, and what measuring it may cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from appliance.imaging.golden_cases import Case
    from appliance.runtime import TensorSpec
    from model_sync.bundle import ModelBundle

BATCHES: Final = (2, 4, 8, 16)


class AnyVariant(Protocol):
    """What is needed of a variant; ``model_sync.bundle.Variant`` is one."""

    @property
    def precision(self) -> str:
        """As the manifest says."""
        ...

    @property
    def file(self) -> str:
        """The ONNX file, relative to the bundle."""
        ...

    @property
    def not_on(self) -> Sequence[str]:
        """Runtimes it is known to fail on."""
        ...


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        input: the input's name and shape.
        variants: the files with their precisions.
        path: where a variant's file is.
        cases: what has to be answered rightly; at least one, whose tensor the times are measured with.
        batches: sizes of a batch to try; none where the model takes one image at a time.
    """

    input: TensorSpec
    variants: Sequence[AnyVariant]
    path: Callable[[str], Path]
    cases: Sequence[Case]
    batches: Sequence[int] = BATCHES

    @classmethod
    def of_bundle(cls, bundle: ModelBundle, precision: str | None = None) -> Subject:
        """A bundle, or its variants of one precision; raises BundleError."""
        from appliance.imaging.golden_cases import cases
        from model_sync.bundle import InputSpec

        variants = [variant for variant in bundle.manifest.variants if precision in (None, variant.precision)]
        if not variants:
            bundle.variant(precision)  # says which there are
        batches = BATCHES if isinstance(bundle.manifest.input, InputSpec) else ()
        return cls(bundle.manifest.input, variants, bundle.path, cases(bundle), batches)


@dataclass(frozen=True)
class Limits:
    """What measuring may cost.

    Attributes:
        seconds: after which nothing new is tried and the best so far is taken; a candidate that hangs is ended before.
        measuring_s: of those, for everything but an engine's build; after it each way that was not tried gets one quick timing and
            nothing more, so that a slow model does not leave the fast ways out. What was not reached is said to be so.
        memory_bytes: cap of each candidate's private memory.
        held_bytes: what the candidates kept open for comparison may hold together, one under test apart; a third of what the system
            has free when None. The fastest is always kept.
    """

    seconds: float = 900.0
    measuring_s: float = 60.0
    memory_bytes: int | None = None
    held_bytes: int | None = None
