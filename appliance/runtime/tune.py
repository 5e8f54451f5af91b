"""Measuring which way of running a model is the fastest on this box that is still right: nothing is believed, everything is tried.

Every candidate runs in a process of its own that may die of it (:mod:`appliance.runtime.attempt`), answers the golden cases, and is
timed. A cheap first pass throws out whatever takes more than one and a half times as long as the fastest in the same moment; the
others are timed in turns, round by round, since a machine that does something else meanwhile slows whoever has the turn: the median
over rounds forgives that, one long measurement after the other would not. Then threads and batches are tried with what is left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.domain import Note
from appliance.errors import InferenceError
from appliance.runtime.attempt import Attempt
from appliance.runtime.candidate import CPU, Candidate
from appliance.runtime.choice import SAME_TIME, Choice, Row, choose, exactness
from appliance.runtime.subject import BATCHES, Limits, Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from appliance.runtime.available import Availability

__all__ = ["BATCHES", "Choice", "Limits", "Subject", "tune"]

_THROW_OUT: Final = 1.5
_FIRST_TIMINGS: Final = 7
_FIRST_MS: Final = 150.0  # a large segmenter takes a second: seven of those for each candidate would leave no time for the last ones
_WARM_TIMINGS: Final = 2
_ROUNDS: Final = 15
_LEAST_ROUNDS: Final = 5
_BATCH_ROUNDS: Final = 7
_TURN_MS: Final = 25.0
_MOST_PER_TURN: Final = 20
_MOST_OPEN: Final = 6
_LEAST_DEADLINE_S: Final = 5.0
_DEADLINE_SHARE: Final = 0.5
_ON_CPU: Final = ("onnxruntime", "openvino")

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
    from appliance.runtime.available import available

    limits = limits or Limits()
    tuner = _Tuner(subject, threads, cache, limits, told or (lambda _state, _part: None))
    try:
        rows = tuner.run(available() if runtimes is None else runtimes)
        chosen = next((row for row in rows if row.state == "chosen"), None)
        if chosen is None:
            raise _nothing_right(rows)
        entry = tuner.entries[chosen.candidate]
        reason = Note("choice.by_hand", chosen.candidate.precision) if by_hand else Note("choice.measured", chosen.detail)
        return Choice(chosen.candidate, reason, rows, entry.details, entry.differences)
    finally:
        tuner.close()


def _nothing_right(rows: Sequence[Row]) -> InferenceError:
    tried = [row for row in rows if row.state in ("wrong", "failed")]
    late = [row for row in tried if row.code in ("runtime.deadline", "tune.no_time")]
    if not tried or len(late) == len(tried):
        return InferenceError("runtime.deadline", late[0].detail if late else "nothing was tried")
    first = next(row for row in tried if row not in late)
    return InferenceError("tune.wrong" if first.state == "wrong" else first.code, first.detail)


class _Entry:
    """One candidate under way."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.attempt: Attempt | None = None
        self.details: dict[str, Any] = {}
        self.differences: dict[str, float] = {}
        self.first_ms = 0.0
        self.medians: list[float] = []
        self.worst_ms = 0.0

    @property
    def median_ms(self) -> float:
        return statistics.median(self.medians) if self.medians else self.first_ms

    def ended(self, state: Any, code: str, detail: str = "") -> None:
        """It is out."""
        self.close()
        self.row = replace(self.row, state=state, code=code, detail=detail)

    def close(self) -> None:
        if self.attempt is not None:
            self.attempt.close()
            self.attempt = None

    def final(self) -> Row:
        """Its row with what was measured."""
        if self.row.state != "right" or not (self.medians or self.first_ms):
            return self.row
        return replace(self.row, median_ms=self.median_ms, worst_ms=self.worst_ms or None)


class _Tuner:
    """One measuring, with the processes it has open."""

    def __init__(self, subject: Subject, threads: int, cache: Path | None, limits: Limits, told: Told) -> None:
        self._subject, self._threads, self._cache, self._limits, self._told = subject, threads, cache, limits, told
        self._started = time.monotonic()
        self._built_s = 0.0
        self.entries: dict[Candidate, _Entry] = {}
        self._idle: list[Row] = []

    def run(self, runtimes: Sequence[Availability]) -> tuple[Row, ...]:
        """The whole table, with what was chosen."""
        plan = list(self._plan(runtimes))
        for index, candidate in enumerate(plan):
            self._told("building", index / len(plan))
            self._first(candidate, partial(self._part_of, index, len(plan)))
        self._told("self-test", 0.0)
        for candidate in list(self._thread_choices()):
            self._first(candidate, lambda _part: None)
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
        for variant, runtime_name, provider in sorted(ways, key=lambda way: not _on_cpu(way[1], way[2])):
            threads = self._threads if _on_cpu(runtime_name, provider) else 0
            candidate = Candidate(runtime_name, variant.file, variant.precision, provider, threads)
            if runtime_name in variant.not_on:
                self._idle.append(Row(candidate, "unavailable", "tune.not_on"))
            else:
                yield candidate

    def _thread_choices(self) -> Iterator[Candidate]:
        """Fewer threads for what is still in: a small model may be faster with one."""
        for entry in self._open():
            candidate = entry.row.candidate
            if self._threads == 0 and _on_cpu(candidate.runtime, candidate.provider):
                for threads in sorted({1, max(1, candidate.cores // 2)} - {candidate.cores}):
                    yield replace(candidate, threads=threads)

    def _first(self, candidate: Candidate, told: Callable[[float], None]) -> None:
        """Load it, check every golden case, and time it in turns with the fastest so far."""
        entry = self.entries[candidate] = _Entry(Row(candidate, "right", ""))
        if self._spent():
            entry.ended("unavailable", "tune.no_time")
            return
        if not self._enter(entry, told):
            return
        best = min((other for other in self._open() if other is not entry), key=lambda other: other.first_ms, default=None)
        try:
            entry.first_ms, best_ms = self._duel(entry, best)
        except InferenceError as error:
            entry.ended("failed", error.code, error.detail)
            return
        if best is not None and best_ms is not None:
            if entry.first_ms > _THROW_OUT * best_ms:
                entry.ended("right", "")
            for other in self._open():
                if other is not entry and other.first_ms * best_ms / best.first_ms > _THROW_OUT * entry.first_ms:
                    other.close()
        for slow in sorted(self._open(), key=lambda other: other.first_ms)[_MOST_OPEN:]:
            slow.close()

    def _enter(self, entry: _Entry, told: Callable[[float], None]) -> bool:
        """Load a candidate and hold it against the golden cases; returns whether it is right."""
        try:
            self._load(entry, told)
        except InferenceError as error:
            entry.ended("unavailable" if error.code == "runtime.unavailable" else "failed", error.code, error.detail)
            return False
        return self._judge(entry)

    def _load(self, entry: _Entry, told: Callable[[float], None]) -> None:
        candidate, started = entry.row.candidate, time.monotonic()
        deadline_s = max(_LEAST_DEADLINE_S, _DEADLINE_SHARE * self._left_s())
        entry.attempt = Attempt(
            self._subject.path(candidate.file), self._subject.input, candidate, cache=self._cache, deadline_s=deadline_s,
            memory_bytes=self._limits.memory_bytes, told=told,
        )  # fmt: skip
        try:
            entry.details = entry.attempt.load()
        finally:
            if not _on_cpu(candidate.runtime, candidate.provider):  # a build takes minutes, and is no measuring
                self._built_s += time.monotonic() - started
        layers = entry.details.get("layers")
        entry.row = replace(entry.row, load_ms=entry.attempt.load_ms, layers=dict(layers) if isinstance(layers, dict) else {})

    def _judge(self, entry: _Entry) -> bool:
        assert entry.attempt is not None
        precision = entry.row.candidate.precision
        for case in self._subject.cases:
            allowed = case.tolerance[precision]
            try:
                difference = case.difference(lambda tensor: self._answer(entry, tensor))
            except InferenceError as error:  # no number at all, or none that is a probability, is as wrong as can be
                wrong = error.code == "job.error"
                entry.ended("wrong" if wrong else "failed", "tune.wrong" if wrong else error.code, f"{case.name}: {error.detail}")
                return False
            entry.differences[case.name] = difference
            worst = max(entry.differences.values(), key=lambda value: (value != value, value))
            entry.row = replace(entry.row, max_difference=None if worst != worst else worst, peak_rss_bytes=entry.attempt.peak_rss_bytes)
            if not difference <= allowed:  # also true for NaN
                entry.ended("wrong", "tune.wrong", f"{case.name}: off by {difference:.4g}, allowed {allowed:g}")
                return False
        return True

    def _answer(self, entry: _Entry, tensor: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """What a candidate says to one input; one of several images gives it as the last of a full batch."""
        assert entry.attempt is not None
        outputs = entry.attempt.infer(self._stack(tensor, entry.row.candidate.batch))
        return {name: value[-1:] for name, value in outputs.items()}

    def _stack(self, tensor: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
        import numpy as np

        sample = self._sample
        return tensor if batch == 1 else np.concatenate([*(sample for _ in range(batch - 1)), tensor])

    @property
    def _sample(self) -> NDArray[np.float32]:
        return self._subject.cases[0].tensor

    # -- how long it takes -------------------------------------------------------------------------------------------

    def _duel(self, entry: _Entry, best: _Entry | None) -> tuple[float, float | None]:
        """A first median, and the fastest's in the same moment."""
        assert entry.attempt is not None
        once = min(entry.attempt.time(self._sample, _WARM_TIMINGS))
        repeat = max(1, min(_FIRST_TIMINGS, round(_FIRST_MS / max(once, 0.01))))
        mine, others = [], []
        for _ in range(2):
            mine += entry.attempt.time(self._sample, repeat)
            if best is not None and best.attempt is not None:
                others += best.attempt.time(self._sample, repeat)
        entry.worst_ms = max(mine)
        return statistics.median(mine), statistics.median(others) if others else None

    def _finals(self) -> None:
        """Rounds among those still in; whoever was thrown out and now seems near the fastest comes back for another try."""
        self._rounds(self._open())
        for _ in range(2):
            measured = [entry.median_ms for entry in self.entries.values() if entry.medians]
            near = [entry for entry in self._right() if not entry.medians and measured and entry.first_ms <= SAME_TIME * min(measured)]
            if not near or self._spent():
                return
            for entry in near:
                self._enter(entry, lambda _part: None)
            self._rounds(self._open())

    def _rounds(self, entries: Sequence[_Entry]) -> None:
        """Time these in turns; the order changes from round to round."""
        for entry in entries:
            entry.medians = []
        for number in range(_ROUNDS):
            if number >= _LEAST_ROUNDS and self._spent():
                break
            first = number % max(1, len(entries))
            for entry in [*entries[first:], *entries[:first]]:
                self._turn(entry)

    def _turn(self, entry: _Entry) -> None:
        if entry.attempt is None:
            return
        try:
            times = entry.attempt.time(self._sample, self._repeat(entry.first_ms))
        except InferenceError as error:
            entry.ended("failed", error.code, error.detail)
            return
        entry.medians.append(statistics.median(times))
        entry.worst_ms = max(entry.worst_ms, *times)
        entry.row = replace(entry.row, peak_rss_bytes=entry.attempt.peak_rss_bytes)

    def _batches(self) -> None:
        """Bigger and bigger batches of the fastest, until an image in one takes no less than in the one before."""
        rows = choose([entry.final() for entry in self.entries.values()])
        base = next((self.entries[row.candidate] for row in rows if row.state == "chosen"), None)
        if base is None or base.attempt is None:
            return
        least = base.median_ms
        for batch in self._subject.batches:
            if self._spent():
                return
            entry = _Entry(Row(replace(base.row.candidate, batch=batch), "right", ""))
            self.entries[entry.row.candidate] = entry
            if not self._enter(entry, lambda _part: None):
                return
            per_image = self._time_batch(entry, base, batch)
            if per_image is None or per_image > SAME_TIME * least:
                return
            least = per_image

    def _time_batch(self, entry: _Entry, base: _Entry, batch: int) -> float | None:
        """Time one image and a full batch by turns with the fastest; milliseconds of an image in the batch, None when it failed.

        Both are kept in proportion to the fastest in the same minute: the finals were at another one, when the machine may have had
        more or less to do.
        """
        assert entry.attempt is not None
        assert base.attempt is not None
        stacked = self._stack(self._sample, batch)
        repeat, together = self._repeat(base.first_ms), self._repeat(base.first_ms * batch)
        one: list[float] = []
        alone: list[float] = []
        of_batch: list[float] = []
        try:
            entry.attempt.time(stacked, 1)
            for _ in range(_BATCH_ROUNDS):
                one.append(statistics.median(base.attempt.time(self._sample, repeat)))
                alone.append(statistics.median(entry.attempt.time(self._sample, repeat)))
                of_batch.append(statistics.median(entry.attempt.time(stacked, together)))
        except InferenceError as error:
            entry.ended("failed", error.code, error.detail)
            return None
        scale = base.median_ms / statistics.median(one)
        entry.medians, entry.worst_ms = [scale * statistics.median(alone)], scale * max(alone)
        per_image = scale * statistics.median(of_batch) / batch
        entry.row = replace(entry.row, per_image_ms=per_image, peak_rss_bytes=entry.attempt.peak_rss_bytes)
        entry.close()
        return per_image

    @staticmethod
    def _repeat(expected_ms: float) -> int:
        """How often something is run in one turn."""
        return max(1, min(_MOST_PER_TURN, round(_TURN_MS / max(expected_ms, 0.01))))

    def _open(self) -> list[_Entry]:
        return [entry for entry in self.entries.values() if entry.attempt is not None and entry.row.state == "right"]

    def _right(self) -> list[_Entry]:
        return [entry for entry in self.entries.values() if entry.row.state == "right" and entry.first_ms]

    def _left_s(self) -> float:
        return self._limits.seconds - (time.monotonic() - self._started)

    def _spent(self) -> bool:
        """Whether nothing new is begun any more."""
        measured = time.monotonic() - self._started - self._built_s
        return self._left_s() <= 0 or measured > self._limits.measuring_s


def _on_cpu(runtime: str, provider: str) -> bool:
    return runtime in _ON_CPU and provider in (CPU, "CPU")
