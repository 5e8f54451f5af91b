"""The audit for the auditor: entries, the newest first, and the search for changes. Reading it is an event of the audit too."""

from __future__ import annotations

import json
from typing import Any, Final

from flask import Blueprint, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext, lazy_gettext
from flask_login import current_user

from appliance.store import audit
from appliance.store.audit import Problem
from appliance.store.audit_entries import read_entries
from webui.context import current_box
from webui.formatting import format_count, format_time, language
from webui.messages import reason_text
from webui.server.security import MAX_ID, parse_id
from webui.view_models import View

blueprint: Final = Blueprint("audit", __name__)
_PAGE_ENTRIES: Final = 100
_SHOWN_PROBLEMS: Final = 5

# Event identifiers and types of DICOM PS3.15 A.5.3 and CID 401, by code.
_WORDS: Final[dict[str, Any]] = {
    "110100": lazy_gettext("Application activity"), "110101": lazy_gettext("Audit was read"), "110103": lazy_gettext("Study was seen"),
    "110104": lazy_gettext("Images were transferred"), "110105": lazy_gettext("Study was deleted"), "110106": lazy_gettext("Export"),
    "110107": lazy_gettext("Import"), "110112": lazy_gettext("List of patients was seen"), "110113": lazy_gettext("Security"),
    "110114": lazy_gettext("Login or logout"), "110122": lazy_gettext("Login"), "110123": lazy_gettext("Logout"),
    "110126": lazy_gettext("Unknown or untrusted machine"), "110127": lazy_gettext("Emergency access began"),
    "110129": lazy_gettext("Security settings changed"), "110131": lazy_gettext("Software or model changed"),
    "110132": lazy_gettext("Refused: no right to it"), "110137": lazy_gettext("Account changed"),
    "110138": lazy_gettext("Emergency access ended"),
}  # fmt: skip


@blueprint.get("/audit")
def show() -> ResponseReturnValue:
    """A page of entries; ``before`` is the number of the entry that it ends before."""
    box, before = current_box(), parse_id(request.args.get("before")) or MAX_ID
    box.store.record(audit.AUDIT_LOG_USED, current_user.account.username, "R", audit.AUDIT_OBJECT, purpose="page")
    with box.store.database.snapshot() as connection:
        entries = list(read_entries(connection, "WHERE seq < ? ORDER BY seq DESC LIMIT ?", before, _PAGE_ENTRIES + 1))
    shown = entries[:_PAGE_ENTRIES]
    rows = [_entry_row(fields) if (fields := entry.fields()) else {"seq": entry.seq, "is_damaged": True} for entry in shown]
    return render_template(
        "audit.html",
        entries=rows,
        has_damaged=any("is_damaged" in row for row in rows),
        is_newest=before == MAX_ID,
        next_before=shown[-1].seq if len(entries) > _PAGE_ENTRIES else None,
    )


def _entry_row(entry: dict[str, Any]) -> View:
    detail = dict(entry["detail"])
    kind, meaning, code = (detail.pop("type", ""), detail.pop("type_meaning", ""), str(detail.pop("code", "")))
    words = [_WORDS.get(entry["event"], entry["meaning"])] + ([_WORDS.get(kind, meaning)] if kind else [])
    return {
        "seq": entry["seq"],
        "at": format_time(entry["at"]),
        "event": gettext(": ").join(str(word) for word in words),
        "actor": entry["actor"],
        "object": entry["object"],
        "needs_attention": entry["outcome"] != 0,
        "code": code,
        "reason": reason_text(code) if code else "",
        "details": [{"name": name, "value": value if isinstance(value, str) else json.dumps(value)} for name, value in detail.items()],
    }


@blueprint.post("/audit/verify")
def verify() -> ResponseReturnValue:
    """Search the whole audit for changes."""
    found = current_box().store.database.anchors().verify()
    if found.problems:
        flash(_say_changed(found.problems), "error")
    else:
        flash(gettext("The audit is whole: %(count)s entries.", count=format_count(found.entries)))
    return redirect(url_for("audit.show"))


def _say_changed(problems: list[Problem]) -> str:
    first = [problem.describe(language()) for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        first.append("…")
    text: str = gettext(
        "The audit has been changed: %(count)s problems (%(problems)s). Leave the disk as it is and tell the security administrator.",
        count=format_count(len(problems)),
        problems=gettext("; ").join(first),
    )
    return text
