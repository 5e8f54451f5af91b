"""Putting a model to work, step by step, while the one before it goes on reading: the state machine that the worker steps.

``tick()`` comes between two jobs and never waits: proof, check and loading go on in processes and a thread of their own, and each
tick only looks how far they are. What counts is in the journal: whatever dies at whatever moment, the next start goes on from there.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

from appliance.core.child_process import plain
from appliance.core.domain import Note
from appliance.core.errors import ActivationError, StoreError
from appliance.lifecycle import trial_monitor
from appliance.lifecycle.background_loader import Load, Loading, Ready
from appliance.lifecycle.exchange import Check, Exchange
from appliance.lifecycle.journal import Journal
from appliance.lifecycle.journal_queries import PROVING
from appliance.lifecycle.library_follower import Follower, learn
from appliance.lifecycle.retuning import Retuner
from appliance.lifecycle.self_test_process import Proof, order
from appliance.lifecycle.trust_facts import Facts
from appliance.store.database import SECURITY_ALERT
from appliance.store.store import Store
from appliance.tuning.selection import Plan
from model_sync.bundle import Manifest

logger = logging.getLogger(__name__)
# By hand the person is told by the command itself.
_quiet = logging.getLogger(f"{__name__}.by_hand")
_quiet.setLevel(logging.CRITICAL)

_TICK_S: Final = 0.25
_BUSY_TICK_S: Final = 0.02
_JUDGE_EVERY_S: Final = 1.0
_AFTER_ERROR_S: Final = 5.0
_AFTER_FAULT_S: Final = 60.0
_PROGRESS_STEP: Final = 0.02
_DETAIL: Final = 500


@dataclass
class _Coming:
    """The activation at hand, and what goes on for it now."""

    number: int
    proof: Proof | None = None
    said: list[dict[str, Any]] = field(default_factory=list)
    told: float = 0.0
    loading: Loading | None = None
    ready: Ready | None = None
    check: Check | None = None
    facts: Facts | None = None

    def end(self) -> None:
        """Stop what goes on for it."""
        for child in (self.proof, self.check):
            if child is not None:
                child.end()


@dataclass
class _Takeover:
    """A model that has to stop reading, and who is tried in its place; ``number`` is its trial, None when it is withdrawn."""

    model: sqlite3.Row
    note: Note
    number: int | None
    tried: set[str] = field(default_factory=set)
    trying: str = ""
    loading: Loading | None = None


class Activator:
    """The state machine over one store, for the one process that holds the worker's lock.

    Args:
        store: the box's store.
        load: loads a model beside the one that reads; called in a thread.
        take: given a loaded model in the moment it is put to work.
        load_now: loads one that takes over where nothing reads until it is there; ``load`` by default.
        follow: whether the library is followed; by hand only what was asked for is done, and a disk that fails ends it.
        clock: seconds that only rise.

    Attributes:
        journal: the journal.
        retuner: measures models at work again, when nothing else is to be done.
        held: digests of models that must not read any more, until somebody took over from them.
    """

    def __init__(
        self,
        store: Store,
        load: Load,
        take: Callable[[Any], None] = lambda _ready: None,
        *,
        load_now: Load | None = None,
        follow: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._load, self._load_now = load, load_now or load
        self._take = take
        self._clock = clock
        self._patient = follow
        self._log = logger if follow else _quiet
        self.journal = Journal(store)
        exchange = Exchange(store, store.settings.exchange_dir) if store.settings.exchange_dir and follow else None
        self._follower = Follower(store, self.journal, exchange, clock) if exchange else None
        self.retuner = Retuner(store, self.journal, load, take, clock)
        self._coming: _Coming | None = None
        self._takeovers: dict[str, _Takeover] = {}
        self._notes_left = True
        self._next = self._next_judgement = self._follow_from = 0.0
        self.held: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do now, other than to watch."""
        following = self._follower is not None and self._follower.busy
        coming = self._coming or self._takeovers or self._notes_left or self.journal.coming()
        return bool(coming or following or self.retuner.busy)

    @property
    def proof_pid(self) -> int | None:
        """The process that proves a model now."""
        return self._coming.proof.pid if self._coming and self._coming.proof else None

    def recover(self, at_work: Collection[str] = ()) -> list[str]:
        """At a worker's start, before any model is loaded: a version the worker keeps dying of, or a withdrawn one, reads no more.

        Args:
            at_work: what the worker was reading with when it fell, see :meth:`Journal.at_work`; empty after an orderly end.

        Returns:
            Digests of the models that the worker fell over while it loaded them.
        """
        for row in self.journal.watched():
            self._count(row)
        coming = self.journal.coming()
        if at_work and coming is not None and coming["self_test"] is None:  # it fell of what it read, not of the proof beside
            self.journal.pause([coming["id"]])
        active = [row["digest"] for row in self._store.models() if row["state"] == "active"]
        fell_over = self.journal.loading(active)
        for row in self.journal.worker_fell({*at_work, *fell_over}):
            model = self._store.model(row["digest"])
            note = Note("activation.reboot_loop", f"{row['attempts']} falls of the worker without a finished case")
            self._takeovers[row["digest"]] = _Takeover(model, note, row["id"])
        self._guard()
        while self._takeovers:
            self._take_over()
            time.sleep(_BUSY_TICK_S)
        return fell_over

    def ready(self) -> None:
        """The worker has loaded its models, and lives."""
        self.journal.loading(())

    def tick(self) -> None:
        """Go on as far as nothing has to be waited for; a disk that fails now is tried again in some seconds.

        Raises:
            StoreError: by hand, what could not be written; the activation is where it was.
        """
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (_BUSY_TICK_S if self._coming or self._takeovers else _TICK_S)
        try:
            self._follow(lambda follower: follower.look())
            self._guard()
            self._take_over()
            if not self._takeovers:  # who takes over may be just whom the library wants
                self._follow(lambda follower: follower.begin())
            self._step()
            self.retuner.tick(free=not (self._coming or self._takeovers))
            if now >= self._next_judgement:
                self._next_judgement = now + _JUDGE_EVERY_S
                self._judge()
            if self._notes_left:
                self._notes_left = self.journal.mark_findings()
            self._follow(lambda follower: follower.report())
        except StoreError as error:
            if not self._patient:
                raise
            self._log.error("the journal of models cannot be kept", extra={"code": error.code})
            self._next = now + _AFTER_ERROR_S

    def look(self) -> None:
        """In the middle of a batch or a series: only what must not read any more. Nothing is loaded, put to work or closed."""
        try:
            self._follow(lambda follower: follower.look())
            self._guard()
        except StoreError as error:  # the next tick meets it again
            self._log.error("the journal of models cannot be kept", extra={"code": error.code})

    def stop(self) -> None:
        """The box is being stopped in order: end what goes on, to be begun again at the next start."""
        begun = [self._coming.number] if self._coming is not None else []
        if self._coming is not None:
            self._coming.end()
            self._coming = None
        try:
            self.retuner.stop()
            self.journal.pause(begun)
            if self._follower is not None:
                self._follower.stop()
        except StoreError as error:
            self._log.error("the journal of models cannot be kept", extra={"code": error.code})

    def _follow(self, step: Callable[[Follower], None]) -> None:
        """Following the library goes on beside the reading: whatever is wrong there, and foreseen by nobody, must not stop it."""
        if self._follower is None or self._clock() < self._follow_from:
            return
        try:
            step(self._follower)
        except StoreError:
            raise
        except Exception:  # another account's files are behind it
            logger.exception("the library cannot be followed", extra={"code": "exchange.invalid"})
            self._follow_from = self._clock() + _AFTER_FAULT_S

    # -- what comes --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        row = self.journal.coming()
        if self._coming is not None and (row is None or row["id"] != self._coming.number):  # it gave way to another
            self._coming.end()
            self._coming = None
        if row is None:
            return
        try:
            if self._coming is None:
                self._begin(row)
            elif self._coming.proof is not None:
                self._listen(row, self._coming, self._coming.proof)
            elif self._coming.ready is None:
                self._beside(row, self._coming)
            elif self._coming.facts is None and self._needs_facts(row):
                self._ask(row, self._coming)
            else:
                self._switch(row, self._coming.ready)
        except ActivationError as error:
            self._fail(row, Note(error.code, error.detail))

    def _begin(self, row: sqlite3.Row) -> None:
        if not self.journal.begin(row["id"]):
            return
        settings = self._store.settings
        line = order(settings, row["origin"], row["digest"], row["precision"], self.journal.kept())
        try:
            self._coming = _Coming(row["id"], Proof(line, settings.activation_deadline_s))
        except OSError as error:  # no process to be had: an attempt like any other, begun again with the next tick
            self._log.error("the proof cannot be started", extra={"status": error.errno})

    def _listen(self, row: sqlite3.Row, coming: _Coming, proof: Proof) -> None:
        messages, ended = proof.messages()
        coming.said += messages
        while coming.said:  # forgotten only once it is in the journal
            message = coming.said[0]
            if "failed" in message:
                failed = message["failed"]
                raise ActivationError(failed["code"], plain(failed["detail"], _DETAIL))
            if "result" in message:
                self.journal.proved(row["id"], message["result"])
                proof.end()
                coming.proof = None
                return
            self._follow_progress(coming, message)
            coming.said.pop(0)
        if ended:
            self._log.error("the proof died", extra={"exit_code": proof.exit_code, "state": row["state"]})
            proof.end()
            self._coming = None  # begun again by the next tick, or given up
        elif proof.late():
            raise ActivationError("activation.deadline", f"more than {self._store.settings.activation_deadline_s:.0f} s in {row['state']}")

    def _follow_progress(self, coming: _Coming, message: dict[str, Any]) -> None:
        now, state, progress = self.journal.row(coming.number), message["state"], float(message["progress"])
        if state != now["state"] and PROVING.index(state) > PROVING.index(now["state"]):
            self.journal.advance(coming.number, state)
            coming.told = 0.0
        elif state == now["state"] and progress >= coming.told + _PROGRESS_STEP:
            self.journal.progress(coming.number, progress)
            coming.told = progress

    def _beside(self, row: sqlite3.Row, coming: _Coming) -> None:
        """Load it in a thread, beside the one that reads."""
        if coming.loading is None:
            coming.loading = Loading(self._load, row["digest"], Plan.of(None, json.loads(row["self_test"])))
        elif coming.loading.done():
            coming.ready = coming.loading.take()

    def _needs_facts(self, row: sqlite3.Row) -> bool:
        """What came with the box, or read patients on it before, needs no library's word; what is forbidden stays so."""
        return self._store.settings.library_root is not None and row["source"] != "embedded" and row["purpose"] == "activate"

    def _ask(self, row: sqlite3.Row, coming: _Coming) -> None:
        """The library's word once more, right before the switch: it may have changed, or expired, since the download."""
        settings = self._store.settings
        if settings.exchange_dir is None or settings.library_root is None:
            raise ActivationError("model.not_signed", "no exchange_dir is set")
        if coming.check is None:
            try:
                coming.check = Check(settings.exchange_dir, settings.library_root)
            except OSError as error:
                raise ActivationError("trust.unchecked", str(error)) from error
        facts = coming.check.facts()
        if facts is None:
            return
        coming.facts = self._follower.learned(facts) if self._follower is not None else learn(self._store, self.journal, facts)
        if note := coming.facts.refusal(row["name"], row["version"], row["digest"]):
            raise ActivationError(note.code, note.detail)

    def _switch(self, row: sqlite3.Row, ready: Ready) -> None:
        if (ready.manifest.name, ready.manifest.version) != (row["name"], row["version"]):
            raise ActivationError("model.mismatch", f"it is {ready.manifest.name} {ready.manifest.version}")
        self.journal.switch(row["id"], ready.manifest)
        self._take(ready)
        self._coming = None
        self._log.info("model put to work", extra={"state": self.journal.row(row["id"])["state"]})

    def _fail(self, row: sqlite3.Row, note: Note) -> None:
        self._log.error("model not put to work", extra={"code": note.code, "state": row["state"]})
        self.journal.fail(row["id"], note)
        if self._coming is not None:
            self._coming.end()
            self._coming = None

    # -- what is at work ---------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        for row in self.journal.watched():
            if row["digest"] in self._takeovers:
                continue
            manifest, seen, trial = self._count(row)
            bad = trial_monitor.out_of_bounds(seen, manifest.watch, trial_monitor.bound_ms(json.loads(row["self_test"])))
            if bad is not None and row["state"] == "good":
                self.journal.alarmed(row["id"], trial, bad)
            elif bad is not None:
                self._log.error("model taken back", extra={"code": bad.code})
                self._takeovers[row["digest"]] = _Takeover(self._store.model(row["digest"]), bad, row["id"])
            elif trial_monitor.is_over(seen, manifest.watch, trial["since"]):
                self.journal.passed(row["id"], trial)

    def _count(self, row: sqlite3.Row) -> tuple[Manifest, trial_monitor.Statistics, dict[str, Any]]:
        """What a watched model did so far; kept in the journal when it changed."""
        manifest, known = Manifest.model_validate_json(row["manifest"]), json.loads(row["trial"])
        seen = trial_monitor.measure(self._store.database, row["digest"], manifest, known["after_job"], known.get("way_after_job", 0))
        trial = known | seen.to_json()
        if trial != known:
            self.journal.observed(row["id"], trial, case_finished=seen.cases > known["cases"])
        return manifest, seen, trial

    def _guard(self) -> None:
        """A version that its line withdrew reads no more from this moment on, though its successor is not loaded yet."""
        for model, note in self.journal.withdrawn():
            known = self._takeovers.get(model["digest"])
            if model["state"] != "active":
                self.journal.withdraw(model["digest"], note, None)
                self._notes_left = True
            elif known is None or known.number is not None:
                self._takeovers[model["digest"]] = _Takeover(model, note, None)
        self.held = {digest for digest, takeover in self._takeovers.items() if takeover.number is None}

    def _take_over(self) -> None:
        for digest, takeover in list(self._takeovers.items()):
            successors = [row for row in self.journal.successors(takeover.model["name"], digest) if row["digest"] not in takeover.tried]
            if not successors:
                self._replace(digest, takeover, None)
            elif takeover.loading is None:
                takeover.trying = successors[0]["digest"]
                plan = Plan.of(successors[0]["precision"], json.loads(successors[0]["self_test"]))
                takeover.loading = Loading(self._load_now, takeover.trying, plan)
            elif takeover.loading.done():
                self._try(digest, takeover, takeover.loading, successors[0]["digest"])

    def _try(self, digest: str, takeover: _Takeover, loading: Loading, successor: str) -> None:
        takeover.loading = None
        try:
            ready = loading.take()
        except ActivationError as error:
            takeover.tried.add(takeover.trying)
            self._store.record(SECURITY_ALERT, "worker", "E", f"model:{takeover.trying[:12]}", 8, code=error.code)
            return
        if ready.digest == successor:  # else another choice is right since the library spoke meanwhile
            self._replace(digest, takeover, ready)

    def _replace(self, digest: str, takeover: _Takeover, ready: Ready | None) -> None:
        successor = ready.digest if ready is not None else None
        try:
            if takeover.number is None:
                self.journal.withdraw(digest, takeover.note, successor)
            else:
                self.journal.roll_back(takeover.number, takeover.note, successor)
        except ActivationError as error:  # it was taken back, or another took its place, in between
            self._log.warning("no takeover", extra={"code": error.code})
        else:
            self._notes_left = True
            if ready is not None:
                self._take(ready)
        del self._takeovers[digest]
        self.held.discard(digest)
