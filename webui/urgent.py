"""STAT from a person: what waits of a study is read first, or no longer. Buttons of worklist and study page, and the same for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final, Literal

from flask import Blueprint, flash, jsonify, redirect, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance.core.wakeup import wake
from appliance.store.priority import Urgency
from webui.box import the_box
from webui.pages import id_of
from webui.texts import moment

blueprint: Final = Blueprint("urgent", __name__)


@dataclass(frozen=True)
class _Outcome:
    """What became of a wish.

    ``first``: ``jobs`` of the study are brought forward; 0 of a series that is still coming. ``already_first``: they were before.
    ``already_read``: none waits, all are read. ``nothing_waits``: none waits, and not all were analysed. ``no_longer_first``: ``jobs``
    wait in their turn again. ``was_not_first``: there was nothing to take back.
    """

    outcome: Literal["first", "already_first", "already_read", "nothing_waits", "no_longer_first", "was_not_first"]
    jobs: int = 0

    @property
    def message(self) -> str:
        """What a person is told."""
        if self.outcome == "first" and not self.jobs:
            return str(gettext("This study will be read first, as soon as all of its images have arrived."))
        words = {
            "first": gettext("This study will be read first."),
            "already_first": gettext("This study is already being read first."),
            "already_read": gettext("Already read: nothing of this study waits any more. Images that come later are read first."),
            "nothing_waits": gettext(
                "Nothing of this study waits. That does not mean that it was analysed: not all of its images were. "
                "Images that come later are read first."
            ),
            "no_longer_first": gettext("This study is no longer read first."),
            "was_not_first": gettext("This study was not to be read first."),
        }
        return str(words[self.outcome])


@blueprint.post("/studies/<int:study_id>/urgent")
def button(study_id: int) -> ResponseReturnValue:
    """The button; goes back to where it was pressed, with the search of the worklist and its page."""
    return _back(study_id, _read_first(study_id))


@blueprint.post("/studies/<int:study_id>/routine")
def undo(study_id: int) -> ResponseReturnValue:
    """The button that takes it back, in the same place."""
    return _back(study_id, _no_longer_first(study_id))


@blueprint.post("/api/v1/studies/<int:study_id>/urgent")
def api(study_id: int) -> ResponseReturnValue:
    """For scripts: ``{"study", "outcome", "jobs", "message", "urgent": {"origin", "actor", "at", "term"}}``; safe to repeat.

    ``outcome`` is ``first`` (with the number of ``jobs`` brought forward; 0 of a series that is still coming), ``already_first``,
    ``already_read`` or ``nothing_waits`` (which is not the same as analysed); ``urgent`` says who asked first. 404 for a study that is not
    on this box.
    """
    return _told(study_id, _read_first(study_id))


@blueprint.post("/api/v1/studies/<int:study_id>/routine")
def api_undo(study_id: int) -> ResponseReturnValue:
    """The same, to take it back: ``outcome`` is ``no_longer_first`` (with the number of ``jobs``) or ``was_not_first``."""
    return _told(study_id, _no_longer_first(study_id))


def _back(study_id: int, done: _Outcome) -> ResponseReturnValue:
    flash(done.message)
    if request.form.get("back") != "worklist":
        return redirect(url_for("pages.study", study_id=study_id))
    if request.form.get("q"):
        return redirect(url_for("pages.worklist"), 307)  # again by POST: what was searched for belongs into no address
    return redirect(url_for("pages.worklist", before=id_of(request.form.get("before"))))


def _told(study_id: int, done: _Outcome) -> ResponseReturnValue:
    why = the_box().store.queue.urgency_of(study_id)
    return jsonify(study=study_id, outcome=done.outcome, jobs=done.jobs, message=done.message, urgent=asdict(why) if why else None)


def _read_first(study_id: int) -> _Outcome:
    """Raises StoreError ``store.missing``."""
    box = the_box()
    before = box.store.queue.urgency_of(study_id)
    jobs = box.store.queue.make_urgent(study_id, current_user.account.username)
    wake(box.settings)
    standing = box.store.queue.study_progress(study_id)
    if jobs or (before is None and standing == "waits"):
        return _Outcome("first", jobs)
    if standing == "waits":
        return _Outcome("already_first")
    return _Outcome("already_read" if standing == "read" else "nothing_waits")


def _no_longer_first(study_id: int) -> _Outcome:
    """Raises StoreError ``store.missing``."""
    jobs = the_box().store.queue.make_routine(study_id, current_user.account.username)
    return _Outcome("was_not_first") if jobs is None else _Outcome("no_longer_first", jobs)


def origin_text(why: Urgency) -> str:
    """Who wants a study read first, and since when."""
    if not why.at:
        return str(gettext("Asked for on the box's command line, time not recorded"))  # before there was another way
    values = {"actor": why.actor, "at": moment(why.at), "term": why.term}
    if why.origin == "sender":
        return str(gettext("Marked %(term)s by its sender (Requested Procedure Priority): %(actor)s, %(at)s", **values))
    if why.origin == "cli":
        return str(gettext("Asked for on the box's command line, %(at)s", **values))
    return str(gettext("Asked for by %(actor)s, %(at)s", **values))
