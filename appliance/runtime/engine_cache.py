"""Engines kept on the box: what TensorRT built here, for this GPU, this driver and this TensorRT, and for no other.

A file is eight bytes of magic, the length of a JSON header, the header, the SHA-256 of header and engine, and the engine. It is named
for the model and the way it was built; whether it fits this box stands in its header. Anything that does not fit (another GPU, driver
or TensorRT), is cut short or was changed is built again, and the reason goes to the result and the log: TensorRT itself does not
survive reading an engine that is not whole. Timings that a build measured are kept in the same kind of file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

logger = logging.getLogger(__name__)

_MAGIC: Final = b"CEATRT1\n"
_LENGTH_BYTES: Final = 4
_DIGEST_BYTES: Final = 32
_MAX_HEADER_BYTES: Final = 1 << 16
_MAX_ENGINE_BYTES: Final = 4 << 30
_ENGINE: Final = ".engine"
_TIMINGS: Final = ".timings"
_NAME: Final = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.(?:engine|compiled)")
_PART: Final = re.compile(r".*\.part")
_BUILD: Final = re.compile(r"build-\w+")
_ABANDONED_S: Final = 3600.0  # no writing may take so long: what is younger may be somebody's at work
_MAKING_S: Final = 60.0  # a build's directory may be there a moment before it is held
# What an engine is bound to, as a person is told that it changed.
_BOUND: Final = {
    "gpu": "GPU", "compute_capability": "compute capability", "tensorrt": "TensorRT", "driver": "driver", "precision": "precision",
    "batch": "batch profile", "shape": "input shape", "level": "optimisation level", "onnx_sha256": "model",
}  # fmt: skip


@dataclass(frozen=True)
class DeviceProfile:
    """All that an engine depends on.

    Attributes:
        gpu: name of the GPU, as CUDA says it.
        compute_capability: of the GPU: "8.7".
        tensorrt: version of TensorRT.
        driver: version of the GPU's driver.
        precision: of the variant.
        batch: the largest batch of its profile, which reaches from 1 to this.
        shape: of one image's tensor.
        level: the builder's optimisation level.
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
        """The engine cache's key: 64 hex digits over everything."""
        return _digest(asdict(self))

    @property
    def file_name(self) -> str:
        """The engine's file: model first, then the way it was built; the box is not in it, so that one of an old driver is replaced."""
        way = _digest({"precision": self.precision, "batch": self.batch, "shape": self.shape, "level": self.level})
        return f"{self.onnx_sha256[:16]}-{way[:16]}{_ENGINE}"

    @property
    def timings_name(self) -> str:
        """The file of timings, which are the GPU's and TensorRT's, whatever was built."""
        box = {"gpu": self.gpu, "capability": self.compute_capability, "tensorrt": self.tensorrt, "driver": self.driver}
        return f"{_digest(box)[:16]}{_TIMINGS}"

    def to_json(self) -> dict[str, Any]:
        """As it stands in a header."""
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Any) -> DeviceProfile:
        """Read what ``to_json`` wrote; raises ValueError when it is none."""
        if not isinstance(value, dict) or set(value) != {item.name for item in fields(cls)}:
            raise ValueError("no device profile")
        shape = value["shape"]
        numbers = [value["batch"], value["level"], *(shape if isinstance(shape, list) else [None])]
        if not all(type(number) is int for number in numbers):
            raise ValueError("no device profile")
        words = {name: value[name] for name in value if name not in ("batch", "level", "shape")}
        if not all(isinstance(word, str) for word in words.values()):
            raise ValueError("no device profile")
        return cls(**words, batch=value["batch"], level=value["level"], shape=tuple(shape))

    def changed(self, before: DeviceProfile) -> str:
        """What differs from the profile of an engine that was built earlier, in words; empty when nothing does."""
        for name, title in _BOUND.items():
            old, new = getattr(before, name), getattr(self, name)
            if old != new:
                return f"{title} changed" if name == "onnx_sha256" else f"{title} {old} -> {new}"
        return ""


@dataclass(frozen=True)
class Found:
    """What the cache had: the engine, or why there is none for this box.

    Attributes:
        data: the engine; empty when there is none that fits.
        why: why it has to be built (again); empty when there was no file at all, or when it fits.
        notes: what the builder noted with the engine.
    """

    data: bytes
    why: str = ""
    notes: dict[str, Any] | None = None


def read(cache: Path, profile: DeviceProfile) -> Found:
    """Look for this box's engine of a model; never raises for what a file holds.

    Args:
        cache: the directory.
        profile: what the engine has to be for.
    """
    path = cache / profile.file_name
    try:
        header, data = unpack(path)
        before = DeviceProfile.from_json(header.get("profile"))
    except FileNotFoundError:
        return Found(b"")
    except (ValueError, OSError) as error:
        return _rejected(path, f"the stored engine is damaged ({error})")
    changed = profile.changed(before)
    if changed:
        return _rejected(path, changed)
    notes = header.get("notes")
    return Found(data, notes=notes if isinstance(notes, dict) else {})


def write(cache: Path, profile: DeviceProfile, engine: bytes, notes: dict[str, Any]) -> Path:
    """Keep an engine: written beside, fsynced, renamed over what was there.

    Raises:
        OSError: the disk refused; what was there before is untouched.
    """
    return pack(cache / profile.file_name, {"profile": profile.to_json(), "notes": notes}, engine)


def read_timings(cache: Path, profile: DeviceProfile) -> bytes:
    """The timings of earlier builds on this GPU; empty when there are none that are whole."""
    try:
        return unpack(cache / profile.timings_name)[1]
    except FileNotFoundError:
        return b""
    except (ValueError, OSError) as error:
        logger.warning("timings of earlier builds are damaged, measured again: %s", error)
        return b""


def write_timings(cache: Path, profile: DeviceProfile, timings: bytes) -> None:
    """Keep the timings of a build; raises OSError."""
    pack(cache / profile.timings_name, {}, timings)


@contextmanager
def workplace(cache: Path) -> Iterator[Path]:
    """A directory beside the engines for one build, held by this process for as long as it is used.

    What builds left whose process was killed, hundreds of megabytes each, is removed first: their locks went with them.

    Raises:
        OSError: the disk refuses.
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
    """Whether it is a build's directory that nobody holds."""
    if not _BUILD.fullmatch(path.name) or time.time() - path.lstat().st_mtime < _MAKING_S:
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
    """Remove the engines of models that are not installed any more, and what a build that was killed left half-written.

    Args:
        cache: the directory.
        keep_onnx: SHA-256 of the ONNX files of the models that stay.

    Returns:
        The names of the files that were removed. Timings stay: they are of the GPU, not of a model.
    """
    kept = {digest[:16] for digest in keep_onnx}
    removed = []
    for path in sorted(cache.iterdir()) if cache.is_dir() else []:
        named = _NAME.fullmatch(path.name)
        with suppress(OSError):  # the next sweep finds it again
            half = _PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED_S
            if half or (named and named[1] not in kept) or _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path.name)
    return removed


def _rejected(path: Path, why: str) -> Found:
    logger.warning("engine %s is built again: %s", path.name, why)
    return Found(b"", why)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def pack(path: Path, header: dict[str, Any], data: bytes) -> Path:
    """Write header and data with their digest: beside, fsynced, renamed over what was there; raises OSError when the disk refuses."""
    head = json.dumps(header, sort_keys=True).encode()
    digest = hashlib.sha256(head)
    digest.update(data)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(_MAGIC + len(head).to_bytes(_LENGTH_BYTES, "big") + head + digest.digest())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _fsync_directory(path.parent)
    return path


def unpack(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file; raises ValueError when it is not whole, OSError when it cannot be read."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MAX_ENGINE_BYTES:
            raise ValueError("too large")
        return parse(file.read())


def parse(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Take a file apart.

    Returns:
        The header and the engine.

    Raises:
        ValueError: it is not one of ours, cut short, or not what was written.
    """
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


def _fsync_directory(directory: Path) -> None:
    # appliance.store.encrypted_files has one too, and cryptography with it, which a bare GPU machine need not have.
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
