"""``appliance analyze``: the main job without a server, by the same door, queue, worker and store as the box.

The worker is a child process, as on the box: a scan that crashes or hangs it costs that scan its result, not the run.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance import reasons
from appliance.archive import Outcome, accept_file, files_below
from appliance.domain import Note, Source, Status
from appliance.errors import ApplianceError
from appliance.ingest import Ingest, PictureForm
from appliance.models import activate, reference_bundle
from appliance.process import Lock
from appliance.signal import wake
from appliance.store import Store
from appliance.worklist import InstanceView, Worklist

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.1
_TIMINGS: Final = ("ingest", "decode", "preprocess", "infer", "postprocess", "store", "total")


@dataclass(frozen=True)
class Analysed:
    """One input file: its outcome at the door and, when it came in, the image as the store has it now."""

    outcome: Outcome
    view: InstanceView | None
    study_instance_uid: str = ""

    @property
    def status(self) -> Status:
        """One of the five words; a file the door refused is ``rejected``."""
        if self.view is not None:
            return self.view.status
        return "failed" if self.outcome.code in ("store.failed", "ingest.disk_full") else "rejected"

    @property
    def notes(self) -> tuple[Note, ...]:
        """Assumptions and cautions that go with the result."""
        jobs = self.view.jobs if self.view else ()
        return tuple(dict.fromkeys(note for job in jobs if job.model_digest for note in job.notes))

    @property
    def reason(self) -> Note | None:
        """Why there is no result, when there is none."""
        if self.view is not None:
            return self.view.reason
        return Note(self.outcome.code, self.outcome.detail)

    def to_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        view, reason = self.view, self.reason
        return {
            "path": self.outcome.name,
            "status": self.status,
            "reason": _reason_json(reason) if reason else None,
            "notes": [_reason_json(note) for note in self.notes],
            "study_instance_uid": self.study_instance_uid or None,
            "series_instance_uid": view.series_instance_uid if view else None,
            "sop_instance_uid": view.sop_instance_uid if view else None,
            "findings": [finding.to_json() for finding in view.findings] if view else [],
            "timing_ms": _timing(view) if view else {},
            "disclaimer": {"zh": "不得单独作为诊断依据", "en": "Not for sole diagnosis"},
        }


def analyse(store: Store, paths: Iterable[Path], form: PictureForm, progress: Callable[[str], None]) -> list[Analysed]:
    """Take every file below ``paths`` in, have it read, and return one entry per file in the order given.

    Args:
        store: the box to use; without an active model the embedded reference bundle is activated first.
        paths: files, folders, ZIP archives.
        form: what holds for PNG and JPEG.
        progress: told a line now and then.
    """
    if not any(row["state"] == "active" for row in store.models()):
        activate(store, reference_bundle(), "cli")
    ingest = Ingest(store)
    outcomes: list[Outcome] = []
    for path in (file for given in paths for file in files_below(given)):
        outcomes.extend(accept_file(ingest, store.settings, path, str(path), Source("cli", "cli"), form))
        if len(outcomes) % 50 == 0:
            progress(f"{len(outcomes)} files taken in")
    accepted = [outcome.accepted for outcome in outcomes if outcome.accepted]
    store.close_series(sorted({item.stored.series_id for item in accepted}))
    _work(store, progress)
    worklist = Worklist(store)
    return [
        Analysed(outcome, worklist.instance(outcome.accepted.stored.instance_id), outcome.accepted.scan.study_instance_uid)
        if outcome.accepted
        else Analysed(outcome, None)
        for outcome in outcomes
    ]


def _work(store: Store, progress: Callable[[str], None]) -> None:
    """Have every job done: by the box's own worker where one runs, else by a child that is started again when it falls."""
    told = store.pending_jobs()
    while pending := store.pending_jobs():
        if pending <= told - 25:
            told = pending
            progress(f"{pending} to go")
        try:
            Lock(store.settings.data_dir, "worker").release()
        except ApplianceError:  # a box serves this directory: its worker does the work
            wake(store.settings)
            time.sleep(_POLL_S)
            continue
        _run_worker(store, progress, pending)


def _run_worker(store: Store, progress: Callable[[str], None], pending: int) -> None:
    command = [sys.executable, "-m", "appliance", "worker", "--until-idle", "--data-dir", str(store.settings.data_dir)]
    environment = os.environ | {"APPLIANCE_LOG_LEVEL": "WARNING"}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment) as worker:
        while worker.poll() is None:
            time.sleep(_POLL_S)
            left = store.pending_jobs()
            if left <= pending - 25:
                pending = left
                progress(f"{left} to go")
    if worker.returncode:
        logger.error("worker fell", extra={"exit_code": worker.returncode})


def _reason_json(note: Note) -> dict[str, str]:
    return {"code": note.code, "zh": reasons.text(note.code, "zh"), "en": reasons.text(note.code, "en"), "detail": note.detail}


def _timing(view: InstanceView) -> dict[str, float]:
    """Milliseconds per part over all jobs of the image; ``total`` is door and jobs together, without the time in the queue."""
    sums = dict.fromkeys(_TIMINGS, 0.0)
    for job in view.jobs:
        for name, value in job.timing_ms.items():
            sums[name] = sums.get(name, 0.0) + value
    sums["ingest"] = view.ingest_ms
    sums["total"] += view.ingest_ms
    return {name: round(value, 2) for name, value in sums.items()}
