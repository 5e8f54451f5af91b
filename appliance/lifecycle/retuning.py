"""Measuring models at work again, beside the reading: stepped by the activator between two jobs, never waited for.

The measuring is the same process as the proof of a new model; what comes of it is loaded in a thread and taken in one transaction.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from appliance.core import device_profile
from appliance.core.child_process import plain
from appliance.core.domain import Note
from appliance.core.errors import ActivationError
from appliance.lifecycle import model_files
from appliance.lifecycle.background_loader import Load, Loading
from appliance.lifecycle.journal import Journal
from appliance.lifecycle.self_test_process import Proof, order
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests
from appliance.tuning.selection import Plan

logger = logging.getLogger(__name__)

_DETAIL: Final = 500
_LOOK_EVERY_S: Final = 0.25


@dataclass
class _UnderWay:
    """A measuring that goes on now."""

    tuning: TuningRequest
    proof: Proof | None
    report: dict[str, Any] | None = None
    loading: Loading | None = None


class Retuner:
    """Steps one measuring after the other.

    Args:
        store: the box's store.
        journal: its journal of models.
        load: loads a model; called in a thread.
        take: given a loaded model in the moment it is put to work.
        clock: seconds that only rise.
    """

    def __init__(
        self, store: Store, journal: Journal, load: Load, take: Callable[[Any], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._journal, self._load, self._take, self._clock = store, journal, load, take, clock
        self.tunings = TuningRequests(store.database)
        self._now: _UnderWay | None = None
        self._next = 0.0
        self._asked: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether a measuring goes on, or a person waits for one."""
        waiting = self.tunings.next()
        return self._now is not None or (waiting is not None and waiting.actor != "worker")

    def want(self, digest: str) -> None:
        """Something is wrong with how a model is run: measure it again, once in this process's life."""
        if self._store.settings.tune_at_activation and digest not in self._asked:
            self._asked.add(digest)
            self.tunings.ask(digest, self._store.model(digest)["name"], "worker")

    def look(self) -> None:
        """At a worker's start: whatever was measured on another device than this has become, with another hub, or never, is measured again.

        One that failed on this very device is left alone: a person may ask for it.
        """
        profile = device_profile.profile()
        for row in self._store.models():
            report = json.loads(row["self_test"])
            untuned = (report.get("reason") or {}).get("code") == "choice.untuned"
            same = (report.get("profile"), report.get("hub", "")) == (profile, self._store.settings.triton_url)
            if row["state"] != "active" or (same and not untuned):
                continue
            last = self.tunings.of(row["digest"])
            if last is None or last.state != "failed" or last.profile != profile:
                self.want(row["digest"])

    def tick(self, *, free: bool) -> None:
        """Go on as far as nothing has to be waited for; ``free`` says that no new model is being put to work, which goes first."""
        now = self._clock()
        if self._now is None and now < self._next:
            return
        self._next = now + _LOOK_EVERY_S
        if not free or self._journal.coming() is not None:
            self.stop()
            return
        try:
            if self._now is not None:
                self._step(self._now)
            elif (tuning := self.tunings.next()) is not None:
                self._begin(tuning)
        except ActivationError as error:
            self._fail(Note(error.code, error.detail))

    def stop(self) -> None:
        """Break off what goes on, to be begun again."""
        if self._now is not None:
            under_way, self._now = self._now, None
            if under_way.proof is not None:
                under_way.proof.end()
            self.tunings.pause(under_way.tuning)

    def _begin(self, tuning: TuningRequest) -> None:
        row = self._store.database.one("SELECT * FROM models WHERE digest = ?", tuning.digest)
        if row is None or row["state"] != "active":
            self.tunings.fail(tuning, Note("activation.superseded", "it reads no more"))
            return
        if not self.tunings.begin(tuning):
            return
        settings, by_hand = self._store.settings, json.loads(row["self_test"]).get("reason", {}).get("code") == "choice.by_hand"
        origin = model_files.place(settings.data_dir, tuning.digest)
        asked = settings.model_copy(update={"tune_at_activation": True})
        line = order(asked, origin, tuning.digest, row["precision"] if by_hand else None, self._journal.kept())
        begun = replace(tuning, state="measuring", attempts=tuning.attempts + 1)
        try:
            self._now = _UnderWay(begun, Proof(line, settings.activation_deadline_s))
        except OSError as error:  # no process to be had: an attempt like any other
            logger.error("the measuring cannot be started", extra={"status": error.errno})

    def _step(self, under_way: _UnderWay) -> None:
        if under_way.proof is not None:
            self._listen(under_way, under_way.proof)
        elif under_way.loading is None:
            assert under_way.report is not None
            under_way.loading = Loading(self._load, under_way.tuning.digest, Plan.of(None, under_way.report))
        elif under_way.loading.done():
            self._switch(under_way, under_way.loading)

    def _listen(self, under_way: _UnderWay, proof: Proof) -> None:
        messages, ended = proof.messages()
        for message in messages:
            if "failed" in message:
                raise ActivationError(message["failed"]["code"], plain(message["failed"]["detail"], _DETAIL))
            if "result" in message:
                under_way.report = message["result"]
                under_way.proof = None
                proof.end()
                return
            self.tunings.progress(under_way.tuning, str(message["state"]), float(message["progress"]))
        if ended:
            logger.error("the measuring died", extra={"exit_code": proof.exit_code})
            proof.end()
            self._now = None  # its attempt is counted: begun again with the next tick, or given up
        elif proof.late():
            raise ActivationError("activation.deadline", f"more than {self._store.settings.activation_deadline_s:.0f} s")

    def _switch(self, under_way: _UnderWay, loading: Loading) -> None:
        ready = loading.take()
        fallback = getattr(ready, "fallback", None)
        if fallback is not None:
            raise ActivationError("model.self_test", fallback.detail)
        assert under_way.report is not None
        row = self._store.model(under_way.tuning.digest)
        if row["state"] == "active":
            self.tunings.done(under_way.tuning, under_way.report)
            self._take(ready)
        else:
            self.tunings.fail(under_way.tuning, Note("activation.superseded", "it reads no more"))
        self._now = None

    def _fail(self, note: Note) -> None:
        logger.error("the model is run as before", extra={"code": note.code})
        if self._now is not None:
            under_way, self._now = self._now, None
            if under_way.proof is not None:
                under_way.proof.end()
            self.tunings.fail(under_way.tuning, note)
