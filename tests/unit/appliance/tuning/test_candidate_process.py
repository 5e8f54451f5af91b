"""A candidate may crash, hang, eat all memory or print over everything in its own process; who asked for it gets a coded error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from appliance.core.child_protocol import Message, pack, receive
from appliance.core.errors import InferenceError
from appliance.core.limited_child import Channel
from appliance.runtime import Candidate
from appliance.tuning.candidate_child import Server
from appliance.tuning.candidate_process import CandidateProcess
from tests.support import misbehaving_runtime
from tests.support.processes import has_ended

TENSOR = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)


@dataclass(frozen=True)
class Spec:
    name: str = "image"
    shape: tuple[int, ...] = (3, 4)


class MisbehavingAttempt(CandidateProcess):
    module = "tests.support.misbehaving_runtime"


def attempt(action: str, deadline_s: float = 30.0, **more: Any) -> CandidateProcess:
    return MisbehavingAttempt(Path("model.onnx"), Spec(), Candidate("onnxruntime", action, "fp32"), deadline_s=deadline_s, **more)


def refused(call: Any) -> InferenceError:
    with pytest.raises(InferenceError) as caught:
        call()
    return caught.value


def test_what_behaves_is_loaded_run_and_timed() -> None:
    heard: list[float] = []
    with attempt("fine", on_progress=heard.append) as tried:
        assert tried.load() == {"runtime": "misbehaving", "precision": "fp32"}
        assert np.array_equal(tried.infer(TENSOR)["image*2"], TENSOR * 2)
        times = tried.time(TENSOR, 3)
        assert len(times) == 3 and all(0 <= ms < 1000 for ms in times)
        assert tried.peak_rss_bytes > 1 << 20
        assert tried.load_ms > 0
        assert heard[-1] == 1.0
        pid = tried.pid
    assert pid is not None and has_ended(pid)
    assert refused(lambda: tried.infer(TENSOR)).code == "job.error"


@pytest.mark.parametrize("where", ["load", "infer"])
@pytest.mark.parametrize(
    ("action", "code", "detail"),
    [
        ("segfault", "runtime.crashed", "SIGSEGV in "),
        ("abort", "runtime.memory", "SIGABRT in "),
        ("exit", "runtime.crashed", "exit code 7 in "),
        ("killed", "runtime.memory", "SIGKILL in "),
        ("mute", "runtime.crashed", "closed its pipe in "),
        ("nonsense", "runtime.crashed", "invalid response in "),
    ],
)
def test_child_that_dies_is_a_coded_error_and_the_attempt_is_over(action: str, where: str, code: str, detail: str) -> None:
    tried = attempt(f"{action}-in-{where}")
    if where == "infer":
        tried.load()
    error = refused(tried.load if where == "load" else lambda: tried.infer(TENSOR))
    assert (error.code, tried.pid) == (code, None)
    assert detail + where in error.detail
    again = refused(lambda: tried.infer(TENSOR))
    assert (again.code, again.detail) == (error.code, error.detail)


@pytest.mark.parametrize("where", ["load", "infer"])
def test_hang_ends_at_the_deadline(where: str) -> None:
    tried = attempt(f"hang-in-{where}")
    if where == "infer":
        tried.load()
    tried.deadline_s = 2.0
    pid, started = tried.pid, time.monotonic()
    error = refused(tried.load if where == "load" else lambda: tried.time(TENSOR, 2))
    assert error.code == "runtime.deadline" and where in error.detail
    assert 1.9 < time.monotonic() - started < 10
    assert pid is None or has_ended(pid)


def test_too_little_memory_is_said_and_does_not_touch_the_parent() -> None:
    tried = attempt("hog-in-load", memory_bytes=600 << 20)
    error = refused(tried.load)
    assert error.code == "runtime.memory"


def test_noise_on_both_outputs_disturbs_nothing() -> None:
    """More than a pipe holds, with what looks like a message in it."""
    with attempt("noise-in-infer") as tried:
        tried.load()
        for _ in range(3):
            assert np.array_equal(tried.infer(TENSOR)["image*2"], TENSOR * 2)


def test_a_crash_keeps_the_last_line_that_was_printed() -> None:
    assert "std::bad_alloc" in refused(attempt("abort-in-load").load).detail


def test_everything_the_child_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    monkeypatch.setenv("GRANDCHILD", str(note))
    tried = attempt("grandchild-in-infer")
    tried.load()
    tried.deadline_s = 3.0
    assert refused(lambda: tried.infer(TENSOR)).code == "runtime.deadline"
    assert has_ended(int(note.read_text()))


def test_what_an_adapter_refuses_keeps_its_code_and_no_control_characters() -> None:
    error = refused(attempt("builds-in-load").load)
    assert error.code == "runtime.build"
    assert "\x1b" not in error.detail and "\n" not in error.detail and len(error.detail) <= 500


def test_refused_inference_leaves_the_attempt_alive() -> None:
    with attempt("raises-in-infer") as tried:
        tried.load()
        for _ in range(2):
            error = refused(lambda: tried.infer(TENSOR))
            assert error.code == "job.error" and "IndexError" in error.detail
        assert tried.pid is not None


def test_child_goes_when_the_parent_is_killed() -> None:
    code = (
        "import time\nfrom tests.unit.appliance.tuning.test_candidate_process import attempt\n"
        "tried = attempt('fine')\ntried.load()\nprint(tried.pid, flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert has_ended(child)


def test_failure_of_who_listens_ends_the_child() -> None:
    def told(done: float) -> None:
        raise RuntimeError("listener")

    tried = attempt("hang-in-load", on_progress=told)
    with pytest.raises(RuntimeError, match="listener"):
        tried.load()
    assert tried.pid is None


def test_nothing_is_inferred_before_the_load_and_nothing_loaded_twice() -> None:
    assert refused(lambda: attempt("fine").infer(TENSOR)).code == "job.error"
    with attempt("fine") as tried:
        tried.load()
        assert refused(tried.load).code == "job.error"


def test_no_descriptor_and_no_process_is_left_behind() -> None:
    me = psutil.Process()
    before = me.num_fds(), len(me.children(recursive=True))
    for action in ("fine", "segfault-in-load", "nonsense-in-load"):
        with attempt(action) as tried:
            if action == "fine":
                tried.load()
            else:
                refused(tried.load)
    assert (me.num_fds(), len(me.children(recursive=True))) == before


@pytest.mark.parametrize(
    ("where", "header"),
    [
        ("load", {}),
        ("load", {"describe": [1]}),
        ("load", {"error": 1}),
        ("load", {"error": {}}),
        ("load", {"error": {"code": 7, "detail": ""}}),
        ("load", {"error": {"code": "nothing.such", "detail": ""}}),
        ("infer", {"error": {"code": ["job.error"]}}),
    ],
)
def test_answer_that_makes_no_sense_ends_it(monkeypatch: pytest.MonkeyPatch, where: str, header: dict[str, Any]) -> None:
    monkeypatch.setenv("HEADER", json.dumps(header))
    tried = attempt(f"says-in-{where}")
    if where == "infer":
        tried.load()
    error = refused(tried.load if where == "load" else lambda: tried.infer(TENSOR))
    assert (error.code, tried.pid) == ("runtime.crashed", None)
    assert f"invalid response in {where}" in error.detail


@pytest.mark.parametrize("ms", [None, 1, [], [1, 2], [1.0], ["1.0", "2.0"], [None, None]])
def test_times_that_are_none(monkeypatch: pytest.MonkeyPatch, ms: Any) -> None:
    monkeypatch.setenv("HEADER", json.dumps({"ms": ms}))
    tried = attempt("says-in-infer")
    tried.load()
    assert refused(lambda: tried.time(TENSOR, 2)).code == "runtime.crashed"


@pytest.mark.parametrize("value", [None, "x", -1, 1e300, [1]])
def test_figures_that_are_none_count_as_nothing(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setenv("HEADER", json.dumps({"describe": {}, "load_ms": value, "peak_rss_bytes": value}))
    with attempt("says-in-load") as tried:
        assert tried.load() == {}
        assert (tried.load_ms, tried.peak_rss_bytes) == (0, 0)


def test_progress_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    monkeypatch.setenv("HEADER", json.dumps({"progress": "half"}))
    with attempt("says-in-load", on_progress=heard.append) as tried:
        tried.load()
    assert heard[-1] == 0.0


class Conversation:
    """The child's side served by a thread of the test: nothing dies here."""

    def __init__(self, action: str) -> None:
        (self._requests, self._ours), (self._answers, self._theirs) = os.pipe(), os.pipe()
        self._candidate = Candidate("onnxruntime", action, "fp32").to_json()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(EOFError):
            Server(Channel(self._requests, self._theirs), misbehaving_runtime.opener).serve()

    def ask(self, header: dict[str, Any], arrays: dict[str, Any] | None = None) -> Message:
        for buffer in pack(header, arrays):
            os.write(self._ours, buffer)
        while "progress" in (answer := receive(self._fill)).header:
            assert 0 <= answer.header["progress"] <= 1
        return answer

    def load(self, **other: Any) -> Message:
        order = {"ask": "load", "model_path": "m.onnx", "input": {"name": "image", "shape": [3, 4]}, "cache": None}
        return self.ask(order | {"candidate": self._candidate} | other)

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            buffer = buffer[os.readv(self._answers, [buffer]) :]

    def end(self) -> None:
        os.close(self._ours)
        self._thread.join(10)
        assert not self._thread.is_alive()
        for descriptor in (self._requests, self._answers, self._theirs):
            os.close(descriptor)


def test_child_answers_until_the_pipe_is_closed() -> None:
    child = Conversation("fine")
    assert child.ask({"ask": "infer"}, {"image": TENSOR}).header["error"] == {"code": "job.error", "detail": "nothing is loaded"}
    answer = child.load()
    assert answer.header["describe"]["runtime"] == "misbehaving" and answer.header["load_ms"] > 0
    assert np.array_equal(child.ask({"ask": "infer"}, {"image": TENSOR}).arrays["image*2"], TENSOR * 2)
    assert len(child.ask({"ask": "time", "repeat": 3}, {"image": TENSOR}).header["ms"]) == 3
    assert "error" in child.ask({"ask": "infer"}, {"image": TENSOR, "more": TENSOR}).header
    assert "error" in child.load(candidate={"runtime": "none"}).header
    child.end()


@pytest.mark.parametrize(
    ("action", "code", "detail"),
    [("raises", "job.error", "IndexError"), ("builds", "runtime.build", "no kernel"), ("starves", "runtime.memory", "array")],
)
def test_child_tells_what_was_raised(action: str, code: str, detail: str) -> None:
    child = Conversation(f"{action}-in-infer")
    child.load()
    error = child.ask({"ask": "infer"}, {"image": TENSOR}).header["error"]
    assert error["code"] == code and detail in error["detail"]
    child.end()


def test_child_of_another_parent_does_not_begin() -> None:
    done = subprocess.run([sys.executable, "-m", "appliance.tuning.candidate_child", "0", "1", "1", "0"], check=False, timeout=60)
    assert done.returncode == 1
