"""What the status page shows only to those who can act on it: a missing administrator, a changed audit, a syslog server that is away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from flask_babel import gettext

from appliance.core.roles import Role
from appliance.service.audit_sender import STATUS_NAME
from appliance.store.audit_check import last_check
from model_sync import atomic_files
from webui.admin.box_health import HealthItem
from webui.context import BoxContext
from webui.formatting import format_count, format_time
from webui.messages import reason_hint, reason_text

_OPERATORS: Final = frozenset({Role.TECHNICIAN, Role.SYSTEM_ADMINISTRATOR})
_UNREACHABLE: Final = ("audit.unreachable", "audit.certificate")


def duty_items(box: BoxContext, role: Role) -> Iterator[HealthItem]:
    """The items for a role; a clinician gets the first alone, and only where nobody else could act on it."""
    if not box.accounts.has_security_administrator() and role in (_active_operators(box) or frozenset(Role)):
        command = f"appliance user add NAME --role {Role.SECURITY_ADMINISTRATOR} --data-dir {box.settings.data_dir}"
        text = gettext("There is no security administrator: nobody can manage accounts on the pages.")
        yield HealthItem("notice", "no_security_administrator", text, gettext("Run: %(command)s", command=command))
    if role is not Role.CLINICIAN:
        yield from _audit_items(box)


def _active_operators(box: BoxContext) -> frozenset[Role]:
    """The roles of the operators who have an account."""
    return _OPERATORS if any(account.is_active and account.role in _OPERATORS for account in box.accounts.all()) else frozenset()


def _audit_items(box: BoxContext) -> Iterator[HealthItem]:
    settings, check = box.settings, last_check(box.settings.data_dir)
    if check is not None and check.problems:
        found = gettext("%(count)s problems, found %(time)s", count=format_count(check.problems), time=format_time(check.at))
        text = gettext(": ").join((reason_text("audit.broken"), found))
        yield HealthItem("attention", "audit.broken", text, reason_hint("audit.broken"))
    state = atomic_files.read_json(settings.data_dir / "run" / STATUS_NAME) if settings.audit_syslog else {}
    if (code := state.get("code")) in _UNREACHABLE:
        yield HealthItem("attention", code, gettext(": ").join((reason_text(code), settings.audit_syslog)), reason_hint(code))
