"""What the commands print: words in the language of the user, coded texts, tables and the progress of long work."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import Final

from model_sync import messages
from model_sync.messages import choose_language

_BAR_WIDTH: Final = 24


class UsageError(Exception):
    """Arguments that do not go together; ``what`` and ``hint`` are in the language of the user."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


def say(english: str, /, **values: object) -> str:
    """Return a text of the commands in the language of the user; its Chinese is in the catalogue ``appliance/locale``."""
    text = messages.translate("appliance", english, choose_language())
    return text.format(**values) if values else text


def explain(code: str, detail: str = "") -> str:
    """Return what a code says, with the detail in brackets; a code of another version is returned as it is."""
    return (messages.text(code, choose_language()) if messages.is_known(code) else code) + (f" ({detail})" if detail else "")


def hint_line(code: str) -> str:
    """Return the hint of a code with the word "hint" before it."""
    language = choose_language()
    return messages.text("word.hint", language, hint=messages.hint(code, language))


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; a Chinese character takes two columns of the terminal."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip())


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


class Progress:
    """Prints the progress on standard error: one line that is overwritten on a terminal, one line per step in a file or pipe."""

    def __init__(self) -> None:
        self._last_steps: dict[str, str] = {}
        self._is_terminal = sys.stderr.isatty()

    def show(self, name: str, step: str, part: float) -> None:
        """Print which step of ``name`` is being done, and the part (0 to 1) of it that is done."""
        if self._is_terminal:
            filled = round(part * _BAR_WIDTH)
            line = f"{name}: {step} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {part:4.0%}"
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
        elif self._last_steps.get(name) != step:
            print(f"{name}: {step}", file=sys.stderr, flush=True)
        self._last_steps[name] = step

    def end(self) -> None:
        """End the line."""
        if self._is_terminal and self._last_steps:
            print(file=sys.stderr)
