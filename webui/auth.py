"""Logging in and out, and the password of one's own. The rules (argon2, lockout, sessions) are those of the accounts."""

from __future__ import annotations

import threading
from typing import Final

from flask import Blueprint, abort, flash, g, make_response, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import LoginManager, current_user, login_user, logout_user

from appliance.core.errors import StoreError
from appliance.store.accounts import Account
from model_sync.messages import LANGUAGES
from webui.box import the_box
from webui.security import safe_next
from webui.texts import LANGUAGE_COOKIE, reason_hint, reason_text

blueprint: Final = Blueprint("auth", __name__)
login_manager: Final = LoginManager()

_MAX_PASSWORD_CHARS: Final = 256
_YEAR_S: Final = 365 * 24 * 3600
# Each check of a password takes 19 MiB and a core for a moment; a crowd at the door must not take the box down.
_CHECKS_AT_ONCE: Final = threading.BoundedSemaphore(2)
_WAIT_S: Final = 5.0


class Person:
    """The account behind a request, as Flask-Login wants it; its id is the session's token, which the server can end."""

    is_authenticated = True
    is_active = True
    is_anonymous = False

    def __init__(self, account: Account, token: str) -> None:
        self.account = account
        self.token = token

    def get_id(self) -> str:
        """The session's token."""
        return self.token


def load_person(token: str) -> Person | None:
    """The person a session cookie stands for, unless the session ended.

    Asked again after the database failed, it says nobody: the page that tells of the failure must come through.
    """
    if g.get("asking", False):
        return None
    g.asking = True
    account = the_box().accounts.resume(token, touch=not g.get("background", False))
    g.asking = False
    return Person(account, token) if account else None


login_manager.user_loader(load_person)


@blueprint.route("/login", methods=["GET", "POST"])
def login() -> ResponseReturnValue:
    """The login page; the same words for an unknown name, a wrong password and a locked account (R3)."""
    target = safe_next(request.args.get("next"))
    if request.method == "GET":
        return redirect(target) if current_user.is_authenticated else render_template("login.html", failed=False)
    token = _checked_login(request.form.get("username", "").strip(), request.form.get("password", ""))
    if token is None:
        return render_template("login.html", failed=True, username=request.form.get("username", "")), 401
    _begin(token)
    return redirect(target)


def _checked_login(username: str, password: str) -> str | None:
    if len(password) > _MAX_PASSWORD_CHARS:
        password = ""
    if not _CHECKS_AT_ONCE.acquire(timeout=_WAIT_S):
        abort(429)
    try:
        return the_box().accounts.login(username, password, request.remote_addr or "")
    finally:
        _CHECKS_AT_ONCE.release()


def _begin(token: str) -> None:
    """A fresh cookie for a fresh session: nothing of what stood in it before is kept."""
    session.clear()
    person = load_person(token)
    if person is None:
        abort(401)
    login_user(person)


@blueprint.post("/logout")
def logout() -> ResponseReturnValue:
    """End the session on the server."""
    the_box().accounts.logout(current_user.token)
    logout_user()
    session.clear()
    return redirect(url_for("auth.login"))


@blueprint.route("/password", methods=["GET", "POST"])
def password() -> ResponseReturnValue:
    """Set a password of one's own; the first login with a one-time password leads here."""
    account = current_user.account
    if request.method == "GET":
        return render_template("password.html", error="")
    old, new, again = (request.form.get(name, "") for name in ("old", "new", "again"))
    error = _change(account, old, new, again)
    if error:
        return render_template("password.html", error=error), 422
    token = _checked_login(account.username, new)  # changing it ended every session, this one too
    if token is None:
        return redirect(url_for("auth.login"))
    _begin(token)
    flash(gettext("Your new password is set."))
    return redirect(url_for("pages.worklist"))


def _change(account: Account, old: str, new: str, again: str) -> str:
    """What is wrong with the change, or an empty text when it is done."""
    if new != again:
        return str(gettext("The two new passwords differ. Type the same one twice."))
    if len(new) > _MAX_PASSWORD_CHARS:
        return str(gettext("The new password is too long."))
    accounts, peer = the_box().accounts, request.remote_addr or ""
    if accounts.blocked(account.username, peer):
        return str(gettext("Too many wrong passwords. Wait 15 minutes, then try again."))
    if not _CHECKS_AT_ONCE.acquire(timeout=_WAIT_S):
        abort(429)
    try:
        accounts.change_password(account, old[:_MAX_PASSWORD_CHARS], new)
    except StoreError as refusal:
        if not refusal.code.startswith("account."):
            raise
        if refusal.code == "account.wrong_password":
            accounts.wrong_password(account, peer)
        return f"{reason_text(refusal.code)}{gettext('. ')}{reason_hint(refusal.code)}"
    finally:
        _CHECKS_AT_ONCE.release()
    return ""


@blueprint.post("/language")
def language() -> ResponseReturnValue:
    """Switch the language of the pages; remembered in this browser."""
    chosen = request.form.get("language", "")
    if chosen not in LANGUAGES:
        abort(400)
    response = make_response(redirect(safe_next(request.form.get("next"))))
    secure = the_box().settings.tls_certificate is not None
    response.set_cookie(LANGUAGE_COOKIE, chosen, max_age=_YEAR_S, samesite="Lax", httponly=True, secure=secure)
    return response
