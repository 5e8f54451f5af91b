"""What every page shows around its content: menu, language, user. Ready to print."""

from __future__ import annotations

import math
from typing import Any

from flask import Flask, request, url_for
from flask_babel import gettext
from flask_login import current_user

from appliance.core.roles import Role
from webui.formatting import format_count, html_lang
from webui.server.access import may_use
from webui.server.security import outstanding_step


def init_app(app: Flask) -> None:
    """Give every template its frame as ``page``."""
    app.context_processor(lambda: {"page": _frame()})


def _frame() -> dict[str, Any]:
    """``username`` is empty before the login; ``address`` is where to return after a change of language."""
    account = current_user.account if current_user.is_authenticated else None
    emergency_s = current_user.emergency_s if account else 0.0
    return {
        "html_lang": html_lang(),
        "menu": _menu(account.role, is_emergency=emergency_s > 0) if account and not outstanding_step() else [],
        "emergency": _emergency_text(emergency_s) if emergency_s > 0 else "",
        "username": account.username if account else "",
        "address": request.full_path.rstrip("?") if request.method == "GET" else url_for("worklist.show"),
    }


def _emergency_text(seconds: float) -> str:
    return str(gettext("Emergency access to patients: %(minutes)s minutes left.", minutes=format_count(math.ceil(seconds / 60))))


def _menu(role: Role, *, is_emergency: bool) -> list[dict[str, Any]]:
    """The pages of the main menu that a role may use."""
    entries: list[tuple[str, str, tuple[str, ...]]] = [
        ("worklist.show", gettext("Worklist"), ("worklist.show", "study.show")),
        ("upload.show", gettext("Upload"), ("upload.show",)),
        ("admin.rejected", gettext("Refused files"), ("admin.rejected",)),
        ("accounts.show", gettext("Accounts"), ("accounts.show", "accounts.details")),
        ("admin.health", gettext("Status"), ("admin.health",)),
        ("audit.show", gettext("Audit"), ("audit.show",)),
        ("emergency.show", gettext("Emergency access"), ("emergency.show",)),
    ]
    return [
        {"word": word, "url": url_for(name), "is_current": request.endpoint in current}
        for name, word, current in entries
        if may_use(role, name, is_emergency=is_emergency)
    ]
