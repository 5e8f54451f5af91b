"""The models of this box as the status page shows them: versions, activations in progress and problems, ready to print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from flask_babel import gettext

from appliance.model_queries import STEPS, Activation, ModelLine, ModelVersion, Trial
from webui.formatting import format_count, format_milliseconds, format_percent, format_ratio, format_time, localize
from webui.messages import ACTIVATIONS, DECISIONS, SOURCES, reason_text
from webui.models.candidates_view import CandidateTable
from webui.models.library_view import Offer
from webui.view_models import DASH, Chip, NoteView, RunView

_SHORT_DIGEST_CHARS: Final = 12


@dataclass(frozen=True)
class VersionCard:
    """A version in the row of previous, active and coming version; without ``version`` only ``empty`` is shown.

    Attributes:
        run: how it is run now, as the worker reports it; ``stopped``: why nothing can run it; without both, ``chosen`` is how it was
            chosen to be run.
    """

    word: str
    empty: str
    version: str = ""
    chip: Chip | None = None
    run: RunView | None = None
    stopped: NoteView | None = None
    chosen: str = ""
    since: str = ""
    digest: str = ""
    short_digest: str = ""


@dataclass(frozen=True)
class Problem:
    """The last problem of a model line; ``hint`` is what to do, ``meanwhile`` which version is in use."""

    state: str
    tone: Literal["warn", "bad"]
    icon: str
    title: str
    time: str
    reason: NoteView | None
    hint: str
    meanwhile: str


@dataclass(frozen=True)
class RunBanner:
    """A warning that a model is not run as chosen (``other``, ``fallback``) or not at all (``stopped``)."""

    kind: Literal["stopped", "fallback", "other"]
    tone: Literal["warn", "bad"]
    title: str
    since: str
    explanation: str
    hint: str
    detail: str


@dataclass(frozen=True)
class Limit:
    """The limit of a measured value, in words."""

    text: str
    is_exceeded: bool

    @classmethod
    def of(cls, limit: str, is_exceeded: bool) -> Limit:
        """The words of a limit."""
        text = gettext("more than %(limit)s", limit=limit) if is_exceeded else gettext("at most %(limit)s", limit=limit)
        return cls(text, is_exceeded)


@dataclass(frozen=True)
class TrialView:
    """The measured values of a version on trial and their limits; texts are empty where there is no value."""

    cases: str
    wanted_cases: str
    failures: str
    failure_limit: Limit | None
    latency: str
    self_test: str
    latency_limit: Limit | None
    drift: str
    has_drift: bool
    drift_limit: Limit | None

    @classmethod
    def of(cls, trial: Trial) -> TrialView:
        """The view of a trial."""
        exceeded, has_drift = trial.exceeded, trial.drift is not None
        fraction, latency, drift = trial.max_failure_fraction, trial.max_latency_ms, trial.max_drift
        return cls(
            cases=format_count(trial.cases),
            wanted_cases=gettext("of %(n)s", n=format_count(trial.wanted_cases)) if trial.wanted_cases else "",
            failures=format_count(trial.failures),
            failure_limit=Limit.of(format_percent(fraction), "failures" in exceeded) if fraction is not None else None,
            latency=format_milliseconds(trial.latency_ms) if trial.latency_ms is not None else DASH,
            self_test=gettext("self-test %(time)s", time=format_milliseconds(trial.self_test_ms)) if trial.self_test_ms else "",
            latency_limit=Limit.of(format_milliseconds(latency), "latency" in exceeded) if latency else None,
            drift=format_ratio(trial.drift) if trial.drift is not None else DASH,
            has_drift=has_drift,
            drift_limit=Limit.of(format_ratio(drift), "drift" in exceeded) if drift is not None and has_drift else None,
        )


@dataclass(frozen=True)
class Step:
    """A step of an activation."""

    state: Literal["done", "now", "todo"]
    icon: str
    word: str

    @classmethod
    def of(cls, entry: Activation, name: str) -> Step:
        """One of ``STEPS`` as far as an activation is."""
        state, words = entry.step_state(name), ACTIVATIONS[name]
        return cls(state, "check" if state == "done" else words.icon, words.word)


@dataclass(frozen=True)
class ActivationProgress:
    """An activation that has not ended; ``fraction`` is 0 to 1."""

    state: str
    title: str
    steps: tuple[Step, ...]
    fraction: float
    summary: str
    trial: TrialView | None

    @classmethod
    def of(cls, entry: Activation, active: ModelVersion | None) -> ActivationProgress:
        """The progress of a journal entry, beside the version that is active meanwhile."""
        is_running_trial = entry.state in ("trial", "good")
        fraction = entry.trial.fraction if is_running_trial and entry.trial else entry.progress
        word = gettext("Observed so far") if entry.state == "good" else str(ACTIVATIONS[entry.state].word)
        summary = [gettext(": ").join((word, format_percent(fraction)))]
        if entry.attempts > 1:
            summary.append(gettext("attempt %(n)s", n=entry.attempts))
        if active and not is_running_trial:
            summary.append(gettext("Version %(version)s analyses images meanwhile.", version=active.version))
        return cls(
            state=entry.state,
            title=_activation_title(entry),
            steps=tuple(Step.of(entry, name) for name in STEPS),
            fraction=fraction,
            summary=" · ".join(summary),
            trial=TrialView.of(entry.trial) if entry.trial else None,
        )


@dataclass(frozen=True)
class TuningView:
    """A measurement of the active version: waiting, running (``progress`` 0 to 1), or why the last one failed."""

    state: Literal["asked", "measuring", "failed"]
    progress: float
    reason: NoteView | None


@dataclass(frozen=True)
class ModelLineCard:
    """One model line; ``offer`` is what the library has for it, ``withdrawn`` holds versions with the reason."""

    name: str
    title: str
    problem: Problem | None
    previous: VersionCard
    active: VersionCard
    preparing: VersionCard
    offer: str
    banner: RunBanner | None
    tuning: TuningView | None
    candidates: CandidateTable | None
    activations: tuple[ActivationProgress, ...]
    minimum_version: str
    withdrawn: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, line: ModelLine, offers: Mapping[str, Offer]) -> ModelLineCard:
        """The card of a model line; ``offers`` by name of the line."""
        chip = activation_chip(line.trial.state) if line.trial else activation_chip("good")
        return cls(
            name=line.name,
            title=localize(line.title["zh"], line.title["en"]) if line.title else line.name,
            problem=_problem(line),
            previous=_version_card(gettext("Previous version"), gettext("There is none to roll back to."), line.previous, None),
            active=_version_card(
                gettext("Analyses images now"), gettext("None: images of this kind are stored but not analysed."), line.active, chip
            ),
            preparing=_preparing_card(line.preparing),
            offer=_offer_text(line, offers.get(line.name)),
            banner=_run_banner(line.active) if line.active else None,
            tuning=_tuning(line),
            candidates=CandidateTable.of(line.active.running) if line.active else None,
            activations=tuple(ActivationProgress.of(entry, line.active) for entry in line.unfinished),
            minimum_version=line.minimum_version,
            withdrawn=line.withdrawn,
        )


@dataclass(frozen=True)
class HistoryRow:
    """One activation in the table of the past ones."""

    time: str
    version: str
    name: str
    short_digest: str
    chip: Chip
    reason: NoteView | None
    source: str

    @classmethod
    def of(cls, entry: Activation) -> HistoryRow:
        """The row of a journal entry."""
        return cls(
            time=format_time(entry.ended_at or entry.updated_at),
            version=entry.version,
            name=entry.name,
            short_digest=entry.digest[:_SHORT_DIGEST_CHARS],
            chip=activation_chip(entry.state),
            reason=NoteView.of(entry.reason),
            source=gettext("rolled back to") if entry.purpose == "rollback" else _source_word(entry),
        )


def activation_chip(state: str) -> Chip:
    """The chip of an activation's state; a state of a newer version is shown by its own name."""
    words = ACTIVATIONS.get(state)
    return Chip(words.word, words.icon, words.tone, state) if words else Chip(state, "info", "quiet", state)


def _source_word(entry: Activation) -> str:
    return str(SOURCES.get(entry.source, entry.source))


def _activation_title(entry: Activation) -> str:
    if entry.purpose == "rollback":
        return str(gettext("Rolling back to version %(version)s", version=entry.version))
    if entry.state == "good":
        return str(gettext("Version %(version)s passed its self-test; its first images here are observed", version=entry.version))
    return str(gettext("Version %(version)s on its way", version=entry.version))


def _version_card(word: str, empty: str, version: ModelVersion | None, chip: Chip | None) -> VersionCard:
    if version is None:
        return VersionCard(word, empty)
    running = version.running
    reason = reason_text(running.reason.code) if running.reason else ""
    return VersionCard(
        word, empty, version.version, chip,
        run=RunView.of(running.now),
        stopped=NoteView.of(running.stopped),
        chosen=" · ".join(filter(None, (version.runtime, version.precision.upper(), reason))),
        since=gettext("since %(when)s", when=format_time(version.activated_at)),
        digest=version.digest,
        short_digest=version.digest[:_SHORT_DIGEST_CHARS],
    )  # fmt: skip


def _preparing_card(entry: Activation | None) -> VersionCard:
    word, empty = gettext("Being prepared"), gettext("Nothing new is on its way to patients.")
    if entry is None:
        return VersionCard(word, empty)
    return VersionCard(
        word, empty, entry.version, activation_chip(entry.state), chosen=_source_word(entry),
        since=gettext("since %(when)s", when=format_time(entry.started_at)),
        digest=entry.digest, short_digest=entry.digest[:_SHORT_DIGEST_CHARS],
    )  # fmt: skip


def _problem(line: ModelLine) -> Problem | None:
    entry = line.problem
    if entry is None or line.is_problem_resolved:
        return None
    is_intended = entry.state == "withdrawn" or (entry.reason is not None and entry.reason.code == "activation.by_hand")
    reason = NoteView.of(entry.reason)
    state = gettext("Outside its limits") if entry.state == "good" else ACTIVATIONS[entry.state].word
    other = line.active if line.active and line.active.digest != entry.digest else None
    return Problem(
        state=entry.state,
        tone="warn" if line.active and is_intended else "bad",
        icon=ACTIVATIONS[entry.state].icon,
        title=gettext("Version %(version)s: %(state)s", version=entry.version, state=state),
        time=format_time(entry.ended_at or entry.updated_at),
        reason=reason,
        hint=(reason.hint if reason else "") or gettext("Tell the central team."),
        meanwhile=gettext("Version %(version)s analyses images as before.", version=other.version) if other else "",
    )


def _offer_text(line: ModelLine, offer: Offer | None) -> str:
    """What the library has for a line, and why it is not here; empty if the box has it already."""
    known = {version.version for version in (line.preparing, line.active) if version}
    decision = DECISIONS.get(offer.decision) if offer else None
    if offer is None or decision is None or offer.version in known:
        return ""
    text = gettext(": ").join((gettext("Library: version %(version)s", version=offer.version), str(decision)))
    return f"{text} ({format_time(offer.at)})" if offer.at else str(text)


def _run_banner(version: ModelVersion) -> RunBanner | None:
    running = version.running
    note = running.stopped or running.fallback or running.other
    if note is None:
        return None
    kind: Literal["stopped", "fallback", "other"] = "stopped" if running.stopped else "fallback" if running.fallback else "other"
    reason = NoteView.of(note)
    stopped = gettext("Nothing on this box can run this version: images that it should analyse fail.")
    return RunBanner(
        kind=kind,
        tone="warn" if kind == "other" else "bad",
        title=stopped if kind == "stopped" else reason_text(note.code),
        since=format_time(running.since) if running.since else "",
        explanation=reason_text(note.code) if kind == "stopped" else "",
        hint=(reason.hint if reason else "") or gettext("Tell the central team."),
        detail=note.detail,
    )


def _tuning(line: ModelLine) -> TuningView | None:
    tuning = line.tuning
    if tuning and tuning.state == "measuring":
        return TuningView("measuring", tuning.progress, None)
    if tuning and tuning.state == "asked":
        return TuningView("asked", 0.0, None)
    return TuningView("failed", 0.0, NoteView.of(tuning.reason)) if tuning and tuning.state == "failed" and tuning.reason else None
