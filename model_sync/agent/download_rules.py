"""The rules that stop a download between two chunks: a stop of the agent, a waiting USB import, a download window."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime

from model_sync.agent import process_lock
from model_sync.errors import Action, LibraryUnreachable
from model_sync.settings import SyncSettings


class DownloadRules:
    """Checks whether a download may continue; the fetcher asks before each chunk and during pauses.

    Args:
        settings: the agent's settings.
        check_stop: raises LibraryUnreachable when the agent was asked to stop.
        local_now: the wall clock in local time.
    """

    def __init__(self, settings: SyncSettings, check_stop: Callable[[], None], local_now: Callable[[], datetime]) -> None:
        self._settings = settings
        self._check_stop = check_stop
        self._local_now = local_now
        self._is_in_bundle = False

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
        """Return when the download may continue.

        Raises:
            LibraryUnreachable: ``sync.stopped`` or ``sync.window``; the received part is kept.
        """
        self._check_stop()
        if process_lock.is_requested(self._settings.state_dir):
            raise LibraryUnreachable("a USB import interrupts the download", code="sync.stopped", action=Action.WAIT)
        if self._is_in_bundle and not self._settings.in_window(self._local_now()):
            raise LibraryUnreachable(
                f"bundles are fetched only at {', '.join(self._settings.windows)}", code="sync.window", action=Action.WAIT
            )
