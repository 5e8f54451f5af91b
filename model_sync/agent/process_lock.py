"""One agent per state directory, by a lock that the kernel releases when its holder dies.

A technician with a USB stick must not wait half an hour for a pull that retries a broken link: the waiting process takes a second
lock, and the holder, which checks it between two chunks and during its pauses, stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from model_sync import atomic_files
from model_sync.errors import Action, LibraryUnreachable

LOCK_FILE = "lock"
REQUEST_FILE = "wanted"
_TRIES, _PAUSE_S = 3, 0.05  # `holder_pid` of another process takes the lock for a moment


@contextlib.contextmanager
def hold(state_dir: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the state directory; with ``wait_s`` ask its holder to stop, and wait up to so many seconds.

    Raises:
        LibraryUnreachable: ``sync.busy``: another process holds it; ``sync.state`` or ``sync.disk_full``: it cannot be written.
    """
    file = state_dir / LOCK_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise atomic_files.disk_error(error) from error
    try:
        is_held = any(_try_lock(descriptor, fcntl.LOCK_EX) for _ in range(_TRIES))
        if not is_held and wait_s:
            with _request(state_dir):
                is_held = any(_try_lock(descriptor, fcntl.LOCK_EX) for _ in range(int(wait_s / _PAUSE_S)))
        if not is_held:
            raise LibraryUnreachable(
                f"another model-sync (process {_read_pid(file)}) uses {state_dir}", code="sync.busy", action=Action.WAIT
            )
        with contextlib.suppress(OSError):  # on a full disk the process id is missing; the lock is still held
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder_pid(state_dir: Path) -> str | None:
    """Return the process id of the agent that holds the directory, or None."""
    file = state_dir / LOCK_FILE
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else _read_pid(file)
    finally:
        os.close(descriptor)


def is_requested(state_dir: Path) -> bool:
    """Return whether a living process waits for the directory."""
    try:
        descriptor = os.open(state_dir / REQUEST_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _request(state_dir: Path) -> Iterator[None]:
    try:
        descriptor = os.open(state_dir / REQUEST_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise atomic_files.disk_error(error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # a second waiting process waits for the first
        yield
    finally:
        (state_dir / REQUEST_FILE).unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_PAUSE_S)
        return False
    return True


def _read_pid(file: Path) -> str:
    try:
        return file.read_text("ascii").strip() or "unknown"
    except (OSError, ValueError):
        return "unknown"
