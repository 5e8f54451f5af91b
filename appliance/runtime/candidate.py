"""A candidate: one combination of variant, runtime, provider, number of threads and batch size that may run a model."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from appliance.core.errors import InferenceError

if TYPE_CHECKING:
    from model_sync.bundle import Variant

RuntimeName = Literal["onnxruntime", "openvino", "tensorrt", "triton"]

RUNTIMES: Final[tuple[RuntimeName, ...]] = ("onnxruntime", "openvino", "tensorrt", "triton")
CPU: Final = "CPUExecutionProvider"
_MAX: Final = 1024  # threads, or images at a time


@dataclass(frozen=True)
class Candidate:
    """A combination that is measured and may be chosen; the chosen one is stored with the model.

    Attributes:
        runtime: name of the runtime.
        file: ONNX file of the variant, relative to the bundle.
        precision: of the variant, as in the manifest.
        provider: what runs it, in the terms of the runtime: an ONNX Runtime execution provider, an OpenVINO device, ``GPU:0``, or the
            address of a Triton server.
        threads: of one inference; all cores of this process when 0. Not used on a GPU.
        batch: how many images are analysed at once when more than one waits.
    """

    runtime: RuntimeName
    file: str
    precision: str
    provider: str = CPU
    threads: int = 0
    batch: int = 1

    @property
    def cores(self) -> int:
        """Number of threads on this machine."""
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def title(self) -> str:
        """Short text for tables and logs."""
        return f"{self.runtime} {self.provider} {self.file} x{self.cores} b{self.batch}"

    def to_json(self) -> dict[str, Any]:
        """The candidate as it is stored."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Candidate:
        """Read what ``to_json`` wrote.

        Raises:
            InferenceError: ``job.error``: the value is invalid, or a number is out of range.
        """
        types = {"runtime": str, "file": str, "precision": str, "provider": str, "threads": int, "batch": int}
        # A bool is an int in Python, so that the types must be the same.
        is_valid = isinstance(value, dict) and {name: type(item) for name, item in value.items()} == types
        if not is_valid or value["runtime"] not in RUNTIMES or not (0 <= value["threads"] <= _MAX and 1 <= value["batch"] <= _MAX):
            raise InferenceError("job.error", "the stored choice of a runtime cannot be read")
        return cls(**value)


def baseline_candidate(variant: Variant, threads: int = 0) -> Candidate:
    """Return the baseline, which every box can run: ONNX Runtime on the CPU, one image at a time."""
    return Candidate("onnxruntime", variant.file, variant.precision, CPU, threads)
