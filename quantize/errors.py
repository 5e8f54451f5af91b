"""The error that every step of the quantizer raises, and how a command reports it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from model_sync import messages
from quantize.messages import Code

DONE: Final = 0
FAILED: Final = 1
_INTERRUPTED: Final = 130


class QuantizeError(Exception):
    """A bundle cannot be made from the given files and options.

    Args:
        message: what happened, in one English sentence with its particulars.
        hint: what to do, where the hint of the code is not precise enough.
        code: one of ``Code``, or the code of the bundle or the runtime that failed.
    """

    def __init__(self, message: str, *, hint: str = "", code: str = Code.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or messages.hint(code, "en")
        self.code = code

    def __str__(self) -> str:
        """Return the message followed by the hint, as a command line shows it."""
        return f"{self.message}\nhint: {self.hint}"


def run_command(command: Callable[[], int]) -> int:
    """Run a command; where it fails, print what happened and what to do in the language of the terminal.

    Returns:
        The exit code of the command; 1 after an error, 130 after an interrupt.
    """
    language = messages.choose_language()
    try:
        return command()
    except QuantizeError as error:
        print(messages.describe(error.code, error.message, error.hint, language), file=sys.stderr)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        what = f"{messages.text(Code.DISK, language)} ({error.strerror or type(error).__name__}{where})"
        print(messages.error_lines(what, messages.hint(Code.DISK, language), language), file=sys.stderr)
    except KeyboardInterrupt:
        what, hint = messages.text(Code.INTERRUPTED, language), messages.hint(Code.INTERRUPTED, language)
        print(messages.error_lines(what, hint, language), file=sys.stderr)
        return _INTERRUPTED
    return FAILED
