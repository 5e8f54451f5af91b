"""The commands ``pull`` and ``import-usb``: progress, failed attempts, and the result."""

from __future__ import annotations

import sys
from pathlib import Path

from model_sync import messages
from model_sync.agent.client import Client
from model_sync.agent.decision import Decision, PullResult
from model_sync.agent.exchange import Exchange
from model_sync.agent.sync_status import Progress
from model_sync.agent.version_words import BoxVersions
from model_sync.errors import Action, LibraryUnreachable, ModelSyncError, exit_code
from model_sync.messages import choose_language, text
from model_sync.settings import SyncSettings
from model_sync.transport.connection import host_of

_MIB = 2**20
_NOTHING_TAKEN = 5  # as for a report that was not sent


def pull(settings: SyncSettings) -> int:
    """Poll the library once while a person waits; return the exit code."""
    if settings.urls:
        print(text("pull.asking", choose_language(), hosts=", ".join(map(host_of, settings.urls))), file=sys.stderr, flush=True)
    try:
        with ProgressLine() as progress_line:
            result = Client(settings.for_interactive_use(), on_retry=progress_line.print_retry).pull(progress_line.show)
    except LibraryUnreachable as error:
        print(_with_code(error), file=sys.stderr)
        _print_advice(error)
        return exit_code(error)
    _print_lines(result, settings)
    print(f"{result.received_bytes} bytes received")
    return _print_problems(result)


def import_usb(settings: SyncSettings, directory: Path) -> int:
    """Import what this box should have from a USB stick; return the exit code: 5 when nothing was taken and nothing is here."""
    with ProgressLine() as progress_line:
        result = Client(settings).import_usb(directory, progress_line.show)
    _print_lines(result, settings)
    code = _print_problems(result)
    what, names = _import_result(result, settings.ring)
    print(text(f"stick.{what}", choose_language(), what=names))
    return code or (_NOTHING_TAKEN if what in ("nothing", "no_rollout") else 0)


def _import_result(result: PullResult, ring: str) -> tuple[str, str]:
    """Return the key of the text about an import, and the models that it names."""
    ready = {name: f"{name} {line.version}" for name, line in result.lines.items() if line.decision is Decision.READY}
    if result.new_lines:
        return "taken", ", ".join(ready[name] for name in sorted(result.new_lines))
    if ready:
        return "same", ", ".join(ready.values())
    if all(line.decision is Decision.NONE for line in result.lines.values()):
        return "no_rollout", ring
    return "nothing", ""


def _print_lines(result: PullResult, settings: SyncSettings) -> None:
    box = BoxVersions(Exchange(settings.exchange_dir))
    for name, line in result.lines.items():
        at = f" ({line.at:%Y-%m-%d %H:%M} UTC)" if line.at else ""
        print(f"{name} {line.version}: {box.describe(name, line.version, line.decision, choose_language())}{at}")


def _print_problems(result: PullResult) -> int:
    for name, problem in result.problems.items():
        if problem.action is Action.NONE:
            print(f"{name}: {problem.message}")
        else:
            print(_with_code(problem, f"{name}: "), file=sys.stderr)
    if result.worst_problem is not None:
        _print_advice(result.worst_problem)
    return exit_code(result.worst_problem)


def _with_code(error: ModelSyncError, about: str = "") -> str:
    language = choose_language()
    if language == "en":
        return messages.error_lines(f"{about}[{error.code}] {error.message}", error.hint, language)
    return messages.describe(error.code, f"{about}{error.message}", error.hint, language)


def _print_advice(error: ModelSyncError) -> None:
    """Print what a failed link means, and what happens now."""
    if error.action is not Action.RETRY:
        return
    language = choose_language()
    texts = (text("pull.unreachable", language), messages.hint(error.code, language), text("pull.then", language))
    print("\n".join(texts), file=sys.stderr)


class ProgressLine:
    """A progress line, only on a terminal; failed attempts are always printed."""

    def __init__(self) -> None:
        self._shown = False

    def __enter__(self) -> ProgressLine:
        return self

    def show(self, progress: Progress) -> None:
        """Replace the progress line."""
        if sys.stderr.isatty():
            self._shown = True
            done, total = progress.done_bytes / _MIB, progress.total_bytes / _MIB
            print(f"\r\x1b[K{progress.file}: {done:.1f} / {total:.1f} MiB", end="", file=sys.stderr, flush=True)

    def print_retry(self, error: LibraryUnreachable, pause_s: float) -> None:
        """Print what failed, and the seconds until the next attempt."""
        self._clear()
        again = text("pull.again", choose_language(), message=error.message, code=error.code, pause=pause_s)
        print(again, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._shown:
            self._shown = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
