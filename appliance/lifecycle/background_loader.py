"""Loading a model beside those that read: in a thread, so that no scan of another model waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from appliance.core.errors import ActivationError, ApplianceError

if TYPE_CHECKING:
    from appliance.tuning.selection import Plan
    from model_sync.bundle import Manifest

LOAD_DEADLINE_S: Final = 120.0
AGAIN_S: Final = 60.0


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


class Beside:
    """Models that are run elsewhere, each loaded in a thread of its own: a hub that hangs holds no scan of the others.

    Args:
        clock: seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loading: dict[str, Loading] = {}
        self._failed: dict[str, tuple[ActivationError, float]] = {}

    @property
    def loading(self) -> set[str]:
        """Digests of those that are being loaded: their jobs wait."""
        return set(self._loading)

    def begin(self, load: Load, digest: str, plan: Plan) -> None:
        """Load one, unless that goes on already."""
        if digest not in self._loading:
            self._failed.pop(digest, None)
            self._loading[digest] = Loading(load, digest, plan)

    def why_not(self, digest: str) -> ActivationError | None:
        """Why one could not be loaded, until it is tried again."""
        return self._failed[digest][0] if digest in self._failed else None

    def come(self) -> Iterator[tuple[str, Ready | ActivationError]]:
        """What has come of them since the last time: each model, or why there is none."""
        for digest in [digest for digest, loading in self._loading.items() if loading.done()]:
            try:
                yield digest, self._loading.pop(digest).take()
            except ActivationError as error:
                self._failed[digest] = (error, self._clock() + AGAIN_S)
                yield digest, error

    def due(self) -> set[str]:
        """Which of those that could not be loaded are to be tried again now."""
        now = self._clock()
        return {digest for digest, (_, then) in self._failed.items() if now >= then}

    def forget(self, digest: str) -> None:
        """It reads another way by now, or not any more."""
        self._failed.pop(digest, None)
