"""Files that are there after a power cut: written beside their name, flushed to the disk, then renamed into place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_sync.errors import LibraryUnreachable

_SHARED_FILE, _SHARED_DIRECTORY = 0o644, 0o755
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_FILE = (errno.ELOOP, errno.ENXIO)  # a link, a socket
MAX_JSON_BYTES = 4 << 20


class NotPlain(OSError):  # noqa: N818  (a state of the disk, as other OSErrors are)
    """What lies there is not the small plain file that belongs there: a link, a pipe, a device, a directory, or too large."""


def write(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, readable by the box's account; a reader sees the old bytes or the new, never a part.

    Raises:
        OSError: nothing was replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _SHARED_FILE), "wb") as stream:
            os.fchmod(stream.fileno(), _SHARED_FILE)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by a JSON document, in the same way."""
    write(path, (json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode())


def read(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """Return a small plain file that another account may have laid: nothing is waited for, nothing large is read.

    Args:
        path: the file.
        limit: how many bytes it may have.
        follow: whether it may be a link; never the case in a directory that another account writes.

    Raises:
        NotPlain: it is a link, a pipe, a device or a directory (``EINVAL``), or larger (``EFBIG``).
        OSError: it is not there, or cannot be read.
    """
    # Without O_NONBLOCK opening a pipe waits for whoever writes to it.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise NotPlain(errno.EINVAL, "it is no plain file", str(path)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotPlain(errno.EINVAL, "it is no plain file", str(path))
        with open(descriptor, "rb", closefd=False) as stream:
            data = stream.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise NotPlain(errno.EFBIG, f"it is larger than {limit} bytes", str(path))
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an absent, unreadable or damaged file reads as an empty one."""
    try:
        value = json.loads(read(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sync_file(path: Path) -> None:
    """Flush one file to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Flush the names in one directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush every file and directory below ``root``, and make them readable by the box's account."""
    for directory, _, files in os.walk(root):
        os.chmod(directory, _SHARED_DIRECTORY)
        for name in files:
            os.chmod(Path(directory, name), _SHARED_FILE)
            sync_file(Path(directory, name))
        sync_directory(Path(directory))


def files_below(root: Path) -> Iterator[Path]:
    """Yield every regular file below ``root``; nothing when there is no such directory."""
    for directory, _, files in os.walk(root):
        for name in files:
            if (path := Path(directory, name)).is_file():
                yield path


def remove_tree(root: Path) -> None:
    """Remove a directory that nobody reads any more; a file that is gone already is no error."""
    shutil.rmtree(root, ignore_errors=True)


def disk_trouble(error: OSError, code: str = "sync.state") -> LibraryUnreachable:
    """Return the error for a disk that takes no more, or, with ``code``, a file that cannot be used: no fault of the library's."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return LibraryUnreachable(
            f"the disk is full{where}; what was received is kept, the model in use stays",
            hint="free some disk space; the update goes on by itself where it stopped",
            code="sync.disk_full",
        )
    return LibraryUnreachable(
        f"a file of the sync agent cannot be read or written{where}: {error.strerror or error}; the model in use stays",
        hint="check that the disk is healthy and that the agent's account owns state_dir and exchange_dir",
        code=code,
    )
