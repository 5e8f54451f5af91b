"""Every sub-command of `quantize` reports a wrong use in the language of the terminal: what happened, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model_sync import messages
from model_sync.messages import Language
from quantize import cli
from quantize.messages import Code

MODEL = ("--model", "model.onnx", "--manifest", "absent.toml", "--calibration", "empty", "--no-modelopt")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "run": ((*MODEL, "--evaluation", "empty", "--out", "here"), Code.OUT_EXISTS),
    "calibrate": ((*MODEL, "--out", "out"), Code.DRAFT_MISSING),
    "gate": (("--bundle", "empty", "--evaluation", "empty"), "bundle.no_manifest"),
    "golden": (("--bundle", "empty"), "bundle.no_manifest"),
    "report": (("--record", "absent.json", "--out", "page.html"), Code.REPORT_RECORD),
    "bench": (("--bundle", "empty"), "bundle.no_manifest"),
    "build-reference": (("--shared", "empty", "--out", "out", "--only", "fp16"), Code.FAILED),
    "draw-phantoms": (("model.onnx/samples",), Code.DISK),
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").touch()
    for name in ("empty", "here"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(
    ("locale", "language", "error", "hint"), [("C", "en", "error: ", "hint: "), ("zh_CN.UTF-8", "zh", "错误：", "提示：")]
)
@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_use_is_reported_in_both_languages(
    command: str,
    locale: str,
    language: Language,
    error: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, code = WRONG[command]
    monkeypatch.setenv("LC_ALL", locale)
    assert cli.main([command, *arguments]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(error)
    assert second.startswith(hint)
    if language == "zh":
        assert first.removeprefix(error).startswith(messages.text(code, "zh"))
        assert second == hint + messages.hint(code, "zh")
    else:
        assert not re.search(r"[一-鿿]", first + second)
    assert code == Code.DISK or language == "en" or f"[{code}]" in first


def test_no_sub_command_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert set(re.findall(r"^    ([a-z-]+)\s", capsys.readouterr().out, re.MULTILINE)) - {"-h"} == set(WRONG)
