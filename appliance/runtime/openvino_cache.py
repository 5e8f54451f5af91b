"""Cache of the models that OpenVINO compiled: loaded in a third of the time, and without the compiler, which may crash.

The files have the format of :mod:`appliance.runtime.engine_cache`: the digest is verified before OpenVINO reads the file, and the file is
removed with its model. For another OpenVINO version, processor or settings the model is compiled again. Tuning compiles a model for many
numbers of threads and images; of each ONNX file only the four compiled models that were used last stay.
"""

from __future__ import annotations

import hashlib
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
_MAX_FILES: Final = 4
# Protobuf bytes of the key "location", which names the file of an external tensor (onnx.proto, TensorProto.external_data).
_EXTERNAL: Final = b"\x0a\x08location\x12"


@dataclass(frozen=True)
class CompiledModelEntry:
    """The cache entry of one compiled model, with everything that it depends on.

    Attributes:
        onnx_sha256: digest of the ONNX file.
        settings: of the compilation: shape, threads, OpenVINO's settings.
        box: version of OpenVINO, and the processor with its features.
    """

    onnx_sha256: str
    settings: dict[str, Any]
    box: dict[str, Any]

    @property
    def file_name(self) -> str:
        """File name from model and settings but not from the box, so that the file of an older OpenVINO is replaced."""
        return f"{self.onnx_sha256[:16]}-{engine_cache.digest_of(self.settings)[:16]}{_SUFFIX}"

    def read(self, cache: Path) -> bytes:
        """Read the compiled model; empty when there is none that is complete and for this box."""
        path = cache / self.file_name
        try:
            header, data = engine_cache.unpack(path)
        except FileNotFoundError:
            return b""
        except (ValueError, OSError) as error:
            logger.warning("compiled model %s is compiled again: %s", path.name, error)
            return b""
        if header != self._header():
            logger.warning("compiled model %s is compiled again: it is for another box or OpenVINO", path.name)
            return b""
        with suppress(OSError):  # mark it as used
            os.utime(path)
        return data

    def write(self, cache: Path, data: bytes) -> None:
        """Write the compiled model; a disk error only costs time at the next load."""
        try:
            engine_cache.pack(cache / self.file_name, self._header(), data)
        except OSError as error:
            logger.warning("compiled model %s is not stored: %s", self.file_name, error.strerror)
            return
        with suppress(OSError):  # another process may remove old entries at the same time
            newest_first = sorted(cache.glob(f"{self.onnx_sha256[:16]}-*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in newest_first[_MAX_FILES:]:
                path.unlink()

    def _header(self) -> dict[str, Any]:
        return {"onnx_sha256": self.onnx_sha256, "way": self.settings, "box": self.box}


def of_file(model_path: Path, settings: dict[str, Any], box: dict[str, Any]) -> CompiledModelEntry | None:
    """Return the cache entry of a model; None when its weights are in other files, which the digest does not cover.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is empty.
    """
    with model_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(_EXTERNAL) >= 0:
            return None
        digest = hashlib.sha256(content).hexdigest()
    return CompiledModelEntry(digest, settings, box | {"instructions": engine_cache.digest_of(sorted(instructions()))[:16]})
