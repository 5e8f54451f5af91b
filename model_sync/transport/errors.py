"""Why a download did not come to its end; each is python-tuf's own error and, at once, this package's ``LibraryUnreachable``.

The Updater sees the ``DownloadError`` it knows; the command line and the health page get sentence, hint and code. None of these says
anything about trust: that is python-tuf's ``RepositoryError``.

::

    DownloadError (python-tuf)
    ├── Unreachable                    no connection, no name, no TLS, reset, cut           tried again
    ├── TooSlow (SlowRetrievalError)   silence, or slower than the settings allow           tried again
    ├── Refused (DownloadHTTPError)    408, 429, 5xx are tried again; the rest is an answer
    ├── TooLong (DownloadLengthMismatchError)   metadata beyond the length it may have      an answer
    ├── NotTheLibrary                  a login page, a redirect, anything that is no metadata   an answer
    ├── RangeViolation                 a piece of the file that was not asked for
    ├── BudgetExhausted                the day's bytes, or those one file may cost, are used up
    └── DiskFull                       no room for the rest of the file
"""

# ruff: noqa: N818  (each name is a state of the line, and three of them are fixed by the design)

from __future__ import annotations

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, SlowRetrievalError

from model_sync.errors import Action, LibraryUnreachable

_SERVER = "the library's web server has to be looked at if this stays; the model in use stays"
_STRANGER = "the server sends something that is not this library; check the URL"
_LOGIN = "the network asks for a login, or the URL is wrong: open the library's address in a browser on this network"
_AGAIN = "nothing is lost: what has arrived is kept, and the next look at the library goes on from there"


class DownloadFailure(LibraryUnreachable):
    """Base of the errors of one download.

    Attributes:
        final: Whether asking the same server again is of no use.
        retry_after_s: How long the server asked to be left alone.
    """

    final = False
    retry_after_s = 0.0


class Unreachable(DownloadError, DownloadFailure):
    """The library cannot be reached, or the line broke: the attempt may be repeated."""

    def __init__(
        self, message: str, *, hint: str = _AGAIN, code: str = "sync.unreachable", final: bool = False, action: Action = Action.RETRY
    ) -> None:
        """Say what broke."""
        DownloadFailure.__init__(self, message, hint=hint, code=code, action=action)
        self.final = final


class TooSlow(SlowRetrievalError, DownloadFailure):
    """Nothing came for too long, or too little."""

    def __init__(self, message: str) -> None:
        """Say what was awaited."""
        DownloadFailure.__init__(self, message, hint=_AGAIN, code="sync.slow")


class Refused(DownloadHTTPError, DownloadFailure):
    """The server answered with an HTTP error; ``status_code`` says which."""

    def __init__(self, message: str, status_code: int, *, retry_after_s: float = 0.0, hint: str = _SERVER) -> None:
        """408, 429 and 5xx pass by themselves; any other status is the server's answer."""
        code = "sync.unreachable" if status_code in (403, 404) else "sync.refused"
        DownloadFailure.__init__(self, message, hint=hint, code=code)
        self.status_code = status_code
        self.retry_after_s = retry_after_s
        self.final = status_code not in (408, 429) and status_code < 500


class TooLong(DownloadLengthMismatchError, DownloadFailure):
    """Metadata is longer than it may be."""

    final = True

    def __init__(self, message: str, *, hint: str = _STRANGER) -> None:
        """Say which file and how long it may be."""
        DownloadFailure.__init__(self, message, hint=hint, code="sync.too_long")


class NotTheLibrary(DownloadError, DownloadFailure):
    """Something answered that is not the library: a login page of the network, a redirect, a proxy's own words."""

    final = True

    def __init__(self, message: str, *, hint: str = _LOGIN) -> None:
        """Say what answered."""
        DownloadFailure.__init__(self, message, hint=hint, code="sync.not_the_library")


class RangeViolation(DownloadError, DownloadFailure):
    """The server sent another piece of the file than was asked for, or a file of another length; nothing of it was written."""

    def __init__(self, message: str, *, final: bool) -> None:
        """``final`` is true when the whole file was asked for: then there is nothing simpler left to ask."""
        DownloadFailure.__init__(
            self, message, hint="a proxy or the web server handles ranges wrongly; the part is kept", code="sync.range"
        )
        self.final = final


class BudgetExhausted(DownloadError, DownloadFailure):
    """The bytes that may be received are used up; the part is kept."""

    final = True

    def __init__(self, message: str, *, hint: str) -> None:
        """Say which budget, and when there is a new one."""
        DownloadFailure.__init__(self, message, hint=hint, code="sync.budget", action=Action.WAIT)


class DiskFull(DownloadError, DownloadFailure):
    """There is no room for the rest of the file; the part is kept.

    Attributes:
        missing_bytes: How much has to be freed, in bytes; 0 when the disk filled up while writing.
    """

    final = True

    def __init__(self, message: str, missing_bytes: int = 0) -> None:
        """Say what did not fit."""
        hint = "free disk space on the box; the download goes on by itself"
        DownloadFailure.__init__(self, message, hint=hint, code="sync.disk_full", action=Action.OPERATOR)
        self.missing_bytes = missing_bytes
