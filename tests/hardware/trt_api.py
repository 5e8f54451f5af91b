"""Print what the Python bindings of the TensorRT at hand offer, as one entry of ``tests/support/trt_api.json``.

``python -m tests.hardware.trt_api [MODULE]``: ``tensorrt`` by itself; ``tensorrt_bindings`` of the wheels ``tensorrt_cu12_bindings`` and
``tensorrt_cu13_bindings``, which come without the libraries: empty shared libraries with the symbols that ``nm`` finds undefined in
them satisfy the loader, and reading names needs no GPU.
"""

from __future__ import annotations

import importlib
import json
import sys

CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "ITensor", "ICudaEngine", "IExecutionContext", "Runtime", "ITimingCache",
    "IProgressMonitor", "EngineInspector", "OnnxParser", "ParserError", "ILogger", "IOptimizationProfile",
)  # fmt: skip
ENUMS = (
    "NetworkDefinitionCreationFlag", "BuilderFlag", "TacticSource", "MemoryPoolType", "LayerInformationFormat", "ProfilingVerbosity",
    "ErrorCode", "TensorIOMode", "DataType",
)  # fmt: skip


def main() -> None:
    trt = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "tensorrt")
    classes = {name: [item for item in dir(getattr(trt, name)) if item[0] != "_"] for name in CLASSES if hasattr(trt, name)}
    enums = {name: _members(getattr(trt, name)) for name in ENUMS if hasattr(trt, name)}
    enums["Severity"] = _members(trt.ILogger.Severity)
    print(json.dumps({trt.__version__: {"classes": classes, "enums": enums}}))


def _members(enum: object) -> dict[str, int]:
    return {name: int(value) for name, value in enum.__members__.items()}  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
