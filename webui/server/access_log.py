"""Audit entries for patient data that was shown: opened studies (DICOM PS3.15 A.5.3.6) and lists of patients (A.5.3.10).

One per visit, not one per image and refresh that an open page loads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final

from flask import Flask, current_app
from flask_login import current_user

from appliance.store.audit import INSTANCES_ACCESSED, QUERY
from webui.context import current_box

_MAX_ENTRIES: Final = 10_000
# A page that stays open and refreshes itself counts as another visit after this time.
REPEAT_AFTER_S: Final = 600.0


class RecentVisits:
    """Which account, or API token (its number below zero), has visited which study lately."""

    def __init__(self) -> None:
        self._times: dict[tuple[int, int], float] = {}
        self._lock = threading.Lock()

    def is_new(self, account_id: int, study_id: int) -> bool:
        """Whether this account has not visited the study for ``REPEAT_AFTER_S``; if so, remembers a visit now."""
        key, now = (account_id, study_id), time.monotonic()
        with self._lock:
            is_new = now - self._times.get(key, -REPEAT_AFTER_S) >= REPEAT_AFTER_S
            if is_new:
                self._times.pop(key, None)
                self._times[key] = now
                if len(self._times) > _MAX_ENTRIES:
                    del self._times[next(iter(self._times))]
        return is_new


def init_app(app: Flask) -> None:
    """Start to record the visits of an application."""
    app.extensions["visits"], app.extensions["listed"] = RecentVisits(), RecentVisits()


def record_access(study_id: int, *, is_opened: bool = False) -> None:
    """Write to the audit that this person or program sees this study: always when it is opened, else if the last visit was long ago."""
    visits: RecentVisits = current_app.extensions["visits"]
    token = getattr(current_user, "api_token", None)
    is_new = visits.is_new(-token.id if token else current_user.account.id, study_id)  # a person and a program are two visitors
    if is_opened or is_new:
        particulars = {"token": token.id} if token else {}
        current_box().store.record(INSTANCES_ACCESSED, current_user.account.username, "R", f"study:{study_id}", **particulars)


def record_list(name: str, studies: Sequence[int], *, is_opened: bool, is_search: bool = False) -> None:
    """Write to the audit that this person sees a list of patients: all of it when it is opened, else what was not on it lately.

    Args:
        name: of the list.
        studies: the numbers of the studies that are shown.
        is_opened: whether a person opened it, and no page refreshed itself.
        is_search: whether it shows what a person searched for; the words are not written, they may be a patient's name.
    """
    listed: RecentVisits = current_app.extensions["listed"]
    new = [study for study in studies if listed.is_new(current_user.account.id, study)]
    if is_opened or new:
        shown = list(studies) if is_opened else new
        current_box().store.record(QUERY, current_user.account.username, "E", name, studies=shown, search=is_search)
