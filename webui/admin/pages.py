"""The status page for the technician, the list of refused files, and the health check."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from typing import Final

from flask import Blueprint, jsonify, render_template, request
from flask.typing import ResponseReturnValue
from flask_babel import gettext

from appliance import __version__
from appliance.model_queries import activation_history, model_lines
from webui.context import BoxContext, current_box
from webui.formatting import format_count, format_size, format_time
from webui.messages import reason_hint, reason_text
from webui.models.library_view import LibraryCard, read_library_link
from webui.models.models_view import HistoryRow, ModelLineCard
from webui.server.security import parse_id

blueprint: Final = Blueprint("admin", __name__)
_MAX_REJECTIONS: Final = 200


@dataclass(frozen=True)
class RefusedFile:
    """One row of the list of refused files."""

    code: str
    name: str
    size: str
    reason: str
    hint: str
    sender: str
    time: str


@dataclass(frozen=True)
class BoxStatus:
    """What the status page shows beside the models; sizes in bytes and as text."""

    queue: str
    studies: str
    audit_entries: str
    disk_free: int
    disk_total: int
    disk_low: int
    disk_high: int
    free: str
    total: str
    reserve: str
    is_disk_low: bool
    version: str
    python: str
    ae_title: str
    dicom_port: str

    @classmethod
    def of(cls, box: BoxContext) -> BoxStatus:
        """The present status of a box."""
        settings, disk = box.settings, shutil.disk_usage(box.settings.data_dir)
        return cls(
            queue=format_count(box.worklist.queue_length()),
            studies=format_count(box.worklist.count()),
            audit_entries=format_count(box.worklist.audit_entries()),
            disk_free=disk.free,
            disk_total=disk.total,
            disk_low=disk.total // 10,
            disk_high=disk.total // 5,
            free=format_size(disk.free),
            total=format_size(disk.total),
            reserve=format_size(settings.disk_reserve_bytes),
            is_disk_low=disk.free < 2 * settings.disk_reserve_bytes,
            version=__version__,
            python=platform.python_version(),
            ae_title=settings.ae_title,
            dicom_port=str(settings.dicom_port or ""),
        )


@blueprint.get("/health")
def health() -> ResponseReturnValue:
    """The status of the box for the technician; no patient data. A script gets only the part that changes."""
    box, before = current_box(), parse_id(request.args.get("before"))
    lines, (entries, has_older) = model_lines(box.store), activation_history(box.store, before)
    link = read_library_link(box.settings.exchange_dir)
    is_fragment = bool(request.headers.get("X-Fragment"))
    return render_template(
        "health_fragment.html" if is_fragment else "health.html",
        status=None if is_fragment else BoxStatus.of(box),
        library=LibraryCard.of(link),
        lines=[ModelLineCard.of(line, link.offers) for line in lines],
        has_model=any(line.active for line in lines),
        is_busy=link.state == "downloading" or any(line.is_busy for line in lines),
        history=[HistoryRow.of(entry) for entry in entries],
        before=before,
        next_before=entries[-1].id if has_older else None,
    )


@blueprint.get("/rejected")
def rejected() -> ResponseReturnValue:
    """The files that were refused lately, with the reason."""
    files = [
        RefusedFile(
            item["code"], item["name"] or gettext("(sent by DICOM)"), format_size(item["bytes"]), reason_text(item["code"]),
            reason_hint(item["code"]), item["source_actor"], format_time(item["at"]),
        )
        for item in current_box().worklist.rejections(_MAX_REJECTIONS)
    ]  # fmt: skip
    return render_template("rejected.html", files=files)


@blueprint.get("/healthz")
def healthz() -> ResponseReturnValue:
    """Whether the web process and its database answer; for the supervisor, without a login."""
    current_box().worklist.revision()
    return jsonify(status="ok")
