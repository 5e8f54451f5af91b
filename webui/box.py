"""What every page of one web process shares: the store and its reading side, accounts, uploads, the live feed."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from flask import current_app

from appliance.core.settings import Settings
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from webui.doorkeeper import Doorkeeper
from webui.finalise import Finaliser
from webui.parts import Parts

if TYPE_CHECKING:
    from webui.events import Feed
    from webui.images import ImageCache

_MAX_REMEMBERED_LOOKS: Final = 10_000
# A page that stays open and refreshes itself is another look after so long.
LOOK_AGAIN_S: Final = 600.0


@dataclass
class Box:
    """The shared parts, made once by ``create_app``."""

    settings: Settings
    store: Store
    worklist: Worklist
    accounts: Doorkeeper
    parts: Parts
    finaliser: Finaliser
    feed: Feed
    images: ImageCache
    looked_at: LookedAt = field(default_factory=lambda: LookedAt())
    senders: threading.Semaphore = field(init=False)
    waiters: threading.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        """Bound how many threads may hold still at once: for bodies on slow lines, and for outcomes that are being found out."""
        self.senders = threading.BoundedSemaphore(max(1, self.settings.web_threads // 2))
        self.waiters = threading.BoundedSemaphore(max(1, self.settings.web_threads // 4))

    def stop(self) -> None:
        """End what runs beside the requests; whatever is unfinished stands on the disk and goes on at the next start."""
        self.feed.stop()
        self.finaliser.stop()


class LookedAt:
    """Who looked at which study lately, so that one look is one audit entry and not one per picture and refresh it loads."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], float] = {}
        self._lock = threading.Lock()

    def first(self, person: int, study_id: int) -> bool:
        """Whether this account has not looked at the study for ``LOOK_AGAIN_S``; remembers a look that is told so."""
        key, now = (person, study_id), time.monotonic()
        with self._lock:
            known = now - self._seen.get(key, -LOOK_AGAIN_S) < LOOK_AGAIN_S
            if not known:
                self._seen.pop(key, None)
                self._seen[key] = now
                if len(self._seen) > _MAX_REMEMBERED_LOOKS:
                    del self._seen[next(iter(self._seen))]
        return not known


def the_box() -> Box:
    """The box of the application that serves this request."""
    box: Box = current_app.extensions["box"]
    return box
