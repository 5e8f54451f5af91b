"""The names of the runtimes stand where a manifest, a report and a page need them: the lists agree (see CONTRIBUTING.md)."""

from __future__ import annotations

import typing

import pytest
from pydantic import TypeAdapter

from appliance.core import run_summary
from appliance.runtime import _ADAPTERS
from appliance.runtime.candidate import RUNTIMES, RuntimeName
from model_sync.agent import report
from model_sync.bundle.manifest import Variant


def test_the_lists_agree() -> None:
    assert set(typing.get_args(RuntimeName)) == set(RUNTIMES) == set(_ADAPTERS) == set(run_summary._NAMES)
    (names,) = typing.get_args(Variant.model_fields["not_on"].annotation)
    assert set(typing.get_args(names)) == set(RUNTIMES)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_report_may_name_each_of_them(runtime: str) -> None:
    assert TypeAdapter(report.RuntimeName).validate_python(runtime) == runtime
