"""The errors of a download; each is both an error of python-tuf and a ``LibraryUnreachable`` of this package.

The Updater sees its own ``DownloadError``; the command line and the health page get message, hint and code. None of these is about
trust: that is python-tuf's ``RepositoryError``.

::

    DownloadError (python-tuf)
    ├── Unreachable                    no connection, no name, no TLS, reset, cut           tried again
    ├── TooSlow (SlowRetrievalError)   silence, or slower than the settings allow           tried again
    ├── Refused (DownloadHTTPError)    408, 429, 5xx are tried again; other statuses are final
    ├── TooLong (DownloadLengthMismatchError)   metadata that is longer than allowed        final
    ├── NotTheLibrary                  a login page, a redirect, anything that is no metadata   final
    ├── RangeViolation                 a piece of the file that was not asked for
    ├── BudgetExhausted                the day's bytes, or those one file may cost, are used up
    └── DiskFull                       no room for the rest of the file
"""

# ruff: noqa: N818  (each name is a state of the link, and three of them are fixed by the design)

from __future__ import annotations

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, SlowRetrievalError

from model_sync.errors import Action, LibraryUnreachable

_SERVER_HINT = "the library's web server has to be looked at if this stays; the model in use stays"
_OTHER_SERVER_HINT = "the server sends something that is not this library; check the URL"
_LOGIN_HINT = "the network asks for a login, or the URL is wrong: open the library's address in a browser on this network"
_RETRY_HINT = "nothing is lost: what has arrived is kept, and the next poll of the library continues from there"


class DownloadFailure(LibraryUnreachable):
    """Base of the errors of one download.

    Attributes:
        final: Whether a retry at the same server is useless.
        retry_after_s: The pause that the server asked for, in seconds.
    """

    final = False
    retry_after_s = 0.0


class Unreachable(DownloadError, DownloadFailure):
    """The library cannot be reached, or the connection broke: the attempt may be repeated."""

    def __init__(
        self, message: str, *, hint: str = _RETRY_HINT, code: str = "sync.unreachable", final: bool = False, action: Action = Action.RETRY
    ) -> None:
        """Store the parts."""
        DownloadFailure.__init__(self, message, hint=hint, code=code, action=action)
        self.final = final


class TooSlow(SlowRetrievalError, DownloadFailure):
    """No bytes, or too few, arrived within the time limit."""

    def __init__(self, message: str) -> None:
        """Store the message."""
        DownloadFailure.__init__(self, message, hint=_RETRY_HINT, code="sync.slow")


class Refused(DownloadHTTPError, DownloadFailure):
    """The server answered with an HTTP error; ``status_code`` says which."""

    def __init__(self, message: str, status_code: int, *, retry_after_s: float = 0.0, hint: str = _SERVER_HINT) -> None:
        """Store the status; every status but 408, 429 and 5xx is final."""
        code = "sync.unreachable" if status_code in (403, 404) else "sync.refused"
        DownloadFailure.__init__(self, message, hint=hint, code=code)
        self.status_code = status_code
        self.retry_after_s = retry_after_s
        self.final = status_code not in (408, 429) and status_code < 500


class TooLong(DownloadLengthMismatchError, DownloadFailure):
    """Metadata is longer than allowed."""

    final = True

    def __init__(self, message: str, *, hint: str = _OTHER_SERVER_HINT) -> None:
        """Store the message."""
        DownloadFailure.__init__(self, message, hint=hint, code="sync.too_long")


class NotTheLibrary(DownloadError, DownloadFailure):
    """The response is not from the library: a login page of the network, a redirect, a page of a proxy."""

    final = True

    def __init__(self, message: str, *, hint: str = _LOGIN_HINT) -> None:
        """Store the message."""
        DownloadFailure.__init__(self, message, hint=hint, code="sync.not_the_library")


class RangeViolation(DownloadError, DownloadFailure):
    """The server sent another range than requested, or a file of another length; nothing of it was written."""

    def __init__(self, message: str, *, final: bool) -> None:
        """Store the message; ``final`` is true when the full file was requested: there is no simpler request."""
        DownloadFailure.__init__(
            self, message, hint="a proxy or the web server handles ranges wrongly; the part is kept", code="sync.range"
        )
        self.final = final


class BudgetExhausted(DownloadError, DownloadFailure):
    """The bytes that may be received are used up; the part is kept."""

    final = True

    def __init__(self, message: str, *, hint: str) -> None:
        """Store the message."""
        DownloadFailure.__init__(self, message, hint=hint, code="sync.budget", action=Action.WAIT)


class DiskFull(DownloadError, DownloadFailure):
    """There is too little disk space for the rest of the file; the part is kept.

    Attributes:
        missing_bytes: The bytes that have to be freed; 0 when the disk filled up while writing.
    """

    final = True

    def __init__(self, message: str, missing_bytes: int = 0) -> None:
        """Store the message."""
        hint = "free disk space on the box; the download goes on by itself"
        DownloadFailure.__init__(self, message, hint=hint, code="sync.disk_full", action=Action.OPERATOR)
        self.missing_bytes = missing_bytes
