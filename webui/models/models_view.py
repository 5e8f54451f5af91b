"""The models of this box as the status page shows them, ready to print: versions, activations, problems, measured candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from flask_babel import gettext

from appliance.core.domain import Note
from appliance.core.run_summary import CandidateSummary, RuntimeStatus
from appliance.core.states import IN_USE_STATES, ActivationState, CandidateState, TuningState
from appliance.model_queries import STEPS, Activation, ModelLine, ModelVersion, Trial
from appliance.store.score_alarms import ScoreAlarm
from webui.formatting import format_count, format_difference, format_milliseconds, format_percent, format_ratio, format_time, localize
from webui.messages import ACTIVATIONS, DECISIONS, SOURCES, reason_hint, reason_text
from webui.models.library_view import Offer
from webui.models.patient_groups import accuracy_table
from webui.view_models import DASH, View, digest_view, note_view, run_view


def model_line_card(line: ModelLine, offers: Mapping[str, Offer]) -> View:
    """The card of a model line; ``offers`` holds what the library has, by name of the line."""
    active = line.active
    return {
        "name": line.name,
        "title": localize(line.title["zh"], line.title["en"]) if line.title else line.name,
        "problem": version_problem(line),
        "score_alarms": [_score_alarm(alarm) for alarm in line.score_alarms],
        "previous": _version_card(gettext("Previous version"), gettext("There is none to roll back to."), line.previous),
        "active": _version_card(gettext("Analyses images now"), gettext("None: images of this kind are stored but not analysed."), active)
        | {"chip": activation_chip(_shown_state(line.trial) if line.trial else ActivationState.GOOD) if active else None},
        "preparing": _preparing_card(line.preparing),
        "offer": _offer_text(line, offers.get(line.name)),
        "banner": _run_banner(active.running) if active else None,
        "accuracy": [accuracy_table(label) for label in active.measured] if active and not active.accuracy_problem else [],
        "tuning": _tuning(line),
        "candidates": _candidate_table(active.running) if active else None,
        "activations": [_activation_progress(entry, active) for entry in line.unfinished],
        "minimum_version": line.minimum_version,
        "withdrawn": line.withdrawn,
    }


def history_row(entry: Activation) -> View:
    """One activation in the table of the past ones."""
    return digest_view(entry.digest) | {
        "time": format_time(entry.ended_at or entry.updated_at),
        "version": entry.version,
        "name": entry.name,
        "chip": activation_chip(_shown_state(entry)),
        "reason": note_view(entry.reason),
        "source": gettext("rolled back to") if entry.purpose == "rollback" else _source_word(entry),
    }


def activation_chip(state: str) -> View:
    """An activation's state; a state of a newer version is shown by its own name."""
    words = ACTIVATIONS.get(state)
    word, icon, tone = (words.word, words.icon, words.tone) if words else (state, "info", "quiet")
    return {"word": word, "icon": icon, "tone": tone, "state": state}


def _source_word(entry: Activation) -> str:
    return str(SOURCES.get(entry.source, entry.source))


def _version_card(word: str, empty: str, version: ModelVersion | None) -> View:
    """A version; without one only ``empty`` is shown.

    ``run`` is how it is run now, as the worker reports it; ``stopped``: why nothing can run it; without both, ``chosen`` is how it was
    chosen to be run. ``accuracy_problem``: why its accuracy is not verified.
    """
    if version is None:
        return {"word": word, "empty": empty}
    running = version.running
    reason = reason_text(running.reason.code) if running.reason else ""
    return digest_view(version.digest) | {
        "word": word,
        "version": version.version,
        "run": run_view(running.now),
        "stopped": note_view(running.stopped),
        "chosen": " · ".join(filter(None, (version.runtime, version.precision.upper(), reason))),
        "since": gettext("since %(when)s", when=format_time(version.activated_at)),
        "accuracy_problem": note_view(version.accuracy_problem),
    }


def _preparing_card(entry: Activation | None) -> View:
    word = gettext("Being prepared")
    if entry is None:
        return {"word": word, "empty": gettext("Nothing new is on its way to patients.")}
    return digest_view(entry.digest) | {
        "word": word,
        "version": entry.version,
        "chip": activation_chip(entry.state),
        "chosen": _source_word(entry),
        "since": gettext("since %(when)s", when=format_time(entry.started_at)),
    }


def _activation_progress(entry: Activation, active: ModelVersion | None) -> View:
    """An activation that has not ended (``fraction`` is 0 to 1), beside the version that is active meanwhile."""
    is_running_trial = entry.state in IN_USE_STATES
    fraction = entry.trial.fraction if is_running_trial and entry.trial else entry.progress
    word = gettext("Observed so far") if entry.state == ActivationState.GOOD else str(ACTIVATIONS[entry.state].word)
    summary = [gettext(": ").join((word, format_percent(fraction)))]
    if entry.attempts > 1:
        summary.append(gettext("attempt %(n)s", n=entry.attempts))
    if active and not is_running_trial:
        summary.append(gettext("Version %(version)s analyses images meanwhile.", version=active.version))
    return {
        "state": entry.state,
        "title": _activation_title(entry),
        "steps": [_step(entry, name) for name in STEPS],
        "fraction": fraction,
        "summary": " · ".join(summary),
        "trial": _trial_view(entry.trial) if entry.trial else None,
    }


def _activation_title(entry: Activation) -> str:
    if entry.purpose == "rollback":
        return str(gettext("Rolling back to version %(version)s", version=entry.version))
    if entry.state == ActivationState.GOOD:
        return str(gettext("Version %(version)s passed its self-test; its first images here are observed", version=entry.version))
    return str(gettext("Version %(version)s on its way", version=entry.version))


def _shown_state(entry: Activation) -> str:
    """The state as people see it: a version whose first images are still observed is on trial.

    The journal calls it good where there is no version to roll back to.
    """
    return ActivationState.TRIAL.value if entry.state == ActivationState.GOOD and entry.is_observed else entry.state


def _step(entry: Activation, name: str) -> View:
    shown = replace(entry, state=_shown_state(entry))
    state, words = shown.step_state(name), ACTIVATIONS[name]
    return {
        "state": state,
        "icon": "check" if state == "done" else "waiting" if name == ActivationState.GOOD else words.icon,
        "word": words.word,
    }


def _trial_view(trial: Trial) -> View:
    """The measured values of a version on trial and their limits; texts are empty where there is no value."""
    exceeded, has_drift = trial.exceeded, trial.drift is not None
    fraction, latency, drift = trial.max_failure_fraction, trial.max_latency_ms, trial.max_drift
    return {
        "cases": format_count(trial.cases),
        "wanted_cases": gettext("of %(n)s", n=format_count(trial.wanted_cases)) if trial.wanted_cases else "",
        "failures": format_count(trial.failures),
        "failure_limit": _limit(format_percent(fraction), "failures" in exceeded) if fraction is not None else None,
        "latency": format_milliseconds(trial.latency_ms) if trial.latency_ms is not None else DASH,
        "self_test": gettext("self-test %(time)s", time=format_milliseconds(trial.self_test_ms)) if trial.self_test_ms else "",
        "latency_limit": _limit(format_milliseconds(latency), "latency" in exceeded) if latency else None,
        "drift": format_ratio(trial.drift) if trial.drift is not None else DASH,
        "has_drift": has_drift,
        "drift_limit": _limit(format_ratio(drift), "drift" in exceeded) if drift is not None and has_drift else None,
    }


def _limit(limit: str, is_exceeded: bool) -> View:
    text = gettext("more than %(limit)s", limit=limit) if is_exceeded else gettext("at most %(limit)s", limit=limit)
    return {"text": text, "is_exceeded": is_exceeded}


def version_problem(line: ModelLine) -> View | None:
    """The last problem of a model line; ``hint`` is what to do, ``meanwhile`` which version is in use."""
    entry = line.problem
    if entry is None or line.is_problem_resolved:
        return None
    is_intended = entry.state == ActivationState.WITHDRAWN or (entry.reason is not None and entry.reason.code == "activation.by_hand")
    state = gettext("Outside its limits") if entry.state == ActivationState.GOOD else ACTIVATIONS[entry.state].word
    other = line.active if line.active and line.active.digest != entry.digest else None
    return {
        "state": entry.state,
        "tone": "warn" if line.active and is_intended else "bad",
        "icon": ACTIVATIONS[entry.state].icon,
        "title": gettext("Version %(version)s: %(state)s", version=entry.version, state=state),
        "time": format_time(entry.ended_at or entry.updated_at),
        "reason": note_view(entry.reason),
        "hint": _hint(entry.reason),
        "meanwhile": gettext("Version %(version)s analyses images as before.", version=other.version) if other else "",
    }


def _score_alarm(alarm: ScoreAlarm) -> View:
    """An alarm for shifted scores, which switches nothing off."""
    return {"note": note_view(alarm.note), "time": format_time(alarm.at) if alarm.at else ""}


def _hint(reason: Note | None) -> str:
    return (reason_hint(reason.code) if reason else "") or str(gettext("Tell the central team."))


def _offer_text(line: ModelLine, offer: Offer | None) -> str:
    """What the library has for a line, and why it is not here; empty if the box has it already."""
    known = {version.version for version in (line.preparing, line.active) if version}
    decision = DECISIONS.get(offer.decision) if offer else None
    if offer is None or decision is None or offer.version in known:
        return ""
    text = gettext(": ").join((gettext("Library: version %(version)s", version=offer.version), str(decision)))
    return f"{text} ({format_time(offer.at)})" if offer.at else str(text)


def _run_banner(running: RuntimeStatus) -> View | None:
    """A warning that a model is not run as chosen (``other``, ``fallback``) or not at all (``stopped``)."""
    note = running.stopped or running.fallback or running.other
    if note is None:
        return None
    kind: Literal["stopped", "fallback", "other"] = "stopped" if running.stopped else "fallback" if running.fallback else "other"
    stopped = gettext("Nothing on this box can run this version: images that it should analyse fail.")
    return {
        "kind": kind,
        "tone": "warn" if kind == "other" else "bad",
        "title": stopped if kind == "stopped" else reason_text(note.code),
        "since": format_time(running.since) if running.since else "",
        "explanation": reason_text(note.code) if kind == "stopped" else "",
        "hint": _hint(note),
        "detail": note.detail,
    }


def _tuning(line: ModelLine) -> View | None:
    """A measurement of the active version: ``asked``, ``measuring`` (``progress`` 0 to 1), or why the last one ``failed``."""
    tuning = line.tuning
    if tuning is None or tuning.state == TuningState.DONE or (tuning.state == TuningState.FAILED and not tuning.reason):
        return None
    return {"state": tuning.state, "progress": tuning.progress, "reason": note_view(tuning.reason)}


def _candidate_table(running: RuntimeStatus) -> View:
    """What was measured on this box before the runtime of a model was chosen.

    ``is_open``: unfolded, because something is wrong; ``incomplete``: that there was no time to measure all; ``busy``: that other
    work went on; ``untuned``: what to do where nothing was measured.
    """
    has_untimed = any(candidate.code == "tune.no_time" for candidate in running.table)
    return {
        "is_open": bool(running.fallback or running.other or running.stopped),
        "incomplete": note_view(Note("choice.measured_part")) if has_untimed else None,
        "busy": note_view(running.busy),
        "untuned": reason_hint("choice.untuned"),
        "caption": gettext("Measured %(when)s", when=format_time(running.tuned_at)) if running.tuned_at else gettext("Measured"),
        "profile": running.profile,
        "rows": [_candidate_row(candidate) for candidate in running.table],
    }


def _candidate_row(candidate: CandidateSummary) -> View:
    """One candidate; a dash stands for what was not measured, ``layers`` holds precisions with the number of layers."""
    is_usable, per_image_ms = candidate.threads >= 0, candidate.per_image_ms
    return {
        "state": candidate.state,
        "is_chosen": candidate.state == CandidateState.CHOSEN,
        "runtime": candidate.runtime,
        "provider": candidate.provider,
        "precision": candidate.precision.upper() or DASH,
        "threads": str(candidate.threads or gettext("all")) if is_usable else DASH,
        "batch": str(candidate.batch or DASH),
        "per_image": gettext("%(time)s each", time=format_milliseconds(per_image_ms)) if per_image_ms is not None else "",
        "median": format_milliseconds(candidate.median_ms) if candidate.median_ms is not None else DASH,
        "difference": format_difference(candidate.max_difference) if candidate.max_difference is not None else DASH,
        "layers": [(name, format_count(count)) for name, count in candidate.layers],
        "has_failed": candidate.state in (CandidateState.WRONG, CandidateState.FAILED),
        "verdict": reason_text(candidate.code),
        "detail": candidate.detail,
    }
