"""Work that SIGKILL ends before a chosen operation on files, as a power cut or the kernel does."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def kill_at(operation: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that SIGKILL ends before its n-th operation on files; returns whether it came so far."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, _arguments: object) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.link", "os.remove", "subprocess.Popen"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL
