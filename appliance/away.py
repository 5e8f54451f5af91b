"""A runtime that is not on this box: when it cannot answer, the plain way on this box does, at once.

A hub that is down, or a line that is cut, is no fault of a scan's nor of the model's: no attempt is lost and no version is blamed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from appliance.errors import InferenceError
from appliance.runtime.pieces import in_pieces

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from appliance.runtime import Runtime

logger = logging.getLogger(__name__)

# Runtimes that send what they read to another machine.
ELSEWHERE: Final = ("triton",)
# An answer that takes longer than this, and longer than this many times what it took when it was reached, does not come: a machine that
# lost its power or a line that was cut says nothing at all, and a scan must not wait for a runtime's own limit.
LEAST_S: Final = 2.0
_TIMES: Final = 10.0


class Away:
    """A runtime elsewhere with the plain way behind it; an :class:`appliance.runtime.Runtime` itself.

    Args:
        reach: opens the runtime elsewhere; raises InferenceError.
        local: opens the plain way; raises InferenceError where that must not take over.
        told: given why, when the plain way has taken over.

    Attributes:
        name, version, precision, provider: of what answers now.
    """

    name: str
    version: str
    precision: str
    provider: str

    def __init__(self, reach: Callable[[], Runtime], local: Callable[[], Runtime], told: Callable[[InferenceError], None]) -> None:
        self._reach, self._local, self._told = reach, local, told
        self._there: Runtime | None = None
        self._here: Runtime | None = None
        self._line: _Line | None = None

    def reach(self) -> None:
        """Open it, while nothing is asked of it: perhaps in a thread; raises InferenceError. It answers from :meth:`resume` on."""
        before, self._there = self._there, None
        if before is not None:
            self._line = None
            before.close()
        there = self._reach()
        started = time.monotonic()
        there.warm_up()  # once more: the first time is slower than all others
        self._line = _Line(there, max(LEAST_S, _TIMES * (time.monotonic() - started)))
        self._there = there

    def resume(self) -> None:
        """What :meth:`reach` opened answers from now on."""
        assert self._there is not None
        here, self._here = self._here, None
        if here is not None:
            here.close()
        self._show(self._there)

    def fall(self, error: InferenceError) -> None:
        """The plain way answers from now on; raises InferenceError where it must not, and nothing changes."""
        self._take_over(self._local(), error)

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model where it runs now, and here when that fails; see ``Runtime.infer``."""
        if self._here is not None:
            return _one_by_one(self._here, inputs)
        if self._line is None:
            raise InferenceError("job.error", "the runtime is closed")
        try:
            return self._line.infer(inputs)
        except InferenceError as error:
            return self._instead(inputs, error)

    def _instead(self, inputs: dict[str, NDArray[np.float32]], error: InferenceError) -> dict[str, NDArray[np.float32]]:
        """Read here. Where that fails as well, whose fault it was is told by what went wrong there."""
        logger.warning("what runs the model elsewhere does not answer", extra={"code": error.code})
        try:
            local = self._local()
        except InferenceError:
            raise error from None  # it must not take over: the job says what went wrong there
        try:
            outputs = _one_by_one(local, inputs)
        except InferenceError:
            if error.code.startswith("runtime."):
                self._take_over(local, error)
            else:  # neither of them can read this scan
                local.close()
            raise
        self._take_over(local, error)
        return outputs

    def _take_over(self, local: Runtime, error: InferenceError) -> None:
        self._here = local
        self._show(local)
        self._told(error)

    def _show(self, runtime: Runtime) -> None:
        self.name, self.version, self.precision, self.provider = runtime.name, runtime.version, runtime.precision, runtime.provider

    def load(self, *_: Any, **__: Any) -> None:
        """Nothing: :meth:`reach` does it."""

    def warm_up(self) -> None:
        """Nothing: :meth:`reach` does it."""

    def describe(self) -> dict[str, Any]:
        """What answers now; see ``Runtime.describe``."""
        runtime = self._here or self._there
        return runtime.describe() if runtime is not None else {}

    def close(self) -> None:
        """Free both."""
        runtimes = (self._here, self._there)
        self._here = self._there = self._line = None
        for runtime in runtimes:
            if runtime is not None:
                runtime.close()


class _Line:
    """Asks in a thread of its own, so that whoever waits can give up; the thread ends with what it belongs to.

    Args:
        runtime: what is asked.
        limit_s: how long an answer may take.
    """

    def __init__(self, runtime: Runtime, limit_s: float) -> None:
        self._limit_s = limit_s
        self._asked: queue.SimpleQueue[tuple[Any, queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=_answer, args=(runtime, self._asked), daemon=True).start()

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """As ``Runtime.infer``; raises InferenceError ``runtime.deadline`` when no answer comes."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked.put((inputs, answer))
        try:
            outputs = answer.get(timeout=self._limit_s)
        except queue.Empty:
            raise InferenceError("runtime.deadline", f"no answer in {self._limit_s:.1f} s") from None
        if isinstance(outputs, BaseException):
            raise outputs
        return dict(outputs)

    def __del__(self) -> None:
        """Nobody asks any more."""
        self._asked.put(None)


def _answer(runtime: Runtime, asked: queue.SimpleQueue[tuple[Any, queue.SimpleQueue[Any]] | None]) -> None:
    while (question := asked.get()) is not None:
        inputs, answer = question
        try:
            answer.put(runtime.infer(inputs))
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            answer.put(error)


def _one_by_one(runtime: Runtime, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The plain way reads one image at a time, however many the other took together."""
    ((name, value),) = inputs.items()
    return in_pieces(value, 1, True, lambda piece: runtime.infer({name: piece}))
