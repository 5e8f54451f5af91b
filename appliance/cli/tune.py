"""``appliance tune``: measure the candidates of active models again, or show the last measurement."""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.terminal import Progress, explain, hint_line, print_columns, say
from appliance.core.run_summary import RuntimeStatus
from appliance.core.self_test_report import NOT_MEASURED, SelfTestReport
from appliance.core.states import ActivationState, CandidateState
from model_sync import messages

if TYPE_CHECKING:
    from appliance.store.store import Store
    from appliance.store.tuning_requests import TuningRequest

_MARK: Final = "*"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance tune``."""
    parser.add_argument("name", nargs="?", help="the model line; every line when left out")
    parser.add_argument("--show", action="store_true", help="only show the table of the last measurement")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure or show; returns the exit code."""
    from appliance.lifecycle.model_control import active_models
    from appliance.store.store import open_box

    with closing(open_box(arguments.data_dir)) as store:
        active_models(store, arguments.name)  # an unknown name is an error before anything is measured
        if not arguments.show:
            _measure(store, arguments.name)
        rows = active_models(store, arguments.name)
    if arguments.json:
        print(json.dumps([_as_json(row) for row in rows], ensure_ascii=False, indent=1))
    else:
        for row in rows:
            _print(row)
    return 0


def _measure(store: Store, name: str | None) -> None:
    """Measure with the progress on standard error."""
    from appliance.lifecycle.model_control import tune

    progress = Progress()
    steps = {
        "": say("waiting"), ActivationState.STAGED: say("checking"),
        ActivationState.BUILDING: say("building and checking golden cases"), ActivationState.SELF_TEST: say("timing"),
    }  # fmt: skip

    def show(tuning: TuningRequest) -> None:
        if tuning.open:
            progress.show(tuning.name, steps.get(tuning.step, tuning.step), tuning.progress)

    try:
        tune(store, name, "cli", show)
    finally:
        progress.end()


def _as_json(row: sqlite3.Row) -> dict[str, Any]:
    report = SelfTestReport.from_json(row["self_test"]).to_json()
    names = ("choice", "reason", "runs", "fallback", "busy", "table", "median_ms", "tuned_at", "profile")
    return {"line": row["name"], "version": row["version"], "digest": row["digest"]} | {name: report.get(name) for name in names}


def _print(row: sqlite3.Row) -> None:
    report = SelfTestReport.from_json(row["self_test"])
    reason = report.reason.code if report.reason else NOT_MEASURED
    print(f"{row['name']} {row['version']}: {row['runtime']} · {row['precision']} · {explain(reason)}")
    if fallback := report.fallback:
        print(say("WARNING: {what}", what=explain("choice.fallback", fallback["detail"])))
        print(hint_line("choice.fallback"))
    else:
        _print_other(RuntimeStatus.of(row["self_test"]))
    if not report.table:
        print(messages.hint(NOT_MEASURED, messages.choose_language()))
        return
    print(say("measured {when} · {profile}", when=report.tuned_at, profile=report.profile))
    if missing := sum(item["code"] == "tune.no_time" for item in report.table):
        print(say("WARNING: incomplete, {missing} of {total} rows were not measured", missing=missing, total=len(report.table)))
        print(hint_line("tune.no_time"))
    if busy := RuntimeStatus.of(row["self_test"]).busy:
        print(say("WARNING: {what}", what=explain(busy.code, busy.detail)))
        print(hint_line(busy.code))
    head = (
        "", say("runtime"), say("on"), say("precision"), say("threads"), say("batch"), say("ms"), say("ms/image"), say("difference"),
        say("layers ran in"), say("verdict"),
    )  # fmt: skip
    print_columns([head, *(_cells(item) for item in sorted(report.table, key=_order))])


def _print_other(running: RuntimeStatus) -> None:
    """Print what runs now according to the worker, when it is not the choice."""
    note = running.other or running.stopped
    if note is None:
        return
    current = f"{running.now.runtime} · {running.now.precision}" if running.now else say("nothing")
    print(say("runs now: {what}", what=f"{current} · {explain(note.code, note.detail)}"))
    print(hint_line(note.code))


def _order(item: Mapping[str, Any]) -> tuple[int, float]:
    """Sort key: the choice, then by time, then the candidates without a time."""
    return (0 if item["state"] == CandidateState.CHOSEN else 1 if item["median_ms"] is not None else 2, item["median_ms"] or 0.0)


def _cells(item: Mapping[str, Any]) -> tuple[str, ...]:
    candidate = item["candidate"]
    is_run = bool(candidate["file"])
    layers = ", ".join(f"{name} {count}" for name, count in sorted(item["layers"].items(), key=lambda pair: -pair[1]))
    return (
        _MARK if item["state"] == CandidateState.CHOSEN else "",
        candidate["runtime"], candidate["provider"] or "-", candidate["precision"] or "-",
        str(candidate["threads"] or say("all")) if is_run else "-", str(candidate["batch"]) if is_run else "-",
        _number(item["median_ms"], ".2f"), _number(item["per_image_ms"], ".2f"), _number(item["max_difference"], ".2g"),
        layers or "-", explain(item["code"], item["detail"]),
    )  # fmt: skip


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
