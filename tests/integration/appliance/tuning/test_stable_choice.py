"""Other work on the box must not decide what runs a model: times are injected, the processes and the golden cases are real."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.runtime import CPU
from appliance.runtime.availability import Availability
from appliance.tuning.candidate_process import CandidateProcess
from appliance.tuning.idle_wait import IdleWait
from appliance.tuning.selection import Selection
from appliance.tuning.tuner import Limits, tune
from tests.support.tune_box import network, subject

ORT = (Availability("onnxruntime", "1", (CPU,)),)
# int8 clearly the fastest; fp16 and fp16-b the same within noise.
QUIET_MS = {"fp32.onnx": 10.0, "fp16.onnx": 8.0, "int8.onnx": 6.0}
FILES = list(QUIET_MS)

Neighbour = Callable[[str, int], bool]


def timed(monkeypatch: pytest.MonkeyPatch, is_disturbed: Neighbour, quiet_ms: dict[str, float]) -> None:
    """Every call that times takes its quiet time, twice that while the neighbour works: ``is_disturbed(file, number of the call)``."""
    calls = Counter[str]()

    def time(self: CandidateProcess, tensor: Any, repeat: int) -> list[float]:
        file = str(self._load_request["candidate"]["file"])
        calls[file] += 1
        return [quiet_ms[file] * (2.0 if is_disturbed(file, calls[file]) else 1.0)] * repeat

    monkeypatch.setattr(CandidateProcess, "time", time)


def choose(folder: Path, established: tuple[str, str] | None = None, idle: IdleWait | None = None) -> Selection:
    for file in FILES:
        network(folder / file)
    limits = Limits(600.0, 300.0)
    return tune(subject(folder, FILES, batches=()), threads=1, runtimes=ORT, limits=limits, established=established, idle=idle)


def first_rounds(file: str, number: int) -> bool:
    """Other work slows int8 in most of the first 15 rounds, as a job of the box does, and ends."""
    return file == "int8.onnx" and 3 < number <= 12


def test_two_boxes_of_one_class_choose_the_same_though_one_was_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for number, neighbour in enumerate((lambda _file, _number: False, first_rounds)):
        folder = tmp_path / str(number)
        folder.mkdir()
        timed(monkeypatch, neighbour, QUIET_MS)
        choice = choose(folder)
        chosen.append((choice.candidate.precision, choice.reason.code))
    assert chosen == [("int8", "choice.measured")] * 2


def test_what_was_timed_while_images_were_analysed_is_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images come with every sixth timing and slow int8 until somebody waits for them."""
    run: set[str] = set()

    def is_disturbed(file: str, number: int) -> bool:
        if number % 6 == 0:
            run.add("jobs")
        return file == "int8.onnx" and "jobs" in run

    chosen = []
    for name, idle in (("plain", None), ("waits", IdleWait(600, lambda: "jobs" in run, lambda: None, lambda _seconds: run.clear()))):
        folder = tmp_path / name
        folder.mkdir()
        run.clear()
        timed(monkeypatch, is_disturbed, QUIET_MS)
        chosen.append(choose(folder, idle=idle).candidate.precision)
        assert idle is None or idle.note is None
    assert chosen == ["fp16", "int8"]


def always(file: str, number: int) -> bool:
    """A neighbour that never ends: now this candidate is slow, now that one."""
    return file == ("int8.onnx" if number // 8 % 2 else "fp16.onnx") and number > 3


@pytest.mark.parametrize(("established", "kept"), [(None, "fp32"), (("onnxruntime", "fp16"), "fp16"), (("openvino", "int8"), "fp32")])
def test_a_choice_that_never_gets_stable_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, established: tuple[str, str] | None, kept: str
) -> None:
    timed(monkeypatch, always, QUIET_MS)
    choice = choose(tmp_path, established)
    assert (choice.candidate.precision, choice.reason.code) == (kept, "choice.unstable")
    assert choice.chosen.code == "tune.kept"
    assert [row.state for row in choice.table].count("chosen") == 1


@pytest.mark.parametrize("established", ["fp16", "int8"])
def test_what_is_established_stays_within_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, established: str) -> None:
    timed(monkeypatch, lambda _file, _number: False, {"fp32.onnx": 10.0, "fp16.onnx": 6.1, "int8.onnx": 6.0})
    choice = choose(tmp_path, ("onnxruntime", established))
    assert (choice.candidate.precision, choice.reason.code) == (established, "choice.measured")
    assert choice.chosen.code == ("tune.more_exact" if established == "fp16" else "tune.fastest")


def test_what_is_established_goes_when_it_is_clearly_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda _file, _number: False, QUIET_MS)
    assert choose(tmp_path, ("onnxruntime", "fp32")).candidate.precision == "int8"
