"""Measuring which way of running a model is the fastest on this box that is still right: nothing is believed, everything is tried.

Every candidate runs in a process of its own that may die of it (:mod:`appliance.tuning.candidate_process`), answers the golden cases, and
is timed. A cheap first pass throws out whatever takes more than one and a half times as long as the fastest in the same moment; the
others are timed in turns, round by round, since a machine that does something else meanwhile slows whoever has the turn: the median
over rounds forgives that, one long measurement after the other would not. Then threads and batches are tried with what is left.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.core.domain import Note
from appliance.core.errors import InferenceError
from appliance.runtime.candidate import Candidate
from appliance.tuning.batch_check import Together, repeats
from appliance.tuning.budget import Budget
from appliance.tuning.measurement import DEADLINE, NO_TIME, Entry, fastest, on_cpu
from appliance.tuning.selection import SAME_TIME, Choice, Row, choose, exactness
from appliance.tuning.subject import BATCHES, Limits, Subject

if TYPE_CHECKING:
    from appliance.runtime.availability import Availability

__all__ = ["BATCHES", "Choice", "Limits", "Subject", "tune"]

_THROW_OUT: Final = 1.5
_FIRST_TIMINGS: Final = 7
_FIRST_MS: Final = 150.0  # a large segmenter takes a second: seven of those for each candidate would leave no time for the last ones
_SLOW_MS: Final = 1000.0  # one run of so long has its own noise evened out, and a second would cost what others need
_ROUNDS: Final = 15
_MOST_OPEN: Final = 6
_CHECKS_OF_A_BATCH: Final = 4  # it is run full, nearly full, once warm, and its images alone

Told = Callable[[str, float], None]
"""Called with the state (``building``, ``self-test``) and the part of it that is done."""


def tune(
    subject: Subject, *, threads: int = 0, runtimes: Sequence[Availability] | None = None, cache: Path | None = None,
    limits: Limits | None = None, told: Told | None = None, by_hand: bool = False,
) -> Choice:  # fmt: skip
    """Measure every way this box has of running a model and choose the fastest that is right.

    Args:
        subject: the model.
        threads: of one inference; when 0, all cores, half of them and one are tried.
        runtimes: what can run here; asked for when None.
        cache: directory for engines and timing caches.
        limits: time and memory.
        told: called as it goes on.
        by_hand: a person asked for this precision, which is then the reason.

    Raises:
        InferenceError: nothing is right here; code and detail are those of the most exact variant on the plainest runtime.
    """
    from appliance.runtime.availability import available

    limits = limits or Limits()
    tuner = _Tuner(subject, threads, cache, limits, told or (lambda _state, _part: None))
    try:
        rows = tuner.run(available() if runtimes is None else runtimes)
        chosen = next((row for row in rows if row.state == "chosen"), None)
        if chosen is None:
            raise _nothing_right(rows)
        entry = tuner.entries[chosen.candidate]
        return Choice(chosen.candidate, _reason(rows, chosen, by_hand), rows, entry.details, entry.differences)
    finally:
        tuner.close()


def _reason(rows: Sequence[Row], chosen: Row, by_hand: bool) -> Note:
    """Why it is run this way; a table with holes says so."""
    if by_hand:
        return Note("choice.by_hand", chosen.candidate.precision)
    holes = sum(row.code == NO_TIME for row in rows)
    return Note("choice.measured_part", f"{holes} of {len(rows)} not measured") if holes else Note("choice.measured", chosen.detail)


def _nothing_right(rows: Sequence[Row]) -> InferenceError:
    tried = [row for row in rows if row.state in ("wrong", "failed")]
    late = [row for row in tried if row.code in (DEADLINE, NO_TIME)]
    if not tried or len(late) == len(tried):
        return InferenceError(DEADLINE, late[0].detail if late else "nothing was tried")
    first = next(row for row in tried if row not in late)
    return InferenceError("tune.wrong" if first.state == "wrong" else first.code, first.detail)


class _Tuner:
    """One measuring, with the processes it has open."""

    def __init__(self, subject: Subject, threads: int, cache: Path | None, limits: Limits, told: Told) -> None:
        self._subject, self._threads, self._cache, self._told = subject, threads, cache, told
        self._budget = Budget(limits)
        self._sample = subject.cases[0].tensor
        self.entries: dict[Candidate, Entry] = {}
        self._idle: list[Row] = []

    def run(self, runtimes: Sequence[Availability]) -> tuple[Row, ...]:
        """The whole table, with what was chosen."""
        plan = list(self._plan(runtimes))
        for index, candidate in enumerate(plan):
            self._told("building", index / len(plan))
            self._first(candidate, self._load_s(candidate), partial(self._part_of, index, len(plan)))
        self._late_again()
        self._told("self-test", 0.0)
        for candidate in list(self._thread_choices()):
            self._threads_tried(candidate)
        self._told("self-test", 0.2)
        self._finals()
        self._told("self-test", 0.7)
        self._batches()
        self._told("self-test", 1.0)
        return choose([*(entry.final() for entry in self.entries.values()), *self._idle])

    def _part_of(self, index: int, count: int, part: float) -> None:
        self._told("building", (index + part) / count)

    def close(self) -> None:
        """End every process."""
        for entry in self.entries.values():
            entry.close()

    # -- what is tried -----------------------------------------------------------------------------------------------

    def _plan(self, runtimes: Sequence[Availability]) -> Iterator[Candidate]:
        """The plainest first, so that something right is known early; the rows of what cannot run are noted.

        Runtimes by turns, so that none is left out altogether when the time is over; what has to build an engine comes last.
        """
        variants = sorted(self._subject.variants, key=lambda variant: exactness(variant.precision))
        for runtime in runtimes:
            if not runtime.providers:
                self._idle.append(Row(Candidate(runtime.runtime, "", "", ""), "unavailable", "runtime.unavailable", runtime.why))
        ways = [(variant, runtime.runtime, provider) for variant in variants for runtime in runtimes for provider in runtime.providers]
        for variant, runtime_name, provider in sorted(ways, key=lambda way: not on_cpu(way[1], way[2])):
            threads = self._threads if on_cpu(runtime_name, provider) else 0
            candidate = Candidate(runtime_name, variant.file, variant.precision, provider, threads)
            if runtime_name in variant.not_on:
                self._idle.append(Row(candidate, "unavailable", "tune.not_on"))
            else:
                yield candidate

    def _thread_choices(self) -> Iterator[Candidate]:
        """Fewer threads for what is still in: a small model may be faster with one."""
        for entry in self._open():
            candidate = entry.row.candidate
            if self._threads == 0 and on_cpu(candidate.runtime, candidate.provider):
                for threads in sorted({1, max(1, candidate.cores // 2)} - {candidate.cores}):
                    yield replace(candidate, threads=threads)

    def _threads_tried(self, candidate: Candidate) -> None:
        if self._budget.spent():
            self._not_reached(candidate)
        else:
            self._first(candidate, self._load_s(candidate))

    def _late_again(self) -> None:
        """What was ended by a deadline that has proved too short for this model is tried again, with what time there is."""
        late = [entry for entry in self.entries.values() if entry.row.code == DEADLINE]
        for index, entry in enumerate(late):
            candidate = entry.row.candidate
            allowed_s = self._load_s(candidate) if self._right() else self._budget.left_s() / (len(late) - index)
            if not self._budget.over() and allowed_s > entry.allowed_s:
                self._first(candidate, allowed_s)

    def _load_s(self, candidate: Candidate) -> float:
        """The time a candidate gets for its load: that others needed, some times over, and a share of what is left."""
        known_s = max((entry.load_s for entry in self._right() if _is_on_cpu(entry.row.candidate)), default=0.0)
        return self._budget.load_s(known_s, builds=not _is_on_cpu(candidate))

    def _first(self, candidate: Candidate, allowed_s: float, told: Callable[[float], None] = lambda _part: None) -> None:
        """Load it, check every golden case, and time it in turns with the fastest so far.

        However slow the others were, each way gets this much: the fastest may be the last.
        """
        if self._budget.over():
            self._not_reached(candidate)
            return
        entry = self.entries[candidate] = Entry(candidate, self._subject, self._budget, allowed_s)
        if not self._enter(entry, told):
            return
        try:
            self._duel(entry)
        except InferenceError as error:
            entry.fail(error)
        self._trim()

    def _not_reached(self, candidate: Candidate) -> None:
        entry = self.entries[candidate] = Entry(candidate, self._subject, self._budget, 0.0)
        entry.ended("unavailable", NO_TIME)

    def _enter(self, entry: Entry, told: Callable[[float], None] = lambda _part: None) -> bool:
        """Load a candidate and hold it against the golden cases; returns whether it is right."""
        try:
            entry.load(self._cache, told)
        except InferenceError as error:
            entry.fail(error)
            return False
        return entry.judge()

    def _trim(self) -> None:
        """Of those open no more than may be held at once, in number and in memory together; the fastest stays."""
        held = 0
        for index, entry in enumerate(sorted(self._open(), key=lambda entry: entry.median_ms)):
            held += entry.held_bytes
            if index and (index >= _MOST_OPEN or held > self._budget.held_bytes):
                entry.close()

    # -- how long it takes -------------------------------------------------------------------------------------------

    def _duel(self, entry: Entry) -> None:
        """A first median, by turns with the fastest so far; whoever is far slower is closed. A fastest that fails then is out itself."""
        (once,) = entry.time(self._sample, 1)
        repeat = 0 if once > _SLOW_MS else max(1, min(_FIRST_TIMINGS, round(_FIRST_MS / max(once, 0.01))))
        mine: list[float] = []
        others: list[float] = []
        best = fastest(self._open())
        for _ in range(2 if repeat else 0):
            mine += entry.time(self._sample, repeat, once)
            if best is not None and best.open:
                others += self._of_best(best, repeat)
        entry.first_ms, entry.worst_ms = statistics.median(mine or [once]), max(mine or [once])
        if best is None or not best.open:  # it has died, or is none: the next fastest is held against this one when its turn comes
            return
        best_ms = statistics.median(others) if others else best.first_ms
        if entry.first_ms > _THROW_OUT * best_ms:
            entry.close()
        for other in self._open():
            if other is not entry and other.first_ms * best_ms / best.first_ms > _THROW_OUT * entry.first_ms:
                other.close()

    def _of_best(self, best: Entry, repeat: int) -> list[float]:
        try:
            return best.time(self._sample, repeat, best.first_ms)
        except InferenceError as error:
            best.fail(error)
            return []

    def _finals(self) -> None:
        """Rounds among those still in; whoever was thrown out and now seems near the fastest comes back for another try."""
        self._rounds(self._open())
        for _ in range(2):
            measured = [entry.median_ms for entry in self._right() if entry.medians] or [entry.first_ms for entry in self._right()]
            near = [entry for entry in self._right() if not entry.medians and entry.first_ms <= SAME_TIME * min(measured)]
            if not near or self._budget.spent():
                return
            for entry in near:
                if not self._budget.spent() and not entry.open and self._enter(entry):
                    self._trim()
            self._rounds(self._open())

    def _rounds(self, entries: Sequence[Entry]) -> None:
        """Time these in turns, as long as there is time for measuring; the order changes from round to round."""
        if self._budget.spent():
            return
        for entry in entries:
            entry.medians = []
        for number in range(_ROUNDS):
            first = number % max(1, len(entries))
            for entry in [*entries[first:], *entries[:first]]:
                if self._budget.spent():
                    self._unfinished(entries)
                    return
                self._turn(entry)

    @staticmethod
    def _unfinished(entries: Sequence[Entry]) -> None:
        """A first round that not everybody had tells nothing: the quick timings count."""
        if any(entry.open and not entry.medians for entry in entries):
            for entry in entries:
                entry.medians = []

    def _turn(self, entry: Entry) -> None:
        if not entry.open:
            return
        try:
            times = entry.time(self._sample, repeats(entry.first_ms), entry.first_ms)
        except InferenceError as error:
            entry.fail(error)
            return
        entry.medians.append(statistics.median(times))
        entry.worst_ms = max(entry.worst_ms, *times)

    # -- several images at once --------------------------------------------------------------------------------------

    def _batches(self) -> None:
        """Bigger and bigger batches of the fastest, until an image in one takes no less than in the one before."""
        rows = choose([entry.final() for entry in self.entries.values()])
        base = next((self.entries[row.candidate] for row in rows if row.state == "chosen"), None)
        if base is None or not self._subject.batches:
            return
        for entry in self._open():
            if entry is not base:
                entry.close()
        together, least = Together(base, self._subject.cases, self._budget), base.median_ms
        for batch in self._subject.batches:
            candidate = replace(base.row.candidate, batch=batch)
            if self._budget.measuring_left_s() * 1000 < _CHECKS_OF_A_BATCH * batch * base.median_ms:
                self._not_reached(candidate)
                return
            if base.row.state != "right" or not (base.open or self._enter(base)):
                return
            entry = self.entries[candidate] = Entry(candidate, self._subject, self._budget, self._load_s(candidate))
            self._batch(entry, base, together)
            if entry.row.per_image_ms is None or entry.row.per_image_ms > SAME_TIME * least:
                return
            least = entry.row.per_image_ms

    def _batch(self, entry: Entry, base: Entry, together: Together) -> None:
        """Each image of it has to get its own answer; then it is timed."""
        try:
            apart = together.know(entry.row.candidate.batch)
        except InferenceError as error:
            base.fail(error)
            entry.ended("unavailable", NO_TIME if self._budget.over() else error.code, error.detail)
            return
        if not apart:
            entry.ended("unavailable", "tune.alike")
            return
        if not self._enter(entry):
            return
        try:
            wrong = together.wrong(entry)
        except InferenceError as error:
            entry.fail(error)
            return
        if wrong:
            entry.ended("wrong", "tune.wrong", wrong)
        else:
            together.time(entry)

    def _open(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.open]

    def _right(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.row.state == "right" and entry.first_ms]


def _is_on_cpu(candidate: Candidate) -> bool:
    return on_cpu(candidate.runtime, candidate.provider)
