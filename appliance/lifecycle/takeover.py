"""Replaces models that must not be used any more by the best earlier version of their model line, or by none."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from appliance.core.domain import Note
from appliance.core.errors import ActivationError
from appliance.core.self_test_report import SelfTestReport
from appliance.core.states import ModelState
from appliance.lifecycle.background_loader import Load, Loading, Ready
from appliance.lifecycle.journal import Journal
from appliance.store.database import SECURITY_ALERT
from appliance.store.store import Store
from appliance.tuning.selection import Plan


@dataclass
class _Takeover:
    """A model to replace.

    Attributes:
        model: its row of table ``models``.
        trial: number of its activation when it is rolled back; None when it was withdrawn.
        failed: digests of the successors that could not be loaded.
    """

    model: sqlite3.Row
    note: Note
    trial: int | None
    failed: set[str] = field(default_factory=set)
    successor: str = ""
    loading: Loading | None = None


class Takeovers:
    """The replacements under way; no step waits.

    Args:
        load: loads a successor; called in a thread. Nothing of the model line is analysed until it is loaded.
        on_activated: called with the loaded successor when it becomes active.

    Attributes:
        needs_annotation: whether findings of replaced models still have to be annotated.
        held: digests of withdrawn models: no scan may be analysed with them, though their successors are not active yet.
    """

    def __init__(self, store: Store, journal: Journal, load: Load, on_activated: Callable[[Any], None], logger: logging.Logger) -> None:
        self._store, self._journal, self._load, self._on_activated, self._log = store, journal, load, on_activated, logger
        self._takeovers: dict[str, _Takeover] = {}
        self.needs_annotation = True
        self.held: set[str] = set()

    def __len__(self) -> int:
        return len(self._takeovers)

    def __contains__(self, digest: str) -> bool:
        return digest in self._takeovers

    def roll_back(self, row: sqlite3.Row, note: Note) -> None:
        """Begin to replace the model of an activation that is on trial."""
        self._takeovers[row["digest"]] = _Takeover(self._store.model(row["digest"]), note, row["id"])

    def hold_withdrawn(self) -> None:
        """Stop the use of every version that its model line withdrew, and begin to replace the active ones."""
        for model, note in self._journal.find_withdrawn():
            known = self._takeovers.get(model["digest"])
            if model["state"] != ModelState.ACTIVE:
                self._journal.withdraw(model["digest"], note, None)
                self.needs_annotation = True
            elif known is None or known.trial is not None:
                self._takeovers[model["digest"]] = _Takeover(model, note, None)
        self.held = {digest for digest, takeover in self._takeovers.items() if takeover.trial is None}

    def step(self) -> None:
        """Do the next step of every replacement."""
        for digest, takeover in list(self._takeovers.items()):
            successors = [row for row in self._journal.successors(takeover.model["name"], digest) if row["digest"] not in takeover.failed]
            if not successors:
                self._replace(digest, takeover, None)
            elif takeover.loading is None:
                takeover.successor = successors[0]["digest"]
                plan = Plan.of(successors[0]["precision"], SelfTestReport.from_json(successors[0]["self_test"]))
                takeover.loading = Loading(self._load, takeover.successor, plan)
            elif takeover.loading.done():
                self._use_loaded(digest, takeover, takeover.loading, successors[0]["digest"])

    def annotate_findings(self) -> None:
        """Annotate a limited number of findings of replaced models."""
        if self.needs_annotation:
            self.needs_annotation = self._journal.annotate_findings()

    def _use_loaded(self, digest: str, takeover: _Takeover, loading: Loading, best: str) -> None:
        takeover.loading = None
        try:
            model = loading.take()
        except ActivationError as error:
            takeover.failed.add(takeover.successor)
            self._store.record(SECURITY_ALERT, "worker", "E", f"model:{takeover.successor[:12]}", 8, code=error.code)
            return
        if model.digest == best:  # the best successor may have changed while this one was loaded
            self._replace(digest, takeover, model)

    def _replace(self, digest: str, takeover: _Takeover, model: Ready | None) -> None:
        successor = model.digest if model is not None else None
        try:
            if takeover.trial is None:
                self._journal.withdraw(digest, takeover.note, successor)
            else:
                self._journal.roll_back(takeover.trial, takeover.note, successor)
        except ActivationError as error:  # rolled back or superseded meanwhile
            self._log.warning("no takeover", extra={"code": error.code})
        else:
            self.needs_annotation = True
            if model is not None:
                self._on_activated(model)
        del self._takeovers[digest]
        self.held.discard(digest)
