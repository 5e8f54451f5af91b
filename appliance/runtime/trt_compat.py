"""The one place that knows how TensorRT 8.6, 10.x and 11.x differ.

=======================  =======================  =======================  =======================
question                 8.6 (JetPack 6.0)        10.x (JetPack 6.1 .. 7)  11.x (desktop)
=======================  =======================  =======================  =======================
batch dimension          EXPLICIT_BATCH           EXPLICIT_BATCH           always explicit, no flag
types of the layers      FP16, INT8 of builder    STRONGLY_TYPED           always those of the ONNX
progress of a build      elapsed time only        IProgressMonitor         IProgressMonitor
int8 weights             rewritten, see           read as they are         read as they are
                         ``trt_weights``
cuBLAS, cuDNN tactics    only with the libraries  off as it comes          no longer there
named operator in error  in the text              ``node_operator()``      ``node_operator()``
=======================  =======================  =======================  =======================

Read from the bindings themselves (8.6.0, 10.3.0, 10.13.3, 11.4.0). On 8.6 a builder flag is a permission, not an order: a layer that
the ONNX keeps in float32 may run in half there. What ran is read from the engine (:func:`layer_types`), and the golden cases decide.
"""

from __future__ import annotations

import ctypes
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
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
# What the inspector of the versions calls a type, in its format descriptions ("Row major linear FP16 format") or alone ("Half").
_TYPES: Final = {
    "int8": "int8", "fp16": "fp16", "half": "fp16", "bf16": "bf16", "bfloat16": "bf16", "fp8": "fp8", "fp32": "fp32", "float": "fp32",
    "int32": "int32", "int64": "int64", "bool": "bool", "uint8": "uint8",
}  # fmt: skip
_TYPE: Final = re.compile("|".join(rf"\b{name}\b" for name in _TYPES), re.IGNORECASE)


_loggers: dict[int, tuple[Any, Any]] = {}


def find() -> TrtSeam:
    """TensorRT as this process has it.

    Raises:
        InferenceError: ``runtime.unavailable``: none, one that cannot be loaded, or one that is too old.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # the bindings are there and the libraries are not, or the other way round
        why = "not installed" if getattr(error, "name", None) == "tensorrt" else f"cannot be loaded: {error}"
        raise InferenceError("runtime.unavailable", f"TensorRT: {why}") from error
    return TrtSeam(tensorrt)


class TrtSeam:
    """TensorRT of one version.

    Args:
        trt: its Python module.

    Attributes:
        trt: the module.
        version: its version, as it says it ("8.6.0").

    Raises:
        InferenceError: ``runtime.unavailable``: it is older than 8.6.
    """

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.version = str(trt.__version__)
        numbers = tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])
        if numbers < OLDEST:
            raise InferenceError("runtime.unavailable", f"TensorRT {self.version} is older than 8.6, the oldest this box speaks")
        self.major = numbers[0]
        self._timings: Any = None  # a configuration may hold no more than a bare pointer to its timing cache
        if self.major > NEWEST_KNOWN:
            logger.warning("TensorRT %s is newer than any this box was written for; spoken to as %d", self.version, NEWEST_KNOWN)

    @property
    def strongly_typed(self) -> bool:
        """Whether layers run in the types that the ONNX says, and in no others."""
        return self.major >= _STRONGLY_TYPED_SINCE

    @property
    def has_progress(self) -> bool:
        """Whether a build says how far it is."""
        return hasattr(self.trt, "IProgressMonitor")

    @property
    def words(self) -> str:
        """Which TensorRT was found and how it is spoken to, for the log."""
        typing = "strongly typed" if self.strongly_typed else "precision by builder flags"
        return f"TensorRT {self.version}, {typing}, {'progress monitor' if self.has_progress else 'no progress monitor'}"

    @property
    def takes_int8_constants(self) -> bool:
        """Whether the ONNX parser reads int8 weights; before 10 they have to stand as float32 before a QuantizeLinear."""
        return self.major >= _STRONGLY_TYPED_SINCE

    def parse(self, parser: Any, model: Path) -> bool:
        """Have an ``OnnxParser`` read a file, rewritten first where this version would refuse its weights."""
        rewritten = None if self.takes_int8_constants else with_float_weights(model)
        return bool(parser.parse_from_file(str(model)) if rewritten is None else parser.parse(rewritten))

    def network_flags(self) -> int:
        """Bits for ``Builder.create_network``: explicit batch, and strong typing where it has to be asked for."""
        flags = self.trt.NetworkDefinitionCreationFlag.__members__
        wanted = []
        if self.major < _ALWAYS_STRONG_SINCE:
            wanted.append("EXPLICIT_BATCH")
            if self.strongly_typed:
                wanted.append("STRONGLY_TYPED")
        return sum(1 << int(flags[name]) for name in wanted if name in flags)

    def builder_flags(self, precision: str) -> tuple[str, ...]:
        """The builder's flags for a variant's precision; none where the network's own types rule."""
        return () if self.strongly_typed else _BUILDER_FLAGS[precision]

    def configure(self, config: Any, precision: str, *, workspace_bytes: int, level: int) -> None:
        """Set up an ``IBuilderConfig``.

        Args:
            config: of this version's builder.
            precision: of the variant.
            workspace_bytes: the most scratch memory on the GPU that a layer may use.
            level: builder optimisation level, 0 (fastest build) to 5 (fastest engine).
        """
        for name in self.builder_flags(precision):
            config.set_flag(getattr(self.trt.BuilderFlag, name))
        # On by default since Ampere, and then "fp32" sums products of 10 bits: what is called fp32 here is fp32.
        config.clear_flag(self.trt.BuilderFlag.TF32)
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        config.builder_optimization_level = level
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED  # what the layers' types are read from
        sources = self.tactic_sources(config.get_tactic_sources())
        if sources is not None:
            config.set_tactic_sources(sources)

    def tactic_sources(self, offered: int, is_real: Callable[[str], bool] | None = None) -> int | None:
        """Bits for ``set_tactic_sources``: those offered without the libraries that are not really there; None: leave them.

        TensorRT 8.6 links cuBLAS and cuDNN, which a box may satisfy with empty libraries to save 1 GB; called they would fail.

        Args:
            offered: what the configuration has.
            is_real: whether a source's library works; asked of the library itself when None.
        """
        if self.major >= _STRONGLY_TYPED_SINCE:
            return None
        sources = self.trt.TacticSource.__members__
        absent = [name for name in ("CUBLAS", "CUBLAS_LT", "CUDNN") if name in sources and not (is_real or _library_works)(name)]
        for name in absent:
            offered &= ~(1 << int(sources[name]))
        return offered if absent else None

    def attach_timings(self, config: Any, stored: bytes) -> bool:
        """Give a builder the timings of earlier builds; returns whether they were taken, else it begins with none."""
        if stored:
            self._timings = config.create_timing_cache(stored)
            if self._timings is not None and config.set_timing_cache(self._timings, False):  # no timings of another GPU
                return True
        self._timings = config.create_timing_cache(b"")
        config.set_timing_cache(self._timings, False)
        return False

    def timings(self, config: Any, others: bytes = b"") -> bytes:
        """The timings after a build, and those that another build stored meanwhile."""
        cache = config.get_timing_cache()
        if others:
            another = config.create_timing_cache(others)
            if another is not None:
                cache.combine(another, False)
        return bytes(cache.serialize())

    def messages(self) -> Any:
        """The logger of this process for TensorRT, cleared; it keeps what went wrong: see :class:`Messages`.

        One for all and for ever: TensorRT goes on using the first logger that it was given while anything made with it lives.
        """
        if id(self.trt) not in _loggers:
            _loggers[id(self.trt)] = (self.trt, _logger_class(self.trt)())
        messages = _loggers[id(self.trt)][1]
        messages.clear()
        return messages

    def monitor(self, told: Callable[[float], None]) -> Any:
        """A progress monitor that says how much of a build is done, 0 to 1; None where this version has none."""
        return _monitor_class(self.trt)(told) if self.has_progress else None

    def parse_errors(self, parser: Any) -> list[ParseError]:
        """What an ``OnnxParser`` did not understand."""
        return [ParseError.of(parser.get_error(index)) for index in range(parser.num_errors)]

    def layer_types(self, engine: Any, *, heavy: bool = False) -> dict[str, int]:
        """How many layers of an engine run in which type; see :func:`layer_types`."""
        text = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        return layer_types(text, heavy=heavy)


class ParseError:
    """One complaint of the ONNX parser: its text, and the operator and node where it says them."""

    def __init__(self, text: str, operator: str = "", node: str = "", unsupported: bool = False) -> None:
        self.text, self.operator, self.node, self.unsupported = text[:_MESSAGE_LENGTH], operator, node, unsupported

    @classmethod
    def of(cls, error: Any) -> ParseError:
        """Read an ``IParserError`` of any version; 8.6 names the operator in its text alone."""
        text = " ".join(str(error.desc()).split())
        named = re.search(
            r"(?:importer registered for op|plugin, name|unsupported op(?:erator)?|op_type):?\s*\"?([A-Za-z_]\w*)", text, re.I
        )
        operator = str(error.node_operator()) if hasattr(error, "node_operator") else ""
        node = str(error.node_name()) if hasattr(error, "node_name") else ""
        unsupported = "UNSUPPORTED" in str(error.code()) or "No importer registered" in text
        return cls(text, operator or (named[1] if named else ""), node, unsupported)


def layer_types(information: str, *, heavy: bool = False) -> dict[str, int]:
    """Count the layers of an engine by the type they run in: that of their weights, else of their first input.

    Args:
        information: JSON of ``EngineInspector.get_engine_information``.
        heavy: only those that are told to have weights.

    Returns:
        type ("fp32", "fp16", "int8" ...) -> number of layers; empty where the engine keeps no more than names.
    """
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        return {}
    counted = Counter(_layer_type(layer) for layer in layers if isinstance(layer, dict) and (not heavy or _has_weights(layer)))
    return {name: number for name, number in sorted(counted.items()) if name}


def _has_weights(layer: dict[str, Any]) -> bool:
    weights = layer.get("Weights")
    return isinstance(weights, dict) and bool(weights.get("Type"))


def _layer_type(layer: dict[str, Any]) -> str:
    weights, inputs = layer.get("Weights"), layer.get("Inputs")
    said = weights.get("Type", "") if isinstance(weights, dict) else ""
    if not said and isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
        said = inputs[0].get("Format/Datatype", "")
    found = _TYPE.search(str(said))
    return _TYPES[found[0].lower()] if found else ""


def _library_works(source: str) -> bool:
    """Whether a tactic source's library is really there: an empty one, made to satisfy the loader, knows no version."""
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
    """What TensorRT said that somebody may want to know: warnings and errors, the last ones; each is told at once too.

    Mixed into a subclass of the version's ``ILogger``, which must be subclassed to be heard.
    """

    said: list[tuple[str, str]]
    told: Callable[[str, str], None] | None

    def errors(self) -> list[str]:
        """The errors, the oldest first."""
        return [text for severity, text in self.said if severity != "WARNING"]

    def clear(self) -> None:
        """Forget what was said."""
        self.said.clear()

    def take(self, severity: str, text: str) -> None:
        """Keep one message."""
        entry = (severity, " ".join(text.split())[:_MESSAGE_LENGTH])
        self.said = [*self.said[1 - _KEPT_MESSAGES :], entry]
        if self.told is not None:
            self.told(*entry)


def _logger_class(trt: Any) -> Any:
    kept = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR, trt.ILogger.Severity.WARNING)

    class TrtMessages(Messages, trt.ILogger):  # type: ignore[misc]  # the bindings are not typed
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said = []
            self.told = None

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                self.take(str(severity.name), msg)

    return TrtMessages


def _monitor_class(trt: Any) -> Any:
    class TrtProgress(Phases, trt.IProgressMonitor):  # type: ignore[misc]  # the bindings are not typed
        def __init__(self, told: Callable[[float], None]) -> None:
            trt.IProgressMonitor.__init__(self)
            Phases.__init__(self, told)

    return TrtProgress


class Phases:
    """Progress from the nested phases that an ``IProgressMonitor`` is told of; what is done never goes back."""

    def __init__(self, told: Callable[[float], None]) -> None:
        self._told = told
        self._steps: dict[str, list[int]] = {}  # phase -> [steps done, steps], the outermost first
        self._parents: dict[str, str] = {}
        self._best = 0.0

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase begins."""
        self._steps[phase_name] = [0, max(1, int(num_steps))]
        self._parents[phase_name] = parent_phase or ""

    def step_complete(self, phase_name: str, step: int) -> bool:
        """One of its steps is done; True lets the build go on."""
        if phase_name in self._steps:
            self._steps[phase_name][0] = int(step) + 1
            self._tell()
        return True

    def phase_finish(self, phase_name: str) -> None:
        """A phase has ended, perhaps before all of its steps."""
        self._steps.pop(phase_name, None)
        self._parents.pop(phase_name, None)

    def _tell(self) -> None:
        done = max((self._part(name) for name in self._steps if self._parents[name] not in self._steps), default=0.0)
        if done > self._best:
            self._best = done
            self._told(done)

    def _part(self, name: str) -> float:
        """How much of a phase is done, the running phases below it counted as parts of one of its steps."""
        done, steps = self._steps[name]
        below = max((self._part(child) for child, parent in self._parents.items() if parent == name), default=0.0)
        return min(1.0, (done + below) / steps)
