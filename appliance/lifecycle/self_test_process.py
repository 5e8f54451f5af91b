"""The self-test of a model as the worker sees it: a child process that reports its progress as JSON lines."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.core.child_process import Child

if TYPE_CHECKING:
    from appliance.core.settings import Settings

logger = logging.getLogger(__name__)


def order(settings: Settings, origin: Path | str, digest: str, precision: str | None, keep: Sequence[str]) -> list[str]:
    """The arguments of a proof on this box.

    Args:
        settings: the box's.
        origin: the bundle's directory.
        digest: which model it has to be.
        precision: the variant asked for by hand; None lets the measuring choose, or takes the most exact.
        keep: digests whose copies stay.
    """
    line = [
        "appliance", "prove", "--data-dir", str(settings.data_dir), "--origin", str(origin), "--digest", digest,
        "--threads", str(settings.worker_threads), "--memory-bytes", str(settings.process_memory_max_bytes),
        "--reserve-bytes", str(settings.disk_reserve_bytes), "--parent", str(os.getpid()), "--keep", ",".join(keep),
        "--deadline-s", str(settings.activation_deadline_s), "--measuring-s", str(settings.tune_measuring_s),
    ]  # fmt: skip
    line += ["--tune"] if settings.tune_at_activation else []
    line += ["--triton-url", settings.triton_url] if settings.triton_url else []
    return [*line, "--precision", precision] if precision else line


class Proof(Child):
    """``appliance prove`` as a child; :meth:`messages` gives what it says."""

    def messages(self) -> tuple[list[dict[str, Any]], bool]:
        """What it has said since, and whether it has ended; a line that is none of its own ends it."""
        ended = self.listen()
        *lines, self.output = self.output.split(b"\n")
        said: list[dict[str, Any]] = []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                logger.error("the proof speaks nonsense", extra={"exit_code": self.exit_code})
                self.end()
                return said, True
            said.append(message)
        return said, ended
