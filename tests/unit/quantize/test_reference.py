"""The reference bundle: what is committed is what the scripts make, and its figures are those of the pictures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_sync.bundle import Manifest, ModelBundle
from quantize.errors import QuantizeError
from quantize.gate import predictions, processor_kinds, roc_statistics
from quantize.pipeline import RunResult
from quantize.reference import build, phantom, train, training_set
from tests.support.quantize_site import only_onnxruntime

BUNDLE = Path(__file__).resolve().parents[3] / "appliance" / "bundles" / build.NAME
THRESHOLD = 0.6208
# The candidates that won; the others take minutes.
SHIPPED = ("fp16", "int8-unsigned-everything-7bit-minmax")


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return ModelBundle.load(BUNDLE)


@pytest.fixture(scope="module")
def reference(bundle: ModelBundle) -> build.Reference:
    return build.Reference.open(bundle.path(build.WEIGHTS))


# --- the committed bundle -------------------------------------------------------------------------------------------


def test_the_bundle_is_small_enough_to_be_shipped(bundle: ModelBundle) -> None:
    assert sum(path.stat().st_size for path in bundle.directory.rglob("*")) <= 12 * 1000 * 1000


def test_the_manifest_is_written_the_canonical_way(bundle: ModelBundle) -> None:
    raw = (BUNDLE / "manifest.json").read_bytes()
    assert Manifest.parse(raw).to_json() == raw


def test_r29_the_operating_point_reaches_its_sensitivity(bundle: ModelBundle) -> None:
    point = bundle.manifest.operating_point(build.LABEL)
    assert point.threshold == pytest.approx(THRESHOLD, abs=1e-3)
    assert point.sensitivity.value >= build.SENSITIVITY
    assert sum(entry.n_positive for entry in point.per_source) == 499
    assert any(entry.specificity and "NIH" in entry.source for entry in point.per_source)


def test_the_manifest_says_in_both_languages_what_it_is_not(bundle: ModelBundle) -> None:
    manifest = bundle.manifest
    assert "不是医疗器械" in manifest.intended_use.zh
    assert "Not a medical device" in manifest.intended_use.en
    assert "1–5 岁" in manifest.applies_to.age.note.zh
    assert "aged 1 to 5" in manifest.applies_to.age.note.en
    assert manifest.registration.number is None


def test_the_model_card_says_so_too(bundle: ModelBundle) -> None:
    card = bundle.path("MODEL_CARD.md").read_text(encoding="utf-8")
    for words in ("Demonstration only", "仅供演示", "不得单独作为诊断依据", "tuberculosis", "结核", f"{THRESHOLD:.4f}"):
        assert words in card
    for entry in bundle.manifest.operating_point(build.LABEL).per_source:
        assert entry.source in card


def test_the_golden_cases_are_the_phantoms_that_the_script_draws(bundle: ModelBundle) -> None:
    cases = {case.name: case for case in bundle.golden_cases()}
    assert set(cases) == set(build.GOLDEN)
    for name, drawn in build.GOLDEN.items():
        # Vector units of other processors round a few values the other way.
        assert np.abs(cases[name].pixels.astype(int) - phantom.display(drawn)).max() <= 1


def test_every_variant_passed_the_gate_on_every_runtime_it_is_shipped_for(bundle: ModelBundle) -> None:
    gate = json.loads(bundle.path("gate.json").read_text(encoding="utf-8"))
    assert [variant.precision for variant in bundle.manifest.variants] == ["fp32", "fp16", "int8"]
    for variant in bundle.manifest.variants:
        assert gate["variants"][variant.precision]["passed"]
        runtimes = gate["variants"][variant.precision]["files"][variant.file]["runtimes"]
        assert set(runtimes) == {"onnxruntime", "openvino"}
        for found in runtimes.values():
            assert found["passed"]
            assert found["labels"][build.LABEL]["auc_difference"] <= 0.01
    assert set(gate["not_measured_here"]["runtimes"]) == {"tensorrt", "triton"}
    assert {entry["code"] for entry in gate["refused"]} >= {"gate.score"}


def test_the_model_answers_the_golden_cases_within_tolerance(bundle: ModelBundle, reference: build.Reference) -> None:
    for case in bundle.golden_cases():
        probability, cam = reference(build.from_display(case.pixels, build.INPUT).tensor)
        assert abs(float(probability[0, 0]) - case.expected[build.LABEL]) <= case.tolerance["fp32"]
        assert case.cam is not None
        assert np.abs(cam - case.cam).max() < 0.05
        assert (case.expected[build.LABEL] >= THRESHOLD) is case.name.startswith("opacity")


@pytest.mark.parametrize("seed", range(20, 26))
def test_phantoms_fall_on_their_side_of_the_operating_point(reference: build.Reference, seed: int) -> None:
    normal, ill = (phantom.Phantom(448, 400, seed, opacity=given) for given in (None, phantom.Opacity()))
    assert reference.score(phantom.display(normal)) < THRESHOLD < reference.score(phantom.display(ill))


def test_the_samples_show_what_their_names_say(reference: build.Reference) -> None:
    scores = {sample.name: reference.score(phantom.display(sample.phantom)) for sample in phantom.SAMPLES if sample.phantom.view == "PA"}
    assert scores["01-normal.dcm"] < THRESHOLD
    assert scores["02-opacity.dcm"] > THRESHOLD
    assert scores["05-film.png"] > THRESHOLD


# --- against the pictures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rebuilt(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The bundle, on any processor."""
    out = tmp_path_factory.mktemp("reference") / "bundle"
    made = build.build(shared, out, only=SHIPPED)
    assert ModelBundle.load(out).manifest == made.manifest
    return made


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_committed_manifest_is_what_the_script_computes(rebuilt: RunResult, bundle: ModelBundle) -> None:
    ours, made = bundle.manifest, rebuilt.manifest
    shipped = {variant.precision for variant in ours.variants}
    point, again = ours.operating_point(build.LABEL), made.operating_point(build.LABEL)
    assert again.threshold == pytest.approx(point.threshold, abs=2e-3)
    assert again.sensitivity.value == pytest.approx(point.sensitivity.value, abs=5e-3)
    assert again.specificity.value == pytest.approx(point.specificity.value, abs=1e-2)
    for one, other in zip(point.per_source, again.per_source, strict=True):
        assert (one.source, one.n_positive, one.n_negative) == (other.source, other.n_positive, other.n_negative)
        assert other.auc == (None if one.auc is None else pytest.approx(one.auc, abs=5e-3))
    moved = np.abs(np.subtract(ours.reference_scores[0].counts, made.reference_scores[0].counts)).sum()
    assert moved <= 6
    for one_case, other_case in zip(ours.golden, made.golden, strict=True):
        assert other_case.expected[build.LABEL] == pytest.approx(one_case.expected[build.LABEL], abs=one_case.tolerance["fp32"])
        for precision in shipped:
            assert other_case.tolerance[precision] == pytest.approx(one_case.tolerance[precision], abs=0.05)
    # Ranges of activations differ in the last digit from processor to processor, and with them the bytes of int8.
    fixed = {"operating_points", "reference_scores", "golden", "documents", "variants"}
    assert made.model_dump(exclude=fixed) == ours.model_dump(exclude=fixed)
    for one_variant, other_variant in zip(ours.variants, made.variants, strict=True):
        assert other_variant.model_dump(exclude={"sha256"}) == one_variant.model_dump(exclude={"sha256"})
    assert made.variants[0].sha256 == ours.variants[0].sha256  # fp32 is shipped byte for byte


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_int8_that_the_script_makes_answers_as_the_committed_one(rebuilt: RunResult, bundle: ModelBundle) -> None:
    """On any processor: its weights have 7 bits, so that no sum is clipped."""
    gate = json.loads(bundle.path("gate.json").read_text(encoding="utf-8"))
    (committed,) = gate["variants"]["int8"]["files"].values()
    verdicts = {place.runtime: verdict for place, verdict in next(e for e in rebuilt.variants if e.name == SHIPPED[1]).verdicts.items()}
    assert "onnxruntime" in verdicts
    for runtime, verdict in verdicts.items():
        assert verdict.passed
        before, again = (figures["labels"][build.LABEL] for figures in (committed["runtimes"][runtime], verdict.figures))
        assert again["auc"] == pytest.approx(before["auc"], abs=2e-3)
        assert again["mean_abs_delta"] == pytest.approx(before["mean_abs_delta"], abs=2e-3)


def subset(pictures: training_set.TrainingSet, indices: NDArray[np.intp]) -> training_set.TrainingSet:
    files = [pictures.blob[pictures.offsets[i] : pictures.offsets[i + 1]] for i in indices.tolist()]
    offsets = np.concatenate([[0], np.cumsum([len(raw) for raw in files])])
    columns = (column[indices] for column in (pictures.positive, pictures.source, pictures.patient))
    return training_set.TrainingSet(b"".join(files), offsets, *columns)


def test_a_build_from_few_pictures_agrees_with_the_committed_manifest(
    shared: Path, bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short form of the whole build above: 80 held-out pictures, 32 for calibration, fp16 alone, on ONNX Runtime."""
    everything = training_set.TrainingSet.load(shared / "data" / "cxr_train_224.npz")
    held_out = everything.held_out()
    # Evenly spread, so that every population of the draft is among them.
    chosen = (np.flatnonzero(held_out & (everything.positive == flag)) for flag in (True, False))
    ill, well = (indices[np.linspace(0, len(indices) - 1, 40).astype(int)] for indices in chosen)
    few = subset(everything, np.sort(np.concatenate([ill, well, np.flatnonzero(~held_out)[:40]])))
    # The split is drawn from all patients: with few of them it would be another one.
    monkeypatch.setattr(training_set.TrainingSet, "held_out", lambda pictures: np.isin(pictures.patient, everything.patient[held_out]))
    monkeypatch.setattr(training_set.TrainingSet, "load", lambda _: few)
    monkeypatch.setattr(build, "CALIBRATION", 32)
    monkeypatch.setattr(training_set, "independent", lambda *_: None)
    monkeypatch.setattr(predictions, "runtime_targets", only_onnxruntime)
    build.build(shared, tmp_path / "bundle", only=("fp16",))
    ours, made = bundle.manifest, ModelBundle.load(tmp_path / "bundle").manifest
    for one_case, other_case in zip(ours.golden, made.golden, strict=True):
        assert other_case.expected[build.LABEL] == pytest.approx(one_case.expected[build.LABEL], abs=one_case.tolerance["fp32"])
    measured = {"operating_points", "reference_scores", "golden", "documents", "variants"}
    assert made.model_dump(exclude=measured) == ours.model_dump(exclude=measured)
    assert [(variant.precision, variant.recipe) for variant in made.variants] == [(v.precision, v.recipe) for v in ours.variants[:2]]
    assert made.variants[0].sha256 == ours.variants[0].sha256  # fp32 is shipped byte for byte
    assert sum(source.n_positive for source in made.operating_point(build.LABEL).per_source) == 40


def test_the_held_out_patients_took_no_part_in_training(shared: Path) -> None:
    pictures = training_set.TrainingSet.load(shared / "data" / "cxr_train_224.npz")
    chosen = pictures.held_out()
    assert int(chosen.sum()) == 706
    assert not set(pictures.patient[chosen]) & set(pictures.patient[~chosen])
    weights = train.sampling_weights(pictures, ~chosen, train.Recipe.balance)
    assert weights.shape == (6769 - 706,)
    assert weights.min() > 0


# --- the statistics -------------------------------------------------------------------------------------------------


def test_wilson_agrees_with_the_published_example() -> None:
    # Newcombe 1998, table I: 81 of 263.
    interval = roc_statistics.wilson(81, 263)
    assert (interval.low, interval.high) == (0.2553, 0.3662)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_is_symmetrical(hits_of: tuple[int, int]) -> None:
    hits, total = hits_of
    interval, mirrored = roc_statistics.wilson(hits, total), roc_statistics.wilson(total - hits, total)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirrored.high, abs=2e-4)


SCORED = st.lists(st.tuples(st.booleans(), st.integers(0, 1000).map(lambda k: k / 1000)), min_size=1, max_size=60)


@given(SCORED)
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[bool, float]]) -> None:
    positive, score = (np.array(column) for column in zip(*pairs, strict=True))
    ill, well = score[positive], score[~positive]
    found = roc_statistics.auc(positive, score)
    if not len(ill) or not len(well):
        assert found is None
    else:
        wins = (ill[:, None] > well).sum() + 0.5 * (ill[:, None] == well).sum()
        assert found == pytest.approx(wins / (len(ill) * len(well)), abs=1e-4)


@given(SCORED, st.floats(0.5, 1))
def test_the_threshold_is_the_highest_that_finds_enough(pairs: list[tuple[bool, float]], wanted: float) -> None:
    positive = np.ones(len(pairs), bool)
    score = np.array([score for _, score in pairs])
    threshold = roc_statistics.threshold_for(positive, score, wanted)
    assert (score >= threshold).mean() >= wanted - 1e-12
    higher = score[score > threshold + 1e-4]
    if len(higher):
        assert (score >= higher.min()).sum() < math.ceil(wanted * len(score)) or higher.min() == score.min()


# --- what may be missing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saturates", "only"), [(False, []), (True, ["--only", "fp16"]), (True, []), (True, ["--only", *SHIPPED])])
def test_without_the_weights_the_script_says_what_to_do_on_any_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saturates: bool, only: list[str]
) -> None:
    monkeypatch.setattr(processor_kinds, "saturates", lambda: saturates)
    assert build.main(["--shared", str(tmp_path), "--out", str(tmp_path / "out"), *only]) == 1
    assert "hint: point --shared" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_pictures_the_error_carries_a_hint(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError) as caught:
        training_set.TrainingSet.load(tmp_path / "absent.npz")
    assert caught.value.hint


def test_without_independent_pictures_there_is_no_measure_of_them(tmp_path: Path) -> None:
    assert training_set.independent(tmp_path, lambda _: 0.5) is None


def test_the_recipe_is_read_without_torch() -> None:
    script = "import sys, quantize.reference.train; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
