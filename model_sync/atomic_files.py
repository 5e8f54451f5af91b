"""Atomic writes: a temporary file is written, flushed to the disk, then renamed: a power cut leaves the old content or the new one."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from model_sync.errors import Action, LibraryUnreachable

_SHARED_FILE, _SHARED_DIRECTORY = 0o644, 0o755
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_FILE = (errno.ELOOP, errno.ENXIO)  # a link, a socket
MAX_JSON_BYTES = 4 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class NotRegularFileError(OSError):
    """A path is not the small regular file that is expected: a link, a pipe, a device, a directory, or too large."""


def boot_id() -> str:
    """Return the boot id of the running kernel, or an empty string where there is none."""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""


def write(path: Path, *chunks: bytes, mode: int = _SHARED_FILE) -> None:
    """Replace the content of ``path``; a reader sees the old bytes or the new ones, never a part.

    Args:
        path: the file.
        *chunks: its new content.
        mode: its new permissions.

    Raises:
        OSError: nothing was replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.writelines(chunks)
            flush(stream)
        move(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def move(flushed: Path, target: Path) -> None:
    """Rename a file, whose content is flushed, to its place; after the return it survives a power cut there."""
    os.replace(flushed, target)
    sync_directory(target.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of ``path`` by a JSON document, as :func:`write` does."""
    write(path, (json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode())


def read(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """Return the content of a small regular file that another account may have written; never blocks on a pipe.

    Args:
        path: the file.
        limit: the largest allowed length in bytes.
        follow: whether it may be a symbolic link; never in a directory that another account writes.

    Raises:
        NotRegularFileError: it is a link, a pipe, a device or a directory (``EINVAL``), or larger (``EFBIG``).
        OSError: it is absent or cannot be read.
    """
    # Without O_NONBLOCK opening a pipe waits for its writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise NotRegularFileError(errno.EINVAL, "it is not a regular file", str(path)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularFileError(errno.EINVAL, "it is not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as stream:
            data = stream.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise NotRegularFileError(errno.EFBIG, f"it is larger than {limit} bytes", str(path))
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one when the file is absent, unreadable or damaged."""
    try:
        value = json.loads(read(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def flush(stream: IO[bytes]) -> None:
    """Flush an open file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def create(path: Path, data: bytes, mode: int) -> None:
    """Create a file with its content flushed to the disk.

    Raises:
        FileExistsError: it exists; it was not changed.
        OSError: it cannot be written.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as stream:
        stream.write(data)
        flush(stream)


def sync_file(path: Path) -> None:
    """Flush one file to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Flush the entries of one directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush every file and directory below ``root``, and make them readable by other accounts."""
    for directory, _, files in os.walk(root):
        os.chmod(directory, _SHARED_DIRECTORY)
        for name in files:
            os.chmod(Path(directory, name), _SHARED_FILE)
            sync_file(Path(directory, name))
        sync_directory(Path(directory))


def iterate_files(root: Path) -> Iterator[Path]:
    """Yield every regular file below ``root``; nothing when there is no such directory."""
    for directory, _, files in os.walk(root):
        for name in files:
            if (path := Path(directory, name)).is_file():
                yield path


def remove_tree(root: Path) -> None:
    """Remove a directory tree; errors are ignored."""
    shutil.rmtree(root, ignore_errors=True)


def disk_error(error: OSError, code: str = "sync.state") -> LibraryUnreachable:
    """Return the error for a full disk, or, with ``code``, for a file that cannot be read or written; the library is not at fault."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return LibraryUnreachable(
            f"the disk is full{where}; what was received is kept, the model in use stays", code="sync.disk_full", action=Action.OPERATOR
        )
    return LibraryUnreachable(
        f"a file of the sync agent cannot be read or written{where}: {error.strerror or error}; the model in use stays",
        code=code,
        action=Action.OPERATOR,
    )
