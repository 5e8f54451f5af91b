"""Functions that the adapters share: check inputs and outputs, split batches, count the layers that ran, convert exceptions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from appliance.core.errors import InferenceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.runtime import Runtime

Run = Callable[["NDArray[np.float32]"], "dict[str, NDArray[Any]]"]

_DETAIL_CHARS: Final = 200
DIRECTORY: Final = re.compile(r"(?<![\w./])/(?:[^\s/\"']+/)+")
_OUT_OF_MEMORY: Final = ("bad_alloc", "bad allocation", "failed to allocate memory", "cannot allocate memory", "out of memory")
_EIGHT_BITS: Final = frozenset({"i8", "u8"})
# Precision of a layer as the runtimes name it -> as the manifest names it.
_MANIFEST_NAMES: Final = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "f64": "fp64", "i8": "int8", "u8": "int8"}

Layer = tuple[str, str]
"""A layer that ran: its kind as the runtime names it, and its precision (``f32``, ``f16``, ``bf16``, ``u8``, ``i8``)."""


def checked_input(inputs: dict[str, NDArray[np.float32]], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the only input tensor, contiguous; ``shape`` is that of one image's tensor.

    Raises:
        InferenceError: ``job.error``: the tensor is not float32 [n, *shape] with n of 1 or more, or there are other inputs.
    """
    value = inputs.get(name)
    if value is None or len(inputs) != 1 or value.dtype != np.float32 or value.shape[1:] != shape or not len(value):
        raise InferenceError("job.error", f"the model takes {name!r} as float32 [n, {', '.join(map(str, shape))}]")
    return value if value.flags.c_contiguous else np.ascontiguousarray(value)


def check_outputs(outputs: dict[str, NDArray[Any]], n: int) -> None:
    """Raise InferenceError ``job.error`` if an output does not have ``n`` rows or contains values that are not finite."""
    for name, output in outputs.items():
        if output.shape[:1] != (n,):
            raise InferenceError("job.error", f"output {name!r} has the shape {output.shape}")
        if not np.isfinite(output).all():
            raise InferenceError("job.error", f"output {name!r} holds values that are no numbers")


def run_in_pieces(value: NDArray[np.float32], largest: int, dynamic: bool, run: Run) -> dict[str, NDArray[Any]]:
    """Run a batch of any size in smaller batches, for a runtime with a limit or a fixed batch size.

    Args:
        value: float32 [n, ...].
        largest: largest batch that ``run`` takes.
        dynamic: whether ``run`` takes smaller batches too; else the last batch is padded with zeros, whose outputs are dropped.
        run: runs one batch [m, ...]; returns output name -> array [m, ...].
    """
    n = len(value)
    if n == largest or (dynamic and n < largest):
        return run(value)
    pieces = []
    for start in range(0, n, largest):
        piece = value[start : start + largest]
        if len(piece) < largest and not dynamic:
            piece = np.concatenate([piece, np.zeros((largest - len(piece), *value.shape[1:]), value.dtype)])
        pieces.append(run(piece))
    return {name: np.concatenate([piece[name] for piece in pieces])[:n] for name in pieces[0]}


def describe_adapter(adapter: Runtime, threads: int, batch: int) -> dict[str, Any]:
    """The keys of ``Runtime.describe`` that every adapter has."""
    return {
        "runtime": adapter.name, "version": adapter.version, "provider": adapter.provider, "precision": adapter.precision,
        "threads": threads, "batch": batch,
    }  # fmt: skip


def check_signature(name: str, shape: Iterable[int | None], kind: str, spec_name: str, spec_shape: tuple[int, ...], batch: int) -> None:
    """Compare the input of a model with the manifest: fixed dimensions must be equal.

    Args:
        name: of the input in the model, or all names when it has several.
        shape: of the input in the model; None for a dynamic dimension.
        kind: data type as the runtime names it.
        spec_name: name in the manifest.
        spec_shape: shape of one image's tensor in the manifest.
        batch: batch size of the candidate.

    Raises:
        InferenceError: ``job.error``: the model has another input, or a smaller fixed batch size.
    """
    dims = list(shape)
    if name != spec_name:
        raise InferenceError("job.error", f"the model's inputs are {name!r}, the manifest says {spec_name!r}")
    fits = len(dims) == 1 + len(spec_shape) and all(n is None or n == m for n, m in zip(dims[1:], spec_shape, strict=True))
    if not fits or dims[0] not in (None, 1, batch) or kind not in ("tensor(float)", "f32", "FP32"):
        raise InferenceError("job.error", f"the model takes {kind} {dims}, the manifest says float {[1, *spec_shape]}")
    if dims[0] not in (None, batch):
        raise InferenceError("job.error", f"the model takes {dims[0]} image at a time, not {batch}")


def counted(precisions: Iterable[str]) -> dict[str, int]:
    """Count the layers per precision, the most frequent first."""
    return dict(Counter(precisions).most_common())


def in_eight_bits(precisions: Iterable[str]) -> int:
    """Count the layers that ran in 8 bits."""
    return sum(precision in _EIGHT_BITS for precision in precisions)


def ran_in(precisions: Iterable[str]) -> str:
    """List the precisions of layers as the manifest names them, the most frequent first: "fp32", "int8 + fp32"; empty for none."""
    return " + ".join(counted(_MANIFEST_NAMES.get(precision, precision) for precision in precisions))


def check_precision(precision: str, heavy: Sequence[str], *, quantized: bool = False) -> None:
    """Compare the precision of a variant with the precisions that its layers with weights run in.

    Args:
        precision: of the variant, as in the manifest.
        heavy: precision of each layer with weights; empty when unknown.
        quantized: whether the file is known to be quantized: then its results are those of the gate even if layers run in float.

    Raises:
        InferenceError: ``runtime.precision``: a float file is labelled int8 or mixed, or a quantized one is labelled float.
    """
    eight = in_eight_bits(heavy)
    if precision in ("int8", "mixed") and heavy and not eight and not quantized:
        raise InferenceError(
            "runtime.precision", f"{precision} is what the file says; {len(heavy)} layers run in {heavy[0]}, none in 8 bits"
        )
    if precision in ("fp32", "fp16") and eight:
        raise InferenceError("runtime.precision", f"{precision} is what the file says; {eight} of {len(heavy)} layers run in 8 bits")


def failure(what: str, text: str, error: BaseException) -> InferenceError:
    """Convert an exception of a runtime: ``runtime.memory`` if its message says so, else ``job.error``.

    ``what`` names what failed; ``text`` is the informative part of the message, from which directories of this machine are removed.
    """
    message = str(error).lower()
    if isinstance(error, MemoryError) or any(words in message for words in _OUT_OF_MEMORY):
        return InferenceError("runtime.memory", what)
    return InferenceError("job.error", f"{what}: {DIRECTORY.sub('', text)[:_DETAIL_CHARS]}")
