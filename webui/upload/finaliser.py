"""Ingest of complete uploads in threads of its own: a browser may wait for the outcome, lose the connection and ask again.

An acknowledged upload survives a kill of this process: at its start it continues with every complete upload that has no outcome yet.
To ingest the same image twice changes nothing, since the store recognises it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, Final

from appliance.core.domain import PictureForm, Source
from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.core.wakeup import wake
from appliance.store.store import Store
from webui.upload.upload_store import Upload, UploadStore

if TYPE_CHECKING:
    from appliance.ingest.archive import Outcome
    from appliance.ingest.ingest import Ingest

logger = logging.getLogger(__name__)

# Two at a time: parsing one overlaps with the other's fsync, and at most two images are in memory, of which one may be large.
_CONCURRENCY: Final = 2
_LARGE_BYTES: Final = 64 << 20
# A file that crashes the process at each attempt is refused at last; a few power cuts must not refuse a good file.
_MAX_ATTEMPTS: Final = 10


class _StoppedError(Exception):
    """The process stops; the complete upload waits for the next start."""


class Finaliser:
    """Ingests complete uploads, two at a time."""

    def __init__(self, store: Store, uploads: UploadStore) -> None:
        self._store = store
        self._settings: Settings = store.settings
        self._uploads = uploads
        self._pool = ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="finalise")
        self._slots = threading.BoundedSemaphore(_CONCURRENCY)
        self._large_slot = threading.Lock()
        self._changed = threading.Condition()
        self._running: dict[str, int] = {}
        self._stopped = False

    @cached_property
    def ingest(self) -> Ingest:
        """The ingest, made at the first upload, because its libraries take 50 MB."""
        from appliance.ingest.ingest import Ingest

        return Ingest(self._store)

    def recover(self) -> int:
        """Continue with the uploads that were complete when the last process ended; returns how many."""
        return sum(self._recover(upload) for upload in list(self._uploads.unfinished()))

    def _recover(self, upload: Upload) -> bool:
        """Continue with one upload if it is complete; one that the disk does not give waits for the next start."""
        try:
            if not self._uploads.is_complete(upload):
                return False
            self.submit(upload)
        except StoreError as error:
            logger.error("upload left to the next start", extra={"code": error.code})
            return False
        return True

    def submit(self, upload: Upload) -> None:
        """Start the ingest of a complete upload, unless it runs already or is done."""
        with self._changed:
            if self._stopped or upload.id in self._running or self._uploads.outcome(upload) is not None:
                return
            self._running[upload.id] = 0
        self._pool.submit(self._run, upload)

    def wait(self, upload: Upload, timeout_s: float) -> list[dict[str, Any]] | None:
        """Wait at most ``timeout_s`` for the outcome; None while it is not known."""
        with self._changed:
            self._changed.wait_for(lambda: upload.id not in self._running or self._stopped, timeout_s)
        return self._uploads.outcome(upload)

    def progress(self, upload: Upload) -> int:
        """How many files of an archive have been ingested so far."""
        with self._changed:
            return self._running.get(upload.id, 0)

    def accept(
        self, file: IO[bytes], size: int, name: str, source: Source, form: dict[str, Any] | None, upload_id: str = ""
    ) -> list[dict[str, Any]]:
        """Ingest one open file of that many bytes, or every file of an archive; returns the outcome of each as JSON values."""
        from appliance.ingest.archive import accept_stream

        outcomes = []
        slot_for_large = self._large_slot if size > _LARGE_BYTES else nullcontext()
        with slot_for_large, self._slots:
            for outcome in accept_stream(self.ingest, self._settings, file, size, name, source, PictureForm(**form) if form else None):
                outcomes.append(outcome_json(outcome))
                self._count_file(upload_id, len(outcomes))
        return outcomes

    def _count_file(self, upload_id: str, files: int) -> None:
        """Count an ingested file; a process that stops leaves the rest of a long archive to the next one."""
        with self._changed:
            if upload_id in self._running:
                self._running[upload_id] = files
                if self._stopped:
                    raise _StoppedError

    def close_series(self, outcomes: Iterable[dict[str, Any]]) -> None:
        """Close the series of these outcomes, at the sender's explicit end, so that the worker can analyse them."""
        series = {outcome["series_id"] for outcome in outcomes if outcome["series_id"]}
        if series:
            self._store.planner.close_series(sorted(series))
            wake(self._settings)

    def stop(self) -> None:
        """Finish the files that are being ingested and start no others."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, upload: Upload) -> None:
        try:
            with self._uploads.lock(upload, wait=True):
                if self._uploads.outcome(upload) is None and self._uploads.is_complete(upload):
                    self._uploads.finish(upload, self._outcome(upload))
        except _StoppedError:
            logger.info("upload left to the next start")
        except StoreError as error:
            if error.code == "store.missing":
                logger.info("upload cancelled")
            else:  # the disk failed, not the upload: its bytes are kept
                logger.error("upload left to the next start", extra={"code": error.code})
                self._uploads.reset_attempts(upload)
        except OSError:  # the disk has no room for the outcome: the complete upload waits for the next start
            logger.exception("outcome not recorded")
            self._uploads.reset_attempts(upload)
        finally:
            with self._changed:
                self._running.pop(upload.id, None)
                self._changed.notify_all()

    def _outcome(self, upload: Upload) -> list[dict[str, Any]]:
        source = Source("upload", upload.actor, upload.name)
        if self._uploads.count_attempt(upload) > _MAX_ATTEMPTS:
            self._store.add_rejection(source, upload.length, "ingest.unreadable", "ingest failed again and again")
            return [refusal_json(upload.name, "ingest.unreadable")]
        with self._uploads.open(upload) as file:
            try:
                return self.accept(file, upload.length, upload.name, source, upload.form, upload.id)
            except _StoppedError:
                raise
            except Exception:  # a thread's top level: the person gets a definite answer, the log the traceback
                logger.exception("ingest failed")
                return [refusal_json(upload.name, "ingest.unreadable")]


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """One outcome as stored and sent: ids and codes, no text in any language."""
    if outcome.accepted is None:
        return refusal_json(outcome.name, outcome.code)
    stored = outcome.accepted.stored
    return {
        "name": outcome.name,
        "result": stored.outcome,
        "code": "ingest.conflict" if stored.outcome == "conflict" else "",
        "study_id": stored.study_id,
        "series_id": stored.series_id,
        "instance_id": stored.instance_id,
    }


def refusal_json(name: str, code: str) -> dict[str, Any]:
    """The outcome of a file that was not stored."""
    result = "skipped" if code == "ingest.skipped" else "refused"
    return {"name": name, "result": result, "code": code, "study_id": None, "series_id": None, "instance_id": None}
