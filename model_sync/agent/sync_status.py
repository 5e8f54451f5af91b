"""``sync-status.json``: what the agent is doing and what is wrong, for the health page and for ``model-sync status``."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from model_sync import atomic_files
from model_sync.errors import LibraryUnreachable, ModelSyncError, TrustError
from model_sync.trust.rollback_protection import Clocks, iso

STATUS_FILE = "sync-status.json"
HISTORY_FILE = "history.jsonl"
MAX_HISTORY_BYTES = 256 * 1024
_PROGRESS_EVERY_S = 1.0
_WAITING = ("sync.window", "sync.budget", "sync.busy", "sync.stopped", "trust.part_expired")
_OWN_FAULT = ("sync.disk_full", "sync.disk", "sync.state", "sync.settings", "sync.error")
# The library's own, rightly signed word about one line: told, and no alarm.
_ORDINARY = ("trust.withdrawn", "trust.below_minimum", "trust.revoked", "trust.line_ended")
# Rightly signed, and of no use: the signers slipped, or this box is too old. Nobody forged anything.
_UNUSABLE = ("trust.document",)
# How long a download may be in trouble, its pauses included, before the status says so as a state of its own.
_TROUBLE_S = 60.0
_log = logging.getLogger(__name__)

State: TypeAlias = Literal["ok", "unreachable", "untrusted", "waiting", "downloading", "error"]


class Progress(NamedTuple):
    """How far a pull is: the file under way, and the bytes of the whole pull."""

    file: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class LineStatus:
    """What was decided about one line, which version it is about, and what is the matter with it, if anything is."""

    version: str
    digest: str
    decision: str
    code: str = ""
    message: str = ""
    hint: str = ""


def code_of(error: ModelSyncError) -> str:
    """Return the stable key of an error."""
    return error.code


def state_of(error: ModelSyncError | None) -> State:
    """Return the state that an error puts the agent in; a line that fails is never called untrusted.

    ``untrusted`` is an alarm, for signatures, rollbacks and digests: somebody may be at work who should not. What the central team
    did on purpose, such as a withdrawal, is no trouble at all; what it let expire for one line waits for its signature.
    """
    if error is None or code_of(error) in _ORDINARY:
        return "ok"
    code = code_of(error)
    if code in _WAITING:
        return "waiting"
    if isinstance(error, TrustError):
        return "error" if code in _UNUSABLE else "untrusted"
    return "unreachable" if isinstance(error, LibraryUnreachable) and code not in _OWN_FAULT else "error"


class StatusFile:
    """Keeps the status on the disk; a status that cannot be written stops nothing, it is logged.

    Args:
        exchange_dir: where the box reads it.
        state_dir: where the history of outcomes is kept.
        box_id: this box.
        now: the wall clock.
        ticks: a monotonic clock, in seconds.
    """

    def __init__(
        self, exchange_dir: Path, state_dir: Path, box_id: str, now: Callable[[], datetime], ticks: Callable[[], float] = time.monotonic
    ) -> None:
        """Go on from the status that is there."""
        self._path = exchange_dir / STATUS_FILE
        self._history = state_dir / HISTORY_FILE
        self._now = now
        self._ticks = ticks
        self._progress_at = float("-inf")
        self._trouble_at: float | None = None
        kept = atomic_files.read_json(self._path)
        self._value: dict[str, Any] = {
            "since": None, "last_success_at": None, "last_attempt_at": None, "received_bytes": 0, "lines": {}, "clock": None,
            "notes": [], "last_problem": None, "retry": None,
        } | kept | {"schema": 1, "box_id": box_id}  # fmt: skip

    @property
    def value(self) -> Mapping[str, Any]:
        """The status as it was last written."""
        return self._value

    def began(self) -> None:
        """An attempt begins."""
        self._trouble_at = None
        self._value |= {"last_attempt_at": iso(self._now()), "notes": [], "progress": None, "retry": None}
        self._write()

    def note(self, text: str) -> None:
        """Add a remark that is no problem: a delta that did not fit, a bundle that was dropped."""
        self._value["notes"] = [*self._value["notes"], text][-20:]
        self._write()

    def downloading(self, progress: Progress, received_bytes: int) -> None:
        """Bytes have come; written at most once a second."""
        entered = self._enter("downloading", "sync.downloading")
        self._trouble_at = None
        self._value |= {
            "progress": progress._asdict(), "received_bytes": received_bytes, "message": progress.file, "hint": "", "retry": None,
        }  # fmt: skip
        if entered or self._ticks() - self._progress_at >= _PROGRESS_EVERY_S:
            self._progress_at = self._ticks()
            self._write()

    def trying_again(self, error: ModelSyncError, pause_s: float) -> None:
        """An attempt failed, and another follows after a pause: twenty of them may take half an hour, which is not spent in silence.

        A short trouble leaves the state as it is, so that a bad line does not make it flicker.
        """
        now = self._ticks()
        self._trouble_at = now if self._trouble_at is None else self._trouble_at
        again = self._now() + timedelta(seconds=pause_s)
        self._value["retry"] = {"code": code_of(error), "message": error.message, "pause_s": round(pause_s, 1), "at": iso(again)}
        if now + pause_s - self._trouble_at >= _TROUBLE_S:
            self._enter(state_of(error), code_of(error))
            self._value |= {"message": f"{error.message}; trying again in {pause_s:.0f} s", "hint": error.hint, "progress": None}
        self._write()

    def ended(
        self, error: ModelSyncError | None, lines: Mapping[str, LineStatus], clocks: Clocks, received_bytes: int, code: str = "sync.ok"
    ) -> None:
        """An attempt is over: well, or with an error; the last problem stays on record after things are well again."""
        state = state_of(error)
        at = iso(self._now())
        problem = None if error is None else {"code": code_of(error), "message": error.message, "hint": error.hint}
        self._enter(state, problem["code"] if problem else code)
        self._value |= {
            "message": problem["message"] if problem else "", "hint": problem["hint"] if problem else "",
            "received_bytes": received_bytes, "progress": None, "retry": None,
            "clock": {"system": iso(clocks.system), "floor": iso(clocks.floor), "server": iso(clocks.server) if clocks.server else None},
        }  # fmt: skip
        if lines:
            self._value["lines"] = {name: line.__dict__ for name, line in lines.items()}
        if error is None:
            self._value["last_success_at"] = at
        else:
            self._value["last_problem"] = {"code": code_of(error), "message": error.message, "at": at}
        self._write()
        self._remember({"at": at, "state": state, "code": self._value["code"], "message": self._value["message"],
                        "received_bytes": received_bytes, "lines": self._value["lines"]})  # fmt: skip

    def history(self) -> list[dict[str, Any]]:
        """Return the outcomes so far, oldest first; a torn last line is passed over."""
        try:
            lines = self._history.read_text("utf-8").splitlines()
        except OSError:
            return []
        outcomes = []
        for line in lines:
            try:
                outcomes.append(json.loads(line))
            except ValueError:
                continue
        return outcomes

    def _enter(self, state: State, code: str) -> bool:
        """Change the state; returns whether it is another one than before."""
        changed = (self._value.get("state"), self._value.get("code")) != (state, code)
        if changed:
            self._value |= {"state": state, "code": code, "since": iso(self._now())}
        return changed

    def _write(self) -> None:
        self._value["at"] = iso(self._now())
        value = {"state": "ok", "code": "sync.ok", "message": "", "hint": "", "progress": None} | self._value
        try:
            atomic_files.write_json(self._path, value)
        except OSError as error:
            _log.warning("the status could not be written: %s", error)

    def _remember(self, outcome: dict[str, Any]) -> None:
        """Append one outcome; of a long quiet time only the first and the last stand in the file's tail."""
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            if self._history.exists() and self._history.stat().st_size > MAX_HISTORY_BYTES:
                kept = self._history.read_bytes()[-MAX_HISTORY_BYTES // 2 :]
                atomic_files.write(self._history, kept[kept.find(b"\n") + 1 :])
            with self._history.open("ab") as stream:
                stream.write((json.dumps(outcome, ensure_ascii=False, sort_keys=True) + "\n").encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            _log.warning("the history could not be written: %s", error)
