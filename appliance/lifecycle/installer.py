"""Installs one new model after the other while the active models continue to work: self-test, load, trust check, switch."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.domain import Note
from appliance.core.errors import ActivationError
from appliance.core.self_test_report import SelfTestReport
from appliance.core.states import PENDING_STATES, ActivationState
from appliance.lifecycle.background_loader import Load, Loading, Ready
from appliance.lifecycle.exchange import TrustCheck
from appliance.lifecycle.journal import Journal
from appliance.lifecycle.library_follower import LibraryFollower, apply_facts
from appliance.lifecycle.self_test_process import SelfTestProcess, self_test_command
from appliance.lifecycle.trust_facts import TrustFacts
from appliance.store.store import Store
from appliance.tuning.selection import Plan

_PROGRESS_STEP: Final = 0.02


@dataclass
class _Installation:
    """The activation that is being worked on, with its processes and threads.

    Attributes:
        self_test: None once it was passed.
        stored_progress: the progress that the journal knows of the current phase.
    """

    number: int
    self_test: SelfTestProcess | None = None
    stored_progress: float = 0.0
    loading: Loading | None = None
    model: Ready | None = None
    check: TrustCheck | None = None
    facts: TrustFacts | None = None

    def end(self) -> None:
        """Kill its processes."""
        for child in (self.self_test, self.check):
            if child is not None:
                child.end()


class Installer:
    """Steps the oldest pending activation of the journal; no step waits.

    Args:
        follower: follows the library; None when the library is not followed.
    """

    def __init__(
        self, store: Store, journal: Journal, load: Load, on_activated: Callable[[Any], None],
        follower: LibraryFollower | None, logger: logging.Logger,
    ) -> None:  # fmt: skip
        self._store, self._journal, self._load, self._on_activated = store, journal, load, on_activated
        self._follower, self._log = follower, logger
        self._current: _Installation | None = None

    @property
    def number(self) -> int | None:
        """Number of the activation that is being worked on."""
        return self._current.number if self._current is not None else None

    @property
    def self_test_pid(self) -> int | None:
        """Process number of the running self-test."""
        return self._current.self_test.pid if self._current and self._current.self_test else None

    def step(self) -> None:
        """Do the next step of the oldest pending activation."""
        row = self._journal.pending()
        if self._current is not None and (row is None or row["id"] != self._current.number):  # superseded by another activation
            self.stop()
        if row is None:
            return
        try:
            self._step(row)
        except ActivationError as error:
            self._log.error("model not activated", extra={"code": error.code, "state": row["state"]})
            self._journal.fail(row["id"], Note(error.code, error.detail))
            self.stop()

    def stop(self) -> None:
        """Abandon the current installation; the next step begins it again."""
        if self._current is not None:
            self._current.end()
            self._current = None

    def _step(self, row: sqlite3.Row) -> None:
        current = self._current
        if current is None:
            self._begin(row)
        elif current.self_test is not None:
            self._poll_self_test(row, current, current.self_test)
        elif current.model is None:
            self._load_model(row, current)
        elif current.facts is None and self._needs_trust_check(row):
            self._check_trust(row, current)
        else:
            self._switch(row, current.model)

    def _begin(self, row: sqlite3.Row) -> None:
        if not self._journal.begin_attempt(row["id"]):
            return
        settings = self._store.settings
        active, installed = self._journal.active(row["name"]), self._journal.installed_digests()
        stored = active["self_test"] if active else None
        command = self_test_command(settings, row["origin"], row["digest"], row["precision"], installed, stored)
        try:
            self._current = _Installation(row["id"], SelfTestProcess(command, settings.activation_deadline_s))
        except OSError as error:  # counted as an attempt; the next step begins it again
            self._log.error("the self-test cannot be started", extra={"status": error.errno})

    def _poll_self_test(self, row: sqlite3.Row, current: _Installation, process: SelfTestProcess) -> None:
        report = process.poll(lambda phase, part: self._store_progress(current, phase, part))
        if report is not None:
            self._journal.record_self_test(row["id"], report)
            process.end()
            current.self_test = None
        elif process.has_crashed:
            self._log.error("the self-test crashed", extra={"exit_code": process.exit_code, "state": row["state"]})
            self.stop()  # the next step begins another attempt, or fails the activation after the last one

    def _store_progress(self, current: _Installation, phase: ActivationState, part: float) -> None:
        state = ActivationState(self._journal.row(current.number)["state"])
        if phase != state and PENDING_STATES.index(phase) > PENDING_STATES.index(state):
            self._journal.set_state(current.number, phase)
            current.stored_progress = 0.0
        elif phase == state and part >= current.stored_progress + _PROGRESS_STEP:
            self._journal.set_progress(current.number, part)
            current.stored_progress = part

    def _load_model(self, row: sqlite3.Row, current: _Installation) -> None:
        """Load the model in a thread, while the active models continue to work."""
        if current.loading is None:
            current.loading = Loading(self._load, row["digest"], Plan.of(None, SelfTestReport.from_json(row["self_test"])))
        elif current.loading.done():
            current.model = current.loading.take()

    def _needs_trust_check(self, row: sqlite3.Row) -> bool:
        """Whether the library must sign the model; an embedded model and one that was active before need no new signature."""
        return self._store.settings.library_root is not None and row["source"] != "embedded" and row["purpose"] == "activate"

    def _check_trust(self, row: sqlite3.Row, current: _Installation) -> None:
        """Check right before the switch: the metadata may have changed or expired since the download."""
        settings = self._store.settings
        if settings.exchange_dir is None or settings.library_root is None:
            raise ActivationError("model.not_signed", "no exchange_dir is set")
        if current.check is None:
            try:
                current.check = TrustCheck(settings.exchange_dir, settings.library_root)
            except OSError as error:
                raise ActivationError("trust.unchecked", str(error)) from error
        facts = current.check.poll()
        if facts is None:
            return
        current.facts = self._follower.accept_facts(facts) if self._follower else apply_facts(self._store, self._journal, facts)
        if note := current.facts.find_refusal(row["name"], row["version"], row["digest"]):
            raise ActivationError(note.code, note.detail)

    def _switch(self, row: sqlite3.Row, model: Ready) -> None:
        if (model.manifest.name, model.manifest.version) != (row["name"], row["version"]):
            raise ActivationError("model.mismatch", f"it is {model.manifest.name} {model.manifest.version}")
        self._journal.switch(row["id"], model.manifest)
        self._on_activated(model)
        self._current = None
        self._log.info("model activated", extra={"state": self._journal.row(row["id"])["state"]})
