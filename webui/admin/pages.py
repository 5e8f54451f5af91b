"""The status page for the technician, the list of refused files, and the health check."""

from __future__ import annotations

import platform
import shutil
from typing import Final

from flask import Blueprint, flash, jsonify, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance import __version__
from appliance.model_queries import activation_history, model_lines
from appliance.store.score_alarms import ScoreAlarms
from webui.admin.box_health import health_verdict
from webui.admin.duties import duty_items
from webui.context import BoxContext, current_box
from webui.formatting import format_count, format_size, format_time
from webui.messages import reason_hint, reason_text
from webui.models.library_view import library_card, read_library_link
from webui.models.models_view import history_row, model_line_card
from webui.server.access import may_use
from webui.server.access_log import record_list
from webui.server.security import parse_id
from webui.view_models import View

blueprint: Final = Blueprint("admin", __name__)
_MAX_REJECTIONS: Final = 200


def _box_status(box: BoxContext) -> View:
    """What the status page shows beside the models; sizes in bytes and as text."""
    settings, disk = box.settings, shutil.disk_usage(box.settings.data_dir)
    return {
        "queue": format_count(box.worklist.queue_length()),
        "studies": format_count(box.worklist.count()),
        "audit_entries": format_count(box.worklist.audit_entries()),
        "disk_free": disk.free,
        "disk_total": disk.total,
        "disk_low": disk.total // 10,
        "disk_high": disk.total // 5,
        "free": format_size(disk.free),
        "total": format_size(disk.total),
        "reserve": format_size(settings.disk_reserve_bytes),
        "key_protection": box.store.keys.protection(),
        "key_warning": (reason_text("key.not_sealed"), reason_hint("key.not_sealed")),
        "version": __version__,
        "python": platform.python_version(),
        "ae_title": settings.ae_title,
        "dicom_port": str(settings.dicom_port or ""),
    }


def _is_disk_low(box: BoxContext) -> bool:
    return shutil.disk_usage(box.settings.data_dir).free < 2 * box.settings.disk_reserve_bytes


@blueprint.get("/health")
def health() -> ResponseReturnValue:
    """The status of the box for the technician; no patient data. A script gets only the part that changes."""
    box, before = current_box(), parse_id(request.args.get("before"))
    lines, (entries, has_older) = model_lines(box.store), activation_history(box.store, before)
    link = read_library_link(box.settings.exchange_dir)
    is_fragment = bool(request.headers.get("X-Fragment"))
    return render_template(
        "health_fragment.html" if is_fragment else "health.html",
        status=None if is_fragment else _box_status(box),
        library=library_card(link),
        lines=[model_line_card(line, link.offers) for line in lines],
        verdict=health_verdict(
            box.settings,
            lines,
            _is_disk_low(box),
            link.state == "untrusted",
            box.emergencies.open_alarms(),
            duty_items(box, current_user.account.role),
        ),
        is_busy=link.state == "downloading" or any(line.is_busy for line in lines),
        history=[history_row(entry) for entry in entries],
        before=before,
        next_before=entries[-1].id if has_older else None,
        may_acknowledge=may_use(current_user.account.role, "admin.acknowledge_score_alarm"),
    )


@blueprint.post("/health/score-alarms/<line>")
def acknowledge_score_alarm(line: str) -> ResponseReturnValue:
    """Acknowledge the alarms for shifted scores of a model line."""
    count = ScoreAlarms(current_box().store.database).acknowledge(line, current_user.account.username)
    flash(
        gettext("Acknowledged. The scores are compared with each other from now on.")
        if count
        else gettext("There is no such alarm any more.")
    )
    return redirect(url_for("admin.health"))


@blueprint.get("/rejected")
def rejected() -> ResponseReturnValue:
    """The files that were refused lately, with the reason; their names may be those of patients."""
    record_list("rejections", (), is_opened=True)
    files = [
        {
            "code": item["code"], "name": item["name"] or gettext("(sent by DICOM)"), "size": format_size(item["bytes"]),
            "reason": reason_text(item["code"]), "hint": reason_hint(item["code"]), "sender": item["source_actor"],
            "time": format_time(item["at"]),
        }
        for item in current_box().worklist.rejections(_MAX_REJECTIONS)
    ]  # fmt: skip
    return render_template("rejected.html", files=files)


@blueprint.get("/healthz")
def healthz() -> ResponseReturnValue:
    """Whether the web process and its database answer; for the supervisor, without a login."""
    current_box().worklist.revision()
    return jsonify(status="ok")
