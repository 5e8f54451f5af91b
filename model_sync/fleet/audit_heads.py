"""The heads of a box's audit as its signed reports named them, and whether a new report contradicts them (requirement R10).

Somebody who has a box can change everything on it, the anchors beside its database too, but not what the centre has stored. A
report names the head of the audit, and the digests that entries of earlier heads have now. The centre keeps the last heads.
"""

from __future__ import annotations

import json
from typing import Any, Final

from model_sync.agent.report import AuditReport
from model_sync.errors import TextEnum

_KEPT: Final = 8
# A box may write a report before it has read the confirmation of the last one; several in a row that name no known head hide something.
_MAX_UNPROVEN: Final = 3


class AuditState(TextEnum):
    """What the reports say about the audit of a box."""

    WHOLE = ""
    BACKWARDS = "backwards"
    CHANGED = "changed"


def compare(stored: str, reported: AuditReport | None) -> tuple[str, AuditState]:
    """Compare a report with the stored heads.

    Args:
        stored: JSON of the last heads, as this function returned it; empty for a box that never named one.
        reported: the audit's part of the report; None where it has none.

    Returns:
        What to store, and the state. Where it is not whole nothing is replaced: it is the evidence.
    """
    known: dict[str, Any] = json.loads(stored) if stored else {"heads": [], "unproven": 0}
    heads = {int(entries): digest for entries, digest in known["heads"]}
    if reported is None:
        return _unproven(stored, known) if heads else (stored, AuditState.WHOLE)
    if heads and reported.head.entries < max(heads):
        return stored, AuditState.BACKWARDS
    named = [item for item in (reported.head, *reported.anchors) if item.entries in heads]
    if any(item.digest != heads[item.entries] for item in named):
        return stored, AuditState.CHANGED
    if heads and not named:
        return _unproven(stored, known)
    heads[reported.head.entries] = reported.head.digest
    return json.dumps({"heads": sorted(heads.items())[-_KEPT:], "unproven": 0}), AuditState.WHOLE


def _unproven(stored: str, known: dict[str, Any]) -> tuple[str, AuditState]:
    count = int(known["unproven"]) + 1
    if count >= _MAX_UNPROVEN:
        return stored, AuditState.CHANGED
    return json.dumps(known | {"unproven": count}), AuditState.WHOLE
