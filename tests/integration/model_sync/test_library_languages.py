"""The error path of each sub-command of ``model-library`` in both languages."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from model_sync.fleet import cli

# A command that is refused, its exit code, and a part of the particulars, which are in English in both languages.
REFUSED = {
    "key new": (["key", "new", "dir/alice.pem", "--passphrase-file", "absent.txt"], 2, "absent.txt"),
    "key token": (["key", "token", "hsm:?x", "new.pub.json", "--name", "alice", "--passphrase-file", "absent.txt"], 2, "hsm:?x"),
    "init": (["init", "LIB", "--key", "absent.pub.json"], 2, "absent.pub.json"),
    "add-line": (["add-line", "LIB", "cxr", "--key", "absent.pub.json"], 2, "is no library"),
    "end-line": (["end-line", "LIB", "cxr"], 2, "is no library"),
    "rollout-keys": (["rollout-keys", "LIB", "--key", "absent.pub.json"], 2, "is no library"),
    "rotate-key": (["rotate-key", "LIB", "root"], 2, "nothing to rotate"),
    "publish": (["publish", "LIB", "bundle"], 2, "is no library"),
    "rollout": (["rollout", "LIB", "--ring", "stable", "--line", "cxr", "--version", "1.0.0"], 2, "is no library"),
    "withdraw": (["withdraw", "LIB", "cxr", "1.0.0", "--reason", "wrong"], 2, "is no library"),
    "minimum": (["minimum", "LIB", "cxr", "1.0.0"], 2, "is no library"),
    "sign": (["sign", "absent", "--key", "alice.pem", "--passphrase-file", "absent.txt"], 2, "absent"),
    "merge": (["merge", "LIB", "targets.json"], 2, "is no library"),
    "renew": (["renew", "LIB", "targets"], 2, "is no library"),
    "discard": (["discard", "LIB", "--yes"], 2, "is no library"),
    "refresh-timestamp": (["refresh-timestamp", "LIB"], 2, "is no library"),
    "status": (["status", "LIB"], 2, "is no library"),
    "verify": (["verify", "absent"], 1, "does not exist"),
    "export-usb": (["export-usb", "LIB", "."], 2, "is no library"),
    "serve": (["serve", "LIB", "--device-ca", "ca"], 2, "no passphrase was given"),
    "device-ca": (["device-ca", "ca", "--passphrase-file", "absent.txt"], 2, "absent.txt"),
    "token": (["token", "new", "box-1", "--library", "LIB"], 2, "is no library"),
    "acknowledge-audit": (["acknowledge-audit", "box-1", "--note", "replaced", "--library", "LIB"], 2, "is no library"),
    "deny": (["deny", "box-1", "--library", "LIB"], 2, "is no library"),
    "allow": (["allow", "box-1", "--library", "LIB"], 2, "is no library"),
    "move": (["move", "box-1", "--ring", "stable", "--library", "LIB"], 2, "is no library"),
    "operator": (["operator", "add", "ann", "--library", "LIB"], 2, "is no library"),
}  # fmt: skip
LANGUAGES = {"C": ("error: ", "hint: "), "zh_CN.UTF-8": ("错误：", "提示：")}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", REFUSED)
def test_an_error_is_printed_in_the_chosen_language(
    name: str, language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, particulars = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LC_ALL", language)
    for variable in ("MODEL_LIBRARY_PASSPHRASE_FILE", "MODEL_LIBRARY_ONLINE_PASSPHRASE_FILE"):
        monkeypatch.delenv(variable, raising=False)
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    error, hint = LANGUAGES[language]
    first, second = captured.err.splitlines()
    assert first.startswith(error) and particulars in first
    assert second.startswith(hint) and len(second) > len(hint) + 4
    assert captured.out == ""


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", sorted({name.split()[0] for name in REFUSED}))
def test_wrong_usage_is_reported_in_the_chosen_language(
    name: str, language: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LC_ALL", language)
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--no-such-option"])
    assert caught.value.code == 2
    error, hint = LANGUAGES[language]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(error) and second.startswith(hint)


def test_every_command_is_covered() -> None:
    (commands,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert set(commands.choices) == {name.split()[0] for name in REFUSED}
