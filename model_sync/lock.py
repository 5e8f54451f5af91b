"""One agent per state directory, by a lock that the kernel lets go of when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from model_sync import durable
from model_sync.errors import LibraryUnreachable

LOCK_FILE = "lock"
_TRIES, _PAUSE_S = 3, 0.05  # somebody may be asking just now who holds the lock


@contextlib.contextmanager
def hold(state_dir: Path) -> Iterator[None]:
    """Hold the state directory.

    Raises:
        LibraryUnreachable: ``sync.busy``: another process holds it; ``sync.state`` or ``sync.disk_full``: it cannot be written.
    """
    file = state_dir / LOCK_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise durable.disk_trouble(error) from error
    try:
        if not any(_taken(descriptor, fcntl.LOCK_EX) for _ in range(_TRIES)):
            raise LibraryUnreachable(
                f"another model-sync (process {_pid(file)}) is at work in {state_dir}",
                hint="wait until it is done; `model-sync status` shows what it does",
                code="sync.busy",
            )
        with contextlib.suppress(OSError):  # on a full disk the holder has no number; the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(state_dir: Path) -> str | None:
    """Return the process id of the agent that holds the directory, or None."""
    file = state_dir / LOCK_FILE
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _taken(descriptor, fcntl.LOCK_SH) else _pid(file)
    finally:
        os.close(descriptor)


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_PAUSE_S)
        return False
    return True


def _pid(file: Path) -> str:
    try:
        return file.read_text("ascii").strip() or "unknown"
    except (OSError, ValueError):
        return "unknown"
