"""What `model-sync` says to a technician: while a line is refused, about a stick, about a report that nobody receives."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from model_sync import cli
from model_sync.settings import SyncSettings
from tests.library_site import Site, make_site, tiny_bundle
from tests.sync_box import LINE, Box, make_box, write_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_site(tmp_path / "library")
    site.publish(tiny_bundle(tmp_path))
    site.rollout("stable", LINE, "0.1.0")
    return site


@pytest.fixture
def box(tmp_path: Path, site: Site) -> Box:
    box = make_box(tmp_path / "box", site, refused_url())
    write_config(box)
    return box


def refused_url() -> str:
    """An address of this machine where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def run(box: Box, *command: str) -> int:
    return cli.main(["--config", str(box.settings.state_dir), *command])


# -- a line that is refused ---------------------------------------------------------------------------------------------------


def test_pull_says_that_it_tries_again_and_gives_up(box: Box) -> None:
    """With the default number of attempts, which the agent in the background needs half an hour for."""
    write_config(Box(box.settings.model_copy(update={"attempts": 20, "backoff_s": 0.05})))
    command = [sys.executable, "-m", "model_sync", "--config", str(box.settings.state_dir), "pull"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3
    first, *lines = done.stderr.splitlines()
    assert first == f"asking the library at {box.settings.urls[0].removeprefix('http://')}"
    again = [line for line in lines if "trying again in" in line]
    assert len(again) == 5
    assert all("onnection refused" in line and "[sync.unreachable]" in line for line in again)
    assert "error: [sync.unreachable] " in done.stderr
    assert "Unreachable is not untrusted: the model in use works on, and what has come is kept." in done.stderr
    assert "Check the cable" in done.stderr
    assert box.status()["code"] == "sync.unreachable"


def test_the_agent_in_the_background_keeps_its_patience(box: Box) -> None:
    patient = box.settings.model_copy(update={"attempts": 20, "max_backoff_s": 300.0})
    waited_for = patient.waited_for()
    assert (waited_for.attempts, waited_for.max_backoff_s) == (6, 10.0)
    assert (patient.attempts, patient.max_backoff_s) == (20, 300.0)
    impatient = box.settings.model_copy(update={"attempts": 2, "max_backoff_s": 3.0})
    assert impatient.waited_for() == impatient


def test_pull_says_the_same_in_chinese(box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    write_config(Box(box.settings.model_copy(update={"attempts": 2})))
    assert run(box, "pull") == 3
    said = capsys.readouterr().err
    for words in ("正在连接模型库", "后重试", "无法连接不等于不可信", "请检查网线"):
        assert words in said


# -- where the settings are named from -----------------------------------------------------------------------------------------


def test_one_box_has_one_state_wherever_its_settings_are_named_from(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--state", "st", "--exchange", "ex", "--root", str(site.root), "--box-id", "box-7"]
    assert cli.main(["init", *given, "--url", refused_url()]) == 0
    assert f"model-sync --config {tmp_path / 'st'} pull" in capsys.readouterr().out
    with (tmp_path / "st" / "sync.toml").open("a") as file:
        file.write("attempts = 1\n")
    assert cli.main(["--config", "st", "import-usb", str(site.public)]) == 0
    assert (tmp_path / "st" / "metadata" / "timestamp.json").is_file()
    assert not (tmp_path / "st" / "st").exists()
    places = []
    for place, config in ((tmp_path, "st"), (tmp_path, "st/sync.toml"), (tmp_path / "st", "."), (tmp_path / "ex", "../st")):
        monkeypatch.chdir(place)
        settings = SyncSettings.load(Path(config))
        places.append((settings.state_dir.resolve(), settings.exchange_dir.resolve(), settings.root.resolve()))
        assert settings.state_dir.is_absolute()
    assert set(places) == {(tmp_path / "st", tmp_path / "ex", tmp_path / "st" / "root.json")}
