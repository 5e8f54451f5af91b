"""The measuring where candidates die, hang, are slow, or mix up a batch: small networks in real processes."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from appliance.runtime import CPU
from appliance.runtime.availability import Availability
from appliance.tuning import budget as budgets
from appliance.tuning.candidate_process import CandidateProcess
from appliance.tuning.selection import CandidateResult, Selection
from appliance.tuning.tuner import Limits, tune
from tests.support.processes import children_running
from tests.support.tune_box import endless, network, right_at_the_end, rolled, same_to_all, subject, wrong_where_odd

ORT = (Availability("onnxruntime", "1", (CPU,)),)
LIMITS = Limits(seconds=200.0, measuring_s=60.0)


def running() -> list[psutil.Process]:
    """The candidates' processes."""
    return children_running("candidate_child")


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Whatever was tried, its process is gone."""
    yield
    assert not running()


def measured(what: Any, limits: Limits = LIMITS) -> Selection:
    """Tune with one thread."""
    return tune(what, threads=1, runtimes=ORT, limits=limits)


def row_of(choice: Selection, file: str, batch: int = 1) -> CandidateResult:
    """One line of the table."""
    (row,) = (row for row in choice.table if (row.candidate.file, row.candidate.batch) == (file, batch))
    return row


Call = Callable[[dict[str, Any], int], bool]


def before_each_time(monkeypatch: pytest.MonkeyPatch, dies: Call) -> Counter[str]:
    """Count the calls that time a candidate; end its process by SIGSEGV before those for which ``dies(candidate, number)`` is true."""
    real, calls = CandidateProcess.time, Counter[str]()

    def time(self: CandidateProcess, tensor: Any, repeat: int) -> list[float]:
        candidate: Any = self._load_request["candidate"]
        key = f"{candidate['file']} {candidate['batch']}"
        calls[key] += 1
        if dies(candidate, calls[key]):
            assert self.pid is not None
            os.kill(self.pid, signal.SIGSEGV)
        return real(self, tensor, repeat)

    monkeypatch.setattr(CandidateProcess, "time", time)
    return calls


# -- a batch that mixes up patients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(0.3,), (0.3, 0.7)])
def test_a_batch_whose_rows_are_rolled_by_one_patient_is_wrong(tmp_path: Path, values: tuple[float, ...]) -> None:
    network(tmp_path / "fp32.onnx", row=rolled)
    choice = measured(subject(tmp_path, ["fp32.onnx"], values=values, batches=(2, 4)))
    row = row_of(choice, "fp32.onnx", 2)
    assert (row.state, row.code) == ("wrong", "tune.wrong")
    assert "of 2 at once" in row.detail
    assert choice.candidate.batch == 1


def test_a_batch_that_is_right_for_its_last_image_alone_is_wrong(tmp_path: Path) -> None:
    network(tmp_path / "fp32.onnx", row=right_at_the_end)
    choice = measured(subject(tmp_path, ["fp32.onnx"], batches=(4,)))
    assert row_of(choice, "fp32.onnx", 4).state == "wrong"
    assert choice.candidate.batch == 1


def test_a_batch_that_is_wrong_when_it_is_not_full_is_wrong(tmp_path: Path) -> None:
    network(tmp_path / "fp32.onnx", row=wrong_where_odd)
    choice = measured(subject(tmp_path, ["fp32.onnx"], batches=(4,)))
    row = row_of(choice, "fp32.onnx", 4)
    assert (row.state, "of 3 at once" in row.detail) == ("wrong", True)


def test_a_batch_that_answers_each_its_own_is_right(tmp_path: Path) -> None:
    network(tmp_path / "fp32.onnx")
    row = row_of(measured(subject(tmp_path, ["fp32.onnx"], batches=(4,))), "fp32.onnx", 4)
    assert row.state in ("right", "chosen")
    assert row.per_image_ms is not None
    assert row.noise is not None


def test_images_that_cannot_be_told_apart_prove_no_batch(tmp_path: Path) -> None:
    network(tmp_path / "fp32.onnx", row=same_to_all)
    row = row_of(measured(subject(tmp_path, ["fp32.onnx"], values=(0.5,), batches=(2,))), "fp32.onnx", 2)
    assert (row.state, row.code) == ("unavailable", "tune.alike")


# -- who crashes, hangs or is slow -----------------------------------------------------------------------------------


def test_a_best_that_dies_while_another_is_timed_is_out_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("fp32.onnx", "fp16.onnx", "fp16-b.onnx"):
        network(tmp_path / file)
    before_each_time(monkeypatch, lambda candidate, number: candidate["file"] == "fp32.onnx" and number == 4)
    choice = measured(subject(tmp_path, ["fp32.onnx", "fp16.onnx", "fp16-b.onnx"]))
    dead = row_of(choice, "fp32.onnx")
    assert (dead.state, dead.code, "SIGSEGV" in dead.detail) == ("failed", "runtime.crashed", True)
    assert {row.state for row in choice.table if row is not dead} == {"chosen", "right"}


def test_a_best_that_dies_beside_its_batch_is_out_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("fp32.onnx", "fp16.onnx"):
        network(tmp_path / file)
    batches: list[str] = []

    def dies(candidate: dict[str, Any], _number: int) -> bool:
        if candidate["batch"] > 1:
            batches.append(candidate["file"])
        return candidate["batch"] == 1 and candidate["file"] in batches

    before_each_time(monkeypatch, dies)
    choice = measured(subject(tmp_path, ["fp32.onnx", "fp16.onnx"], batches=(2,)))
    (file,) = set(batches)
    assert (row_of(choice, file).state, row_of(choice, file).code) == ("failed", "runtime.crashed")
    assert row_of(choice, file, 2).state == "unavailable"
    assert (choice.candidate.file != file, choice.candidate.batch) == (True, 1)


def test_a_first_candidate_that_hangs_costs_only_itself(tmp_path: Path) -> None:
    network(tmp_path / "fp32.onnx", endless)
    network(tmp_path / "fp16.onnx")
    choice = measured(subject(tmp_path, ["fp32.onnx", "fp16.onnx"]), Limits(seconds=600.0, measuring_s=4.0))
    assert (row_of(choice, "fp32.onnx").state, row_of(choice, "fp32.onnx").code) == ("failed", "runtime.deadline")
    assert choice.candidate.file == "fp16.onnx"


def test_deadlines_too_short_for_a_model_are_given_again_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "LEAST_CALL_S", 0.01)  # no process is up by then
    for file in ("fp32.onnx", "fp16.onnx"):
        network(tmp_path / file)
    choice = measured(subject(tmp_path, ["fp32.onnx", "fp16.onnx"]), Limits(seconds=120.0, measuring_s=0.01))
    assert {row.state for row in choice.table} == {"chosen", "right"}


def test_when_the_time_for_measuring_is_over_each_way_gets_one_quick_timing_and_no_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["fp32.onnx", "fp16.onnx", "fp16-b.onnx"]
    for file in files:
        network(tmp_path / file)
    calls = before_each_time(monkeypatch, lambda _candidate, _number: False)
    choice = measured(subject(tmp_path, files, batches=(2,)), Limits(seconds=120.0, measuring_s=0.0))
    assert all(row_of(choice, file).median_ms is not None for file in files)
    assert calls.total() <= 3 * len(files) + 2 * (len(files) - 1)
    assert row_of(choice, choice.candidate.file, 2).code == "tune.no_time"
    assert choice.reason.code == "choice.measured_part"


def test_nothing_is_begun_when_the_time_for_everything_is_over(tmp_path: Path) -> None:
    network(tmp_path / "fp32.onnx")
    network(tmp_path / "fp16.onnx", endless)
    network(tmp_path / "fp16-b.onnx")
    choice = measured(subject(tmp_path, ["fp32.onnx", "fp16.onnx", "fp16-b.onnx"]), Limits(seconds=9.0, measuring_s=9.0))
    late = [row_of(choice, file).code for file in ("fp16.onnx", "fp16-b.onnx")]
    assert (choice.candidate.file, late) == ("fp32.onnx", ["tune.no_time", "tune.no_time"])
    assert (choice.reason.code, choice.reason.detail) == ("choice.measured_part", "2 of 3 not measured")


def test_what_is_held_open_at_once_has_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"fp32-{name}.onnx" for name in "abcd"]
    for file in files:
        network(tmp_path / file)
    real, held = CandidateProcess.load, []

    def load(self: CandidateProcess) -> dict[str, Any]:
        held.append(len(running()))
        return real(self)

    monkeypatch.setattr(CandidateProcess, "load", load)
    choice = measured(subject(tmp_path, files), Limits(seconds=120.0, measuring_s=60.0, held_bytes=1))
    assert len(held) >= len(files)
    assert max(held) == 1  # the fastest so far, beside the one that is loaded now
    assert choice.candidate.file in files
