"""Complete uploads through the door, beside the requests: a browser may wait for the outcome, lose the line and ask again.

What was acknowledged is not forgotten when this process is killed: at its start it goes on with every complete upload that
has no outcome yet. A second run over the same scans changes nothing (the store knows them), so that is safe.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.core.domain import PictureForm, Source
from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.core.wakeup import wake
from appliance.store.store import Store
from webui.parts import Parts, Upload

if TYPE_CHECKING:
    from appliance.ingest.archive import Outcome
    from appliance.ingest.ingest import Ingest

logger = logging.getLogger(__name__)

# Two at a time: parsing one overlaps with the other's fsync, and at most two scans are in memory, of which one may be large.
_AT_ONCE: Final = 2
_LARGE_BYTES: Final = 64 << 20
# A file that takes the process down each time must not do so for ever; a few unlucky power cuts must not condemn a good one.
_MAX_TRIES: Final = 10


class _StoppedError(Exception):
    """The process is to stop; the upload waits, complete."""


class Finaliser:
    """Brings complete uploads through the door, two at a time."""

    def __init__(self, store: Store, parts: Parts) -> None:
        self._store = store
        self._settings: Settings = store.settings
        self._parts = parts
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="finalise")
        self._doors = threading.BoundedSemaphore(_AT_ONCE)
        self._large_door = threading.Lock()
        self._changed = threading.Condition()
        self._running: dict[str, int] = {}
        self._stopped = False

    @cached_property
    def ingest(self) -> Ingest:
        """The door; made at the first upload, since what reads DICOM takes 50 MB that an idle box can spare."""
        from appliance.ingest.ingest import Ingest

        return Ingest(self._store)

    def recover(self) -> int:
        """Go on with what was complete when the process ended. Returns how many."""
        pending = [upload for upload in self._parts.unfinished() if self._parts.complete(upload)]
        for upload in pending:
            self.submit(upload)
        return len(pending)

    def submit(self, upload: Upload) -> None:
        """Have a complete upload brought in; does nothing when that is under way or done."""
        with self._changed:
            if self._stopped or upload.id in self._running or self._parts.outcome(upload) is not None:
                return
            self._running[upload.id] = 0
        self._pool.submit(self._run, upload)

    def wait(self, upload: Upload, timeout_s: float) -> list[dict[str, Any]] | None:
        """The outcome, waited for at most ``timeout_s``; None while it is not known."""
        with self._changed:
            self._changed.wait_for(lambda: upload.id not in self._running or self._stopped, timeout_s)
        return self._parts.outcome(upload)

    def progress(self, upload: Upload) -> int:
        """How many files of an archive have been through the door so far."""
        with self._changed:
            return self._running.get(upload.id, 0)

    def accept(self, path: Path, name: str, source: Source, form: dict[str, Any] | None, upload_id: str = "") -> list[dict[str, Any]]:
        """Bring one file, or every file of an archive, through the door; returns what became of each, as JSON values."""
        from appliance.ingest.archive import accept_file

        outcomes = []
        large = self._large_door if path.stat().st_size > _LARGE_BYTES else nullcontext()
        with large, self._doors:
            for outcome in accept_file(self.ingest, self._settings, path, name, source, PictureForm(**form) if form else None):
                outcomes.append(to_json(outcome))
                self._went_through(upload_id, len(outcomes))
        return outcomes

    def _went_through(self, upload_id: str, files: int) -> None:
        """Count a file of an upload; a process that is to stop leaves the rest of a long archive to the next one."""
        with self._changed:
            if upload_id in self._running:
                self._running[upload_id] = files
                if self._stopped:
                    raise _StoppedError

    def close_series(self, outcomes: Iterable[dict[str, Any]]) -> None:
        """The sender's explicit end: what these outcomes stored is complete and can be read; tells the worker."""
        series = {outcome["series_id"] for outcome in outcomes if outcome["series_id"]}
        if series:
            self._store.planner.close_series(sorted(series))
            wake(self._settings)

    def stop(self) -> None:
        """Let the files at the door this moment through and begin nothing new."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, upload: Upload) -> None:
        try:
            with self._parts.exclusive(upload, wait=True):
                if self._parts.outcome(upload) is None:
                    self._parts.finish(upload, self._outcome(upload))
        except _StoppedError:
            logger.info("upload left to the next start")
        except StoreError:  # called off while it waited for its turn
            logger.info("upload called off")
        except OSError:  # the disk is full even for the outcome: the upload waits, complete, for the next start
            logger.exception("outcome not recorded")
            self._parts.forgive(upload)
        finally:
            with self._changed:
                self._running.pop(upload.id, None)
                self._changed.notify_all()

    def _outcome(self, upload: Upload) -> list[dict[str, Any]]:
        source = Source("upload", upload.actor, upload.name)
        if self._parts.attempt(upload) > _MAX_TRIES:
            self._store.add_rejection(source, upload.length, "ingest.unreadable", "the door failed again and again")
            return [refusal(upload.name, "ingest.unreadable")]
        try:
            return self.accept(self._parts.path(upload), upload.name, source, upload.form, upload.id)
        except _StoppedError:
            raise
        except Exception:  # top of a worker loop: the person gets a definite answer, the log the place
            logger.exception("the door failed")
            return [refusal(upload.name, "ingest.unreadable")]


def to_json(outcome: Outcome) -> dict[str, Any]:
    """One outcome as it is kept and sent: the box's own numbers and codes, no text in any language."""
    if outcome.accepted is None:
        return refusal(outcome.name, outcome.code)
    stored = outcome.accepted.stored
    return {
        "name": outcome.name,
        "result": stored.outcome,
        "code": "ingest.conflict" if stored.outcome == "conflict" else "",
        "study_id": stored.study_id,
        "series_id": stored.series_id,
        "instance_id": stored.instance_id,
    }


def refusal(name: str, code: str) -> dict[str, Any]:
    """The outcome of a file that was not taken."""
    result = "skipped" if code == "ingest.skipped" else "refused"
    return {"name": name, "result": result, "code": code, "study_id": None, "series_id": None, "instance_id": None}
