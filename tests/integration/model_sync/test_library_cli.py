"""The command ``model-library`` as people run it: the ceremony from the first key to a withdrawal, and wrong use."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_sync.fleet import cli
from tests.support.binding_gate import write_gate
from tests.support.library_site import make_site, tiny_bundle

LINE = "cxr-pneumonia"
FLEET = {"serve", "device-ca", "token", "deny", "acknowledge-audit", "allow", "move", "operator"}  # tested with the server
SECRET, ONLINE = "six words drawn by dice", "another six words drawn by dice"


class Shell:
    """A folder in which commands are run, with the passphrases in files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in (("people.txt", SECRET), ("online.txt", ONLINE)):
            (directory / name).write_text(text + "\n")
            (directory / name).chmod(0o600)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("MODEL_LIBRARY")} | {
            "MODEL_LIBRARY_PASSPHRASE_FILE": str(directory / "people.txt"),
            "MODEL_LIBRARY_ONLINE_PASSPHRASE_FILE": str(directory / "online.txt"),
        }

    def run(self, *arguments: str | Path, expect: int = 0, **environment: str) -> str:
        """Run one command in this process; returns stdout and stderr together."""
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            patch.chdir(self.directory)
            for name in [name for name in os.environ if name.startswith("MODEL_LIBRARY")]:
                patch.delenv(name)
            for name in ("MODEL_LIBRARY_PASSPHRASE_FILE", "MODEL_LIBRARY_ONLINE_PASSPHRASE_FILE"):
                patch.setenv(name, environment.get(name, self.environment[name]))
            patch.setattr(sys, "stdin", io.StringIO())
            try:
                code: Any = cli.main([str(argument) for argument in arguments])
            except SystemExit as leaving:
                code = leaving.code
        assert (code or 0) == expect, out.getvalue()
        return out.getvalue()

    def typed(self, *arguments: str, answers: list[str]) -> tuple[int, str]:
        """Run one command on a terminal and type the answers as it asks."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.directory)
            bare = {k: v for k, v in self.environment.items() if not k.startswith("MODEL_LIBRARY")}
            bare["PYTHONPATH"] = str(Path(__file__).parents[3])
            os.execve(sys.executable, [sys.executable, "-m", "model_sync.fleet.cli", *arguments], bare)  # noqa: S606
        seen = b""
        remaining = list(answers)
        while True:
            try:
                chunk = os.read(terminal, 4096)
            except OSError:
                break  # the other end is closed
            if not chunk:
                break
            seen += chunk
            if remaining and seen.rstrip(b" ").endswith((b":", b"[y/N]")) and b"\n" not in chunk[-3:]:
                time.sleep(0.05)  # getpass flushes what was typed before it asked
                os.write(terminal, remaining.pop(0).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
        return os.waitstatus_to_exitcode(status), seen.decode()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "centre")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A library made by commands, with one line and one version; tests that change it take a copy."""
    shell = Shell(tmp_path_factory.mktemp("ready"))
    for name in ("alice", "bob", "carol", "dave"):
        shell.run("key", "new", f"{name}.pem")
    keys = [part for name in ("alice", "bob", "carol") for part in ("--key", f"{name}.pem.pub.json")]
    shell.run("init", "LIB", *keys, "--expiry", "timestamp=3")
    for name in ("alice", "bob"):
        shell.run("sign", "LIB", "--key", f"{name}.pem", "--yes")
    shell.run("rollout-keys", "LIB", "--key", "carol.pem.pub.json")
    shell.run("add-line", "LIB", LINE, *keys)
    for name in ("alice", "carol"):
        shell.run("sign", "LIB", "--key", f"{name}.pem", "--yes")
    shell.run("publish", "LIB", tiny_bundle(shell.directory, "0.1.0"))
    for name in ("alice", "carol"):
        shell.run("sign", "LIB", "--key", f"{name}.pem", "--yes")
    yield shell


@pytest.fixture
def copy(ready: Shell, tmp_path: Path) -> Shell:
    shutil.copytree(ready.directory, tmp_path / "copy")
    return Shell(tmp_path / "copy")


def test_the_ceremony_ends_in_a_whole_library(ready: Shell) -> None:
    text = ready.run("status", "LIB")
    assert "next: nothing to do" in text
    assert "alice, bob, carol" in text
    assert "in 3.0 days" in text
    assert "intact; 7 files" in ready.run("verify", "LIB")
    assert "intact; 7 files" in ready.run("verify", "LIB/public")
    command = [sys.executable, "-m", "model_sync.fleet.cli", "verify", "LIB"]
    environment = ready.environment | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=ready.directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "intact; 7 files" in done.stdout
    status = json.loads(ready.run("status", "LIB", "--json"))
    assert status["lines"][LINE]["versions"] == ["0.1.0"]


def test_a_bundle_is_verified_as_before(ready: Shell) -> None:
    text = ready.run("verify", f"{LINE}-0.1.0")
    assert f"{LINE} 0.1.0 (" in text
    assert "pneumonia: threshold 0.6208, sensitivity 0.952, specificity 0.913" in text
    assert "variants: fp32; golden cases: 2" in text


def test_a_rollout_a_withdrawal_and_a_stick(copy: Shell) -> None:
    rollout = ["rollout", "LIB", "--ring", "stable", "--line", LINE, "--version", "0.1.0", "--percent", "10", "--duration-h", "48"]
    copy.run(*rollout, "--start", "2030-01-02T03:04Z", "--max-failures", "0.1", "--min-failures", "3")
    text = copy.run("sign", "LIB", "--key", "carol.pem", "--yes")
    assert f"ring stable: {LINE} 0.1.0 to 10 % of boxes from 2030-01-02 03:04 UTC over 48 h; stop at 10% failures from 3 boxes on" in text
    (copy.directory / "stick").mkdir()
    assert f"{LINE}: 0.1.0" in copy.run("export-usb", "LIB", "stick")
    text = copy.run("withdraw", "LIB", LINE, "0.1.0", "--reason", "misses effusions")
    assert f"the rollout of ring stable names {LINE} 0.1.0, which is withdrawn: no box installs it" in text
    assert f"next: boxes may run no version of {LINE}: publish a new one" in text
    copy.run("sign", "LIB", "--key", "alice.pem", "--yes")
    assert "! WITHDRAWN 0.1.0: misses effusions" in copy.run("sign", "LIB", "--key", "bob.pem", "--yes")
    assert "withdrawn: no box installs it" in copy.run("status", "LIB")
    assert "is public" in copy.run("refresh-timestamp", "LIB")


def test_a_withdrawal_says_how_the_rollout_is_signed_to_another_version(copy: Shell) -> None:
    copy.run("publish", "LIB", tiny_bundle(copy.directory, "0.2.0", seed=1))
    copy.run("rollout", "LIB", "--ring", "stable", "--line", LINE, "--version", "0.1.0", "--percent", "40")
    for name in ("alice", "bob", "carol"):
        copy.run("sign", "LIB", "--key", f"{name}.pem", "--yes")
    text = copy.run("withdraw", "LIB", LINE, "0.1.0", "--reason", "misses effusions")
    command = f"model-library rollout LIB --ring stable --line {LINE} --version 0.2.0 --percent 40"
    assert f"next: `{command}`, then have it signed" in text
    copy.run(*command.split()[1:])
    copy.run("sign", "LIB", "--key", "carol.pem", "--yes")
    assert "names" not in copy.run("minimum", "LIB", LINE, "0.2.0")


def test_a_line_is_ended_by_running_the_same_command_twice(copy: Shell) -> None:
    said = copy.run("rollout", "LIB", "--ring", "stable", "--line", LINE, "--version", "0.1.0")
    assert "next: rollout waits for 1 more: `model-library sign LIB --key KEY.pem` (carol)" in said
    copy.run("sign", "LIB", "--key", "carol.pem", "--yes")
    text = copy.run("end-line", "LIB", LINE)
    assert "rollout version 3 waits" in text
    assert f"boxes keep the model of {LINE} that they have, and get no new version of it" in text
    assert f"run `model-library end-line LIB {LINE}` again" in text
    assert f"ring stable: {LINE} has no rollout any more" in copy.run("sign", "LIB", "--key", "carol.pem", "--yes")
    assert "again" not in copy.run("end-line", "LIB", LINE).replace("add the model line again", "")
    for name in ("alice", "bob"):
        assert f"- role {LINE} has no delegation any more" in copy.run("sign", "LIB", "--key", f"{name}.pem", "--yes")
    text = copy.run("status", "LIB")
    assert LINE not in text
    assert "nothing to do" in text
    text = copy.run("verify", "LIB")
    assert f"note: the snapshot names {LINE}.json, which has no delegation any more: a model line that was ended" in text
    assert f"there is no model line '{LINE}'" in copy.run("end-line", "LIB", LINE, expect=1)
    copy.run("add-line", "LIB", LINE, "--key", "dave.pem.pub.json", "--threshold", "1")
    text = copy.run("sign", "LIB", "--key", "dave.pem", "--yes")
    assert "compared with nothing: everything in it is shown" in text
    assert "+ version 0.1.0" in text
    away = Shell(copy.directory / "away")
    for part in ("staged", "public"):
        shutil.copytree(copy.directory / "LIB" / part, away.directory / part)
    text = away.run("sign", f"staged/{LINE}.json", "--against", "public", "--key", str(copy.directory / "dave.pem"), "--yes")
    assert "compared with nothing: everything in it is shown" in text


def test_a_signature_from_another_machine(copy: Shell) -> None:
    copy.run("rotate-key", "LIB", "root", "--old", "bob", "--new", "dave.pem.pub.json")
    away = Shell(copy.directory / "away")
    shutil.copytree(copy.directory / "LIB" / "staged", away.directory / "staged")
    shutil.copytree(copy.directory / "LIB" / "public", away.directory / "public")
    for name in ("alice", "dave"):
        text = away.run("sign", "staged/root.json", "--against", "public", "--key", str(copy.directory / f"{name}.pem"), "--yes")
        assert "root version 2, after version 1" in text
        assert text.count("key of root") == 2
    assert "1 of 2 signatures" in copy.run("merge", "LIB", "away/staged/root.json")
    assert "next: root waits for 1 more: `model-library sign LIB --key KEY.pem` (bob or carol)" in copy.run("status", "LIB")
    assert "root version 2 is public" in copy.run("sign", "LIB/staged/root.json", "--key", "carol.pem", "--yes")
    assert "stale" in copy.run("merge", "LIB", "away/staged/root.json", expect=1)
    assert "dave" in copy.run("status", "LIB")


def other_figures(directory: Path) -> Path:
    """Version 0.2.0 with another threshold and another sensitivity of children, measured so."""
    bundle = tiny_bundle(directory, "0.2.0", seed=1)
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    (point,) = manifest["operating_points"]
    point["threshold"] = 0.9
    point["groups"][0]["sensitivity"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    path.write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")
    write_gate(bundle)
    return bundle


def machine_without_library(copy: Shell) -> Shell:
    """Another machine, with the files that one carries there and nothing else."""
    away = Shell(copy.directory / "away")
    for part in ("staged", "public"):
        shutil.rmtree(away.directory / part, ignore_errors=True)
        shutil.copytree(copy.directory / "LIB" / part, away.directory / part)
    return away


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("C.UTF-8", ["compared with 0.1.0", "! Pneumonia: threshold: 0.6208 → 0.9",
                     "! Pneumonia: children of 1 to 5 years: sensitivity 96.3% (94.0%-97.8%)", "→ sensitivity 50.0% (40.0%-60.0%)"]),
        ("zh_CN.UTF-8", ["与正在使用的版本 0.1.0 相比", "! 肺炎: 阈值: 0.6208 → 0.9", "! 肺炎: 1–5 岁儿童: 灵敏度 96.3%",
                         "→ 灵敏度 50.0%"]),
    ],
)  # fmt: skip
def test_a_machine_without_a_library_shows_what_changes_for_patients(
    copy: Shell, monkeypatch: pytest.MonkeyPatch, language: str, said: list[str]
) -> None:
    monkeypatch.setenv("LC_ALL", language)
    copy.run("publish", "LIB", other_figures(copy.directory))
    away = machine_without_library(copy)
    text = away.run("sign", f"staged/{LINE}.json", "--against", "public", "--key", str(copy.directory / "alice.pem"), "--yes")
    assert [part for part in said if part not in text] == []
    assert "compared with nothing" not in text
    assert "1 of 2 signatures" in copy.run("merge", "LIB", f"away/staged/{LINE}.json")
    copy.run("sign", "LIB", "--key", "carol.pem", "--yes")

    copy.run("rollout", "LIB", "--ring", "stable", "--line", LINE, "--version", "0.1.0")
    copy.run("sign", "LIB", "--key", "carol.pem", "--yes")
    copy.run("rollout", "LIB", "--ring", "stable", "--line", LINE, "--version", "0.2.0")
    away = machine_without_library(copy)
    text = away.run("sign", "staged/rollout.json", "--against", "public", "--key", str(copy.directory / "carol.pem"), "--yes")
    assert [part for part in said[1:] if part not in text] == []
    assert "is public" in copy.run("merge", "LIB", "away/staged/rollout.json")


def test_without_a_copy_of_the_public_folder_all_of_it_is_shown_and_the_missing_copy_is_said(copy: Shell) -> None:
    copy.run("publish", "LIB", other_figures(copy.directory))
    away = machine_without_library(copy)
    text = away.run("sign", f"staged/{LINE}.json", "--key", str(copy.directory / "alice.pem"), "--yes")
    for part in ("compared with nothing", "+ Pneumonia: children of 1 to 5 years: sensitivity 50.0%", "give --against"):
        assert part in text


@pytest.mark.parametrize("folder", ["nowhere", "staged", "public/metadata", "public/targets"])
def test_a_folder_that_is_no_copy_of_the_public_one_is_refused(copy: Shell, folder: str) -> None:
    """Else everything would look new, and nothing changed."""
    copy.run("publish", "LIB", other_figures(copy.directory))
    away = machine_without_library(copy)
    before = (away.directory / "staged" / f"{LINE}.json").read_bytes()
    key = str(copy.directory / "alice.pem")
    text = away.run("sign", f"staged/{LINE}.json", "--against", folder, "--key", key, "--yes", expect=2)
    assert "is no copy of the library's public folder" in text
    assert (away.directory / "staged" / f"{LINE}.json").read_bytes() == before


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_an_online_key_is_replaced_as_the_guide_says(copy: Shell, role: str) -> None:
    name = f"{role} 2 (online)"
    copy.run("key", "new", f"LIB/online/{role}-2.pem", "--name", name, "--passphrase-file", "online.txt")
    copy.run("rotate-key", "LIB", role, "--old", f"{role} (online)", "--new", f"LIB/online/{role}-2.pem.pub.json")
    for person in ("alice", "bob"):
        copy.run("sign", "LIB", "--key", f"{person}.pem", "--yes")
    text = copy.run("status", "LIB")
    assert name in text
    assert f"{role}.pem is the key of no role any more: delete it" in text
    (copy.directory / "LIB" / "online" / f"{role}.pem").unlink()
    copy.run("refresh-timestamp", "LIB")
    assert "intact" in copy.run("verify", "LIB")


def test_without_the_online_passphrase_signatures_are_kept(copy: Shell) -> None:
    copy.run("renew", "LIB", LINE)
    copy.run("sign", "LIB", "--key", "alice.pem", "--yes")
    text = copy.run("sign", "LIB", "--key", "bob.pem", "--yes", expect=1, MODEL_LIBRARY_ONLINE_PASSPHRASE_FILE="")
    assert "locked" in text
    assert "all signatures are kept" in text
    assert "refresh-timestamp" in text
    copy.run("refresh-timestamp", "LIB")
    assert "nothing to do" in copy.run("status", "LIB")


def test_what_waits_is_discarded(copy: Shell) -> None:
    copy.run("minimum", "LIB", LINE, "0.1.0")
    assert "waits for 2 more" in copy.run("status", "LIB")
    assert f"deleted: {LINE}" in copy.run("discard", "LIB", "--yes")
    assert "nothing to do" in copy.run("status", "LIB")


# --- at a terminal ------------------------------------------------------------------------------------------------------


def test_passphrases_are_asked_for_and_signing_is_confirmed(shell: Shell) -> None:
    assert shell.typed("key", "new", "alice.pem", answers=[SECRET, SECRET])[0] == 0
    code, text = shell.typed("key", "new", "bob.pem", answers=[SECRET, "another passphrase"])
    assert code == 2
    assert "differ" in text
    code, text = shell.typed("init", "LIB", "--key", "alice.pem.pub.json", "--threshold", "1", answers=[ONLINE, ONLINE])
    assert code == 0, text
    assert SECRET not in text
    assert ONLINE not in text
    code, text = shell.typed("sign", "LIB", "--key", "alice.pem", answers=[SECRET, "n"])
    assert code == 1
    assert "+ key of root: alice" in text
    assert "nothing was signed" in text
    code, text = shell.typed("sign", "LIB", "--key", "alice.pem", answers=[SECRET, "y", "y", ONLINE])
    assert code == 0, text
    assert "targets version 1 is public (alice)" in text
    assert shell.run("verify", "LIB")


def test_a_wrong_passphrase_at_the_terminal(shell: Shell) -> None:
    shell.run("key", "new", "alice.pem")
    shell.run("init", "LIB", "--key", "alice.pem.pub.json", "--threshold", "1")
    code, text = shell.typed("sign", "LIB", "--key", "alice.pem", answers=["wrong"])
    assert code == 2
    assert "wrong passphrase" in text


# --- wrong use ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], int, str]] = {
    "no command": ([], 2, "required"),
    "unknown command": (["shine"], 2, "invalid choice: 'shine'"),
    "unknown option": (["status", "LIB", "--loud"], 2, "--loud"),
    "no library": (["status", "."], 2, "is no library"),
    "absent library": (["publish", "nowhere", "x"], 2, "is no library"),
    "second init": (["init", "LIB", "--key", "alice.pem.pub.json"], 1, "is a library already"),
    "init without keys": (["init", "NEW"], 2, "--key"),
    "init with a private key's absent half": (["init", "NEW", "--key", "erin.pem.pub.json"], 2, "No such file"),
    "init with too few keys": (["init", "NEW", "--key", "alice.pem.pub.json"], 1, "1 keys cannot give 2 signatures"),
    "expiry of nobody": (["init", "NEW", "--key", "alice.pem.pub.json", "--expiry", "boss=3"], 2, "--expiry boss=3"),
    "expiry that is no number": (["init", "NEW", "--key", "alice.pem.pub.json", "--expiry", "root=long"], 2, "--expiry root=long"),
    "expiry in the past": (["init", "NEW", "--key", "alice.pem.pub.json", "--expiry", "root=-1"], 2, "--expiry root=-1"),
    "key that exists": (["key", "new", "alice.pem"], 2, "exists already"),
    "key in no directory": (["key", "new", "no/alice.pem"], 2, "No such file"),
    "token that is none": (["key", "token", "hsm:2?label=absent", "x.pub.json", "--name", "x"], 2, "hsm:2?label=absent"),
    "line with a role's name": (["add-line", "LIB", "root", "--key", "alice.pem.pub.json", "--threshold", "1"], 1, "role of the library"),
    "line that is there": (["add-line", "LIB", LINE, "--key", "alice.pem.pub.json", "--threshold", "1"], 1, "one delegator"),
    "line with too few keys": (["add-line", "LIB", "ct", "--key", "alice.pem.pub.json"], 1, "cannot give 2"),
    "line with a device's name": (["add-line", "LIB", "nul", "--key", "alice.pem.pub.json", "--threshold", "1"], 1, "device of Windows"),
    "line that looks half-written": (
        ["add-line", "LIB", "tmp-line", "--key", "alice.pem.pub.json", "--threshold", "1"], 1, "cannot be called 'tmp-line'",
    ),
    "end of no line": (["end-line", "LIB", "ct"], 1, "no model line 'ct'"),
    "reason too long": (["withdraw", "LIB", LINE, "0.1.0", "--reason", "x" * 301], 1, "at most 300 characters"),
    "minimum that is no version": (["minimum", "LIB", LINE, "0.1.0-01"], 1, "no semantic version"),
    "minimum too long for boxes": (["minimum", "LIB", LINE, "0.1.0+" + "a" * 70], 1, "no semantic version"),
    "bundle that is none": (["publish", "LIB", "LIB"], 1, "manifest.json"),
    "bundle that is absent": (["publish", "LIB", "absent"], 1, "does not exist"),
    "withdrawal without reason": (["withdraw", "LIB", LINE, "0.1.0"], 2, "--reason"),
    "withdrawal of nothing": (["withdraw", "LIB", LINE, "9.9.9", "--reason", "x"], 1, "no version 9.9.9"),
    "rollout of nothing": (["rollout", "LIB", "--ring", "r", "--line", LINE, "--version", "9.9.9"], 1, "no version 9.9.9"),
    "rollout to too many": (["rollout", "LIB", "--ring", "r", "--line", LINE, "--version", "0.1.0", "--percent", "120"], 1, "percent"),
    "rollout at no time": (
        ["rollout", "LIB", "--ring", "r", "--line", LINE, "--version", "0.1.0", "--start", "soon"], 2, "'soon' is no time",
    ),
    "rollout with no budget": (
        ["rollout", "LIB", "--ring", "r", "--line", LINE, "--version", "0.1.0", "--max-failures", "5"], 2, "--max-failures",
    ),
    "minimum above all": (["minimum", "LIB", LINE, "5.0.0"], 1, "no version of"),
    "rotate nothing": (["rotate-key", "LIB", "root"], 2, "nothing to rotate"),
    "rotate an unknown key": (["rotate-key", "LIB", "root", "--old", "zoe", "--new", "dave.pem.pub.json"], 2, "'zoe' names no key"),
    "rotate an unknown role": (["rotate-key", "LIB", "cook", "--new", "dave.pem.pub.json"], 1, "no role 'cook'"),
    "sign nothing": (["sign", "LIB", "--key", "alice.pem", "--yes"], 1, "nothing waits"),
    "sign what is not there": (["sign", "absent.json", "--key", "alice.pem", "--yes"], 2, "is not there"),
    "sign what is no metadata": (["sign", "people.txt", "--key", "alice.pem", "--yes"], 1, "no TUF metadata"),
    "sign with an absent key": (["sign", "LIB", "--key", "zoe.pem", "--yes"], 2, "No such file"),
    "sign with the public half": (["sign", "LIB", "--key", "alice.pem.pub.json", "--yes"], 2, "not an encrypted"),
    "sign with the wrong passphrase": (["sign", "LIB", "--key", "alice.pem", "--passphrase-file", "online.txt"], 2, "wrong passphrase"),
    "sign with another key than expected": (
        ["sign", "LIB", "--key", "alice.pem", "--public-key", "bob.pem.pub.json", "--yes"], 2, "another key",
    ),
    "passphrase file that is absent": (["sign", "LIB", "--key", "alice.pem", "--passphrase-file", "absent"], 2, "No such file"),
    "merge nothing": (["merge", "LIB", "absent.json"], 1, "No such file"),
    "merge something else": (["merge", "LIB", "people.txt"], 1, "no TUF metadata"),
    "renew what nobody signs": (["renew", "LIB", "timestamp"], 1, "no role that people sign"),
    "discard without asking": (["discard", "LIB"], 2, "nobody can confirm"),
    "verify nothing": (["verify", "absent"], 1, "does not exist"),
    "export to nowhere": (["export-usb", "LIB", "absent"], 2, "is not a directory"),
    "export an unknown line": (["export-usb", "LIB", ".", "--line", "ct"], 2, "no model line ct"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_gets_one_clear_error_with_a_hint(ready: Shell, name: str) -> None:
    arguments, code, says = WRONG[name]
    text = ready.run(*arguments, expect=code)
    assert says in text
    assert text.count("error: ") == 1
    assert text.count("hint: ") == 1
    assert not (ready.directory / "NEW" / "library.json").exists()
    assert "nothing to do" in ready.run("status", "LIB")


def test_a_passphrase_file_that_everybody_can_read(copy: Shell) -> None:
    (copy.directory / "people.txt").chmod(0o644)
    assert "read by everybody" in copy.run("sign", "LIB", "--key", "alice.pem", "--yes", expect=2)


def test_no_passphrase_and_no_terminal(copy: Shell) -> None:
    for command in (["sign", "LIB", "--key", "alice.pem", "--yes"], ["key", "new", "erin.pem"]):
        assert "no passphrase" in copy.run(*command, expect=2, MODEL_LIBRARY_PASSPHRASE_FILE="")


def test_a_damaged_library_is_said_so(copy: Shell) -> None:
    next((copy.directory / "LIB" / "public" / "targets").rglob("*.onnx")).unlink()
    text = copy.run("verify", "LIB", expect=1)
    assert "problem: " in text
    assert "hint: " in text


def test_an_expired_library_is_said_so_and_healed(copy: Shell) -> None:
    faketime = shutil.which("faketime")
    assert faketime, "faketime is missing: run `make setup-test`"
    command = [faketime, "+4 days", sys.executable, "-m", "model_sync.fleet.cli"]
    environment = copy.environment | {"PYTHONPATH": str(Path(__file__).parents[3])}

    def later(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=copy.directory, env=environment, capture_output=True, text=True, check=False)

    assert later("status", "LIB").returncode == 1
    assert "timestamp has EXPIRED" in later("status", "LIB").stdout
    assert "timestamp expired" in later("verify", "LIB").stderr
    assert later("refresh-timestamp", "LIB").returncode == 0
    assert later("verify", "LIB").returncode == 0


def test_a_library_that_may_not_be_written(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "centre")
    make_site(shell.directory / "LIB")
    shutil.rmtree(shell.directory / "LIB" / "scratch")
    (shell.directory / "LIB" / "scratch").write_text("in the way")
    text = shell.run("renew", "LIB", LINE, expect=1)
    assert "nothing was changed" in text


def test_every_command_has_help_that_the_guide_names(ready: Shell) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "model-library.md").read_text("utf-8")
    text = ready.run("--help")
    commands = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and not line.startswith("     ")]
    assert len(commands) == 18 + len(FLEET)
    for command in commands:
        assert f"model-library {command}" in guide, command
        if command not in FLEET:
            assert "usage: model-library" in ready.run(command, "--help")


@pytest.mark.parametrize(("module", "command"), [("sqlalchemy", name) for name in sorted(FLEET)] + [("psycopg", "allow")])
def test_a_plain_install_names_the_extra_in_place_of_a_traceback(module: str, command: str, tmp_path: Path) -> None:
    """The commands of the fleet need what a box is installed without."""
    more = ["box", "--db", "postgresql+psycopg://nobody@127.0.0.1:1/none"] if module == "psycopg" else []
    code = f"import sys; sys.modules[{module!r}] = None; from model_sync.fleet.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first == f"error: `model-library {command}` needs {module}, which is not installed here"
    assert second == "hint: pip install 'clinic-edge-appliance[library]'"


def test_the_extra_is_named_where_one_starts() -> None:
    docs = Path(__file__).resolve().parents[3] / "docs"
    for name in ("model-library.md", "fleet.md"):
        assert "pip install 'clinic-edge-appliance[library]'" in (docs / name).read_text("utf-8"), name
