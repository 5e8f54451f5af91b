"""Rollouts that name a version which boxes must not take, and the version that a new rollout may name instead.

A barred version is withdrawn, older than the minimum of its model line, or not signed by it. Among the versions that are left, one that
failed on a box, that the failure budget stopped or whose rollout is paused is never proposed; one that works on boxes comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import semver
from tuf.api.metadata import Targets

from model_sync.library.roles import AnyMetadata, LibraryRoles
from model_sync.trust.documents import ROLLOUT_ROLE, LineIndex, Rollout, RolloutStep

LineVersion = tuple[str, str]


@dataclass(frozen=True)
class FieldResults:
    """What boxes have reported about versions, by model line and version.

    Attributes:
        failed: the number of boxes on which the version failed by the fault of the model.
        stopped: the versions whose rollout the failure budget has stopped, also when a person resumed it.
        running: the number of boxes that run the version after its trial.
        unknown: why the results exist and cannot be read here; empty when they are known. Then no version can be proposed.
    """

    failed: Mapping[LineVersion, int] = field(default_factory=dict)
    stopped: frozenset[LineVersion] = frozenset()
    running: Mapping[LineVersion, int] = field(default_factory=dict)
    unknown: str = ""


class BarredStep(NamedTuple):
    """The step of a public or waiting rollout that names a barred version; ``minimum`` is set for ``below_minimum``."""

    ring: str
    line: str
    step: RolloutStep
    refusal: Literal["withdrawn", "below_minimum", "unknown"]
    minimum: str
    is_newest: bool

    @property
    def version(self) -> str:
        """The barred version."""
        return self.step.version

    def describe(self) -> str:
        """Return what is wrong, and what boxes do (docs/adr/0015)."""
        effect = {
            "withdrawn": "withdrawn: no box installs it; boxes that run it stop using it at their next poll, "
            "and an earlier version analyses again, or images are not analysed",
            "below_minimum": f"older than the minimum {self.minimum}: no further box takes it; boxes that run it go on with it",
            "unknown": "signed by no model line: no box installs it",
        }[self.refusal]
        return f"the rollout of ring {self.ring} names {self.line} {self.version}, which is {effect}"


class Advice(NamedTuple):
    """The next step for one barred step, and the versions that it does not name, each with the reason."""

    step: str
    not_proposed: list[str]


def find_barred(library: LibraryRoles) -> list[BarredStep]:
    """Return the steps of public and of waiting rollouts that name a barred version; a waiting withdrawal or minimum counts."""
    newest = _rollouts(library, library.open(ROLLOUT_ROLE)) if ROLLOUT_ROLE in library.role_names() else {}
    public = library.published(ROLLOUT_ROLE)
    steps = [(ring, line, step, True) for ring, lines in newest.items() for line, step in lines.items()]
    for ring, lines in (_rollouts(library, public) if public is not None else {}).items():
        steps += [(ring, line, step, False) for line, step in lines.items() if newest.get(ring, {}).get(line) != step]
    indexes = {line: list(_indexes(library, line)) for line in library.lines()}
    return list(_barred(steps, indexes))


def advise(library: LibraryRoles, barred: BarredStep, results: FieldResults | None) -> Advice:
    """Return the next step for a barred version.

    Args:
        library: the library.
        barred: the step to replace.
        results: what boxes have reported; None when there is no fleet database.
    """
    line, options = barred.line, f"--ring {barred.ring} --line {barred.line} --version"
    results = results or FieldResults()
    if results.unknown:
        step = f"choose a version of {line} that works on boxes, and run `model-library rollout LIB {options} VERSION`"
        return Advice(f"{step}; none is proposed, because what boxes reported is not known here: {results.unknown}", [])
    usable = _usable_versions(library, line)
    reasons = {version: reason for version in usable if (reason := _known_fault(library, line, version, results))}
    good = [version for version in usable if version not in reasons]
    if not good:
        left = f"every version of {line} that boxes may run is known to be bad" if usable else f"boxes may run no version of {line}"
        return Advice(f"{left}: publish a new one, then sign a rollout to it", [_excluded(line, *item) for item in reasons.items()])
    chosen = max(good, key=lambda version: ((line, version) in results.running, semver.Version.parse(version)))
    newer = {version: reason for version, reason in reasons.items() if semver.Version.parse(version) > semver.Version.parse(chosen)}
    boxes = results.running.get((line, chosen), 0)
    known = f"{_boxes(boxes)} run{'s' if boxes == 1 else ''} it" if boxes else "no box is known to run it: begin with few boxes (--percent)"
    step = f"`model-library rollout LIB {options} {chosen} --percent {barred.step.percent:g}`, then have it signed; {known}"
    return Advice(step, [_excluded(line, *item) for item in newer.items()])


def not_proposed(advice: Iterable[Advice]) -> list[str]:
    """Return each version that some advice does not name, once, with the reason."""
    return list(dict.fromkeys(text for item in advice for text in item.not_proposed))


def _barred(steps: list[tuple[str, str, RolloutStep, bool]], indexes: Mapping[str, list[LineIndex]]) -> Iterator[BarredStep]:
    for ring, line, step, is_newest in steps:
        known = indexes.get(line, [])
        refusals = {index.refusal(step.version) for index in known} or {"unknown"}
        if "withdrawn" in refusals:
            yield BarredStep(ring, line, step, "withdrawn", "", is_newest)
        elif "below_minimum" in refusals:
            minimum = max((index.minimum_version for index in known), key=semver.Version.parse)
            yield BarredStep(ring, line, step, "below_minimum", minimum, is_newest)
        elif refusals == {"unknown"}:
            yield BarredStep(ring, line, step, "unknown", "", is_newest)


def _usable_versions(library: LibraryRoles, line: str) -> list[str]:
    """Return the public versions that neither the public index nor a waiting one bars."""
    if line not in library.lines() or library.published(line) is None:
        return []
    indexes = list(_indexes(library, line))
    versions = [release.version for release in library.public_index(line).versions]
    return [version for version in versions if all(index.refusal(version) is None for index in indexes)]


def _known_fault(library: LibraryRoles, line: str, version: str, results: FieldResults) -> str:
    """Return why a version is known to be bad; empty when it is not."""
    if failed := results.failed.get((line, version), 0):
        return f"it failed on {_boxes(failed)}"
    if (line, version) in results.stopped:
        return "the failure budget stopped it"
    paused = (
        ring
        for md in (library.published(ROLLOUT_ROLE), library.staged(ROLLOUT_ROLE))
        for ring, lines in (_rollouts(library, md) if md is not None else {}).items()
        if line in lines and lines[line].version == version and lines[line].paused
    )
    ring = next(paused, None)
    return f"its rollout to ring {ring} is paused" if ring is not None else ""


def _rollouts(library: LibraryRoles, md: AnyMetadata) -> dict[str, dict[str, RolloutStep]]:
    targets: Targets = md.signed
    documents = (Rollout.parse(library.read_target(targets, path)) for path in sorted(targets.targets))
    return {document.ring: dict(document.lines) for document in documents}


def _indexes(library: LibraryRoles, line: str) -> Iterator[LineIndex]:
    """Yield the newest index, waiting changes included, and the public one."""
    yield library.index(line)
    if library.published(line) is not None:
        yield library.public_index(line)


def _excluded(line: str, version: str, reason: str) -> str:
    return f"{line} {version} is not proposed: {reason}"


def _boxes(count: int) -> str:
    return f"{count} box{'es' if count != 1 else ''}"
