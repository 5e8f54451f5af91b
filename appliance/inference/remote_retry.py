"""Reaching again for a runtime that is not on this box and did not answer; see :mod:`appliance.inference.remote_runtime`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from appliance.core.errors import ApplianceError
from appliance.inference.model_session import Loaded
from appliance.inference.remote_runtime import Away

logger = logging.getLogger(__name__)

RETRY_S: Final = 60.0
# What is away for so many times that is away for long: what this box has of its own is measured then.
_PATIENCE: Final = 60


class Comeback:
    """Reaches again for what does not answer, one model at a time, beside the reading: no scan waits for it.

    Args:
        give_up: given the digest of a model whose runtime has been away for an hour.
        clock: seconds that only rise.
    """

    def __init__(self, give_up: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._give_up, self._clock = give_up, clock
        self._next: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def look(self, models: Mapping[str, Loaded]) -> None:
        """Between two jobs: go on without waiting for anything.

        Args:
            models: those that read, by digest.
        """
        now = self._clock()
        for digest, model in models.items():
            if model.away is None or model.fallback is None:
                self._next.pop(digest, None)
                self._since.pop(digest, None)
                continue
            self._next.setdefault(digest, now + RETRY_S)
            if now - self._since.setdefault(digest, now) >= _PATIENCE * RETRY_S:
                self._since[digest] = now
                self._give_up(digest)
            if model.away.reaching:
                self._listen(model, model.away)
            elif now >= self._next[digest] and not any(other.away and other.away.reaching for other in models.values()):
                model.away.reach()

    def _listen(self, model: Loaded, away: Away) -> None:
        try:
            if away.reached():
                model.come_back()
        except (ApplianceError, OSError, MemoryError) as error:
            logger.info("still away", extra={"code": getattr(error, "code", type(error).__name__)})
            self._next[model.digest] = self._clock() + RETRY_S
