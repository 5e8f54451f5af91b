"""The first line of the status page: that the box works, or what does not and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

from flask_babel import gettext, lazy_gettext

from appliance.core.moments import moment_utc
from appliance.core.process import is_held_by_another
from appliance.core.settings import Settings
from appliance.core.tls_status import tls_statuses
from appliance.model_queries import ModelLine
from appliance.store.emergency_access import Emergency
from webui.formatting import format_count, format_time, localize
from webui.messages import reason_hint, reason_text
from webui.models.models_view import version_problem
from webui.view_models import DASH, View

_ROLES: Final[dict[str, tuple[Any, Any]]] = {
    "worker": (
        lazy_gettext("The analysis does not run: images are stored and wait."),
        lazy_gettext("Restart the box. If this line stays, tell the central team."),
    ),
    "receiver": (
        lazy_gettext("The DICOM receiver does not run: devices cannot send images."),
        lazy_gettext("Restart the box. If this line stays, tell the central team."),
    ),
}
_TITLES: Final[dict[str, tuple[Any, str, str]]] = {
    "broken": (lazy_gettext("Not everything on this box works"), "alert", "bad"),
    "attention": (lazy_gettext("This box works, but somebody must see to it"), "alert", "warn"),
    "trial": (lazy_gettext("This box works; a version is on trial"), "running", "calm"),
    "well": (lazy_gettext("This box works"), "check", "done"),
}
_ORDER: Final = ("broken", "attention", "trial", "notice")


@dataclass(frozen=True)
class HealthItem:
    """Something that a technician has to know.

    Attributes:
        kind: ``broken``: a part of the box does not work; ``attention``: the box works, but a person has to do something; ``trial``;
            ``notice``: something is missing that the box works without, which changes no colour.
        code: for scripts and tests.
        text: what it is.
        hint: what to do; empty where there is nothing to do.
    """

    kind: str
    code: str
    text: str
    hint: str = ""


def _emergency_items(emergencies: Sequence[Emergency]) -> Iterator[HealthItem]:
    """Emergency accesses that nobody has looked at; without their reasons, which could name a patient."""
    for emergency in emergencies:
        values = {"username": emergency.username, "time": format_time(moment_utc(emergency.began_at))}
        text = (
            gettext("Emergency access to patients by %(username)s, running since %(time)s.", **values)
            if emergency.remaining_s
            else gettext("Emergency access to patients by %(username)s, begun %(time)s, ended.", **values)
        )
        yield HealthItem("attention", "emergency", text, gettext("The security administrator looks at it on the page of the accounts."))


def health_verdict(
    settings: Settings, lines: Sequence[ModelLine], is_disk_low: bool, is_untrusted: bool, emergencies: Sequence[Emergency] = (),
    duties: Iterable[HealthItem] = (),
) -> View:  # fmt: skip
    """The line at the top of the status page: the worst kind of its items decides its words."""
    items = [*_items(settings, lines, is_disk_low, is_untrusted), *_emergency_items(emergencies), *duties]
    kind = next((kind for kind in _TITLES if any(item.kind == kind for item in items)), "well")
    title, icon, tone = _TITLES[kind]
    return {
        "kind": kind,
        "title": title,
        "icon": icon,
        "tone": tone,
        "items": sorted(items, key=lambda item: _ORDER.index(item.kind)),
    }


def _items(settings: Settings, lines: Sequence[ModelLine], is_disk_low: bool, is_untrusted: bool) -> Iterator[HealthItem]:
    for role, (text, hint) in _ROLES.items():
        if not is_held_by_another(settings.data_dir, role):
            yield HealthItem("broken", role, str(text), str(hint))
    if is_disk_low:
        text = gettext("The disk is nearly full; soon no more images will be taken.")
        yield HealthItem("broken", "disk", text, gettext("Free space on the disk, or tell the central team."))
    if not any(line.active for line in lines):
        text = gettext("No model is active: the box stores images but analyses none.")
        yield HealthItem("broken", "no_model", text, gettext("Run: %(command)s", command="appliance models activate reference"))
    if is_untrusted:
        text = gettext("What the model library sent is not trusted; the box analyses images as before.")
        yield HealthItem("attention", "untrusted", text, gettext("Tell the central team."))
    yield from _certificate_items(settings)
    for line in lines:
        yield from _line_items(line)


def _certificate_items(settings: Settings) -> Iterator[HealthItem]:
    uses = {"page": gettext("Certificate of the page"), "dicom": gettext("Certificate of the DICOM receiver")}
    for status in tls_statuses(settings, datetime.now(timezone.utc)):
        for problem in status.problems:
            text = gettext(": ").join((uses[status.uses[0]], f"{reason_text(problem.code)} ({problem.detail})"))
            yield HealthItem("attention", problem.code, text, reason_hint(problem.code))


def _line_items(line: ModelLine) -> Iterator[HealthItem]:
    title = localize(line.title["zh"], line.title["en"]) if line.title else line.name
    running = line.active.running if line.active else None
    for kind, note in (("broken", running.stopped), ("attention", running.fallback)) if running else ():
        if note is not None:
            yield HealthItem(kind, note.code, gettext(": ").join((title, reason_text(note.code))), reason_hint(note.code))
    problem = version_problem(line)
    if problem is not None:
        reason = problem["reason"]["text"] if problem["reason"] else ""
        text = gettext(": ").join(filter(None, (title, problem["title"], reason)))
        yield HealthItem("attention", problem["state"], text, problem["hint"])
    for alarm in line.score_alarms:
        text = gettext(": ").join((title, reason_text(alarm.note.code)))
        yield HealthItem("attention", alarm.note.code, text, reason_hint(alarm.note.code))
    if line.trial is not None:
        trial = line.trial.trial
        cases, wanted = (
            (format_count(count) if count is not None else DASH for count in (trial.cases, trial.wanted_cases)) if trial else (DASH, DASH)
        )
        text = gettext(
            "%(title)s %(version)s: its first images are observed, %(n)s of %(wanted)s so far.",
            title=title, version=line.trial.version, n=cases, wanted=wanted,
        )  # fmt: skip
        yield HealthItem("trial", "trial", text)
