"""What `model-sync` says to a technician: while a line is refused, about a stick, about a report that nobody receives."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_sync.agent import cli
from model_sync.agent.client import Client
from model_sync.errors import LibraryUnreachable
from model_sync.fleet import cli as library_cli
from model_sync.settings import SyncSettings
from tests.support.library_site import Site, make_site, tiny_bundle
from tests.support.sync_box import LINE, Box, make_box, write_config

ROOT = Path(__file__).resolve().parents[3]


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
    assert "Unreachable is not untrusted: the model in use keeps working, and what was received is kept." in done.stderr
    assert "Check the cable" in done.stderr
    assert box.status()["code"] == "sync.unreachable"


def test_the_agent_in_the_background_keeps_its_patience(box: Box) -> None:
    patient = box.settings.model_copy(update={"attempts": 20, "max_backoff_s": 300.0})
    for_interactive_use = patient.for_interactive_use()
    assert (for_interactive_use.attempts, for_interactive_use.max_backoff_s) == (6, 10.0)
    assert (patient.attempts, patient.max_backoff_s) == (20, 300.0)
    impatient = box.settings.model_copy(update={"attempts": 2, "max_backoff_s": 3.0})
    assert impatient.for_interactive_use() == impatient


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


# -- a report that nobody receives ---------------------------------------------------------------------------------------------


def test_a_report_that_was_not_sent_is_not_called_sent(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(box, "report") == 5
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("nothing was sent: no report_url is set")
    write_config(Box(box.settings.model_copy(update={"report_url": "https://127.0.0.1:1"})))
    assert run(box, "report") == 5
    said = capsys.readouterr()
    assert said.err.startswith("nothing was sent: this box is not enrolled")
    assert "model-sync enrol --token-file" in said.err


# -- a stick -------------------------------------------------------------------------------------------------------------------


def test_an_import_says_what_was_taken(box: Box, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(box, "import-usb", str(site.public)) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"taken from the USB stick and ready for the box: {LINE} 0.1.0\n")
    assert "bytes received" not in said
    assert run(box, "import-usb", str(site.public)) == 0
    assert capsys.readouterr().out.endswith(f"nothing newer is on the USB stick: this box already has {LINE} 0.1.0\n")


def test_an_import_without_a_rollout_for_this_ring_says_so(box: Box, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(Box(box.settings.model_copy(update={"ring": "canary"})))
    assert run(box, "import-usb", str(site.public)) == 5
    said = capsys.readouterr().out
    assert "nothing was taken: no rollout on the USB stick names a model for the ring canary" in said


def test_an_import_of_what_is_paused_says_that_nothing_was_taken(box: Box, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.rollout("stable", LINE, "0.1.0", paused=True)
    assert run(box, "import-usb", str(site.public)) == 5
    said = capsys.readouterr().out
    assert f"{LINE} 0.1.0: the rollout is paused" in said
    assert said.endswith("nothing was taken from the USB stick; the reason is above\n")


# -- the status ----------------------------------------------------------------------------------------------------------------


def test_the_status_is_not_well_while_the_line_is_tried_again(box: Box, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A look right after a stick: the state does not flicker for a minute, and what is said is still one thing."""
    write_config(Box(box.settings.model_copy(update={"attempts": 2, "backoff_s": 0.01})))
    assert run(box, "import-usb", str(site.public)) == 0
    said: list[str] = []

    def look(*_: object) -> None:
        capsys.readouterr()
        assert run(box, "status") == 0
        said.append(capsys.readouterr().out)

    with pytest.raises(LibraryUnreachable):
        Client(SyncSettings.load(box.settings.state_dir), on_retry=look).pull()
    (page,) = said
    assert "the network does not answer; the agent tries again (the model in use keeps working)" in page
    assert "Trying again" in page
    assert "State             well" not in page


def test_a_pause_that_a_killed_process_left_behind_is_not_shown(box: Box, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(box, "import-usb", str(site.public)) == 0
    left = {"code": "sync.unreachable", "message": "Connection refused", "pause_s": 3.0, "at": "2026-01-01T00:00:00+00:00"}
    (box.settings.exchange_dir / "sync-status.json").write_text(json.dumps(box.status() | {"retry": left}))
    capsys.readouterr()
    assert run(box, "status") == 0
    page = capsys.readouterr().out
    assert "State             well" in page
    assert "Trying again" not in page


# -- where the settings are named ----------------------------------------------------------------------------------------------


def test_config_may_stand_after_the_command(box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(box.settings.state_dir)
    assert cli.main(["status", "--config", config]) == 0
    assert "box-1" in capsys.readouterr().out
    assert cli.main(["--config", str(tmp_path / "none"), "status", "--config", config]) == 0
    assert cli.main(["--config", config, "status"]) == 0


# -- a folder that does not exist ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [cli.main, library_cli.main])
def test_a_folder_that_does_not_exist_is_named_whole(main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "media" / "no"
    assert main(["verify", str(missing)]) == 1
    said = capsys.readouterr().err
    assert f"{missing} does not exist" in said
    assert "Check the path" in said
    missing.parent.mkdir()
    missing.write_text("")
    assert main(["verify", str(missing)]) == 1
    assert f"{missing} is not a directory" in capsys.readouterr().err
