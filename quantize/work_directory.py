"""The work directory of a run: each finished step is stored under the digest of its inputs, so that an interrupted run can resume.

A step writes into its own directory, which is renamed to its final name only when complete. When the inputs of a step change, its name
changes, and the step runs again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from typing_extensions import Self

from quantize.errors import QuantizeError
from quantize.messages import Code

_PATIENCE_S: Final = 3.0


@functools.cache
def _code() -> str:
    """Return a digest of the quantizer's source code: part of every step's name, because another version computes other results."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class WorkDirectory:
    """The finished steps of a run, in ``directory`` (created if absent); one process at a time, until ``close``.

    Raises:
        QuantizeError: ``work.busy``: another run is making this bundle.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reused: list[str] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(directory)
        for unfinished in directory.glob("*.part"):
            shutil.rmtree(unfinished)

    def step(self, name: str, inputs: Any, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        """Run a step, unless its result is stored already.

        Args:
            name: what it is, as a file name.
            inputs: everything it depends on, JSON types; digests stand for files.
            make: runs the step in the given directory; returns a value to store, JSON types only.

        Returns:
            The step's directory and the stored value. When ``make`` raises, the error is passed on and nothing is stored.
        """
        key = hashlib.sha256(json.dumps([_code(), name, inputs], sort_keys=True).encode()).hexdigest()[:16]
        final = self.directory / f"{name}-{key}"
        if final.is_dir():
            self.reused.append(name)
            return final, json.loads((final / "step.json").read_text(encoding="utf-8"))
        part = final.with_name(final.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            stored = make(part)
            (part / "step.json").write_text(json.dumps(stored), encoding="utf-8")
            for path in part.iterdir():
                _sync(path)
            part.rename(final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return final, json.loads(json.dumps(stored))

    def remove(self) -> None:
        """Remove all stored steps, after the bundle was written."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Release the lock, so that another run can start."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locked(directory: Path) -> int:
    """Lock a directory; the kernel drops the lock when the process ends, however it ends.

    A child process of a killed run holds the lock until it executes its program, so wait a few seconds before refusing.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    limit = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError as error:
            if time.monotonic() > limit:
                os.close(descriptor)
                raise QuantizeError(f"another run works in {directory}", code=Code.WORK_BUSY) from error
        time.sleep(0.1)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
