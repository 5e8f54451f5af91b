"""Make int8 variants with nvidia-modelopt, which places Q/DQ by its own rules for TensorRT and has its own calibration.

It is an extra. It brings torch, and its own ``[onnx]`` extra installs onnxruntime-gpu over onnxruntime; so it may be in an environment
of its own, named by that environment's Python. It always runs in a process of its own: where that dies, hangs or writes anything wrong,
the candidate is refused with the reason. The process gets a directory with the float model and the calibration tensors; it may open no
socket (``quantize/recipes/modelopt_child.py``).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantize.errors import QuantizeError
from quantize.messages import Code
from quantize.progress import OnProgress, no_progress

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from quantize.recipes.variant_makers import Maker, Source

METHODS: Final = ("max", "entropy")
HINT: Final = "pip install 'clinic-edge-appliance[modelopt]', here or in an environment of its own (docs/quantize.md)"
_CHILD: Final = Path(__file__).with_name("modelopt_child.py")
# A network of 13 MB and 256 pictures take one to two minutes on two cores.
_LIMIT_S: Final = 3600.0
_ASK_S: Final = 60.0
_POLL_S: Final = 0.2
_TAIL_BYTES: Final = 4096
_REASON_CHARS: Final = 300


@dataclass(frozen=True)
class Optimizer:
    """An installed nvidia-modelopt.

    Attributes:
        python: the Python of its environment.
        version: of nvidia-modelopt.
        limit_s: how long making one variant may take.
    """

    python: Path
    version: str
    limit_s: float = _LIMIT_S


def find_optimizer(python: Path | None = None) -> Optimizer | str:
    """Look for nvidia-modelopt in the environment of ``python``, this one by default; where there is none, return why, in words."""
    requested = Path(sys.executable) if python is None else python
    # Absolute, because the child has another directory; not resolved, because the Python of an environment is a link out of it.
    executable = Path(shutil.which(requested) or requested).absolute()
    try:
        answer = subprocess.run(
            [executable, "-I", _CHILD, "--version"], capture_output=True, timeout=_ASK_S, stdin=subprocess.DEVNULL, check=False
        )  # fmt: skip
    except OSError as error:
        return f"{executable} does not start: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{executable} does not say its version within {_ASK_S:g} s"
    version = answer.stdout.decode(errors="replace").strip()
    if answer.returncode == 0 and re.fullmatch(r"[0-9][0-9A-Za-z.+-]{0,40}", version):
        return Optimizer(executable, version)
    return "not installed" if answer.returncode == 0 and not version else f"{executable} {_reason(answer.returncode, answer.stderr)}"


def add_options(parser: ArgumentParser) -> None:
    """Add the options ``--modelopt`` and ``--no-modelopt`` to a command."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--modelopt", type=Path, metavar="PYTHON", help="Python of an environment with nvidia-modelopt; this one's is tried otherwise"
    )
    either.add_argument("--no-modelopt", action="store_true", help="leave nvidia-modelopt out")


def find_from_options(options: Namespace) -> Optimizer | str:
    """Return the nvidia-modelopt to be tried, or why none is.

    Raises:
        QuantizeError: ``modelopt.absent``: it was requested, and is not installed.
    """
    if options.no_modelopt:
        return "left out by --no-modelopt"
    optimizer = find_optimizer(options.modelopt)
    if isinstance(optimizer, str) and options.modelopt is not None:
        raise QuantizeError(
            f"no nvidia-modelopt in the environment of {options.modelopt}: {optimizer}", hint=HINT, code=Code.MODELOPT_ABSENT
        )
    return optimizer


def explain_absence(optimizer: Optimizer | str) -> tuple[str, ...]:
    """Return the remark of the report on why nvidia-modelopt was not tried; empty when it was tried or not searched for."""
    return (
        () if isinstance(optimizer, Optimizer) or not optimizer else (f"未试 nvidia-modelopt；nvidia-modelopt was not tried: {optimizer}",)
    )


def makers(optimizer: Optimizer | str) -> tuple[Maker, ...]:
    """Return one maker per calibration method; none when nvidia-modelopt is not available."""
    return () if isinstance(optimizer, str) else tuple(_maker(optimizer, method) for method in METHODS)


def _maker(optimizer: Optimizer, method: str) -> Maker:
    from quantize.recipes.variant_makers import Maker

    def make(source: Source, out: Path, on_progress: OnProgress) -> None:
        quantize(source.model, source.tensors, method, optimizer, out, on_progress=on_progress)

    words = f"nvidia-modelopt {optimizer.version}: Q/DQ as it places them for TensorRT, {method} ranges"
    return Maker(f"int8-modelopt-{method}", "int8", "symmetric", words, make, "int8-modelopt", optimizer.version)


def quantize(model: Any, tensors: Any, method: str, optimizer: Optimizer, out: Path, *, on_progress: OnProgress = no_progress) -> None:
    """Write ``model`` quantized by nvidia-modelopt to ``out``, its weights stored in 8 bits.

    Args:
        model: a cleaned float model (``graph.clean_up``).
        tensors: the calibration set, float32 [n, ...].
        method: one of ``METHODS``.
        optimizer: which nvidia-modelopt.
        out: the ONNX file to write.
        on_progress: called with the fraction of the time limit that has passed.

    Raises:
        QuantizeError: its process failed, or it wrote something else than was requested; the message has the reason.
    """
    import numpy as np
    import onnx

    from quantize.recipes.modelopt_graph import load_quantized

    with tempfile.TemporaryDirectory(prefix="quantize.") as name:
        directory = Path(name)
        onnx.save(model, directory / "float.onnx")
        np.save(directory / "calibration.npy", tensors, allow_pickle=False)
        _run(optimizer, [directory, method, os.getpid()], directory, on_progress)
        onnx.save(load_quantized(directory / "made.onnx", model), out)


def _run(optimizer: Optimizer, arguments: list[object], directory: Path, on_progress: OnProgress) -> None:
    """Run the child until it ends; raises QuantizeError with the reason where it fails."""
    output = directory / "output.txt"
    # Temporary files of its own go away with the directory; without a GPU in sight it calibrates the same everywhere.
    environment = os.environ | {"TMPDIR": str(directory), "CUDA_VISIBLE_DEVICES": ""}
    with output.open("wb") as stream:
        try:
            process = subprocess.Popen(
                [optimizer.python, "-I", _CHILD, *map(str, arguments)], cwd=directory, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            )  # fmt: skip
        except OSError as error:
            raise _failed(f"{optimizer.python} does not start: {error.strerror}") from error
    try:
        code = _wait(process, optimizer.limit_s, on_progress)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code is None:
        raise _failed(f"its process was ended after {optimizer.limit_s:g} s")
    if code != 0:
        raise _failed(f"its process {_reason(code, output.read_bytes()[-_TAIL_BYTES:])}")


def _wait(process: subprocess.Popen[bytes], limit_s: float, on_progress: OnProgress) -> int | None:
    """Return the exit code; None when the time limit has passed."""
    start = time.monotonic()
    while (passed := time.monotonic() - start) < limit_s:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_S)
        on_progress(passed / limit_s)
    return None


def _reason(code: int, output: bytes) -> str:
    """Describe how a process ended, with the last line that it printed."""
    if code < 0:
        names = {int(entry): entry.name for entry in signal.Signals}
        return f"was killed by {names.get(-code, f'signal {-code}')}"
    lines = [line for line in output.decode(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    last = "".join(letter if letter.isprintable() else " " for letter in lines[-1])[:_REASON_CHARS] if lines else "no output"
    return f"ended with exit code {code}: {last}"


def _failed(words: str) -> QuantizeError:
    return QuantizeError(f"nvidia-modelopt: {words}", code=Code.MODELOPT_FAILED)
