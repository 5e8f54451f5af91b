"""The errors of a download; each is both an error of python-tuf and a ``LibraryUnreachable`` of this package.

The Updater sees its own ``DownloadError``; the command line and the health page get message, hint and code. None of these is an
error of trust, which would be python-tuf's ``RepositoryError``.

::

    DownloadError (python-tuf)
    ├── Unreachable                    no connection, no name, no TLS, a reset              tried again
    ├── TooSlow (SlowRetrievalError)   silence, or slower than the settings allow           tried again
    ├── Refused (DownloadHTTPError)    408, 429, 5xx are tried again; other statuses are final
    ├── TooLong (DownloadLengthMismatchError)   metadata that is longer than allowed        final
    ├── NotTheLibrary                  a login page, a redirect, anything that is not metadata   final
    ├── RangeViolation                 another part of the file than was requested
    ├── BudgetExhausted                the bytes of the day, or those for one file, are used up
    └── DiskFull                       no room for the rest of the file
"""

# ruff: noqa: N818  (each name is a state of the link)

from __future__ import annotations

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, SlowRetrievalError

from model_sync.errors import Action, LibraryUnreachable

_CODE_OF_STATUS = {401: "sync.denied", 403: "sync.denied", 404: "sync.unreachable", 407: "sync.denied", 429: "sync.rate"}


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

    def __init__(self, message: str, *, code: str = "", final: bool = False, action: Action | None = None) -> None:
        DownloadFailure.__init__(self, message, code=code, action=action)
        self.final = final


class TooSlow(SlowRetrievalError, DownloadFailure):
    """No bytes, or too few, arrived within the time limit."""

    default_code = "sync.slow"


class Refused(DownloadHTTPError, DownloadFailure):
    """The server answered with the HTTP error ``status_code``; every status but 408, 429 and 5xx is final."""

    def __init__(self, message: str, status_code: int, *, retry_after_s: float = 0.0) -> None:
        DownloadFailure.__init__(self, message, code=_CODE_OF_STATUS.get(status_code, "sync.refused"))
        self.status_code = status_code
        self.retry_after_s = retry_after_s
        self.final = status_code not in (408, 429) and status_code < 500


class TooLong(DownloadLengthMismatchError, DownloadFailure):
    """Metadata is longer than allowed."""

    final = True
    default_code = "sync.too_long"


class NotTheLibrary(DownloadError, DownloadFailure):
    """The response is not from the library: a login page of the network, a redirect, a page of a proxy."""

    final = True
    default_code = "sync.not_the_library"


class RangeViolation(DownloadError, DownloadFailure):
    """The server sent another range than requested, or a file of another length; nothing of it was written.

    ``final`` is true when the full file was requested: there is no simpler request.
    """

    default_code = "sync.range"

    def __init__(self, message: str, *, final: bool) -> None:
        DownloadFailure.__init__(self, message)
        self.final = final


class BudgetExhausted(DownloadError, DownloadFailure):
    """The bytes that may be received are used up; the part is kept."""

    final = True
    default_code = "sync.budget"
    default_action = Action.WAIT


class DiskFull(DownloadError, DownloadFailure):
    """There is too little disk space for the rest of the file; the part is kept."""

    final = True
    default_code = "sync.disk_full"
    default_action = Action.OPERATOR
