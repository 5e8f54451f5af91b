"""Cache of the engines that TensorRT built on this box; each belongs to one GPU, one driver and one version of TensorRT.

A file has eight bytes of magic, the length of a JSON header, the header, the SHA-256 of header and engine, and the engine. Its name
comes from the model and the build settings; the header says which box it is for. If that is another GPU, driver or TensorRT, or if the
file is incomplete or changed, the engine is built again, and the result and the log show why: TensorRT crashes when it reads an
incomplete engine. The timings of a build are stored in files of the same format.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from model_sync import atomic_files

logger = logging.getLogger(__name__)

_MAGIC: Final = b"CEATRT1\n"
_LENGTH_BYTES: Final = 4
_DIGEST_BYTES: Final = 32
_MAX_HEADER_BYTES: Final = 1 << 16
_MAX_ENGINE_BYTES: Final = 4 << 30
_ENGINE: Final = ".engine"
_TIMINGS: Final = ".timings"
_NAME: Final = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.(?:engine|compiled)")
_PART: Final = re.compile(r".*\.(?:tmp|part)")  # older versions wrote ``.part``
_BUILD: Final = re.compile(r"build-\w+")
_ABANDONED_S: Final = 3600.0  # no write takes this long: a younger file may still be written
_LOCK_GRACE_S: Final = 60.0  # a build directory exists for a moment before it is locked
# Names of the profile's fields in messages.
_TITLES: Final = {
    "gpu": "GPU", "compute_capability": "compute capability", "tensorrt": "TensorRT", "driver": "driver", "precision": "precision",
    "batch": "batch profile", "shape": "input shape", "level": "optimisation level", "onnx_sha256": "model",
}  # fmt: skip


@dataclass(frozen=True)
class EngineProfile:
    """Everything that an engine depends on.

    Attributes:
        gpu: name of the GPU according to CUDA.
        compute_capability: of the GPU: "8.7".
        tensorrt: version of TensorRT.
        driver: version of the GPU's driver.
        precision: of the variant.
        batch: largest batch of the optimisation profile, which starts at 1.
        shape: of one image's tensor.
        level: optimisation level of the builder.
        onnx_sha256: digest of the ONNX file.
    """

    gpu: str
    compute_capability: str
    tensorrt: str
    driver: str
    precision: str
    batch: int
    shape: tuple[int, ...]
    level: int
    onnx_sha256: str

    @property
    def key(self) -> str:
        """Cache key: SHA-256 over all fields, as 64 hex digits."""
        return digest_of(asdict(self))

    @property
    def file_name(self) -> str:
        """File name from model and build settings but not from the box, so that the engine of an old driver is replaced."""
        settings = digest_of({"precision": self.precision, "batch": self.batch, "shape": self.shape, "level": self.level})
        return f"{self.onnx_sha256[:16]}-{settings[:16]}{_ENGINE}"

    @property
    def timings_name(self) -> str:
        """File name of the timings, which depend on GPU and TensorRT but not on the model."""
        box = {"gpu": self.gpu, "capability": self.compute_capability, "tensorrt": self.tensorrt, "driver": self.driver}
        return f"{digest_of(box)[:16]}{_TIMINGS}"

    def to_json(self) -> dict[str, Any]:
        """The profile as it is stored in a header."""
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Any) -> EngineProfile:
        """Read what ``to_json`` wrote; raises ValueError when the value is no profile."""
        types = {item.name: list if item.name == "shape" else int if item.type == "int" else str for item in fields(cls)}
        is_valid = isinstance(value, dict) and {name: type(item) for name, item in value.items()} == types
        if not is_valid or not all(type(size) is int for size in value["shape"]):
            raise ValueError("no engine profile")
        return cls(**value | {"shape": tuple(value["shape"])})

    def describe_change(self, before: EngineProfile) -> str:
        """Describe the first difference from the profile of an earlier engine; empty when there is none."""
        for name, title in _TITLES.items():
            old, new = getattr(before, name), getattr(self, name)
            if old != new:
                return f"{title} changed" if name == "onnx_sha256" else f"{title} {old} -> {new}"
        return ""


@dataclass(frozen=True)
class CacheEntry:
    """The result of a look-up: the engine, or why there is none for this box.

    Attributes:
        data: the engine; empty when there is none for this box.
        why: why it must be built again; empty when the engine is valid or there was no file.
        notes: what the builder stored with the engine.
    """

    data: bytes
    why: str = ""
    notes: dict[str, Any] | None = None


def read(cache: Path, profile: EngineProfile) -> CacheEntry:
    """Look up the engine of a model for this box; never raises an error because of the content of a file."""
    path = cache / profile.file_name
    try:
        header, data = unpack(path)
        before = EngineProfile.from_json(header.get("profile"))
    except FileNotFoundError:
        return CacheEntry(b"")
    except (ValueError, OSError) as error:
        return _reject(path, f"the stored engine is damaged ({error})")
    if change := profile.describe_change(before):
        return _reject(path, change)
    notes = header.get("notes")
    return CacheEntry(data, notes=notes if isinstance(notes, dict) else {})


def write(cache: Path, profile: EngineProfile, engine: bytes, notes: dict[str, Any]) -> Path:
    """Store an engine atomically.

    Raises:
        OSError: the disk failed; an earlier engine is untouched.
    """
    return pack(cache / profile.file_name, {"profile": profile.to_json(), "notes": notes}, engine)


def read_timings(cache: Path, profile: EngineProfile) -> bytes:
    """Read the timings of earlier builds on this GPU; empty when there are no complete ones."""
    try:
        return unpack(cache / profile.timings_name)[1]
    except FileNotFoundError:
        return b""
    except (ValueError, OSError) as error:
        logger.warning("timings of earlier builds are damaged, measured again: %s", error)
        return b""


def write_timings(cache: Path, profile: EngineProfile, timings: bytes) -> None:
    """Store the timings of a build; raises OSError."""
    pack(cache / profile.timings_name, {}, timings)


@contextmanager
def build_directory(cache: Path) -> Iterator[Path]:
    """Create a directory in the cache for one build, locked by this process while it is used.

    Directories of killed builds, hundreds of megabytes each, are removed first: their locks were released with their processes.

    Raises:
        OSError: the disk failed.
    """
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in sorted(cache.iterdir()):
        with suppress(OSError):
            if _is_abandoned(path):
                shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as own:
        handle = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield Path(own)
        finally:
            os.close(handle)


def _is_abandoned(path: Path) -> bool:
    """Whether a path is a build directory that no process has locked."""
    if not _BUILD.fullmatch(path.name) or time.time() - path.lstat().st_mtime < _LOCK_GRACE_S:
        return False
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def sweep(cache: Path, keep_onnx: Collection[str]) -> list[str]:
    """Remove the engines of models that are not installed any more, and incomplete files of killed builds.

    ``keep_onnx`` are the SHA-256 digests of the ONNX files of the models that stay. Timings stay too: they belong to the GPU.

    Returns:
        The names of the removed files.
    """
    installed = {digest[:16] for digest in keep_onnx}
    removed = []
    for path in sorted(cache.iterdir()) if cache.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        with suppress(OSError):  # the next sweep tries again
            is_partial = _PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED_S
            if is_partial or (match and match[1] not in installed) or _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path.name)
    return removed


def _reject(path: Path, why: str) -> CacheEntry:
    logger.warning("engine %s is built again: %s", path.name, why)
    return CacheEntry(b"", why)


def digest_of(value: Any) -> str:
    """The SHA-256 of a JSON value, as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def pack(path: Path, header: dict[str, Any], data: bytes) -> Path:
    """Write header and data with their digest atomically; raises OSError when the disk failed."""
    head = json.dumps(header, sort_keys=True).encode()
    digest = hashlib.sha256(head)
    digest.update(data)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic_files.write(path, _MAGIC + len(head).to_bytes(_LENGTH_BYTES, "big") + head + digest.digest(), data, mode=0o600)
    return path


def unpack(path: Path) -> tuple[dict[str, Any], bytes]:
    """Read header and data of a file; raises ValueError when it is incomplete or changed, OSError when it cannot be read."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MAX_ENGINE_BYTES:
            raise ValueError("too large")
        return parse(file.read())


def parse(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Parse the content of a file to header and data; raises ValueError when it has another format, is incomplete, or was changed."""
    start = len(_MAGIC) + _LENGTH_BYTES
    if content[: len(_MAGIC)] != _MAGIC or len(content) < start:
        raise ValueError("no engine file")
    length = int.from_bytes(content[len(_MAGIC) : start], "big")
    end = start + length
    if length > _MAX_HEADER_BYTES or len(content) < end + _DIGEST_BYTES:
        raise ValueError("cut short")
    view = memoryview(content)
    digest = hashlib.sha256(view[start:end])
    digest.update(view[end + _DIGEST_BYTES :])
    if digest.digest() != content[end : end + _DIGEST_BYTES]:
        raise ValueError("not what was written")
    try:
        header = json.loads(content[start:end])
    except RecursionError as error:
        raise ValueError("no header") from error
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, content[end + _DIGEST_BYTES :]
