"""What can go wrong between the model library and a box, split by what the box has to do about it.

::

    ModelSyncError
    ├── LibraryUnreachable   keep the model and try again later
    ├── TrustError           keep the model and raise the alarm
    ├── BundleError          the files of one model version are not what they say they are
    ├── PublishError         the central team's publication was refused
    └── SettingsError        a setting or an argument is wrong; nothing was tried
"""

from __future__ import annotations

from typing import ClassVar


class ModelSyncError(Exception):
    """Base of every error of this package.

    Attributes:
        message: What happened, in one English sentence with its particulars.
        hint: What the person who reads it should do now.
        code: A stable key of :mod:`model_sync.messages`, which has the text in both languages.
    """

    default_code: ClassVar[str] = "sync.settings"

    def __init__(self, message: str, *, hint: str, code: str = "") -> None:
        """Keep message, hint and code apart, so that each edge can lay them out its own way."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def __str__(self) -> str:
        """Return the message followed by the hint, the way a command line shows it."""
        return f"{self.message}\nhint: {self.hint}"


class LibraryUnreachable(ModelSyncError):  # noqa: N818  (the name is fixed by the design: it is a state of the line)
    """The library did not answer, or not with what was asked for: nothing is wrong with the model in use.

    Attributes:
        code: A stable key such as ``sync.unreachable``, ``sync.window``, ``sync.budget``, ``sync.disk_full``.
    """

    default_code = "sync.unreachable"


class TrustError(ModelSyncError):
    """Metadata or a file failed its signature, expiry, version or digest check: somebody has to look.

    Attributes:
        code: A stable key such as ``trust.signature``, ``trust.expired``, ``trust.rollback``, ``trust.digest``,
            ``trust.revoked``, ``trust.document``.
    """

    default_code = "trust.signature"


class BundleError(ModelSyncError):
    """A bundle directory is incomplete, altered, or its manifest is not valid.

    Attributes:
        code: A stable key such as ``bundle.digest_mismatch``; texts for people are looked up by it.
    """

    def __init__(self, code: str, message: str, hint: str) -> None:
        """Take the coded reason first: texts for people are looked up by it."""
        super().__init__(message, hint=hint, code=code)

    def __str__(self) -> str:
        """Return code, message and hint."""
        return f"[{self.code}] {super().__str__()}"


class PublishError(ModelSyncError):
    """A publication was refused before anything was signed."""

    default_code = "library.refused"


class SettingsError(ModelSyncError):
    """A setting, a path or an argument is wrong; nothing was tried."""


def exit_code(error: ModelSyncError | None) -> int:
    """Return the exit code of `model-sync` for an error; None is 0."""
    if error is None:
        return 0
    if isinstance(error, SettingsError):
        return 2
    if isinstance(error, LibraryUnreachable) and not error.code.startswith("usb."):
        return 4 if error.code in ("sync.window", "sync.budget", "sync.busy", "sync.stopped") else 3
    return 1
