"""The accounts of the box: the security administrator manages them, the technician gives clinicians one-time passwords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from flask import Blueprint, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance.core.errors import StoreError
from appliance.core.roles import TOKEN_ROLES, Role
from appliance.store.accounts import Account
from appliance.store.api_tokens import MAX_DAYS, USUAL_DAYS
from webui.accounts.account_view import ROLES, SCOPES, account_row, emergency_row, session_row, token_row
from webui.context import current_box
from webui.formatting import format_count
from webui.messages import reason_hint, reason_text
from webui.server.access import may_use
from webui.server.confirmation import confirmed
from webui.server.security import parse_id

blueprint: Final = Blueprint("accounts", __name__)


@blueprint.get("/accounts")
def show() -> ResponseReturnValue:
    """All accounts; for those who only give one-time passwords, the clinicians."""
    return _list_page()


def _list_page(error: str = "", username: str = "") -> str:
    may_manage = may_use(current_user.account.role, "accounts.add")
    accounts = current_box().accounts.all()
    return render_template(
        "accounts.html",
        rows=[account_row(item) for item in accounts if may_manage or (item.role is Role.CLINICIAN and item.is_active)],
        roles=ROLES,
        may_manage=may_manage,
        emergencies=[emergency_row(item) for item in current_box().emergencies.open_alarms()] if may_manage else [],
        error=error,
        username=username,
    )


@blueprint.post("/accounts")
@confirmed("accounts.show")
def add() -> ResponseReturnValue:
    """Create an account and show its one-time password."""
    username = request.form.get("username", "")
    try:
        password = current_box().accounts.add(username, request.form.get("role", ""), current_user.account)
    except StoreError as refusal:
        return _list_page(_explain(refusal), username), 422
    return _password_page(username.strip(), password)


@blueprint.post("/accounts/<int:account_id>/password")
@confirmed("accounts.show")
def issue_password(account_id: int) -> ResponseReturnValue:
    """Give an account a new one-time password, shown once."""
    account = current_box().accounts.by_id(account_id)
    return _password_page(account.username, current_box().accounts.issue_one_time_password(account.username, current_user.account))


def _password_page(username: str, password: str) -> str:
    hours = format_count(round(current_box().settings.one_time_password_s / 3600))
    return render_template("one_time_password.html", username=username, password=password, hours=hours)


@blueprint.get("/accounts/<int:account_id>")
def details(account_id: int) -> ResponseReturnValue:
    """One account with its sessions and what can be changed."""
    return _details_page(current_box().accounts.by_id(account_id))


def _details_page(account: Account, error: str = "") -> str:
    sessions = [session_row(item) for item in current_box().logins.sessions(account)]
    tokens = [token_row(item) for item in current_box().api_tokens.all(account)]
    return render_template(
        "account.html", account=account_row(account), roles=ROLES, sessions=sessions, error=error, tokens=tokens, scopes=SCOPES,
        may_have_tokens=account.is_active and account.role in TOKEN_ROLES, days=USUAL_DAYS, most_days=MAX_DAYS,
    )  # fmt: skip


@blueprint.post("/accounts/<int:account_id>/role")
@confirmed("accounts.details")
def set_role(account_id: int) -> ResponseReturnValue:
    """Give an account another role."""
    role = request.form.get("role", "")
    return _change(account_id, lambda name: current_box().accounts.set_role(name, role, current_user.account))


@blueprint.post("/accounts/<int:account_id>/disable")
@confirmed("accounts.details")
def disable(account_id: int) -> ResponseReturnValue:
    """Disable an account."""
    return _change(account_id, lambda name: current_box().accounts.set_active(name, False, current_user.account))


@blueprint.post("/accounts/<int:account_id>/enable")
@confirmed("accounts.details")
def enable(account_id: int) -> ResponseReturnValue:
    """Enable an account again."""
    return _change(account_id, lambda name: current_box().accounts.set_active(name, True, current_user.account))


@blueprint.post("/accounts/<int:account_id>/second-factor")
@confirmed("accounts.details")
def remove_second_factor(account_id: int) -> ResponseReturnValue:
    """Remove the second factor of somebody whose phone is lost."""
    return _change(account_id, lambda name: current_box().logins.second_factors.remove(name, current_user.account))


@blueprint.post("/accounts/<int:account_id>/sessions/end")
@confirmed("accounts.details")
def end_sessions(account_id: int) -> ResponseReturnValue:
    """Log an account out everywhere, or end the one session that the form names."""
    session_id = parse_id(request.form.get("session"))
    return _change(account_id, lambda name: current_box().accounts.end_sessions(name, current_user.account, session_id))


@blueprint.post("/accounts/<int:account_id>/tokens")
@confirmed("accounts.details")
def issue_token(account_id: int) -> ResponseReturnValue:
    """Make an API token for a program, and show it once."""
    account, days = current_box().accounts.by_id(account_id), parse_id(request.form.get("days")) or 0
    try:
        token = current_box().api_tokens.issue(account.username, request.form.getlist("scope"), days, current_user.account)
    except StoreError as refusal:
        return _details_page(account, _explain(refusal)), 422
    return render_template("api_token.html", account=account_row(account), token=token, days=format_count(days))


@blueprint.post("/accounts/<int:account_id>/tokens/<int:number>/revoke")
@confirmed("accounts.details")
def revoke_token(account_id: int, number: int) -> ResponseReturnValue:
    """Revoke an API token."""
    return _change(account_id, lambda _name: current_box().api_tokens.revoke(number, current_user.account))


def _change(account_id: int, change: Callable[[str], object]) -> ResponseReturnValue:
    """Change an account, and return to its page, which says what was done or why not."""
    account = current_box().accounts.by_id(account_id)
    try:
        change(account.username)
    except StoreError as refusal:
        if not refusal.code.startswith("account."):
            raise
        return _details_page(account, _explain(refusal)), 422
    flash(gettext("Changed. It is in the audit."))
    return redirect(url_for("accounts.details", account_id=account_id))


def _explain(refusal: StoreError) -> str:
    if not refusal.code.startswith("account."):
        raise refusal
    return f"{reason_text(refusal.code)}{gettext('. ')}{reason_hint(refusal.code)}"
