"""Accounts and sessions, ready to print."""

from __future__ import annotations

import math
from typing import Any, Final

from flask_babel import gettext, lazy_gettext

from appliance.core.moments import moment_utc
from appliance.core.roles import SECOND_FACTOR_ROLES, Role, Scope
from appliance.store.accounts import Account
from appliance.store.api_tokens import ApiToken
from appliance.store.emergency_access import Emergency
from appliance.store.logins import Session
from webui.formatting import format_count, format_time
from webui.view_models import DASH, View

_DAY_S: Final = 24 * 3600
ROLES: Final[dict[Role, Any]] = {
    Role.CLINICIAN: lazy_gettext("Clinician"),
    Role.TECHNICIAN: lazy_gettext("Technician"),
    Role.SYSTEM_ADMINISTRATOR: lazy_gettext("System administrator"),
    Role.SECURITY_ADMINISTRATOR: lazy_gettext("Security administrator"),
    Role.AUDITOR: lazy_gettext("Auditor"),
}


SCOPES: Final[dict[Scope, Any]] = {
    Scope.UPLOAD: lazy_gettext("Send images to this box"),
    Scope.RESULTS: lazy_gettext("Fetch the results of a study"),
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


def token_row(token: ApiToken) -> View:
    """An API token as the page of its account shows it."""
    return {
        "id": token.id,
        "scopes": gettext("; ").join(str(SCOPES[scope]) for scope in SCOPES if scope in token.scopes),
        "days": format_count(math.ceil(token.remaining_s / _DAY_S)) if token.remaining_s else "",
        "seen": _time(token.last_used_at),
        "made": _time(token.created_at),
        "made_by": token.created_by,
        "addresses": token.addresses,
        "is_shared": len(token.addresses) > 1,
    }


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
