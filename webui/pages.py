"""The pages a person reads: worklist, study, refused files, status of the box."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass
from typing import Any, Final

from flask import Blueprint, flash, jsonify, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance import __version__
from appliance.core.domain import PENDING_STATES, ScanState
from appliance.core.wakeup import wake
from appliance.store.database import INSTANCES_ACCESSED
from appliance.store.volume_results import COLOURS, VolumeResults
from appliance.store.worklist import PAGE_SIZE, InstanceView, StudyView
from webui import library, life
from webui.box import Box, the_box
from webui.security import MAX_ID
from webui.texts import STATES, language

blueprint: Final = Blueprint("pages", __name__)
_MAX_SEARCH_CHARS: Final = 100
_REJECTIONS: Final = 200


@blueprint.route("/", methods=["GET", "POST"])
def worklist() -> ResponseReturnValue:
    """The worklist. A search comes by POST: a patient's name belongs into no address, history or log."""
    box = the_box()
    search = request.form.get("q", "").strip()[:_MAX_SEARCH_CHARS]
    before = id_of((request.form if request.method == "POST" else request.args).get("before"))
    revision = box.worklist.revision()  # before the rows: a change in between comes again as an event, and is never missed
    rows = box.worklist.page(before=before, search=search, limit=PAGE_SIZE + 1)
    more, rows = len(rows) > PAGE_SIZE, rows[:PAGE_SIZE]
    template = "worklist_rows.html" if request.headers.get("X-Fragment") else "worklist.html"
    total = box.worklist.count()
    return render_template(template, rows=rows, more=more, search=search, before=before, revision=revision, total=total)


@blueprint.get("/studies/<int:study_id>")
def study(study_id: int) -> ResponseReturnValue:
    """One study: image, findings and what they rest on. Opening it is an audit entry (PS3.15 A.5.3.7)."""
    box = the_box()
    revision = box.worklist.revision()
    view = box.worklist.study(study_id)
    fragment = bool(request.headers.get("X-Fragment"))
    record_look(box, study_id, opened=not fragment)
    pending = view.row.state in PENDING_STATES or any(item.state in PENDING_STATES for item in view.instances)
    values = {
        "study": view,
        "parts": parts_of(view),
        "revision": revision,
        "pending": pending,
        "models": _models(box),
        "unread": {str(item.id): unread_word(item) for item in view.instances if not item.findings},
        "volumes": VolumeResults(box.store).of_study(study_id),
        "volume_colours": COLOURS,
        "viewer": _viewer(view),
    }
    return render_template("study_report.html" if fragment else "study.html", **values)


@dataclass(frozen=True)
class Part:
    """What the report says at one place: an image with findings, a series, or all images that have none for the same reason."""

    images: tuple[InstanceView, ...]
    numbers: str

    @property
    def first(self) -> InstanceView:
        """The image that stands for the others."""
        return self.images[0]


def unread_word(item: InstanceView) -> str:
    """Why there is no result on this image, as it stands over the picture; empty when there is one."""
    return "" if item.findings or item.measured else str(STATES[item.state].word)


def parts_of(view: StudyView) -> list[Part]:
    """The report in as few places as say everything: a series of 160 slices that no model reads is told once."""
    groups: dict[object, list[tuple[int, InstanceView]]] = {}
    for number, item in enumerate(view.instances, start=1):
        series = item.series_id if item.measured else None
        key = item.id if item.findings else (item.state, item.reason, series)
        groups.setdefault(key, []).append((number, item))
    return [Part(tuple(item for _, item in group), _ranges([number for number, _ in group])) for group in groups.values()]


def _ranges(numbers: list[int]) -> str:
    """Numbers as people write them: ``1–3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def record_look(box: Box, study_id: int, *, opened: bool = False) -> None:
    """Write to the audit that this person looks at this study; what an open page loads adds an entry every ten minutes."""
    first = box.looked_at.first(current_user.account.id, study_id)
    if opened or first:
        box.store.record(INSTANCES_ACCESSED, current_user.account.username, "R", f"study:{study_id}")


@blueprint.post("/studies/<int:study_id>/retry")
def retry(study_id: int) -> ResponseReturnValue:
    """Another try for the images of a study whose analysis failed."""
    box = the_box()
    failed = [item.id for item in box.worklist.study(study_id).instances if item.state == ScanState.FAILED]
    retried = [instance_id for instance_id in failed if box.store.queue.retry(instance_id, current_user.account.username)]
    if retried:
        wake(box.settings)
        flash(gettext("The image is in the queue again."))
    return redirect(url_for("pages.study", study_id=study_id))


@blueprint.get("/rejected")
def rejected() -> ResponseReturnValue:
    """Every file that was refused lately, with its reason: nobody wonders where a scan went."""
    return render_template("rejected.html", rejections=the_box().worklist.rejections(_REJECTIONS))


@blueprint.get("/health")
def health() -> ResponseReturnValue:
    """The state of the box for the technician; no patient data. The part that moves is sent alone when a script asks."""
    box = the_box()
    disk = shutil.disk_usage(box.settings.data_dir)
    lines, before = life.lines(box.store), id_of(request.args.get("before"))
    shown, older = life.history(box.store, before)
    line = library.read(box.settings.exchange_dir)
    values: dict[str, Any] = {
        "version": __version__, "python": platform.python_version(), "disk": disk, "lines": lines, "library": line,
        "history": shown, "older": older, "before": before, "steps": life.STEPS, "queue": box.worklist.queue_length(),
        "no_model": not any(item.current for item in lines), "studies": box.worklist.count(), "audit": box.worklist.audit_entries(),
        "settings": box.settings, "disk_low": disk.free < 2 * box.settings.disk_reserve_bytes,
        "busy": line.state == "downloading" or any(item.coming or item.trial or (item.tuning and item.tuning.open) for item in lines),
    }  # fmt: skip
    return render_template("health_fragment.html" if request.headers.get("X-Fragment") else "health.html", **values)


def id_of(text: str | None) -> int | None:
    """A row's id from an address or form; None when it is absent or no id."""
    value = text or ""
    return int(value) if value.isascii() and value.isdigit() and len(value) <= len(str(MAX_ID)) and int(value) <= MAX_ID else None


@blueprint.get("/healthz")
def healthz() -> ResponseReturnValue:
    """Whether the page is alive and its database answers; for the supervisor, without a login."""
    the_box().worklist.revision()
    return jsonify(status="ok")


def _models(box: Box) -> dict[str, dict[str, Any]]:
    """Each model's title, intended use and age note by its digest, from the manifest it was activated with."""
    return {row["digest"]: json.loads(row["manifest"]) for row in box.store.models()}


def _viewer(view: StudyView) -> dict[str, Any]:
    """What the image viewer is told (``data-config``; its words are its own): the addresses of pixels and heat maps."""
    return {"lang": language(), "text": {}, "images": [_image(item) for item in view.instances]}


def _image(item: InstanceView) -> dict[str, Any]:
    frame = url_for("api.frame", instance_id=item.id, number=0)
    return {
        "id": item.id,
        "title": " ".join(part for part in (item.modality, item.body_part_examined, item.view_position) if part),
        "unread": unread_word(item),
        "meta_url": url_for("api.pixels", instance_id=item.id),
        "frame_url": frame.removesuffix("0") + "{frame}",
        "findings": [
            {
                "id": finding.id, "label": finding.title_zh if language() == "zh" else finding.title_en, "score": finding.score,
                "threshold": finding.threshold, "positive": finding.positive, "outline": finding.outline, "peak": finding.peak,
                "heatmap_url": url_for("api.heatmap", finding_id=finding.id),
            }
            for finding in item.findings
        ],
    }  # fmt: skip
