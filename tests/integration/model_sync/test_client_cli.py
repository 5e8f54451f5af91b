"""The command `model-sync`: exit codes, words in two languages, and never a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_sync.agent import cli, cli_pull
from model_sync.agent.sync_status import Progress
from model_sync.errors import Action, BundleError, LibraryUnreachable, PublishError, SettingsError, TrustError, UsbIncomplete
from model_sync.settings import SyncSettings
from tests.support.bad_server import DOWN, BadServer, Reply
from tests.support.library_site import Site, make_site, tiny_bundle
from tests.support.sync_box import LINE, Box, forge, make_box, revoke, write_config

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
def server(site: Site) -> Iterator[BadServer]:
    with BadServer(directory=site.public) as server:
        yield server


@pytest.fixture
def box(tmp_path: Path, site: Site, server: BadServer) -> Box:
    box = make_box(tmp_path / "box", site, server.url)
    write_config(box)
    return box


def run(box: Box, *command: str) -> int:
    return cli.main(["--config", str(box.settings.state_dir), *command])


# -- init -------------------------------------------------------------------------------------------------------------------


def init(tmp_path: Path, root: Path, *more: str) -> int:
    state, exchange = str(tmp_path / "s"), str(tmp_path / "e")
    return cli.main(["init", "--state", state, "--exchange", exchange, "--root", str(root), "--box-id", "box-7", *more])


def test_init_lays_settings_that_work(tmp_path: Path, site: Site, server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path, site.root, "--url", server.url, "--url", "http://127.0.0.1:1", "--ring", "stable") == 0
    settings = SyncSettings.load(tmp_path / "s")
    assert settings.urls == [server.url, "http://127.0.0.1:1"]
    assert settings.root.read_bytes() == site.root.read_bytes()
    assert settings.exchange_dir == tmp_path / "e"
    assert "root version 1" in capsys.readouterr().out
    assert cli.main(["--config", str(tmp_path / "s"), "pull"]) == 0
    assert init(tmp_path, site.root) == 2, "what is there is not forgotten"


def test_init_refuses_what_is_no_root_and_a_bad_name(tmp_path: Path, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path, tmp_path / "none.json") == 1
    assert init(tmp_path, site.public / "metadata" / "timestamp.json") == 1
    assert init(tmp_path, site.root, "--ring", "No Ring") == 2
    (tmp_path / "s").write_text("a file")
    assert init(tmp_path, site.root) == 2
    assert capsys.readouterr().err.count("hint:") == 4


# -- pull -------------------------------------------------------------------------------------------------------------------


def test_pull_says_what_came(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(box, "pull") == 0
    out = capsys.readouterr().out
    assert f"{LINE} 0.1.0: received; the box activates it after its self-test" in out
    assert "bytes received" in out


def test_the_exit_code_tells_untrusted_unreachable_and_waiting_apart(box: Box, site: Site, server: BadServer) -> None:
    server.always("/metadata/timestamp.json", DOWN)
    assert run(box, "pull") == 3
    assert run(box, "status") == 3
    server.always("/metadata/timestamp.json", Reply())
    write_config(Box(box.settings.model_copy(update={"day_budget_bytes": 9000})))
    assert run(box, "pull") == 4
    assert run(box, "status") == 4
    write_config(box)
    site.rollout("stable", LINE, "0.1.0", percent=0.0)
    assert run(box, "pull") == 0
    assert run(box, "status") == 0
    site.rollout("stable", LINE, "0.1.0")
    forge(site, {"targets": revoke("rollout")})
    assert run(box, "pull") == 0
    write_config(Box(box.settings.model_copy(update={"lines": ["absent"]})))
    assert run(box, "pull") == 2
    assert run(box, "status") == 3
    server.always("/metadata/timestamp.json", Reply(garble=0))
    write_config(box)
    forge(site, {}, signers={"timestamp": site.holders["snapshot"]})
    server.always("/metadata/timestamp.json", Reply())
    assert run(box, "pull") == 1
    assert run(box, "status") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (TrustError("m", hint="h"), 1),
        (BundleError("c", "m", "h"), 1),
        (PublishError("m", hint="h"), 1),
        (SettingsError("m", hint="h"), 2),
        (LibraryUnreachable("m", hint="h"), 3),
        (LibraryUnreachable("m", hint="h", code="sync.disk_full"), 3),
        (LibraryUnreachable("m", hint="h", code="sync.window", action=Action.WAIT), 4),
        (LibraryUnreachable("m", hint="h", code="sync.busy", action=Action.WAIT), 4),
        (UsbIncomplete("m", hint="h"), 1),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error: Any, code: int) -> None:
    assert cli.exit_code(error) == code


def test_a_terminal_sees_one_line_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((Terminal(), "\r\x1b[Ka.onnx: 1.0 / 2.0 MiB\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with cli_pull.ProgressLine() as progress_line:
            progress_line.show(Progress("a.onnx", 2**20, 2**21))
        assert stream.getvalue() == expected


def test_a_stick_is_imported_and_one_that_is_none_refused(box: Box, site: Site, tmp_path: Path) -> None:
    assert run(box, "import-usb", str(site.public)) == 0
    assert run(box, "import-usb", str(tmp_path / "nothing")) == 1


def test_missing_or_wrong_settings_are_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", str(tmp_path), "pull"]) == 2
    assert "model-sync init" in capsys.readouterr().err


def test_a_stop_by_hand_is_no_traceback(box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from model_sync.agent.client import Client

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "pull", interrupt)
    assert run(box, "pull") == 130
    assert "kept" in capsys.readouterr().err


# -- status -------------------------------------------------------------------------------------------------------------------


def test_status_of_a_box_that_never_ran(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(box, "status") == 0
    assert "model-sync pull" in capsys.readouterr().out


def test_status_says_what_runs_what_is_wanted_what_is_wrong_and_what_to_do(
    box: Box, server: BadServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(box, "pull")
    report = {"models": [{"line": LINE, "version": "0.0.9", "state": "active"}]}
    (box.settings.exchange_dir / "box-report.json").write_text(json.dumps(report))
    server.stop()
    run(box, "pull")
    capsys.readouterr()
    run(box, "status")
    out = capsys.readouterr().out
    assert f"{LINE}: runs 0.0.9 (active); wanted 0.1.0" in out
    assert "the library cannot be reached" in out
    assert "since 20" in out
    assert "Check the cable" in out
    server.start()
    run(box, "pull")
    capsys.readouterr()
    assert run(box, "status") == 0
    assert "Last problem" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("language", "unreadable", "absent"),
    [("C", "own report cannot be read", "has left no report here"), ("zh_CN.UTF-8", "设备自身的报告无法读取", "没有在此留下报告")],
)
def test_status_says_when_the_report_of_the_box_is_absent_or_cannot_be_read(
    box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], language: str, unreadable: str, absent: str
) -> None:
    """Two accounts without a common group: the box's report was missing from the fleet, without a message."""
    monkeypatch.setenv("LC_ALL", language)
    run(box, "pull")
    capsys.readouterr()
    assert run(box, "status") == 0
    out = capsys.readouterr().out
    assert absent in out
    assert "packaging/make_accounts.sh" in out
    (box.settings.exchange_dir / "box-report.json").mkdir()  # what no account can read as a file, root included
    assert run(box, "status") == 3
    out = capsys.readouterr().out
    assert unreadable in out
    assert "packaging/make_accounts.sh" in out
    assert run(box, "status", "--json") == 3
    assert json.loads(capsys.readouterr().out)["box_report"] == "box_report.unreadable"


def test_status_in_chinese(box: Box, server: BadServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    server.always("/metadata/timestamp.json", DOWN)
    run(box, "pull")
    run(box, "status")
    out = capsys.readouterr().out
    assert "无法连接模型库" in out
    assert "处理办法" in out


def test_status_while_a_download_runs_and_after_it_was_cut(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def look(_progress: Any) -> None:
        run(box, "status")
        seen.append(capsys.readouterr().out)

    box.pull(look)
    assert str(os.getpid()) in seen[0]
    assert "MiB" in seen[0]
    status = box.status() | {
        "state": "downloading",
        "code": "sync.downloading",
        "progress": {"file": "x", "done_bytes": "?", "total_bytes": 1},
    }
    (box.settings.exchange_dir / "sync-status.json").write_text(json.dumps(status))
    run(box, "status")
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"last_attempt_at": "x"}', '{"last_attempt_at": "x", "state": 7, "lines": 7, "notes": 7, "clock": 7, "last_problem": 7}',
        '{"last_attempt_at": "x", "state": "untrusted", "code": "trust.new", "lines": {"a": 7, "b": {}}, "notes": ["n"]}',
    ],
)  # fmt: skip
def test_a_damaged_status_is_no_traceback(text: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    box.settings.exchange_dir.mkdir()
    (box.settings.exchange_dir / "sync-status.json").write_text(text)
    assert run(box, "status") in (0, 1)
    assert "box-1" in capsys.readouterr().out


def test_status_as_json(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    run(box, "pull")
    capsys.readouterr()
    run(box, "status", "--json")
    status = json.loads(capsys.readouterr().out)
    assert status["directives"][LINE]["version"] == "0.1.0"
    assert status["history"][-1]["state"] == "ok"
    assert status["working_process"] is None


# -- the other commands ---------------------------------------------------------------------------------------------------------


def test_check_takes_its_directories_from_the_settings_or_from_the_command(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(box, "check") == 1
    run(box, "pull")
    capsys.readouterr()
    assert run(box, "check") == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert cli.main(["check", "--exchange", str(box.settings.exchange_dir), "--root", str(box.settings.root)]) == 0


def test_check_loads_neither_the_network_nor_numpy(box: Box) -> None:
    code = (
        "import sys; from model_sync.agent.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'requests', 'urllib3', 'numpy', 'onnx', 'tuf.ngclient', 'flask'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    box.pull()
    command = ["check", "--exchange", str(box.settings.exchange_dir), "--root", str(box.settings.root)]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_prints_every_key(box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(box, "settings") == 0
    out = capsys.readouterr().out
    for name in SyncSettings.model_fields:
        assert re.search(rf"^(# )?{name} =", out, re.MULTILINE), name
    assert 'box_id = "box-1"' in out
    assert cli.main(["--config", str(tmp_path / "none"), "settings"]) == 0
    assert "# box_id =" in capsys.readouterr().out


def test_verify_says_whether_a_bundle_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tiny_bundle(tmp_path, "0.9.0"))]) == 0
    assert "intact" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("hint:") == 1


def test_the_agents_commands_are_handed_on(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model_sync.agent import service

    calls: list[Any] = []
    monkeypatch.setattr(service, "enrol", lambda settings, token: calls.append((settings.box_id, token)))
    monkeypatch.setattr(service, "send_report", lambda settings: calls.append(("report", settings.box_id)) or "sent")
    monkeypatch.setattr(service, "run", lambda settings: calls.append(("run", settings.box_id)) or 0)
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("other\n"))
    assert run(box, "enrol", "--token-file", str(tmp_path / "token")) == 0
    assert run(box, "enrol", "--token-file", "-") == 0
    assert run(box, "enrol", "--token-file", str(tmp_path / "none")) == 2
    assert run(box, "report") == 0
    assert run(box, "run") == 0
    assert calls == [("box-1", "secret"), ("box-1", "other"), ("report", "box-1"), ("run", "box-1")]


# -- texts --------------------------------------------------------------------------------------------------------------------


def test_errors_are_said_in_both_languages(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "none")
    for name, error, hint in (
        ("C", "error: ", "hint: "),
        ("zh_CN.UTF-8", "错误：同步代理的设置有误 [sync.settings]（", "提示：请修改 sync.toml"),
    ):
        monkeypatch.setenv("LC_ALL", name)
        assert run(box, "enrol", "--token-file", absent) == 2
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith(error) and absent in first
        assert second.startswith(hint)


def test_the_module_runs_as_a_program(box: Box) -> None:
    done = subprocess.run([sys.executable, "-m", "model_sync", "--help"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0
    for command in ("init", "run", "pull", "status", "import-usb", "check", "enrol", "report", "settings", "verify"):
        assert command in done.stdout
