"""Models that OpenVINO compiled, kept on the box: read in a third of the time, and without the compiler that may crash.

The file is one of :mod:`appliance.runtime.engine_cache`: its digest is checked before OpenVINO sees it, and it goes when its model goes.
Compiled by another OpenVINO, for another processor or with other settings it is made again. Tuning compiles a model for many numbers of
threads and images, most of which nobody wants again: of one file no more than the four that were used last are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.runtime import engine_cache
from appliance.runtime.cpu_features import instructions

logger = logging.getLogger(__name__)

_SUFFIX: Final = ".compiled"
_MOST_KEPT: Final = 4
# The key and the tag before it of an external tensor's file (onnx.proto: TensorProto.external_data, StringStringEntryProto).
_EXTERNAL: Final = b"\x0a\x08location\x12"


@dataclass(frozen=True)
class Compiled:
    """What a compiled model depends on.

    Attributes:
        onnx_sha256: digest of the model's file.
        way: how it is compiled: shape, threads, settings.
        box: what it is compiled for: OpenVINO's version, the processor and what it can do.
    """

    onnx_sha256: str
    way: dict[str, Any]
    box: dict[str, Any]

    @property
    def file_name(self) -> str:
        """Named for the model and the way, not the box: what an older OpenVINO left is replaced."""
        return f"{self.onnx_sha256[:16]}-{_digest(self.way)[:16]}{_SUFFIX}"

    def read(self, cache: Path) -> bytes:
        """The compiled model; empty when there is none that is whole and for this box."""
        path = cache / self.file_name
        try:
            header, data = engine_cache.unpack(path)
        except FileNotFoundError:
            return b""
        except (ValueError, OSError) as error:
            logger.warning("compiled model %s is made again: %s", path.name, error)
            return b""
        if header != self._header():
            logger.warning("compiled model %s is made again: it is for another box or OpenVINO", path.name)
            return b""
        with suppress(OSError):  # it counts as used
            os.utime(path)
        return data

    def write(self, cache: Path, data: bytes) -> None:
        """Keep it; a disk that refuses costs time at the next load and nothing else."""
        try:
            engine_cache.pack(cache / self.file_name, self._header(), data)
        except OSError as error:
            logger.warning("compiled model %s is not kept: %s", self.file_name, error.strerror)
            return
        with suppress(OSError):  # another process tidies up, too
            kept = sorted(cache.glob(f"{self.onnx_sha256[:16]}-*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in kept[_MOST_KEPT:]:
                path.unlink()

    def _header(self) -> dict[str, Any]:
        return {"onnx_sha256": self.onnx_sha256, "way": self.way, "box": self.box}


def of_file(model_path: Path, way: dict[str, Any], box: dict[str, Any]) -> Compiled | None:
    """What a compiled model of a file would be kept as; None when its weights stand in other files, which no digest covers here.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    with model_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(_EXTERNAL) >= 0:
            return None
        digest = hashlib.sha256(content).hexdigest()
    return Compiled(digest, way, box | {"instructions": _digest(sorted(instructions()))[:16]})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
