"""The gate's judgement and the rules of what is shipped, without a runtime: arrays in, verdicts out."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.runtime import CPU
from quantize import work_directory
from quantize.bundle import golden_cases
from quantize.errors import QuantizeError
from quantize.gate import roc_statistics, selection
from quantize.gate.image_sets import ImageSet, Row
from quantize.gate.predictions import Predictions, RuntimeTarget, Timing
from quantize.gate.selection import VariantResult
from quantize.gate.verdicts import Limits, RefusalReason, Verdict, failed_verdict, judge
from quantize.progress import Progress
from quantize.work_directory import WorkDirectory

N = 400
RNG = np.random.default_rng(3)
POSITIVE = np.arange(N) % 2 == 0
SCORE = np.round(np.clip(0.5 + 0.25 * np.where(POSITIVE, 1, -1) + 0.2 * RNG.standard_normal(N), 0, 1), 6)
CAM = RNG.standard_normal((N, 1, 3, 3)).astype(np.float32)
ORT, VINO = RuntimeTarget("onnxruntime", CPU), RuntimeTarget("openvino", "CPU")


def pictures(sources: list[str] | None = None) -> ImageSet:
    rows = tuple(Row(Path("x"), i, (bool(POSITIVE[i]),), (sources or ["one"] * N)[i]) for i in range(N))
    return ImageSet(Path(), rows, np.zeros((N, 1, 1, 1), np.float32), ("",) * N, "digest")


def said(score: Any = SCORE, cam: Any = CAM, mask: Any = None) -> Predictions:
    return Predictions(np.asarray(score, np.float64).reshape(N, -1), cam, mask, {})


def verdict(variant: Predictions, limits: Limits | None = None, **how: Any) -> Verdict:
    return judge(said(mask=how.get("mask")), variant, pictures(how.get("sources")), ("ill",), [0.5], limits or Limits())


def codes(found: Verdict) -> set[str]:
    return {reason.code for reason in found.reasons}


# --- the gate -------------------------------------------------------------------------------------------------------


def test_the_float_model_passes_against_itself() -> None:
    found = verdict(said())
    assert found.passed
    figures = found.figures["labels"]["ill"]
    assert figures["auc_difference"] == figures["max_abs_delta"] == figures["changed_sides"] == found.figures["cam_difference"] == 0
    json.dumps(found.to_json(), allow_nan=False)


def test_an_auc_that_falls_is_refused() -> None:
    noisy = np.clip(SCORE + 0.2 * RNG.standard_normal(N), 0, 1)
    found = verdict(said(noisy), Limits(score=1))
    assert not found.passed
    assert "gate.auc" in codes(found)


def test_an_auc_that_rises_is_another_model_too() -> None:
    better = np.clip(SCORE + 0.1 * np.where(POSITIVE, 1, -1), 0, 1)
    assert "gate.auc" in codes(verdict(said(better)))


def test_a_shift_moves_the_operating_point_but_no_auc() -> None:
    found = verdict(said(np.clip(SCORE * 0.9 + 0.1, 0, 1)))
    assert codes(found) == {"gate.specificity"}
    assert found.figures["labels"]["ill"]["auc_difference"] < 0.001
    found = verdict(said(SCORE * 0.85))
    assert "gate.sensitivity" in codes(found)


def test_one_score_that_changes_too_much_is_enough() -> None:
    changed = SCORE.copy()
    changed[7] = 1 - changed[7] if abs(1 - 2 * changed[7]) > 0.3 else changed[7] + 0.4
    found = verdict(said(changed))
    assert codes(found) == {"gate.score"}
    assert found.reasons[0].detail.startswith("ill: a score changes by")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(value: float) -> None:
    broken, map_broken = SCORE.copy(), CAM.copy()
    broken[3], map_broken[5, 0, 1, 1] = value, value
    assert codes(verdict(said(broken))) == {"gate.not_finite"}
    found = verdict(said(cam=map_broken))
    assert codes(found) == {"gate.not_finite"}
    assert "activation map: NaN or Inf in 1 of 400" in found.reasons[0].detail


def test_a_map_that_points_elsewhere_is_refused() -> None:
    assert codes(verdict(said(cam=CAM[:, :, ::-1]))) == {"gate.cam"}
    assert verdict(said(cam=CAM + 0.01)).passed


def test_masks_are_held_against_the_float_models() -> None:
    mask = RNG.integers(0, 3, (N, 8, 8)).astype(np.uint8)
    other = mask.copy()
    other[:, 0, :2] = 0
    assert verdict(said(mask=mask), mask=mask).passed
    found = verdict(said(mask=other), mask=mask)
    assert codes(found) == {"gate.dice"}
    assert found.figures["dice"]["1"] < 0.99


def test_a_large_source_is_gated_by_itself_and_a_small_one_listed() -> None:
    def spoilt(size: int) -> Verdict:
        sources = ["small" if i < size else "large" for i in range(N)]
        score = SCORE.copy()
        score[:size] = score[:size][::-1]
        return verdict(said(score), Limits(auc=0.05, score=1), sources=sources)

    listed, gated = spoilt(40), spoilt(60)
    rows = {row["source"]: row for row in listed.figures["labels"]["ill"]["per_source"]}
    assert (rows["small"]["gated"], rows["large"]["gated"]) == (False, True)
    assert (rows["small"]["n_positive"], rows["small"]["n_negative"]) == (20, 20)
    assert not any("small" in reason.detail for reason in listed.reasons)
    assert any(reason.code == "gate.auc" and "ill, small" in reason.detail for reason in gated.reasons)


@given(st.floats(0, 0.2), st.integers(0, 2**32 - 1))
def test_what_passes_is_within_every_limit(noise: float, seed: int) -> None:
    score = np.clip(SCORE + noise * np.random.default_rng(seed).standard_normal(N), 0, 1)
    found, limits = verdict(said(score)), Limits()
    figures = found.figures["labels"]["ill"]
    within = figures["auc_difference"] <= limits.auc and np.abs(score - SCORE).max() <= limits.score
    for kind, measure in (("sensitivity", roc_statistics.sensitivity_of), ("specificity", roc_statistics.specificity_of)):
        interval = measure(pictures().scored(0, SCORE), 0.5)
        assert interval is not None
        within &= interval.low <= figures[kind]["value"] <= interval.high
    assert found.passed == within


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=1, max_size=50))
def test_the_roc_curve_encloses_the_auc(pairs: list[tuple[bool, int]]) -> None:
    positive, score = np.array([p for p, _ in pairs]), np.array([s / 20 for _, s in pairs])
    alarms, found = roc_statistics.roc(positive, score)
    assert (np.diff(alarms) >= 0).all()
    assert (np.diff(found) >= 0).all()
    area = roc_statistics.auc(positive, score)
    if area is not None:
        assert float(np.sum(np.diff(alarms) * (found[1:] + found[:-1]) / 2)) == pytest.approx(area, abs=1e-4)


# --- what is shipped ------------------------------------------------------------------------------------------------

GOOD = Verdict(True, (), {"labels": {"ill": {"mean_abs_delta": 0.001}}})


def timed(ms: float) -> Timing:
    return Timing(ms, ms, 100.0, 1)


def tried(
    name: str, precision: Any, ms: tuple[float, float], activations: Any = None, family: str = "", change: float = 0.001
) -> VariantResult:
    entry = VariantResult(name, precision, activations, Path(name), "recipe", family)
    passing = replace(GOOD, figures={"labels": {"ill": {"mean_abs_delta": change}}})
    entry.verdicts = dict.fromkeys((ORT, VINO), passing)
    entry.timing = {ORT: timed(ms[0]), VINO: timed(ms[1])}
    return entry


FP32 = ("fp32", "fp32", (10.0, 10.0))


def test_a_variant_that_passed_nowhere_is_left_out_with_every_reason() -> None:
    entry = VariantResult("int8", "int8", "unsigned", Path("x"), "recipe")
    entry.verdicts = {ORT: failed_verdict("gate.auc", "AUC 0.5"), VINO: failed_verdict("runtime.crashed", "SIGSEGV in load")}
    selection.refuse_failed([entry])
    assert entry.refused == RefusalReason("gate.auc", "onnxruntime: AUC 0.5; openvino: SIGSEGV in load")
    assert entry.not_on == ["onnxruntime", "openvino"]


def test_a_variant_that_no_runtime_tried_does_not_pass() -> None:
    entry = VariantResult("int8", "int8", "unsigned", Path("x"), "recipe")
    selection.refuse_failed([entry])
    assert entry.refused is not None
    assert entry.refused.code == "gate.untested"


def test_a_runtime_on_which_it_failed_is_named_for_the_box() -> None:
    entry = tried("int8", "int8", (5, 5), "unsigned")
    entry.verdicts[VINO] = failed_verdict("runtime.crashed", "SIGSEGV in load")
    selection.refuse_failed([entry])
    assert entry.refused is None
    assert entry.not_on == ["openvino"]


def test_of_calibrations_the_most_exact_is_kept() -> None:
    one, other = tried("a", "int8", (5, 5), "unsigned", "f", 0.004), tried("b", "int8", (5, 5), "unsigned", "f", 0.002)
    apart = tried("c", "int8", (5, 5), "symmetric", "g", 0.009)
    selection.keep_best_calibration([one, other, apart])
    assert one.refused is not None
    assert one.refused.code == "calibration.other_better"
    assert other.refused is apart.refused is None


def test_slower_everywhere_is_not_shipped() -> None:
    float_model, slow = tried(*FP32), tried("int8", "int8", (11, 10), "unsigned")
    selection.refuse_slow([float_model, slow], {"tensorrt": "no GPU"})
    assert slow.refused is not None
    assert slow.refused.code == "speed.slower"
    assert "onnxruntime: 11.00 ms, the more exact fp32 10.00 ms" in slow.refused.detail


def test_faster_on_one_runtime_is_shipped() -> None:
    entry = tried("int8", "int8", (11, 9), "unsigned")
    selection.refuse_slow([tried(*FP32), entry], {})
    assert entry.refused is None


def test_what_is_made_for_a_gpu_that_is_not_here_is_left_to_the_boxs_clock() -> None:
    half, symmetric = tried("fp16", "fp16", (12, 12)), tried("int8", "int8", (12, 12), "symmetric")
    selection.refuse_slow([tried(*FP32), half, symmetric], {"tensorrt": "no GPU"})
    assert half.refused is symmetric.refused is None
    selection.refuse_slow([tried(*FP32), half, symmetric], {})
    assert half.refused is not None
    assert symmetric.refused is not None


def test_one_variant_of_a_kind_is_kept() -> None:
    fast, slow = tried("fast", "int8", (4, 4), "unsigned"), tried("slow", "int8", (6, 6), "unsigned")
    near = tried("near", "int8", (4.1, 4.1), "unsigned", change=0.0001)
    other = tried("other", "int8", (9, 2.5), "symmetric")
    entries = [tried(*FP32), fast, slow, near, other]
    selection.keep_fastest(entries)
    assert [entry.name for entry in entries if entry.refused is None] == ["fp32", "near", "other"]
    selection.keep_fastest(entries, one_int8=True)
    assert [entry.name for entry in entries if entry.refused is None] == ["fp32", "near"]


def test_of_equally_fast_ones_that_is_kept_which_old_processors_run_fast_too() -> None:
    """Weights of 8 bits change scores less, but on a processor without VNNI they gain nothing."""
    seven, eight = tried("seven", "int8", (4.1, 4.1), "unsigned"), tried("eight", "int8", (4, 4), "unsigned", change=0.0001)
    eight.fits_16_bits = False
    entries = [tried(*FP32), seven, eight]
    selection.keep_fastest(entries)
    assert [entry.name for entry in entries if entry.refused is None] == ["fp32", "seven"]


def simulated(entry: VariantResult) -> VariantResult:
    """The variant as a workbench without VNNI has it: not timed on OpenVINO, because its verdict there is a simulation's."""
    figures = entry.verdicts[VINO].figures | {"processors": {"exact": "simulated", "saturating": "refused"}}
    entry.verdicts = entry.verdicts | {VINO: replace(entry.verdicts[VINO], figures=figures)}
    del entry.timing[VINO]
    entry.fits_16_bits = False
    return entry


def test_a_simulated_verdict_bars_no_runtime_and_counts_for_no_speed() -> None:
    entry, float_model = simulated(tried("eight", "int8", (8, 8), "unsigned")), tried(*FP32)
    assert (entry.passed, entry.run_here, entry.not_on) == ([ORT, VINO], [ORT], [])
    selection.refuse_failed([entry])
    selection.refuse_slow([float_model, entry], {})
    assert entry.refused is None
    entry.timing[ORT] = timed(11)
    selection.refuse_slow([float_model, entry], {})
    assert entry.refused is not None
    assert entry.refused.code == "speed.slower"


def test_of_calibrations_one_that_ran_on_every_runtime_is_kept() -> None:
    near, ran = simulated(tried("a", "int8", (5, 5), "unsigned", "f", 0.0001)), tried("b", "int8", (5, 5), "unsigned", "f", 0.004)
    selection.keep_best_calibration([near, ran])
    assert near.refused is not None
    assert ran.refused is None


def test_a_variant_that_only_a_simulation_passed_is_left_out() -> None:
    entry = simulated(tried("eight", "int8", (8, 8), "unsigned"))
    entry.verdicts[ORT] = failed_verdict("gate.auc", "AUC 0.5")
    selection.refuse_failed([entry])
    assert entry.refused is not None
    assert entry.refused.code == "gate.auc"


# --- golden cases, texts, steps, progress ---------------------------------------------------------------------------


@given(st.sampled_from(["fp32", "fp16", "int8", "mixed"]), st.lists(st.floats(0, 0.4), max_size=5))
def test_a_tolerance_is_the_floor_or_twice_what_was_measured(precision: Any, measured: list[float]) -> None:
    found = golden_cases.tolerance(precision, measured)
    assert found >= golden_cases.FLOOR[precision]
    assert found >= golden_cases.MARGIN * max(measured, default=0) - 1e-6
    assert found <= max(golden_cases.FLOOR[precision], golden_cases.MARGIN * max(measured, default=0) + 0.011)


def test_averages_hide_every_single_picture(tmp_path: Path) -> None:
    from PIL import Image

    from quantize.reference.build import INPUT

    rows = []
    for i in range(60):
        Image.fromarray(RNG.integers(0, 255, (40, 40), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(Row(tmp_path / f"{i}.png", 0))
    found = golden_cases.average_images(ImageSet(tmp_path, tuple(rows), np.zeros(0, np.float32), (), ""), np.arange(60.0), INPUT)
    assert len(found) == golden_cases.CASES
    for pixels in found.values():
        assert pixels.shape == (224, 224)
        assert pixels.std() < 40  # of one picture it is 64


def test_golden_pictures_that_are_missing_or_broken_are_refused(tmp_path: Path) -> None:
    from quantize.reference.build import INPUT

    with pytest.raises(QuantizeError, match="no picture"):
        golden_cases.read_golden_images(tmp_path, INPUT)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(QuantizeError, match=r"a\.png"):
        golden_cases.read_golden_images(tmp_path, INPUT)


def test_a_finished_step_is_not_done_again_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    calls = []

    def make(directory: Path) -> dict[str, int]:
        calls.append(1)
        (directory / "x").write_text("x")
        return {"n": len(calls)}

    def fail(directory: Path) -> None:
        (directory / "half").write_text("h")
        raise QuantizeError("no", hint="no")

    with WorkDirectory(tmp_path / "w") as work:
        assert work.step("a", [1], make)[1] == work.step("a", [1], make)[1] == {"n": 1}
        assert work.step("a", [2], make)[1] == {"n": 2}
        with pytest.raises(QuantizeError):
            work.step("b", [], fail)
        (tmp_path / "w" / "c-123.part").mkdir()
    with WorkDirectory(tmp_path / "w") as work:
        assert {path.name[0] for path in (tmp_path / "w").iterdir()} == {"a"}
        assert work.step("a", [1], make)[1] == {"n": 1}
        assert work.reused == ["a"]
        work.remove()
    assert not (tmp_path / "w").exists()


def test_two_runs_do_not_share_a_work_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_directory, "_PATIENCE_S", 0.2)
    with WorkDirectory(tmp_path / "w"), pytest.raises(QuantizeError) as caught:
        WorkDirectory(tmp_path / "w")
    assert caught.value.code == "work.busy"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_says_what_goes_on_on_a_terminal_and_in_a_log() -> None:
    for stream in (io.StringIO(), Terminal()):
        progress = Progress({"one": 1, "two": 3}, stream)
        progress.begin("one", "first things")(0.5)
        progress.begin("two", "second things")
        progress.expect({"three": 4})
        progress.begin("unknown", "a surprise")
        progress.end()
        text = stream.getvalue()
        assert "first things" in text
        assert " 25%" in text
        assert "100%" in text
        assert ("\r" in text) is stream.isatty()
