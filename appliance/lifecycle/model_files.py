"""The box's own copies of models: ``models/<digest>``, written beside, fsynced, renamed, and read back from the disk.

A copy is named by the digest of its manifest, which names every file in it: one that changed is found before it is loaded.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from appliance import __version__
from appliance.core.errors import ActivationError
from appliance.store.encrypted_files import fsync_directory
from model_sync.bundle import MANIFEST_NAME, ModelBundle
from model_sync.errors import BundleError

_CHUNK_BYTES: Final = 1 << 20
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def load(directory: Path) -> ModelBundle:
    """Read a bundle, every file's digest checked; raises ActivationError ``model.invalid`` or ``model.too_new``."""
    try:
        bundle = ModelBundle.load(directory)
    except BundleError as error:
        raise ActivationError("model.invalid", error.message, hint=error.hint) from error
    if not bundle.manifest.runs_on(__version__):
        raise ActivationError("model.too_new", f"needs {bundle.manifest.min_appliance_version}, this is {__version__}")
    return bundle


def place(data_dir: Path, digest: str) -> Path:
    """Where the box's own copy of a model is, or would be."""
    return data_dir / "models" / digest


def engines(data_dir: Path) -> Path:
    """Where engines and timing caches are kept that were built on this box; whatever is in it can be built again."""
    return data_dir / "engines"


def own_copy(data_dir: Path, digest: str) -> ModelBundle:
    """The box's own copy of a model, its digests checked; raises ActivationError."""
    bundle = load(place(data_dir, digest))
    if bundle.digest != digest:
        raise ActivationError("model.invalid", "the copy on this box is another model")
    return bundle


def is_whole(data_dir: Path, digest: str) -> bool:
    """Whether the box's own copy of a model is there and what it should be."""
    try:
        return own_copy(data_dir, digest).digest == digest
    except ActivationError:
        return False


def install(data_dir: Path, origin: Path, digest: str, told: Callable[[float], None], reserve_bytes: int = 0) -> ModelBundle:
    """Make the box's own copy of a bundle; one that is there and whole is left as it is, a damaged one is kept beside.

    Args:
        data_dir: the box's data directory.
        origin: the bundle, perhaps in a directory that another account may change at any moment.
        digest: which model it has to be.
        told: called now and then with how much is done, 0 to 1.
        reserve_bytes: what has to stay free on the disk.

    Raises:
        ActivationError: ``model.invalid``, ``model.mismatch`` (another model than wanted), ``model.too_new``, ``model.disk_full``
            or ``store.failed``; nothing of it was kept.
    """
    target = place(data_dir, digest)
    if is_whole(data_dir, digest):
        return own_copy(data_dir, digest)
    source = load(origin)
    if source.digest != digest:
        raise ActivationError("model.mismatch", f"{source.digest[:12]} instead of {digest[:12]}")
    staging = target.with_name(f"{digest}.{os.getpid()}.part")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.path.lexists(target):
            _set_aside(target)
        _copy(source, staging, told, reserve_bytes)
        os.rename(staging, target)
        fsync_directory(target.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise ActivationError("model.disk_full" if error.errno in _FULL else "store.failed", str(error)) from error
    return own_copy(data_dir, digest)


def sweep(data_dir: Path, keep: Collection[str]) -> None:
    """Remove what a proof left that was killed or failed: half copies, and copies of models that never read a patient.

    Args:
        data_dir: the box's data directory.
        keep: digests whose copies stay. Damaged copies that were set aside stay too: somebody may want to know why.
    """
    if not (data_dir / "models").is_dir():
        return
    for path in (data_dir / "models").iterdir():
        if path.suffix == ".part" or (_DIGEST.fullmatch(path.name) and path.name not in keep):
            shutil.rmtree(path, ignore_errors=True)


def _copy(source: ModelBundle, staging: Path, told: Callable[[float], None], reserve_bytes: int) -> None:
    names = [MANIFEST_NAME, *sorted(source.manifest.digests())]
    total = sum((source.directory / name).stat().st_size for name in names)
    free = shutil.disk_usage(staging.parent).free
    if total + reserve_bytes > free:  # before the disk is full: the scans that come in meanwhile need it too
        raise OSError(errno.ENOSPC, f"{total >> 20} MiB needed and {reserve_bytes >> 20} MiB kept for scans, {free >> 20} MiB free")
    done = 0
    for name in names:
        (staging / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for size in _copy_file(source.directory / name, staging / name):
            done += size
            told(min(1.0, done / total))
    for path in sorted(staging.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
    fsync_directory(staging)


def _copy_file(source: Path, target: Path) -> list[int]:
    """Copy one plain file, no further than it is long; returns the sizes of its pieces."""
    pieces: list[int] = []
    with open(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as reading:
        status = os.fstat(reading.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"{source.name} is no plain file")
        with open(target, "xb", buffering=0) as writing:
            while sum(pieces) < status.st_size and (chunk := reading.read(_CHUNK_BYTES)):
                view = memoryview(chunk)
                while view:
                    view = view[writing.write(view) :]
                pieces.append(len(chunk))
            os.fsync(writing.fileno())
    return pieces


def _set_aside(target: Path) -> None:
    """Keep a damaged copy beside, for whoever asks what happened to the disk, and make room for a whole one."""
    number = 1 + sum(1 for _ in target.parent.glob(f"{target.name}.damaged-*"))
    os.rename(target, target.with_name(f"{target.name}.damaged-{number}"))
    fsync_directory(target.parent)
