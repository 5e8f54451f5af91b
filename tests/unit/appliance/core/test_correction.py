"""A person's decision about an image: stored as text, and nothing else is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.correction import NOTHING_DECIDED, OTHER_QUARTER_TURN, Correction


@given(st.sampled_from([0, 90, 180, 270]), st.booleans())
def test_what_is_stored_is_read_back(degrees: int, inverts: bool) -> None:
    correction = Correction(degrees, inverts, True)
    assert Correction.parse(correction.to_text()) == correction


def test_nobody_has_decided_until_somebody_has() -> None:
    assert Correction.parse("") == NOTHING_DECIDED
    assert not NOTHING_DECIDED.is_confirmed
    assert Correction.parse("as_is").is_confirmed
    assert Correction.parse("turn_90+invert") == Correction(90, True, True)


@given(st.text(max_size=12) | st.sampled_from(["turn_45", "turn_0", "invert+turn_90", "TURN_90", "as_is+invert", " ", "turn_90 "]))
def test_anything_else_is_refused(text: str) -> None:
    try:
        correction = Correction.parse(text)
    except ValueError:
        return
    assert correction.to_text() == text


def test_the_correction_of_the_box_is_no_decision_of_a_person() -> None:
    assert Correction.parse(OTHER_QUARTER_TURN.to_text()) == OTHER_QUARTER_TURN
    assert not OTHER_QUARTER_TURN.is_confirmed
    assert Correction(180, False, True).to_text() == "turn_180"


def test_a_correction_of_a_newer_version_is_refused() -> None:
    with pytest.raises(ValueError, match="not a correction"):
        Correction.parse("mirror")
