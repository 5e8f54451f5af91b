"""The JSON log lines of the box and of the central server, byte for byte."""

from __future__ import annotations

import logging
import sys

import pytest

from appliance.core.process import LOG_FIELDS
from model_sync.json_logging import JsonFormatter

CENTRAL = '{"at": "2026-01-02T03:04:05Z", "level": "ERROR", "logger": "x", "message": "数 failed", "exception": "ValueError"}'
BOX = (
    '{"at": "2026-01-02T03:04:05.678+00:00", "level": "ERROR", "logger": "x", "message": "数 failed", "job": 7,'
    ' "exception": "ValueError", "where": "test_json_logging.py:%d"}'
)


@pytest.mark.parametrize(("formatter", "expected"), [(JsonFormatter(), CENTRAL), (JsonFormatter(LOG_FIELDS), BOX)], ids=["central", "box"])
def test_a_record_is_one_line_without_values(formatter: JsonFormatter, expected: str) -> None:
    try:
        raise ValueError("CANARY")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "%s failed", ("数",), sys.exc_info())
    record.created, record.job, record.patient = 1767323045.6789, 7, "CANARY"
    assert record.exc_info and record.exc_info[2]
    assert formatter.format(record) == (expected % record.exc_info[2].tb_lineno if "%d" in expected else expected)
