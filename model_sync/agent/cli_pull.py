"""What `model-sync pull` and `import-usb` say: how far it is, what goes wrong meanwhile, and what came in the end."""

from __future__ import annotations

import sys
from pathlib import Path

from model_sync import messages
from model_sync.agent.client import Client
from model_sync.agent.decision import Pulled
from model_sync.agent.sync_status import Progress, state_of
from model_sync.errors import LibraryUnreachable, ModelSyncError, exit_code
from model_sync.messages import choose_language, text
from model_sync.settings import SyncSettings
from model_sync.transport.connection import host_of

_MIB = 2**20


def pull(settings: SyncSettings) -> int:
    """Look at the library once, while somebody waits; returns the exit code."""
    if settings.urls:
        print(text("pull.asking", choose_language(), hosts=", ".join(map(host_of, settings.urls))), file=sys.stderr, flush=True)
    try:
        with Meter() as meter:
            pulled = Client(settings.waited_for(), on_trouble=meter.trouble).pull(meter.show)
    except LibraryUnreachable as error:
        print(_coded(error), file=sys.stderr)
        _say_what_to_do(error)
        return exit_code(error)
    _say_lines(pulled)
    print(f"{pulled.received_bytes} bytes received")
    return _end(pulled)


def import_usb(settings: SyncSettings, directory: Path) -> int:
    """Take what this box should have from a stick; returns the exit code."""
    with Meter() as meter:
        pulled = Client(settings).import_usb(directory, meter.show)
    _say_lines(pulled)
    code = _end(pulled)
    what, names = _taken(pulled, settings.ring)
    print(text(f"stick.{what}", choose_language(), what=names))
    return code


def _taken(pulled: Pulled, ring: str) -> tuple[str, str]:
    """Say what came of an import, and of which models: what is new to the box before what it had."""
    ready = {name: f"{name} {line.version}" for name, line in pulled.lines.items() if line.decision == "ready"}
    if pulled.laid:
        return "taken", ", ".join(ready[name] for name in sorted(pulled.laid))
    if ready:
        return "same", ", ".join(ready.values())
    if all(line.decision == "none" for line in pulled.lines.values()):
        return "no_rollout", ring
    return "nothing", ""


def _say_lines(pulled: Pulled) -> None:
    for name, line in pulled.lines.items():
        at = f" ({line.at:%Y-%m-%d %H:%M} UTC)" if line.at else ""
        print(f"{name} {line.version}: {text(f'decision.{line.decision}', choose_language())}{at}")


def _end(pulled: Pulled) -> int:
    for name, problem in pulled.problems.items():
        if state_of(problem) == "ok":
            print(f"{name}: {problem.message}")
        else:
            print(_coded(problem, f"{name}: "), file=sys.stderr)
    if pulled.worst is not None:
        _say_what_to_do(pulled.worst)
    return exit_code(pulled.worst)


def _coded(error: ModelSyncError, about: str = "") -> str:
    language = choose_language()
    if language == "en":
        return messages.error_lines(f"{about}[{error.code}] {error.message}", error.hint, language)
    return messages.describe(error.code, f"{about}{error.message}", error.hint, language)


def _say_what_to_do(error: ModelSyncError) -> None:
    """Say of a line that failed what it does not mean, and who does what now."""
    if state_of(error) != "unreachable":
        return
    language = choose_language()
    said = (text("pull.unreachable", language), messages.hint(error.code, language), text("pull.then", language))
    print("\n".join(said), file=sys.stderr)


class Meter:
    """One line of progress on a terminal, nothing elsewhere; what goes wrong is said everywhere."""

    def __init__(self) -> None:
        self._shown = False

    def __enter__(self) -> Meter:
        return self

    def show(self, progress: Progress) -> None:
        """Write over the line before."""
        if sys.stderr.isatty():
            self._shown = True
            done, total = progress.done_bytes / _MIB, progress.total_bytes / _MIB
            print(f"\r\x1b[K{progress.file}: {done:.1f} / {total:.1f} MiB", end="", file=sys.stderr, flush=True)

    def trouble(self, error: LibraryUnreachable, pause_s: float) -> None:
        """Say what failed, and when it is tried again."""
        self._clear()
        again = text("pull.again", choose_language(), message=error.message, code=error.code, pause=pause_s)
        print(again, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._shown:
            self._shown = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
