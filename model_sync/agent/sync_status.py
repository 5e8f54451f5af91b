"""``sync-status.json``: what the agent does and what is wrong, for the health page and for ``model-sync status``."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from model_sync import atomic_files
from model_sync.errors import Action, ModelSyncError, TextEnum
from model_sync.trust.rollback_protection import Clocks, iso

STATUS_FILE = "sync-status.json"
HISTORY_FILE = "history.jsonl"
MAX_HISTORY_BYTES = 256 * 1024
_PROGRESS_EVERY_S = 1.0
# How long a download may fail and retry, pauses included, before the failure becomes the state.
_RETRY_GRACE_S = 60.0
_log = logging.getLogger(__name__)


class SyncState(TextEnum):
    """The state of the agent, as it is stored and reported; the message ``state.<value>`` explains it.

    ``OUTDATED``: the last USB stick was genuine and merely old. ``UNKNOWN`` is only in reports: no status could be read.
    """

    OK = "ok"
    UNREACHABLE = "unreachable"
    OUTDATED = "outdated"
    UNTRUSTED = "untrusted"
    WAITING = "waiting"
    DOWNLOADING = "downloading"
    ERROR = "error"
    UNKNOWN = "unknown"


_STATE_OF_ACTION = {
    Action.NONE: SyncState.OK,
    Action.RETRY: SyncState.UNREACHABLE,
    Action.WAIT: SyncState.WAITING,
    Action.OUTDATED: SyncState.OUTDATED,
    Action.ALARM: SyncState.UNTRUSTED,
    Action.OPERATOR: SyncState.ERROR,
}


class Progress(NamedTuple):
    """Progress of a pull: the current file, and the bytes of the complete pull."""

    file: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class LineStatus:
    """The decision about one model line, the version it is about, and the problem, if there is one."""

    version: str
    digest: str
    decision: str
    code: str = ""
    message: str = ""
    hint: str = ""


def state_of(error: ModelSyncError | None) -> SyncState:
    """Return the state that an error puts the agent in.

    A failed link is never untrusted. What the central team did on purpose, such as a withdrawal, is no error.
    """
    return SyncState.OK if error is None else _STATE_OF_ACTION[error.action]


class StatusFile:
    """Writes the status to the disk; when it cannot be written, that is logged, and the agent continues.

    Args:
        exchange_dir: where the box reads it.
        state_dir: where the history of results is stored.
        box_id: the name of this box.
        now: the wall clock.
        ticks: a monotonic clock, in seconds.

    Attributes:
        value: the status as it was last written.
    """

    def __init__(
        self, exchange_dir: Path, state_dir: Path, box_id: str, now: Callable[[], datetime], ticks: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = exchange_dir / STATUS_FILE
        self._history = state_dir / HISTORY_FILE
        self._now = now
        self._ticks = ticks
        self._progress_at = float("-inf")
        self._failing_since: float | None = None
        stored = atomic_files.read_json(self._path)
        self.value: dict[str, Any] = {
            "since": None, "last_success_at": None, "last_attempt_at": None, "received_bytes": 0, "lines": {}, "clock": None,
            "notes": [], "last_problem": None, "retry": None,
        } | stored | {"schema": 1, "box_id": box_id}  # fmt: skip

    def begin(self) -> None:
        """Record that an attempt begins."""
        self._failing_since = None
        self.value |= {"last_attempt_at": iso(self._now()), "notes": [], "progress": None, "retry": None}
        self._write()

    def add_note(self, text: str) -> None:
        """Add a remark that is no problem, such as a delta that did not fit or a bundle that was removed."""
        self.value["notes"] = [*self.value["notes"], text][-20:]
        self._write()

    def report_progress(self, progress: Progress, received_bytes: int) -> None:
        """Record received bytes; written at most once a second."""
        is_new_state = self._enter(SyncState.DOWNLOADING, "sync.downloading")
        self._failing_since = None
        self.value |= {
            "progress": progress._asdict(), "received_bytes": received_bytes, "message": progress.file, "hint": "", "retry": None,
        }  # fmt: skip
        if is_new_state or self._ticks() - self._progress_at >= _PROGRESS_EVERY_S:
            self._progress_at = self._ticks()
            self._write()

    def report_retry(self, error: ModelSyncError, pause_s: float) -> None:
        """Record a failed attempt and the pause before the next one; only a failure that lasts changes the state."""
        now = self._ticks()
        self._failing_since = now if self._failing_since is None else self._failing_since
        next_at = self._now() + timedelta(seconds=pause_s)
        self.value["retry"] = {"code": error.code, "message": error.message, "pause_s": round(pause_s, 1), "at": iso(next_at)}
        if now + pause_s - self._failing_since >= _RETRY_GRACE_S:
            self._enter(state_of(error), error.code)
            self.value |= {"message": f"{error.message}; trying again in {pause_s:.0f} s", "hint": error.hint, "progress": None}
        self._write()

    def end(
        self, error: ModelSyncError | None, lines: Mapping[str, LineStatus], clocks: Clocks, received_bytes: int, code: str = "sync.ok"
    ) -> None:
        """Record the result of an attempt; a success does not clear ``last_problem``."""
        state = state_of(error)
        at = iso(self._now())
        self._enter(state, error.code if error else code)
        self.value |= {
            "message": error.message if error else "", "hint": error.hint if error else "",
            "received_bytes": received_bytes, "progress": None, "retry": None,
            "clock": {"system": iso(clocks.system), "floor": iso(clocks.earliest), "server": iso(clocks.server) if clocks.server else None},
        }  # fmt: skip
        if lines:
            self.value["lines"] = {name: line.__dict__ for name, line in lines.items()}
        if error is None:
            self.value["last_success_at"] = at
        else:
            self.value["last_problem"] = {"code": error.code, "message": error.message, "at": at}
        self._write()
        self._append_history({"at": at, "state": state, "code": self.value["code"], "message": self.value["message"],
                              "received_bytes": received_bytes, "lines": self.value["lines"]})  # fmt: skip

    def history(self) -> list[dict[str, Any]]:
        """Return the results so far, oldest first; an incomplete last line is skipped."""
        try:
            lines = self._history.read_text("utf-8").splitlines()
        except OSError:
            return []
        results = []
        for line in lines:
            try:
                results.append(json.loads(line))
            except ValueError:
                continue
        return results

    def _enter(self, state: SyncState, code: str) -> bool:
        """Set state and code; return whether they changed."""
        is_changed = (self.value.get("state"), self.value.get("code")) != (state, code)
        if is_changed:
            self.value |= {"state": state, "code": code, "since": iso(self._now())}
        return is_changed

    def _write(self) -> None:
        self.value["at"] = iso(self._now())
        value = {"state": SyncState.OK, "code": "sync.ok", "message": "", "hint": "", "progress": None} | self.value
        try:
            atomic_files.write_json(self._path, value)
        except OSError as error:
            _log.warning("the status could not be written: %s", error)

    def _append_history(self, result: dict[str, Any]) -> None:
        """Append one result; the older half of a file that became too large is cut off."""
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            if self._history.exists() and self._history.stat().st_size > MAX_HISTORY_BYTES:
                tail = self._history.read_bytes()[-MAX_HISTORY_BYTES // 2 :]
                atomic_files.write(self._history, tail[tail.find(b"\n") + 1 :])
            with self._history.open("ab") as stream:
                stream.write((json.dumps(result, ensure_ascii=False, sort_keys=True) + "\n").encode())
                atomic_files.flush(stream)
        except OSError as error:
            _log.warning("the history could not be written: %s", error)
