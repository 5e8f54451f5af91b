"""Run nvidia-modelopt's int8 on one model, in the Python that has it: nothing of this package is imported here.

``python -I modelopt_child.py --version`` prints its version, or nothing where it is not installed. With DIRECTORY METHOD PARENT it
reads ``float.onnx`` and ``calibration.npy`` in DIRECTORY and writes ``made.onnx`` there. It ends when PARENT does. The last line that it
prints before it fails is the reason.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PR_SET_PDEATHSIG = 1
# Every network access raises one of these (Python's table of audit events).
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")


def main(arguments: list[str]) -> int:
    """Do what the arguments say; see the module."""
    if arguments == ["--version"]:
        print(_version())
        return 0
    directory, method, parent = arguments
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        return 1
    sys.excepthook = _print_reason
    sys.addaudithook(_refuse_network)
    _quantize(directory, method)
    return 0


def _version() -> str:
    try:
        return version("nvidia-modelopt")
    except PackageNotFoundError:
        return ""


def _print_reason(kind: type[BaseException], error: BaseException, _: object) -> None:
    print(f"\n{kind.__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _refuse_network(event: str, _: Any) -> None:
    if event in _NETWORK:
        raise PermissionError(f"the quantizer opens no connection ({event})")


def _quantize(directory: str, method: str) -> None:
    import numpy as np
    import onnx
    from modelopt.onnx.quantization import quantize
    from modelopt.onnx.utils import QDQ_PRECISION_MIN_OPSET

    source = os.path.join(directory, "float.onnx")
    opset = next(entry.version for entry in onnx.load(source).opset_import if entry.domain in ("", "ai.onnx"))
    # It raises every model to opset 19 for scales in float16. There are none here, and TensorRT 8.6 reads up to 17.
    QDQ_PRECISION_MIN_OPSET["int8"] = min(opset, QDQ_PRECISION_MIN_OPSET["int8"])
    quantize(
        source,
        quantize_mode="int8",
        calibration_data=np.load(os.path.join(directory, "calibration.npy"), mmap_mode="r", allow_pickle=False),
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",  # half precision is another variant
        output_path=os.path.join(directory, "made.onnx"),
        log_level="ERROR",
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
