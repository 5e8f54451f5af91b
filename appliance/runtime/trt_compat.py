"""Hides the differences between TensorRT 8.6, 10.x and 11.x.

=======================  =======================  =======================  =======================
question                 8.6 (JetPack 6.0)        10.x (JetPack 6.1 .. 7)  11.x (desktop)
=======================  =======================  =======================  =======================
batch dimension          EXPLICIT_BATCH           EXPLICIT_BATCH           always explicit, no flag
types of the layers      FP16, INT8 of builder    STRONGLY_TYPED           always those of the ONNX
progress of a build      elapsed time only        IProgressMonitor         IProgressMonitor
int8 weights             rewritten, see           read directly            read directly
                         ``trt_weights``
cuBLAS, cuDNN tactics    only with the libraries  off by default           removed
operator in an error     in the text              ``node_operator()``      ``node_operator()``
=======================  =======================  =======================  =======================

Source: the bindings 8.6.0, 10.3.0, 10.13.3 and 11.4.0. In 8.6 a builder flag only permits a precision: a layer that is float32 in the
ONNX may run in fp16. What ran is read from the engine (:func:`layer_types`), and the golden cases decide.
"""

from __future__ import annotations

import ctypes
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.core.errors import InferenceError
from appliance.runtime.trt_weights import with_float_weights

logger = logging.getLogger(__name__)

OLDEST: Final = (8, 6)
NEWEST_KNOWN: Final = 11
_STRONGLY_TYPED_SINCE: Final = 10
_ALWAYS_STRONG_SINCE: Final = 11
_BUILDER_FLAGS: Final = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8",), "mixed": ("FP16", "INT8")}
_KEPT_MESSAGES: Final = 40
_MESSAGE_LENGTH: Final = 400
# Names of data types in the engine inspector, in format descriptions ("Row major linear FP16 format") or alone ("Half").
_TYPES: Final = {
    "int8": "int8", "fp16": "fp16", "half": "fp16", "bf16": "bf16", "bfloat16": "bf16", "fp8": "fp8", "fp32": "fp32", "float": "fp32",
    "int32": "int32", "int64": "int64", "bool": "bool", "uint8": "uint8",
}  # fmt: skip
_TYPE: Final = re.compile("|".join(rf"\b{name}\b" for name in _TYPES), re.IGNORECASE)


_loggers: dict[int, tuple[Any, Any]] = {}


def find() -> TrtCompat:
    """Import TensorRT.

    Raises:
        InferenceError: ``runtime.unavailable``: not installed, cannot be loaded, or too old.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # bindings or libraries are missing
        why = "not installed" if getattr(error, "name", None) == "tensorrt" else f"cannot be loaded: {error}"
        raise InferenceError("runtime.unavailable", f"TensorRT: {why}") from error
    return TrtCompat(tensorrt)


class TrtCompat:
    """The interface to the installed version of TensorRT.

    Attributes:
        trt: the Python module.
        version: of TensorRT ("8.6.0").

    Raises:
        InferenceError: ``runtime.unavailable``: it is older than 8.6.
    """

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.version = str(trt.__version__)
        numbers = tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])
        if numbers < OLDEST:
            raise InferenceError("runtime.unavailable", f"TensorRT {self.version} is older than 8.6, the oldest supported version")
        self.major = numbers[0]
        self._timings: Any = None  # referenced here: a configuration may keep only a raw pointer
        if self.major > NEWEST_KNOWN:
            logger.warning("TensorRT %s is newer than the versions that this box was tested with; used as %d", self.version, NEWEST_KNOWN)

    @property
    def strongly_typed(self) -> bool:
        """Whether layers run exactly in the types of the ONNX."""
        return self.major >= _STRONGLY_TYPED_SINCE

    @property
    def has_progress(self) -> bool:
        """Whether a build reports its progress."""
        return hasattr(self.trt, "IProgressMonitor")

    @property
    def title(self) -> str:
        """The installed TensorRT and how it is used, for the log."""
        typing = "strongly typed" if self.strongly_typed else "precision by builder flags"
        return f"TensorRT {self.version}, {typing}, {'progress monitor' if self.has_progress else 'no progress monitor'}"

    def parse(self, parser: Any, model: Path) -> bool:
        """Parse a file with an ``OnnxParser``; before version 10 int8 weights, which it refuses, are rewritten."""
        rewritten = None if self.strongly_typed else with_float_weights(model)
        return bool(parser.parse_from_file(str(model)) if rewritten is None else parser.parse(rewritten))

    def network_flags(self) -> int:
        """Return the flags of ``Builder.create_network``: explicit batch, and strong typing if it is not the default."""
        flags = self.trt.NetworkDefinitionCreationFlag.__members__
        wanted = ("EXPLICIT_BATCH", *(("STRONGLY_TYPED",) if self.strongly_typed else ())) if self.major < _ALWAYS_STRONG_SINCE else ()
        return sum(1 << int(flags[name]) for name in wanted if name in flags)

    def builder_flags(self, precision: str) -> tuple[str, ...]:
        """Return the builder flags for the precision of a variant; empty for strongly typed networks."""
        return () if self.strongly_typed else _BUILDER_FLAGS[precision]

    def configure(self, config: Any, precision: str, *, workspace_bytes: int, level: int) -> None:
        """Configure an ``IBuilderConfig``.

        Args:
            config: of a builder of this version.
            precision: of the variant.
            workspace_bytes: limit of the scratch memory of a layer on the GPU.
            level: builder optimisation level, 0 (fastest build) to 5 (fastest engine).
        """
        for name in self.builder_flags(precision):
            config.set_flag(getattr(self.trt.BuilderFlag, name))
        # TF32 is on by default since Ampere and has 10 bits of mantissa: fp32 must be fp32.
        config.clear_flag(self.trt.BuilderFlag.TF32)
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        config.builder_optimization_level = level
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED  # needed to read the types of the layers
        sources = self.tactic_sources(config.get_tactic_sources())
        if sources is not None:
            config.set_tactic_sources(sources)

    def tactic_sources(self, offered: int, is_real: Callable[[str], bool] | None = None) -> int | None:
        """Return the flags of ``set_tactic_sources`` without missing libraries; None to leave them unchanged.

        TensorRT 8.6 links cuBLAS and cuDNN. A box may have empty libraries in their place to save 1 GB; calls of those would fail.

        Args:
            offered: flags of the configuration.
            is_real: whether the library of a source works; the library itself is tested when None.
        """
        if self.major >= _STRONGLY_TYPED_SINCE:
            return None
        sources = self.trt.TacticSource.__members__
        absent = [name for name in ("CUBLAS", "CUBLAS_LT", "CUDNN") if name in sources and not (is_real or _library_works)(name)]
        for name in absent:
            offered &= ~(1 << int(sources[name]))
        return offered if absent else None

    def attach_timings(self, config: Any, stored: bytes) -> bool:
        """Give the timings of earlier builds to a builder; returns whether it accepted them, else it starts without timings."""
        if stored:
            self._timings = config.create_timing_cache(stored)
            if self._timings is not None and config.set_timing_cache(self._timings, False):  # refuse timings of another GPU
                return True
        self._timings = config.create_timing_cache(b"")
        config.set_timing_cache(self._timings, False)
        return False

    def timings(self, config: Any, others: bytes = b"") -> bytes:
        """Return the timings after a build, combined with those that another build stored in the meantime."""
        cache = config.get_timing_cache()
        if others:
            another = config.create_timing_cache(others)
            if another is not None:
                cache.combine(another, False)
        return bytes(cache.serialize())

    def messages(self) -> Any:
        """Return the TensorRT logger of this process, cleared; see :class:`Messages`.

        There is one per process: TensorRT uses its first logger as long as any object that was created with it exists.
        """
        if id(self.trt) not in _loggers:
            _loggers[id(self.trt)] = (self.trt, _logger_class(self.trt)())
        messages = _loggers[id(self.trt)][1]
        messages.clear()
        return messages

    def monitor(self, on_progress: Callable[[float], None]) -> Any:
        """Create a progress monitor that reports the part (0 to 1) of a build that is done; None if this version has none."""
        return _monitor_class(self.trt)(on_progress) if self.has_progress else None

    def layer_types(self, engine: Any, *, heavy: bool = False) -> dict[str, int]:
        """Count the layers of an engine by type; see :func:`layer_types`."""
        text = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        return layer_types(text, heavy=heavy)


@dataclass(frozen=True)
class ParseError:
    """One error of the ONNX parser: its text, and operator and node if they are known."""

    text: str
    operator: str = ""
    node: str = ""
    unsupported: bool = False

    @classmethod
    def of(cls, error: Any) -> ParseError:
        """Read an ``IParserError`` of any version; 8.6 has the operator only in its text."""
        text = " ".join(str(error.desc()).split())
        match = re.search(
            r"(?:importer registered for op|plugin, name|unsupported op(?:erator)?|op_type):?\s*\"?([A-Za-z_]\w*)", text, re.I
        )
        operator = str(error.node_operator()) if hasattr(error, "node_operator") else ""
        node = str(error.node_name()) if hasattr(error, "node_name") else ""
        unsupported = "UNSUPPORTED" in str(error.code()) or "No importer registered" in text
        return cls(text[:_MESSAGE_LENGTH], operator or (match[1] if match else ""), node, unsupported)


def layer_types(information: str, *, heavy: bool = False) -> dict[str, int]:
    """Count the layers of an engine by type: that of their weights, or of their first input if they have none.

    ``information`` is the JSON of ``EngineInspector.get_engine_information``; with ``heavy`` only layers with weights count.

    Returns:
        type ("fp32", "fp16", "int8" ...) -> number of layers; empty if the engine has only the names of its layers.
    """
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        return {}
    counted = Counter(_layer_type(layer) for layer in layers if isinstance(layer, dict) and (not heavy or _weights_type(layer)))
    return {name: number for name, number in sorted(counted.items()) if name}


def _weights_type(layer: dict[str, Any]) -> str:
    weights = layer.get("Weights")
    return str(weights.get("Type") or "") if isinstance(weights, dict) else ""


def _layer_type(layer: dict[str, Any]) -> str:
    kind, inputs = _weights_type(layer), layer.get("Inputs")
    if not kind and isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
        kind = inputs[0].get("Format/Datatype", "")
    match = _TYPE.search(str(kind))
    return _TYPES[match[0].lower()] if match else ""


def _library_works(source: str) -> bool:
    """Whether the library of a tactic source works: an empty placeholder has no version function."""
    library, function = {
        "CUBLAS": ("libcublas.so.12", "cublasGetCudartVersion"),
        "CUBLAS_LT": ("libcublasLt.so.12", "cublasLtGetVersion"),
        "CUDNN": ("libcudnn.so.8", "cudnnGetVersion"),
    }[source]
    try:
        version = getattr(ctypes.CDLL(library), function)
    except (OSError, AttributeError):
        return False
    version.restype = ctypes.c_size_t
    return int(version()) > 1


class Messages:
    """The last warnings and errors of TensorRT; each one is also passed to ``on_message``.

    Mixed into a subclass of the ``ILogger`` of the version: TensorRT only accepts subclasses.
    """

    entries: list[tuple[str, str]]
    on_message: Callable[[str, str], None] | None

    def errors(self) -> list[str]:
        """Return the errors, the oldest first."""
        return [text for severity, text in self.entries if severity != "WARNING"]

    def clear(self) -> None:
        """Delete the messages."""
        self.entries.clear()

    def take(self, severity: str, text: str) -> None:
        """Keep one message."""
        entry = (severity, " ".join(text.split())[:_MESSAGE_LENGTH])
        self.entries = [*self.entries[1 - _KEPT_MESSAGES :], entry]
        if self.on_message is not None:
            self.on_message(*entry)


def _logger_class(trt: Any) -> Any:
    severities = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR, trt.ILogger.Severity.WARNING)

    class TrtMessages(Messages, trt.ILogger):  # type: ignore[misc]  # the bindings are not typed
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.entries = []
            self.on_message = None

        def log(self, severity: Any, msg: str) -> None:
            if severity in severities:
                self.take(str(severity.name), msg)

    return TrtMessages


def _monitor_class(trt: Any) -> Any:
    class TrtProgress(BuildPhases, trt.IProgressMonitor):  # type: ignore[misc]  # the bindings are not typed
        def __init__(self, on_progress: Callable[[float], None]) -> None:
            trt.IProgressMonitor.__init__(self)
            BuildPhases.__init__(self, on_progress)

    return TrtProgress


class BuildPhases:
    """Computes the progress of a build from the nested phases of an ``IProgressMonitor``; it never decreases."""

    def __init__(self, on_progress: Callable[[float], None]) -> None:
        self._on_progress = on_progress
        self._steps: dict[str, list[int]] = {}  # phase -> [done steps, all steps], the outermost first
        self._parents: dict[str, str] = {}
        self._best = 0.0

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Handle the start of a phase."""
        self._steps[phase_name] = [0, max(1, int(num_steps))]
        self._parents[phase_name] = parent_phase or ""

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Handle the end of a step; returns True, so that the build continues."""
        if phase_name in self._steps:
            self._steps[phase_name][0] = int(step) + 1
            self._report()
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Handle the end of a phase, which may come before all of its steps."""
        self._steps.pop(phase_name, None)
        self._parents.pop(phase_name, None)

    def _report(self) -> None:
        done = max((self._part(name) for name in self._steps if self._parents[name] not in self._steps), default=0.0)
        if done > self._best:
            self._best = done
            self._on_progress(done)

    def _part(self, name: str) -> float:
        """Compute the part of a phase that is done; a running sub-phase counts as part of one of its steps."""
        done, steps = self._steps[name]
        below = max((self._part(child) for child, parent in self._parents.items() if parent == name), default=0.0)
        return min(1.0, (done + below) / steps)
