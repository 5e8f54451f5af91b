"""Which role may use which endpoint: the one table, from which the checks, the menu and ``docs/access.md`` are made (R6).

Deny by default: an endpoint that is not listed is for nobody, and a test finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from appliance.core.roles import Role

OPEN_ENDPOINTS: Final = frozenset({"static", "auth.login", "auth.language", "admin.healthz"})
"""Need no login."""
BEFORE_PASSWORD_CHANGE: Final = OPEN_ENDPOINTS | {"auth.password", "auth.logout"}
"""What an account may use that has to set a password of its own first."""

_EVERYBODY: Final = frozenset(Role)
_CLINICIAN: Final = frozenset({Role.CLINICIAN})
_SYSTEM: Final = frozenset({Role.SYSTEM_ADMINISTRATOR})
_SECURITY: Final = frozenset({Role.SECURITY_ADMINISTRATOR})

ACCESS: Final[Mapping[str, frozenset[Role]]] = {
    "auth.logout": _EVERYBODY,
    "auth.password": _EVERYBODY,
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

HOME: Final[Mapping[Role, str]] = {
    Role.CLINICIAN: "worklist.show",
    Role.TECHNICIAN: "admin.health",
    Role.SYSTEM_ADMINISTRATOR: "admin.health",
    Role.SECURITY_ADMINISTRATOR: "admin.health",
    Role.AUDITOR: "admin.health",
}
"""The page that a role begins with."""


def may_use(role: Role, endpoint: str) -> bool:
    """Whether a role may use an endpoint."""
    return endpoint in OPEN_ENDPOINTS or role in ACCESS.get(endpoint, ())
