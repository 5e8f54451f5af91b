"""What the report makes of stored notes and numbers."""

from __future__ import annotations

import pytest

from appliance.core.applicability import AgeOutside
from appliance.core.domain import Note
from webui.messages import note_detail
from webui.study.report_view import format_numbers


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), ([1, 2, 3, 7], "1–3, 7"), ([1, 3, 4, 9, 10], "1, 3–4, 9–10")])
def test_numbers_are_written_as_ranges(numbers: list[int], text: str) -> None:
    assert format_numbers(numbers) == text


def test_an_age_outside_the_range_is_read_as_it_was_stored() -> None:
    age = AgeOutside("64", "0.5", "5")
    assert age.to_note() == Note("caution.age_outside", "64; 0.5-5")
    assert AgeOutside.from_note(age.to_note()) == age
    assert AgeOutside.from_note(Note("caution.age_outside", "of a newer version")) is None
    assert AgeOutside.from_note(Note("assume.view", "64; 1-5")) is None


@pytest.mark.parametrize(
    ("code", "detail", "shown"),
    [
        ("scope.view", "LL", "LL"), ("scope.view", "-", ""), ("assume.view", "PA", "PA"), ("job.error", "64; 1-5", ""),
        ("caution.age_outside", "of a newer version", ""), ("quality.blank", "", ""),
    ],
)  # fmt: skip
def test_only_details_that_help_a_doctor_are_shown(code: str, detail: str, shown: str) -> None:
    assert note_detail(Note(code, detail)) == shown
