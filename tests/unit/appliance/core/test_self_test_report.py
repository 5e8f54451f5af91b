"""Self-test reports that older versions of the appliance stored are still read."""

from __future__ import annotations

import json

import pytest

from appliance.core.domain import Note
from appliance.core.run_summary import RuntimeStatus
from appliance.core.self_test_report import SelfTestReport

# As the first version wrote it, before candidates were measured.
OLDEST = '{"precision": "fp32", "runtime": "onnxruntime 1.23.2", "max_difference": {"golden-1": 1.2e-06}, "median_ms": 16.4}'


def test_the_oldest_row_is_read_with_defaults() -> None:
    report = SelfTestReport.from_json(OLDEST)
    assert (report.precision, report.runtime, report.max_difference) == ("fp32", "onnxruntime 1.23.2", {"golden-1": 1.2e-06})
    assert (report.choice, report.reason, report.table, report.worst_ms, report.fallback, report.runs) == (None, None, (), None, None, None)
    assert (report.is_measured, report.is_fixed_by_user, report.expected_ms) == (True, False, 16.4)
    status = RuntimeStatus.of(OLDEST)
    assert (status.now, status.chosen, status.table, status.reason, status.stopped) == (None, None, (), None, None)


def test_a_row_with_a_fallback_and_fields_of_another_version_is_read() -> None:
    fallback = {"code": "choice.fallback", "detail": "job.error", "at": "2026-01-01T00:00:00.000+00:00"}
    row = json.loads(OLDEST) | {
        "reason": {"code": "choice.by_hand", "detail": "int8"}, "choice": {"runtime": "openvino"}, "table": [{"state": "right"}, "damaged"],
        "fallback": fallback, "watch_ms": 40.0, "details": ["no object"], "a_field_of_tomorrow": 1,
    }  # fmt: skip
    report = SelfTestReport.from_json(json.dumps(row))
    assert (report.reason, report.is_fixed_by_user, report.expected_ms) == (Note("choice.by_hand", "int8"), True, 40.0)
    assert (report.table, report.fallback, report.details) == (({"state": "right"},), fallback, {})
    assert SelfTestReport.from_json(json.dumps(report.to_json())) == report


@pytest.mark.parametrize("stored", [None, "", "no JSON", "[1]", "[" * 100_000])
def test_a_row_that_is_no_report_is_an_empty_report(stored: str | None) -> None:
    assert SelfTestReport.from_json(stored) == SelfTestReport()
