"""The committed network of the input check: what it stops and what it lets pass, measured again on patients it was not trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from appliance.imaging.preprocessing import from_display
from model_sync.bundle import InputCheck, Letterbox, Resize
from quantize.errors import QuantizeError
from quantize.reference import build, input_check, not_chest
from quantize.reference.input_check import Class, Classifier, Row
from quantize.reference.phantom import Phantom, display
from quantize.reference.training_set import TrainingSet

# Of a source with fewer pictures a share says little: its 95 % interval must include the target.
ENOUGH = 100
TURNED = ("turned_90", "turned_180", "turned_270")
Figures = dict[str, list[Row]]


@pytest.fixture(scope="module")
def network() -> Classifier:
    return Classifier.open()


@pytest.fixture(scope="module")
def figures(network: Classifier, shared: Path) -> Figures:
    return input_check.evaluate(network, shared, input_check.stated_min_upright())


def rows(figures: Figures, group: str, *variants: str) -> list[Row]:
    chosen = [row for row in figures[group] if row.variant in variants]
    assert chosen
    return chosen


def misses(chosen: list[Row], at_least: float) -> list[Row]:
    """The sources of which less than ``at_least`` is stopped."""
    return [row for row in chosen if (row.part_stopped.value if row.n >= ENOUGH else row.part_stopped.high) < at_least]


def too_many(chosen: list[Row], at_most: float) -> list[Row]:
    """The sources of which more than ``at_most`` is stopped."""
    return [row for row in chosen if (row.part_stopped.value if row.n >= ENOUGH else row.part_stopped.low) > at_most]


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_network_has_the_agreed_form() -> None:
    model = onnx.load(input_check.NETWORK)
    assert input_check.NETWORK.stat().st_size <= 300 * 1000
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [17]
    shapes = {
        value.name: [part.dim_param or part.dim_value for part in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": ["n", 1, 64, 64], "probabilities": ["n", 6]}
    assert input_check.CLASSES == ("upright", "turned_90", "turned_180", "turned_270", "negative", "other")


def test_the_record_is_that_of_the_committed_network() -> None:
    digest = hashlib.sha256(input_check.NETWORK.read_bytes()).hexdigest()
    record = json.loads(input_check.RECORD.read_text("utf-8"))
    entry = InputCheck.model_validate(record | {"file": "input_check.onnx"}, strict=True)
    assert entry.sha256 == digest
    assert entry.input == input_check.input_spec()
    assert entry.classes == [entry.name.lower() for entry in Class]
    assert entry.min_upright == input_check.stated_min_upright()
    assert {figure.kind for figure in entry.figures} == set(entry.classes)


def test_the_input_is_the_reference_models_at_64_pixels() -> None:
    spec = input_check.input_spec()
    assert [step.step for step in spec.pipeline] == [step.step for step in build.INPUT.pipeline]
    assert (spec.height, spec.width) == (64, 64)
    assert [(step.height, step.width, step.filter) for step in spec.pipeline if isinstance(step, Resize)] == [
        (64, 64, "antialias_bilinear")
    ]
    assert [(step.fill, step.align) for step in spec.pipeline if isinstance(step, Letterbox)] == [(0, "center")]


def test_the_same_picture_gives_the_same_probabilities_alone_and_in_a_batch(network: Classifier) -> None:
    pictures = [display(Phantom(300, 200 + 30 * seed, seed=seed)) for seed in range(1, 6)]
    together = network.probabilities(pictures)
    assert np.array_equal(together, Classifier.open().probabilities(pictures))
    alone = np.concatenate([network.probabilities([picture]) for picture in pictures])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together.sum(1), 1, atol=1e-5)
    assert from_display(pictures[0], network.spec).tensor.shape == (1, 1, 64, 64)


def test_a_missing_network_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="input check"):
        Classifier.open(tmp_path / "none.onnx")


# --- what the classes mean ------------------------------------------------------------------------------------------


def test_turned_90_is_clockwise() -> None:
    picture = np.zeros((4, 6), np.uint8)
    picture[0, 2] = 255
    assert np.argwhere(input_check.turned(picture, 1)).tolist() == [[2, 3]]
    assert np.array_equal(input_check.turned(input_check.turned(picture, 1), 3), picture)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_film_is_named_by_its_turn(network: Classifier, quarters: int) -> None:
    probabilities = network.probabilities([input_check.turned(display(Phantom(400, 340, seed=2)), quarters)])
    assert input_check.stopped(probabilities, input_check.stated_min_upright()).tolist() == [True]
    assert input_check.reason(probabilities).tolist() == [quarters]


def test_a_picture_is_stopped_below_the_threshold_for_the_most_probable_other_class() -> None:
    probabilities = np.array([[0.5, 0, 0.1, 0.2, 0.1, 0.1], [0.49, 0.01, 0.1, 0.1, 0.25, 0.05], [0, 0, 0, 0, 0, 1]], np.float32)
    assert input_check.stopped(probabilities, 0.5).tolist() == [False, True, True]
    assert input_check.reason(probabilities).tolist() == [Class.TURNED_270, Class.NEGATIVE, Class.OTHER]


def test_no_patient_is_in_two_parts(shared: Path) -> None:
    pictures = TrainingSet.load(shared / "data" / "cxr_train_224.npz")
    parts = (*input_check.training_parts(pictures), pictures.held_out())
    assert np.array_equal(sum(part.astype(int) for part in parts), np.ones(len(pictures.patient)))
    patients = [set(pictures.patient[part].tolist()) for part in parts]
    assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])


def test_drawn_pictures_depend_on_their_seed_only() -> None:
    first, again, others = ([picture.pixels.tobytes() for picture in not_chest.drawn(seed, 2)] for seed in (5, 5, 6))
    assert first == again
    assert not set(first) & set(others)


# --- what is stopped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["held-out patients", "independent films"])
def test_good_films_pass(figures: Figures, group: str) -> None:
    assert too_many(rows(figures, group, "upright"), at_most=0.01) == []


@pytest.mark.parametrize("group", ["held-out patients", "independent films"])
def test_mirrored_films_pass(figures: Figures, group: str) -> None:
    assert too_many(rows(figures, group, "mirrored"), at_most=0.01) == []


@pytest.mark.parametrize("group", ["held-out patients", "independent films"])
def test_turned_films_are_stopped(figures: Figures, group: str) -> None:
    assert misses(rows(figures, group, *TURNED), at_least=0.97) == []


@pytest.mark.parametrize("group", ["held-out patients", "independent films"])
def test_negative_films_are_stopped_turned_or_not(figures: Figures, group: str) -> None:
    assert misses(rows(figures, group, "negative", *(f"negative, {turn}" for turn in TURNED)), at_least=0.95) == []


def test_the_reason_is_the_right_one(figures: Figures) -> None:
    for variant in (*TURNED, "negative"):
        chosen = rows(figures, "held-out patients", variant)
        assert sum(row.n_right for row in chosen) >= 0.97 * sum(row.n for row in chosen)


def test_what_is_no_frontal_chest_film_is_stopped(figures: Figures) -> None:
    chosen = rows(figures, "no frontal chest film", "other")
    assert misses(chosen, at_least=0.9) == []
    assert sum(row.n_stopped for row in chosen) >= 0.97 * sum(row.n for row in chosen)


def test_the_recorded_figures_are_measured_again(figures: Figures) -> None:
    """Another processor may round a picture over the threshold, no more."""
    entry = InputCheck.model_validate_json(json.dumps(json.loads(input_check.RECORD.read_text("utf-8")) | {"file": "input_check.onnx"}))
    measured = [row for rows in figures.values() for row in rows if row.variant in input_check.CLASSES]
    assert [(figure.source, figure.kind, figure.n) for figure in entry.figures] == [(row.group, row.variant, row.n) for row in measured]
    for figure, row in zip(entry.figures, measured, strict=True):
        assert abs(figure.stopped.value - row.part_stopped.value) * row.n <= max(1, 0.01 * row.n) + 0.1


@pytest.mark.parametrize("name", build.GOLDEN)
def test_the_golden_cases_of_the_reference_bundle_pass(network: Classifier, name: str) -> None:
    probabilities = network.probabilities([display(build.GOLDEN[name])])
    assert input_check.stopped(probabilities, input_check.stated_min_upright()).tolist() == [False]
