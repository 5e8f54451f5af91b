"""The rule by which a way of running a model is chosen, whatever was measured; and what a worker reads of what was stored."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.domain import Note
from appliance.core.self_test_report import SelfTestReport
from appliance.runtime import Candidate, baseline_candidate
from appliance.tuning.selection import BATCH_GAIN, EXACTNESS, SAME_TIME, CandidateResult, Plan, exactness, select
from model_sync import messages


def row(ms: float | None, precision: str = "fp32", state: Any = "right", **changes: Any) -> CandidateResult:
    """A line of the table."""
    code, per_image_ms, noise = str(changes.pop("code", "")), changes.pop("per_image_ms", None), changes.pop("noise", None)
    candidate = Candidate("onnxruntime", f"{precision}.onnx", precision, **changes)
    return CandidateResult(candidate, state, code, median_ms=ms, per_image_ms=per_image_ms, noise=noise)


def chosen(rows: list[CandidateResult]) -> CandidateResult | None:
    """The one that was taken."""
    taken = [item for item in select(rows) if item.state == "chosen"]
    assert len(taken) <= 1
    return taken[0] if taken else None


def codes(rows: list[CandidateResult]) -> list[str]:
    """What is said of each."""
    return [item.code for item in select(rows)]


TIMES = st.floats(0.05, 500.0)
ROWS = st.lists(
    st.builds(
        CandidateResult,
        st.builds(
            Candidate, st.sampled_from(("onnxruntime", "openvino", "tensorrt")), st.sampled_from(("a", "b")), st.sampled_from(EXACTNESS),
            threads=st.integers(0, 2), batch=st.sampled_from((1, 1, 1, 2, 8)),
        ),
        st.sampled_from(("right", "right", "wrong", "failed", "unavailable")),
        st.just("before"),
        median_ms=st.none() | TIMES,
        per_image_ms=st.none() | TIMES,
    ),
    max_size=12,
)  # fmt: skip


@given(ROWS)
def test_the_chosen_is_right_and_never_more_than_3_percent_slower_than_the_best(rows: list[CandidateResult]) -> None:
    taken = chosen(rows)
    right = [item for item in rows if item.state == "right" and item.median_ms is not None and item.candidate.batch == 1]
    if not right:
        assert taken is None
        return
    assert taken is not None
    assert taken.median_ms is not None
    assert taken.median_ms <= SAME_TIME * min(item.median_ms for item in right if item.median_ms is not None)
    assert any(item.candidate == taken.candidate and item.state == "right" for item in rows)


@given(ROWS)
def test_every_other_keeps_its_place_and_gets_its_reason(rows: list[CandidateResult]) -> None:
    after = select(rows)
    alone = any(item.state == "right" and item.median_ms is not None and item.candidate.batch == 1 for item in rows)
    assert [item.candidate for item in after] == [item.candidate for item in rows]
    for before, item in zip(rows, after, strict=True):
        if before.state != "right" or before.median_ms is None or not alone:
            assert item == before
        else:
            assert messages.is_known(item.code)


@given(ROWS)
def test_nothing_more_exact_was_as_fast(rows: list[CandidateResult]) -> None:
    taken = chosen(rows)
    if taken is None or taken.candidate.batch > 1:
        return
    right = [item for item in rows if item.state == "right" and item.median_ms is not None and item.candidate.batch == 1]
    fastest = min((item.median_ms for item in right if item.median_ms is not None), default=0.0)
    for item in right:
        if item.median_ms is not None and item.median_ms <= SAME_TIME * fastest:
            assert exactness(item.candidate.precision) >= exactness(taken.candidate.precision)


def test_a_slower_int8_and_a_wrong_fp16_lose_each_for_its_reason() -> None:
    rows = [row(10.0), row(2.0, "fp16", "wrong", code="tune.wrong"), row(12.0, "int8")]
    assert codes(rows) == ["tune.fastest", "tune.wrong", "tune.slower_less_exact"]


def test_within_3_percent_the_more_exact_one_is_taken() -> None:
    assert codes([row(10.29), row(10.0, "int8")]) == ["tune.more_exact", "tune.less_exact"]
    assert codes([row(10.31), row(10.0, "int8")]) == ["tune.slower", "tune.fastest"]
    assert codes([row(10.2), row(10.1, threads=1)]) == ["tune.no_faster", "tune.fastest"]


def test_a_batch_is_taken_where_it_saves_time_and_costs_a_single_image_none() -> None:
    base = row(10.0)
    saves = [row(10.0, batch=batch, per_image_ms=ms) for batch, ms in ((2, 9.4), (4, 8.1), (8, 8.0))]
    assert codes([base, *saves]) == ["tune.batch_taken", "tune.other_batch", "tune.faster_together", "tune.other_batch"]
    assert codes([base, row(10.0, batch=4, per_image_ms=9.6)]) == ["tune.fastest", "tune.no_batch_gain"]
    assert codes([base, row(11.0, batch=4, per_image_ms=5.0)]) == ["tune.fastest", "tune.slower"]  # STAT would pay for it
    assert BATCH_GAIN * 10.0 < 9.6


def test_a_batch_is_never_the_measure_of_a_single_image() -> None:
    """By chance its single image came out 4 % faster; its images together take longer."""
    assert codes([row(10.0), row(9.6, batch=2, per_image_ms=12.0)]) == ["tune.fastest", "tune.batch_no_faster"]
    assert codes([row(10.0), row(9.0, batch=2, per_image_ms=9.4), row(9.9, "int8")]) == [
        "tune.batch_taken",
        "tune.faster_together",
        "tune.less_exact",
    ]
    assert chosen([row(9.6, batch=2, per_image_ms=5.0), row(None, state="failed")]) is None


def test_a_batch_has_to_gain_more_than_its_times_lie_apart() -> None:
    assert codes([row(10.0), row(10.0, batch=4, per_image_ms=9.0, noise=0.2)]) == ["tune.fastest", "tune.no_batch_gain"]
    assert codes([row(10.0), row(10.0, batch=4, per_image_ms=7.9, noise=0.2)]) == ["tune.batch_taken", "tune.faster_together"]


@pytest.mark.parametrize(
    ("per_image_ms", "noise", "code", "detail"),
    [
        (8.8, 0.2, "tune.no_batch_gain", "12.0 % < 20.0 %"),
        (9.6, 0.0, "tune.no_batch_gain", "4.0 % < 5.0 %"),
        (10.0, 0.2, "tune.batch_no_faster", "1.00"),
        (12.0, 0.0, "tune.batch_no_faster", "1.20"),
    ],
)
def test_a_batch_that_is_not_taken_is_called_no_faster_only_where_it_is(per_image_ms: float, noise: float, code: str, detail: str) -> None:
    single, batch = select([row(10.0), row(10.0, batch=4, per_image_ms=per_image_ms, noise=noise)])
    assert (single.state, batch.code, batch.detail) == ("chosen", code, detail)


def test_a_time_that_is_none_is_not_compared() -> None:
    assert chosen([row(float("nan")), row(5.0, "fp16")]) == replace(row(5.0, "fp16"), state="chosen", code="tune.fastest")
    assert chosen([row(0.0), row(float("inf"), "int8")]) is None


def stored(*rows: CandidateResult, reason: Note | None = None) -> SelfTestReport:
    """A self-test as it is in the database."""
    table = select(rows)
    candidate = next(item.candidate for item in table if item.state == "chosen")
    reason = reason or Note("choice.measured")
    report = {"choice": candidate.to_json(), "reason": reason.to_json(), "table": [item.to_json() for item in table], "profile": "here"}
    return SelfTestReport.from_json(json.dumps(report))


def test_what_was_stored_is_read_back() -> None:
    plan = Plan.of("fp32", stored(row(9.0), row(3.0, "int8", threads=1, batch=1)))
    assert (plan.candidate, plan.precision) == (Candidate("onnxruntime", "int8.onnx", "int8", threads=1), "int8")
    assert (plan.reason.code, plan.baseline_refusal, plan.profile) == ("choice.measured", None, "here")


def test_a_model_proven_before_there_was_a_choice_runs_the_plain_way() -> None:
    old = SelfTestReport(precision="fp32", median_ms=3.0)
    unreadable = replace(stored(row(3.0)), choice={"runtime": "abacus"})
    for report in (old, SelfTestReport(), unreadable, replace(stored(row(3.0)), reason=None)):
        plan = Plan.of("fp16", report)
        assert (plan.candidate, plan.precision, plan.reason.code) == (None, "fp16", "choice.untuned")


def test_a_plain_way_that_was_wrong_when_measured_never_takes_over() -> None:
    wrong = replace(row(None, state="wrong", code="tune.wrong"), detail="case-1: off by 0.5")
    better = replace(row(3.0), candidate=Candidate("openvino", "fp32.onnx", "fp32", "CPU"))
    plan = Plan.of("fp32", stored(wrong, better))
    assert plan.baseline_refusal == Note("tune.wrong", "case-1: off by 0.5")
    assert Plan.of("fp32", stored(row(5.0), better)).baseline_refusal is None


def test_plain_candidate_is_what_every_box_can_run() -> None:
    class Variant:
        file, precision = "model.onnx", "fp32"

    assert baseline_candidate(Variant(), 2) == Candidate("onnxruntime", "model.onnx", "fp32", "CPUExecutionProvider", 2)  # type: ignore[arg-type]
