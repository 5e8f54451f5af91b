"""``model-sync status``: what runs, what is wanted, since when, what is wrong, and what to do, on one screen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from model_sync.agent.client import Client
from model_sync.agent.exchange import Exchange
from model_sync.cli_texts import CODES, DECISIONS, LABELS, STATES, language, say
from model_sync.settings import SyncSettings

_WIDTH = 18
_MIB = 2**20


def show(settings: SyncSettings, as_json: bool) -> int:
    """Print the status; returns the exit code of its state: 0 well, 1 untrusted, 3 unreachable or broken, 4 waiting."""
    client = Client(settings)
    status = client.status()
    exchange = Exchange(settings.exchange_dir)
    models = exchange.reported()
    if as_json:
        full = status | {"directives": exchange.directives(), "models": models, "working_process": client.busy()}
        print(json.dumps(full, ensure_ascii=False, indent=2, sort_keys=True))
    else:
        for line in _page(settings, status, models, exchange.directives(), client.busy()):
            print(line)
    return {"untrusted": 1, "unreachable": 3, "error": 3, "waiting": 4}.get(str(status.get("state")), 0)


def _page(
    settings: SyncSettings, status: dict[str, Any], models: list[dict[str, Any]] | None, directives: dict[str, Any], busy: str | None
) -> Iterator[str]:
    lang = language()

    def row(label: str, text: str) -> str:
        name = say(LABELS, label, lang)
        wide = sum(ord(letter) > 0x2E80 for letter in name)
        return f"{name:<{_WIDTH - wide}}{text}"

    yield row("box", f"{settings.box_id}, {say(LABELS, 'ring', lang)} {settings.ring}")
    if not status.get("last_attempt_at"):
        yield row("state", say(LABELS, "no_status", lang))
        return
    state, code = str(status.get("state")), str(status.get("code"))
    # A pause that nobody waits in was left behind by a process that was killed; one that somebody waits in is no good health.
    retry = _dict(status.get("retry")) if busy is not None else {}
    words = say(LABELS, "retrying", lang) if retry and state == "ok" else say(STATES, state, lang)
    yield row("state", f"{words} ({say(LABELS, 'since', lang)} {status.get('since')})")
    yield row("last_look", str(status["last_attempt_at"]))
    yield row("last_success", str(status.get("last_success_at") or say(LABELS, "never", lang)))
    for name in sorted(set(_dict(status.get("lines"))) | set(directives) | {str(model.get("line")) for model in models or ()}):
        yield row("line", _line(name, status, models, directives, lang))
    yield from _under_way(status, busy, row, lang)
    if state not in ("ok", "downloading"):
        advice = CODES.get(code)
        yield row("wrong", f"{getattr(advice.what, lang) if advice else code} [{code}]")
        yield row("detail", str(status.get("message")))
        yield row("do", getattr(advice.do, lang) if advice else str(status.get("hint")))
    for name, about in sorted(_dict(status.get("lines")).items()):
        if _dict(about).get("message") and about["message"] != status.get("message"):
            yield row("detail", f"{name}: {about['message']} [{about.get('code')}]")
    if retry:
        yield row("retry", f"{retry.get('at')} [{retry.get('code')}] {retry.get('message')}")
    if state in ("ok", "downloading") and (problem := _dict(status.get("last_problem"))):
        yield row("last_problem", f"{problem.get('at')} [{problem.get('code')}]")
    if clock := _dict(status.get("clock")):
        server = f", {say(LABELS, 'clock_server', lang)} {clock.get('server')}" if clock.get("server") else ""
        yield row("clock", f"{clock.get('system')}, {say(LABELS, 'clock_floor', lang)} {clock.get('floor')}{server}")
    notes = status.get("notes")
    for note in notes if isinstance(notes, list) else ():
        yield row("note", str(note))


def _line(name: str, status: dict[str, Any], models: list[dict[str, Any]] | None, directives: dict[str, Any], lang: str) -> str:
    wanted = str(_dict(directives.get(name)).get("version") or say(LABELS, "nothing", lang))
    running = [f"{model.get('version')} ({model.get('state')})" for model in models or () if model.get("line") == name]
    runs = ", ".join(running) or say(LABELS, "unknown" if models is None else "nothing", lang)
    text = f"{name}: {say(LABELS, 'runs', lang)} {runs}; {say(LABELS, 'wanted', lang)} {wanted}"
    about = _dict(_dict(status.get("lines")).get(name))
    if not about:
        return text
    decision, _, at = str(about.get("decision")).partition(" ")
    return f"{text}; {about.get('version') or ''} {say(DECISIONS, decision, lang)} {at}".rstrip()


def _under_way(status: dict[str, Any], busy: str | None, row: Any, lang: str) -> Iterator[str]:
    progress = _dict(status.get("progress"))
    if busy is not None:
        yield row("working", busy)
    if status.get("state") == "downloading" and progress:
        done, total = (_number(progress.get(name)) / _MIB for name in ("done_bytes", "total_bytes"))
        rest = "" if busy is not None else f" - {say(LABELS, 'interrupted', lang)}"
        yield row("progress", f"{progress.get('file')}: {done:.1f} / {total:.1f} MiB{rest}")
    yield row("received", str(status.get("received_bytes")))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
