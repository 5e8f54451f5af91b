"""Accounts and sessions, ready to print."""

from __future__ import annotations

from typing import Any, Final

from flask_babel import gettext, lazy_gettext

from appliance.core.moments import moment_utc
from appliance.core.roles import SECOND_FACTOR_ROLES, Role
from appliance.store.accounts import Account
from appliance.store.emergency_access import Emergency
from appliance.store.logins import Session
from webui.formatting import format_time
from webui.view_models import DASH, View

ROLES: Final[dict[Role, Any]] = {
    Role.CLINICIAN: lazy_gettext("Clinician"),
    Role.TECHNICIAN: lazy_gettext("Technician"),
    Role.SYSTEM_ADMINISTRATOR: lazy_gettext("System administrator"),
    Role.SECURITY_ADMINISTRATOR: lazy_gettext("Security administrator"),
    Role.AUDITOR: lazy_gettext("Auditor"),
}


def account_row(account: Account) -> View:
    """An account as its line of the list and its page show it."""
    return {
        "id": account.id,
        "username": account.username,
        "role": account.role,
        "role_word": ROLES[account.role],
        "is_active": account.is_active,
        "state": _state(account),
        "tone": "done" if account.is_active and not account.is_one_time else "warn" if account.is_active else "quiet",
        "icon": "check" if account.is_active and not account.is_one_time else "clock" if account.is_active else "scope",
        "has_second_factor": account.has_second_factor,
        "second_factor": _second_factor(account),
        "last_login": _time(account.last_login_at),
        "created": format_time(account.created_at) if account.created_at else DASH,
    }


def _state(account: Account) -> str:
    if not account.is_active:
        return str(gettext("Disabled"))
    return str(gettext("One-time password, not used yet")) if account.is_one_time else str(gettext("Active"))


def _second_factor(account: Account) -> str:
    if account.has_second_factor:
        return str(gettext("Set up"))
    return str(gettext("Set up at the next login")) if account.role in SECOND_FACTOR_ROLES else DASH


def session_row(session: Session) -> View:
    """A session as the page of its account shows it."""
    return {"id": session.id, "peer": session.peer, "since": _time(session.created_at), "seen": _time(session.seen_at)}


def emergency_row(emergency: Emergency) -> View:
    """An emergency access as the security administrator sees it."""
    return {
        "id": emergency.id,
        "username": emergency.username,
        "reason": emergency.reason,
        "began": _time(emergency.began_at),
        "is_running": emergency.remaining_s > 0,
    }


def _time(moment: str) -> str:
    return format_time(moment_utc(moment)) if moment else DASH
