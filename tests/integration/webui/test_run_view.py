"""Health page, result and worklist say what ran, in which precision and why, in both languages; a fallback in words and an icon."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from appliance.core.domain import Note
from appliance.core.run_summary import RunSummary, RuntimeStatus, name_of
from appliance.core.settings import Settings
from appliance.runtime import Candidate
from appliance.store.tuning_requests import TuningRequests
from appliance.tuning.selection import CandidateResult, select
from tests.support.scans import scan_bytes
from tests.support.web_box import Box, Person, in_process, result

DIGEST = "ab" * 32


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        running.activate()
        yield running


def measured(**changes: Any) -> dict[str, Any]:
    """A stored self-test with a table of every kind of line."""
    rows = select(
        [
            CandidateResult(Candidate("onnxruntime", "fp32.onnx", "fp32"), "right", "", median_ms=13.5, max_difference=5e-6,
                layers={"f32": 27}),
            CandidateResult(Candidate("openvino", "int8.onnx", "int8", "CPU", 2), "right", "", median_ms=3.1, max_difference=0.004,
                layers={"u8": 20, "f32": 6}),
            CandidateResult(Candidate("openvino", "int8.onnx", "int8", "CPU", 2, 4), "right", "", median_ms=3.15, per_image_ms=2.2),
            CandidateResult(Candidate("onnxruntime", "fp16.onnx", "fp16"), "wrong", "tune.wrong", "case-3: off by 0.21, allowed 0.02"),
            CandidateResult(Candidate("openvino", "fp16.onnx", "fp16", "CPU"), "failed", "runtime.crashed", "SIGSEGV in load"),
            CandidateResult(Candidate("tensorrt", "", "", ""), "unavailable", "runtime.unavailable", "no GPU: no driver"),
        ]
    )  # fmt: skip
    chosen = next(row for row in rows if row.state == "chosen")
    return {
        "median_ms": 3.15, "choice": chosen.candidate.to_json(), "reason": {"code": "choice.measured", "detail": ""},
        "table": [row.to_json() for row in rows], "tuned_at": "2026-03-01T12:00:00.000+00:00", "profile": "AMD EPYC; openvino 2026.4.1",
    } | changes  # fmt: skip


def store_choice(box: Box, report: dict[str, Any]) -> None:
    """As a measuring leaves it."""
    with box.store.database.transaction() as tx:
        tx.execute(
            "UPDATE models SET self_test = ?, precision = 'int8', runtime = 'openvino 2026.4.1' WHERE digest = ?",
            (json.dumps(report), DIGEST),
        )


def read_with(box: Box, code: str, detail: str = "", **more: str) -> int:
    """An image read that way; its study."""
    stored = box.take(scan_bytes())
    ran = {"runtime": "openvino", "version": "2026.4.1", "precision": "int8", "provider": "CPU", "reason": {"code": code, "detail": detail}}
    ran |= more
    box.work(replace(result(), runtime=ran))
    return int(stored.study_id)


def text_of(page: str) -> str:
    """What a person reads."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


WORDS = {
    "en": ("Measured fastest on this box", "The result of a golden case is outside the tolerance", "Chosen", "Slower than", "u8 × 20"),
    "zh": ("本机实测最快", "标准病例的结果超出允许误差", "已选用", "测量于", "u8 × 20"),
}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_health_page_shows_every_way_with_its_reason(box: Box, language: str) -> None:
    store_choice(box, measured())
    page = box.person("tech", "technician", language).open("/health")
    said = text_of(page)
    for words in (*WORDS[language][:3], WORDS[language][4], "OpenVINO 2026.4.1", "case-3: off by 0.21, allowed 0.02", "SIGSEGV in load"):
        assert words in said, words
    assert "no GPU: no driver" in said
    states = re.findall(r'data-way="(\w+)"', page)
    assert states[0] == "chosen"
    assert sorted(states) == ["chosen", "failed", "right", "right", "unavailable", "wrong"]
    assert "data-fallback" not in page
    assert "runtime.crashed" not in said  # words, never codes
    assert "tune." not in said


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_fallback_is_told_in_words_with_an_icon_and_what_to_do(box: Box, language: str) -> None:
    fallback = {
        "code": "choice.fallback",
        "detail": "openvino CPU int8: runtime.unavailable: not installed",
        "at": "2026-03-01T12:00:00+00:00",
        "runtime": "onnxruntime",
        "version": "1.31.1",
        "precision": "fp32",
    }
    store_choice(box, measured(fallback=fallback))
    study = read_with(box, "choice.fallback", fallback["detail"])
    person = box.person("tech", "clinician", language)
    words = "选定的方式无法运行" if language == "zh" else "The chosen candidate does not run"
    banner = re.search(r'<div class="banner tone-bad fallback".*?</div></div>', person.open("/health"), re.DOTALL)
    assert banner
    assert "ONNX Runtime · FP32 ·" in text_of(person.open("/health"))
    assert words in banner[0]
    assert "icon-alert" in banner[0]
    assert "appliance tune" in banner[0]
    for path in (f"/studies/{study}", "/"):
        chip = re.search(r'<span class="chip tone-bad ran".*?</span></span>', person.open(path), re.DOTALL)
        assert chip, path
        assert words in chip[0]
        assert "icon-alert" in chip[0]


def runs_now(code: str, detail: str = "", **ran: str) -> dict[str, Any]:
    """What a worker says that it runs, in a stored self-test."""
    return {"at": "2026-03-02T08:00:00.000+00:00", "reason": {"code": code, "detail": detail}} | ran


@pytest.mark.parametrize(
    ("language", "words", "meant"),
    [("en", "was measured on other hardware", "Measured fastest"), ("zh", "在另一种硬件或软件上测量", "本机实测最快")],
)
def test_the_health_page_says_what_really_runs_and_why_whatever_was_chosen(box: Box, language: str, words: str, meant: str) -> None:
    ran = {"runtime": "openvino", "version": "2026.4.1", "provider": "CPU", "precision": "fp16", "ran": "fp32"}
    store_choice(box, measured(runs=runs_now("choice.other_device", "choice.measured: Some Xeon", **ran)))
    page = box.person("tech", "technician", language).open("/health")
    card = re.search(r'<li class="version is-now">.*?</li>', page, re.DOTALL)
    assert card
    assert (words in text_of(card[0]), meant in text_of(card[0])) == (True, False)
    assert "FP32" in text_of(card[0])  # what the layers really ran in
    banner = re.search(r'<div class="banner tone-warn other".*?</div></div>', page, re.DOTALL)
    assert banner
    assert (words in banner[0], "Some Xeon" in banner[0], "appliance tune" in banner[0]) == (True, True, True)
    assert "data-fallback" not in page


def test_what_runs_as_it_was_chosen_needs_no_banner(box: Box) -> None:
    ran = {"runtime": "openvino", "version": "2026.4.1", "provider": "CPU", "precision": "int8", "ran": "int8"}
    store_choice(box, measured(runs=runs_now("choice.measured", **ran)))
    page = box.person("tech", "technician").open("/health")
    assert "OpenVINO · INT8 · Measured fastest on this box" in text_of(page)
    assert ("data-other" in page, "data-fallback" in page, "data-stopped" in page) == (False, False, False)


@pytest.mark.parametrize(("language", "words"), [("en", "images that it should analyse fail"), ("zh", "应由它分析的影像均会失败")])
def test_a_version_that_nothing_can_run_is_not_shown_as_running(box: Box, language: str, words: str) -> None:
    store_choice(box, measured(runs=runs_now("runtime.unavailable", "the hub is gone", runtime="")))
    page = box.person("tech", "technician", language).open("/health")
    banner = re.search(r'<div class="banner tone-bad stopped" role="alert".*?</div></div>', page, re.DOTALL)
    assert banner
    assert (words in text_of(banner[0]), "the hub is gone" in banner[0]) == (True, True)
    card = re.search(r'<li class="version is-now">.*?</li>', page, re.DOTALL)
    assert card
    assert ("OpenVINO" in text_of(card[0]), "icon-alert" in card[0]) == (False, True)


@pytest.mark.parametrize(("language", "words"), [("en", "Measured fastest on this box"), ("zh", "本机实测最快")])
def test_result_and_worklist_carry_runtime_precision_and_reason(box: Box, language: str, words: str) -> None:
    study = read_with(box, "choice.measured")
    person: Person = box.person("doctor", "clinician", language)
    for path in (f"/studies/{study}", "/"):
        assert f"OpenVINO · INT8 · {words}" in text_of(person.open(path)), path


@pytest.mark.parametrize(("language", "words"), [("en", "FP16 weights, ran in FP32"), ("zh", "FP16 权重，以 FP32 运行")])
def test_what_ran_in_another_precision_than_its_file_says_so(box: Box, language: str, words: str) -> None:
    study = read_with(box, "choice.measured", precision="fp16", ran="fp32")
    person = box.person("doctor", "clinician", language)
    for path in (f"/studies/{study}", "/"):
        assert f"OpenVINO · {words} ·" in text_of(person.open(path)), path


def test_a_result_of_an_older_version_is_shown_without_a_reason(box: Box) -> None:
    stored = box.take(scan_bytes())
    box.work(result())
    person = box.person()
    assert "data-ran" not in person.open("/")
    assert "onnxruntime 1.0 CPU" in text_of(person.open(f"/studies/{stored.study_id}"))


def test_a_measuring_under_way_and_one_that_failed_are_told(box: Box) -> None:
    store_choice(box, measured())
    tunings = TuningRequests(box.store.database)
    tunings.ask(DIGEST, "cxr-pneumonia", "worker")
    person = box.person("tech", "technician")
    page = person.open("/health")
    assert "Begins when no image waits." in page
    assert 'data-busy="1"' in page
    asked = tunings.of(DIGEST)
    assert asked
    assert tunings.begin(asked)
    assert 'data-tuning="measuring"' in person.open("/health")
    tunings.fail(asked, Note("activation.deadline", "more than 4 s"))
    page = person.open("/health")
    assert "The last measuring failed; the model is run as before." in page
    assert "more than 4 s" in page
    assert 'data-busy="0"' in page


@pytest.mark.parametrize(("language", "words"), [("en", "some were not measured, for lack of time"), ("zh", "部分方式未测量")])
def test_a_table_with_holes_is_called_incomplete(box: Box, language: str, words: str) -> None:
    report, person = measured(), box.person("tech", "technician", language)
    store_choice(box, report)
    assert "data-incomplete" not in person.open("/health")
    report["table"][0] |= {"state": "unavailable", "code": "tune.no_time", "median_ms": None}
    store_choice(box, report)
    said = person.open("/health")
    assert ("data-incomplete" in said, words in text_of(said)) == (True, True)


@pytest.mark.parametrize(
    ("language", "words"),
    [("en", "Other work was going on while it was measured. Run `appliance tune`"), ("zh", "测量时本机有其他任务在运行。请在本机空闲时")],
)
def test_a_table_measured_on_a_busy_box_says_so(box: Box, language: str, words: str) -> None:
    report, person = measured(), box.person("tech", "technician", language)
    store_choice(box, report)
    assert "data-busy-measuring" not in person.open("/health")
    store_choice(box, report | {"busy": {"code": "tune.busy", "detail": "50 % > 15 % after 180 s"}})
    page = person.open("/health")
    assert ("data-busy-measuring" in page, words in text_of(page)) == (True, True)


def test_an_untuned_model_says_how_to_measure(box: Box) -> None:
    page = text_of(box.person("tech", "technician").open("/health"))
    assert "appliance tune" in page


@pytest.mark.parametrize(
    "stored", ["", "no JSON", "[]", '{"table": 3, "reason": 4, "fallback": [], "runs": 7}', '{"table": [1, {}, {"candidate": 2}]}']
)
def test_whatever_was_stored_is_told_as_far_as_it_is_understood(stored: str) -> None:
    running = RuntimeStatus.of(stored)
    assert (running.reason, running.chosen, running.table, running.fallback) == (None, None, (), None)
    assert (running.now, running.other, running.stopped) == (None, None, None)


def test_names_are_their_makers() -> None:
    assert name_of("onnxruntime 1.31.1") == "ONNX Runtime 1.31.1"
    assert name_of("openvino") == "OpenVINO"
    assert name_of("another 2") == "another 2"
    assert RunSummary.of({}) is None
    assert RunSummary.of({"runtime": "tensorrt", "precision": "fp16"}) == RunSummary("TensorRT", "fp16")
    assert RunSummary.of({"runtime": "openvino", "precision": "int8", "ran": "int8"}) == RunSummary("OpenVINO", "int8")
    assert RunSummary.of({"runtime": "openvino", "precision": "fp16", "ran": "fp32"}) == RunSummary("OpenVINO", "fp16", ran_in="fp32")
