"""One agent per state directory, by a lock that the kernel lets go of when its holder dies.

A technician with a stick does not wait half an hour for a pull that tries a dead line again and again: who may wait says so by a
second lock, and the holder, who looks at it between two pieces and during its pauses, makes way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from model_sync import atomic_files
from model_sync.errors import LibraryUnreachable

LOCK_FILE = "lock"
WANTED_FILE = "wanted"
_TRIES, _PAUSE_S = 3, 0.05  # somebody may be asking just now who holds the lock


@contextlib.contextmanager
def hold(state_dir: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the state directory; with ``wait_s`` ask whoever holds it to make way, and wait so long.

    Raises:
        LibraryUnreachable: ``sync.busy``: another process holds it; ``sync.state`` or ``sync.disk_full``: it cannot be written.
    """
    file = state_dir / LOCK_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise atomic_files.disk_trouble(error) from error
    try:
        taken = any(_taken(descriptor, fcntl.LOCK_EX) for _ in range(_TRIES))
        if not taken and wait_s:
            with _asking(state_dir):
                taken = any(_taken(descriptor, fcntl.LOCK_EX) for _ in range(int(wait_s / _PAUSE_S)))
        if not taken:
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


def wanted(state_dir: Path) -> bool:
    """Say whether somebody waits for the directory; whoever died waiting does not count."""
    try:
        descriptor = os.open(state_dir / WANTED_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _taken(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _asking(state_dir: Path) -> Iterator[None]:
    try:
        descriptor = os.open(state_dir / WANTED_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise atomic_files.disk_trouble(error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # a second one that asks waits for the first
        yield
    finally:
        (state_dir / WANTED_FILE).unlink(missing_ok=True)
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
