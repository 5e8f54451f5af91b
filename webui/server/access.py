"""Which role may use which endpoint: the one table, from which the checks, the menu and ``docs/access.md`` are made (R6).

Deny by default: an endpoint that is not listed is for nobody, and a test finds it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from appliance.core.roles import EMERGENCY_ROLES, PASSWORD_HELPERS, Role, Scope

OPEN_ENDPOINTS: Final = frozenset({"static", "auth.login", "auth.language", "admin.healthz"})
"""Need no login."""
STEPS: Final = {
    "second_factor.enter": "web.second_factor_required",
    "auth.password": "web.password_change_required",
    "second_factor.set_up": "web.second_factor_set_up_required",
}
"""The pages that complete a login, each with the code that programs get while it is outstanding."""

_EVERYBODY: Final = frozenset(Role)
_CLINICIAN: Final = frozenset({Role.CLINICIAN})
_SYSTEM: Final = frozenset({Role.SYSTEM_ADMINISTRATOR})
_SECURITY: Final = frozenset({Role.SECURITY_ADMINISTRATOR})
_AUDITOR: Final = frozenset({Role.AUDITOR})

ACCESS: Final[Mapping[str, frozenset[Role]]] = {
    "auth.logout": _EVERYBODY,
    "auth.password": _EVERYBODY,
    "auth.confirm": _EVERYBODY,
    "second_factor.enter": _EVERYBODY,
    "second_factor.set_up": _EVERYBODY,
    "audit.show": _AUDITOR,
    "audit.verify": _AUDITOR,
    "emergency.show": EMERGENCY_ROLES,
    "emergency.begin": EMERGENCY_ROLES,
    "emergency.end": EMERGENCY_ROLES,
    "emergency.acknowledge": _SECURITY,
    # Clinicians' one-time passwords; those of others are refused by the store.
    "accounts.show": PASSWORD_HELPERS,
    "accounts.issue_password": PASSWORD_HELPERS,
    "accounts.add": _SECURITY,
    "accounts.details": _SECURITY,
    "accounts.set_role": _SECURITY,
    "accounts.disable": _SECURITY,
    "accounts.enable": _SECURITY,
    "accounts.remove_second_factor": _SECURITY,
    "accounts.end_sessions": _SECURITY,
    "accounts.issue_token": _SECURITY,
    "accounts.revoke_token": _SECURITY,
    "admin.health": _EVERYBODY,
    "admin.acknowledge_score_alarm": _SYSTEM,
    # Patient data: names of refused files are often names of patients.
    "admin.rejected": _CLINICIAN,
    "worklist.show": _CLINICIAN,
    "worklist.revision": _CLINICIAN,
    "study.show": _CLINICIAN,
    "study.retry": _CLINICIAN,
    "study.analyse": _CLINICIAN,
    "study.take_back": _CLINICIAN,
    "results_api.show": _CLINICIAN,
    "urgency.set_urgent": _CLINICIAN,
    "urgency.set_routine": _CLINICIAN,
    "urgency.set_urgent_by_api": _CLINICIAN,
    "urgency.set_routine_by_api": _CLINICIAN,
    "image_api.description": _CLINICIAN,
    "image_api.frame": _CLINICIAN,
    "image_api.heatmap": _CLINICIAN,
    "image_api.key_picture": _CLINICIAN,
    "upload.show": _CLINICIAN,
    "upload.close": _CLINICIAN,
    "upload.multipart": _CLINICIAN,
    "tus.options": _CLINICIAN,
    "tus.create": _CLINICIAN,
    "tus.resume": _CLINICIAN,
    "tus.status": _CLINICIAN,
    "tus.terminate": _CLINICIAN,
    "tus.outcome": _CLINICIAN,
}

SCOPES: Final[Mapping[Scope, frozenset[str]]] = {
    Scope.UPLOAD: frozenset(
        {"upload.multipart", "upload.close", "tus.options", "tus.create", "tus.resume", "tus.status", "tus.terminate", "tus.outcome"}
    ),
    Scope.RESULTS: frozenset({"results_api.show"}),
}
"""The endpoints that each scope of an API token opens, for an account whose role may use them; no token opens any other."""

HOME: Final[Mapping[Role, str]] = {
    Role.CLINICIAN: "worklist.show",
    Role.TECHNICIAN: "admin.health",
    Role.SYSTEM_ADMINISTRATOR: "admin.health",
    Role.SECURITY_ADMINISTRATOR: "accounts.show",
    Role.AUDITOR: "audit.show",
}
"""The page that a role begins with."""


def may_use(role: Role, endpoint: str, *, is_emergency: bool = False) -> bool:
    """Whether a role may use an endpoint; in an emergency access also what a clinician may use."""
    roles = ACCESS.get(endpoint, frozenset())
    return endpoint in OPEN_ENDPOINTS or role in roles or (is_emergency and Role.CLINICIAN in roles)


def token_may_use(scopes: Collection[Scope], role: Role, endpoint: str) -> bool:
    """Whether a program may use an endpoint: by its token's scopes and by the role of its account; an emergency access never counts."""
    return any(endpoint in SCOPES[scope] for scope in scopes) and role in ACCESS.get(endpoint, ())
