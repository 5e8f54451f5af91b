"""Another process sees when the worker analyses images: the files, the lock and the processes are real."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.core.job_activity import JobActivity, JobWatch

_WATCH = """
import sys
from pathlib import Path
from appliance.core.job_activity import JobWatch
watch = JobWatch(Path(sys.argv[1]))
print("ready", flush=True)
for _ in sys.stdin:
    print(watch.has_worked(), flush=True)
"""


class Watcher:
    """A watch in a process of its own."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WATCH, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def has_worked(self) -> bool:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._answer() == "True"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[Watcher]:
    made = Watcher(tmp_path)
    yield made
    made.process.communicate()


def test_another_process_sees_jobs_while_they_run_and_once_after(tmp_path: Path, watcher: Watcher) -> None:
    activity = JobActivity(tmp_path)
    assert not watcher.has_worked()
    activity.begin()
    activity.begin()
    assert [watcher.has_worked() for _ in range(3)] == [True] * 3
    activity.end()
    activity.end()
    assert not watcher.has_worked()
    activity.begin()  # shorter than the time between two looks
    activity.end()
    assert [watcher.has_worked() for _ in range(2)] == [True, False]


def test_a_worker_that_is_killed_shows_no_jobs(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from appliance.core.job_activity import JobActivity;"
        "activity = JobActivity(Path(sys.argv[1])); activity.begin(); print('begun', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        watch = JobWatch(tmp_path)
        assert watch.has_worked()
        worker.kill()
    assert not watch.has_worked()


def test_two_workers_of_one_process_do_not_disturb_each_other(tmp_path: Path, watcher: Watcher) -> None:
    one, other = JobActivity(tmp_path), JobActivity(tmp_path)
    one.begin()
    other.begin()
    one.end()
    assert [watcher.has_worked() for _ in range(2)] == [True] * 2
    other.end()
    assert not watcher.has_worked()


def test_a_disk_that_refuses_the_file_stops_no_analysis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("no directory")
    activity = JobActivity(tmp_path)
    activity.begin()
    activity.end()
    assert "cannot see" in caplog.text
    assert not JobWatch(tmp_path).has_worked()


def test_a_lock_that_is_refused_once_is_taken_at_the_next_job(tmp_path: Path, watcher: Watcher) -> None:
    activity, lock = JobActivity(tmp_path), tmp_path / "run" / "jobs.lock"
    lock.parent.mkdir()
    with open(lock, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        activity.begin()
    watcher.has_worked()
    activity.begin()
    assert [watcher.has_worked() for _ in range(2)] == [True, True]
    activity.end()
