"""What ``model-sync status`` says about a stick that is merely old, versions that failed or work, and a server that denies or is busy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_sync.agent import cli
from model_sync.agent.service import enrol, send_report
from model_sync.errors import LibraryUnreachable, ModelSyncError
from model_sync.settings import SyncSettings
from model_sync.trust.documents import ROLLOUT_ROLE
from tests.support.bad_server import BadServer, Reply
from tests.support.fleet_site import DIGEST, Centre, box_report, stamp
from tests.support.library_site import Site, make_site, tiny_bundle
from tests.support.sync_box import LINE, Box, days, expires, forge, make_box, newest, write_config


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


@pytest.fixture
def page(box: Box, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what ``status`` prints, with blanks collapsed."""

    def status(*, expect: int = 0) -> str:
        capsys.readouterr()
        assert run(box, "status") == expect
        return "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())

    return status


def tell(box: Box, report: dict[str, Any]) -> None:
    """Write the report that the appliance would write."""
    box.settings.exchange_dir.mkdir(exist_ok=True)
    (box.settings.exchange_dir / "box-report.json").write_text(json.dumps(report))


def stick(site: Site, directory: Path) -> Path:
    shutil.copytree(site.public, directory / "clinic-models")
    return directory


# -- a stick that is merely old


@pytest.mark.parametrize(("language", "word"), [("C.UTF-8", "outdated"), ("zh_CN.UTF-8", "过期未更新")])
@pytest.mark.parametrize("how", ["older", "expired", "part expired"])
def test_a_stick_that_is_merely_old_is_outdated_and_no_alarm(
    how: str, language: str, word: str, box: Box, site: Site, tmp_path: Path, page: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", language)
    if how == "older":
        usb = stick(site, tmp_path / "usb")
        site.library.refresh_timestamp()
        assert run(box, "pull") == 0
    else:
        forge(site, {"timestamp" if how == "expired" else ROLLOUT_ROLE: expires(days(-1))})
        usb = stick(site, tmp_path / "usb")
    assert run(box, "import-usb", str(usb)) in (1, 5)
    assert box.status()["state"] == "outdated"
    shown = page(expect=3)
    assert word in shown
    for alarm in ("cannot be trusted", "act now", "不可信"):
        assert alarm not in shown


def test_a_stick_whose_parts_contradict_each_other_is_not_called_outdated(box: Box, site: Site, tmp_path: Path) -> None:
    """A signed timestamp of today beside an earlier snapshot under its name: somebody has changed the stick."""
    assert run(box, "pull") == 0
    before = newest(site, "snapshot").signed.version
    site.rollout("stable", LINE, "0.1.0", percent=50.0)
    usb = stick(site, tmp_path / "usb")
    folder = usb / "clinic-models" / "metadata"
    shutil.copyfile(folder / f"{before}.snapshot.json", folder / f"{newest(site, 'snapshot').signed.version}.snapshot.json")
    assert run(box, "import-usb", str(usb)) == 1
    assert box.status()["state"] == "untrusted"


def test_a_forged_stick_stays_untrusted(box: Box, site: Site, tmp_path: Path, page: Callable[..., str]) -> None:
    forge(site, {}, signers={"timestamp": site.holders["snapshot"]})
    assert run(box, "import-usb", str(stick(site, tmp_path / "usb"))) == 1
    assert "cannot be trusted" in page(expect=1)


# -- versions that failed, and versions that work


def test_a_version_that_failed_is_named_with_its_reason(box: Box, page: Callable[..., str]) -> None:
    assert run(box, "pull") == 0
    tell(box, box_report("0.1.0", "failed", "model.self_test"))
    shown = page()
    assert f"Failed version {LINE} 0.1.0: The model failed its self-test [model.self_test]" in shown
    assert "0.1.0 failed on this box and is not tried again" in shown
    assert "the box activates it after its self-test" not in shown


def test_only_the_newest_activation_of_a_version_counts(box: Box, page: Callable[..., str]) -> None:
    assert run(box, "pull") == 0
    report = box_report("0.1.0")
    old = {"line": LINE, "version": "0.1.0", "digest": DIGEST, "state": "failed", "code": "activation.deadline", "at": stamp(-900)}
    tell(box, report | {"activations": [*report["activations"], old]})
    assert "Failed version" not in page()


def test_the_failed_versions_are_in_the_json(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(box, "pull") == 0
    tell(box, box_report("0.1.0", "rolled-back", "activation.failures"))
    capsys.readouterr()
    assert run(box, "status", "--json") == 0
    failed = json.loads(capsys.readouterr().out)["failed_versions"]
    assert [(item["version"], item["code"]) for item in failed] == [("0.1.0", "activation.failures")]


def test_a_hostile_reason_in_the_report_of_the_box_is_not_printed_raw(box: Box, page: Callable[..., str]) -> None:
    assert run(box, "pull") == 0
    tell(box, box_report("0.1.0", "failed", "\x1b[2Jzhangsan"))
    assert "\x1b" not in page()


@pytest.mark.parametrize(("state", "words"), [("good", "is in use on this box"), ("trial", "is in use on this box, in its trial")])
def test_a_version_that_works_is_not_said_to_be_activated_later(
    box: Box, state: str, words: str, page: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(box, "pull") == 0
    assert "the box activates it after its self-test" in page()
    tell(box, box_report("0.1.0", state))
    line = next(line for line in page().splitlines() if line.startswith("Model line"))
    assert line.endswith(f"0.1.0 {words}")
    assert run(box, "pull") == 0
    printed = capsys.readouterr().out
    assert f"{LINE} 0.1.0: {words}" in printed
    assert "the box activates it" not in printed


# -- denied access, and too many requests


def test_a_library_that_denies_access_is_named(box: Box, server: BadServer, page: Callable[..., str]) -> None:
    server.always("/metadata/timestamp.json", Reply(status=403))
    assert run(box, "pull") == 3
    shown = page(expect=3)
    assert "The library's server denies this box access [sync.denied]" in shown
    assert "Check the cable" not in shown


def test_a_library_that_answers_429_is_named(box: Box, server: BadServer, page: Callable[..., str]) -> None:
    server.always("/metadata/timestamp.json", Reply(status=429, headers={"Retry-After": "7"}))
    assert run(box, "pull") == 3
    assert "The server answered 429: too many requests [sync.rate]" in page(expect=3)


def test_a_centre_that_denies_or_is_busy_is_named_until_it_accepts_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    centre = Centre(tmp_path / "centre").start("--reports-per-hour", "1")
    try:
        box = make_box(tmp_path / "box", centre.site, centre.url, report_url=centre.url, ca_certificate=centre.ca)
        write_config(box)
        settings = SyncSettings.load(box.settings.state_dir)
        enrol(settings, centre.token(settings.box_id))
        assert send_report(settings) == "sent"

        def status() -> str:
            capsys.readouterr()
            run(box, "status")
            return " ".join(capsys.readouterr().out.split())

        assert "Central server it accepted the last request of this box" in status()
        tell(box, box_report("0.1.0"))
        with pytest.raises(LibraryUnreachable):
            send_report(settings)
        assert "The box reports too often [report.rate]" in status()
        assert "the centre answered 429, too many requests; it asks to wait" in status()
        centre.fleet.deny(settings.box_id, "test")
        with pytest.raises(ModelSyncError):
            send_report(settings)
        assert "Central server This box is denied [enrolment.denied] (since " in status()
        assert "Ask the central team why it is denied" in status()
        centre.stop()
        centre.fleet.allow(settings.box_id, "test")
        centre.start("--reports-per-hour", "100", port=int(centre.url.rpartition(":")[2]))
        assert send_report(settings) == "sent"
        assert "is denied" not in status()
    finally:
        centre.close()


def test_an_enrolment_that_is_refused_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    centre = Centre(tmp_path / "centre").start()
    try:
        box = make_box(tmp_path / "box", centre.site, centre.url, report_url=centre.url, ca_certificate=centre.ca)
        write_config(box)
        with pytest.raises(ModelSyncError):
            enrol(box.settings, "x" * 43)
        capsys.readouterr()
        run(box, "status")
        assert "The token is unknown, used or expired [enrolment.token]" in capsys.readouterr().out
    finally:
        centre.close()
