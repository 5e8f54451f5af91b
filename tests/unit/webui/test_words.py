"""The tables of words name every state that the box, its store and the sync agent know, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

from appliance.core.domain import ScanState
from appliance.core.states import ActivationState
from appliance.lifecycle.journal import Source
from model_sync import messages
from webui import messages as words
from webui.models import library_view
from webui.server import problems

ROOT = Path(__file__).resolve().parents[3]
# What Flask and werkzeug answer by themselves: a wrong method, a body that is too large, an exception, too many waiting.
BY_THE_FRAMEWORK = {405, 413, 500, 503}


def calls(name: str) -> list[ast.Call]:
    """The calls of a function in the sources of the pages."""
    paths = [path for path in (ROOT / "webui").rglob("*.py") if "node_modules" not in path.parts]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    return [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name]


def test_every_state_has_its_words() -> None:
    assert set(words.STATES) == set(ScanState)
    assert set(words.ACTIVATIONS) == set(ActivationState)
    assert set(words.SOURCES) == set(get_args(Source))
    assert set(words.LIBRARY) == {*library_view.STATES, *library_view.OWN_STATES}


def test_every_decision_of_the_sync_agent_has_its_word() -> None:
    decisions = {code.removeprefix("decision.") for code in messages.codes("model_sync") if code.startswith("decision.")}
    assert set(words.DECISIONS) == decisions - {"none"}


def test_every_result_of_an_upload_has_its_word() -> None:
    stored = {"stored", "duplicate", "conflict"}
    source = (ROOT / "webui" / "upload" / "finaliser.py").read_text("utf-8")
    refused = {word for word in ("skipped", "refused") if f'"{word}"' in source}
    assert set(words.RESULTS) == stored | refused


def test_every_error_page_is_used_and_every_error_has_one() -> None:
    aborted = {call.args[0].value for call in calls("abort") if isinstance(call.args[0], ast.Constant)}
    answered = aborted | set(problems.STATUS_OF_CODE.values()) | {status for _, status in problems._STATUS_OF_CLASS} | BY_THE_FRAMEWORK
    # Answers to programs only: tus and the multipart request.
    assert set(problems._PAGES) == answered - {409, 411, 415, 422, 423} | {401}
    assert set(problems.STATUS_OF_CODE) <= messages.codes()
