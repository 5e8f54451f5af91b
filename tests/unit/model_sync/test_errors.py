"""The action of every error gives the same state and exit code as the lists of codes did that it replaced."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import model_sync
from model_sync import errors
from model_sync.agent.decision import Decision, decision_for_problem
from model_sync.agent.sync_status import SyncState, state_of
from model_sync.errors import Action, BundleError, LibraryUnreachable, ModelSyncError, SettingsError, TrustError, UsbIncomplete, exit_code
from model_sync.transport.errors import BudgetExhausted, DiskFull, NotTheLibrary, RangeViolation, Refused, TooLong, TooSlow, Unreachable

WAITING = ("sync.window", "sync.budget", "sync.busy", "sync.stopped")
OWN_FAULT = ("sync.disk_full", "sync.disk", "sync.state", "sync.settings", "sync.error")
ON_PURPOSE = ("trust.withdrawn", "trust.below_minimum", "trust.revoked", "trust.line_ended")
CLASSES = {"LibraryUnreachable": LibraryUnreachable, "TrustError": TrustError, "Unreachable": Unreachable}


def old_state(error: ModelSyncError) -> str:
    """The state by code, as it was before errors had an action."""
    if error.code in ON_PURPOSE:
        return "ok"
    if error.code in (*WAITING, "trust.part_expired"):
        return "waiting"
    if isinstance(error, TrustError):
        return "error" if error.code == "trust.document" else "untrusted"
    return "unreachable" if isinstance(error, LibraryUnreachable) and error.code not in OWN_FAULT else "error"


def old_exit_code(error: ModelSyncError) -> int:
    """The exit code by code, as it was before errors had an action."""
    if isinstance(error, SettingsError):
        return 2
    if isinstance(error, LibraryUnreachable) and not error.code.startswith("usb."):
        return 4 if error.code in WAITING else 3
    return 1


def raised() -> Iterator[ModelSyncError]:
    """Every error that the package's source makes with a code written out, with its action."""
    for path in sorted(Path(model_sync.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in CLASSES:
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            code, action = given.get("code"), given.get("action")
            if code is not None and not isinstance(code, ast.Constant):
                continue
            if action is not None and not isinstance(action, ast.Attribute):
                continue
            values = {"code": code.value} if isinstance(code, ast.Constant) else {}
            if isinstance(action, ast.Attribute):
                values["action"] = Action[action.attr]
            yield CLASSES[node.func.id]("what", **values)


MADE = [
    *raised(), BudgetExhausted("what", hint="do"), DiskFull("what"), NotTheLibrary("what"), RangeViolation("what", final=False),
    Refused("what", 404), Refused("what", 503), TooLong("what"), TooSlow("what"), UsbIncomplete("what", hint="do"),
    SettingsError("what", hint="do"), BundleError("bundle.unreadable", "what", "do"), errors.PublishError("what", hint="do"),
]  # fmt: skip


@pytest.mark.parametrize("error", MADE, ids=lambda error: f"{type(error).__name__}-{error.code}")
def test_state_and_exit_code_are_those_of_before(error: ModelSyncError) -> None:
    assert (state_of(error), exit_code(error)) == (old_state(error), old_exit_code(error))


def test_the_table_holds_the_codes_that_used_to_be_listed() -> None:
    codes = {error.code for error in MADE}
    assert codes >= {*WAITING, *OWN_FAULT, "trust.revoked", "trust.line_ended", "trust.part_expired", "trust.document", "usb.incomplete"}
    assert len(MADE) > 40


def test_no_error_is_well() -> None:
    assert (state_of(None), exit_code(None)) == (SyncState.OK, 0)


def test_a_problem_of_a_line_becomes_its_decision() -> None:
    assert decision_for_problem(SettingsError("what", hint="do")) is Decision.UNKNOWN
    assert decision_for_problem(TrustError("what", hint="do")) is Decision.REFUSED
    assert decision_for_problem(LibraryUnreachable("what", hint="do")) is Decision.UNREACHABLE
    assert f"{Decision.NOT_YET} {SyncState.OK}" == "not_yet ok"
