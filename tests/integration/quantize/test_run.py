"""``quantize run`` for real: models are made, run by every runtime here, gated, timed, and the bundle is read as a box reads it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.runtime.availability import available
from model_sync.bundle import GateRecord, ModelBundle
from quantize import cli, standalone
from quantize.errors import QuantizeError
from quantize.gate import image_sets, mixed_precision, predictions
from quantize.gate.predictions import REFERENCE
from quantize.gate.selection import VariantResult
from quantize.gate.verdicts import Limits, Verdict
from quantize.pipeline import BundleRecipe, RunResult, run
from quantize.recipes import modelopt
from quantize.recipes.variant_makers import Maker, Source
from quantize.report import html_report
from tests.support import quantize_site
from tests.support.input_check_bundle import RECORD, write_network
from tests.support.quantize_site import FP16, INT8, recipe, write_set, write_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def made(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    out = tmp_path_factory.mktemp("made") / "bundle"
    return run(recipe(site, out, FP16, INT8)), out


@pytest.fixture
def only_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other runtimes are left out: each costs a process per variant and step, and ``made`` has shown them."""
    monkeypatch.setattr(predictions, "runtime_targets", quantize_site.only_onnxruntime)


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory: its name there and its bytes."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- the bundle -----------------------------------------------------------------------------------------------------


def test_a_bundle_is_made_and_is_one_for_the_box(made: tuple[RunResult, Path]) -> None:
    bundle = ModelBundle.load(made[1])
    manifest = bundle.manifest
    assert {"fp32", "fp16"} <= {variant.precision for variant in manifest.variants}
    assert manifest.explain is not None  # the map was added to the graph
    assert manifest.operating_point("spot").sensitivity.value >= 0.9
    assert len(list(bundle.golden_cases())) == 6
    assert sum(manifest.reference_scores[0].counts) == 150
    assert {path.name for path in made[1].parent.iterdir()} == {"bundle"}  # nothing half made is left


@pytest.mark.usefixtures("only_onnxruntime")
def test_a_second_run_writes_the_same_bytes_and_an_absent_nvidia_modelopt_is_only_named_in_the_report(site: Path, tmp_path: Path) -> None:
    first = run(recipe(site, tmp_path / "first", FP16))
    second = run(recipe(site, tmp_path / "second", FP16, optimizer="not installed"))
    assert first.manifest == second.manifest
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    assert [entry.name for entry in second.variants] == ["fp32", "fp16"]
    assert "nvidia-modelopt was not tried: not installed" in html_report.render(second.record)
    assert not any(b"modelopt" in raw for raw in files_of(tmp_path / "second").values())


def test_every_variant_was_tried_on_every_runtime_here(made: tuple[RunResult, Path]) -> None:
    here = {entry.runtime for entry in available() if entry.providers}
    absent = {entry.runtime for entry in available() if not entry.providers}
    gate = json.loads((made[1] / "gate.json").read_text(encoding="utf-8"))
    for entry in made[0].variants:
        assert {place.runtime for place in entry.verdicts} == here
    for variant in ModelBundle.load(made[1]).manifest.variants:
        assert gate["variants"][variant.precision]["passed"]
        runtimes = gate["variants"][variant.precision]["files"][variant.file]["runtimes"]
        assert sum(found["passed"] for found in runtimes.values()) + len(variant.not_on) == len(here)
    assert set(gate["not_measured_here"]["runtimes"]) == absent


def test_what_was_left_out_is_named_with_its_reason(made: tuple[RunResult, Path]) -> None:
    gate = json.loads((made[1] / "gate.json").read_text(encoding="utf-8"))
    refused = {entry.name: entry.refused for entry in made[0].variants if entry.refused is not None}
    assert {entry["name"]: entry["code"] for entry in gate["refused"]} == {name: reason.code for name, reason in refused.items()}


def test_the_gate_names_what_was_measured(made: tuple[RunResult, Path], site: Path, tmp_path: Path) -> None:
    bundle = ModelBundle.load(made[1])
    record = GateRecord.model_validate_json(bundle.path("gate.json").read_bytes())
    for variant in bundle.manifest.variants:
        assert record.variants[variant.precision].files[variant.file].sha256 == variant.sha256
    assert record.operating_points == bundle.manifest.operating_points
    assert record.input == bundle.manifest.input
    images = image_sets.read_evaluation(
        site / "evaluation", bundle.manifest.image_input, bundle.manifest.applies_to.modality, ["spot"], tmp_path
    )
    assert record.evaluation.sha256 == image_sets.evaluation_digest(images, ["spot"])
    assert record.evaluation.n_images == len(images)
    assert bundle.gate_problem() is None
    patients = {row.patient for row in images.rows} - {""}
    text = bundle.path("gate.json").read_text("utf-8")
    assert not any(patient in text for patient in patients)


def test_the_golden_cases_of_a_bundle_are_run_as_a_command(
    made: tuple[RunResult, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["golden", "--bundle", str(made[1]), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    manifest = made[0].manifest
    assert results["digest"] == ModelBundle.load(made[1]).digest
    assert results["variants"].keys() == {variant.file for variant in manifest.variants}
    for result in results["variants"].values():
        assert result["error"] is None
        assert [case["passed"] for case in result["cases"]] == [True] * len(manifest.golden)
    wrong = Path(shutil.copytree(made[1], tmp_path / "wrong"))
    document = json.loads((wrong / "manifest.json").read_text("utf-8"))
    for case in document["golden"]:
        case["expected"]["spot"] = 1 - case["expected"]["spot"]
    (wrong / "manifest.json").write_text(json.dumps(document), "utf-8")
    assert cli.main(["golden", "--bundle", str(wrong)]) == 3
    assert "FAILED" in capsys.readouterr().out


def test_no_picture_of_a_patient_is_in_the_bundle(made: tuple[RunResult, Path], site: Path) -> None:
    from PIL import Image

    pictures = {np.asarray(Image.open(path)).tobytes() for path in (site / "evaluation").glob("*.png")}
    for case in ModelBundle.load(made[1]).golden_cases():
        assert case.pixels.tobytes() not in pictures


# --- the input check ------------------------------------------------------------------------------------------------


def with_input_check(site: Path, directory: Path, record: object = RECORD, **network: Any) -> BundleRecipe:
    """The recipe of ``site`` with an input check beside its draft."""
    draft = directory / "draft.toml"
    directory.mkdir()
    changed = (site / "draft.toml").read_text("utf-8").replace('min_appliance_version = "0.1.0"', 'min_appliance_version = "0.2.0"')
    draft.write_text(changed + '\n[input_check]\nnetwork = "check.onnx"\nrecord = "check.json"\n', "utf-8")
    write_network(directory / "check.onnx", **network)
    (directory / "check.json").write_text(json.dumps(record), "utf-8")
    return replace(recipe(site, directory / "bundle", FP16), draft=draft)


@pytest.mark.usefixtures("only_onnxruntime")
def test_the_input_check_goes_into_the_bundle(site: Path, tmp_path: Path) -> None:
    manifest = run(with_input_check(site, tmp_path / "made", upright=1e6)).manifest
    assert manifest.schema_ == 2
    assert manifest.input_check is not None
    assert (tmp_path / "made" / "bundle" / manifest.input_check.file).read_bytes() == (tmp_path / "made" / "check.onnx").read_bytes()
    ModelBundle.load(tmp_path / "made" / "bundle")


@pytest.mark.usefixtures("only_onnxruntime")
def test_an_input_check_that_stops_golden_cases_is_refused(site: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="the input check stops the golden cases"):
        run(with_input_check(site, tmp_path / "made", upright=-1e6))
    assert not (tmp_path / "made" / "bundle").exists()


@pytest.mark.parametrize("record", [{}, [], RECORD | {"classes": ["other", "negative"]}, RECORD | {"file": 3, "more": 1}])
def test_a_record_of_the_input_check_that_is_not_valid_is_refused_at_once(site: Path, tmp_path: Path, record: object) -> None:
    with pytest.raises(QuantizeError, match="input_check") as caught:
        run(with_input_check(site, tmp_path / "made", record))
    assert caught.value.code == "draft.invalid"


def test_a_missing_network_of_the_input_check_is_refused_at_once(site: Path, tmp_path: Path) -> None:
    asked = with_input_check(site, tmp_path / "made")
    asked.draft.with_name("check.onnx").unlink()
    with pytest.raises(QuantizeError, match=r"check\.onnx cannot be read"):
        run(asked)


# --- a slow int8 and a wrong fp16 -----------------------------------------------------------------------------------


def _slow_int8() -> Maker:
    """The real int8 model with two wide convolutions beside it whose result counts for nothing."""

    def make(source: Source, out: Path, fractions: Any) -> None:
        INT8.make(source, out, fractions)
        model = onnx.load(out)
        rng = np.random.default_rng(0)
        shapes = {"slow_w1": (96, 1, 7, 7), "slow_w2": (96, 96, 7, 7)}
        model.graph.initializer.extend(numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items())
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1e-12), "slow_nothing"))
        last = model.graph.node[-1]
        for node in model.graph.node:
            if "probability" in node.output:
                last = node
        last.output[0] = "quick"
        model.graph.node.extend(
            [
                helper.make_node("Conv", ["image", "slow_w1"], ["slow1"], "slow1", pads=[3, 3, 3, 3]),
                helper.make_node("Conv", ["slow1", "slow_w2"], ["slow2"], "slow2", pads=[3, 3, 3, 3]),
                helper.make_node("ReduceMean", ["slow2"], ["slow3"], "slow3", axes=[1, 2, 3], keepdims=0),
                helper.make_node("Unsqueeze", ["slow3", "slow_axis"], ["slow4"], "slow4"),
                helper.make_node("Mul", ["slow4", "slow_nothing"], ["slow5"], "slow5"),
                helper.make_node("Add", ["quick", "slow5"], ["probability"], "slow6"),
            ]
        )
        model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "slow_axis"))
        onnx.checker.check_model(model)
        onnx.save(model, out)

    return Maker("int8-slow", "int8", "unsigned", "slow on purpose", make)


def _wrong_fp16() -> Maker:
    """The real fp16 model with the weights of its linear layer bent."""

    def make(source: Source, out: Path, fractions: Any) -> None:
        FP16.make(source, out, fractions)
        model = onnx.load(out)
        linear = next(node for node in model.graph.node if node.op_type == "Gemm")
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == linear.input[1])
        assert weight.data_type == TensorProto.FLOAT16
        bent = numpy_helper.to_array(weight) * np.linspace(1.6, 0.2, weight.dims[1]).astype(np.float16)
        weight.CopyFrom(numpy_helper.from_array(bent, weight.name))
        onnx.save(model, out)

    return Maker("fp16-wrong", "fp16", None, "wrong on purpose", make)


@pytest.mark.usefixtures("only_onnxruntime")
def test_a_slow_int8_and_a_wrong_fp16_are_both_left_out_for_the_right_reason(site: Path, tmp_path: Path) -> None:
    made = run(recipe(site, tmp_path / "bundle", _wrong_fp16(), _slow_int8(), limits=Limits()))
    wrong, slow = (next(entry for entry in made.variants if entry.name == name) for name in ("fp16-wrong", "int8-slow"))
    assert wrong.refused is not None
    assert wrong.refused.code in ("gate.auc", "gate.sensitivity", "gate.specificity", "gate.score")
    assert not wrong.timing  # what is wrong is not even timed
    assert slow.passed, "the slow one is right"
    assert slow.refused is not None
    assert slow.refused.code == "speed.slower"
    assert "the more exact fp32" in slow.refused.detail
    assert [variant.precision for variant in made.manifest.variants] == ["fp32"]
    page = html_report.render(made.record)
    for words in ("int8-slow", "no faster than a more exact variant", "不比更精确的变体快", "fp16-wrong"):
        assert words in page


@pytest.mark.usefixtures("only_onnxruntime")
def test_the_operating_point_is_measured_on_each_population(site: Path, tmp_path: Path) -> None:
    """Two thirds of the pictures come from the town, the others from the village."""
    draft = (site / "draft.toml").read_text("utf-8").replace('"0.1.0"', '"0.2.0"')
    for source, population, ages in (("vill", "child", (1, 5)), ("town", "adult", (18, 120))):
        draft += f'[[populations]]\nsources = ["{source}"]\npopulation = "{population}"\nmin_years = {ages[0]}.0\nmax_years = {ages[1]}.0\n'
    (tmp_path / "draft.toml").write_text(draft, "utf-8")
    manifest = run(replace(recipe(site, tmp_path / "bundle", FP16), draft=tmp_path / "draft.toml")).manifest
    assert ModelBundle.load(tmp_path / "bundle", "0.2.0").manifest == manifest
    assert (manifest.schema_, manifest.min_appliance_version) == (2, "0.2.0")
    point = manifest.operating_points[0]
    for group, source in zip(point.groups, sorted(point.per_source, key=lambda item: item.source != "village"), strict=True):
        assert group.sources == [source.source]
        assert (group.n_positive, group.n_negative) == (source.n_positive, source.n_negative)
        assert (group.sensitivity, group.specificity) == (source.sensitivity, source.specificity)
    assert sum(group.n_positive for group in point.groups) == 75
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text("utf-8")
    assert "儿童 children 1–5" in card
    assert "成人 adults 18–120" in card


@pytest.mark.usefixtures("only_onnxruntime")
def test_a_variant_that_dies_in_a_compiler_is_left_out_with_the_reason(site: Path, tmp_path: Path) -> None:
    def make(source: Source, out: Path, _: Any) -> None:
        out.write_bytes(b"no model")

    made = run(recipe(site, tmp_path / "bundle", Maker("int8-broken", "int8", "unsigned", "broken", make)))
    broken = made.variants[-1]
    assert broken.refused is not None
    assert broken.refused.code in ("job.error", "runtime.crashed", "runtime.build")
    assert [variant.precision for variant in made.manifest.variants] == ["fp32"]


@pytest.mark.usefixtures("only_onnxruntime")
def test_where_no_int8_passes_layers_go_back_to_float(site: Path, tmp_path: Path) -> None:
    strict = Limits(score=0.0005)
    made = run(recipe(site, tmp_path / "bundle", INT8, limits=strict))
    int8 = next(entry for entry in made.variants if entry.precision == "int8")
    assert int8.refused is not None
    assert int8.refused.code.startswith("gate.")
    assert int8.layers
    assert any(entry.precision == "mixed" for entry in made.variants)


@pytest.mark.usefixtures("only_onnxruntime")
def test_an_nvidia_modelopt_that_dies_is_a_row_with_its_reason(site: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ImportError: no torch here >&2\nexit 1\n")
    python.chmod(0o755)
    makers = modelopt.makers(modelopt.Optimizer(python, "0.47.0"))
    made = run(recipe(site, tmp_path / "bundle", INT8, *makers))
    for entry in made.variants[-2:]:
        assert entry.refused is not None
        assert entry.refused.code == "make.failed"
        assert entry.refused.detail.endswith("ended with exit code 1: ImportError: no torch here")
    page = html_report.render(made.record)
    assert "int8-modelopt-entropy" in page
    assert "ImportError: no torch here" in page
    assert "fp32" in {variant.precision for variant in ModelBundle.load(tmp_path / "bundle").manifest.variants}


def test_layers_are_put_back_in_what_has_a_recipe(site: Path, tmp_path: Path) -> None:
    """nvidia-modelopt's own choice of nodes is no recipe of ours: the nearest of ours is gone on with."""
    theirs = next(iter(modelopt.makers(modelopt.Optimizer(Path("python"), "0.47.0"))))
    figures = {"labels": {"spot": {"mean_abs_delta": 0.1}}}
    far, near = (
        VariantResult(name, "int8", "symmetric", None, "", verdicts={REFERENCE: Verdict(False, (), figures)})
        for name in ("int8-symmetric-minmax", theirs.name)
    )
    assert mixed_precision.find_nearest([near, far]) == [far]
    assert mixed_precision.find_nearest([near]) == []


def test_nvidia_modelopt_itself_goes_the_way_of_every_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_site, "CHANNELS", 16)  # it leaves convolutions with fewer in float
    given = os.environ.get("MODELOPT_PYTHON")
    found = modelopt.find_optimizer(Path(given) if given else None)
    if isinstance(found, str):
        pytest.skip(f"nvidia-modelopt: {found} (the extra [modelopt]; MODELOPT_PYTHON names the Python of another environment)")
    made = run(recipe(write_site(tmp_path / "site"), tmp_path / "bundle", *modelopt.makers(found)))
    for entry in made.variants[1:3]:
        assert entry.activations == "symmetric"
        assert f"nvidia-modelopt {found.version}" in entry.recipe
        assert {place.runtime for place in entry.verdicts} == {entry.runtime for entry in available() if entry.providers}
        assert set(entry.passed) == set(entry.verdicts), entry.verdicts
    assert {entry.refused.code for entry in made.variants[1:3] if entry.refused} >= {"calibration.other_better"}


# --- interruption ---------------------------------------------------------------------------------------------------

_RUN = """
import sys
from pathlib import Path
from tests.support.quantize_site import FP16, INT8, run_with_only_onnxruntime
run_with_only_onnxruntime(Path(sys.argv[1]), Path(sys.argv[2]), FP16, INT8)
"""


@pytest.mark.usefixtures("only_onnxruntime")
def test_a_killed_run_leaves_no_half_bundle_and_goes_on_where_it_was(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    arguments = [sys.executable, "-c", _RUN, str(site), str(out)]
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(arguments, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    work = tmp_path / "bundle.work"
    limit = time.monotonic() + 200
    while not list(work.glob("gate-fp16-*[0-9a-f]")) and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in work.iterdir() if (path / "step.json").is_file()}
    assert any(name.startswith("gate-fp16") for name in finished)
    made = run(recipe(site, out, FP16, INT8, keep_work=True))
    for name, when in finished.items():
        assert (work / name).stat().st_mtime_ns == when, f"{name} was done again"
    assert ModelBundle.load(out).manifest == made.manifest


def test_a_bundle_that_is_there_is_not_overwritten_unasked(site: Path, made: tuple[RunResult, Path]) -> None:
    with pytest.raises(QuantizeError, match="--replace"):
        run(recipe(site, made[1]))


def test_wrong_input_leaves_nothing(site: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    given = recipe(site, tmp_path / "bundle")
    with pytest.raises(QuantizeError):
        run(BundleRecipe(given.model, given.draft, tmp_path / "empty", given.evaluation, given.out))
    assert not list(tmp_path.glob("bundle.new*"))
    assert not (tmp_path / "bundle").exists()


# --- the commands ---------------------------------------------------------------------------------------------------


def test_the_report_asks_nothing_of_anybody(made: tuple[RunResult, Path], tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(made[0].record), encoding="utf-8")
    page = tmp_path / "report.html"
    assert cli.main(["report", "--record", str(record), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text)
    assert not re.search(r"url\((?!#)", text)
    assert "<script" not in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    for words in ("量化报告", "Quantization report", "ROC", "town", "village"):
        assert words in text


def test_a_record_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{}", "no json"):
        (tmp_path / "r.json").write_text(content)
        assert cli.main(["report", "--record", str(tmp_path / "r.json"), "--out", str(tmp_path / "x.html")]) == 1
        assert "hint: " in capsys.readouterr().err


def test_a_wrong_kind_of_file_is_not_called_unreadable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# words")
    assert cli.main(["report", "--record", str(tmp_path / "README.md"), "--out", str(tmp_path / "x.html")]) == 1
    assert "is no record of a run" in capsys.readouterr().err
    assert cli.main(["report", "--record", str(tmp_path / "none"), "--out", str(tmp_path / "x.html")]) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_what_a_run_needs_is_asked_for_before_any_work(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--calibration", str(site / "calibration"), "--evaluation", str(site / "evaluation")]
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    line = ["run", "--model", str(site / "float.onnx"), "--manifest", str(site / "draft.toml"), *sets, "--out", str(tmp_path / "b")]
    assert cli.main(line) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: matplotlib is not installed: the report could not be drawn", "hint: pip install -e '.[quantize]'",
    ]  # fmt: skip
    assert cli.main(["build-reference", "--shared", str(tmp_path), "--out", str(tmp_path / "b")]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_is_said_before_anything_is_begun(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(tmp_path / "x"), "--manifest", str(site / "draft.toml"), "--calibration", str(site / "calibration")]
    assert cli.main(["calibrate", *given, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: there is no model at")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["draw-phantoms", "/proc/nowhere"]) == 1
    said = capsys.readouterr().err
    assert "/proc/nowhere" in said
    assert "hint: " in said


@pytest.mark.usefixtures("only_onnxruntime")
def test_gate_on_its_own(made: tuple[RunResult, Path], site: Path, tmp_path: Path) -> None:
    out = tmp_path / "gate.json"
    arguments = ["gate", "--bundle", str(made[1]), "--evaluation", str(site / "evaluation"), "--out", str(out)]
    assert cli.main([*arguments, "--score", "1"]) == 0
    assert cli.main([*arguments, "--score", "1e-9"]) == cli.GATE_FAILED
    found = json.loads(out.read_text(encoding="utf-8"))["variants"]
    assert set(found) == {variant.file for variant in made[0].manifest.variants}


@pytest.mark.usefixtures("only_onnxruntime")
def test_bench_on_its_own(made: tuple[RunResult, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--bundle", str(made[1]), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == sorted(rows, key=lambda row: row["median_ms"])
    assert {row["file"] for row in rows} == {variant.file for variant in made[0].manifest.variants}


def test_calibrate_on_its_own(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(site / "float.onnx"), "--manifest", str(site / "draft.toml"), "--calibration", str(site / "calibration")]
    makers = (FP16, INT8)
    monkeypatch.setattr(standalone, "all_makers", lambda: makers)
    assert cli.main(["calibrate", *given, "--out", str(tmp_path / "out"), "--no-modelopt"]) == 0
    said = capsys.readouterr().out
    assert "nvidia-modelopt was not tried: left out by --no-modelopt" in said
    candidates = files_of(tmp_path / "out")
    assert len(candidates) + said.count("not made") == len(makers)
    assert cli.main(["calibrate", *given, "--out", str(tmp_path / "again")]) == 0
    assert files_of(tmp_path / "again") == candidates


def test_a_patient_in_both_sets_stops_the_run(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = write_set(tmp_path / "calibration", 40, seed=2)
    given = ["--model", str(site / "float.onnx"), "--manifest", str(site / "draft.toml"), "--evaluation", str(site / "evaluation")]
    assert cli.main(["run", *given, "--calibration", str(calibration), "--out", str(tmp_path / "b")]) == 1
    assert "in both sets" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_wrong_use_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["fly"], ["run"], ["gate", "--bundle"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: quantize" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "-h"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "labels.csv" in said
    assert "Exit codes" in said
