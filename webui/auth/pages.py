"""Login, logout, change of password and choice of language; the rules for passwords are those of :mod:`appliance.store.accounts`."""

from __future__ import annotations

from typing import Final

from flask import Blueprint, Flask, abort, flash, g, make_response, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import LoginManager, UserMixin, current_user, login_user, logout_user

from appliance.core.errors import StoreError
from appliance.store.logins import Session
from appliance.store.passwords import MAX_PASSWORD_CHARS
from model_sync.messages import LANGUAGES
from webui.auth.login_queue import password_check
from webui.context import current_box
from webui.formatting import LANGUAGE_COOKIE
from webui.messages import reason_hint, reason_text
from webui.server.bearer import has_bearer
from webui.server.security import safe_next

blueprint: Final = Blueprint("auth", __name__)

_FIRST_ACCOUNT: Final = "appliance user add NAME --role security_administrator --data-dir DIR"
_YEAR_S: Final = 365 * 24 * 3600


class SessionUser(UserMixin):  # type: ignore[misc]  # flask_login has no types
    """The session and account behind a request; its id for Flask-Login is the session's token, which the server can revoke."""

    def __init__(self, session: Session, token: str) -> None:
        self.session = session
        self.account = session.account
        self.emergency_s = current_box().emergencies.remaining_s(session.account)
        self.token = token

    def get_id(self) -> str:
        """The session's token."""
        return self.token


def load_user(token: str) -> SessionUser | None:
    """The user of a session token; None when the session has ended.

    Called again within one request after the database failed, it returns None, so that the error page can be shown.
    """
    if g.get("is_loading_user", False) or has_bearer():  # a program is who its token says, whatever cookie it sends
        return None
    g.is_loading_user = True
    resumed = current_box().logins.resume(token, touch=not g.get("background", False))
    g.is_loading_user = False
    return SessionUser(resumed, token) if resumed else None


def init_app(app: Flask) -> None:
    """Let an application know its users."""
    login_manager = LoginManager()
    login_manager.session_protection = None  # sessions are kept and ended on the server (appliance.store.logins)
    login_manager.user_loader(load_user)
    login_manager.init_app(app)


@blueprint.route("/login", methods=["GET", "POST"])
def login() -> ResponseReturnValue:
    """The login page; the same words for an unknown name, a wrong password and a locked account (R3)."""
    target = safe_next(request.args.get("next"))
    if request.method == "GET":
        return redirect(target) if current_user.is_authenticated else _login_page()
    token = _check_login(request.form.get("username", "").strip(), request.form.get("password", ""))
    if token is None:
        return _login_page(request.form.get("username", ""), has_failed=True), 401
    _begin_session(token)
    if current_user.session.needs_code:
        return redirect(url_for("second_factor.enter", next=target))
    return redirect(target)


def _login_page(username: str = "", *, has_failed: bool = False) -> str:
    box = current_box()
    return render_template(
        "login.html", username=username, has_failed=has_failed, help_contact=box.settings.help_contact,
        first_account=_FIRST_ACCOUNT if box.accounts.is_empty() else "",
    )  # fmt: skip


def _check_login(username: str, password: str) -> str | None:
    if len(password) > MAX_PASSWORD_CHARS:
        password = ""
    with password_check(username):
        return current_box().logins.login(username, password, request.remote_addr or "")


def _begin_session(token: str) -> None:
    """Start a new session with an empty cookie: nothing of the previous one is kept."""
    session.clear()
    user = load_user(token)
    if user is None:
        abort(401)
    login_user(user)


@blueprint.post("/logout")
def logout() -> ResponseReturnValue:
    """End the session on the server, and have the browser forget the films that it kept."""
    current_box().logins.logout(current_user.token)
    logout_user()
    session.clear()
    answer = redirect(url_for("auth.login"))
    answer.headers["Clear-Site-Data"] = '"cache"'
    return answer


@blueprint.route("/password", methods=["GET", "POST"])
def password() -> ResponseReturnValue:
    """Change one's own password; the first login with a one-time password is redirected here."""
    account, has_rules = current_user.account, current_box().settings.password_profile == "mlps3"  # noqa: S105 - a profile
    if request.method == "GET":
        return render_template("password.html", account=account, has_rules=has_rules, error="")
    error = _change_password(*(request.form.get(name, "") for name in ("old", "new", "again")))
    if error:
        page = render_template("password.html", account=account, has_rules=has_rules, error=error)
        return _begin_again_where_ended() or (page, 422)
    token = current_box().logins.begin_again(current_user.session)  # changing it ended every session, this one too
    if token is None:
        return redirect(url_for("auth.login"))
    _begin_session(token)
    flash(gettext("Your new password is set."))
    return redirect(url_for("worklist.show"))


def _change_password(old: str, new: str, again: str) -> str:
    """Change the password; returns what is wrong, or an empty text after success."""
    if new != again:
        return str(gettext("The two new passwords differ. Type the same one twice."))
    with password_check(current_user.account.username):
        try:
            current_box().logins.change_password(current_user.session, old[:MAX_PASSWORD_CHARS], new)
        except StoreError as refusal:
            if not refusal.code.startswith("account."):
                raise
            return f"{reason_text(refusal.code)}{gettext('. ')}{reason_hint(refusal.code)}"
    return ""


def _begin_again_where_ended() -> ResponseReturnValue | None:
    """Lead a person to the login whose session has ended by too many wrong passwords."""
    if current_box().logins.resume(current_user.token, touch=False) is not None:
        return None
    logout_user()
    session.clear()
    flash(f"{reason_text('account.session_ended')}{gettext('. ')}{reason_hint('account.session_ended')}", "error")
    return redirect(url_for("auth.login"))


@blueprint.route("/confirm", methods=["GET", "POST"])
def confirm() -> ResponseReturnValue:
    """Ask for the password again, and the second factor where there is one, before what is dangerous (R8)."""
    target, needs_code = safe_next(request.args.get("next")), current_user.account.has_second_factor
    if request.method == "GET":
        return render_template("confirm.html", needs_code=needs_code, has_failed=False)
    typed, code = request.form.get("password", "")[:MAX_PASSWORD_CHARS], request.form.get("code", "")[:64]
    with password_check(current_user.account.username):
        is_right = current_box().logins.confirm(current_user.session, current_user.token, typed, code)
    if not is_right:
        return _begin_again_where_ended() or (render_template("confirm.html", needs_code=needs_code, has_failed=True), 422)
    flash(gettext("Confirmed. Press the button once more."))
    return redirect(target)


@blueprint.post("/language")
def language() -> ResponseReturnValue:
    """Switch the language of the pages; remembered in this browser."""
    chosen = request.form.get("language", "")
    if chosen not in LANGUAGES:
        abort(400)
    response = make_response(redirect(safe_next(request.form.get("next"))))
    secure = current_box().settings.tls_certificate is not None
    response.set_cookie(LANGUAGE_COOKIE, chosen, max_age=_YEAR_S, samesite="Lax", httponly=True, secure=secure)
    return response
