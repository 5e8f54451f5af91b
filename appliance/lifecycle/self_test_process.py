"""The self-test of a model as a child process; it reports as JSON lines, see :mod:`appliance.lifecycle.self_test_child`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.core.child_process import Child, printable_text
from appliance.core.errors import ActivationError
from appliance.core.self_test_report import SelfTestReport
from appliance.core.states import ActivationState

if TYPE_CHECKING:
    from appliance.core.settings import Settings

logger = logging.getLogger(__name__)

_DETAIL_CHARS: Final = 500


def self_test_command(
    settings: Settings, origin: Path | str, digest: str, precision: str | None, keep: Sequence[str], active: str | None = None
) -> list[str]:
    """Build the arguments of ``python -m`` for a self-test on this box, see ``appliance self-test --help``.

    A ``precision`` of None measures all variants, or takes the most exact one. ``active`` is the stored report of the active version of the
    model line: what runs it is preferred where the times do not tell candidates apart.
    """
    command = [
        "appliance", "self-test", "--data-dir", str(settings.data_dir), "--origin", str(origin), "--digest", digest,
        "--threads", str(settings.worker_threads), "--memory-bytes", str(settings.process_memory_max_bytes),
        "--reserve-bytes", str(settings.disk_reserve_bytes), "--parent", str(os.getpid()), "--keep", ",".join(keep),
        "--deadline-s", str(settings.activation_deadline_s), "--measuring-s", str(settings.tune_measuring_s),
        "--idle-wait-s", str(settings.tune_idle_wait_s),
    ]  # fmt: skip
    command += ["--tune"] if settings.tune_at_activation else []
    choice = SelfTestReport.from_json(active).choice or {}
    if choice.get("runtime") and choice.get("precision"):
        command += ["--established", f"{choice['runtime']}:{choice['precision']}"]
    command += ["--triton-url", settings.triton_url] if settings.triton_url else []
    return [*command, "--precision", precision] if precision else command


class SelfTestProcess(Child):
    """``appliance self-test`` as a child process.

    Args:
        command: from :func:`self_test_command`.
        deadline_s: how long the self-test may take.

    Raises:
        OSError: the process could not be started.
    """

    def __init__(self, command: Sequence[str], deadline_s: float) -> None:
        super().__init__(command, deadline_s)
        self._deadline_s = deadline_s
        self._unhandled: list[dict[str, Any]] = []
        self._has_ended = False
        self._phase = ActivationState.STAGED

    def poll(self, on_progress: Callable[[ActivationState, float], None]) -> SelfTestReport | None:
        """Handle what the process reported since the last call; never waits.

        A message is dropped only after it was handled: when ``on_progress`` raises, the next call delivers the message again.

        Returns:
            The report once the self-test was passed (again at every later call); else None.

        Raises:
            ActivationError: the self-test failed, or exceeded its deadline (``activation.deadline``).
        """
        self._receive()
        while self._unhandled:
            message = self._unhandled[0]
            if "failed" in message:
                raise ActivationError(message["failed"]["code"], printable_text(message["failed"]["detail"], _DETAIL_CHARS))
            if "result" in message:
                return SelfTestReport.from_json(message["result"])
            self._phase = ActivationState(message["state"])
            on_progress(self._phase, float(message["progress"]))
            self._unhandled.pop(0)
        if not self._has_ended and self.late():
            raise ActivationError("activation.deadline", f"more than {self._deadline_s:.0f} s in {self._phase.value}")
        return None

    @property
    def has_crashed(self) -> bool:
        """Whether the process ended without reporting a result."""
        return self._has_ended and not self._unhandled

    def _receive(self) -> None:
        """Parse the complete lines of the output; a line that is no JSON object ends the process."""
        self._has_ended = self.listen()
        *lines, self.output = self.output.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                logger.error("invalid message from the self-test", extra={"exit_code": self.exit_code})
                self.end()
                self._has_ended = True
                return
            self._unhandled.append(message)
