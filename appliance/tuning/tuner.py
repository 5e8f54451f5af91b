"""Measures which candidate runs a model fastest on this box with correct results.

Every candidate runs in a process of its own that may crash (:mod:`appliance.tuning.candidate_process`), runs the golden cases, and is
timed. A quick first pass excludes candidates that take more than 1.5 times as long as the fastest one at the same time. The others are
timed in turns, round by round: other work of the box slows down one turn, which hardly changes the median over the rounds. Then other
numbers of threads and batch sizes are tried in the remaining time.
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
from appliance.core.self_test_report import FIXED_BY_USER
from appliance.core.states import ActivationState, CandidateState
from appliance.runtime.candidate import Candidate
from appliance.tuning.batch_check import BatchCheck, repeats
from appliance.tuning.budget import Budget, Limits
from appliance.tuning.measurement import BATCHES, DEADLINE, NO_TIME, Measurement, Subject, runs_on_cpu
from appliance.tuning.selection import SAME_TIME, CandidateResult, Established, Selection, exactness, select

if TYPE_CHECKING:
    from appliance.runtime.availability import Availability
    from appliance.tuning.idle_wait import IdleWait

__all__ = ["BATCHES", "Limits", "Selection", "Subject", "tune"]

_EXCLUDE_RATIO: Final = 1.5
_FIRST_TIMINGS: Final = 7
_FIRST_MS: Final = 150.0  # a large model takes a second: seven inferences per candidate would leave no time for the last candidates
_SLOW_MS: Final = 1000.0  # one inference this long is precise enough, and a second one would take the time of other candidates
# The comparison goes on, in blocks of rounds, until the same candidate was the fastest in so many blocks one after the other.
_BLOCK_ROUNDS: Final = 5
_STABLE_BLOCKS: Final = 3
_MAX_BLOCKS: Final = 9
_MAX_OPEN: Final = 6
_RUNS_OF_A_BATCH: Final = 4  # full, nearly full, the warm-up, and its images alone

OnProgress = Callable[[ActivationState, float], None]
"""Called with the phase (BUILDING, SELF_TEST) and the part (0 to 1) of it that is done."""


def tune(
    subject: Subject, *, threads: int = 0, runtimes: Sequence[Availability] | None = None, cache: Path | None = None,
    limits: Limits | None = None, on_progress: OnProgress | None = None, is_fixed_by_user: bool = False,
    established: Established | None = None, idle: IdleWait | None = None,
) -> Selection:  # fmt: skip
    """Measure every candidate of this box for a model and choose the fastest correct one.

    ``threads`` are those of one inference: when 0, all cores, half of them and one are tried. ``runtimes`` are queried when None, and
    ``cache`` is the directory of engines and timing caches. ``is_fixed_by_user``: a person fixed the precision, which is then the reason.
    ``established`` is preferred where the times do not differ by more than noise. What is timed while ``idle`` sees jobs of the box is
    timed again.

    Raises:
        InferenceError: no candidate is correct; code and detail are those of the first candidate, the most exact variant.
    """
    from appliance.runtime.availability import available

    limits = limits or Limits()
    tuner = _Tuner(subject, threads, cache, limits, on_progress or (lambda _phase, _part: None), established, idle)
    try:
        rows = tuner.run(available() if runtimes is None else runtimes)
        chosen = next((row for row in rows if row.state == CandidateState.CHOSEN), None)
        if chosen is None:
            raise _no_correct_candidate(rows)
        entry = tuner.entries[chosen.candidate]
        return Selection(chosen.candidate, _reason(rows, chosen, is_fixed_by_user, tuner.is_stable), rows, entry.details, entry.differences)
    finally:
        tuner.close()


def _reason(rows: Sequence[CandidateResult], chosen: CandidateResult, is_fixed_by_user: bool, is_stable: bool) -> Note:
    """Return why the candidate was chosen; an incomplete table has a reason of its own."""
    if is_fixed_by_user:
        return Note(FIXED_BY_USER, chosen.candidate.precision)
    if not is_stable:
        return Note("choice.unstable", f"{_MAX_BLOCKS} blocks of {_BLOCK_ROUNDS} rounds")
    missing = sum(row.code == NO_TIME for row in rows)
    return Note("choice.measured_part", f"{missing} of {len(rows)} not measured") if missing else Note("choice.measured", chosen.detail)


def _no_correct_candidate(rows: Sequence[CandidateResult]) -> InferenceError:
    tried = [row for row in rows if row.state in (CandidateState.WRONG, CandidateState.FAILED)]
    late = [row for row in tried if row.code in (DEADLINE, NO_TIME)]
    if not tried or len(late) == len(tried):
        return InferenceError(DEADLINE, late[0].detail if late else "nothing was tried")
    first = next(row for row in tried if row not in late)
    return InferenceError("tune.wrong" if first.state == CandidateState.WRONG else first.code, first.detail)


class _Tuner:
    """One measurement, with the processes that it has open.

    Attributes:
        entries: every candidate that was tried.
        is_stable: whether the blocks of rounds agreed on the fastest candidate, as far as there was time for them.
    """

    def __init__(
        self, subject: Subject, threads: int, cache: Path | None, limits: Limits, on_progress: OnProgress,
        established: Established | None, idle: IdleWait | None,
    ) -> None:  # fmt: skip
        self._subject, self._threads, self._cache, self._on_progress = subject, threads, cache, on_progress
        self._budget, self._established = Budget(limits, idle), established
        self.is_stable = True
        self._sample = subject.cases[0].tensor
        self.entries: dict[Candidate, Measurement] = {}
        self._excluded: list[CandidateResult] = []

    def run(self, runtimes: Sequence[Availability]) -> tuple[CandidateResult, ...]:
        """Measure all candidates; returns the complete table with the chosen row."""
        plan = list(self._plan(runtimes))
        for index, candidate in enumerate(plan):
            self._on_progress(ActivationState.BUILDING, index / len(plan))
            self._measure(candidate, partial(self._report_building, index, len(plan)))
        self._retry_late()
        self._on_progress(ActivationState.SELF_TEST, 0.0)
        for candidate in list(self._thread_candidates()):
            if self._budget.is_measuring_over():
                self._mark_not_reached(candidate)
            else:
                self._measure(candidate)
        self._on_progress(ActivationState.SELF_TEST, 0.2)
        self._compare_finalists()
        self._on_progress(ActivationState.SELF_TEST, 0.7)
        self._measure_batches()
        self._on_progress(ActivationState.SELF_TEST, 1.0)
        rows = [*(entry.result() for entry in self.entries.values()), *self._excluded]
        return select(rows, self._established, keeps=not self.is_stable)

    def _report_building(self, index: int, count: int, part: float) -> None:
        self._on_progress(ActivationState.BUILDING, (index + part) / count)

    def close(self) -> None:
        """End every process."""
        for entry in self.entries.values():
            entry.close()

    def _plan(self, runtimes: Sequence[Availability]) -> Iterator[Candidate]:
        """List the candidates, the most exact first, so that a correct one is known early; what cannot run gets its row of the table here.

        The runtimes take turns, so that each is tried before the time is over; candidates that build an engine come last.
        """
        variants = sorted(self._subject.variants, key=lambda variant: exactness(variant.precision))
        for runtime in runtimes:
            if not runtime.providers:
                self._excluded.append(
                    CandidateResult(Candidate(runtime.runtime, "", "", ""), CandidateState.UNAVAILABLE, "runtime.unavailable", runtime.why)
                )
        combinations = [
            (runtime, variant, Candidate(runtime.runtime, variant.file, variant.precision, provider))
            for variant in variants for runtime in runtimes for provider in runtime.providers
        ]  # fmt: skip
        for runtime, variant, candidate in sorted(combinations, key=lambda item: not runs_on_cpu(item[2])):
            planned = replace(candidate, threads=self._threads if runs_on_cpu(candidate) else 0)
            if runtime.runtime in variant.not_on:
                self._excluded.append(CandidateResult(planned, CandidateState.UNAVAILABLE, "tune.not_on"))
            else:
                yield planned

    def _thread_candidates(self) -> Iterator[Candidate]:
        """List the remaining candidates with fewer threads: a small model may be faster with one."""
        for entry in self._open():
            candidate = entry.row.candidate
            if self._threads == 0 and runs_on_cpu(candidate):
                for threads in sorted({1, max(1, candidate.cores // 2)} - {candidate.cores}):
                    yield replace(candidate, threads=threads)

    def _retry_late(self) -> None:
        """Retry candidates whose deadline was too short for this model, with the remaining time."""
        late = [entry for entry in self.entries.values() if entry.row.code == DEADLINE]
        for index, entry in enumerate(late):
            candidate = entry.row.candidate
            allowed_s = self._load_deadline_s(candidate) if self._correct() else self._budget.remaining_s() / (len(late) - index)
            if not self._budget.is_over() and allowed_s > entry.allowed_s:
                self._measure(candidate, allowed_s=allowed_s)

    def _load_deadline_s(self, candidate: Candidate) -> float:
        """Compute the time limit of a load: a multiple of the time that others needed, or a share of the remaining time."""
        known_s = max((entry.load_s for entry in self._correct() if runs_on_cpu(entry.row.candidate)), default=0.0)
        return self._budget.load_deadline_s(known_s, builds_engine=not runs_on_cpu(candidate))

    def _measure(
        self, candidate: Candidate, on_progress: Callable[[float], None] = lambda _part: None, *, allowed_s: float | None = None
    ) -> None:
        """Load a candidate, run every golden case, and time it in turns with the fastest so far.

        Every candidate gets this, however slow the others were: the last one may be the fastest.
        """
        if self._budget.is_over():
            self._mark_not_reached(candidate)
            return
        allowed_s = self._load_deadline_s(candidate) if allowed_s is None else allowed_s
        entry = self.entries[candidate] = Measurement(candidate, self._subject, self._budget, allowed_s)
        if not self._load_and_check(entry, on_progress):
            return
        try:
            self._time_first(entry)
        except InferenceError as error:
            entry.fail(error)
        self._close_slow()

    def _mark_not_reached(self, candidate: Candidate) -> None:
        self.entries[candidate] = Measurement(candidate, self._subject, self._budget, 0.0)
        self.entries[candidate].end(CandidateState.UNAVAILABLE, NO_TIME)

    def _load_and_check(self, entry: Measurement, on_progress: Callable[[float], None] = lambda _part: None) -> bool:
        """Load a candidate and run the golden cases; returns whether it is correct."""
        try:
            entry.load(self._cache, on_progress)
        except InferenceError as error:
            entry.fail(error)
            return False
        return entry.check_golden_cases()

    def _close_slow(self) -> None:
        """Close the slowest candidates that exceed the limits of number and memory; the fastest stays open."""
        held = 0
        for index, entry in enumerate(sorted(self._open(), key=lambda entry: entry.median_ms)):
            held += entry.held_bytes
            if index and (index >= _MAX_OPEN or held > self._budget.held_bytes):
                entry.close()

    def _time_first(self, entry: Measurement) -> None:
        """Time a candidate in turns with the fastest so far; one that is far slower is closed, a fastest one that fails is excluded."""
        best = min((other for other in self._open() if other.first_ms), key=lambda other: other.first_ms, default=None)
        self._budget.begin_timing()
        mine, others = self._time_in_turns(entry, best)
        while self._budget.was_disturbed():
            mine, others = self._time_in_turns(entry, best)
        entry.first_ms, entry.worst_ms = statistics.median(mine), max(mine)
        if best is None or not best.is_open:  # none, or it failed: later candidates are compared with this one
            return
        best_ms = statistics.median(others) if others else best.first_ms
        if entry.first_ms > _EXCLUDE_RATIO * best_ms:
            entry.close()
        for other in self._open():
            if other is not entry and other.first_ms * best_ms / best.first_ms > _EXCLUDE_RATIO * entry.first_ms:
                other.close()

    def _time_in_turns(self, entry: Measurement, best: Measurement | None) -> tuple[list[float], list[float]]:
        """Time a candidate and the fastest so far; returns milliseconds of each, none of the latter where it failed or one takes long."""
        (once,) = entry.time(self._sample, 1)
        repeat = 0 if once > _SLOW_MS else max(1, min(_FIRST_TIMINGS, round(_FIRST_MS / max(once, 0.01))))
        mine: list[float] = []
        others: list[float] = []
        for _ in range(2 if repeat else 0):
            mine += entry.time(self._sample, repeat, once)
            if best is not None and best.is_open:
                others += self._time_or_fail(best, repeat)
        return mine or [once], others

    def _time_or_fail(self, entry: Measurement, repeat: int) -> list[float]:
        """Time an open candidate, which is excluded when that fails; returns milliseconds, none when it failed."""
        try:
            return entry.time(self._sample, repeat, entry.first_ms)
        except InferenceError as error:
            entry.fail(error)
            return []

    def _compare_finalists(self) -> None:
        """Time the remaining candidates in rounds; an excluded one that now is near the fastest is loaded again."""
        self._time_rounds(self._open())
        for _ in range(2):
            measured = [entry.median_ms for entry in self._correct() if entry.medians] or [entry.first_ms for entry in self._correct()]
            near = [entry for entry in self._correct() if not entry.medians and entry.first_ms <= SAME_TIME * min(measured)]
            if not near or self._budget.is_measuring_over():
                return
            for entry in near:
                if not self._budget.is_measuring_over() and not entry.is_open and self._load_and_check(entry):
                    self._close_slow()
            self._time_rounds(self._open())

    def _time_rounds(self, entries: Sequence[Measurement]) -> None:
        """Time these in turns while there is measuring time, until the fastest is the same in several blocks of rounds.

        The order changes from round to round. The times of the last blocks count: those of a time when other work slowed one candidate
        are dropped.
        """
        if self._budget.is_measuring_over():
            return
        for entry in entries:
            entry.medians = []
        leader, agreed = self._established_entry(entries), 0
        for block in range(_MAX_BLOCKS):
            for number in range(block * _BLOCK_ROUNDS, (block + 1) * _BLOCK_ROUNDS):
                if not self._time_round(entries, number):
                    self._discard_partial_round(entries)
                    return
            fastest = self._leader_of_block(entries, leader)
            leader, agreed = fastest, agreed + 1 if fastest is leader and block else 1
            if agreed >= _STABLE_BLOCKS or fastest is None:
                break
        self.is_stable = agreed >= _STABLE_BLOCKS or leader is None
        for entry in entries:
            entry.medians = entry.medians[-_STABLE_BLOCKS * _BLOCK_ROUNDS :]

    def _time_round(self, entries: Sequence[Measurement], number: int) -> bool:
        """Time each once, again where jobs of the box disturbed it; returns False when the measuring time is over."""
        first = number % max(1, len(entries))
        self._budget.begin_timing()
        while True:
            taken: list[tuple[Measurement, list[float]]] = []
            for entry in [*entries[first:], *entries[:first]]:
                if self._budget.is_measuring_over():
                    return False
                taken.append((entry, self._time_or_fail(entry, repeats(entry.first_ms)) if entry.is_open else []))
            if not self._budget.was_disturbed():
                break
        for entry, times in taken:
            if times:
                entry.medians.append(statistics.median(times))
                entry.worst_ms = max(entry.worst_ms, *times)
        return True

    def _established_entry(self, entries: Sequence[Measurement]) -> Measurement | None:
        matching = (entry for entry in entries if (entry.row.candidate.runtime, entry.row.candidate.precision) == self._established)
        return next(matching, None)

    @staticmethod
    def _leader_of_block(entries: Sequence[Measurement], leader: Measurement | None) -> Measurement | None:
        """Return the fastest of the last block; the leader so far stays the leader within 3 % of it."""
        times = {entry: statistics.median(entry.medians[-_BLOCK_ROUNDS:]) for entry in entries if entry.is_open and entry.medians}
        fastest = min(times, key=lambda entry: times[entry], default=None)
        if fastest is not None and leader in times and times[leader] <= SAME_TIME * times[fastest]:
            return leader
        return fastest

    @staticmethod
    def _discard_partial_round(entries: Sequence[Measurement]) -> None:
        """Discard a first round that is incomplete: the quick timings count instead."""
        if any(entry.is_open and not entry.medians for entry in entries):
            for entry in entries:
                entry.medians = []

    def _measure_batches(self) -> None:
        """Measure larger and larger batches of the fastest candidate until the time per image no longer falls."""
        rows = select([entry.result() for entry in self.entries.values()])
        base = next((self.entries[row.candidate] for row in rows if row.state == CandidateState.CHOSEN), None)
        if base is None or not self._subject.batches:
            return
        for entry in self._open():
            if entry is not base:
                entry.close()
        check, best_ms = BatchCheck(base, self._subject.cases, self._budget), base.median_ms
        for batch in self._subject.batches:
            candidate = replace(base.row.candidate, batch=batch)
            if self._budget.measuring_remaining_s() * 1000 < _RUNS_OF_A_BATCH * batch * base.median_ms:
                self._mark_not_reached(candidate)
                return
            if base.row.state != CandidateState.CORRECT or not (base.is_open or self._load_and_check(base)):
                return
            entry = self.entries[candidate] = Measurement(candidate, self._subject, self._budget, self._load_deadline_s(candidate))
            self._measure_batch(entry, base, check)
            if entry.row.per_image_ms is None or entry.row.per_image_ms > SAME_TIME * best_ms:
                return
            best_ms = entry.row.per_image_ms

    def _measure_batch(self, entry: Measurement, base: Measurement, check: BatchCheck) -> None:
        """Check that each image of a batch gets its own result, then time the batch."""
        try:
            is_distinct = check.add_references(entry.row.candidate.batch)
        except InferenceError as error:
            base.fail(error)
            entry.end(CandidateState.UNAVAILABLE, NO_TIME if self._budget.is_over() else error.code, error.detail)
            return
        if not is_distinct:
            entry.end(CandidateState.UNAVAILABLE, "tune.alike")
            return
        if not self._load_and_check(entry):
            return
        try:
            problem = check.find_error(entry)
        except InferenceError as error:
            entry.fail(error)
            return
        if problem:
            entry.end(CandidateState.WRONG, "tune.wrong", problem)
        else:
            check.time(entry)

    def _open(self) -> list[Measurement]:
        return [entry for entry in self.entries.values() if entry.is_open]

    def _correct(self) -> list[Measurement]:
        return [entry for entry in self.entries.values() if entry.row.state == CandidateState.CORRECT and entry.first_ms]
