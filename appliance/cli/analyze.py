"""``appliance analyze``: analyse files without a server, with the same ingest, queue, worker and store as the box.

The worker is a child process, as on the box: a scan that crashes or hangs the worker has no result, but the other scans have theirs.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.cli.terminal import explain, say
from appliance.core.applicable_accuracy import AccuracyBasis
from appliance.core.domain import PENDING_STATES, Finding, Note, PictureForm, Source, Status
from appliance.core.errors import ApplianceError
from appliance.core.process import Lock, die_with_parent
from appliance.core.states import ModelState
from appliance.core.wakeup import wake
from appliance.ingest.archive import Outcome, accept_below
from appliance.ingest.ingest import Ingest
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.messages import DISCLAIMER, both_languages
from appliance.store.store import Store
from appliance.store.volume_results import VolumeResults, VolumeView
from appliance.store.worklist import InstanceView, Worklist
from model_sync import messages

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.1
_IDLE_STARTS: Final = 3
_TIMINGS: Final = ("ingest", "decode", "preprocess", "infer", "postprocess", "store", "total")


@dataclass(frozen=True)
class Analysed:
    """One input file: the outcome of its ingest and, if it was accepted, the stored image and the volume results of its series."""

    outcome: Outcome
    view: InstanceView | None
    study_instance_uid: str = ""
    volumes: tuple[VolumeView, ...] = ()

    @property
    def status(self) -> Status:
        """One of the five words; a file that the ingest refused is ``rejected``."""
        if self.view is not None:
            return self.view.status
        return "failed" if self.outcome.code in ("store.failed", "ingest.disk_full", "ingest.memory") else "rejected"

    @property
    def notes(self) -> tuple[Note, ...]:
        """Assumptions and cautions of the result."""
        if self.view is None:
            return ()
        notes = (note for job in self.view.jobs if job.model_digest for note in job.notes)
        return tuple(dict.fromkeys((*self.view.notes, *notes)))

    @property
    def reason(self) -> Note | None:
        """Why there is no result; None when there is one."""
        if self.view is not None:
            crash = Note("job.crashed") if self.view.status == "failed" else None
            return self.view.reason or crash
        return Note(self.outcome.code, self.outcome.detail)

    def to_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        view, reason = self.view, self.reason
        return {
            "path": self.outcome.name,
            "status": self.status,
            "reason": both_languages(reason.code, reason.detail) if reason else None,
            "notes": [both_languages(note.code, note.detail) for note in self.notes],
            "study_instance_uid": self.study_instance_uid or None,
            "series_instance_uid": view.series_instance_uid if view else None,
            "sop_instance_uid": view.sop_instance_uid if view else None,
            "findings": [finding.to_json() for finding in view.findings] if view else [],
            "volumes": [volume.to_json() for volume in self.volumes],
            "timing_ms": _timing(view) if view else {},
            "disclaimer": DISCLAIMER,
        }


def analyse(
    store: Store, paths: Iterable[Path], form: PictureForm, progress: Callable[[str], None], given: Path | None = None
) -> list[Analysed]:
    """Ingest and analyse every file below ``paths`` (files, folders, ZIP archives); returns one entry per file in the order given.

    Without an active model the reference bundle is activated first. ``form`` has the metadata of PNG and JPEG files; ``progress`` gets a
    line of text from time to time; ``given`` is the settings file or data directory for the worker, the store's data directory when None.
    """
    if not any(row["state"] == ModelState.ACTIVE for row in store.models()):
        activate(store, reference_bundle(), "cli")
    ingest = Ingest(store)
    outcomes: list[Outcome] = []
    for outcome in (item for path in paths for item in accept_below(ingest, store.settings, path, Source("cli", "cli"), form)):
        outcomes.append(outcome)
        if len(outcomes) % 50 == 0:
            progress(say("{count} files accepted", count=len(outcomes)))
    accepted = [outcome.accepted for outcome in outcomes if outcome.accepted]
    store.planner.close_series(sorted({item.stored.series_id for item in accepted}))
    _wait_for_results(store, [item.stored.instance_id for item in accepted], progress, given or store.settings.data_dir)
    worklist = Worklist(store)
    drawn = {item: tuple(VolumeResults(store).of_series(item)) for item in {item.stored.series_id for item in accepted}}
    return [
        Analysed(outcome, worklist.instance(item.stored.instance_id), item.scan.study_instance_uid, drawn[item.stored.series_id])
        if (item := outcome.accepted)
        else Analysed(outcome, None)
        for outcome in outcomes
    ]


def print_table(results: Iterable[Analysed]) -> None:
    """Print one block per file: its status, every score with its threshold, the reason and the notes."""
    zh = messages.choose_language() == "zh"
    words: dict[Status, str] = {
        "analysed": say("analysed"), "out_of_scope": say("out of scope"), "quality_rejected": say("quality rejected"),
        "rejected": say("rejected"), "failed": say("FAILED"),
    }  # fmt: skip
    printed: set[int] = set()
    for item in results:
        print(f"{item.outcome.name}: {words[item.status]}")
        for finding in item.view.findings if item.view else ():
            above = say("above threshold") if finding.positive else say("below threshold")
            print(f"  {finding.title_zh if zh else finding.title_en}: {finding.score:.3f} ({above} {finding.threshold:.3f})"
                  f"  {finding.model} {finding.model_version} {finding.precision} {finding.runtime}")  # fmt: skip
            print(f"    {_accuracy_words(finding)}")
        for volume in item.volumes:
            if volume.job_id not in printed:  # once, not for every slice
                printed.add(volume.job_id)
                ml = ", ".join(
                    f"{label.title_zh if zh else label.title_en} {label.value:.0f} {label.unit}" for label in volume.measurements
                )
                print(f"  {ml} ({say('{count} slices', count=volume.slices)})"
                      f"  {volume.model} {volume.model_version} {volume.precision} {volume.runtime}")  # fmt: skip
        for note in (*((item.reason,) if item.reason else ()), *item.notes):
            print(f"  {explain(note.code, note.detail)}")
    print(say("Not for sole diagnosis.  不得单独作为诊断依据"))


def _accuracy_words(finding: Finding) -> str:
    """Sensitivity and specificity for patients like this one with their 95 % confidence intervals, or why there are none."""
    if not finding.has_verified_accuracy:
        return say("sensitivity and specificity: not verified")
    if finding.accuracy.basis is AccuracyBasis.AGE_UNKNOWN:
        return say("accuracy: the patient's age is not known, so no figure applies")
    if finding.accuracy.basis is AccuracyBasis.NOT_MEASURED:
        return say("accuracy: not measured for patients like this one")
    patients = say("all test images, of mixed ages")
    if group := finding.accuracy.group:
        words = {"child": say("children of {youngest} to {oldest} years"), "adult": say("adults of {youngest} to {oldest} years")}
        patients = words[group.population].format(youngest=f"{group.min_years:g}", oldest=f"{group.max_years:g}")
    sensitivity, specificity = (f"{rate[0]:.1%} ({rate[1]:.1%}–{rate[2]:.1%})" if rate else "–" for rate in finding.own_rates)
    return say("sensitivity {sensitivity}, specificity {specificity}: {patients}",
               sensitivity=sensitivity, specificity=specificity, patients=patients)  # fmt: skip


def _wait_for_results(store: Store, instance_ids: list[int], progress: Callable[[str], None], given: Path) -> None:
    """Wait until these images are analysed: by the worker of the box if one runs, else by child processes.

    A worker that crashes during a scan uses up an attempt of that scan, which counts as progress, and is started again. A worker that
    crashes without progress (a damaged model) would do so for ever: it is given up after some starts.
    """
    tracker, idle_starts = ResultTracker(store, instance_ids, progress), 0
    while tracker.count_pending():
        try:
            Lock(store.settings.data_dir, "worker").release()
        except ApplianceError:  # the box runs: its worker does the work
            wake(store.settings)
            time.sleep(_POLL_S)
            continue
        before = tracker.progress_state()
        code = _run_worker(tracker, given)
        idle_starts = 0 if tracker.progress_state() != before else idle_starts + 1
        if idle_starts >= _IDLE_STARTS:
            count = tracker.count_pending()
            progress(
                say(
                    "error: the worker stops at once (exit code {code}); {count} scans were not analysed",
                    code=code,
                    count=count,
                )
            )
            return


class ResultTracker:
    """Counts the images that still wait for their result; reports a line for every 25."""

    def __init__(self, store: Store, instance_ids: list[int], progress: Callable[[str], None]) -> None:
        self._database = store.database
        self._ids = json.dumps(instance_ids)
        self._progress = progress
        self._reported = len(instance_ids)

    def count_pending(self) -> int:
        """Return how many of these images have no result yet."""
        pending = self.progress_state()[0]
        if pending <= self._reported - 25:
            self._reported = pending
            self._progress(say("{count} to go", count=pending))
        return pending

    def progress_state(self) -> tuple[int, int]:
        """Return the number of pending images and of attempts: it changes whenever the worker makes progress with them."""
        row = self._database.one(
            "SELECT count(DISTINCT i.id) AS pending, coalesce(sum(j.attempts), 0) AS attempts"
            " FROM instances i LEFT JOIN jobs j ON j.instance_id = i.id"
            " WHERE i.state IN (SELECT value FROM json_each(?)) AND i.id IN (SELECT value FROM json_each(?))",
            json.dumps([state.value for state in PENDING_STATES]), self._ids,
        )  # fmt: skip
        return (int(row["pending"]), int(row["attempts"])) if row else (0, 0)


def _run_worker(tracker: ResultTracker, given: Path) -> int:
    """Run one worker until nothing is left to do; returns its exit code."""
    command = [sys.executable, "-m", "appliance", "worker", "--until-idle", "--data-dir", str(given)]
    environment = os.environ | {"APPLIANCE_LOG_LEVEL": "WARNING", "ORT_DISABLE_TELEMETRY": "1"}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, preexec_fn=die_with_parent) as worker:
        while worker.poll() is None:
            time.sleep(_POLL_S)
            tracker.count_pending()
    if worker.returncode:
        logger.error("worker crashed", extra={"exit_code": worker.returncode})
    return worker.returncode


def _timing(view: InstanceView) -> dict[str, float]:
    """Milliseconds per part over all jobs of the image; ``total`` is ingest and jobs without the time in the queue."""
    sums = dict.fromkeys(_TIMINGS, 0.0)
    for job in view.jobs:
        for name, value in job.timing_ms.items():
            sums[name] = sums.get(name, 0.0) + value
    sums["ingest"] = view.ingest_ms
    sums["total"] += view.ingest_ms
    return {name: round(value, 2) for name, value in sums.items()}
