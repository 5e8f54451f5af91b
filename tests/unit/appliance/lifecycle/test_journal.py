"""The journal under random life: whatever comes in whatever order, killed before or after any transaction, one good model or none reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.core.attempts import MAX_ATTEMPTS
from appliance.core.domain import Note
from appliance.core.errors import ActivationError
from appliance.core.self_test_report import SelfTestReport
from appliance.core.settings import Settings
from appliance.core.states import PENDING_STATES, ActivationState
from appliance.lifecycle.journal import ActivationRequest, Journal
from appliance.lifecycle.model_control import reference_bundle
from appliance.store.database import Database
from appliance.store.store import Store
from model_sync.bundle import Manifest

LINE = "cxr-pneumonia"
VERSIONS = tuple(f"1.{number}.0" for number in range(5))
MANIFEST = Manifest.parse((reference_bundle() / "manifest.json").read_bytes())
REPORT = SelfTestReport(precision="fp32", runtime="onnxruntime 1", median_ms=1.0)


VERSIONS_DIGESTS = {version.replace(".", "").zfill(64) for version in VERSIONS}


class KilledError(Exception):
    """The process is gone at this moment."""


def digest(version: str) -> str:
    return version.replace(".", "").zfill(64)


class Life(RuleBasedStateMachine):
    """One line's life. ``kill`` strikes before the transaction began, before it was committed, or right after."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="journal-"))
        self.open()
        self.ended: dict[int, str] = {}
        self.minimum = "0.0.0"
        self.withdrawn: set[str] = set()

    def open(self) -> None:
        self.store = Store(Settings.parse({"data_dir": self.directory}))
        self.journal = Journal(self.store)

    def teardown(self) -> None:
        self.store.database.verify_audit()
        self.store.close()
        shutil.rmtree(self.directory)

    def do(self, change: Callable[[], object], kill: str) -> None:
        """One change of the journal; the process may be killed in it, and starts again then."""
        real = Database.transaction

        @contextmanager
        def struck(database: Database, *, durable: bool = True) -> Iterator[Any]:
            if kill == "before":
                raise KilledError
            with real(database, durable=durable) as tx:
                yield tx
                if kill == "inside":
                    raise KilledError
            if kill == "after":
                raise KilledError

        Database.transaction = struck  # type: ignore[method-assign]
        try:
            change()
        except KilledError:
            self.store.close()
            Database.transaction = real  # type: ignore[method-assign]
            self.open()
        except ActivationError:
            pass  # refused: nothing may have changed, which the invariants see
        finally:
            Database.transaction = real  # type: ignore[method-assign]

    KILL = st.sampled_from(["", "", "", "before", "inside", "after"])

    @initialize()
    def first(self) -> None:
        self.enter("1.0.0", "activate", "")
        self.prove("")
        self.switch("")

    @rule(version=st.sampled_from(VERSIONS), purpose=st.sampled_from(["activate", "activate", "rollback"]), kill=KILL)
    def enter(self, version: str, purpose: Any, kill: str) -> None:
        if self.journal.find_restriction(LINE, version) is None:
            wish = ActivationRequest(LINE, version, digest(version), "hand", Path("/nowhere"), "test", None, purpose)
            self.do(lambda: self.journal.start(wish), kill)

    def coming(self) -> Any:
        return self.journal.pending()

    @precondition(lambda self: self.coming() is not None)
    @rule(kill=KILL)
    def begin(self, kill: str) -> None:
        self.do(lambda: self.journal.begin_attempt(self.coming()["id"]), kill)

    @precondition(lambda self: self.coming() is not None)
    @rule(kill=KILL)
    def prove(self, kill: str) -> None:
        number = self.coming()["id"]
        for state in (ActivationState.BUILDING, ActivationState.SELF_TEST):
            self.do(lambda state=state: self.journal.set_state(number, state), kill)
        self.do(lambda: self.journal.record_self_test(number, REPORT), kill)

    @precondition(lambda self: self.coming() is not None and self.coming()["self_test"])
    @rule(kill=KILL)
    def switch(self, kill: str) -> None:
        row = self.coming()
        manifest = MANIFEST.model_copy(update={"version": row["version"]})
        forbidden = self.journal.find_restriction(LINE, row["version"])
        self.do(lambda: self.journal.switch(row["id"], manifest), kill)
        if forbidden:
            assert self.journal.row(row["id"])["state"] in PENDING_STATES

    @precondition(lambda self: self.coming() is not None)
    @rule(kill=KILL)
    def fail(self, kill: str) -> None:
        self.do(lambda: self.journal.fail(self.coming()["id"], Note("model.self_test")), kill)

    def trial(self) -> Any:
        return next((row for row in self.journal.monitored() if row["state"] == "trial"), None)

    def successor(self, name_digest: str) -> str | None:
        return next((row["digest"] for row in self.journal.successors(LINE, name_digest)), None)

    @precondition(lambda self: self.trial() is not None)
    @rule(kill=KILL)
    def pass_trial(self, kill: str) -> None:
        row = self.trial()
        self.do(lambda: self.journal.complete_trial(row["id"], json.loads(row["trial"])), kill)

    @precondition(lambda self: self.trial() is not None)
    @rule(kill=KILL)
    def roll_back(self, kill: str) -> None:
        row = self.trial()
        self.do(lambda: self.journal.roll_back(row["id"], Note("activation.failures"), self.successor(row["digest"])), kill)

    @rule(minimum=st.sampled_from(VERSIONS), gone=st.sets(st.sampled_from(VERSIONS), max_size=1), kill=KILL)
    def restrict(self, minimum: str, gone: set[str], kill: str) -> None:
        self.do(lambda: self.journal.record_restrictions(LINE, minimum, dict.fromkeys(gone, "why")), kill)

    @rule(kill=KILL)
    def guard(self, kill: str) -> None:
        """What the worker does at its start and with every tick."""
        for model, note in self.journal.find_withdrawn():
            self.do(lambda m=model, n=note: self.journal.withdraw(m["digest"], n, self.successor(m["digest"])), kill)

    @rule(kill=KILL)
    def restart(self, kill: str) -> None:
        def start() -> None:
            for row in self.journal.count_worker_crash(VERSIONS_DIGESTS):
                self.journal.roll_back(row["id"], Note("activation.reboot_loop"), self.successor(row["digest"]))

        self.do(start, kill)

    # -- what always holds -------------------------------------------------------------------------------------------

    def rows(self, table: str) -> list[Any]:
        return self.store.database.query(f"SELECT * FROM {table}")  # noqa: S608 - names of this file

    @invariant()
    def one_model_reads_or_none_with_a_reason(self) -> None:
        active = [row for row in self.rows("models") if row["state"] == "active"]
        assert len(active) <= 1
        if not active and self.rows("models"):
            ends = {row["state"] for row in self.rows("activations") if row["reason"]}
            assert ends & {"rolled-back", "withdrawn"}

    @invariant()
    def what_reads_was_proven_and_not_taken_back(self) -> None:
        for model in self.rows("models"):
            if model["state"] == "active":
                states = [row["state"] for row in self.rows("activations") if row["digest"] == model["digest"]]
                assert set(states) & {"trial", "good"}
                assert "withdrawn" not in states

    @invariant()
    def a_trial_is_of_the_model_that_reads(self) -> None:
        active = {row["digest"] for row in self.rows("models") if row["state"] == "active"}
        trials = [row["digest"] for row in self.rows("activations") if row["state"] == "trial"]
        assert len(trials) <= 1
        assert set(trials) <= active

    @invariant()
    def withdrawn_is_withdrawn_after_the_next_tick(self) -> None:
        self.guard("")
        for model in self.rows("models"):
            if model["state"] == "active":
                withdrawn = [json.loads(row["withdrawn"]) for row in self.rows("model_lines")]
                assert not any(model["version"] in line for line in withdrawn)

    @invariant()
    def attempts_end(self) -> None:
        assert all(row["attempts"] <= MAX_ATTEMPTS for row in self.rows("activations") if row["state"] in PENDING_STATES)

    @invariant()
    def an_end_stays_an_end(self) -> None:
        for row in self.rows("activations"):
            if row["state"] in ("failed", "rolled-back", "withdrawn"):
                assert row["reason"]
                assert row["ended_at"]
            if self.ended.get(row["id"]) in ("failed", "withdrawn"):
                assert row["state"] == self.ended[row["id"]]
            self.ended[row["id"]] = row["state"]

    @invariant()
    def what_is_forbidden_only_becomes_more(self) -> None:
        for line in self.rows("model_lines"):
            gone = set(json.loads(line["withdrawn"]))
            assert gone >= self.withdrawn
            assert VERSIONS.index(line["minimum_version"]) >= (VERSIONS.index(self.minimum) if self.minimum in VERSIONS else 0)
            self.withdrawn, self.minimum = gone, line["minimum_version"]


Life.TestCase.settings = hypothesis_settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLife = Life.TestCase
