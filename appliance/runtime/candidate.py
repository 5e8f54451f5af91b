"""A candidate: one combination of variant, runtime, provider, number of threads and batch size that may run a model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter

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
    threads: Annotated[int, Field(ge=0, le=_MAX)] = 0
    batch: Annotated[int, Field(ge=1, le=_MAX)] = 1

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

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
        try:
            return TypeAdapter(cls).validate_json(json.dumps(value))
        except ValueError as error:
            raise InferenceError("job.error", "the stored choice of a runtime cannot be read") from error


def baseline_candidate(variant: Variant, threads: int = 0) -> Candidate:
    """Return the baseline, which every box can run: ONNX Runtime on the CPU, one image at a time."""
    return Candidate("onnxruntime", variant.file, variant.precision, CPU, threads)
