"""What a download may cost: the bandwidth cap, the day's bytes, attempts and pauses; rules first, then the real thing."""

from __future__ import annotations

import json
import random
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuf.api.exceptions import DownloadError

from model_sync.transport.budget import (
    PROGRESS_BYTES,
    UNCOUNTED_BYTES,
    AttemptCounter,
    DayBudget,
    SpeedCheck,
    TokenBucket,
    pause_s,
    shared_bucket,
)
from model_sync.transport.errors import BudgetExhausted, DiskFull, TooSlow
from tests.support.bad_server import BadServer, Reply
from tests.support.fetcher_site import DATA, METADATA, NAME, SIZE, Make, fetch, make, part_of, server

__all__ = ["make", "server"]  # fixtures
NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)


class Clock:
    """A clock that only sleeping, or the test, moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


# -- bandwidth -------------------------------------------------------------------------------------------------------------


@given(
    st.floats(0.5, 1e9),
    st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 1), st.floats(0, 20)), min_size=1, max_size=60),
)
def test_token_bucket_never_lets_more_through_than_rate_times_time_plus_burst(rate: float, steps: list[tuple[int, float, float]]) -> None:
    """Over every stretch of time, not only from the beginning; whatever is asked for, given back, or waited in between."""
    clock = Clock()
    bucket = TokenBucket(rate, clock, clock.sleep)
    passed: list[tuple[float, int]] = []
    for wanted, unused, idle in steps:
        granted = bucket.take(wanted)
        assert 1 <= granted <= min(wanted, bucket.chunk)
        back = int(granted * unused)
        bucket.give_back(back)
        passed.append((clock.now, granted - back))
        clock.now += idle
    for first in range(len(passed)):
        total = 0
        for at, amount in passed[first:]:
            total += amount
            assert total <= rate * (at - passed[first][0]) + bucket.burst + 1e-6 * total + 1e-3


@given(st.floats(1, 1e8))
def test_token_bucket_gives_the_rate_that_was_set(rate: float) -> None:
    """Honest at small and at large rates: a thousand chunks take as long as they should."""
    clock = Clock()
    bucket = TokenBucket(rate, clock, clock.sleep)
    total = sum(bucket.take(1 << 20) for _ in range(1000))
    assert total - bucket.burst <= rate * clock.now * 1.001 + 1e-3
    assert clock.now <= total / rate * 1.001


def test_token_bucket_is_one_for_all_threads() -> None:
    clock = Clock()
    bucket = TokenBucket(1000.0, clock, lambda _seconds: None)
    lock, granted = threading.Lock(), [0]

    def take() -> None:
        for _ in range(200):
            amount = bucket.take(100)
            with lock:
                granted[0] += amount

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited: list[float] = []
    bucket._sleep = waited.append
    bucket.take(1)
    assert waited[0] == pytest.approx((granted[0] + 1 - bucket.burst) / 1000.0)


def test_no_cap_never_waits_and_one_process_has_one_bucket() -> None:
    clock = Clock()
    bucket = TokenBucket(None, clock, clock.sleep)
    assert sum(bucket.take(1 << 30) for _ in range(100)) == 100 * bucket.chunk
    bucket.give_back(5)
    assert clock.slept == 0
    assert shared_bucket(5.0, clock, clock.sleep) is shared_bucket(5.0, clock, clock.sleep)


@pytest.mark.parametrize("rate", [1_000.0, 50_000.0, 1_000_000.0])
def test_a_capped_download_takes_its_time(make: Make, server: BadServer, rate: float) -> None:
    """Against the fetcher's own clock."""
    clock = Clock()
    fetcher = make(options={"clock": clock, "sleep": clock.sleep}, rate_limit_bytes_per_s=rate)
    assert fetch(fetcher) == DATA
    assert (SIZE - rate / 10) / rate * 0.99 <= clock.slept <= SIZE / rate * 1.01


def test_a_bandwidth_cap_below_the_slowest_speed_is_not_the_servers_fault(make: Make, server: BadServer) -> None:
    values = {"rate_limit_bytes_per_s": 1_000_000.0, "min_speed_bytes_per_s": 1e12, "min_speed_window_s": 0.001}
    assert fetch(make(**values)) == DATA


def test_a_capped_download_does_not_fill_the_kernels_buffers(make: Make) -> None:
    """What the server could send until the fetcher slept for the first time: the cap holds on the wire, not only in the process."""
    sent: list[int] = []

    def sleep(_seconds: float) -> None:
        threading.Event().wait(0.3)
        sent.append(server.log[0].body_bytes)
        raise InterruptedError

    with BadServer({"/targets/big": bytes(20_000_000)}, send_buffer=8192) as server:
        with pytest.raises(InterruptedError):
            fetch(make([server.url], options={"sleep": sleep}, rate_limit_bytes_per_s=20_000.0), "targets/big", 20_000_000)
        assert sent[0] < 100_000


# -- the day's bytes -------------------------------------------------------------------------------------------------------


def test_day_budget_stops_a_bundle_and_goes_on_after_midnight(make: Make, server: BadServer, tmp_path: Path) -> None:
    """The last tenth is kept for metadata; the count survives a restart, the part too."""
    now = [NOON]
    options = {"now": lambda: now[0]}
    big, size = "targets/big", 3_000_000
    whole = random.Random(4).randbytes(size)
    server.put(f"/{big}", whole)
    for _ in range(2):
        with pytest.raises(BudgetExhausted) as caught:
            fetch(make(options=options, day_budget_bytes=2_000_000), big, size)
        assert part_of(tmp_path, big).read_bytes() == whole[:1_800_000]
    assert isinstance(caught.value, DownloadError)
    assert caught.value.code == "sync.budget"
    fetcher = make(options=options, day_budget_bytes=2_000_000)
    assert fetcher.download_bytes("library:metadata/timestamp.json", 1000) == METADATA
    kept = json.loads((tmp_path / "state" / "budget.json").read_bytes())
    assert (kept["day"], kept["received_bytes"]) == ("2026-03-01", 1_800_000 + len(METADATA))
    now[0] += timedelta(days=1)
    assert fetch(fetcher, big, size) == whole
    assert fetcher.received_bytes == len(METADATA) + 1_200_000


def test_day_budget_refuses_metadata_only_when_all_of_it_is_gone(make: Make, server: BadServer) -> None:
    fetcher = make(day_budget_bytes=len(METADATA) + 5)
    assert fetcher.download_bytes("library:metadata/timestamp.json", 1000) == METADATA
    with pytest.raises(BudgetExhausted):
        fetcher.download_bytes("library:metadata/timestamp.json", 1000)
    with pytest.raises(BudgetExhausted):
        fetcher.download_bytes("library:metadata/timestamp.json", 1000)
    assert fetcher.received_bytes == len(METADATA) + 5
    assert len(server.log) == 2


def test_day_budget_counts_wrong_and_broken_answers_too(make: Make, server: BadServer) -> None:
    """A line that is cut again and again is where the money goes."""
    server.always(f"/{NAME}", Reply(ignore_range=True, cut_after=100_000))
    fetcher = make(attempts=1000, day_budget_bytes=250_000)
    with pytest.raises(BudgetExhausted):
        fetch(fetcher)
    assert fetcher.received_bytes == 250_000


@given(st.lists(st.integers(0, 3 * UNCOUNTED_BYTES), max_size=20))
def test_day_budget_leaves_little_uncounted_when_the_process_dies(tmp_path_factory: pytest.TempPathFactory, amounts: list[int]) -> None:
    file = tmp_path_factory.mktemp("budget") / "budget.json"
    budget = DayBudget(file, 1 << 40, lambda: NOON)
    for amount in amounts:
        budget.add(amount)
        again = DayBudget(file, 1 << 40, lambda: NOON).received_bytes
        assert 0 <= budget.received_bytes - again < UNCOUNTED_BYTES
    budget.save()
    assert DayBudget(file, 1 << 40, lambda: NOON).received_bytes == sum(amounts)


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"day": 3}', b'{"day": "2026-03-01", "received_bytes": -1}', b"\xff"])
def test_a_damaged_count_begins_the_day_anew(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "budget.json"
    file.write_bytes(damage)
    assert DayBudget(file, 100, lambda: NOON).remaining_bytes(small=True) == 100
    assert DayBudget(file, 100, lambda: NOON).remaining_bytes(small=False) == 90


def test_a_count_that_cannot_be_written_stops_the_download(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a file in the way")
    budget = DayBudget(tmp_path / "state" / "budget.json", 1 << 40, lambda: NOON)
    budget.add(UNCOUNTED_BYTES - 1)
    assert budget.remaining_bytes(small=True)
    budget.add(1)
    budget.save()
    with pytest.raises(DiskFull, match="cannot be counted"):
        budget.remaining_bytes(small=True)


def test_two_processes_that_take_turns_add_to_one_count(tmp_path: Path) -> None:
    """The agent that runs, and a pull by hand in between."""
    agent, hand = (DayBudget(tmp_path / "budget.json", 1000, lambda: NOON) for _ in range(2))
    for budget, total in ((agent, 100), (hand, 200), (agent, 300), (hand, 400)):
        budget.reload()
        budget.add(100)
        budget.save()
        assert budget.received_bytes == total


def test_without_a_limit_nothing_is_written(make: Make, server: BadServer, tmp_path: Path) -> None:
    assert fetch(make()) == DATA
    assert not (tmp_path / "state").exists()


# -- speed, attempts, pauses -------------------------------------------------------------------------------------------------


def test_only_time_spent_waiting_for_the_server_counts_as_slow() -> None:
    clock = Clock()
    gate = SpeedCheck(100.0, 10.0, clock, "host")
    for _ in range(50):
        gate.start()
        clock.now += 1.0
        gate.stop(100)
        clock.now += 1000.0  # the bandwidth cap, a slow disk
    gate.start()
    clock.now += 9.0
    gate.stop(0)
    gate.start()
    clock.now += 1.0
    with pytest.raises(TooSlow):
        gate.stop(99)


@given(st.integers(1, 30), st.integers(0, 1 << 24), st.lists(st.integers(0, 1 << 18), max_size=2000))
def test_attempts_end_and_progress_starts_the_row_anew(attempts: int, length: int, steps: list[int]) -> None:
    attempts_left = AttemptCounter(attempts, length)
    reached = used = row = 0
    mark = 0
    for step in [*steps, *[0] * (attempts + 1)]:
        reached = min(length, reached + step)
        row = 0 if reached - mark >= PROGRESS_BYTES else row + 1
        mark = reached if row == 0 else mark
        used += 1
        if not attempts_left.may_retry(reached):
            break
        assert row < attempts
    else:
        pytest.fail("never ended")
    assert used <= attempts + length // PROGRESS_BYTES
    assert row == attempts or used == attempts + length // PROGRESS_BYTES


@given(st.integers(0, 10_000), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e12))
def test_pauses_grow_with_jitter_and_stay_below_the_longest(row: int, first: float, longest: float, asked: float) -> None:
    pause = pause_s(row, first, longest, asked)
    assert min(asked, longest) <= pause <= longest
    assert pause <= max(min(asked, longest), first * 2.0 ** min(row, 60))


def test_pauses_of_a_fleet_are_spread_over_the_whole_backoff() -> None:
    pauses = [pause_s(4, 1.0, 300.0, 0.0) for _ in range(2000)]
    assert min(pauses) < 1.0
    assert 7.0 < max(pauses) <= 8.0
