"""The status of a library: each role's version, expiry, signatures and keys, and the next steps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from model_sync.library.barred_rollouts import BarredStep, FieldResults, advise, find_barred, not_proposed
from model_sync.library.files import due_days
from model_sync.library.promotion import LibraryPromotion
from model_sync.library.roles import ONLINE, delegated
from model_sync.trust.documents import ROLLOUT_ROLE, Rollout

_DAY = timedelta(days=1)


def status(library: LibraryPromotion, results: FieldResults | None = None) -> dict[str, Any]:
    """Return the library's state as plain values.

    Args:
        library: the library.
        results: what boxes have reported about versions; None when there is no fleet database.

    Returns:
        ``roles`` by name, in the order of signing; ``lines`` and ``rings``: the signed documents; ``warnings``: present and coming
        problems; ``next``: the next steps in their order; ``at``: the time.
    """
    roles = {role: _role(library, role) for role in library.role_names() if library.staged(role) or library.published(role)}
    lines = {line: _line(library, line) for line in library.lines() if library.staged(line) or library.published(line)}
    barred = find_barred(library)
    advice = [advise(library, step, results) for step in barred if step.is_newest]
    return {
        "at": library.now().isoformat(),
        "roles": roles,
        "lines": lines,
        "rings": _rings(library),
        "warnings": [*_expiries(roles), *_barred_rollouts(barred), *not_proposed(advice), *_unused_keys(library)],
        "next": [*_next(roles), *(item.step for item in advice)],
    }


def _role(library: LibraryPromotion, role: str) -> dict[str, Any]:
    state, staged, public = library.state(role), library.staged(role), library.published(role)
    name = library.files.config().name
    days = library.files.config().expiry_days.days(role)
    expires = public.signed.expires if public is not None else None
    left = (expires - library.now()) / _DAY if expires is not None else None
    keyids = library.delegators(role)[-1].get_delegated_role(role).keyids
    return {
        "published": public.signed.version if public is not None else None,
        "staged": staged.signed.version if staged is not None else None,
        "expires": expires.isoformat() if expires is not None else None,
        "days_left": round(left, 2) if left is not None else None,
        "due": left is not None and left < due_days(days),
        "have": state.have,
        "need": state.need,
        "signed": state.signed,
        "missing": state.missing,
        "keys": [{"name": name(keyid), "keyid": keyid} for keyid in keyids],
        "waiting_expired": staged is not None and staged.signed.is_expired(library.now()),
    }


def _line(library: LibraryPromotion, line: str) -> dict[str, Any]:
    index = library.index(line)
    public = library.published(line)
    known = {release.version for release in library.public_index(line).versions} if public is not None else set()
    return {
        "minimum_version": index.minimum_version,
        "versions": [release.version for release in index.versions],
        "waiting": [release.version for release in index.versions if release.version not in known],
        "withdrawn": {item.version: item.reason for item in index.withdrawn},
        "deltas": len(index.deltas),
    }


def _rings(library: LibraryPromotion) -> dict[str, Any]:
    if ROLLOUT_ROLE not in delegated(library.targets()):
        return {}
    targets = library.targets(ROLLOUT_ROLE)
    documents = [Rollout.parse(library.read_target(targets, path)) for path in sorted(targets.targets)]
    return {document.ring: {line: step.model_dump(mode="json") for line, step in document.lines.items()} for document in documents}


def _expiries(roles: dict[str, Any]) -> list[str]:
    warnings = []
    for role, entry in roles.items():
        if entry["days_left"] is not None and entry["days_left"] <= 0:
            warnings.append(f"{role} has EXPIRED: boxes keep their models and accept nothing new")
        elif entry["due"]:
            warnings.append(f"{role} expires in {entry['days_left']:.1f} days")
        if entry["waiting_expired"]:
            warnings.append(f"the waiting {role} expired before it was signed: `model-library renew LIB {role}`")
    return warnings


def _barred_rollouts(barred: list[BarredStep]) -> list[str]:
    return list(dict.fromkeys(step.describe() for step in barred))


def _unused_keys(library: LibraryPromotion) -> list[str]:
    used = {keyid for role in library.role_names() for keyid in library.keys(role)}
    return [f"{path} is the key of no role any more: delete it" for keyid, path in library.online.paths.items() if keyid not in used]


def _next(roles: dict[str, Any]) -> list[str]:
    steps = []
    for role, entry in roles.items():
        if entry["staged"] is not None and entry["have"] < entry["need"]:
            who = " or ".join(entry["missing"])
            steps.append(f"{role} waits for {entry['need'] - entry['have']} more: `model-library sign LIB --key KEY.pem` ({who})")
        elif entry["due"] and entry["staged"] is None and role not in ONLINE:
            steps.append(f"`model-library renew LIB {role}`, then have it signed")
    complete = [role for role, entry in roles.items() if entry["staged"] is not None and entry["have"] >= entry["need"]]
    if complete and not steps:
        steps.append(f"{', '.join(complete)} is signed: `model-library refresh-timestamp LIB` publishes it with the online keys")
    if any(roles[role]["due"] for role in ONLINE if role in roles):
        steps.append("`model-library refresh-timestamp LIB`; let cron run it every day")
    return steps
