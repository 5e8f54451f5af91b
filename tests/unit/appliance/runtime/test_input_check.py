"""The input check of a bundle: what it lets through, what it stops and why, and what it refuses to answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from appliance.core.domain import Note
from appliance.core.errors import InferenceError
from appliance.imaging.preprocessing import from_display
from appliance.runtime.input_check import InputChecker
from model_sync.bundle import InputSpec, ModelBundle
from quantize.reference.phantom import Phantom, display
from tests.support.input_check_bundle import add_input_check, checked_bundle
from tests.support.library_site import tiny_bundle


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InputChecker]:
    opened = InputChecker.open(ModelBundle.load(checked_bundle(tmp_path_factory.mktemp("bundle"))))
    assert opened is not None
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("turns", "reason"),
    [(0, None), (1, Note("quality.turned", "90")), (2, Note("quality.turned", "180")), (3, Note("quality.turned", "270"))],
)
def test_a_turned_film_is_doubted(checker: InputChecker, turns: int, reason: Note | None) -> None:
    film = np.ascontiguousarray(np.rot90(display(Phantom(256, 256)), -turns))
    assert checker.doubt(film) == reason
    assert abs(sum(checker.probabilities(film).values()) - 1) < 1e-3


def test_a_negative_and_a_dark_picture_are_doubted(checker: InputChecker) -> None:
    assert checker.doubt(255 - display(Phantom(256, 256))) == Note("quality.negative")
    assert checker.doubt(np.zeros((200, 300), np.uint8)) == Note("quality.other_image")


def test_the_shape_of_pixels_is_taken_into_account(checker: InputChecker) -> None:
    film = display(Phantom(256, 256))
    flat = film[::2]
    assert checker.doubt(flat, 2.0) is None
    spec: InputSpec = checker._spec.input
    assert np.abs(from_display(flat, spec, 2.0).tensor - from_display(film, spec).tensor).mean() < 0.02


def test_a_bundle_without_one_has_none(tmp_path: Path) -> None:
    assert InputChecker.open(ModelBundle.load(tiny_bundle(tmp_path))) is None


def test_an_output_that_is_no_distribution_is_an_error(tmp_path: Path) -> None:
    bundle = ModelBundle.load(add_input_check(tiny_bundle(tmp_path), classes=3))
    opened = InputChecker.open(bundle)
    assert opened is not None
    with pytest.raises(InferenceError, match="one probability per class"):
        opened.doubt(np.zeros((64, 64), np.uint8))
    opened.close()


def test_a_file_that_is_no_network_is_an_error(tmp_path: Path) -> None:
    bundle = ModelBundle.load(checked_bundle(tmp_path))
    bundle.path("input_check.onnx").write_bytes(b"no network")
    with pytest.raises(InferenceError):
        InputChecker.open(bundle)
