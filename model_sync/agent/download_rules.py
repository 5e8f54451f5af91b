"""The rules that stop a download between two chunks: a stop of the agent, a waiting USB import, a download window."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from model_sync.agent import process_lock
from model_sync.errors import Action, LibraryUnreachable
from model_sync.settings import SyncSettings


@dataclass
class DownloadRules:
    """Checks whether a download may continue; the fetcher asks before each chunk and during pauses.

    Attributes:
        settings: the agent's settings.
        check_stop: raises LibraryUnreachable when the agent was asked to stop.
        local_now: the wall clock in local time.
    """

    settings: SyncSettings
    check_stop: Callable[[], None]
    local_now: Callable[[], datetime]
    _is_in_bundle: bool = field(default=False, init=False)

    @contextlib.contextmanager
    def bundle(self) -> Iterator[None]:
        """Apply the download window within the block."""
        self._is_in_bundle = True
        try:
            self.check()
            yield
        finally:
            self._is_in_bundle = False

    def check(self) -> None:
        """Return normally if the download may continue.

        Raises:
            LibraryUnreachable: ``sync.stopped`` or ``sync.window``; the received part is kept.
        """
        self.check_stop()
        if process_lock.is_requested(self.settings.state_dir):
            raise LibraryUnreachable("a USB import interrupts the download", code="sync.stopped", action=Action.WAIT)
        if self._is_in_bundle and not self.settings.in_window(self.local_now()):
            raise LibraryUnreachable(
                f"bundles are fetched only at {', '.join(self.settings.windows)}", code="sync.window", action=Action.WAIT
            )
