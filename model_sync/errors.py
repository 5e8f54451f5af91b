"""The errors between the model library and a box, and what the box does about them.

::

    ModelSyncError
    ├── LibraryUnreachable   the library did not answer: keep the model in use and try again later
    │   └── UsbIncomplete    the USB stick does not carry what it should
    ├── TrustError           signed data failed a check: keep the model in use and raise the alarm
    ├── BundleError          the files of one model version do not match their manifest
    ├── PublishError         a publication was refused; nothing was signed
    └── SettingsError        a setting or an argument is wrong; nothing was tried

Every error has an :class:`Action`, which determines the state of the agent and the exit code; there are no lists of codes.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

from model_sync import messages

MODEL_STAYS = "the model in use stays"


class TextEnum(str, Enum):
    """Base of enums whose members are stored and printed as their text (``enum.StrEnum`` needs Python 3.11)."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, format_spec: str) -> str:
        return format(str(self.value), format_spec)


class Action(TextEnum):
    """What has to happen after an error.

    Attributes:
        NONE: nothing; the central team wanted it so, such as a withdrawal.
        RETRY: the program tries again by itself.
        WAIT: the program continues by itself when a condition is met, such as a download window.
        OUTDATED: what was offered is genuine and merely old; a person has to bring a newer copy.
        ALARM: somebody may be forging or replaying models; a person must act now.
        OPERATOR: a person has to repair something: the disk, a setting, the program, a document.
    """

    NONE = "none"
    RETRY = "retry"
    WAIT = "wait"
    OUTDATED = "outdated"
    ALARM = "alarm"
    OPERATOR = "operator"


class ModelSyncError(Exception):
    """Base of every error of this package.

    Attributes:
        message: What happened, in one English sentence with its particulars.
        hint: What the reader should do now; the hint of the code, when it is not given.
        code: A stable key of :mod:`model_sync.messages`, which has the text in both languages.
        action: What has to happen now.
    """

    default_code: ClassVar[str] = "sync.settings"
    default_action: ClassVar[Action] = Action.OPERATOR

    def __init__(self, message: str, *, hint: str = "", code: str = "", action: Action | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint or (messages.hint(self.code, "en") if messages.is_known(self.code) else "")
        self.action = action or self.default_action

    def __str__(self) -> str:
        """Return the message followed by the hint, as a command line shows it."""
        return f"{self.message}\nhint: {self.hint}"


class CodedError(ModelSyncError):
    """Base of errors that are always raised with a code of their own."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint=hint, code=code)


class LibraryUnreachable(ModelSyncError):  # noqa: N818  (the name is fixed by the design: it is a state of the link)
    """The library did not answer, or answered with something else; the model in use is not affected.

    Codes: ``sync.unreachable``, ``sync.window``, ``sync.budget``, ``sync.disk_full`` and others that begin with ``sync.``.
    """

    default_code = "sync.unreachable"
    default_action = Action.RETRY


class UsbIncomplete(LibraryUnreachable):
    """The USB stick carries no library, or lacks files of it."""

    default_code = "usb.incomplete"


class TrustError(ModelSyncError):
    """Metadata or a file failed the check of its signature, expiry, version or digest.

    Codes: ``trust.signature``, ``trust.expired``, ``trust.rollback``, ``trust.digest``, ``trust.revoked``, ``trust.document`` and
    others that begin with ``trust.``.
    """

    default_code = "trust.signature"
    default_action = Action.ALARM


class BundleError(CodedError):
    """A bundle directory is incomplete or altered, or its manifest is not valid; codes such as ``bundle.digest_mismatch``."""

    def __str__(self) -> str:
        """Return code, message and hint."""
        return f"[{self.code}] {super().__str__()}"


class PublishError(ModelSyncError):
    """A publication was refused before anything was signed."""

    default_code = "library.refused"


class SettingsError(ModelSyncError):
    """A setting, a path or an argument is wrong; nothing was tried."""


def exit_code(error: ModelSyncError | None) -> int:
    """Return the exit code of ``model-sync`` for an error; None is 0."""
    if error is None:
        return 0
    if isinstance(error, SettingsError):
        return 2
    if isinstance(error, LibraryUnreachable) and not isinstance(error, UsbIncomplete):
        return 4 if error.action is Action.WAIT else 3
    return 1
