"""What every adapter does alike: hold inputs and outputs against what they must be, count the layers that ran, word a failure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.core.errors import InferenceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DETAIL_CHARS: Final = 200
_DIRECTORY: Final = re.compile(r"(?<![\w./])/(?:[^\s/\"']+/)+")
_OUT_OF_MEMORY: Final = ("bad_alloc", "bad allocation", "failed to allocate memory", "cannot allocate memory", "out of memory")
_EIGHT_BITS: Final = frozenset({"i8", "u8"})
# The runtimes' words for a layer's precision in the manifest's.
_IN_WORDS: Final = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "f64": "fp64", "i8": "int8", "u8": "int8"}

Layer = tuple[str, str]
"""A layer that ran: its kind, in its runtime's words, and its precision (``f32``, ``f16``, ``bf16``, ``u8``, ``i8``)."""


def checked_input(inputs: dict[str, NDArray[np.float32]], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The one tensor of a model's inputs, contiguous.

    Args:
        inputs: what the caller gave.
        name: the input's name.
        shape: of one image's tensor.

    Raises:
        InferenceError: ``job.error``: it is not float32 [n, *shape] with n of 1 or more, or it is not alone.
    """
    value = inputs.get(name)
    if value is None or len(inputs) != 1 or value.dtype != np.float32 or value.shape[1:] != shape or not len(value):
        raise InferenceError("job.error", f"the model takes {name!r} as float32 [n, {', '.join(map(str, shape))}]")
    return value if value.flags.c_contiguous else np.ascontiguousarray(value)


def check_outputs(outputs: dict[str, NDArray[Any]], n: int) -> None:
    """Raise InferenceError, ``job.error``, when an output is not of ``n`` images, or holds what is no number."""
    for name, output in outputs.items():
        if output.shape[:1] != (n,):
            raise InferenceError("job.error", f"output {name!r} has the shape {output.shape}")
        if not np.isfinite(output).all():
            raise InferenceError("job.error", f"output {name!r} holds values that are no numbers")


def check_signature(name: str, shape: Iterable[int | None], kind: str, spec_name: str, spec_shape: tuple[int, ...], batch: int) -> None:
    """Hold a model's input against the manifest's; a number in its shape must be the manifest's, what is open may be anything.

    Args:
        name: the input's name in the model, or its names when it has several.
        shape: its shape; None where it is open.
        kind: its type in the runtime's words.
        spec_name: the name in the manifest.
        spec_shape: one image's tensor in the manifest.
        batch: how many images are to be read at once.

    Raises:
        InferenceError: ``job.error``: the model takes something else, or fewer images at once.
    """
    dims = list(shape)
    if name != spec_name:
        raise InferenceError("job.error", f"the model's inputs are {name!r}, the manifest says {spec_name!r}")
    fits = len(dims) == 1 + len(spec_shape) and all(n is None or n == m for n, m in zip(dims[1:], spec_shape, strict=True))
    if not fits or dims[0] not in (None, 1, batch) or kind not in ("tensor(float)", "f32"):
        raise InferenceError("job.error", f"the model takes {kind} {dims}, the manifest says float {[1, *spec_shape]}")
    if dims[0] not in (None, batch):
        raise InferenceError("job.error", f"the model reads {dims[0]} image at once, not {batch}")


def counted(precisions: Iterable[str]) -> dict[str, int]:
    """How many layers ran in which precision, the most frequent first."""
    return dict(Counter(precisions).most_common())


def in_eight_bits(precisions: Iterable[str]) -> int:
    """How many layers ran in 8 bits."""
    return sum(precision in _EIGHT_BITS for precision in precisions)


def ran_in(precisions: Iterable[str]) -> str:
    """The precisions that layers ran in, in the manifest's words, the most frequent first: "fp32", "int8 + fp32"; empty for none."""
    return " + ".join(counted(_IN_WORDS.get(precision, precision) for precision in precisions))


def check_precision(precision: str, heavy: Sequence[str], *, quantized: bool = False) -> None:
    """Hold what a file is called against what its layers with weights run in.

    Args:
        precision: the variant's, as the manifest says.
        heavy: the precision of each layer that has weights; nothing is known when empty.
        quantized: the file is known to be quantized: its numbers are what was gated even where they are multiplied in float.

    Raises:
        InferenceError: ``runtime.precision``: a float file that is called int8 or mixed, or a quantized one that is called float.
    """
    eight = in_eight_bits(heavy)
    if precision in ("int8", "mixed") and heavy and not eight and not quantized:
        raise InferenceError(
            "runtime.precision", f"{precision} is what the file says; {len(heavy)} layers run in {heavy[0]}, none in 8 bits"
        )
    if precision in ("fp32", "fp16") and eight:
        raise InferenceError("runtime.precision", f"{precision} is what the file says; {eight} of {len(heavy)} layers run in 8 bits")


def failure(what: str, text: str, error: BaseException) -> InferenceError:
    """A runtime's own exception in our words: ``runtime.memory`` when it says so, else ``job.error``.

    Args:
        what: what was being done.
        text: the part of its message that says something; directories of this machine are taken out.
        error: the exception.
    """
    whole = str(error).lower()
    if isinstance(error, MemoryError) or any(words in whole for words in _OUT_OF_MEMORY):
        return InferenceError("runtime.memory", what)
    return InferenceError("job.error", f"{what}: {_DIRECTORY.sub('', text)[:_DETAIL_CHARS]}")
