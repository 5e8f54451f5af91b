"""Priority set by a person (STAT): buttons of worklist and study page to analyse a study first or no longer first; an API for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final, Literal

from flask import Blueprint, flash, jsonify, redirect, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance.core.wakeup import wake
from webui.context import current_box
from webui.server.security import parse_id

blueprint: Final = Blueprint("urgency", __name__)


@dataclass(frozen=True)
class _Outcome:
    """The result of a request to change the order of analysis; ``jobs`` is how many jobs changed their place.

    ``first``: ``jobs`` are analysed first, 0 for a series that is still arriving. ``already_first``: they were first before.
    ``already_read``: no job waits, all images are analysed. ``nothing_waits``: no job waits, but not all images were analysed.
    ``no_longer_first``: ``jobs`` are back in their normal place. ``was_not_first``: the study was not urgent.
    """

    outcome: Literal["first", "already_first", "already_read", "nothing_waits", "no_longer_first", "was_not_first"]
    jobs: int = 0

    @property
    def message(self) -> str:
        """The message for a person."""
        if self.outcome == "first" and not self.jobs:
            return str(gettext("This study will be analysed first, as soon as all of its images have arrived."))
        words = {
            "first": gettext("This study will be analysed first."),
            "already_first": gettext("This study is already being analysed first."),
            "already_read": gettext("Already analysed: nothing of this study waits any more. Images that come later are analysed first."),
            "nothing_waits": gettext(
                "Nothing of this study waits. That does not mean that it was analysed: not all of its images were. "
                "Images that come later are analysed first."
            ),
            "no_longer_first": gettext("This study is no longer analysed first."),
            "was_not_first": gettext("This study was not to be analysed first."),
        }
        return str(words[self.outcome])


@blueprint.post("/studies/<int:study_id>/urgent")
def set_urgent(study_id: int) -> ResponseReturnValue:
    """Analyse a study first, and go back to the page of the button, with the search and the page of the worklist."""
    return _redirect_back(study_id, _make_urgent(study_id))


@blueprint.post("/studies/<int:study_id>/routine")
def set_routine(study_id: int) -> ResponseReturnValue:
    """Analyse a study in its normal order again, and go back likewise."""
    return _redirect_back(study_id, _make_routine(study_id))


@blueprint.post("/api/v1/studies/<int:study_id>/urgent")
def set_urgent_by_api(study_id: int) -> ResponseReturnValue:
    """For scripts, safe to repeat: ``{"study", "outcome", "jobs", "message", "urgent": {"origin", "actor", "at", "term"}}``.

    ``outcome`` is ``first``, ``already_first``, ``already_read`` or ``nothing_waits`` (which is not the same as analysed), see
    :class:`_Outcome`; ``urgent`` states who asked first. 404 for a study that is not on this box.
    """
    return _answer(study_id, _make_urgent(study_id))


@blueprint.post("/api/v1/studies/<int:study_id>/routine")
def set_routine_by_api(study_id: int) -> ResponseReturnValue:
    """For scripts, the opposite: ``outcome`` is ``no_longer_first`` (with the number of ``jobs``) or ``was_not_first``."""
    return _answer(study_id, _make_routine(study_id))


def _redirect_back(study_id: int, outcome: _Outcome) -> ResponseReturnValue:
    flash(outcome.message)
    if request.form.get("back") != "worklist":
        return redirect(url_for("study.show", study_id=study_id))
    if request.form.get("q"):
        return redirect(url_for("worklist.show"), 307)  # again by POST: a patient's name must not get into an address
    return redirect(url_for("worklist.show", before=parse_id(request.form.get("before"))))


def _answer(study_id: int, outcome: _Outcome) -> ResponseReturnValue:
    urgency = current_box().store.queue.urgency_of(study_id)
    urgent = asdict(urgency) if urgency else None
    return jsonify(study=study_id, outcome=outcome.outcome, jobs=outcome.jobs, message=outcome.message, urgent=urgent)


def _make_urgent(study_id: int) -> _Outcome:
    """Raises StoreError ``store.missing``."""
    box = current_box()
    before = box.store.queue.urgency_of(study_id)
    jobs = box.store.queue.make_urgent(study_id, current_user.account.username)
    wake(box.settings)
    standing = box.store.queue.study_progress(study_id)
    if jobs or (before is None and standing == "waits"):
        return _Outcome("first", jobs)
    if standing == "waits":
        return _Outcome("already_first")
    return _Outcome("already_read" if standing == "read" else "nothing_waits")


def _make_routine(study_id: int) -> _Outcome:
    """Raises StoreError ``store.missing``."""
    jobs = current_box().store.queue.make_routine(study_id, current_user.account.username)
    return _Outcome("was_not_first") if jobs is None else _Outcome("no_longer_first", jobs)
