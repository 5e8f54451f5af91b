"""The commands of a person (``actor``, for the audit) on the models of a box: activate one, roll back, measure again.

They work like the requests of the library: an activation in the journal, a self-test in a process of its own, one transaction at the
switch. The worker of the box does the steps; where none runs, this process takes the worker's lock and does them itself.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final

from appliance.core.domain import Note
from appliance.core.errors import ActivationError, ApplianceError
from appliance.core.process import Lock, is_held_by_another
from appliance.core.self_test_report import SelfTestReport
from appliance.core.states import IN_USE_STATES, PENDING_STATES, ModelState, TuningState
from appliance.core.wakeup import wake
from appliance.lifecycle import model_files
from appliance.lifecycle.activation import Activator
from appliance.lifecycle.exchange import TrustCheck
from appliance.lifecycle.journal import CONFIGURATION, ActivationRequest, Journal, Source
from appliance.lifecycle.journal_queries import PERMANENT_FAILURES, reason_of
from appliance.lifecycle.library_follower import apply_facts
from appliance.lifecycle.trust_facts import TrustFacts
from appliance.store.database import SECURITY_ALERT
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests
from appliance.tuning.selection import Plan
from model_sync.bundle import MANIFEST_NAME, BundleError, ModelBundle

REFERENCE_BUNDLE: Final = "cxr-pneumonia"
ANY_PRECISION: Final = "any"
_POLL_S: Final = 0.02
_WORKER_POLL_S: Final = 0.1

OnProgress = Callable[[sqlite3.Row], None]
"""Called with the row of the activation whenever it was polled."""


def reference_bundle() -> Path:
    """Return the directory of the reference bundle that is part of the package."""
    return Path(str(resources.files("appliance") / "bundles" / REFERENCE_BUNDLE))


def activate(
    store: Store, directory: Path, actor: str, precision: str | None = None, *, again: bool = False,
    on_progress: OnProgress | None = None,
) -> str:  # fmt: skip
    """Make a bundle the active model of its model line; returns its digest.

    ``precision`` is the variant to run from now on even if another one is faster; ``any`` cancels that. When None, an active model keeps
    its precision, and any other model gets the fastest measured one or the most exact one. ``again`` tries a model that failed on this
    device before. A model that is active already is verified and left as it is; if the box's copy is damaged, it is renamed and the bundle
    is installed again.

    Raises:
        ActivationError: the bundle is invalid, too new for this appliance, forbidden or unknown to the signed library, failed on this
            device before, or fails its self-test; the active model stays active.
    """
    journal = Journal(store)
    try:
        bundle = model_files.load(directory)
        _check_precision(bundle, precision)
        is_active = _is_active_as_requested(journal.active(bundle.manifest.name), bundle.digest, precision)
        if is_active and model_files.is_intact(store.settings.data_dir, bundle.digest):
            return bundle.digest
        request = _request(bundle, actor, None if precision == ANY_PRECISION else precision)
        _check_permission(store, journal, request, again=again or is_active)
    except ApplianceError as error:
        store.record(SECURITY_ALERT, actor, "U", "model", 8, **CONFIGURATION, code=error.code)
        raise
    return wait_for_activation(store, journal.start(request), on_progress)


def roll_back(store: Store, name: str | None, actor: str, on_progress: OnProgress | None = None) -> str:
    """Go back to the best earlier model of a line, which need not be named on a box with one active model; returns its digest.

    Raises:
        ActivationError: ``model.no_previous``; or why the previous model is forbidden (``model.withdrawn``, ``model.below_minimum``) or
            cannot be activated (damaged copy, failed self-test). The active model stays active.
    """
    journal = Journal(store)
    current, *others = active_models(store, name)
    if others:
        lines = ", ".join(row["name"] for row in (current, *others))
        raise ActivationError("model.unknown", f"active: {lines}; say which line")
    successors = journal.successors(current["name"], current["digest"])
    if not successors:
        previous = store.database.one(
            "SELECT * FROM models WHERE name = ? AND state = ?", current["name"], ModelState.PREVIOUS.value
        )  # fmt: skip
        restriction = journal.find_restriction(previous["name"], previous["version"]) if previous else None
        note = restriction or Note("model.no_previous", current["name"])
        store.record(SECURITY_ALERT, actor, "U", "model", 8, **CONFIGURATION, code=note.code)
        raise ActivationError(note.code, note.detail)
    best = successors[0]
    origin = model_files.model_dir(store.settings.data_dir, best["digest"])
    report = SelfTestReport.from_json(best["self_test"])
    has_plan = Plan.of(best["precision"], report).candidate is not None
    keep_precision = not has_plan or report.is_fixed_by_user or not store.settings.tune_at_activation
    precision = best["precision"] if keep_precision else None  # else measure again: the box may have changed since
    request = ActivationRequest(best["name"], best["version"], best["digest"], "hand", origin, actor, precision, "rollback")
    return wait_for_activation(store, journal.start(request), on_progress)


def find(store: Store, which: str) -> Path:
    """Find a bundle: ``reference``, a directory, or the version or the first digits of the digest of a model of this box.

    Raises:
        ActivationError: ``model.unknown``: none, or more than one.
    """
    if which == "reference":
        return reference_bundle()
    if Path(which).is_dir():
        return Path(which)
    rows = [row for row in store.models() if row["version"] == which or (len(which) >= 4 and row["digest"].startswith(which))]
    if len(rows) != 1:
        raise ActivationError("model.unknown", f"{which}: {len(rows)} models of this box fit")
    return model_files.model_dir(store.settings.data_dir, rows[0]["digest"])


def wait_for_activation(store: Store, number: int, on_progress: OnProgress | None = None) -> str:
    """Wait until an activation reached its switch, or do its steps where no worker runs; returns the digest of the model.

    Raises:
        ActivationError: it failed, with the coded reason.
    """
    journal = Journal(store)

    def is_done() -> bool:
        row = journal.row(number)
        if on_progress is not None:
            on_progress(row)
        return row["state"] not in PENDING_STATES

    _wait(store, is_done)
    row = journal.row(number)
    if row["state"] not in IN_USE_STATES:
        reason = reason_of(row)
        raise ActivationError(reason.code, reason.detail)
    return str(row["digest"])


def tune(store: Store, name: str | None, actor: str, on_progress: Callable[[TuningRequest], None] | None = None) -> list[str]:
    """Measure the candidates of the active models again, of one model line or of all, and run each model with the best one.

    The models continue to work meanwhile.

    Returns:
        The digests of the models.

    Raises:
        ActivationError: ``model.unknown``: no model is active, or none of that line; or why a measurement failed, after which the
            model runs as before.
    """
    rows = active_models(store, name)
    tunings = TuningRequests(store.database)
    for row in rows:
        tunings.ask(row["digest"], row["name"], actor)

    def is_done() -> bool:
        known = [item for row in rows if (item := tunings.of(row["digest"])) is not None]
        for item in known:
            if on_progress is not None:
                on_progress(item)
        return not any(item.open for item in known)

    _wait(store, is_done)
    for row in rows:
        item = tunings.of(row["digest"])
        if item is not None and item.state == TuningState.FAILED:
            raise ActivationError(item.reason.code if item.reason else "model.self_test", item.reason.detail if item.reason else "")
    return [str(row["digest"]) for row in rows]


def _wait(store: Store, is_done: Callable[[], bool]) -> None:
    """Wait until something is done: by the worker of the box where one runs, else in this process."""
    while not is_done():
        try:
            lock = None if _box_runs(store) else Lock(store.settings.data_dir, "worker")
        except ApplianceError:  # a worker without a supervisor does the work; if it dies, the next worker or this process continues
            lock = None
        if lock is None:
            wake(store.settings)
            time.sleep(_WORKER_POLL_S)
            continue
        try:
            _run_activator(store, is_done)
        finally:
            lock.release()


def _run_activator(store: Store, is_done: Callable[[], bool]) -> None:
    data_dir = store.settings.data_dir
    activator = Activator(store, lambda digest, _plan: model_files.load_copy(data_dir, digest), follow=False)
    try:
        while not is_done():
            activator.tick()
            time.sleep(_POLL_S)
            if _box_runs(store):  # the box was started meanwhile and scans may wait: its worker needs the lock
                return
    finally:
        activator.stop()


def _box_runs(store: Store) -> bool:
    """Whether a supervisor runs: its worker does the work, now or after its restart."""
    return is_held_by_another(store.settings.data_dir, "supervisor")


def _is_active_as_requested(current: sqlite3.Row | None, digest: str, precision: str | None) -> bool:
    """Whether the active model is this one, with the precision setting (fixed by a person, or free) that is requested now."""
    if current is None or current["digest"] != digest:
        return False
    is_fixed = SelfTestReport.from_json(current["self_test"]).is_fixed_by_user
    if precision is None:
        return True
    return not is_fixed if precision == ANY_PRECISION else is_fixed and current["precision"] == precision


def _request(bundle: ModelBundle, actor: str, precision: str | None) -> ActivationRequest:
    manifest = bundle.manifest
    is_embedded = hashlib.sha256((reference_bundle() / MANIFEST_NAME).read_bytes()).hexdigest() == bundle.digest
    source: Source = "embedded" if is_embedded else "hand"
    return ActivationRequest(manifest.name, manifest.version, bundle.digest, source, bundle.directory, actor, precision)


def _check_precision(bundle: ModelBundle, precision: str | None) -> None:
    """Refuse a precision that the bundle does not have before anything is begun; raises ActivationError ``model.precision``."""
    if precision == ANY_PRECISION:
        return
    try:
        bundle.variant(precision)
    except BundleError as error:
        raise ActivationError("model.precision", error.message) from error


def _check_permission(store: Store, journal: Journal, request: ActivationRequest, *, again: bool) -> None:
    """Refuse what the library forbids or does not know, and what failed on this device before; raises ActivationError."""
    facts = _check_trust(store) if request.source != "embedded" and store.settings.library_root is not None else None
    if facts is not None:
        facts = apply_facts(store, journal, facts)
    note = journal.find_restriction(request.name, request.version)
    if note is None and facts is not None:
        note = facts.find_refusal(request.name, request.version, request.digest)
    if note is not None:
        raise ActivationError(note.code, note.detail)
    failed = journal.find_blocking_failure(request.digest)
    if failed is not None and failed.code in PERMANENT_FAILURES and not again:
        raise ActivationError("activation.failed_before", failed.code)


def _check_trust(store: Store) -> TrustFacts:
    """Run the check of the library's metadata and wait for it: this is a command of a person, not the worker."""
    settings = store.settings
    if settings.exchange_dir is None or settings.library_root is None:
        return TrustFacts(ok=False, code="model.not_signed", message="library_root is set but exchange_dir is not")
    check = TrustCheck(settings.exchange_dir, settings.library_root)
    while (facts := check.poll()) is None:
        time.sleep(_POLL_S)
    return facts


def active_models(store: Store, name: str | None = None) -> list[sqlite3.Row]:
    """List the active models by name, of one model line or of all; raises ActivationError ``model.unknown`` that lists the lines."""
    active = sorted((row for row in store.models() if row["state"] == ModelState.ACTIVE), key=lambda row: str(row["name"]))
    rows = [row for row in active if name in (None, row["name"])]
    if not rows:
        lines = ", ".join(row["name"] for row in active) or "none"
        raise ActivationError("model.unknown", f"{name}: no model is active; active: {lines}" if name else "no model is active")
    return rows
