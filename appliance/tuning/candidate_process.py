"""Runs a candidate in a process of its own (:class:`LimitedProcess`): OpenVINO's compiler has a segmentation fault with some graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.core.child_process import printable_text
from appliance.core.child_protocol import Message
from appliance.core.errors import InferenceError
from appliance.core.limited_process import LimitedProcess, ProcessEndedError
from appliance.runtime import Candidate, OnProgress, TensorSpec
from model_sync import messages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

_DETAIL_CHARS: Final = 500
_MAX_NUMBER: Final = 1e18
_CODES: Final = {"crashed": "runtime.crashed", "deadline": "runtime.deadline", "memory": "runtime.memory", "killed": "runtime.memory"}


class CandidateProcess:
    """One candidate, loaded and run in a child process, which dies at the latest with the thread that loaded it (PR_SET_PDEATHSIG).

    Args:
        model_path: the ONNX file.
        input_spec: what the model takes.
        cache: directory for engines and compiled models.
        deadline_s: for each call: the load with its warm-up, one inference, or a series of timed ones.
        memory_bytes: limit of the private memory of the child; the limit of the parent holds too.
        on_progress: called with the progress of a long load.

    Attributes:
        deadline_s: may be changed between calls.
        load_ms: time to load and warm up, without the start of Python.
        peak_rss_bytes: peak resident memory of the child, as of its last response.

    Every call raises InferenceError: ``runtime.crashed`` (the detail says by which signal and where), ``runtime.deadline``,
    ``runtime.memory`` or the code of the adapter; after one of the first three the process has ended.
    """

    module = "appliance.tuning.candidate_child"

    def __init__(
        self, model_path: Path, input_spec: TensorSpec, candidate: Candidate, *, cache: Path | None = None,
        deadline_s: float, memory_bytes: int | None = None, on_progress: OnProgress | None = None,
    ) -> None:  # fmt: skip
        self._load_request = {
            "ask": "load", "model_path": str(model_path), "input": {"name": input_spec.name, "shape": list(input_spec.shape)},
            "candidate": candidate.to_json(), "cache": None if cache is None else str(cache),
        }  # fmt: skip
        self._input = input_spec.name
        self.deadline_s, self._memory_bytes, self._on_progress = deadline_s, memory_bytes, on_progress
        self._process: LimitedProcess | None = None
        self._error: tuple[str, str] | None = None
        self.load_ms = 0.0
        self.peak_rss_bytes = 0

    @property
    def pid(self) -> int | None:
        """Process number of the child; None before ``load`` and after its end."""
        return self._process.pid if self._process is not None else None

    def load(self) -> dict[str, Any]:
        """Start the child, load the model there and warm it up; returns ``Runtime.describe``."""
        if self._process is not None or self._error is not None:
            raise InferenceError("job.error", "a candidate is loaded once")
        try:
            self._process = LimitedProcess(self.module, self._memory_bytes)
        except OSError as error:
            raise InferenceError("runtime.crashed", f"no process could be started: {error.strerror}") from error
        response = self._call("load", Message(self._load_request, {}))
        described = response.header.get("describe")
        if not isinstance(described, dict):
            raise self._end("runtime.crashed", "invalid response in load")
        self.load_ms = _number(response.header.get("load_ms"))
        return described

    def infer(self, tensor: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run the model on a tensor [n, ...]; returns output name -> array [n, ...]."""
        return self._call("infer", Message({"ask": "infer"}, {self._input: tensor})).arrays

    def time(self, tensor: NDArray[np.float32], repeat: int) -> list[float]:
        """Time ``repeat`` calls of ``Runtime.infer`` with one tensor; returns milliseconds measured in the child, without the pipes."""
        response = self._call("infer", Message({"ask": "time", "repeat": repeat}, {self._input: tensor}))
        values = response.header.get("ms")
        if not isinstance(values, list) or len(values) != repeat or not all(isinstance(value, float) for value in values):
            raise self._end("runtime.crashed", "invalid response in infer")
        return values

    def close(self) -> None:
        """End the child and every process that it started."""
        if self._error is None:
            self._error = ("job.error", "the candidate is closed")
        if self._process is not None:
            self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, where: str, request: Message) -> Message:
        if self._error is not None:
            raise InferenceError(*self._error)
        if self._process is None:
            raise InferenceError("job.error", "nothing is loaded")
        try:
            response = self._process.call(request.header, request.arrays, self.deadline_s, self._report_progress)
        except ProcessEndedError as ended:
            raise self._end(_CODES[ended.end], _describe(ended, where)) from ended
        self.peak_rss_bytes = int(_number(response.header.get("peak_rss_bytes")))
        if "error" in response.header:
            raise self._reported_error(response.header["error"], where)
        return response

    def _report_progress(self, done: object) -> None:
        if self._on_progress is not None:
            self._on_progress(min(_number(done), 1.0))

    def _reported_error(self, error: object, where: str) -> InferenceError:
        code, detail = (error.get("code"), error.get("detail")) if isinstance(error, dict) else (None, None)
        if not isinstance(code, str) or not messages.is_known(code):
            return self._end("runtime.crashed", f"invalid response in {where}")
        text = printable_text(detail or "", _DETAIL_CHARS)
        if where == "load" or code == "runtime.memory":  # a partly loaded model is not used
            return self._end(code, text)
        return InferenceError(code, text)

    def _end(self, code: str, detail: str) -> InferenceError:
        self._error = (code, detail)
        self.close()
        return InferenceError(code, detail)


def _describe(ended: ProcessEndedError, where: str) -> str:
    """The detail of an error: what happened, in which call, and the last line that was printed."""
    first, _, rest = ended.detail.partition(": ")
    text = f"{first} in {where}" + "".join(f": {part}" for part in (rest, ended.printed) if part)
    return f"killed from outside, {text}" if ended.end == "killed" else text


def _number(value: object) -> float:
    """Return a number of a response; 0 when the value is no valid number."""
    return float(value) if isinstance(value, (int, float)) and 0 <= value < _MAX_NUMBER else 0.0
