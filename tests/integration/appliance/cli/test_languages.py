"""Every command of the box reports a wrong use in the language of the user, with what to do."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from appliance.cli import main as module
from appliance.core.settings import Settings
from appliance.store.store import Store

CHINESE = re.compile(r"[\u4e00-\u9fff]")
SELF_TEST = ["--origin", "{tmp}/none", "--digest", "0", "--memory-bytes", "1", "--parent", "1"]
# A wrong use of each command; ``{tmp}`` holds an empty folder ``empty`` and a box ``box``.
WRONG_USES: dict[str, list[str]] = {
    "analyze": ["{tmp}/none.dcm"],
    "serve": ["--data-dir", "{tmp}/none"],
    "worker": ["--data-dir", "{tmp}/none"],
    "receive": ["--data-dir", "{tmp}/none"],
    "studies": ["--data-dir", "{tmp}/empty"],
    "models": ["activate", "--data-dir", "{tmp}/box"],
    "self-test": [*SELF_TEST, "--data-dir", "{tmp}/box"],
    "prove": [*SELF_TEST, "--data-dir", "{tmp}/box"],
    "tune": ["no-such-line", "--data-dir", "{tmp}/box"],
    "urgent": ["no-such-study", "--data-dir", "{tmp}/box"],
    "user": ["wang", "--data-dir", "{tmp}/none"],
    "audit": ["verify", "--data-dir", "{tmp}/empty"],
    "send-audit": ["--data-dir", "{tmp}/box"],
    "keys": ["check", "--data-dir", "{tmp}/empty"],
    "wipe": ["--data-dir", "{tmp}/box"],
    "tls": ["status", "--data-dir", "{tmp}/none"],
    "settings": ["--data-dir", "{tmp}/none"],
    "demo": ["--samples", "{tmp}/none", "--data-dir", "{tmp}/empty"],
}
MORE: list[list[str]] = [
    ["models", "list", "9", "--data-dir", "{tmp}/box"],
    ["models", "rollback", "--again", "--data-dir", "{tmp}/box"],
    ["models", "rollback", "--precision", "int8", "--data-dir", "{tmp}/box"],
    ["models", "rollback", "--data-dir", "{tmp}/box"],
    ["models", "activate", "9.9.9", "--data-dir", "{tmp}/box"],
    ["audit", "acknowledge", "--data-dir", "{tmp}/box"],
    *(["audit", action, "--xml", "--data-dir", "{tmp}/box"] for action in ("verify", "show", "status")),
    *(["audit", action, "--xml", "--reason", "x", "--data-dir", "{tmp}/box"] for action in ("acknowledge", "new-key")),
    *(["audit", action, "--reason", "x", "--data-dir", "{tmp}/box"] for action in ("verify", "show", "export", "status")),
    ["keys", "forget-second-factors", "--reason", "x", "--data-dir", "{tmp}/box"],
    ["audit", "new-key", "--reason", "x", "--data-dir", "{tmp}/box"],
    ["models", "history", "--data-dir", "{tmp}/empty"],
    ["analyze", "{tmp}/empty", "--data-dir", "{tmp}/none.toml/none"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty folder, a file and a box without a model."""
    path = tmp_path_factory.mktemp("wrong")
    (path / "empty").mkdir()
    (path / "none.toml").write_text("")
    Store(Settings(data_dir=path / "box")).close()
    return path


def test_every_command_has_its_wrong_use() -> None:
    (commands,) = (action for action in module._parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert WRONG_USES.keys() == commands.choices.keys()


@pytest.mark.parametrize("arguments", [*([name, *rest] for name, rest in WRONG_USES.items()), *MORE], ids=" ".join)
def test_a_wrong_use_is_explained_in_both_languages(
    folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = set()
    for language, error, hint in (("C", "error: ", "hint: "), ("zh_CN.UTF-8", "错误：", "提示：")):
        monkeypatch.setenv("LC_ALL", language)
        codes.add(module.main([argument.format(tmp=folder) for argument in arguments]))
        first, *_, last = capsys.readouterr().err.splitlines()
        assert first.startswith(error) and last.startswith(hint)
        explained = [line.removeprefix(error).removeprefix(hint) for line in (first, last)]
        assert [bool(CHINESE.search(line)) for line in explained] == [language != "C"] * 2, explained
    assert codes in ({1}, {2})
