"""The models of the worker: each is loaded, loading in the background, or failed with a reason.

What runs each model and why is written to the store, where the pages and the report to the centre read it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from appliance.core.domain import JobState, Note
from appliance.core.errors import ActivationError, ApplianceError, InferenceError
from appliance.core.process import release_memory
from appliance.core.self_test_report import SelfTestReport
from appliance.inference.model_session import RETRY_S, ModelSession
from appliance.inference.remote_runtime import REMOTE_RUNTIMES
from appliance.lifecycle.background_loader import Load, Loading
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequests
from appliance.tuning.selection import Plan

logger = logging.getLogger(__name__)

# How long the first scans wait for a remote runtime before the baseline takes over. A small box needs up to two seconds itself to load
# the client and to check the golden cases on a healthy server.
CONNECT_WAIT_S: Final = 3.0
# A remote runtime that has been unreachable for this long: measure what this box can run itself.
MEASURE_AFTER_S: Final = 3600.0
_DROP_INTERVAL_S: Final = 1.0


@dataclass(frozen=True)
class _Failure:
    """Why a model could not be loaded.

    Attributes:
        retry_at: when a remote model is loaded again (monotonic clock); None for a local model, which its next job loads again.
    """

    error: ApplianceError
    retry_at: float | None


class ModelPool:
    """Loads, keeps and closes the models of one worker process.

    Args:
        request_tuning: requests that a model (by digest) is measured again.
        wait_s: how long to wait for a remote runtime before the baseline takes over.
    """

    def __init__(self, store: Store, request_tuning: Callable[[str], None], wait_s: float = CONNECT_WAIT_S) -> None:
        self._store, self._request_tuning, self._wait_s = store, request_tuning, wait_s
        self._tunings = TuningRequests(store.database)
        self.sessions: dict[str, ModelSession] = {}
        self._loading: dict[str, Loading] = {}
        self._failures: dict[str, _Failure] = {}
        self._recorded: dict[str, Note | None] = {}
        self._crashed: set[str] = set()
        self._next_drop = 0.0

    @property
    def is_loading(self) -> bool:
        """Whether a remote model is being loaded in the background."""
        return bool(self._loading)

    @property
    def held(self) -> set[str]:
        """Digests of the models whose jobs must wait: no runtime is available yet, or the connection is being opened."""
        return set(self._loading) | {digest for digest, session in self.sessions.items() if session.lost is not None}

    def skip_tuned_runtime(self, digests: Collection[str]) -> None:
        """Skip the tuned runtime for models whose load crashed the previous worker; they are measured again."""
        self._crashed |= set(digests)

    def load_active(self) -> None:
        """Load and warm up every active model that is absent, a remote one in the background; close models that nobody needs."""
        active = self._active()
        self._drop_unused(active)
        for digest in active - set(self.sessions) - set(self._loading) - set(self._failures):
            if self._is_remote(digest):
                self._load_in_background(digest)
                continue
            with suppress(ApplianceError):  # recorded and logged; its jobs fail with this reason, the other models continue
                self.get(digest)
            release_memory()

    def update(self) -> None:
        """Collect the models that were loaded in the background, retry remote runtimes, close unused models. Never waits."""
        for session in self.sessions.values():
            session.retry_remote()
            if session.fallback_s >= MEASURE_AFTER_S:
                self._request_tuning(session.digest)
        self._collect_loaded()
        self._retry_failed()
        self.record_changes()
        if time.monotonic() >= self._next_drop and len(self.sessions) > 1:
            self._next_drop = time.monotonic() + _DROP_INTERVAL_S
            self._drop_unused(self._active())

    def record_changes(self) -> None:
        """Store what runs a remote model since the last inference; load models again whose runtime was lost."""
        for session in list(self.sessions.values()):
            if session.lost is not None:
                self._reload(self.sessions.pop(session.digest), session.lost)
            elif session.is_remote and self._recorded.get(session.digest) != session.fallback:
                self._record(session)

    def _reload(self, lost: ModelSession, error: InferenceError) -> None:
        """Open a new session in the background; the jobs of the model wait for it."""

        def load(digest: str, plan: Plan) -> ModelSession:
            lost.close(wait=True)  # otherwise the old session could unload the new model on the server
            return ModelSession(self._store.settings, digest, plan)

        self._tunings.record_cannot_run(lost.digest, Note(error.code, error.detail))
        self._load_in_background(lost.digest, load)

    def _collect_loaded(self) -> None:
        for digest in [digest for digest, loading in self._loading.items() if loading.done()]:
            try:
                session = self._loading.pop(digest).take()
            except ActivationError as error:
                self._fail(digest, error, time.monotonic() + RETRY_S)
                continue
            assert isinstance(session, ModelSession)
            if digest in self.sessions:  # activated anew meanwhile
                session.close()
            else:
                self.use(session)

    def _retry_failed(self) -> None:
        now = time.monotonic()
        due = {digest for digest, failure in self._failures.items() if failure.retry_at is not None and now >= failure.retry_at}
        if not due:
            return
        needed = self._queued() | self._active()
        for digest in due:
            del self._failures[digest]
            if digest in needed:
                self._load_in_background(digest)

    def _drop_unused(self, active: set[str]) -> None:
        """Close models that are not active; one that was replaced stays for as long as a queued job names it."""
        if not set(self.sessions) - active:
            return
        for digest in set(self.sessions) - active - self._queued():
            self.sessions.pop(digest).close()
            release_memory()

    def get(self, digest: str) -> ModelSession:
        """Return a model, loaded first if necessary; raises ApplianceError if that fails, or failed and the next try is not due."""
        if (session := self.sessions.get(digest)) is not None:
            return session
        failure = self._failures.get(digest)
        if failure is not None and failure.retry_at is not None:
            raise InferenceError(failure.error.code, failure.error.detail)
        crash = Note("runtime.crashed", "the worker died while it loaded the model") if digest in self._crashed else None
        try:
            session = ModelSession(self._store.settings, digest, self._plan(digest), crash, wait_s=self._wait_s)
        except ApplianceError as error:
            self._fail(digest, error, None)
            raise
        self.use(session)
        return session

    def use(self, session: ModelSession) -> None:
        """Use this session for its model from now on."""
        previous = self.sessions.get(session.digest)
        if previous is not None and previous is not session:
            previous.close()
        self.sessions[session.digest] = session
        self._failures.pop(session.digest, None)
        self._record(session)

    def load(self, digest: str, plan: Plan) -> ModelSession:
        """Load a new model, or return the session that runs it as planned. Called in a thread, while the other models continue to work."""
        session = self.sessions.get(digest)
        if session is not None and session.fallback is None and session.plan == plan:
            return session
        return ModelSession(self._store.settings, digest, plan)

    def load_successor(self, digest: str, plan: Plan) -> ModelSession:
        """Load a model that replaces one which must not be used any more: do not wait for a remote runtime for long."""
        session = self.sessions.get(digest)
        if session is not None and session.plan == plan:
            return session
        return ModelSession(self._store.settings, digest, plan, wait_s=self._wait_s)

    def _load_in_background(self, digest: str, load: Load | None = None) -> None:
        settings, wait_s = self._store.settings, self._wait_s
        self._loading[digest] = Loading(
            load or (lambda digest, plan: ModelSession(settings, digest, plan, wait_s=wait_s)), digest, self._plan(digest)
        )

    def _fail(self, digest: str, error: ApplianceError, retry_at: float | None) -> None:
        """Record that nothing runs a model, and have it measured: another candidate may run."""
        logger.error("model not ready", extra={"code": error.code})
        self._failures[digest] = _Failure(error, retry_at)
        self._tunings.record_cannot_run(digest, Note(error.code, error.detail))
        self._request_tuning(digest)

    def _record(self, session: ModelSession) -> None:
        """Store what runs a model; where that is not what was chosen, have it measured again, or retry its remote runtime."""
        self._recorded[session.digest] = session.fallback
        if session.fallback is None:
            self._tunings.record_chosen(session.digest, session.describe())
            return
        self._tunings.record_fallback(session.digest, session.fallback, session.describe())
        if not session.is_remote:
            self._request_tuning(session.digest)

    def _plan(self, digest: str) -> Plan:
        row = self._store.model(digest)
        return Plan.of(row["precision"], SelfTestReport.from_json(row["self_test"]))

    def _is_remote(self, digest: str) -> bool:
        """Whether loading the model may have to wait for another machine."""
        candidate, configured = self._plan(digest).candidate, self._store.settings.triton_url
        is_configured = candidate is not None and candidate.runtime in REMOTE_RUNTIMES and candidate.provider == configured != ""
        return is_configured and digest not in self._crashed

    def _active(self) -> set[str]:
        return {row["digest"] for row in self._store.models() if row["state"] == "active"}

    def _queued(self) -> set[str]:
        """Digests of the models that queued jobs name."""
        rows = self._store.database.query("SELECT model_digest FROM jobs WHERE state = ?", JobState.QUEUED.value)
        return {row["model_digest"] for row in rows}
