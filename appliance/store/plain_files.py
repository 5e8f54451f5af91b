"""Replacing a plain file of an older appliance by its encrypted copy, and destroying its bytes as far as the file system allows."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from model_sync import atomic_files

SUFFIX: Final = ".plain"
_CHUNK_BYTES: Final = 1 << 20


def replace(path: Path, encrypted: Path) -> None:
    """Put a complete encrypted file, on the same file system, in the place of a plain one, and destroy the plain one.

    A crash at any point leaves one of the two in the place, and perhaps a second name of the plain one for :func:`finish`.
    """
    atomic_files.sync_file(encrypted)
    keep(path)
    atomic_files.move(encrypted, path)
    finish(path)


def keep(path: Path) -> None:
    """Give a plain file a second name, so that :func:`finish` destroys its bytes once the first name is gone or replaced."""
    os.link(path, path.with_name(path.name + SUFFIX))


def finish(path: Path) -> None:
    """Destroy the bytes of a plain file that :func:`keep` gave a second name, where the first one is gone or replaced."""
    old = path.with_name(path.name + SUFFIX)
    if not old.exists():
        return
    if path.exists() and path.samefile(old):  # a second name: the file was not replaced yet
        old.unlink()
    else:
        destroy(old)


def destroy(path: Path) -> None:
    """Overwrite a file with random bytes, then delete it; a file system that copies on write keeps the old ones."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        for start in range(0, size, _CHUNK_BYTES):
            file.write(secrets.token_bytes(min(_CHUNK_BYTES, size - start)))
        atomic_files.flush(file)
    path.unlink()
    atomic_files.sync_directory(path.parent)
