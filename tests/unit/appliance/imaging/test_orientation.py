"""Every legal Patient Orientation of a frontal image turns the same film upright, and points find their way back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from appliance.imaging.orientation import UPRIGHT, Orientation, orientation_of

# The directions to the patient's left and feet, as the film below shows them: A top left, B top right, C bottom left.
FILM = np.array([["A", "-", "B"], ["C", "-", "-"]])
FRONTAL = list(itertools.chain(itertools.product("LR", "HF"), itertools.product("HF", "LR")))


def header(*directions: str) -> Dataset:
    ds = Dataset()
    ds.PatientOrientation = list(directions)
    return ds


def film_as_stored(rows: str, columns: str) -> np.ndarray:
    """The upright film as a file with this orientation stores it."""
    stored = FILM
    if rows in "HF":
        stored, rows, columns = stored.T, columns, rows
        return stored[:: 1 if rows == "L" else -1, :: 1 if columns == "F" else -1]
    return stored[:: 1 if columns == "F" else -1, :: 1 if rows == "L" else -1]


@pytest.mark.parametrize(("rows", "columns"), FRONTAL)
def test_a_frontal_film_is_turned_upright(rows: str, columns: str) -> None:
    orientation = orientation_of(header(rows, columns))
    stored = film_as_stored(rows, columns)
    assert (orientation.apply(stored) == FILM).all()
    assert (orientation.restore(FILM) == stored).all()


@pytest.mark.parametrize(("rows", "columns"), FRONTAL)
@given(st.data())
def test_a_point_finds_its_pixel_in_the_file(rows: str, columns: str, data: st.DataObject) -> None:
    orientation = orientation_of(header(rows, columns))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    stored = np.arange(height * width).reshape(height, width)
    upright = orientation.apply(stored)
    y, x = data.draw(st.integers(0, upright.shape[0] - 1)), data.draw(st.integers(0, upright.shape[1] - 1))
    file_x, file_y = orientation.restore_point(x + 0.5, y + 0.5, *upright.shape)
    assert stored[int(file_y), int(file_x)] == upright[y, x]


@pytest.mark.parametrize(
    ("directions", "description"),
    [
        (("L", "F"), "0"),
        (("H", "L"), "270"),
        (("R", "H"), "180"),
        (("F", "R"), "90"),
        (("R", "F"), "mirrored 0"),
        (("L", "H"), "mirrored 180"),
    ],
)
def test_what_was_done_is_described(directions: tuple[str, str], description: str) -> None:
    assert orientation_of(header(*directions)).description == description


@pytest.mark.parametrize(("directions", "film"), [(("LFA", "FR"), FILM), (("RH", "HL"), FILM[::-1, ::-1])])
def test_oblique_directions_count_by_their_first_letter(directions: tuple[str, str], film: np.ndarray) -> None:
    assert (orientation_of(header(*directions)).apply(film) == FILM).all()


@pytest.mark.parametrize(("rows", "columns"), [*itertools.product("AP", "HF"), *itertools.product("HF", "AP")])
def test_a_lateral_film_gets_its_head_up_and_is_not_mirrored(rows: str, columns: str) -> None:
    orientation = orientation_of(header(rows, columns))
    assert orientation.transpose ^ orientation.flip_rows ^ orientation.flip_columns is False
    ends = np.array([[0, 1], [2, 3]])
    head = {("H", "r"): ends[:, 1], ("F", "r"): ends[:, 0], ("H", "c"): ends[1], ("F", "c"): ends[0]}
    expected = head[(rows, "r")] if rows in "HF" else head[(columns, "c")]
    assert set(orientation.apply(ends)[0]) == set(expected)


@pytest.mark.parametrize(
    "directions", [(), ("L",), ("L", "P"), ("L", "L"), ("LR", "F"), ("X", "F"), ("LFAH", "F"), ("", ""), ("L", "F", "H"), ("LE", "D")]
)
def test_no_or_an_invalid_orientation_changes_nothing(directions: tuple[str, ...]) -> None:
    assert orientation_of(header(*directions)) == UPRIGHT
    assert orientation_of(Dataset()) == UPRIGHT


@given(st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_restore_undoes_apply(flags: tuple[bool, bool, bool]) -> None:
    pixels = np.arange(24).reshape(2, 4, 3)
    orientation = Orientation(*flags)
    assert (orientation.restore(orientation.apply(pixels)) == pixels).all()


@given(st.builds(Orientation, st.booleans(), st.booleans(), st.booleans()), st.sampled_from([0, 90, 180, 270]))
def test_a_further_turn_is_the_turn_of_the_result(orientation: Orientation, degrees: int) -> None:
    picture = np.arange(6).reshape(2, 3)
    turned = orientation.then_turn(degrees)
    assert (turned.apply(picture) == np.rot90(orientation.apply(picture), -degrees // 90)).all()
    assert (turned.restore(turned.apply(picture)) == picture).all()
