"""A runtime that is not on this box: when it cannot answer, the plain way on this box does, at once.

A hub that is down, or a line that is cut, is no fault of a scan's nor of the model's: no attempt is lost and no version is blamed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from appliance.core.errors import InferenceError
from appliance.runtime.batch_split import run_in_pieces

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from appliance.runtime import Runtime

logger = logging.getLogger(__name__)

# Runtimes that send what they read to another machine.
ELSEWHERE: Final = ("triton",)
# A worker that starts waits so long for it before the plain way begins: a small box needs up to two seconds itself, to load the client and
# to ask a hub that is well for the golden cases.
START_S: Final = 3.0
# An answer that takes longer than this, and longer than this many times what it took when it was reached, does not come: a machine that
# lost its power or a line that was cut says nothing at all, and a scan must not wait for a runtime's own limit.
LEAST_S: Final = 2.0
_TIMES: Final = 10.0

T = TypeVar("T")
_Question: TypeAlias = "tuple[Callable[[], Any], Future[Any]]"


class Away:
    """A runtime elsewhere with the plain way behind it; an :class:`appliance.runtime.Runtime` itself.

    Args:
        reach: opens the runtime elsewhere; raises InferenceError. Called in a thread.
        local: opens the plain way; raises InferenceError where that must not take over.
        told: given why, when the plain way has taken over.

    Attributes:
        name, version, precision, provider: of what answers now.
        turns: how often something else has come to answer.
        lost: why nothing answers any more: what is elsewhere does not, and the plain way must not; None while something does.
    """

    name: str
    version: str
    precision: str
    provider: str

    def __init__(self, reach: Callable[[], Runtime], local: Callable[[], Runtime], told: Callable[[InferenceError], None]) -> None:
        self._reach, self._local, self._told = reach, local, told
        self._line = _Line()
        self._reaching: Future[tuple[Runtime, float]] | None = None
        self._there: Runtime | None = None
        self._limit_s = LEAST_S
        self._here: Runtime | None = None
        self.turns = 0
        self.lost: InferenceError | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether the next question goes to what is elsewhere, whoever may answer it in the end."""
        return self._here is None

    @property
    def reaching(self) -> bool:
        """Whether it is being opened, or has been and nobody asked yet what came of that."""
        return self._reaching is not None

    def reach(self) -> None:
        """Begin to open it anew, beside whatever answers meanwhile; see :meth:`reached`."""
        before, self._there = self._there, None
        self._reaching = self._line.ask(partial(_open, self._reach, before))

    def reached(self, wait_s: float | None = 0.0) -> bool:
        """Whether what :meth:`reach` began has come to its end, from when on it answers; raises what went wrong, such as InferenceError.

        Args:
            wait_s: how long to wait for that; None: as long as it takes.
        """
        reaching = self._reaching
        assert reaching is not None
        wait([reaching], wait_s)
        if not reaching.done():
            return False
        self._reaching = None
        self._there, self._limit_s = reaching.result()
        here, self._here = self._here, None
        self.lost = None
        if here is not None:
            here.close()
        self._show(self._there)
        return True

    def fall(self, error: InferenceError) -> None:
        """The plain way answers from now on; raises InferenceError where it must not, and nothing changes."""
        self._take_over(self._local(), error)

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model where it runs now, and here when that fails; see ``Runtime.infer``."""
        if self.lost is not None:
            raise InferenceError(self.lost.code, self.lost.detail)
        if self._here is not None:
            return _one_by_one(self._here, inputs)
        if self._there is None:
            raise InferenceError("job.error", "the runtime is closed")
        try:
            return self._asked(self._there, inputs)
        except InferenceError as error:
            return self._instead(inputs, error)

    def _asked(self, there: Runtime, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Its answer; raises InferenceError ``runtime.deadline`` when none comes."""
        answer = self._line.ask(partial(there.infer, inputs))
        wait([answer], self._limit_s)
        if not answer.done():
            raise InferenceError("runtime.deadline", f"no answer in {self._limit_s:.1f} s")
        return answer.result()

    def _instead(self, inputs: dict[str, NDArray[np.float32]], error: InferenceError) -> dict[str, NDArray[np.float32]]:
        """Read here. Where that fails as well, whose fault it was is told by what went wrong there."""
        logger.warning("what runs the model elsewhere does not answer", extra={"code": error.code})
        try:
            local = self._local()
        except InferenceError:
            if error.code.startswith("runtime."):  # else it may be the fault of this scan
                self.lost = error
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
        self.turns += 1
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
        """Free both: what is there, or being opened, by the thread that asks it; that is waited for only if it answered until now."""
        here, there, reaching = self._here, self._there, self._reaching
        self._here = self._there = self._reaching = None
        if here is not None:
            here.close()
        closed = self._line.ask(partial(_close, there, reaching))
        if here is None and reaching is None and self.lost is None:
            wait([closed], self._limit_s)


def _open(reach: Callable[[], Runtime], before: Runtime | None) -> tuple[Runtime, float]:
    """Open what is elsewhere in place of the one before; returns it, and how long an answer of it may take (seconds)."""
    if before is not None:
        before.close()
    there = reach()
    started = time.monotonic()
    try:
        there.warm_up()  # once more: the first time is slower than all others
    except BaseException:
        there.close()  # else the model stays there for ever
        raise
    return there, max(LEAST_S, _TIMES * (time.monotonic() - started))


def _close(there: Runtime | None, reaching: Future[tuple[Runtime, float]] | None) -> None:
    if reaching is not None and reaching.exception() is None:  # the same thread opened it, before it came to this
        there = reaching.result()[0]
    if there is not None:
        there.close()


class _Line:
    """Does what it is asked, one after the other, in a thread of its own, so that whoever waits can give up.

    The thread ends with what it belongs to; a process that ends does not wait for it.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        threading.Thread(target=_answer, args=(self._asked,), daemon=True).start()

    def ask(self, what: Callable[[], T]) -> Future[T]:
        """What comes of it, in the future."""
        answer: Future[T] = Future()
        self._asked.put((what, answer))
        return answer

    def __del__(self) -> None:
        """Nobody asks any more."""
        self._asked.put(None)


def _answer(asked: queue.SimpleQueue[_Question | None]) -> None:
    while (question := asked.get()) is not None:
        what, answer = question
        try:
            answer.set_result(what())
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            answer.set_exception(error)
        del question, what, answer  # nothing of the last question is held until the next


def _one_by_one(runtime: Runtime, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The plain way reads one image at a time, however many the other took together."""
    ((name, value),) = inputs.items()
    return run_in_pieces(value, 1, True, lambda piece: runtime.infer({name: piece}))
