"""The model that is measured, and the limits of the measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from appliance.imaging.golden_cases import Case
    from appliance.runtime import TensorSpec
    from model_sync.bundle import ModelBundle, Variant

BATCHES: Final = (2, 4, 8, 16)


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    Attributes:
        input: the input's name and shape.
        variants: the files with their precisions.
        path: returns the path of a variant's file.
        cases: the golden cases, at least one; the times are measured with the tensor of the first.
        batches: batch sizes to try; none when the model takes one image at a time.
    """

    input: TensorSpec
    variants: Sequence[Variant]
    path: Callable[[str], Path]
    cases: Sequence[Case]
    batches: Sequence[int] = BATCHES

    @classmethod
    def of_bundle(cls, bundle: ModelBundle, precision: str | None = None) -> Subject:
        """Use a bundle, or only its variants of one precision; raises BundleError when it has none."""
        from appliance.imaging.golden_cases import cases
        from model_sync.bundle import InputSpec

        variants = [variant for variant in bundle.manifest.variants if precision in (None, variant.precision)]
        if not variants:
            bundle.variant(precision)  # raises an error that lists the existing ones
        batches = BATCHES if isinstance(bundle.manifest.input, InputSpec) else ()
        return cls(bundle.manifest.input, variants, bundle.path, cases(bundle), batches)


@dataclass(frozen=True)
class Limits:
    """The limits of one measurement.

    Attributes:
        seconds: total time; after it nothing new is tried and the best candidate so far is taken. A candidate that hangs is ended before.
        measuring_s: the part of it for everything but building engines. After it each candidate that was not tried gets one quick
            timing, so that a slow model does not exclude the fast candidates; candidates that were not reached are marked.
        memory_bytes: limit of the private memory of each candidate.
        held_bytes: limit of the memory of all candidates that stay loaded for comparison, besides the one under test; a third of the
            free memory when None. The fastest always stays loaded.
    """

    seconds: float = 900.0
    measuring_s: float = 60.0
    memory_bytes: int | None = None
    held_bytes: int | None = None
