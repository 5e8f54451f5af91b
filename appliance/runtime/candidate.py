"""One way to run a model on this box: which variant, by which runtime, on what, with how many threads and images at a time."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal

from appliance.core.errors import InferenceError

if TYPE_CHECKING:
    from model_sync.bundle import Variant

RuntimeName = Literal["onnxruntime", "openvino", "tensorrt", "triton"]

RUNTIMES: Final[tuple[RuntimeName, ...]] = ("onnxruntime", "openvino", "tensorrt", "triton")
CPU: Final = "CPUExecutionProvider"
_MOST: Final = 1024  # threads, or images at a time


@dataclass(frozen=True)
class Candidate:
    """What is tried, measured and chosen; stored with the model it was chosen for.

    Attributes:
        runtime: who runs it.
        file: the variant's ONNX file, relative to the bundle.
        precision: the variant's precision, as the manifest says.
        provider: where it runs, in the runtime's own words: an ONNX Runtime execution provider, an OpenVINO device, ``GPU:0``, or the
            address of a Triton server.
        threads: of one inference; all of this process's cores when 0. Means nothing on a GPU.
        batch: how many images are read at once where more than one waits.
    """

    runtime: RuntimeName
    file: str
    precision: str
    provider: str = CPU
    threads: int = 0
    batch: int = 1

    @property
    def cores(self) -> int:
        """How many threads that is on this machine."""
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def title(self) -> str:
        """The candidate in one short text, for tables and logs."""
        return f"{self.runtime} {self.provider} {self.file} x{self.cores} b{self.batch}"

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Candidate:
        """Read what ``to_json`` wrote.

        Raises:
            InferenceError: ``job.error``: it is none of ours, or has a number of threads or images that no box has.
        """
        if not isinstance(value, dict) or set(value) != {item.name for item in fields(cls)} or not _is_ours(value):
            raise InferenceError("job.error", "the stored choice of a runtime cannot be read")
        return cls(**value)


def _is_ours(value: dict[str, Any]) -> bool:
    words, numbers = (value["file"], value["precision"], value["provider"]), (value["threads"], value["batch"])
    if value["runtime"] not in RUNTIMES or not all(isinstance(word, str) for word in words):
        return False
    if any(type(number) is not int for number in numbers):  # True is no number of images
        return False
    return bool(0 <= value["threads"] <= _MOST and 1 <= value["batch"] <= _MOST)


def plain_candidate(variant: Variant, threads: int = 0) -> Candidate:
    """What every box can run: ONNX Runtime on the CPU, one image at a time."""
    return Candidate("onnxruntime", variant.file, variant.precision, CPU, threads)
