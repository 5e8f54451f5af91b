"""What every page shows around its content: menu, language, user. Ready to print."""

from __future__ import annotations

from dataclasses import dataclass

from flask import Flask, request, url_for
from flask_babel import gettext
from flask_login import current_user

from webui.formatting import html_lang
from webui.server.security import PATIENT_ROLES


@dataclass(frozen=True)
class MenuItem:
    """One entry of the main menu."""

    word: str
    url: str
    is_current: bool


@dataclass(frozen=True)
class PageFrame:
    """The frame of a page; ``username`` is empty before the login, ``address`` is where to return after a change of language."""

    html_lang: str
    menu: tuple[MenuItem, ...]
    username: str
    address: str

    @classmethod
    def current(cls) -> PageFrame:
        """The frame of the page that answers this request."""
        account = current_user.account if current_user.is_authenticated else None
        return cls(
            html_lang=html_lang(),
            menu=_menu(account.role) if account and not account.must_change else (),
            username=account.username if account else "",
            address=request.full_path.rstrip("?") if request.method == "GET" else url_for("worklist.show"),
        )


def init_app(app: Flask) -> None:
    """Give every template its frame as ``page``."""
    app.context_processor(lambda: {"page": PageFrame.current()})


def _menu(role: str) -> tuple[MenuItem, ...]:
    entries: list[tuple[str, str, tuple[str, ...]]] = [("admin.health", gettext("Status"), ("admin.health",))]
    if role in PATIENT_ROLES:
        entries = [
            ("worklist.show", gettext("Worklist"), ("worklist.show", "study.show")),
            ("upload.show", gettext("Upload"), ("upload.show",)),
            ("admin.rejected", gettext("Refused files"), ("admin.rejected",)),
            *entries,
        ]
    return tuple(MenuItem(word, url_for(endpoint), request.endpoint in current) for endpoint, word, current in entries)
