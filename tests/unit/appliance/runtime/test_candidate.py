"""A candidate as it is stored: what was written is read back, anything else is refused in our own words and never crashes a worker."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import InferenceError
from appliance.core.self_test_report import SelfTestReport
from appliance.runtime import RUNTIMES, Candidate
from appliance.tuning.selection import Plan

STORED = Candidate("openvino", "model_int8.onnx", "int8", "CPU", 2, 4).to_json()
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(
    st.builds(
        Candidate, st.sampled_from(RUNTIMES), st.text(), st.text(), st.text(), threads=st.integers(0, 1024), batch=st.integers(1, 1024)
    )
)
def test_what_was_stored_is_read_back(candidate: Candidate) -> None:
    assert Candidate.from_json(candidate.to_json()) == candidate


@pytest.mark.parametrize(
    "change",
    [
        {"batch": "8"}, {"batch": 0}, {"batch": -1}, {"batch": True}, {"batch": 1.0}, {"batch": None}, {"batch": 10**9}, {"threads": "2"},
        {"threads": -1}, {"threads": 10**9}, {"threads": False}, {"runtime": "tflite"}, {"runtime": ["openvino"]}, {"runtime": None},
        {"file": None}, {"file": 5}, {"precision": 8}, {"provider": ["CPU"]}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_none_of_ours_is_refused(change: dict[str, Any]) -> None:
    stored = STORED | change
    with pytest.raises(InferenceError, match="cannot be read") as caught:
        Candidate.from_json(stored)
    assert caught.value.code == "job.error"
    report = {"choice": stored, "reason": {"code": "choice.measured", "detail": ""}, "table": []}
    assert Plan.of("fp32", SelfTestReport.from_json(report)) == Plan("fp32")  # the baseline


@given(ANYTHING | st.fixed_dictionaries(dict.fromkeys(STORED, ANYTHING)))
def test_anything_is_read_or_refused(value: Any) -> None:
    try:
        Candidate.from_json(value)
    except InferenceError as error:
        assert error.code == "job.error"
