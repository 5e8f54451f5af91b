"""``appliance analyze`` as a person runs it: real files in, JSON and exit codes out."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from appliance.cli import analyze as module
from appliance.cli import main as main_module
from appliance.core import process
from appliance.core.domain import Source
from appliance.ingest.ingest import Ingest
from appliance.lifecycle.model_control import reference_bundle
from appliance.store.store import Store
from quantize.reference import phantom
from quantize.reference.phantom import write_samples
from tests.support.activated import reference_box
from tests.support.paths import ROOT
from tests.support.scans import scan_bytes

STATUSES = {"analysed", "out_of_scope", "quality_rejected", "rejected", "failed"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command with these arguments, in this process; what it changes of the process is undone."""
    out, errors, mask = io.StringIO(), io.StringIO(), os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setattr(main_module, "limit_memory", lambda _: None)
        try:
            code = main_module.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os.umask(mask)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def run_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command with these arguments as a process of its own."""
    return subprocess.run([sys.executable, "-m", "appliance", *map(str, arguments)], capture_output=True, text=True, check=False)


def analyze(*arguments: str | Path, fresh: bool = False) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and JSON of ``appliance analyze --json``, on a copy of a box with the reference model or, when fresh, on none."""
    with tempfile.TemporaryDirectory() as directory:
        box = [] if fresh or "--data-dir" in arguments else ["--data-dir", reference_box(Path(directory) / "box")]
        done = (run_process if fresh else run)("analyze", "--json", *box, *arguments)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's sample scans."""
    directory = tmp_path_factory.mktemp("samples")
    write_samples(directory)
    return directory


def test_the_samples(samples: Path) -> None:
    code, results = analyze(samples, fresh=True)
    assert code == 0
    got = {Path(item["path"]).name: item for item in results}
    assert {name: item["status"] for name, item in got.items()} == {
        "01-normal.dcm": "analysed", "02-opacity.dcm": "analysed", "03-lateral.dcm": "out_of_scope",
        "04-blank.dcm": "quality_rejected", "05-film.png": "analysed",
    }  # fmt: skip
    assert got["03-lateral.dcm"]["reason"]["code"] == "scope.view"
    assert got["04-blank.dcm"]["reason"]["code"].startswith("quality.")
    (finding,) = got["02-opacity.dcm"]["findings"]
    wanted = {"label", "code", "score", "threshold", "positive", "model", "model_version", "model_digest", "precision", "runtime"}
    assert wanted <= set(finding)
    timing = got["02-opacity.dcm"]["timing_ms"]
    assert set(timing) == {"ingest", "decode", "preprocess", "input_check", "infer", "postprocess", "store", "total"}
    assert timing["total"] > 0
    for item in results:
        assert item["study_instance_uid"]
        assert item["series_instance_uid"]
        assert item["sop_instance_uid"]
    assert {note["code"] for note in got["05-film.png"]["notes"]} >= {"assume.view", "caution.age_unknown"}
    assert "caution.age_outside" in {note["code"] for note in got["02-opacity.dcm"]["notes"]}


def test_a_view_said_is_stated(samples: Path) -> None:
    _, results = analyze("--view", "PA", samples / "05-film.png")
    assert "caution.view_from_form" in {note["code"] for note in results[0]["notes"]}
    _, results = analyze("--view", "lateral", samples / "05-film.png")
    assert (results[0]["status"], results[0]["reason"]["code"]) == ("out_of_scope", "scope.view")


def test_archive_folder_and_junk_each_get_one_object(samples: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(samples / "01-normal.dcm", "in/one.dcm")
        archive.writestr("../evil.dcm", b"x")
    (tmp_path / "junk.dcm").write_bytes(b"junk" * 100)
    (tmp_path / "empty.dcm").write_bytes(b"")
    code, results = analyze(tmp_path)
    assert code == 0
    assert [(Path(item["path"].partition("!/")[0]).name, item["status"]) for item in results] == [
        ("a.zip", "analysed"), ("a.zip", "rejected"), ("empty.dcm", "rejected"), ("junk.dcm", "rejected"),
    ]  # fmt: skip
    assert results[1]["reason"]["code"] == "ingest.archive_unsafe"
    assert results[1]["reason"]["zh"]


def test_a_kept_data_dir_answers_again_without_reading_twice(samples: Path, tmp_path: Path) -> None:
    box = reference_box(tmp_path / "box")
    _, first = analyze("--data-dir", box, samples / "01-normal.dcm")
    _, again = analyze("--data-dir", box, samples / "01-normal.dcm")
    assert first[0]["findings"] == again[0]["findings"]
    assert first[0]["timing_ms"] == again[0]["timing_ms"]
    assert run("audit", "verify", "--data-dir", box).stdout.startswith("audit chain whole")
    assert "active" in run("models", "list", "--data-dir", box).stdout
    assert "11" in run("audit", "show", "--data-dir", box).stdout


def test_a_full_disk_is_a_failure_with_its_reason(samples: Path, tmp_path: Path) -> None:
    reference_box(tmp_path / "box")
    (tmp_path / "box" / "box.toml").write_text(f"disk_reserve_bytes = {1 << 60}\n")
    code, results = analyze("--data-dir", tmp_path / "box", samples / "01-normal.dcm")
    assert code == 3
    assert (results[0]["status"], results[0]["reason"]["code"]) == ("failed", "ingest.disk_full")


def test_a_disk_too_full_for_the_first_model_is_said_at_once(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "box.toml").write_text(f"disk_reserve_bytes = {1 << 60}\n")
    done = run("analyze", "--json", "--data-dir", tmp_path / "box", samples / "01-normal.dcm")
    assert done.returncode == 1
    assert "disk has no room" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["analyze"],
        ["analyze", "/nowhere/at/all"],
        ["analyze", "--view", "top", "."],
        ["nonsense"],
        ["serve"],
        ["models", "activate", "--data-dir", "."],
    ],
)
def test_wrong_use_says_how_and_exits_2(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2, done.stderr
    assert "usage:" in done.stderr or "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text("colour = 'red'\n")
    done = run("serve", "--data-dir", tmp_path)
    assert done.returncode == 2
    assert "colour" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "list"], ["models", "history"], ["models", "rollback"], ["tune", "--show"], ["tune"], ["urgent", "1"],
        ["audit", "verify"], ["audit", "show"],
    ],
)  # fmt: skip
def test_what_only_looks_at_a_box_lays_none(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("words")
    done = run(*arguments, "--data-dir", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "There is no box in this folder" in done.stderr
    assert str(tmp_path) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_data_directory_that_is_not_there_is_not_called_a_setting(tmp_path: Path) -> None:
    done = run("models", "list", "--data-dir", tmp_path / "no")
    assert (done.returncode, "no such folder" in done.stderr, "settings are invalid" in done.stderr) == (2, True, False)


def test_a_box_that_cannot_be_opened_asks_nobody_to_send_again(tmp_path: Path) -> None:
    (tmp_path / "box.sqlite3").write_bytes(b"no database, whatever its name says" * 99)
    done = run("audit", "verify", "--data-dir", tmp_path)
    assert (done.returncode, "hint:" in done.stderr, "end again" in done.stderr) == (1, True, False), done.stderr


def test_every_command_explains_itself() -> None:
    text = run("--help").stdout
    for name in ("analyze", "serve", "worker", "receive", "models", "user", "audit", "settings", "demo"):
        assert name in text
        assert run(name, "--help").returncode == 0


def test_people_read_a_table(samples: Path, tmp_path: Path) -> None:
    done = run("analyze", samples / "02-opacity.dcm", "--data-dir", reference_box(tmp_path / "box"))
    assert done.returncode == 0
    assert "threshold" in done.stdout
    assert "不得单独作为诊断依据" in done.stdout


def test_names_in_gbk_are_read_and_shown(samples: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    with open(folder + b"/\xd5\xc5.dcm", "wb") as file:
        file.write((samples / "01-normal.dcm").read_bytes())
    code, results = analyze(tmp_path)
    assert (code, results[0]["status"], Path(results[0]["path"]).name) == (0, "analysed", "张.dcm")


def test_a_damaged_model_is_a_failure_not_a_wait_for_ever(samples: Path, tmp_path: Path) -> None:
    box = reference_box(tmp_path / "box")
    weights = next((box / "models").rglob("*.onnx"))
    weights.write_bytes(b"junk")
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "analyze", "--json", "--data-dir", str(box), str(samples / "02-opacity.dcm")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    (result,) = json.loads(done.stdout)
    assert (done.returncode, result["status"]) == (3, "failed")
    assert result["reason"]["code"]
    assert "Traceback" not in done.stderr


def test_only_its_own_images_are_waited_for(store: Store, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Ingest(store).accept(scan_bytes(), Source("cli", "test")).stored
    other = Ingest(store).accept(scan_bytes(), Source("dicom", "OTHER")).stored
    store.database.connection().execute("UPDATE instances SET state = 'ai_ready' WHERE id = ?", (mine.instance_id,))
    monkeypatch.setattr(module.subprocess, "Popen", None)  # whoever starts a worker for the other's sake fails
    module._wait_for_results(store, [mine.instance_id], print, store.settings.data_dir)
    assert module.ResultTracker(store, [mine.instance_id], print).count_pending() == 0
    assert module.ResultTracker(store, [mine.instance_id, other.instance_id], print).count_pending() == 1


def test_a_worker_that_falls_without_doing_anything_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Ingest(store).accept(scan_bytes(), Source("cli", "test")).stored
    lives: list[int] = []

    def fall(*_: object) -> int:
        lives.append(1)
        return 1

    monkeypatch.setattr(module, "_run_worker", fall)
    said: list[str] = []
    module._wait_for_results(store, [stored.instance_id], said.append, store.settings.data_dir)
    assert len(lives) == 3
    assert "1 scans were not analysed" in said[-1]


def test_a_data_directory_that_cannot_be_is_said(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words")
    for where in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        for more in (["analyze", samples], ["demo", "--once", "--samples", samples]):
            done = run(*more, "--data-dir", where)
            assert (done.returncode, "hint:" in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_a_data_directory_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        process.make_data_dir(tmp_path)


def test_a_data_directory_is_for_its_account_alone(samples: Path, tmp_path: Path) -> None:
    run_process("analyze", samples / "01-normal.dcm", "--data-dir", tmp_path / "box")
    assert [path for path in (tmp_path / "box", *(tmp_path / "box").iterdir()) if path.stat().st_mode & 0o077] == []


def test_an_unknown_log_level_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "settings", "--data-dir", str(tmp_path)],
        capture_output=True, text=True, check=False, env=os.environ | {"APPLIANCE_LOG_LEVEL": "foo"},
    )  # fmt: skip
    assert (done.returncode, "foo" in done.stderr, "INFO" in done.stderr) == (0, True, True)


def test_nothing_analysed_can_be_a_failure(tmp_path: Path) -> None:
    box = reference_box(tmp_path / "box")
    (tmp_path / "words.txt").write_text("x")
    assert run("analyze", tmp_path / "words.txt", "--data-dir", box).returncode == 0
    assert run("analyze", "--require-analysed", tmp_path / "words.txt", "--data-dir", box).returncode == 4


def test_a_folder_without_a_file_is_said(tmp_path: Path) -> None:
    box, folder = reference_box(tmp_path / "box"), tmp_path / "empty"
    folder.mkdir()
    done = run("analyze", folder, "--data-dir", box)
    assert (done.returncode, done.stdout) == (4, "")
    assert f"no file was found in {folder}" in done.stderr
    assert analyze(folder) == (4, [])


def test_a_demo_of_a_folder_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    done = run("demo", "--data-dir", tmp_path / "box", "--samples", tmp_path, "--data", tmp_path / "no")
    assert (done.returncode, "no such file or folder" in done.stderr, list(tmp_path.iterdir())) == (2, True, [])


def test_60_files_at_once(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:03}.dcm").write_bytes(scan_bytes(Rows=256, Columns=256, PixelData=_noisy_chest(number)))
    code, results = analyze(tmp_path)
    assert code == 0
    assert [item["status"] for item in results] == ["analysed"] * 60
    assert len({item["sop_instance_uid"] for item in results}) == 60


def _noisy_chest(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 100, (256, 256))
    return (_chest().astype(np.uint16) * 15 + noise).astype("<u2").tobytes()


@cache
def _chest() -> NDArray[np.uint8]:
    return phantom.display(phantom.Phantom(256, 256))


def table(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows."""
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def test_every_real_dicom_file_gets_what_it_deserves(shared: Path) -> None:
    rows = table(shared / "data" / "dicom_manifest.csv")
    assert (sum(row["expectation"] == "ok" for row in rows), sum(row["expectation"] == "reject" for row in rows)) == (45, 20)
    code, results = analyze(shared / "data" / "dicom")
    assert code == 0
    got = {Path(item["path"]).name: item for item in results}
    wrong = []
    for row in rows:
        item = got[Path(row["file"]).name]
        accepted = item["status"] in ("analysed", "out_of_scope", "quality_rejected")
        if accepted != (row["expectation"] == "ok") or (not accepted and not item["reason"]["code"]):
            wrong.append((row["file"], row["expectation"], item["status"], item["reason"]))
    assert not wrong
    shared_uid = {name for name, item in got.items() if "ingest.conflict" in {note["code"] for note in item["notes"]}}
    assert {"OT_SC_rgb_rle.dcm", "OT_SC_rgb_expb_32bit_2frame.dcm"} <= shared_uid
    chests = [name for name, item in got.items() if item["status"] == "analysed"]
    assert sorted(name[:6] for name in chests) == ["CR_1.2", "CR_RG1", "CR_gdc"]


def auc(positive: list[float], negative: list[float]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative."""
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return sum(wins) / len(wins)


def test_auc_is_the_plain_models(shared: Path, tmp_path: Path) -> None:
    """Through the box against the ONNX file with its card's preprocessing, per source that has both classes."""
    import onnxruntime

    from quantize.reference.localisation_head import compose

    rows = [row for row in table(shared / "data" / "cxr_labels.csv") if row["view"].split()[0] in ("PA", "AP")]
    model = compose(shared / "models" / "cxr_pneumonia" / "cxr_pneumonia_fp32.onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    code, results = analyze(*(shared / "data" / row["file"] for row in rows))
    assert code == 0
    stopped = {Path(item["path"]).name for item in results if item["status"] == "quality_rejected"}
    assert len(stopped) <= len(rows) // 100  # by the input check
    rows = [row for row in rows if Path(row["file"]).name not in stopped]
    box = {Path(item["path"]).name: item["findings"][0]["score"] for item in results if item["findings"]}
    plain = {}
    for row in rows:
        picture = Image.open(shared / "data" / row["file"]).convert("L")
        side = max(picture.size)
        square = Image.new("L", (side, side))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        tensor = np.asarray(square.resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float32)[None, None] / 255
        plain[Path(row["file"]).name] = float(session.run(["probability"], {"image": tensor})[0][0, 0])
    compared = 0
    for source in sorted({row["source"] for row in rows}):
        mine = [row for row in rows if row["source"] == source]
        split = {label: [Path(row["file"]).name for row in mine if row["pneumonia"] == label] for label in "01"}
        if split["0"] and split["1"]:
            through_box, alone = (auc([score[n] for n in split["1"]], [score[n] for n in split["0"]]) for score in (box, plain))
            print(f"{source[:40]}: through the box {through_box:.4f}, plain {alone:.4f}")
            assert through_box == pytest.approx(alone, abs=0.005)
            compared += 1
    assert compared >= 2


def test_the_embedded_bundle_is_small_enough() -> None:
    assert sum(path.stat().st_size for path in reference_bundle().rglob("*") if path.is_file()) <= 26_000_000
