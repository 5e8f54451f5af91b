"""Disk space that is reserved for the audit: logins and refusals are recorded on a full disk too (requirement R11).

A preallocated file beside the database is shortened when the disk is full, and filled up again when there is room. Whatever
else is to be written then fails, because its audit entry shares its transaction.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

RESERVE_NAME: Final = "audit.reserve"
RESERVE_BYTES: Final = 16 << 20
# What one entry needs at most, with the pages of the journal; freed in steps, since another program may take what is free.
_STEP_BYTES: Final = 512 << 10


def fill(data_dir: Path) -> None:
    """Allocate the reserve where the disk has room for it twice over; a box on a full disk starts without it."""
    path = data_dir / RESERVE_NAME
    with suppress(OSError):  # a full disk, or a file system that cannot allocate: there is nothing to give back then
        size = path.stat().st_size if path.exists() else 0
        if size >= RESERVE_BYTES or shutil.disk_usage(data_dir).free < 2 * RESERVE_BYTES:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
        finally:
            os.close(descriptor)


def make_room(data_dir: Path) -> int:
    """Shorten the reserve by one step where the disk is full; returns the bytes that were freed."""
    if shutil.disk_usage(data_dir).free >= _STEP_BYTES:
        return 0
    path = data_dir / RESERVE_NAME
    try:
        size = path.stat().st_size
        os.truncate(path, max(0, size - _STEP_BYTES))
    except OSError:  # nothing is reserved: the entry fails where there is no room, and with it what it is about
        return 0
    return min(size, _STEP_BYTES)
