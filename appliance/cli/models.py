"""``appliance models``: list, activate, roll back and history, as tables or as JSON; and the hidden ``appliance self-test``."""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from appliance.core.domain import Note
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.core.states import PENDING_STATES, ActivationState, ModelState
from appliance.store.store import Store, open_box
from model_sync import messages
from model_sync.messages import Language

EXIT_OK: Final = 0
EXIT_USAGE: Final = 2
_MODEL_COLUMNS: Final = ("state", "line", "version", "digest", "precision", "runtime", "since")
_HISTORY_COLUMNS: Final = ("number", "state", "line", "version", "digest", "source", "by", "since", "reason")
_BAR_WIDTH: Final = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance models``."""
    parser.add_argument("action", choices=("list", "activate", "rollback", "history"))
    parser.add_argument(
        "which", nargs="?",
        help="with activate: a bundle directory, a digest or version of this box, or 'reference' for the embedded one;"
        " with rollback: the model line",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="with activate: try a model that failed on this box before")
    parser.add_argument(
        "--precision", metavar="PRECISION",
        help="with activate: always use this precision, even if another one is faster; 'any' cancels that and measures all of them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace, language: Language) -> int:
    """Run one action; returns the exit code."""
    misuse = _find_misuse(arguments)
    if misuse:
        print(f"error: {misuse[0]}\nhint: {misuse[1]}", file=sys.stderr)
        return EXIT_USAGE
    # Only `activate` may create a data directory.
    store = Store(Settings.load(arguments.data_dir)) if arguments.action == "activate" else open_box(arguments.data_dir)
    try:
        if arguments.action == "list":
            _print(_models(store), _MODEL_COLUMNS, arguments.json)
        elif arguments.action == "history":
            _print(_history(store, language), _HISTORY_COLUMNS, arguments.json)
        else:
            _change(store, arguments, language)
    finally:
        store.close()
    return EXIT_OK


def _find_misuse(arguments: argparse.Namespace) -> tuple[str, str] | None:
    """Find arguments that do not go together; returns the error and a hint."""
    if arguments.action == "activate" and not arguments.which:
        return (
            "activate needs a bundle directory, or a digest or version of this box",
            "`appliance models activate reference` takes the embedded one; `appliance models list` shows what is here",
        )
    if arguments.action in ("list", "history") and arguments.which:
        return f"{arguments.action} takes no {arguments.which!r}", f"`appliance models {arguments.action}` shows all"
    if arguments.again and arguments.action != "activate":
        return f"{arguments.action} knows no --again", "--again goes with `appliance models activate`"
    if arguments.precision and arguments.action != "activate":
        return f"{arguments.action} knows no --precision", "--precision goes with `appliance models activate`"
    return None


def _change(store: Store, arguments: argparse.Namespace, language: Language) -> None:
    """Activate a model or roll back, with the progress on standard error; prints the model that is active then."""
    from appliance.lifecycle.model_control import activate, find, roll_back

    progress = _Progress(language)
    try:
        if arguments.action == "activate":
            digest = activate(store, find(store, arguments.which), "cli", arguments.precision, again=arguments.again, on_progress=progress)
        else:
            digest = roll_back(store, arguments.which, "cli", progress)
    finally:
        progress.end()
    (model,) = (item for item in _models(store) if item["digest"] == digest)
    if arguments.json:
        print(json.dumps(model, ensure_ascii=False))
    else:
        print(f"{model['state']}: {model['line']} {model['version']} ({digest[:12]})")


class _Progress:
    """Prints the progress: one line that is overwritten on a terminal; one line per state in a file or pipe."""

    _WORDS: Final = {
        ActivationState.STAGED: ("复制并校验", "copying and checking"), ActivationState.BUILDING: ("构建", "building"),
        ActivationState.SELF_TEST: ("自检", "self-test"),
    }  # fmt: skip

    def __init__(self, language: Language) -> None:
        self._language = language
        self._last_state = ""
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, row: sqlite3.Row) -> None:
        """Print the progress of an activation."""
        if row["state"] not in PENDING_STATES:
            return
        words = self._WORDS[ActivationState(row["state"])]
        word = words[0 if self._language == "zh" else 1]
        if self._is_terminal:
            filled = round(row["progress"] * _BAR_WIDTH)
            line = f"{row['name']} {row['version']}: {word} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {row['progress']:4.0%}"
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
        elif row["state"] != self._last_state:
            print(f"{row['name']} {row['version']}: {word}", file=sys.stderr, flush=True)
        self._last_state = row["state"]

    def end(self) -> None:
        """End the line."""
        if self._is_terminal and self._last_state:
            print(file=sys.stderr)


def _models(store: Store) -> list[dict[str, Any]]:
    order = list(ModelState)
    rows = sorted(store.models(), key=lambda row: (row["name"], order.index(row["state"])))
    columns = ("state", "version", "digest", "precision", "runtime")
    return [{"line": row["name"], "since": row["activated_at"]} | {name: row[name] for name in columns} for row in rows]


def _history(store: Store, language: Language) -> list[dict[str, Any]]:
    from appliance.lifecycle.journal import Journal

    items = []
    for row in Journal(store).history(limit=200):
        note = Note(**json.loads(row["reason"])) if row["reason"] else None
        items.append(
            {
                "number": row["id"], "state": row["state"], "line": row["name"], "version": row["version"], "digest": row["digest"],
                "source": row["source"], "by": row["actor"], "since": row["updated_at"], "attempts": row["attempts"],
                "code": note.code if note else None, "reason": _text(note, language) if note else "",
                "self_test": json.loads(row["self_test"] or "null"), "trial": json.loads(row["trial"] or "null"),
            }
        )  # fmt: skip
    return items


def _text(note: Note, language: Language) -> str:
    code = messages.current_code(note.code, "box")
    text = messages.text(code, language) if messages.is_known(code) else code
    return text + (f" ({note.detail})" if note.detail else "")


def _print(items: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print items as JSON or as an aligned table."""
    if as_json:
        print(json.dumps(items, ensure_ascii=False, indent=1))
        return
    if not items:
        print("nothing yet; `appliance models activate reference` puts the embedded model to work")
        return
    rows = [columns, *([_cell(name, item[name]) for name in columns] for item in items)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(column: str, value: Any) -> str:
    if column == "digest":
        return str(value)[:12]
    if column == "since":
        return datetime.fromisoformat(value).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return str(value)


def run_self_test(arguments: argparse.Namespace) -> int:
    """Run ``appliance self-test``, which the box itself starts; returns the exit code."""
    from appliance.lifecycle.self_test_child import SelfTestRequest
    from appliance.lifecycle.self_test_child import run as run_child

    if arguments.parent <= 1:
        raise ApplianceError("settings.invalid", "`appliance self-test` is started by the box itself")
    keep = [digest for digest in arguments.keep.split(",") if digest]
    request = SelfTestRequest(
        arguments.data_dir, arguments.origin, arguments.digest, arguments.precision, arguments.threads, arguments.memory_bytes, keep,
        arguments.parent, arguments.reserve_bytes, arguments.tune, arguments.deadline_s, arguments.measuring_s, arguments.triton_url,
    )  # fmt: skip
    return run_child(request)


def add_self_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance self-test``."""
    parser.add_argument("--origin", type=Path, required=True, help="the bundle's directory")
    parser.add_argument("--digest", required=True, help="the digest that the bundle must have")
    parser.add_argument("--precision", help="the variant (default: the most exact)")
    parser.add_argument("--threads", type=int, default=0, help="threads of one inference (default: all cores)")
    parser.add_argument("--memory-bytes", type=int, required=True, help="limit of private memory")
    parser.add_argument("--reserve-bytes", type=int, default=0, help="free disk space to keep for scans")
    parser.add_argument("--keep", default="", help="digests whose copies stay, separated by commas")
    parser.add_argument("--tune", action="store_true", help="measure every candidate of this box")
    parser.add_argument("--deadline-s", type=float, default=1800.0, help="for the whole self-test")
    parser.add_argument("--measuring-s", type=float, default=60.0, help="for measuring, without building engines")
    parser.add_argument("--triton-url", default="", help="address of a Triton server")
    parser.add_argument("--parent", type=int, required=True, help="number of the parent process")
