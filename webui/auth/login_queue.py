"""Turns for checking passwords (R3): answers 429 where too many wait already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flask import abort, request

from appliance.store.logins import TooManyAttemptsError
from webui.context import current_box


@contextmanager
def password_check(username: str) -> Iterator[None]:
    """Wait until a password for this name may be checked from the machine of this request."""
    try:
        with current_box().logins.queue.turn(username, request.remote_addr or ""):
            yield
    except TooManyAttemptsError:
        abort(429)
