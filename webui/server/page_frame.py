"""What every page shows around its content: menu, language, user. Ready to print."""

from __future__ import annotations

from typing import Any

from flask import Flask, request, url_for
from flask_babel import gettext
from flask_login import current_user

from appliance.core.roles import Role
from webui.formatting import html_lang
from webui.server.access import may_use


def init_app(app: Flask) -> None:
    """Give every template its frame as ``page``."""
    app.context_processor(lambda: {"page": _frame()})


def _frame() -> dict[str, Any]:
    """``username`` is empty before the login; ``address`` is where to return after a change of language."""
    account = current_user.account if current_user.is_authenticated else None
    return {
        "html_lang": html_lang(),
        "menu": _menu(account.role) if account and not account.must_change else [],
        "username": account.username if account else "",
        "address": request.full_path.rstrip("?") if request.method == "GET" else url_for("worklist.show"),
    }


def _menu(role: Role) -> list[dict[str, Any]]:
    """The pages of the main menu that a role may use."""
    entries: list[tuple[str, str, tuple[str, ...]]] = [
        ("worklist.show", gettext("Worklist"), ("worklist.show", "study.show")),
        ("upload.show", gettext("Upload"), ("upload.show",)),
        ("admin.rejected", gettext("Refused files"), ("admin.rejected",)),
        ("admin.health", gettext("Status"), ("admin.health",)),
    ]
    return [
        {"word": word, "url": url_for(name), "is_current": request.endpoint in current}
        for name, word, current in entries
        if may_use(role, name)
    ]
