"""Dialogue at a terminal: passphrases, questions, progress; passphrases are never on the command line."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from model_sync.errors import PublishError, SettingsError
from model_sync.library.keys import Passphrase

PASSPHRASE_ENV = "MODEL_LIBRARY_PASSPHRASE_FILE"  # noqa: S105  (the name of a variable that names a file)
ONLINE_ENV = "MODEL_LIBRARY_ONLINE_PASSPHRASE_FILE"
_YES = ("y", "yes")


class ProgressPrinter:
    """Progress on stderr: one line on a terminal, a few lines elsewhere."""

    def __init__(self) -> None:
        self._last: tuple[str, int] = ("", -1)

    def report(self, what: str, done: int, total: int) -> None:
        """Print the progress when it changed enough."""
        terminal = sys.stderr.isatty()
        percent = 100 * done // total if total else 100
        mark = (what, percent if terminal else percent // 25)
        if mark != self._last:
            self._last = mark
            print(f"\r\033[K{what}: {percent} %" if terminal else f"{what}: {percent} %", end="" if terminal else "\n", file=sys.stderr)
            if terminal and done >= total:
                print(file=sys.stderr)


def confirm(question: str, yes: bool) -> None:
    """Ask a question; raise PublishError on no, SettingsError without a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise SettingsError("this is no terminal, so nobody can confirm", code="library.unconfirmed")
    if input(f"{question} [y/N] ").strip().lower() not in _YES:
        raise PublishError("not confirmed; nothing was signed or deleted", code="library.unconfirmed")


def file_from_environment(variable: str) -> Path | None:
    """Return the file named by an environment variable, or None."""
    return Path(os.environ[variable]) if os.environ.get(variable) else None


def find_passphrase(file: Path | None, variable: str) -> Passphrase | None:
    """Return a function that reads the passphrase from a file or the terminal; None when there is neither."""
    path = file or file_from_environment(variable)
    if path is not None:
        return lambda _what: read_secret(path)
    return (lambda what: getpass.getpass(f"{what}: ")) if sys.stdin.isatty() else None


def require_passphrase(passphrase_source: Passphrase | None, variable: str) -> Passphrase:
    """Return ``passphrase_source``; raise SettingsError when it is None."""
    if passphrase_source is None:
        raise SettingsError(
            "no passphrase: this is no terminal", hint=f"--passphrase-file FILE, or {variable}=FILE", code="library.passphrase"
        )
    return passphrase_source


def new_secret(file: Path | None, what: str) -> str:
    """Return a new passphrase: from a file, or typed twice."""
    if file is not None:
        return read_secret(file)
    if not sys.stdin.isatty():
        raise SettingsError("no passphrase: this is no terminal", code="library.passphrase")
    secret = getpass.getpass(f"{what}: ")
    if getpass.getpass("once more: ") != secret:
        raise SettingsError("the two passphrases differ", code="library.passphrase")
    return secret


def read_secret(path: Path) -> str:
    """Return the content of a passphrase file; raise SettingsError when every account can read it."""
    try:
        if path.stat().st_mode & 0o007:
            raise SettingsError(f"{path} can be read by everybody on this machine", hint=f"chmod 600 {path}", code="library.passphrase")
        return path.read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}", code="library.passphrase") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is no text", code="library.passphrase") from error
