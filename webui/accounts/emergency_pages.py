"""Emergency access to patient data for technician and system administrator (R7)."""

from __future__ import annotations

from typing import Final

from flask import Blueprint, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance.core.errors import StoreError
from appliance.store.emergency_access import MAX_REASON_CHARS, MIN_REASON_CHARS
from webui.context import current_box
from webui.formatting import format_count
from webui.messages import reason_hint, reason_text
from webui.server.confirmation import confirmed

blueprint: Final = Blueprint("emergency", __name__)


@blueprint.get("/emergency")
def show() -> ResponseReturnValue:
    """Ask for emergency access, or end it."""
    return _page()


def _page(error: str = "", reason: str = "") -> str:
    settings = current_box().settings
    return render_template(
        "emergency.html", error=error, reason=reason, least=MIN_REASON_CHARS, most=MAX_REASON_CHARS,
        minutes=format_count(round(settings.emergency_access_s / 60)),
    )  # fmt: skip


@blueprint.post("/emergency")
@confirmed("emergency.show")
def begin() -> ResponseReturnValue:
    """Begin it; the person is led to the worklist."""
    reason = request.form.get("reason", "")
    try:
        current_box().emergencies.begin(current_user.account, reason)
    except StoreError as refusal:
        if refusal.code != "emergency.reason":
            raise
        return _page(f"{reason_text(refusal.code)}{gettext('. ')}{reason_hint(refusal.code)}", reason), 422
    return redirect(url_for("worklist.show"))


@blueprint.post("/emergency/end")
def end() -> ResponseReturnValue:
    """End it before its time."""
    current_box().emergencies.end(current_user.account)
    flash(gettext("The emergency access has ended."))
    return redirect(url_for("admin.health"))


@blueprint.post("/emergency/<int:number>/acknowledge")
@confirmed("accounts.show")
def acknowledge(number: int) -> ResponseReturnValue:
    """Take an emergency access off the status page, after a security administrator has looked at it."""
    current_box().emergencies.acknowledge(number, current_user.account)
    flash(gettext("Changed. It is in the audit."))
    return redirect(url_for("accounts.show"))
