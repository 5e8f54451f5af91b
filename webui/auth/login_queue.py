"""Turns for checking passwords: a check takes 19 MiB and a core, and guessing must not slow the logins of others (R3)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from flask import abort, request

from webui.context import current_box

# Machines from which several logins failed share one place, so that all others always find one free, and few threads wait for it.
_CHECKS: Final = threading.BoundedSemaphore(2)
_CHECKS_OF_SUSPECTS: Final = threading.BoundedSemaphore(1)
_WAITING_SUSPECTS: Final = threading.BoundedSemaphore(3)
# Attempts that wait for their turn, each on a thread of the server.
_WAITING: Final = threading.BoundedSemaphore(6)
_WAIT_S: Final = 5.0


@contextmanager
def password_check(username: str) -> Iterator[None]:
    """Wait until a password for this name may be checked; answers 429 where too many wait already.

    The wait depends on the name, known or not, and on the machine, never on the password.
    """
    throttle, peer = current_box().logins.throttle, request.remote_addr or ""
    wait_s = throttle.wait_s(username, peer)
    if wait_s is None:
        abort(429)
    if wait_s > 0:
        if not _WAITING.acquire(blocking=False):
            abort(429)
        try:
            time.sleep(wait_s)
        finally:
            _WAITING.release()
    if not throttle.is_suspect(peer):
        with _place(_CHECKS):
            yield
        return
    if not _WAITING_SUSPECTS.acquire(blocking=False):
        abort(429)
    try:
        with _place(_CHECKS_OF_SUSPECTS):
            yield
    finally:
        _WAITING_SUSPECTS.release()


@contextmanager
def _place(places: threading.BoundedSemaphore) -> Iterator[None]:
    if not places.acquire(timeout=_WAIT_S):
        abort(429)
    try:
        yield
    finally:
        places.release()
