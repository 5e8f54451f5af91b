"""A runtime on another machine. Calls have a time limit, and every new connection is verified again.

What answers instead when it fails is decided by :class:`appliance.inference.model_session.ModelSession`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from appliance.core.errors import InferenceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from appliance.runtime import Runtime

# Names of the runtimes that send the tensor to another machine.
REMOTE_RUNTIMES: Final = ("triton",)
# The limit for one answer is ANSWER_FACTOR times the duration of a warm inference, and at least MIN_ANSWER_S. A server that lost its
# power, or whose cable was cut, sends nothing at all, and a scan must not wait for the runtime's own limit of half a minute.
MIN_ANSWER_S: Final = 2.0
_ANSWER_FACTOR: Final = 10.0

T = TypeVar("T")
_Task: TypeAlias = "tuple[Callable[[], Any], Future[Any]]"


@dataclass(frozen=True)
class _Connection:
    runtime: Runtime
    answer_limit_s: float


class RemoteRuntime:
    """Opens, uses and closes one runtime in a thread of its own (a client's sockets belong to the thread that made them).

    It is connected, connecting or disconnected, and the constructor starts connecting. A connection that failed is never used again:
    :meth:`connect` opens a new one, and only a new one verifies what the server runs.

    Args:
        open_runtime: opens the runtime and verifies its answers; raises InferenceError. Called in the thread.
    """

    def __init__(self, open_runtime: Callable[[], Runtime]) -> None:
        self._open_runtime = open_runtime
        self._thread = _TaskThread()
        self._connection: Future[_Connection] | None = None
        self.connect()

    @property
    def has_connection(self) -> bool:
        """Whether a connection is being opened or is open."""
        return self._connection is not None

    def connect(self) -> None:
        """Start to open a connection; does not wait."""
        self._connection = self._thread.submit(partial(_open, self._open_runtime))

    def wait_connected(self, timeout_s: float | None) -> bool:
        """Wait until the connection is open; None waits without a limit.

        Returns:
            False after the timeout; the attempt continues.

        Raises:
            InferenceError: the attempt failed. Whatever else ``open_runtime`` raised is raised as well.
        """
        connection = self._connection
        assert connection is not None
        wait([connection], timeout_s)
        if not connection.done():
            return False
        if connection.exception() is not None:
            self._connection = None
        connection.result()
        return True

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Run the model; raises InferenceError, ``runtime.deadline`` when no answer comes within the limit."""
        if self._connection is None:
            raise InferenceError("job.error", "the runtime is closed")
        connection = self._connection.result()
        answer = self._thread.submit(partial(connection.runtime.infer, inputs))
        wait([answer], connection.answer_limit_s)
        if not answer.done():
            raise InferenceError("runtime.deadline", f"no answer in {connection.answer_limit_s:.1f} s")
        return answer.result()

    def describe(self) -> dict[str, Any]:
        """Describe the runtime, see ``Runtime.describe``; empty while disconnected."""
        return self._connection.result().runtime.describe() if self._connection is not None else {}

    def disconnect(self, timeout_s: float | None = 0.0) -> None:
        """Close the connection, or the one that is being opened, in the thread; wait for that at most ``timeout_s`` (None: no limit)."""
        connection, self._connection = self._connection, None
        if connection is not None:
            wait([self._thread.submit(partial(_close, connection))], timeout_s)


def _open(open_runtime: Callable[[], Runtime]) -> _Connection:
    runtime = open_runtime()
    started = time.monotonic()
    try:
        runtime.warm_up()  # measured the second time: the first inference is slower than all others
    except BaseException:
        runtime.close()  # else the server keeps the model in memory
        raise
    return _Connection(runtime, max(MIN_ANSWER_S, _ANSWER_FACTOR * (time.monotonic() - started)))


def _close(connection: Future[_Connection]) -> None:
    if connection.exception() is None:  # the same thread opened it, so it is done
        connection.result().runtime.close()


class _TaskThread:
    """A daemon thread that runs tasks one after the other. ``ThreadPoolExecutor`` would let a server that hangs block the exit.

    The thread ends when this object is garbage-collected.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        threading.Thread(target=_run_tasks, args=(self._tasks,), daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Queue a function; its result or exception is set in the future."""
        future: Future[T] = Future()
        self._tasks.put((function, future))
        return future

    def __del__(self) -> None:
        """End the thread after the tasks that are queued."""
        self._tasks.put(None)


def _run_tasks(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        function, future = task
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - raised again where the result is read
            future.set_exception(error)
        del task, function, future  # hold no tensor while waiting for the next task
