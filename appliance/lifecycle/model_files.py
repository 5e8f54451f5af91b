"""The box's copies of models, ``models/<digest>``: written to a temporary directory, fsynced, renamed, and read back from the disk.

A copy is named by the digest of its manifest, which has the digest of every file: a changed file is detected before it is loaded.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance import __version__
from appliance.core.errors import ActivationError
from model_sync.atomic_files import sync_directory
from model_sync.bundle import MANIFEST_NAME, ModelBundle
from model_sync.errors import BundleError

_CHUNK_BYTES: Final = 1 << 20
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def load(directory: Path) -> ModelBundle:
    """Read a bundle and verify the digest of every file; raises ActivationError ``model.invalid`` or ``model.too_new``."""
    try:
        return ModelBundle.load(directory, __version__)
    except BundleError as error:
        if error.code == "bundle.too_new":
            raise ActivationError("model.too_new", error.message) from error
        raise ActivationError("model.invalid", error.message, hint=error.hint) from error


def model_dir(data_dir: Path, digest: str) -> Path:
    """Return the directory of the box's copy of a model; it need not exist."""
    return data_dir / "models" / digest


def engine_dir(data_dir: Path) -> Path:
    """Return the directory of the engines and timing caches that were built on this box; all of it can be built again."""
    return data_dir / "engines"


def load_copy(data_dir: Path, digest: str) -> ModelBundle:
    """Read the box's copy of a model and verify its digests; raises ActivationError."""
    bundle = load(model_dir(data_dir, digest))
    if bundle.digest != digest:
        raise ActivationError("model.invalid", "the copy on this box is another model")
    return bundle


def is_intact(data_dir: Path, digest: str) -> bool:
    """Whether the box has a complete and unchanged copy of a model."""
    try:
        return load_copy(data_dir, digest).digest == digest
    except ActivationError:
        return False


def install(data_dir: Path, origin: Path, digest: str, on_progress: Callable[[float], None], reserve_bytes: int = 0) -> ModelBundle:
    """Copy a bundle to the box; an intact copy is left as it is, a damaged one is renamed but not deleted.

    Another account may be able to change ``origin`` at any moment, so the digest is checked again on the copy. ``reserve_bytes`` of the
    disk stay free.

    Raises:
        ActivationError: ``model.invalid``, ``model.mismatch`` (another model than requested), ``model.too_new``, ``model.disk_full``
            or ``store.failed``; no part of the copy stays.
    """
    with suppress(ActivationError):
        return load_copy(data_dir, digest)
    target = model_dir(data_dir, digest)
    source = load(origin)
    if source.digest != digest:
        raise ActivationError("model.mismatch", f"{source.digest[:12]} instead of {digest[:12]}")
    staging = target.with_name(f"{digest}.{os.getpid()}.part")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.path.lexists(target):
            _rename_damaged(target)
        _copy(source, staging, on_progress, reserve_bytes)
        os.rename(staging, target)
        sync_directory(target.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise ActivationError("model.disk_full" if error.errno in _FULL else "store.failed", str(error)) from error
    return load_copy(data_dir, digest)


def sweep(data_dir: Path, keep: Collection[str]) -> None:
    """Remove incomplete copies, and copies of models that were never active (not in ``keep``), after a killed or failed self-test.

    Renamed damaged copies stay: a technician may want to examine them.
    """
    if not (data_dir / "models").is_dir():
        return
    for path in (data_dir / "models").iterdir():
        if path.suffix == ".part" or (_DIGEST.fullmatch(path.name) and path.name not in keep):
            shutil.rmtree(path, ignore_errors=True)


def _copy(source: ModelBundle, staging: Path, on_progress: Callable[[float], None], reserve_bytes: int) -> None:
    names = [MANIFEST_NAME, *sorted(source.manifest.digests())]
    total = sum((source.directory / name).stat().st_size for name in names)
    free = shutil.disk_usage(staging.parent).free
    if total + reserve_bytes > free:  # checked before the disk is full: incoming scans need the space too
        raise OSError(errno.ENOSPC, f"{total >> 20} MiB needed and {reserve_bytes >> 20} MiB kept for scans, {free >> 20} MiB free")
    done = 0
    for name in names:
        (staging / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        done += _copy_file(source.directory / name, staging / name)
        on_progress(min(1.0, done / total))
    for path in sorted(staging.rglob("*")):
        if path.is_dir():
            sync_directory(path)
    sync_directory(staging)


def _copy_file(source: Path, target: Path) -> int:
    """Copy a regular file up to the size that it had at the start; returns the number of copied bytes."""
    done = 0
    with open(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as reader:
        status = os.fstat(reader.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"{source.name} is no regular file")
        with open(target, "xb") as writer:
            while done < status.st_size and (chunk := reader.read(_CHUNK_BYTES)):
                done += writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
    return done


def _rename_damaged(target: Path) -> None:
    """Rename a damaged copy, so that it can be examined, to make room for an intact one."""
    number = 1 + sum(1 for _ in target.parent.glob(f"{target.name}.damaged-*"))
    os.rename(target, target.with_name(f"{target.name}.damaged-{number}"))
    sync_directory(target.parent)
