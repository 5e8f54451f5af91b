"""Import from a USB stick: the same checks as on the line, no network, and words for somebody who holds a stick."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from model_sync.agent import process_lock
from model_sync.errors import LibraryUnreachable, ModelSyncError, TrustError
from model_sync.library.usb_export import export
from tests.bad_server import DOWN, BadServer
from tests.library_site import Site, make_site, tiny_bundle
from tests.sync_box import LINE, Box, days, expires, forge, make_box, newest

MARK = "clinic-models"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_site(tmp_path / "library")
    site.publish(tiny_bundle(tmp_path / "made"))
    site.rollout("stable", LINE, "0.1.0", percent=0.0, start=days(30))
    return site


@pytest.fixture
def box(tmp_path: Path, site: Site) -> Box:
    return make_box(tmp_path / "box", site)


def stick(site: Site, directory: Path) -> Path:
    """What the library serves, as `export-usb` lays it on a stick."""
    shutil.copytree(site.public, directory / MARK)
    return directory


def refused(box: Box, directory: Path) -> ModelSyncError:
    with pytest.raises(ModelSyncError) as caught:
        box.client().import_usb(directory)
    assert "model in use stays" in caught.value.hint + caught.value.message
    return caught.value


def code(error: ModelSyncError | None) -> str:
    return str(getattr(error, "code", ""))


def test_a_stick_brings_the_version_of_the_ring_without_percent_or_start(
    box: Box, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usb = stick(site, tmp_path / "usb")

    def no_network(*_: Any) -> None:
        raise AssertionError("no network at all")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    pulled = box.client(local_now=lambda: days(0)).import_usb(usb)
    assert pulled.changed
    assert pulled.received_bytes == 0
    assert box.wants() == "0.1.0"
    directives = json.loads((box.settings.exchange_dir / "directives.json").read_text())
    assert directives["lines"][LINE]["source"] == "usb"
    assert box.status()["state"] == "ok"
    assert box.facts().lines[LINE]


def test_the_folder_itself_may_be_given(box: Box, site: Site, tmp_path: Path) -> None:
    box.client().import_usb(stick(site, tmp_path / "usb") / MARK)
    assert box.wants() == "0.1.0"


def test_a_pull_that_tries_a_dead_line_again_and_again_makes_way_for_a_stick(box: Box, site: Site, tmp_path: Path) -> None:
    with BadServer() as server:
        server.always("*", DOWN)
        changes = {"urls": [server.url], "attempts": 20, "backoff_s": 300.0, "max_backoff_s": 300.0}
        patient = Box(box.settings.model_copy(update=changes)).client()
        ended: list[ModelSyncError] = []

        def pull() -> None:
            try:
                patient.pull()
            except ModelSyncError as error:
                ended.append(error)

        thread = threading.Thread(target=pull)
        thread.start()
        while not server.log or patient.busy() is None:
            assert thread.is_alive()
            time.sleep(0.01)
        box.client().import_usb(stick(site, tmp_path / "usb"))
        thread.join(30)
    assert [code(error) for error in ended] == ["sync.stopped"]
    assert box.wants() == "0.1.0"
    assert not process_lock.wanted(box.settings.state_dir)


def test_somebody_who_died_waiting_holds_up_no_pull(box: Box) -> None:
    box.settings.state_dir.mkdir(parents=True, exist_ok=True)
    (box.settings.state_dir / process_lock.WANTED_FILE).touch()
    assert not process_lock.wanted(box.settings.state_dir)


def test_a_stick_asks_no_window(box: Box, site: Site, tmp_path: Path) -> None:
    closed = Box(box.settings.model_copy(update={"windows": ["03:00-03:01"]}))
    closed.client().import_usb(stick(site, tmp_path / "usb"))
    assert box.wants() == "0.1.0"


def test_a_pause_holds_on_a_stick_too(box: Box, site: Site, tmp_path: Path) -> None:
    site.rollout("stable", LINE, "0.1.0", paused=True)
    assert box.client().import_usb(stick(site, tmp_path / "usb")).lines[LINE].decision == "paused"
    assert box.wants() is None


def test_a_withdrawal_holds_on_a_stick_too(box: Box, site: Site, tmp_path: Path) -> None:
    site.withdraw(LINE, "0.1.0")
    assert code(box.client().import_usb(stick(site, tmp_path / "usb")).problems[LINE]) == "trust.withdrawn"


def test_a_stick_older_than_the_box_is_refused(box: Box, site: Site, tmp_path: Path) -> None:
    old = stick(site, tmp_path / "old")
    site.publish(tiny_bundle(tmp_path / "made", "0.2.0", seed=1))
    box.client().import_usb(stick(site, tmp_path / "new"))
    error = refused(box, old)
    assert code(error) == "trust.rollback"
    assert "older than this box" in error.message
    shutil.rmtree(box.metadata)
    assert code(refused(box, old)) == "trust.rollback", "also when its memory was emptied"
    assert box.status()["code"] == "trust.rollback"


def test_an_expired_stick_is_refused(box: Box, site: Site, tmp_path: Path) -> None:
    forge(site, {"timestamp": expires(days(-1))})
    error = refused(box, stick(site, tmp_path / "usb"))
    assert code(error) == "trust.expired"
    assert "stick has expired" in error.message


def test_a_stick_of_another_library_is_refused(box: Box, tmp_path: Path) -> None:
    other = make_site(tmp_path / "other")
    error = refused(box, stick(other, tmp_path / "usb"))
    assert code(error) == "trust.foreign_root"


def test_a_strangers_root_of_any_length_is_not_read_into_memory(box: Box, site: Site, tmp_path: Path) -> None:
    usb = stick(make_site(tmp_path / "other"), tmp_path / "usb")
    os.truncate(usb / MARK / "metadata" / "1.root.json", 2**30)
    tracemalloc.start()
    try:
        assert code(refused(box, usb)) == "trust.foreign_root"
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_a_stick_with_a_forged_signature_is_not_called_foreign(box: Box, site: Site, tmp_path: Path) -> None:
    usb = stick(site, tmp_path / "usb")
    file = usb / MARK / "metadata" / "timestamp.json"
    file.write_bytes(file.read_bytes().replace(b'"version":', b'"version":1'))
    assert code(refused(box, usb)) == "trust.signature"


@pytest.mark.parametrize("missing", ["metadata/timestamp.json", "snapshot", "targets", "metadata"])
def test_an_incomplete_stick_is_refused(missing: str, box: Box, site: Site, tmp_path: Path) -> None:
    usb = stick(site, tmp_path / "usb")
    path = usb / MARK / missing
    if not path.exists() or missing == "targets":
        path = usb / MARK / "metadata" / f"{newest(site, missing).signed.version}.{missing}.json"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = refused(box, usb)
    assert isinstance(error, LibraryUnreachable)
    assert error.code == "usb.incomplete"
    assert box.wants() is None


@pytest.mark.parametrize("missing", [LINE, "targets/models", "targets/rollout"])
def test_a_stick_that_lacks_what_a_line_has_signed_is_incomplete_for_that_line(missing: str, box: Box, site: Site, tmp_path: Path) -> None:
    usb = stick(site, tmp_path / "usb")
    path = usb / MARK / missing
    if not path.exists():
        path = usb / MARK / "metadata" / f"{newest(site, missing).signed.version}.{missing}.json"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    box = Box(box.settings.model_copy(update={"lines": [LINE]}))
    pulled = box.client().import_usb(usb)
    assert code(pulled.worst) == "usb.incomplete"
    assert box.status()["code"] == "usb.incomplete"
    assert box.wants() is None


def test_a_stick_that_lacks_a_file_of_the_bundle_says_which(box: Box, site: Site, tmp_path: Path) -> None:
    usb = stick(site, tmp_path / "usb")
    next((usb / MARK / "targets" / "models" / LINE / "0.1.0").glob("*.model_fp32.onnx")).unlink()
    pulled = box.client().import_usb(usb)
    problem = pulled.problems[LINE]
    assert code(problem) == "usb.incomplete"
    assert "model_fp32.onnx" in problem.message
    assert box.wants() is None
    assert box.bundles() == set()


@pytest.mark.parametrize("how", ["only the new version", "the old one was withdrawn"])
def test_a_stick_without_the_delta_brings_the_whole_file(how: str, box: Box, site: Site, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path / "made", "1.0.0", seed=2, hidden=300))
    site.rollout("stable", LINE, "1.0.0")
    box.client().import_usb(stick(site, tmp_path / "first"))
    site.publish(tiny_bundle(tmp_path / "made", "2.0.0", seed=2, hidden=300, drift=1e-3))
    site.rollout("stable", LINE, "2.0.0")
    assert site.library.index(LINE).deltas, "the index offers one"
    (usb := tmp_path / "usb").mkdir()
    if how == "only the new version":
        export(site.public, usb, versions=["2.0.0"])
    else:
        site.withdraw(LINE, "1.0.0")
        export(site.public, usb)
    assert not (usb / MARK / "targets" / "deltas").exists()
    assert box.client().import_usb(usb).problems == {}
    assert box.wants() == "2.0.0"
    assert any("no delta" in note for note in box.status()["notes"])


def test_an_altered_file_on_a_stick_is_refused(box: Box, site: Site, tmp_path: Path) -> None:
    usb = stick(site, tmp_path / "usb")
    model = next((usb / MARK / "targets" / "models" / LINE / "0.1.0").glob("*.model_fp32.onnx"))
    raw = bytearray(model.read_bytes())
    raw[100] ^= 1
    model.write_bytes(bytes(raw))
    problem = box.client().import_usb(usb).problems[LINE]
    assert isinstance(problem, TrustError)
    assert problem.code == "trust.digest"
    assert "stick" in problem.message
    assert box.bundles() == set()


def test_a_stick_need_not_carry_every_line(tmp_path: Path) -> None:
    site = make_site(tmp_path / "library", lines=(LINE, "other"))
    for line in (LINE, "other"):
        site.publish(tiny_bundle(tmp_path, line=line))
        site.rollout("stable", line, "0.1.0")
    with BadServer(directory=site.public) as server:
        box = make_box(tmp_path / "box", site, server.url)
        box.pull()
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=1))
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=1, line="other"))
    site.rollout("stable", LINE, "0.2.0")
    usb = stick(site, tmp_path / "usb")
    shutil.rmtree(usb / MARK / "targets" / "models" / "other")
    pulled = box.client().import_usb(usb)
    assert pulled.lines["other"].decision == "absent"
    assert box.status()["state"] == "ok"
    assert box.wants(LINE) == "0.2.0"
    assert set(box.facts().lines) == {LINE}


def test_what_is_no_stick_says_what_to_do(box: Box, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LibraryUnreachable, match="clinic-models") as caught:
        box.client().import_usb(tmp_path / "empty")
    assert caught.value.code == "usb.incomplete"


def test_a_broken_disk_of_the_box_is_no_fault_of_the_stick(box: Box, site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    broken = Box(box.settings.model_copy(update={"exchange_dir": tmp_path / "file" / "below"}))
    with pytest.raises(LibraryUnreachable) as caught:
        broken.client().import_usb(stick(site, tmp_path / "usb"))
    assert caught.value.code == "sync.state"
