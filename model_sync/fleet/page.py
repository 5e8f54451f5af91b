"""The fleet page of the central team: rollouts, versions, boxes, the log, pause and resume.

It needs no JavaScript; a small script shows the times, which the server writes in UTC, in the time zone of the browser.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from functools import wraps
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

from flask import Blueprint, Response, abort, current_app, flash, g, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue
from markupsafe import Markup

from model_sync.errors import ModelSyncError
from model_sync.fleet import chart as fleet_chart
from model_sync.fleet import views as fleet_views
from model_sync.fleet.accounts import Accounts
from model_sync.fleet.api import client_address
from model_sync.fleet.database import RUNNING, Fleet
from model_sync.fleet.device_classes import differing_boxes
from model_sync.fleet.event_log import LATEST, PAGE_ENTRIES, EventLog, LogPage
from model_sync.fleet.pause import ExpectedRollout
from model_sync.fleet.rollout_pause_policy import SERVER
from model_sync.fleet.rollouts import PublishedRollouts, Rollouts
from model_sync.fleet.tables import NOTE_CHARS
from model_sync.login_throttle import TooManyAttemptsError
from model_sync.messages import LANGUAGES, Language, current_code, is_known, text
from model_sync.trust.documents import RolloutStep, older

blueprint: Final = Blueprint("page", __name__, template_folder="templates")
_View = TypeVar("_View", bound=Callable[..., ResponseReturnValue])
_FORM_BYTES: Final = 16 << 10
_YEAR_S: Final = 365 * 24 * 3600
_GIB: Final = 1 << 30


def operator_only(view: _View) -> _View:
    """Require a logged-in operator; redirect everybody else to the login."""

    @wraps(view)
    def guarded(*args: Any, **values: Any) -> ResponseReturnValue:
        g.operator = _accounts().resume(session.get("token", ""))
        if g.operator is None:
            session.pop("token", None)
            return redirect(url_for("page.login"))
        return view(*args, **values)

    return cast(_View, guarded)


@blueprint.before_request
def _limit() -> None:
    request.max_content_length = _FORM_BYTES


@blueprint.route("/fleet/login", methods=["GET", "POST"])
def login() -> ResponseReturnValue:
    """Log in; the same text for an unknown name, a wrong password and a locked account."""
    if request.method == "GET":
        return render_template("login.html", failed=False, name="")
    if not current_app.extensions["rate_limiters"]["logins"].allow(client_address()):
        abort(429)
    name = request.form.get("name", "").strip()[:64]
    try:
        token = _accounts().login(name if name.isprintable() else "", request.form.get("password", ""), client_address())
    except TooManyAttemptsError:
        abort(429)
    if token is None:
        return render_template("login.html", failed=True, name=name), 401
    session.clear()
    session["token"] = token
    return redirect(url_for("page.fleet"))


@blueprint.post("/fleet/logout")
@operator_only
def logout() -> ResponseReturnValue:
    """End the session on the server."""
    _accounts().logout(session.get("token", ""))
    session.clear()
    return redirect(url_for("page.login"))


@blueprint.post("/fleet/language")
def language() -> ResponseReturnValue:
    """Set the language cookie of this browser."""
    chosen = request.form.get("language", "")
    if chosen not in LANGUAGES:
        abort(400)
    back = request.form.get("next", "")
    safe = back if back.startswith("/fleet") and back.isprintable() and "\\" not in back else url_for("page.fleet")
    response = redirect(safe)
    secure = current_app.config["SESSION_COOKIE_SECURE"]
    response.set_cookie("lang", chosen, max_age=_YEAR_S, httponly=True, samesite="Strict", secure=secure)
    return response


@blueprint.get("/fleet/style.css")
def style() -> Response:
    """Return the style sheet."""
    return _asset("fleet.css", "text/css")


@blueprint.get("/fleet/script.js")
def script() -> Response:
    """Return the script that shows times in the zone of the browser."""
    return _asset("fleet.js", "text/javascript")


def _asset(name: str, kind: str) -> Response:
    response = Response((Path(blueprint.root_path) / "templates" / name).read_bytes(), content_type=f"{kind}; charset=utf-8")
    response.headers["Cache-Control"] = "public, max-age=31536000, immutable"  # its URL contains its version
    return response


@blueprint.get("/fleet")
@operator_only
def fleet() -> ResponseReturnValue:
    """Show the fleet."""
    store, broken, published, cards = _fleet(), False, PublishedRollouts({}, {}), list[dict[str, Any]]()
    try:
        published = _rollouts().published()
        cards = _cards(store, published)
    except ModelSyncError:
        broken = True
    filters = _filters()
    differing = differing_boxes(store)
    rows = fleet_views.list_boxes(store, filters, _page_number(), differing.keys())
    return render_template(
        "fleet.html",
        counts=fleet_views.counts(store), states=fleet_views.STATES, rings=fleet_views.rings(store),
        rollouts=cards, serial=published.serial,
        broken=broken, versions=_versions(store, published), filters=filters, rows=rows, differing=differing,
        log=_read_log(1, LATEST)[0], expiring=_log().expiring(), can_sign=_rollouts().can_sign,
    )  # fmt: skip


@blueprint.get("/fleet/log")
@operator_only
def log() -> ResponseReturnValue:
    """Show the log: what people and the failure budget did, and what the library's signatures say."""
    entries, broken = _read_log(_page_number(), PAGE_ENTRIES)
    return render_template("log.html", log=entries, broken=broken)


def _read_log(page: int, size: int) -> tuple[LogPage, bool]:
    """Return a page of the log, and whether the library's part of it cannot be read."""
    try:
        return _log().read(page, size), False
    except ModelSyncError:
        return _log().read_actions(), True


@blueprint.get("/fleet/box/<box_id>")
@operator_only
def box(box_id: str) -> ResponseReturnValue:
    """Show one box with its last report."""
    values = fleet_views.box(_fleet(), box_id) if len(box_id) <= 64 and box_id.isprintable() else None
    if values is None:
        abort(404)
    report = json.loads(values["box"]["report"]) if values["box"]["report"] else None
    return render_template("box.html", report=report, differs=differing_boxes(_fleet()).get(box_id, frozenset()), **values)


@blueprint.post("/fleet/pause")
@operator_only
def pause() -> ResponseReturnValue:
    """Pause or resume a rollout by a new signature."""
    ring, line, action = (request.form.get(name, "")[:64] for name in ("ring", "line", "action"))
    if action not in ("pause", "resume"):
        abort(400)
    if action == "resume" and request.form.get("looked") != "yes":
        flash(_t("done.look_first"), "bad")
        return redirect(url_for("page.fleet"))
    try:
        changed = _rollouts().set_paused(
            ring, line, action == "pause", g.operator, _expected(action), _acknowledged(ring, line, action), note=_reason()
        )
    except ModelSyncError as error:
        flash(_t("done.failed", why=f"{error.message}. {error.hint}"), "bad")
    else:
        flash(_t("done.same" if not changed else "done.paused" if action == "pause" else "done.resumed"), "done")
    return redirect(url_for("page.fleet"))


def _expected(action: str) -> ExpectedRollout:
    """Return the rollout that the form showed: a pause applies to any newer one of the version, a resume only to this one."""
    serial = request.form.get("serial", "")
    number = int(serial) if serial.isdecimal() and len(serial) < 10 else 0
    return ExpectedRollout(request.form.get("version", "")[:64], None if action == "pause" else number)


def _reason() -> str:
    """Return the reason that the person gave, in one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in request.form.get("why", "")).split())[:NOTE_CHARS]


def _page_number() -> int:
    number = request.args.get("page", "1")
    return int(number) if number.isdecimal() and len(number) < 7 else 1


def _acknowledged(ring: str, line: str, action: str) -> str:
    """Return failed/tried boxes as the form showed them, for a resume: these failures do not pause the version again."""
    if action == "pause":
        return ""
    tally = _fleet().tally(ring, line, request.form.get("version", "")[:64])
    shown = request.form.get("failed", "")
    return f"{min(tally.failed, int(shown)) if shown.isdecimal() and len(shown) < 10 else 0}/{tally.tried}"


@blueprint.app_context_processor
def _words() -> dict[str, Any]:
    return {
        "t": _t, "language": _language(), "operator": g.get("operator"), "ago": _ago, "when": _when, "utc": _utc, "now": _fleet().now(),
        "zone": Markup('<span data-zone="{}">UTC</span>').format(_utc(_fleet().now())), "why": _why,
        "running_states": RUNNING, "style_version": current_app.config["STYLE_VERSION"], "gib": lambda value: f"{value / _GIB:.1f} GiB",
        "number": lambda value: f"{value:,}",
    }  # fmt: skip


def _cards(store: Fleet, published: PublishedRollouts) -> list[dict[str, Any]]:
    """Return the cards of all rollouts: running ones first, then the newest."""
    cards = [
        _card(store, published, ring, line, step) for ring, rollout in published.rollouts.items() for line, step in rollout.lines.items()
    ]
    order = ("running", "overdue", "paused", "waiting", "complete")
    return sorted(cards, key=lambda card: (not card["spent"], order.index(card["state"]), -card["starts"], card["ring"], card["line"]))


def _card(store: Fleet, published: PublishedRollouts, ring: str, line: str, step: RolloutStep) -> dict[str, Any]:
    """Return the values of the card of one rollout."""
    now = store.now()
    begin, end = fleet_chart.span(step, now)
    progress = fleet_views.progress(store, ring, line, step.version, begin, end)
    tally = progress.tally
    moment = datetime.fromtimestamp(now, timezone.utc)
    past = [index for index, at in enumerate(progress.times) if at <= now]
    plan, index = fleet_views.plan_tally(store, ring, line, step), published.lines.get(line)
    refusal = (index.refusal(step.version) or "") if index is not None else "unknown"
    return {
        "plan": plan, "refusal": refusal, "minimum": index.minimum_version if index is not None else "",
        "why": _pause_reason(store, ring, line, step, published), "reasons": fleet_views.failure_codes(store, ring, line, step.version),
        "ring": ring, "line": line, "step": step, "state": _card_state(step, plan, moment, refusal), "tally": tally,
        "progress": progress, "running": progress.now,
        "share": _percent(progress.now, progress.total), "planned": f"{fleet_chart.planned_share(step, moment):.0f}",
        "limit": fleet_chart.pausing_failures(step, tally, store.acknowledged_failures(ring, line, step.version)),
        "spent": not step.paused and _rollouts().is_spent(ring, line, step, tally),
        "chart": fleet_chart.draw(step, progress, now), "starts": int(step.start.timestamp()), "begin": begin, "end": end,
        "command": _rollouts().command(ring, line, not step.paused), "table": past[:: max(1, len(past) // 8)] if past else [],
    }  # fmt: skip


def _card_state(step: RolloutStep, plan: fleet_views.PlanTally, now: datetime, refusal: str) -> str:
    """Return the state of a rollout; it is complete only when every box of its plan, and at least one, is on the version and well."""
    if step.paused:
        return "paused"
    if now < step.start:
        return "waiting"
    if plan.boxes and plan.well == plan.boxes and not refusal:
        return "complete"
    is_over = (now - step.start).total_seconds() >= step.duration_h * 3600
    return "overdue" if is_over else "running"


def _pause_reason(store: Fleet, ring: str, line: str, step: RolloutStep, published: PublishedRollouts) -> dict[str, Any] | None:
    """Return who paused a rollout, when and why; None when it is not paused."""
    if not step.paused:
        return None
    row = fleet_views.pause_reason(store, ring, line, step.version)
    if row is None:
        return {"kind": "signed", "at": int(published.rollouts[ring].issued_at.timestamp())}
    failed, _, tried = row["figures"].partition("/")
    kind = "budget" if row["actor"] == SERVER else "person"
    return {"kind": kind, "at": row["at"], "actor": row["actor"], "failed": failed, "tried": tried, "note": row["note"]}


def _versions(store: Fleet, published: PublishedRollouts) -> list[dict[str, Any]]:
    """Return the table of versions: per model line and version, the boxes of each ring, and a mark if it must not run."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in fleet_views.versions(store):
        index = published.lines.get(row["line"])
        entry = table.setdefault(
            (row["line"], row["version"]),
            {"line": row["line"], "version": row["version"], "rings": {}, "total": 0, "mark": ""},
        )
        entry["rings"][row["ring"]] = row["boxes"]
        entry["total"] += row["boxes"]
        if index is not None and index.withdrawal(row["version"]) is not None:
            entry["mark"] = "withdrawn"
        elif index is not None and older(row["version"], index.minimum_version):
            entry["mark"] = "old"
    return list(table.values())


def _filters() -> fleet_views.Filters:
    values = {name: _asked(name) for name in ("ring", "state", "name", "differs")}
    line, _, version = _asked("version", 130).partition("@")
    return fleet_views.Filters(line=line, version=version, **values)


def _asked(name: str, most: int = 64) -> str:
    value = request.args.get(name, "")[:most]
    return value if value.isprintable() else ""


def _language() -> Language:
    chosen = request.cookies.get("lang", "")
    return cast(Language, chosen if chosen in LANGUAGES else request.accept_languages.best_match(LANGUAGES, "zh"))


def _t(key: str, **values: object) -> str:
    """Return a text; with a value that is HTML, such as a time, it is HTML, and the other values are escaped."""
    if any(isinstance(value, Markup) for value in values.values()):
        return Markup(text(f"fleet.{key}", _language())).format(**values)  # noqa: S704 - the text is of this program
    return text(f"fleet.{key}", _language(), **values)


def _why(code: str, writer: Literal["agent", "box"] = "box") -> str:
    """Return the text of a reported code; an empty one for a code that this version does not know."""
    code = current_code(code, writer)
    return text(code, _language()) if is_known(code) else ""


def _ago(moment: int | None) -> str:
    if moment is None:
        return _t("ago.never")
    minutes = max(0, _fleet().now() - moment) // 60
    if minutes < 1:
        return _t("ago.now")
    if minutes < 120:
        return _t("ago.minutes", count=minutes)
    return _t("ago.hours", count=minutes // 60) if minutes < 48 * 60 else _t("ago.days", count=minutes // 1440)


def _when(moment: int | str | None) -> str:
    """Return a time as an element: in UTC, which the page's script replaces by the time in the zone of the browser."""
    if moment is None:
        return "–"
    return Markup('<time datetime="{}">{}</time>').format(_utc(moment), _utc(moment, "%Y-%m-%d %H:%M"))


def _utc(moment: int | str, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    at = datetime.fromisoformat(moment.replace("Z", "+00:00")) if isinstance(moment, str) else datetime.fromtimestamp(moment, timezone.utc)
    return at.astimezone(timezone.utc).strftime(form)


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.0f}" if total else "0"


def _fleet() -> Fleet:
    return cast(Fleet, current_app.extensions["fleet"])


def _rollouts() -> Rollouts:
    return cast(Rollouts, current_app.extensions["rollouts"])


def _log() -> EventLog:
    return cast(EventLog, current_app.extensions["event_log"])


def _accounts() -> Accounts:
    return cast(Accounts, current_app.extensions["accounts"])
