"""The child's side of :class:`appliance.core.limited_process.LimitedProcess`: it answers one request after the other.

It dies with its parent, has a memory limit, is the first process that the kernel kills when memory is short, and writes no core file
(which could contain a patient's image). Its arguments: the pipes that it reads and writes, the process to die with, the memory limit,
and the shared memory if there is any.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.core.child_protocol import Message, ProtocolError, pack, receive
from appliance.core.process import die_with_parent, limit_memory
from appliance.core.shared_memory import SharedMemory

_MOST_KILLABLE: Final = "1000"


class Channel:
    """The pipes to the parent.

    Args:
        requests: file descriptor to read requests from.
        responses: file descriptor to write responses to.
        shared: memory by which arrays are exchanged; None: through the pipes.
    """

    def __init__(self, requests: int, responses: int, shared: SharedMemory | None = None) -> None:
        self._requests, self._responses, self._shared = requests, responses, shared

    def wait(self, seconds: float) -> bool:
        """Wait for the next request; returns whether one has come, or the pipe is closed."""
        return bool(select.select([self._requests], [], [], seconds)[0])

    def receive(self) -> Message:
        """Read the next request; raises EOFError, OSError or ProtocolError when the pipe is closed or broken."""
        return receive(self._fill, self._shared.take if self._shared else None)

    def send(self, message: Message) -> None:
        """Write a response; raises OSError when the pipe is broken, ProtocolError when it is too large."""
        head, *payload = pack(message.header, message.arrays)
        if self._shared is not None:
            self._shared.write(payload)
            payload = []
        for buffer in (head, *payload):
            rest = buffer
            while rest:
                rest = rest[os.write(self._responses, rest) :]

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            got = os.readv(self._requests, [buffer])
            if not got:
                raise EOFError("the parent has closed the pipe")
            buffer = buffer[got:]


def run(arguments: list[str], serve: Callable[[Channel], object]) -> int:
    """Run as the child process: set the limits and ``serve`` until the pipe is closed; returns only in the child of another parent."""
    requests, responses, parent, memory_bytes, *shared = (int(argument) for argument in arguments)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        return 1
    for descriptor in (requests, responses, *shared):  # a compiler that this process starts must not keep them open
        os.set_inheritable(descriptor, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit_memory(memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_MOST_KILLABLE)
    with suppress(EOFError, OSError, ProtocolError):
        serve(Channel(requests, responses, SharedMemory(shared[0]) if shared else None))
    # Skip the normal exit of the interpreter: destructors of some native runtimes crash there.
    os._exit(0)
