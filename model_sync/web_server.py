"""What the web server of the box and the central server share: a log without requests, TLS 1.2 or newer, the test for loopback."""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Callable
from typing import Any


class ErrorOnlyLogger:
    """Sends gunicorn's errors to the standard log; requests are not logged, so that no address or name gets into it."""

    def __init__(self, _cfg: object) -> None:
        self.error_log = logging.getLogger("gunicorn.error")
        self.error_log.setLevel(logging.WARNING)
        self.access_log = logging.getLogger("gunicorn.access")

    def __getattr__(self, name: str) -> Any:
        """Delegate ``debug`` to ``critical``, ``exception`` and ``log`` to the standard logger."""
        return getattr(self.error_log, name)

    def access(self, *_: object) -> None:
        """Log no request."""

    def reopen_files(self) -> None:
        """Do nothing: the log is standard error."""

    def close_on_exec(self) -> None:
        """Do nothing: there is no file to close."""


def tls_context_factory(verify_flags: int = 0) -> Callable[[Any, Callable[[], ssl.SSLContext]], ssl.SSLContext]:
    """Return gunicorn's ``ssl_context``: TLS 1.2 or newer (R14), one context for all connections, so that sessions resume."""
    contexts: list[ssl.SSLContext] = []

    def context(_config: Any, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        if not contexts:
            new = default()
            new.minimum_version = ssl.TLSVersion.TLSv1_2
            new.verify_flags = ssl.VerifyFlags(int(new.verify_flags) | verify_flags)
            contexts.append(new)
        return contexts[0]

    return context


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine alone; a name other than ``localhost`` is not resolved."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
