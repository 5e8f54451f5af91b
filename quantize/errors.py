"""The error that every step of the quantizer raises."""

from __future__ import annotations

import sys

from model_sync import messages


class QuantizeError(Exception):
    """A bundle cannot be made from the given files and options.

    Attributes:
        message: What happened, in one sentence.
        hint: What the person who reads it should do now.
        code: A fixed word for what happened, for programs: ``data.empty``.
    """

    def __init__(self, message: str, *, hint: str, code: str = "quantize.failed") -> None:
        """Store message and hint separately, so that each command and page can format them."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        """Return the message followed by the hint, the way a command line shows it."""
        return f"{self.message}\nhint: {self.hint}"


def print_os_error(error: OSError) -> int:
    """Print which path could not be read or written, why, and what to do; return the exit code 1."""
    where = f": {error.filename}" if error.filename else ""
    print(error_lines("quantize.disk", f" ({error.strerror or type(error).__name__}{where})"), file=sys.stderr)
    return 1


def error_lines(code: str, detail: str = "") -> str:
    """Return what a code says and what to do, in the language of the command."""
    language = messages.choose_language()
    return messages.error_lines(messages.text(code, language) + detail, messages.hint(code, language), language)
