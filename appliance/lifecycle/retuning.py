"""Measures active models again while they continue to work; the activator calls :meth:`Retuner.tick` between two jobs.

The measurement is the same process as the self-test of a new model. Its result is loaded in a thread and taken over in one transaction.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from appliance.core import device_profile
from appliance.core.domain import Note
from appliance.core.errors import ActivationError
from appliance.core.self_test_report import SelfTestReport
from appliance.core.states import ModelState, TuningState
from appliance.lifecycle import model_files
from appliance.lifecycle.background_loader import Load, Loading
from appliance.lifecycle.journal import Journal
from appliance.lifecycle.self_test_process import SelfTestProcess, self_test_command
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests
from appliance.tuning.selection import Plan

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.25


@dataclass
class _Measuring:
    """The measurement that is under way: the request, then its process, then its report, then the model while it is loaded."""

    tuning: TuningRequest
    process: SelfTestProcess | None
    report: SelfTestReport | None = None
    loading: Loading | None = None


class Retuner:
    """Does one requested measurement after the other; no step waits.

    Args:
        on_activated: called with the newly loaded model when it replaces the one that runs.

    Attributes:
        tunings: the stored requests.
    """

    def __init__(
        self, store: Store, journal: Journal, load: Load, on_activated: Callable[[Any], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._journal, self._load, self._on_activated, self._clock = store, journal, load, on_activated, clock
        self.tunings = TuningRequests(store.database)
        self._current: _Measuring | None = None
        self._next_poll = 0.0
        self._requested: set[str] = set()

    @property
    def is_busy(self) -> bool:
        """Whether a measurement is under way, or a person waits for one."""
        waiting = self.tunings.next()
        return self._current is not None or (waiting is not None and waiting.actor != "worker")

    def request(self, digest: str) -> None:
        """Request a measurement because the selected candidate of a model does not run; at most once per model and process."""
        if self._store.settings.tune_at_activation and digest not in self._requested:
            self._requested.add(digest)
            self.tunings.ask(digest, self._store.model(digest)["name"], "worker")

    def request_outdated(self) -> None:
        """Request a measurement of each active model that was never measured, or on another device or with another remote runtime.

        A model whose measurement failed on this device is not measured again by itself: a person may request it again.
        """
        profile = device_profile.profile()
        for row in self._store.models():
            report = SelfTestReport.from_json(row["self_test"])
            is_current = (report.profile, report.hub) == (profile, self._store.settings.triton_url)
            if row["state"] != ModelState.ACTIVE or (is_current and report.is_measured):
                continue
            last = self.tunings.of(row["digest"])
            if last is None or last.state != TuningState.FAILED or last.profile != profile:
                self.request(row["digest"])

    def tick(self, *, may_run: bool) -> None:
        """Do the next step, or stop the measurement while a new model is being activated (not ``may_run``), which has priority."""
        now = self._clock()
        if self._current is None and now < self._next_poll:
            return
        self._next_poll = now + _POLL_S
        if not may_run or self._journal.pending() is not None:
            self.stop()
            return
        try:
            if self._current is not None:
                self._step(self._current)
            elif (tuning := self.tunings.next()) is not None:
                self._begin(tuning)
        except ActivationError as error:
            self._fail(Note(error.code, error.detail))

    def stop(self) -> None:
        """Stop the measurement under way; it is begun again later and counts no failed attempt."""
        if (current := self._end()) is not None:
            self.tunings.pause(current.tuning)

    def _end(self) -> _Measuring | None:
        """Kill the process of the measurement under way; returns what was under way."""
        current, self._current = self._current, None
        if current is not None and current.process is not None:
            current.process.end()
        return current

    def _begin(self, tuning: TuningRequest) -> None:
        row = self._store.database.one("SELECT * FROM models WHERE digest = ?", tuning.digest)
        if row is None or row["state"] != ModelState.ACTIVE:
            self.tunings.fail(tuning, Note("activation.superseded", "it is not active any more"))
            return
        begun = self.tunings.begin(tuning)
        if begun is None:
            return
        settings = self._store.settings
        precision = row["precision"] if SelfTestReport.from_json(row["self_test"]).is_fixed_by_user else None
        origin = model_files.model_dir(settings.data_dir, tuning.digest)
        with_tuning = settings.model_copy(update={"tune_at_activation": True})
        command = self_test_command(with_tuning, origin, tuning.digest, precision, self._journal.installed_digests(), row["self_test"])
        try:
            self._current = _Measuring(begun, SelfTestProcess(command, settings.activation_deadline_s))
        except OSError as error:  # counted as an attempt
            logger.error("the measurement cannot be started", extra={"status": error.errno})

    def _step(self, current: _Measuring) -> None:
        if current.process is not None:
            self._poll_process(current, current.process)
        elif current.loading is None:
            assert current.report is not None
            current.loading = Loading(self._load, current.tuning.digest, Plan.of(None, current.report))
        elif current.loading.done():
            self._switch(current, current.loading)

    def _poll_process(self, current: _Measuring, process: SelfTestProcess) -> None:
        current.report = process.poll(lambda phase, part: self.tunings.progress(current.tuning, phase.value, part))
        if current.report is not None:
            current.process = None
            process.end()
        elif process.has_crashed:
            logger.error("the measurement crashed", extra={"exit_code": process.exit_code})
            self._end()  # its attempt is counted; the next tick begins another one, or fails the request after the last

    def _switch(self, current: _Measuring, loading: Loading) -> None:
        model = loading.take()
        fallback = getattr(model, "fallback", None)
        if fallback is not None:
            raise ActivationError("model.self_test", fallback.detail)
        assert current.report is not None
        row = self._store.model(current.tuning.digest)
        if row["state"] == ModelState.ACTIVE:
            self.tunings.done(current.tuning, current.report.to_json())
            self._on_activated(model)
        else:
            self.tunings.fail(current.tuning, Note("activation.superseded", "it is not active any more"))
        self._current = None

    def _fail(self, note: Note) -> None:
        logger.error("the measurement failed; the model runs as before", extra={"code": note.code})
        if (current := self._end()) is not None:
            self.tunings.fail(current.tuning, note)
