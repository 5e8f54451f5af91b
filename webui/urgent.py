"""STAT from a person: what waits of a study is read first. A button of worklist and study page, and the same for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final, Literal

from flask import Blueprint, flash, jsonify, redirect, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance.signal import wake
from appliance.urgency import Urgency
from webui.box import the_box
from webui.pages import id_of
from webui.texts import moment

blueprint: Final = Blueprint("urgent", __name__)


@dataclass(frozen=True)
class _Outcome:
    """``first``: ``jobs`` of the study are brought forward; ``already_first``: they were before; ``already_read``: none waits."""

    outcome: Literal["first", "already_first", "already_read"]
    jobs: int

    @property
    def message(self) -> str:
        """What a person is told."""
        if self.outcome == "first":
            return str(gettext("This study will be read first."))
        if self.outcome == "already_first":
            return str(gettext("This study is already being read first."))
        return str(gettext("Already read: nothing of this study waits any more. Images that come later are read first."))


@blueprint.post("/studies/<int:study_id>/urgent")
def button(study_id: int) -> ResponseReturnValue:
    """The button; goes back to where it was pressed, with the search of the worklist and its page."""
    flash(_read_first(study_id).message)
    if request.form.get("back") != "worklist":
        return redirect(url_for("pages.study", study_id=study_id))
    if request.form.get("q"):
        return redirect(url_for("pages.worklist"), 307)  # again by POST: what was searched for belongs into no address
    return redirect(url_for("pages.worklist", before=id_of(request.form.get("before"))))


@blueprint.post("/api/v1/studies/<int:study_id>/urgent")
def api(study_id: int) -> ResponseReturnValue:
    """For scripts: ``{"study", "outcome", "jobs", "message", "urgent": {"origin", "actor", "at", "term"}}``; safe to repeat.

    ``outcome`` is ``first`` (with the number of ``jobs`` brought forward), ``already_first`` or ``already_read``; ``urgent`` says who
    asked first. 404 for a study that is not on this box.
    """
    done = _read_first(study_id)
    why = the_box().store.urgency_of(study_id)
    return jsonify(study=study_id, outcome=done.outcome, jobs=done.jobs, message=done.message, urgent=asdict(why) if why else None)


def _read_first(study_id: int) -> _Outcome:
    """Raises StoreError ``store.missing``."""
    box = the_box()
    jobs = box.store.make_urgent(study_id, current_user.account.username)
    wake(box.settings)
    if jobs:
        return _Outcome("first", jobs)
    return _Outcome("already_first" if box.store.waiting_of(study_id) else "already_read", 0)


def origin_text(why: Urgency) -> str:
    """Who wants a study read first, and since when."""
    values = {"actor": why.actor, "at": moment(why.at), "term": why.term}
    if why.origin == "sender":
        return str(gettext("Marked %(term)s by its sender (Requested Procedure Priority): %(actor)s, %(at)s", **values))
    if why.origin == "cli":
        return str(gettext("Asked for on the box's command line, %(at)s", **values))
    return str(gettext("Asked for by %(actor)s, %(at)s", **values))
