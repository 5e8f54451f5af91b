"""Reaching again for a runtime that is not on this box and did not answer; see :mod:`appliance.away`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from appliance.errors import ApplianceError
from appliance.loaded import Loaded

logger = logging.getLogger(__name__)

RETRY_S: Final = 60.0
# What is away for so many tries is away for long: what this box has of its own is measured then.
_PATIENCE: Final = 60


class Comeback:
    """Reaches again for what does not answer: one model at a time, in a thread, so that no scan waits for it.

    Args:
        give_up: given the digest of a model whose runtime has been away for an hour.
        clock: seconds that only rise.
    """

    def __init__(self, give_up: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._give_up, self._clock = give_up, clock
        self._trying: Loaded | None = None
        self._thread: threading.Thread | None = None
        self._reached = False
        self._next: dict[str, float] = {}
        self._tries: dict[str, int] = {}

    def look(self, models: Mapping[str, Loaded]) -> None:
        """Between two jobs: go on without waiting for anything.

        Args:
            models: those that read, by digest.
        """
        if self._thread is not None:
            if not self._thread.is_alive():
                self._end(models)
            return
        now = self._clock()
        for digest, model in models.items():
            if model.away is None or model.fallback is None:
                self._next.pop(digest, None)
                self._tries.pop(digest, None)
            elif now >= self._next.setdefault(digest, now + RETRY_S):
                self._begin(model)
                return

    def _begin(self, model: Loaded) -> None:
        self._trying, self._reached = model, False
        self._thread = threading.Thread(target=self._reach, args=(model,), daemon=True)
        self._thread.start()

    def _reach(self, model: Loaded) -> None:
        assert model.away is not None
        try:
            model.away.reach()
        except (ApplianceError, OSError, MemoryError) as error:
            logger.info("still away", extra={"code": getattr(error, "code", type(error).__name__)})
        else:
            self._reached = True

    def _end(self, models: Mapping[str, Loaded]) -> None:
        model, self._trying, self._thread = self._trying, None, None
        assert model is not None
        if models.get(model.digest) is not model:  # another took its place meanwhile
            model.runtime.close()
        elif self._reached:
            model.come_back()
        else:
            self._next[model.digest] = self._clock() + RETRY_S
            self._tries[model.digest] = self._tries.get(model.digest, 0) + 1
            if self._tries[model.digest] == _PATIENCE:
                self._give_up(model.digest)
