"""The roles of the box's accounts: who sees patients, and which administrators must be different people (R1, R6).

GB/T 22239-2019, 8.1.5 divides administration between a system, a security and an audit administrator. An account has exactly one role, so
no account holds two of the three.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Role(str, Enum):
    """What an account may do; stored as its value (column ``users.role``)."""

    __str__ = str.__str__  # the same text in every supported Python: formatting of str enums changed in 3.12

    CLINICIAN = "clinician"
    TECHNICIAN = "technician"
    SYSTEM_ADMINISTRATOR = "system_administrator"
    SECURITY_ADMINISTRATOR = "security_administrator"
    AUDITOR = "auditor"


SECOND_FACTOR_ROLES: Final = frozenset(Role) - {Role.CLINICIAN}
"""Roles that always need a second factor (R4); for clinicians it is a setting."""
EMERGENCY_ROLES: Final = frozenset({Role.TECHNICIAN, Role.SYSTEM_ADMINISTRATOR})
"""Roles that may ask for emergency access to patient data (R7)."""
PASSWORD_HELPERS: Final = frozenset({Role.TECHNICIAN, Role.SYSTEM_ADMINISTRATOR, Role.SECURITY_ADMINISTRATOR})
"""Roles that may give a clinician a new one-time password."""


class Scope(str, Enum):
    """What a program may do with an API token; stored as its value. ``webui/server/access.py`` says which endpoints each one opens."""

    __str__ = str.__str__

    UPLOAD = "upload"
    RESULTS = "results"


TOKEN_ROLES: Final = frozenset({Role.CLINICIAN})
"""Roles whose accounts may have API tokens: those that may use the endpoints of the scopes."""
