"""Loading a model beside the one that reads: in a thread, so that no scan waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from appliance.errors import ActivationError, ApplianceError

if TYPE_CHECKING:
    from appliance.runtime.choice import Plan
    from model_sync.bundle import Manifest

LOAD_DEADLINE_S: Final = 120.0


class Ready(Protocol):
    """A model that can read."""

    @property
    def manifest(self) -> Manifest:
        """What it is for."""
        ...

    @property
    def digest(self) -> str:
        """Which it is."""
        ...


Load = Callable[[str, "Plan"], Ready]


class Loading:
    """A model that is being loaded in a thread; one that hangs is left behind.

    Args:
        load: loads the box's own copy of a digest as planned; uses no database.
        digest: which model.
        plan: what was chosen to run it.
    """

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
        """Whether it is loaded, or will not be."""
        return not self._thread.is_alive() or time.monotonic() > self._limit

    def take(self) -> Ready:
        """The model; raises ActivationError with why there is none."""
        if self._thread.is_alive():
            raise ActivationError("activation.deadline", f"loading took more than {LOAD_DEADLINE_S:.0f} s")
        if self._ready is None:
            raise self._error
        return self._ready
