"""The command ``status``: what runs, what is wanted, what is wrong since when, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from model_sync.agent.centre_status import read_centre_status
from model_sync.agent.client import Client
from model_sync.agent.exchange import Exchange
from model_sync.agent.service import read_box_report
from model_sync.agent.version_words import BoxVersions
from model_sync.messages import Language, choose_language, current_code, hint, is_known, text
from model_sync.settings import SyncSettings

_WIDTH = 18
_MIB = 2**20
_Row = Callable[[str, str], str]


def show(settings: SyncSettings, as_json: bool) -> int:
    """Print the status; return the exit code of its state: 0 ok, 1 untrusted, 3 unreachable, outdated or error, 4 waiting.

    A report of the box that this account cannot read is an error too.
    """
    client = Client(settings)
    status = client.status()
    exchange = Exchange(settings.exchange_dir)
    report, report_code = read_box_report(settings)
    if report is None and not report_code:
        report_code = "box_report.absent"
    models, centre = exchange.reported_models(), read_centre_status(settings.state_dir)
    box = BoxVersions(exchange)
    if as_json:
        full = status | {"directives": exchange.directives(), "models": models, "working_process": client.working_process()}
        full |= {"failed_versions": [failed._asdict() for failed in box.failed()], "centre": centre, "box_report": report_code}
        print(json.dumps(full, ensure_ascii=False, indent=2, sort_keys=True))
    else:
        lang = choose_language()

        def row(label: str, value: str) -> str:
            name = text(f"status.{label}", lang)
            wide = sum(ord(letter) > 0x2E80 for letter in name)
            return f"{name:<{_WIDTH - wide}}{value}"

        print(row("box", f"{settings.box_id}, {text('status.ring', lang)} {settings.ring}"))
        page = _page(status, models, exchange.directives(), client.working_process(), box, row, lang)
        print("\n".join([*page, *_box_report_rows(report_code, row, lang), *_failures(box, centre, row, lang)]))
    state = "error" if report_code == "box_report.unreadable" and status.get("state") == "ok" else str(status.get("state"))
    return {"untrusted": 1, "unreachable": 3, "outdated": 3, "error": 3, "waiting": 4}.get(state, 0)


def _page(
    status: dict[str, Any],
    models: list[dict[str, Any]] | None,
    directives: dict[str, Any],
    working_pid: str | None,
    box: BoxVersions,
    row: _Row,
    lang: Language,
) -> Iterator[str]:
    if not status.get("last_attempt_at"):
        yield row("state", text("status.no_status", lang))
        return
    state, code = str(status.get("state")), current_code(str(status.get("code")), "agent")
    # Without a working process a retry entry is a leftover of a killed one.
    retry = _dict(status.get("retry")) if working_pid is not None else {}
    words = text("status.retrying", lang) if retry and state == "ok" else _word("state", state, lang)
    yield row("state", f"{words} ({text('status.since', lang)} {status.get('since')})")
    yield row("last_look", str(status["last_attempt_at"]))
    yield row("last_success", str(status.get("last_success_at") or text("status.never", lang)))
    for name in sorted(set(_dict(status.get("lines"))) | set(directives) | {str(model.get("line")) for model in models or ()}):
        yield row("line", _line(name, status, models, directives, box, lang))
    yield from _activity(status, working_pid, row, lang)
    if state not in ("ok", "downloading"):
        yield row("wrong", f"{text(code, lang) if is_known(code) else code} [{code}]")
        yield row("detail", str(status.get("message")))
        yield row("do", hint(code, lang) if is_known(code) else str(status.get("hint")))
    for name, about in sorted(_dict(status.get("lines")).items()):
        if _dict(about).get("message") and about["message"] != status.get("message"):
            yield row("detail", f"{name}: {about['message']} [{about.get('code')}]")
    if retry:
        yield row("retry", f"{retry.get('at')} [{retry.get('code')}] {retry.get('message')}")
    if state in ("ok", "downloading") and (problem := _dict(status.get("last_problem"))):
        yield row("last_problem", f"{problem.get('at')} [{problem.get('code')}]")
    if clock := _dict(status.get("clock")):
        server = f", {text('status.clock_server', lang)} {clock.get('server')}" if clock.get("server") else ""
        yield row("clock", f"{clock.get('system')}, {text('status.clock_floor', lang)} {clock.get('floor')}{server}")
    notes = status.get("notes")
    for note in notes if isinstance(notes, list) else ():
        yield row("note", str(note))


def _box_report_rows(code: str, row: _Row, lang: Language) -> Iterator[str]:
    """Yield why the central team learns nothing of the box itself, and what to do."""
    if code:
        yield row("box_report", f"{text(code, lang)} [{code}]")
        yield row("do", hint(code, lang))


def _failures(box: BoxVersions, centre: dict[str, Any], row: _Row, lang: Language) -> Iterator[str]:
    """Yield what failed on this box, and what the central server answered last, unless it accepted the request."""
    for failed in box.failed():
        yield row("failed", f"{failed.line} {failed.version}: {failed.describe(lang)} {failed.at}".rstrip())
    if code := str(centre.get("code") or ""):
        since = f"{text('status.since', lang)} {centre.get('since')}"
        yield row("centre", f"{text(code, lang) if is_known(code) else code} [{code}] ({since}): {centre.get('message')}")
        yield row("do", hint(code, lang) if is_known(code) else str(centre.get("hint")))
    elif centre.get("last_success_at"):
        yield row("centre", text("status.centre_ok", lang, at=centre["last_success_at"]))


def _line(
    name: str, status: dict[str, Any], models: list[dict[str, Any]] | None, directives: dict[str, Any], box: BoxVersions, lang: Language
) -> str:
    wanted = str(_dict(directives.get(name)).get("version") or text("status.nothing", lang))
    running = [f"{model.get('version')} ({model.get('state')})" for model in models or () if model.get("line") == name]
    runs = ", ".join(running) or text("status.unknown" if models is None else "status.nothing", lang)
    summary = f"{name}: {text('status.runs', lang)} {runs}; {text('status.wanted', lang)} {wanted}"
    about = _dict(_dict(status.get("lines")).get(name))
    if not about:
        return summary
    decision, _, at = str(about.get("decision")).partition(" ")
    version = str(about.get("version") or "")
    return f"{summary}; {version} {box.describe(name, version, decision, lang)} {at}".rstrip()


def _activity(status: dict[str, Any], working_pid: str | None, row: _Row, lang: Language) -> Iterator[str]:
    progress = _dict(status.get("progress"))
    if working_pid is not None:
        yield row("working", working_pid)
    if status.get("state") == "downloading" and progress:
        done, total = (_number(progress.get(name)) / _MIB for name in ("done_bytes", "total_bytes"))
        rest = "" if working_pid is not None else f" - {text('status.interrupted', lang)}"
        yield row("progress", f"{progress.get('file')}: {done:.1f} / {total:.1f} MiB{rest}")
    yield row("received", str(status.get("received_bytes")))


def _word(kind: str, key: str, lang: Language) -> str:
    """Return the word for a state or a decision; an unknown one, of a newer version, is returned unchanged."""
    return text(f"{kind}.{key}", lang) if is_known(f"{kind}.{key}") else key


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
