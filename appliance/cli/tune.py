"""``appliance tune``: measure the candidates of active models again, or show the last measurement."""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from appliance.core.errors import ActivationError
from appliance.core.run_summary import RuntimeStatus
from appliance.core.self_test_report import NOT_MEASURED, SelfTestReport
from appliance.core.states import ActivationState, CandidateState, ModelState
from appliance.store.store import Store, open_box
from appliance.store.tuning_requests import TuningRequest
from model_sync import messages
from model_sync.messages import Language

EXIT_OK: Final = 0
_BAR_WIDTH: Final = 24
_MARK: Final = "*"
_HEAD: Final[dict[Language, tuple[str, ...]]] = {
    "zh": ("", "引擎", "运行于", "精度", "线程", "批量", "毫秒", "批量毫秒/幅", "最大误差", "各层精度", "结论"),
    "en": ("", "runtime", "on", "precision", "threads", "batch", "ms", "ms/image", "difference", "layers ran in", "verdict"),
}
_STEPS: Final[dict[str, tuple[str, str]]] = {
    "": ("等待空闲", "waiting"), ActivationState.STAGED: ("校验", "checking"),
    ActivationState.BUILDING: ("构建并核对标准病例", "building and checking golden cases"), ActivationState.SELF_TEST: ("计时", "timing"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance tune``."""
    parser.add_argument("name", nargs="?", help="the model line; every line when left out")
    parser.add_argument("--show", action="store_true", help="only show the table of the last measurement")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace, language: Language) -> int:
    """Measure or show; returns the exit code."""
    from appliance.lifecycle.model_control import tune

    store = open_box(arguments.data_dir)
    try:
        _active_models(store, arguments.name)  # an unknown name is an error before anything is measured
        if not arguments.show:
            progress = _Progress(language)
            try:
                tune(store, arguments.name, "cli", progress)
            finally:
                progress.end()
        rows = _active_models(store, arguments.name)
        if arguments.json:
            print(json.dumps([_as_json(row) for row in rows], ensure_ascii=False, indent=1))
        else:
            for row in rows:
                _print(row, language)
    finally:
        store.close()
    return EXIT_OK


def _active_models(store: Store, name: str | None) -> list[sqlite3.Row]:
    """Return the active models, of one model line or of all; raises ActivationError ``model.unknown`` that lists the lines."""
    active = sorted((row for row in store.models() if row["state"] == ModelState.ACTIVE), key=lambda row: str(row["name"]))
    rows = [row for row in active if name in (None, row["name"])]
    if not rows:
        known = ", ".join(row["name"] for row in active) or "none"
        what = f"{name}: no model is active; active: {known}" if name else "no model is active"
        raise ActivationError("model.unknown", what)
    return rows


class _Progress:
    """Prints the progress: one line that is overwritten on a terminal; one line per step in a file or pipe."""

    def __init__(self, language: Language) -> None:
        self._zh = language == "zh"
        self._last_step: dict[str, str] = {}
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, tuning: TuningRequest) -> None:
        """Print the progress of a measurement."""
        if not tuning.open:
            return
        word = _STEPS.get(tuning.step, (tuning.step, tuning.step))[0 if self._zh else 1]
        if self._is_terminal:
            filled = round(tuning.progress * _BAR_WIDTH)
            line = f"{tuning.name}: {word} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {tuning.progress:4.0%}"
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
        elif self._last_step.get(tuning.name) != tuning.step:
            print(f"{tuning.name}: {word}", file=sys.stderr, flush=True)
        self._last_step[tuning.name] = tuning.step

    def end(self) -> None:
        """End the line."""
        if self._is_terminal and self._last_step:
            print(file=sys.stderr)


def _as_json(row: sqlite3.Row) -> dict[str, Any]:
    report = SelfTestReport.from_json(row["self_test"]).to_json()
    names = ("choice", "reason", "runs", "fallback", "table", "median_ms", "tuned_at", "profile")
    return {"line": row["name"], "version": row["version"], "digest": row["digest"]} | {name: report.get(name) for name in names}


def _print(row: sqlite3.Row, language: Language) -> None:
    report = SelfTestReport.from_json(row["self_test"])
    zh = language == "zh"
    reason = report.reason.code if report.reason else NOT_MEASURED
    print(f"{row['name']} {row['version']}: {row['runtime']} · {row['precision']} · {messages.text(reason, language)}")
    if fallback := report.fallback:
        print(f"{'注意' if zh else 'WARNING'}: {messages.text('choice.fallback', language)} ({fallback['detail']})")
        print(f"{'提示' if zh else 'hint'}: {messages.hint('choice.fallback', language)}")
    else:
        _print_other(RuntimeStatus.of(row["self_test"]), language)
    if not report.table:
        print(messages.hint(NOT_MEASURED, language))
        return
    print(f"{'测量于' if zh else 'measured'} {report.tuned_at} · {report.profile}")
    if missing := sum(item["code"] == "tune.no_time" for item in report.table):
        total = len(report.table)
        text = f"WARNING: incomplete, {missing} of {total} rows were not measured"
        print(f"注意: 表格不完整，{total} 行中 {missing} 行未测量" if zh else text)
        print(f"{'提示' if zh else 'hint'}: {messages.hint('tune.no_time', language)}")
    lines = [_HEAD[language], *(_cells(item, language) for item in sorted(report.table, key=_order))]
    widths = [max(_width(line[index]) for line in lines) for index in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_other(running: RuntimeStatus, language: Language) -> None:
    """Print what runs now according to the worker, when it is not the choice."""
    note = running.other or running.stopped
    if note is None:
        return
    current = f"{running.now.runtime} · {running.now.precision}" if running.now else ("无法运行" if language == "zh" else "nothing")
    detail = f" ({note.detail})" if note.detail else ""
    print(f"{'现在运行' if language == 'zh' else 'runs now'}: {current} · {messages.text(note.code, language)}{detail}")
    print(f"{'提示' if language == 'zh' else 'hint'}: {messages.hint(note.code, language)}")


def _order(item: Mapping[str, Any]) -> tuple[int, float]:
    """Sort key: the choice, then by time, then the candidates without a time."""
    return (0 if item["state"] == CandidateState.CHOSEN else 1 if item["median_ms"] is not None else 2, item["median_ms"] or 0.0)


def _cells(item: Mapping[str, Any], language: Language) -> tuple[str, ...]:
    candidate = item["candidate"]
    is_run = bool(candidate["file"])
    code, detail = item["code"], item["detail"]
    verdict = (messages.text(code, language) if messages.is_known(code) else code) + (f" ({detail})" if detail else "")
    layers = ", ".join(f"{name} {count}" for name, count in sorted(item["layers"].items(), key=lambda pair: -pair[1]))
    return (
        _MARK if item["state"] == CandidateState.CHOSEN else "",
        candidate["runtime"], candidate["provider"] or "-", candidate["precision"] or "-",
        str(candidate["threads"] or ("全部" if language == "zh" else "all")) if is_run else "-", str(candidate["batch"]) if is_run else "-",
        _number(item["median_ms"], ".2f"), _number(item["per_image_ms"], ".2f"), _number(item["max_difference"], ".2g"),
        layers or "-", verdict,
    )  # fmt: skip


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _width(text: Sequence[str]) -> int:
    """Return the columns of a text on a terminal; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
