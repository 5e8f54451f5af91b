"""``appliance models``: list, activate, roll back and history, as tables or as JSON; and the hidden ``appliance self-test``."""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.terminal import Progress, UsageError, explain, print_columns, say
from appliance.core.domain import Note
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.core.states import PENDING_STATES, ActivationState, ModelState
from model_sync import messages
from model_sync.messages import choose_language

if TYPE_CHECKING:
    from appliance.store.store import Store

_MODEL_COLUMNS: Final = ("state", "line", "version", "digest", "precision", "runtime", "accuracy", "since")
_HISTORY_COLUMNS: Final = ("number", "state", "line", "version", "digest", "source", "by", "since", "reason")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance models``."""
    parser.add_argument("action", choices=("list", "activate", "rollback", "history", "acknowledge"))
    parser.add_argument(
        "which", nargs="?",
        help="with activate: a bundle directory, a digest or version of this box, or 'reference' for the embedded one;"
        " with rollback or acknowledge: the model line",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="with activate: try a model that failed on this box before")
    parser.add_argument(
        "--precision", metavar="PRECISION",
        help="with activate: always use this precision, even if another one is faster; 'any' cancels that and measures all of them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Run one action; returns the exit code."""
    from appliance.store.store import Store, open_box

    _check_arguments(arguments)
    # Only `activate` may create a data directory.
    with closing(Store(Settings.load(arguments.data_dir)) if arguments.action == "activate" else open_box(arguments.data_dir)) as store:
        if arguments.action == "list":
            _print(_models(store), _MODEL_COLUMNS, arguments.json)
            if not arguments.json:
                _print_score_alarms(store)
        elif arguments.action == "acknowledge":
            _acknowledge(store, arguments.which)
        elif arguments.action == "history":
            _print(_history(store), _HISTORY_COLUMNS, arguments.json)
        else:
            _change(store, arguments)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UsageError where arguments do not go together."""
    action = arguments.action
    if action == "activate" and not arguments.which:
        raise UsageError(
            say("activate needs a bundle directory, or a digest or version of this box"),
            say("`appliance models activate reference` takes the embedded one; `appliance models list` shows what is here"),
        )
    if action == "acknowledge" and not arguments.which:
        raise UsageError(say("acknowledge needs a model line"), say("`appliance models list` shows the alarms with their model lines"))
    if action in ("list", "history") and arguments.which:
        raise UsageError(
            say("{action} takes no {argument!r}", action=action, argument=arguments.which),
            say("`appliance models {action}` shows all", action=action),
        )
    for option in ("again", "precision"):
        if getattr(arguments, option) and action != "activate":
            raise UsageError(
                say("{action} knows no --{option}", action=action, option=option),
                say("--{option} goes with `appliance models activate`", option=option),
            )


def _change(store: Store, arguments: argparse.Namespace) -> None:
    """Activate a model or roll back, with the progress on standard error; prints the model that is active then."""
    from appliance.lifecycle.model_control import activate, find, roll_back

    progress = Progress()
    steps = {
        ActivationState.STAGED: say("copying and checking"), ActivationState.BUILDING: say("building"),
        ActivationState.SELF_TEST: say("self-test"),
    }  # fmt: skip

    def show(row: sqlite3.Row) -> None:
        if row["state"] in PENDING_STATES:
            progress.show(f"{row['name']} {row['version']}", steps[ActivationState(row["state"])], row["progress"])

    try:
        if arguments.action == "activate":
            digest = activate(store, find(store, arguments.which), "cli", arguments.precision, again=arguments.again, on_progress=show)
        else:
            digest = roll_back(store, arguments.which, "cli", show)
    finally:
        progress.end()
    (model,) = (item for item in _models(store) if item["digest"] == digest)
    if arguments.json:
        print(json.dumps(model, ensure_ascii=False))
    else:
        print(f"{model['state']}: {model['line']} {model['version']} ({digest[:12]})")


def _models(store: Store) -> list[dict[str, Any]]:
    from appliance.store.score_alarms import ScoreAlarms

    order = list(ModelState)
    rows = sorted(store.models(), key=lambda row: (row["name"], order.index(row["state"])))
    columns = ("state", "version", "digest", "precision", "runtime")
    alarms = ScoreAlarms(store.database).active()
    return [
        {"line": row["name"], "since": row["activated_at"], "accuracy": _accuracy(store, row)} | {name: row[name] for name in columns}
        | {"alarms": [alarm.note.to_json() | {"label": alarm.label, "at": alarm.at} for alarm in alarms if alarm.digest == row["digest"]]}
        for row in rows
    ]  # fmt: skip


def _accuracy(store: Store, row: sqlite3.Row) -> dict[str, Any]:
    """Whether the accuracy of a model is verified, and if not, why."""
    from appliance.core.accuracy import accuracy_problem

    problem = accuracy_problem(store.settings.data_dir / row["directory"], row["digest"])
    if problem is None:
        return {"is_verified": True, "code": None, "reason": ""}
    return {"is_verified": False, "code": problem.code, "reason": explain(problem.code, problem.detail)}


def _print_score_alarms(store: Store) -> None:
    from appliance.store.score_alarms import ScoreAlarms

    for alarm in ScoreAlarms(store.database).active():
        print(f"{alarm.name} {alarm.version}: {explain(alarm.note.code, alarm.note.detail)}")
        print("  " + messages.hint(alarm.note.code, choose_language()))


def _acknowledge(store: Store, line: str) -> None:
    """Acknowledge the alarms for shifted scores of a model line; prints how many there were."""
    from appliance.store.score_alarms import ScoreAlarms

    count = ScoreAlarms(store.database).acknowledge(line, "cli")
    print(say("acknowledged: {count} alarms of {line}", count=count, line=line))


def _history(store: Store) -> list[dict[str, Any]]:
    from appliance.lifecycle.journal import Journal

    items = []
    for row in Journal(store).history(limit=200):
        note = Note(**json.loads(row["reason"])) if row["reason"] else None
        items.append(
            {
                "number": row["id"], "state": row["state"], "line": row["name"], "version": row["version"], "digest": row["digest"],
                "source": row["source"], "by": row["actor"], "since": row["updated_at"], "attempts": row["attempts"],
                "code": note.code if note else None,
                "reason": explain(messages.current_code(note.code, "box"), note.detail) if note else "",
                "self_test": json.loads(row["self_test"] or "null"), "trial": json.loads(row["trial"] or "null"),
            }
        )  # fmt: skip
    return items


def _print(items: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print items as JSON or as an aligned table."""
    if as_json:
        print(json.dumps(items, ensure_ascii=False, indent=1))
    elif not items:
        print(say("nothing yet; `appliance models activate reference` puts the embedded model to work"))
    else:
        print_columns([columns, *([_cell(name, item[name]) for name in columns] for item in items)])


def _cell(column: str, value: Any) -> str:
    if column == "digest":
        return str(value)[:12]
    if column == "accuracy":
        return say("verified") if value["is_verified"] else say("not verified")
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
    values = {item.name: getattr(arguments, item.name) for item in fields(SelfTestRequest)}
    request = SelfTestRequest(**values | {"keep": keep})
    return run_child(request)


def add_self_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance self-test``."""
    parser.add_argument("--origin", type=Path, required=True, help="directory of the bundle, copied to models/<digest>")
    parser.add_argument("--digest", required=True, help="the digest that the bundle must have")
    parser.add_argument("--precision", help="the variant (default: the most exact)")
    parser.add_argument("--threads", type=int, default=0, help="threads of one inference (default: all cores)")
    parser.add_argument("--memory-bytes", type=int, required=True, help="limit of the private memory of the process")
    parser.add_argument("--reserve-bytes", type=int, default=0, help="free disk space to keep for scans")
    parser.add_argument("--keep", default="", help="digests whose copies stay, separated by commas")
    parser.add_argument("--tune", action="store_true", help="measure every candidate of this box (default: test the baseline)")
    parser.add_argument("--deadline-s", type=float, default=1800.0, help="for the self-test")
    parser.add_argument("--measuring-s", type=float, default=60.0, help="for measuring, without building engines")
    parser.add_argument("--idle-wait-s", type=float, default=0.0, help="longest wait for other work of the box, before and between timings")
    parser.add_argument("--established", default="", help="RUNTIME:PRECISION that ran the model line before")
    parser.add_argument("--triton-url", default="", help="address of a Triton server")
    parser.add_argument("--parent", type=int, required=True, help="number of the parent process")
