"""The models of a box, by hand: put one to work, go back to the one before, and see what happened.

The way is the same as the library's: an entry in the journal, a proof in a process of its own, one transaction at the switch. Where
a worker runs it does all that; where none does, this process takes the worker's lock and does it itself.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from appliance.core.domain import Note
from appliance.core.errors import ActivationError, ApplianceError
from appliance.core.process import Lock, is_held_by_another
from appliance.core.wakeup import wake
from appliance.lifecycle import model_files
from appliance.lifecycle.activation import Activator
from appliance.lifecycle.exchange import Check
from appliance.lifecycle.journal import Journal, Wanted
from appliance.lifecycle.journal_queries import LASTING, PROVING
from appliance.lifecycle.library_follower import learn
from appliance.lifecycle.trust_facts import Facts
from appliance.store.database import SECURITY_ALERT
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests
from appliance.tuning.selection import Plan
from model_sync.bundle import MANIFEST_NAME, BundleError, Manifest, ModelBundle

REFERENCE_BUNDLE: Final = "cxr-pneumonia"
ANY_PRECISION: Final = "any"
_POLL_S: Final = 0.02
_ASK_WORKER_S: Final = 0.1

Told = Callable[[sqlite3.Row], None]


@dataclass(frozen=True)
class Whole:
    """A model that is whole on the disk; enough to put it to work where no worker runs that could load it."""

    manifest: Manifest
    digest: str


def reference_bundle() -> Path:
    """The reference bundle that ships inside the package."""
    return Path(str(resources.files("appliance") / "bundles" / REFERENCE_BUNDLE))


def installed(store: Store, digest: str) -> ModelBundle:
    """The box's own copy of a model it knows, its digests checked; raises ActivationError or StoreError ``model.unknown``."""
    store.model(digest)
    return model_files.own_copy(store.settings.data_dir, digest)


def activate(
    store: Store, directory: Path, actor: str, precision: str | None = None, *, again: bool = False, told: Told | None = None
) -> str:
    """Make a bundle the active model of its name.

    Args:
        store: the box's store.
        directory: the bundle.
        actor: who asked for it, for the audit.
        precision: variant to run from now on, whatever is faster; ``any`` takes that back. With None it stays as it was for a model
            that is active already, else what is measured to be fastest is taken, or the most exact.
        again: try it though it failed on this device before.
        told: called with the journal's entry as it goes on.

    Returns:
        The model's digest. A model that is active already is verified and left as it is; when the box's copy of it is damaged,
        that copy is moved aside and the bundle installed again.

    Raises:
        ActivationError: the bundle is invalid, too new for this appliance, forbidden or not known to the signed library, failed here
            before, or fails its self-test; the model before it stays.
    """
    journal = Journal(store)
    try:
        bundle = model_files.load(directory)
        _refuse_if_absent(bundle, precision)
        same = _runs_as_asked(journal.active(bundle.manifest.name), bundle.digest, precision)
        if same and model_files.is_whole(store.settings.data_dir, bundle.digest):
            return bundle.digest
        wanted = _wanted(bundle, actor, None if precision == ANY_PRECISION else precision)
        _refuse_if_forbidden(store, journal, wanted, again=again or same)
    except ApplianceError as error:
        store.record(SECURITY_ALERT, actor, "U", "model", 8, type="110131", type_meaning="Software Configuration", code=error.code)
        raise
    return drive(store, journal.enter(wanted), told)


def rollback(store: Store, name: str | None, actor: str, told: Told | None = None) -> str:
    """Go back to the model before; returns its digest.

    Args:
        store: the box's store.
        name: the line; may be left out where the box has one.
        actor: who asked for it.
        told: called with the journal's entry as it goes on.

    Raises:
        ActivationError: ``model.no_previous``, or why the one before must not read again (``model.withdrawn``,
            ``model.below_minimum``) or cannot (its copy is damaged, it fails its self-test); the model at work stays.
    """
    journal = Journal(store)
    current = _line(store, name)
    successors = journal.successors(current["name"], current["digest"])
    if not successors:
        previous = store.database.one("SELECT * FROM models WHERE name = ? AND state = 'previous'", current["name"])
        barred = journal.barred(previous["name"], previous["version"]) if previous else None
        note = barred or Note("model.no_previous", current["name"])
        store.record(SECURITY_ALERT, actor, "U", "model", 8, type="110131", type_meaning="Software Configuration", code=note.code)
        raise ActivationError(note.code, note.detail)
    to = successors[0]
    origin = model_files.place(store.settings.data_dir, to["digest"])
    chosen = Plan.of(to["precision"], json.loads(to["self_test"]))
    by_hand = chosen.candidate is None or chosen.reason.code == "choice.by_hand" or not store.settings.tune_at_activation
    precision = to["precision"] if by_hand else None  # what was measured then is measured again: the box may have changed since
    wanted = Wanted(to["name"], to["version"], to["digest"], "hand", origin, actor, precision, "rollback")
    return drive(store, journal.enter(wanted), told)


def find(store: Store, which: str) -> Path:
    """The directory that a person means: ``reference``, a bundle's directory, or a digest (its beginning) or version on this box.

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
    return model_files.place(store.settings.data_dir, rows[0]["digest"])


def drive(store: Store, number: int, told: Told | None = None) -> str:
    """See an activation through to the switch: by the box's worker where one runs, else here; returns the model's digest.

    Raises:
        ActivationError: it failed, with the coded reason.
    """
    journal, say = Journal(store), told or (lambda _row: None)

    def done() -> bool:
        row = journal.row(number)
        say(row)
        return row["state"] not in PROVING

    _see_through(store, done)
    row = journal.row(number)
    if row["state"] not in ("trial", "good"):
        raise ActivationError(*journal.reason(row))
    return str(row["digest"])


def tune(store: Store, name: str | None, actor: str, told: Callable[[TuningRequest], None] | None = None) -> list[str]:
    """Measure again how the models at work run best on this box, and run them so; nothing stops reading meanwhile.

    Args:
        store: the box's store.
        name: the line; all lines when None.
        actor: who asked for it.
        told: called with each measuring as it goes on.

    Returns:
        The digests of the models.

    Raises:
        ActivationError: ``model.unknown``: no model is active, or none of that line; or why a measuring failed, in which case the
            model is run as before.
    """
    rows = [row for row in store.models() if row["state"] == "active" and name in (None, row["name"])]
    if not rows:
        raise ActivationError("model.unknown", f"{name}: no model is active" if name else "no model is active")
    tunings, say = TuningRequests(store.database), told or (lambda _tuning: None)
    for row in sorted(rows, key=lambda row: str(row["name"])):
        tunings.ask(row["digest"], row["name"], actor)

    def done() -> bool:
        known = [item for row in rows if (item := tunings.of(row["digest"])) is not None]
        for item in known:
            say(item)
        return not any(item.open for item in known)

    _see_through(store, done)
    for row in rows:
        item = tunings.of(row["digest"])
        if item is not None and item.state == "failed":
            raise ActivationError(item.reason.code if item.reason else "model.self_test", item.reason.detail if item.reason else "")
    return [str(row["digest"]) for row in rows]


def _see_through(store: Store, done: Callable[[], bool]) -> None:
    """Wait until something is done: by the box's worker where one runs, else by doing it here."""
    while not done():
        try:
            lock = None if _box_runs(store) else Lock(store.settings.data_dir, "worker")
        except ApplianceError:  # a worker without a supervisor: it does the work, and if it dies, the next one or we
            lock = None
        if lock is None:
            wake(store.settings)
            time.sleep(_ASK_WORKER_S)
            continue
        try:
            _do_here(store, done)
        finally:
            lock.release()


def _do_here(store: Store, done: Callable[[], bool]) -> None:
    data_dir = store.settings.data_dir

    def whole(digest: str, _plan: Plan) -> Whole:
        return Whole(model_files.own_copy(data_dir, digest).manifest, digest)

    activator = Activator(store, whole, follow=False)
    try:
        while not done():
            activator.tick()
            time.sleep(_POLL_S)
            if _box_runs(store):  # it was started meanwhile: its worker needs the lock more, scans may wait
                return
    finally:
        activator.stop()


def _box_runs(store: Store) -> bool:
    """Whether a supervisor looks after this data directory: its worker does the work, now or as soon as it has been started again."""
    return is_held_by_another(store.settings.data_dir, "supervisor")


def _runs_as_asked(current: sqlite3.Row | None, digest: str, precision: str | None) -> bool:
    """Whether the active model is this one, and its precision is, or is not, chosen by hand just as it is wanted now."""
    if current is None or current["digest"] != digest:
        return False
    by_hand = Plan.of(current["precision"], json.loads(current["self_test"])).reason.code == "choice.by_hand"
    if precision is None:
        return True
    return not by_hand if precision == ANY_PRECISION else by_hand and current["precision"] == precision


def _wanted(bundle: ModelBundle, actor: str, precision: str | None) -> Wanted:
    manifest = bundle.manifest
    embedded = hashlib.sha256((reference_bundle() / MANIFEST_NAME).read_bytes()).hexdigest() == bundle.digest
    return Wanted(manifest.name, manifest.version, bundle.digest, "embedded" if embedded else "hand", bundle.directory, actor, precision)


def _refuse_if_absent(bundle: ModelBundle, precision: str | None) -> None:
    """A precision that the bundle does not have is said before anything is begun."""
    if precision == ANY_PRECISION:
        return
    try:
        bundle.variant(precision)
    except BundleError as error:
        raise ActivationError("model.precision", error.message) from error


def _refuse_if_forbidden(store: Store, journal: Journal, wanted: Wanted, *, again: bool) -> None:
    """Before anything is begun: the library's word, and what this device went through with it before."""
    facts = _facts(store) if wanted.source != "embedded" and store.settings.library_root is not None else None
    if facts is not None:
        facts = learn(store, journal, facts)
    note = journal.barred(wanted.name, wanted.version)
    if note is None and facts is not None:
        note = facts.refusal(wanted.name, wanted.version, wanted.digest)
    if note is not None:
        raise ActivationError(note.code, note.detail)
    failed = journal.remembered(wanted.digest)
    if failed is not None and failed.code in LASTING and not again:
        raise ActivationError("activation.failed_before", failed.code)


def _facts(store: Store) -> Facts:
    """What the signed library says now, waited for: this is a person's command, not the worker."""
    settings = store.settings
    if settings.exchange_dir is None or settings.library_root is None:
        return Facts(ok=False, code="model.not_signed", message="library_root is set but exchange_dir is not")
    check = Check(settings.exchange_dir, settings.library_root)
    while (facts := check.facts()) is None:
        time.sleep(_POLL_S)
    return facts


def _line(store: Store, name: str | None) -> sqlite3.Row:
    """The active model of the line that is meant."""
    active = [row for row in store.models() if row["state"] == "active" and name in (None, row["name"])]
    if len(active) != 1:
        known = ", ".join(sorted(row["name"] for row in active)) or "none"
        raise ActivationError("model.unknown", f"{name}: no model is active" if name else f"active: {known}; say which line")
    return active[0]
