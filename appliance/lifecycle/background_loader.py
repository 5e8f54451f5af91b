"""Load a model in a background thread, so that no scan of another model waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from appliance.core.errors import ActivationError, ApplianceError

if TYPE_CHECKING:
    from appliance.tuning.selection import Plan
    from model_sync.bundle import Manifest

LOAD_DEADLINE_S: Final = 120.0


class Ready(Protocol):
    """A model that is loaded and can analyse scans."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of its bundle."""
        ...

    @property
    def digest(self) -> str:
        """The digest of its bundle."""
        ...


Load = Callable[[str, "Plan"], Ready]
"""Loads the box's copy of a model (by digest) as planned; called in a thread, so it must not use the database."""


class Loading:
    """The loading of one model in a daemon thread; a thread that exceeds the deadline is abandoned."""

    def __init__(self, load: Load, digest: str, plan: Plan) -> None:
        self._ready: Ready | None = None
        self._error = ActivationError("model.self_test", "it could not be loaded")
        self._limit = time.monotonic() + LOAD_DEADLINE_S
        self._thread = threading.Thread(target=self._run, args=(load, digest, plan), daemon=True)
        self._thread.start()

    def _run(self, load: Load, digest: str, plan: Plan) -> None:
        try:
            self._ready = load(digest, plan)
        except (ApplianceError, OSError) as error:
            self._error = ActivationError(getattr(error, "code", "store.failed"), getattr(error, "detail", str(error)))
        except MemoryError:
            self._error = ActivationError("activation.memory", "while it was loaded")

    def done(self) -> bool:
        """Whether loading has ended: with a model, with an error or at the deadline."""
        return not self._thread.is_alive() or time.monotonic() > self._limit

    def take(self) -> Ready:
        """Return the loaded model; raises ActivationError with the reason when loading failed."""
        if self._thread.is_alive():
            raise ActivationError("activation.deadline", f"loading took more than {LOAD_DEADLINE_S:.0f} s")
        if self._ready is None:
            raise self._error
        return self._ready
