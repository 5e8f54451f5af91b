"""The page of one study, and the button that starts a failed analysis again."""

from __future__ import annotations

import json
from typing import Final

from flask import Blueprint, abort, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance.core.correction import Correction
from appliance.core.domain import ScanState
from appliance.core.wakeup import wake
from appliance.store.volume_results import VolumeResults
from webui.context import current_box
from webui.server.access_log import record_access
from webui.study.report_view import study_header, study_report, viewer_config

blueprint: Final = Blueprint("study", __name__)


@blueprint.get("/studies/<int:study_id>")
def show(study_id: int) -> ResponseReturnValue:
    """One study: its image and findings, and what they are based on."""
    box = current_box()
    revision = box.worklist.revision()  # before the study: a change in between raises it, so that the page asks again
    study = box.worklist.study(study_id)
    is_fragment = bool(request.headers.get("X-Fragment"))
    record_access(study_id, is_opened=not is_fragment)
    manifests = {row["digest"]: json.loads(row["manifest"]) for row in box.store.models()}
    report = study_report(study, VolumeResults(box.store).of_study(study_id), manifests, revision)
    if is_fragment:
        return render_template("study_report.html", report=report)
    return render_template("study.html", study=study_header(study.row), report=report, viewer=viewer_config(study))


@blueprint.post("/studies/<int:study_id>/retry")
def retry(study_id: int) -> ResponseReturnValue:
    """Put the images of a study whose analysis failed into the queue again."""
    box = current_box()
    failed = [item.id for item in box.worklist.study(study_id).instances if item.state == ScanState.FAILED]
    retried = [instance_id for instance_id in failed if box.store.queue.retry(instance_id, current_user.account.username)]
    if retried:
        wake(box.settings)
        flash(gettext("The image is in the queue again."))
    return redirect(url_for("study.show", study_id=study_id))


@blueprint.post("/studies/<int:study_id>/images/<int:instance_id>/analyse")
def analyse(study_id: int, instance_id: int) -> ResponseReturnValue:
    """Analyse an image that the input check stopped, corrected or as it is; the decision is in the audit and on the result."""
    box = current_box()
    if box.worklist.study_of(instance_id) != study_id:
        abort(404)
    try:
        correction = Correction.parse(request.form.get("correction", ""))
    except ValueError:
        abort(400)
    if not correction.is_confirmed:
        abort(400)
    if box.store.queue.analyse_corrected(instance_id, correction, current_user.account.username):
        wake(box.settings)
        flash(gettext("The image is in the queue again."))
    else:
        flash(gettext("The image was not waiting for a decision; nothing was changed."))
    return redirect(url_for("study.show", study_id=study_id))


@blueprint.post("/studies/<int:study_id>/images/<int:instance_id>/take-back")
def take_back(study_id: int, instance_id: int) -> ResponseReturnValue:
    """Take a person's decision about an image back: it is analysed again as it came, and its results count no more."""
    box = current_box()
    if box.worklist.study_of(instance_id) != study_id:
        abort(404)
    if box.store.queue.take_back_decision(instance_id, current_user.account.username):
        wake(box.settings)
        flash(gettext("The image is in the queue again, as it came. The earlier result does not count any more."))
    else:
        flash(gettext("There was no decision to take back, or the image is being analysed; nothing was changed."))
    return redirect(url_for("study.show", study_id=study_id))
