"""The pull: decisions, deltas, budgets, disks, and what the box is told, over a real server that misbehaves when asked to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import TargetFile

from model_sync.agent import process_lock, sync_status
from model_sync.agent.exchange import Exchange
from model_sync.agent.sync_status import StatusFile
from model_sync.errors import Action, LibraryUnreachable, ModelSyncError, TrustError
from model_sync.transport.fetcher import Fetcher
from model_sync.trust.rollback_protection import Clocks
from tests.support.activation_box import change_manifest
from tests.support.bad_server import CAPTIVE_PORTAL, DOWN, BadServer, Reply
from tests.support.library_site import Site, make_site, tiny_bundle
from tests.support.sync_box import LINE, Box, days, forge, make_box, newest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_site(tmp_path / "library")
    site.publish(tiny_bundle(tmp_path / "made"))
    site.rollout("stable", LINE, "0.1.0")
    return site


@pytest.fixture
def server(site: Site) -> Iterator[BadServer]:
    with BadServer(directory=site.public) as server:
        yield server


@pytest.fixture
def box(tmp_path: Path, site: Site, server: BadServer) -> Box:
    return make_box(tmp_path / "box", site, server.url)


LICENCE = b"the same in every version"


def release(site: Site, version: str, **options: Any) -> Path:
    """Publish a version, which holds a licence, and let the ring have it."""
    bundle = tiny_bundle(site.public.parent / "made", version, **options)
    (bundle / "LICENCE.txt").write_bytes(LICENCE)
    entry = {"file": "LICENCE.txt", "sha256": hashlib.sha256(LICENCE).hexdigest()}
    change_manifest(bundle, lambda manifest: manifest["documents"].append(entry))
    site.publish(bundle)
    site.rollout("stable", LINE, version)
    return bundle


def code(error: ModelSyncError | None) -> str:
    return str(getattr(error, "code", ""))


def with_settings(box: Box, **values: Any) -> Box:
    return Box(box.settings.model_copy(update=values))


# -- what a pull does -------------------------------------------------------------------------------------------------------


def test_a_pull_brings_the_version_of_the_ring_and_tells_the_box(box: Box) -> None:
    result = box.pull()
    assert result.changed
    assert result.lines[LINE].decision == "ready"
    assert box.bundles() == {"0.1.0"}
    directives = json.loads((box.settings.exchange_dir / "directives.json").read_text())
    assert directives["serial"] == 1
    assert directives["lines"][LINE]["source"] == "library"
    assert directives["lines"][LINE]["digest"] == box.facts().to_dict()["lines"][LINE]["versions"]["0.1.0"]
    status = box.status()
    assert (status["state"], status["code"]) == ("ok", "sync.ok")
    assert status["last_success_at"] == status["last_attempt_at"] or status["last_success_at"] > status["last_attempt_at"]
    assert not list((box.settings.state_dir / "parts").glob("*.part"))


def test_an_idle_poll_costs_less_than_5_kb_on_the_wire(box: Box, server: BadServer) -> None:
    box.pull()
    server.log.clear()
    result = box.pull()
    wire = sum(request.sent_bytes + request.received_bytes for request in server.log)
    assert not result.changed
    assert [request.path for request in server.log] == ["/metadata/2.root.json", "/metadata/timestamp.json"]
    assert wire < 5000, wire
    print(f"an idle poll: {wire} bytes, {result.received_bytes} of them bodies")


def test_a_second_version_comes_as_a_delta_and_shares_what_has_not_changed(box: Box, site: Site, server: BadServer) -> None:
    release(site, "0.2.0", seed=2, hidden=300)
    box.pull()
    plain = release(site, "0.3.0", seed=2, hidden=300, drift=1e-3)
    server.log.clear()
    box.pull()
    paths = [request.path for request in server.log]
    assert any(path.startswith("/targets/deltas/") for path in paths)
    assert not any(path.endswith((".onnx", "LICENCE.txt")) for path in paths)
    assert box.wants() == "0.3.0"
    sent = sum(request.body_bytes for request in server.log if request.path.startswith("/targets"))
    assert sent < 0.8 * (plain / "model_fp32.onnx").stat().st_size
    assert not list((box.settings.state_dir).glob("deltas/*"))


def wrong_delta(site: Site, what: str) -> None:
    """The line's role signs a delta that builds something else."""
    path = next(path for path in newest(site, LINE).signed.targets if path.startswith("deltas/"))
    data = os.urandom(1000)

    def edit(targets: Any) -> None:
        if what == "absent":
            del targets.targets[path]
            return
        targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        folder, _, name = path.rpartition("/")
        (site.public / "targets" / folder / f"{targets.targets[path].hashes['sha256']}.{name}").write_bytes(data)

    forge(site, {LINE: edit})


@pytest.mark.parametrize("what", ["noise", "absent"])
def test_a_delta_that_fails_costs_one_try_and_the_whole_file_comes(what: str, box: Box, site: Site, server: BadServer) -> None:
    release(site, "0.2.0", seed=2, hidden=300)
    box.pull()
    release(site, "0.3.0", seed=2, hidden=300, drift=1e-3)
    wrong_delta(site, what)
    cut = Reply(cut_after=20_000)

    def cut_the_model(_request: Any) -> Reply:
        return cut

    model = next(path for path in newest(site, LINE).signed.targets if path.endswith("0.3.0/model_fp32.onnx"))
    target = newest(site, LINE).signed.targets[model]
    folder, _, name = model.rpartition("/")
    server.script(f"/targets/{folder}/{target.hashes['sha256']}.{name}", cut_the_model)
    stopped = box.pull()
    assert code(stopped.problems[LINE]) == "sync.unreachable"
    assert box.wants() == "0.2.0"
    assert any("delta" in note for note in box.status()["notes"])
    server.log.clear()
    box.pull()
    assert box.wants() == "0.3.0"
    assert not any(request.path.startswith("/targets/deltas/") for request in server.log), "it is not tried again"


@pytest.mark.parametrize(
    "answer", [Reply(status=404), Reply(status=403), Reply(status=500), Reply(headers={"Content-Length": "7"}, body=b"garbage")]
)
def test_a_delta_that_the_server_lost_costs_a_question_and_the_whole_file_comes(
    answer: Reply, box: Box, site: Site, server: BadServer
) -> None:
    release(site, "0.2.0", seed=2, hidden=300)
    box.pull()
    release(site, "0.3.0", seed=2, hidden=300, drift=1e-3)
    path = next(path for path in newest(site, LINE).signed.targets if path.startswith("deltas/"))
    folder, _, name = path.rpartition("/")
    server.always(f"/targets/{folder}/{newest(site, LINE).signed.targets[path].hashes['sha256']}.{name}", answer)
    assert box.pull().problems == {}
    assert box.wants() == "0.3.0"
    assert box.status()["state"] == "ok"
    assert any("no delta" in note for note in box.status()["notes"]), "it is said"


def test_a_delta_that_a_broken_line_interrupts_goes_on_later(box: Box, site: Site, server: BadServer) -> None:
    release(site, "0.2.0", seed=2, hidden=300)
    box.pull()
    release(site, "0.3.0", seed=2, hidden=300, drift=1e-3)
    path = next(path for path in newest(site, LINE).signed.targets if path.startswith("deltas/"))
    folder, _, name = path.rpartition("/")
    url = f"/targets/{folder}/{newest(site, LINE).signed.targets[path].hashes['sha256']}.{name}"
    server.script(url, Reply(cut_after=1000))
    assert code(box.pull().problems[LINE]) == "sync.unreachable"
    server.log.clear()
    box.pull()
    assert box.wants() == "0.3.0"
    assert url in [request.path for request in server.log]
    assert not any(request.path.endswith(".onnx") for request in server.log)


def test_a_delta_from_a_damaged_file_is_no_use_and_no_harm(box: Box, site: Site) -> None:
    release(site, "0.2.0", seed=2, hidden=300)
    box.pull()
    release(site, "0.3.0", seed=2, hidden=300, drift=1e-3)
    for model in box.settings.exchange_dir.glob("bundles/*/model_fp32.onnx"):
        model.write_bytes(model.read_bytes()[:-1] + b"\0")
    for gate in box.settings.exchange_dir.glob("bundles/*/gate.json"):
        gate.write_bytes(b"{}")
    box.pull()
    assert box.wants() == "0.3.0"


# -- decisions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rollout", "decision"),
    [
        ({"percent": 0.0}, "not_chosen"),
        ({"paused": True}, "paused"),
        ({"start": days(2)}, "not_yet"),
    ],
)
def test_what_is_not_for_this_box_is_not_downloaded(rollout: Any, decision: str, box: Box, site: Site) -> None:
    site.rollout("stable", LINE, "0.1.0", **rollout)
    result = box.pull()
    assert result.lines[LINE].decision == decision
    assert box.bundles() == set()
    assert box.wants() is None
    assert box.status()["lines"][LINE]["decision"].startswith(decision)
    assert box.status()["state"] == "ok"
    assert box.facts().lines[LINE], "the facts come all the same"


def test_a_ring_without_a_rollout_wants_nothing(box: Box) -> None:
    result = with_settings(box, ring="canary").pull()
    assert result.code == "sync.no_rollout"
    assert box.status()["state"] == "ok"
    assert box.wants() is None


def test_only_the_lines_of_the_settings_are_followed(tmp_path: Path) -> None:
    site = make_site(tmp_path / "library", lines=(LINE, "other"))
    for line in (LINE, "other"):
        site.publish(tiny_bundle(tmp_path, line=line))
        site.rollout("stable", line, "0.1.0")
    with BadServer(directory=site.public) as server:
        box = make_box(tmp_path / "box", site, server.url, lines=["other"])
        assert set(box.pull().lines) == {"other", LINE}
        assert (box.wants("other"), box.wants(LINE)) == ("0.1.0", None)
        unknown = make_box(tmp_path / "box2", site, server.url, lines=["absent", "other"])
        result = unknown.pull()
    assert result.lines["absent"].decision == "unknown"
    assert (unknown.status()["state"], unknown.status()["code"]) == ("error", "sync.settings")
    assert unknown.wants("other") == "0.1.0"


def test_a_line_that_is_installed_is_asked_about_although_no_rollout_names_it(tmp_path: Path) -> None:
    site = make_site(tmp_path / "library", lines=(LINE, "embedded"))
    site.publish(tiny_bundle(tmp_path))
    site.publish(tiny_bundle(tmp_path, line="embedded"))
    site.rollout("stable", LINE, "0.1.0")
    with BadServer(directory=site.public) as server:
        box = make_box(tmp_path / "box", site, server.url)
        box.pull()
        assert set(box.facts().lines) == {LINE}
        report = {"models": [{"line": "embedded", "version": "0.1.0"}, {"line": "never-published"}]}
        (box.settings.exchange_dir / "box-report.json").write_text(json.dumps(report))
        site.withdraw("embedded", "0.1.0")
        result = box.pull()
    assert result.lines["embedded"].decision == "none"
    assert box.facts().lines["embedded"].index.withdrawal("0.1.0")
    assert not result.problems


def rollout_of(site: Site, change: Any) -> None:
    """The rollout role signs something of its own."""
    path = "rollout/stable.json"

    def edit(targets: Any) -> None:
        target = targets.targets[path]
        raw = (site.public / "targets" / "rollout" / f"{target.hashes['sha256']}.stable.json").read_bytes()
        data = change(raw)
        targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        (site.public / "targets" / "rollout" / f"{targets.targets[path].hashes['sha256']}.stable.json").write_bytes(data)

    forge(site, {"rollout": edit})


def test_a_rollout_that_names_what_the_line_never_signed_is_refused_and_other_lines_go_on(tmp_path: Path) -> None:
    site = make_site(tmp_path / "library", lines=(LINE, "other"))
    for line in (LINE, "other"):
        site.publish(tiny_bundle(tmp_path, line=line))
        site.rollout("stable", line, "0.1.0")
    rollout_of(site, lambda raw: raw.replace(b"0.1.0", b"0.6.6", 1))
    with BadServer(directory=site.public) as server:
        box = make_box(tmp_path / "box", site, server.url)
        result = box.pull()
    assert code(result.problems[LINE]) == "trust.unknown"
    assert box.wants("other") == "0.1.0"
    assert box.status()["state"] == "untrusted"


@pytest.mark.parametrize(
    "change", [lambda _raw: b"{}", lambda raw: raw.replace(b'"stable"', b'"canary"'), lambda raw: raw.replace(b"{", b"[", 1)]
)
def test_a_rollout_that_is_signed_and_wrong_stops_no_withdrawal(change: Any, box: Box, site: Site) -> None:
    box.pull()
    site.withdraw(LINE, "0.1.0")
    rollout_of(site, change)
    result = box.pull()
    assert code(result.problems["rollout"]) == "trust.document"
    assert box.facts().lines[LINE].index.withdrawal("0.1.0")
    assert box.wants() == "0.1.0"


def test_a_withdrawn_version_is_refused_and_the_directive_stays(box: Box, site: Site) -> None:
    box.pull()
    site.withdraw(LINE, "0.1.0")
    result = box.pull()
    assert code(result.problems[LINE]) == "trust.withdrawn"
    assert box.wants() == "0.1.0", "the box switches it off by the facts"


def test_a_version_below_the_minimum_is_refused(box: Box, site: Site) -> None:
    site.publish(tiny_bundle(site.public.parent / "made", "0.2.0", seed=1), minimum_version="0.2.0")
    result = box.pull()
    assert code(result.problems[LINE]) == "trust.below_minimum"
    assert box.wants() is None


def test_the_central_team_may_go_back_to_an_older_version_that_still_holds(box: Box, site: Site) -> None:
    release(site, "0.2.0", seed=1)
    box.pull()
    site.rollout("stable", LINE, "0.1.0")
    box.pull()
    assert box.wants() == "0.1.0"


# -- signed, and wrong ------------------------------------------------------------------------------------------------------


def resign(site: Site, version: str, file: str, data: bytes) -> None:
    """The line's role signs other bytes for one file of a version."""
    path = f"models/{LINE}/{version}/{file}"

    def edit(targets: Any) -> None:
        targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        folder, _, name = path.rpartition("/")
        (site.public / "targets" / folder / f"{targets.targets[path].hashes['sha256']}.{name}").write_bytes(data)

    forge(site, {LINE: edit})


def test_a_file_that_is_signed_with_another_digest_than_the_manifest_gives(box: Box, site: Site) -> None:
    resign(site, "0.1.0", "gate.json", b"{}")
    result = box.pull()
    assert code(result.problems[LINE]) == "trust.document"
    assert box.bundles() == set()


def test_a_manifest_that_is_signed_with_another_digest_than_the_index_gives(box: Box, site: Site) -> None:
    resign(site, "0.1.0", "manifest.json", b"{}")
    assert code(box.pull().problems[LINE]) == "trust.document"


@pytest.mark.parametrize("manifest", ["nonsense", "another line", "another version"])
def test_an_index_that_names_what_is_no_manifest_of_the_version(manifest: str, box: Box, site: Site) -> None:
    raw = next((site.public / "targets" / "models" / LINE / "0.1.0").glob("*.manifest.json")).read_bytes()
    data = {
        "nonsense": b"{}",
        "another line": raw.replace(f'"{LINE}"'.encode(), b'"other"', 1),
        "another version": raw.replace(b'"0.1.0"', b'"0.9.0"', 1),
    }[manifest]
    resign(site, "0.1.0", "manifest.json", data)
    index_path = f"models/{LINE}/line.json"

    def edit(targets: Any) -> None:
        old = targets.targets[index_path].hashes["sha256"]
        index = json.loads((site.public / "targets" / "models" / LINE / f"{old}.line.json").read_bytes())
        index["versions"][0]["digest"] = targets.targets[f"models/{LINE}/0.1.0/manifest.json"].hashes["sha256"]
        text = json.dumps(index).encode()
        targets.targets[index_path] = TargetFile.from_data(index_path, text, ["sha256"])
        name = targets.targets[index_path].hashes["sha256"]
        (site.public / "targets" / "models" / LINE / f"{name}.line.json").write_bytes(text)

    forge(site, {LINE: edit})
    result = box.pull()
    assert code(result.problems[LINE]) == "trust.document"
    assert box.bundles() == set()


def model_url(site: Site, version: str = "0.1.0") -> str:
    path = f"models/{LINE}/{version}/model_fp32.onnx"
    return f"/targets/models/{LINE}/{version}/{newest(site, LINE).signed.targets[path].hashes['sha256']}.model_fp32.onnx"


def test_noise_on_the_line_is_healed_by_one_more_download(box: Box, site: Site, server: BadServer) -> None:
    server.script(model_url(site), Reply(garble=100))
    box.pull()
    assert box.wants() == "0.1.0"


def test_wrong_bytes_twice_are_untrusted(box: Box, site: Site, server: BadServer) -> None:
    server.always(model_url(site), Reply(garble=100))
    result = box.pull()
    assert code(result.problems[LINE]) == "trust.digest"
    assert box.status()["state"] == "untrusted"
    assert box.bundles() == set()
    server.always(model_url(site), Reply())
    box.pull()
    assert box.wants() == "0.1.0"


def test_a_line_that_stops_stops_the_others_and_is_no_matter_of_trust(tmp_path: Path) -> None:
    site = make_site(tmp_path / "library", lines=("a", "b"))
    for line in ("a", "b"):
        site.publish(tiny_bundle(tmp_path, line=line))
        site.rollout("stable", line, "0.1.0")
    with BadServer(directory=site.public) as server:
        path = "models/a/0.1.0/model_fp32.onnx"
        target = newest(site, "a").signed.targets[path].hashes["sha256"]
        server.always(f"/targets/models/a/0.1.0/{target}.model_fp32.onnx", DOWN)
        box = make_box(tmp_path / "box", site, server.url)
        result = box.pull()
        assert {name: line.decision for name, line in result.lines.items()} == {"a": "unreachable", "b": "unreachable"}
        assert not any("/models/b/0.1.0" in request.path for request in server.log)
    assert box.status()["state"] == "unreachable"


def test_the_library_must_be_there_when_the_last_byte_has_come(box: Box, server: BadServer) -> None:
    def vanish(_progress: Any) -> None:
        server.always("/metadata/timestamp.json", CAPTIVE_PORTAL)

    with pytest.raises(LibraryUnreachable) as caught:
        box.pull(vanish)
    assert caught.value.code == "sync.not_the_library"
    assert box.bundles() == {"0.1.0"}
    assert box.wants() is None
    server.always("/metadata/timestamp.json", Reply())
    server.log.clear()
    box.pull()
    assert box.wants() == "0.1.0"
    assert not any(request.path.startswith("/targets/models") for request in server.log)


def strike_once(blow: Any) -> Any:
    struck: list[Any] = []
    return lambda _progress: struck or struck.append(blow())


def test_a_rollout_that_is_paused_while_the_bundle_comes_is_obeyed(box: Box, site: Site) -> None:
    result = box.pull(strike_once(lambda: site.rollout("stable", LINE, "0.1.0", paused=True)))
    assert result.lines[LINE].decision == "paused"
    assert box.wants() is None
    assert box.bundles() == {"0.1.0"}


def test_a_rollout_that_moves_on_while_the_bundle_comes_is_followed_by_the_next_pull(box: Box, site: Site) -> None:
    result = box.pull(strike_once(lambda: release(site, "0.2.0", seed=1)))
    assert result.lines[LINE].decision == "not_yet"
    assert box.wants() is None
    box.pull()
    assert box.wants() == "0.2.0"


def test_a_rollout_that_is_broken_while_the_bundle_comes_tells_the_box_nothing(box: Box, site: Site) -> None:
    result = box.pull(strike_once(lambda: rollout_of(site, lambda _raw: b"{}")))
    assert code(result.problems["rollout"]) == "trust.document"
    assert box.wants() is None


def test_a_file_that_is_signed_anew_while_the_bundle_comes_is_another_bundle(box: Box, site: Site) -> None:
    result = box.pull(strike_once(lambda: resign(site, "0.1.0", "gate.json", b"{}")))
    assert code(result.problems[LINE]) == "trust.document"
    assert box.wants() is None


def test_a_pause_keeps_what_has_come(box: Box, site: Site, server: BadServer) -> None:
    server.always(model_url(site), DOWN)
    box.pull()
    site.rollout("stable", LINE, "0.1.0", paused=True)
    box.pull()
    site.rollout("stable", LINE, "0.1.0")
    server.always(model_url(site), Reply())
    server.log.clear()
    box.pull()
    assert [request.path for request in server.log if request.path.startswith("/targets/models")] == [model_url(site)]


# -- windows, budgets, disks --------------------------------------------------------------------------------------------------


def test_outside_its_window_a_bundle_waits_and_the_facts_come(box: Box, server: BadServer) -> None:
    night = with_settings(box, windows=["22:00-06:00"])
    result = night.pull(local_now=lambda: datetime(2026, 1, 1, 12))
    assert code(result.problems[LINE]) == "sync.window"
    assert result.lines[LINE].decision == "waiting"
    assert (box.status()["state"], box.status()["code"]) == ("waiting", "sync.window")
    assert box.facts().lines[LINE]
    assert not any("manifest" in request.path for request in server.log)
    night.pull(local_now=lambda: datetime(2026, 1, 1, 23))
    assert box.wants() == "0.1.0"
    assert night.pull(local_now=lambda: datetime(2026, 1, 1, 12)).problems == {}, "what is here needs no window"


def test_a_window_that_closes_keeps_what_has_come(box: Box, site: Site, server: BadServer) -> None:
    release(site, "0.2.0", seed=1, hidden=400)
    clock = iter([datetime(2026, 1, 1, 23)] * 12)
    night = with_settings(box, windows=["22:00-06:00"])
    stopped = night.pull(local_now=lambda: next(clock, datetime(2026, 1, 1, 7)))
    assert code(stopped.problems[LINE]) == "sync.window"
    first = server.log[:]
    server.log.clear()
    night.pull(local_now=lambda: datetime(2026, 1, 2, 1))
    assert box.wants() == "0.2.0"
    done = {request.path for request in first if request.body_bytes and request.path.startswith("/targets/models")}
    again = {request.path for request in server.log if request.path.startswith("/targets/models")} & done
    assert len(again) <= 1, "only the piece under way is asked for again, and from where it stopped"


def test_a_pull_that_is_asked_to_stop_stops_and_waits(box: Box) -> None:
    asked = threading.Event()

    def stop() -> None:
        if asked.is_set():
            raise LibraryUnreachable("the agent was stopped", hint="start it", code="sync.stopped", action=Action.WAIT)

    result = box.pull(lambda _progress: asked.set(), check_stop=stop)
    assert code(result.problems[LINE]) == "sync.stopped"
    assert box.status()["state"] == "waiting"
    assert box.facts().lines
    with pytest.raises(LibraryUnreachable):
        box.pull(check_stop=stop)
    assert box.status()["code"] == "sync.stopped"


def test_over_its_budget_of_the_day_a_bundle_waits(box: Box, site: Site) -> None:
    release(site, "0.2.0", seed=1, hidden=400)
    poor = with_settings(box, day_budget_bytes=300_000)
    result = poor.pull()
    assert code(result.problems[LINE]) == "sync.budget"
    assert box.status()["state"] == "waiting"
    assert box.wants() is None
    box.pull()
    assert box.wants() == "0.2.0"


def test_a_disk_that_cannot_take_the_bundle_is_said_before_the_first_byte(box: Box, server: BadServer) -> None:
    poor = with_settings(box, disk_reserve_bytes=shutil.disk_usage("/").free * 2)
    result = poor.pull()
    assert code(result.problems[LINE]) == "sync.disk_full"
    assert box.status()["state"] == "error"
    assert not any(request.path.endswith(".onnx") for request in server.log)
    assert not any(request.path.endswith("gate.json") for request in server.log)


DISK_SCENARIO = """
import json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from model_sync.agent.client import Client
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.settings import SyncSettings
from model_sync.bundle import ModelBundle
from model_sync.trust import offline_check
disk = Path(sys.argv[1])
settings = SyncSettings.parse(dict(state_dir=disk / "state", exchange_dir=disk / "exchange", root=sys.argv[2], box_id="b",
                                   urls=[sys.argv[3]], attempts=1, disk_reserve_bytes=0, backoff_s=0))
ballast = disk / "ballast"
ballast.touch()
def fill(free):
    os.truncate(ballast, 0)
    with open(ballast, "ab", buffering=0) as stream:
        try:
            while True:
                if stream.write(b"x" * 4096) < 4096: break
        except OSError:
            pass
    size = ballast.stat().st_size
    os.truncate(ballast, max(0, size - free))
def outcome(on_progress=None):
    try:
        pulled = Client(settings).pull(on_progress)
    except LibraryUnreachable as error:
        return error.code
    assert not any(isinstance(error, TrustError) for error in pulled.problems.values()), pulled
    return next((error.code for error in pulled.problems.values()), pulled.lines["cxr-pneumonia"].decision)
def visible():
    bundles = disk / "exchange" / "bundles"
    return [ModelBundle.load(path) for path in bundles.glob("[!.]*")] if bundles.is_dir() else []
def facts():
    try:
        return bool(offline_check.check(settings.exchange_dir, settings.root).lines)
    except TrustError as error:
        assert error.code == "trust.missing", error
        return False
seen, free = [], 0
while "ready" not in seen:
    for name in ("state", "exchange"):
        shutil.rmtree(disk / name, ignore_errors=True)
    fill(free)
    seen.append(outcome())
    assert facts() or not visible()
    os.truncate(ballast, 0)
    assert outcome() == "ready", "with room again it goes on by itself"
    assert facts() and visible()
    free += int(sys.argv[4])
for name in ("state", "exchange"):
    shutil.rmtree(disk / name)
struck = []
seen.append(outcome(lambda progress: struck or struck.append(fill(0))))
assert facts() and not visible()
os.truncate(ballast, 0)
assert outcome() == "ready"
print(json.dumps(seen))
"""


def in_a_small_disk(tmp_path: Path, script: str, *arguments: str) -> str:
    """Run a script in a mount namespace of its own, where its first argument is a disk of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    file = tmp_path / "scenario.py"
    file.write_text(script)
    inner = f'mount -t tmpfs -o size=1500k tmpfs "{disk}" && exec "$@"'
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    probe = subprocess.run(["unshare", "--mount", *own, "sh", "-c", inner, "sh", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("this machine lets nobody mount a small disk (unshare --mount)")
    command = ["unshare", "--mount", *own, "sh", "-c", inner, "sh", sys.executable, str(file), str(disk), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("step_bytes", "steps"), [(16_384, 5), pytest.param(4096, 20, marks=pytest.mark.long)])
def test_a_full_disk_at_every_step_costs_nothing_but_time(
    box: Box, site: Site, server: BadServer, tmp_path: Path, step_bytes: int, steps: int
) -> None:
    script = DISK_SCENARIO.format(root=str(ROOT))
    seen = json.loads(in_a_small_disk(tmp_path, script, str(site.root), server.url, str(step_bytes)))
    print(f"{seen.count('sync.disk_full')} times full, {step_bytes} bytes more of room each time")
    assert set(seen) == {"ready", "sync.disk_full"}
    assert seen.count("sync.disk_full") >= steps, "it was full at many steps"
    assert seen[-1] == "sync.disk_full", "and in the middle of a download"


READ_ONLY_SCENARIO = """
import subprocess, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from model_sync.agent.client import Client
from model_sync.errors import LibraryUnreachable
from model_sync.settings import SyncSettings
from model_sync.trust import offline_check
disk = Path(sys.argv[1])
settings = SyncSettings.parse(dict(state_dir=disk / "state", exchange_dir=disk / "exchange", root=sys.argv[2], box_id="b",
                                   urls=[sys.argv[3]], attempts=1, disk_reserve_bytes=0))
Client(settings).pull()
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
try:
    Client(settings).pull()
except LibraryUnreachable as error:
    print(error.code)
assert offline_check.check(settings.exchange_dir, settings.root).lines
"""


def test_a_disk_that_became_read_only_is_the_boxs_own_fault(box: Box, site: Site, server: BadServer, tmp_path: Path) -> None:
    said = in_a_small_disk(tmp_path, READ_ONLY_SCENARIO.format(root=str(ROOT)), str(site.root), server.url)
    assert said.strip() == "sync.state"


@pytest.mark.parametrize("which", ["state_dir", "exchange_dir"])
def test_a_directory_that_cannot_be_made_is_the_boxs_own_fault(which: str, box: Box, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    broken = with_settings(box, **{which: tmp_path / "file" / "below"})
    with pytest.raises(LibraryUnreachable) as caught:
        broken.pull()
    assert caught.value.code == "sync.state"
    if which == "state_dir":
        assert box.status()["code"] == "sync.state"


# -- the exchange directory -------------------------------------------------------------------------------------------------


def test_a_bundle_that_was_damaged_on_the_disk_is_fetched_again(box: Box, server: BadServer) -> None:
    box.pull()
    model = next(box.settings.exchange_dir.glob("bundles/*/model_fp32.onnx"))
    model.write_bytes(b"rust")
    server.log.clear()
    box.pull()
    assert box.bundles() == {"0.1.0"}
    assert any("damaged" in note for note in box.status()["notes"])
    fetched = [request.path for request in server.log if request.path.startswith("/targets/models")]
    assert len(fetched) == 1, "its other files are still right"


def test_old_bundles_go_only_when_nothing_names_them_and_three_newer_are_here(box: Box, site: Site) -> None:
    box.pull()
    for number in range(2, 6):
        release(site, f"0.{number}.0", seed=number)
        box.pull()
    assert box.bundles() == {f"0.{number}.0" for number in range(1, 6)}, "a box that has said nothing keeps them all"
    first = next(bundle for bundle in Exchange(box.settings.exchange_dir).bundles() if bundle.manifest.version == "0.1.0")
    report = {"models": [{"line": LINE, "digest": first.digest}]}
    (box.settings.exchange_dir / "box-report.json").write_text(json.dumps(report))
    box.pull()
    assert box.bundles() == {"0.1.0", "0.3.0", "0.4.0", "0.5.0"}
    assert any("removed" in note for note in box.status()["notes"])


def test_the_remains_of_a_version_that_nobody_wants_any_more_are_removed(box: Box, site: Site) -> None:
    bundles = box.settings.exchange_dir / "bundles"
    for left in (f".{'0' * 64}.1.part", f".{'0' * 64}.2.part"):
        (bundles / left).mkdir(parents=True)
    box.pull()
    assert not list(bundles.glob(".*"))


def test_two_halves_of_one_bundle_become_one(box: Box, site: Site, server: BadServer) -> None:
    server.always(model_url(site), DOWN)
    box.pull()
    bundles = box.settings.exchange_dir / "bundles"
    (half,) = bundles.glob(".*.part")
    half.rename(half.with_name(half.name.replace(f".{os.getpid()}.", ".1.")))
    shutil.copytree(next(bundles.glob(".*.part")), bundles / next(bundles.glob(".*.part")).name.replace(".1.", ".2."))
    (next(bundles.glob(".*.2.part")) / "stray").write_text("left by somebody")
    (next(bundles.glob(".*.1.part")) / "stray").write_text("left by somebody")
    server.always(model_url(site), Reply())
    server.log.clear()
    box.pull()
    assert box.bundles() == {"0.1.0"}
    assert [request.path for request in server.log if request.path.startswith("/targets/models")] == [model_url(site)]


@pytest.mark.parametrize("text", ["", "[]", '{"lines": 7}', '{"lines": {}, "serial": "x"}'])
def test_damaged_directives_are_written_anew(text: str, box: Box) -> None:
    box.pull()
    (box.settings.exchange_dir / "directives.json").write_text(text)
    box.pull()
    assert box.wants() == "0.1.0"


@pytest.mark.parametrize("text", ["", "[]", '{"models": 7}', '{"models": [7]}'])
def test_a_report_of_the_box_that_says_nothing_drops_nothing(text: str, box: Box) -> None:
    box.pull()
    (box.settings.exchange_dir / "box-report.json").write_text(text)
    assert Exchange(box.settings.exchange_dir).reported_models() is None
    assert Exchange(box.settings.exchange_dir).remove_old_bundles() == []


def test_what_is_no_bundle_among_the_bundles_is_passed_over(box: Box) -> None:
    box.pull()
    bundles = box.settings.exchange_dir / "bundles"
    (bundles / ("f" * 64)).mkdir()
    (bundles / "note.txt").write_text("x")
    assert len(list(Exchange(box.settings.exchange_dir).bundles())) == 1


@pytest.mark.parametrize("file", ["manifest.json", "MODEL_CARD.md"])
def test_a_file_that_changes_on_the_disk_while_the_rest_comes_is_the_disks_fault(file: str, box: Box) -> None:
    def rot(_progress: Any) -> None:
        for path in box.settings.exchange_dir.glob(f"bundles/.*.part/{file}"):
            path.write_bytes(path.read_bytes() + b" ")

    result = box.pull(rot)
    assert code(result.problems[LINE]) == "sync.state"
    assert box.bundles() == set()
    box.pull()
    assert box.wants() == "0.1.0"


def test_where_the_disk_knows_no_hard_links_files_are_copied(box: Box, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    box.pull()
    release(site, "0.2.0", seed=1)

    def none(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    box.pull()
    assert box.bundles() == {"0.1.0", "0.2.0"}


def test_one_client_may_pull_again_and_again(box: Box, site: Site) -> None:
    client = box.client()
    assert [client.pull().changed for _ in range(3)] == [True, False, False]
    shutil.rmtree(box.settings.exchange_dir / "bundles")
    client.pull()
    assert box.bundles() == {"0.1.0"}


def test_a_set_that_was_laid_before_a_kill_is_used(box: Box) -> None:
    box.pull()
    (box.settings.exchange_dir / "trust").unlink()
    box.pull()
    assert box.facts().lines
    assert len(list(box.settings.exchange_dir.glob(".trust-*"))) == 1


def test_a_fetcher_of_the_callers_is_his_to_close(box: Box) -> None:
    fetcher = Fetcher(box.settings, box.settings.state_dir / "parts")
    box.pull(fetcher=fetcher)
    assert box.wants() == "0.1.0"
    assert box.pull(fetcher=fetcher).received_bytes < fetcher.received_bytes
    fetcher.close()


def test_a_line_whose_role_has_signed_no_index_yet_has_no_facts(box: Box, site: Site) -> None:
    def edit(targets: Any) -> None:
        targets.targets.clear()

    forge(site, {LINE: edit})
    result = box.pull()
    assert code(result.problems[LINE]) == "trust.unknown"
    assert box.facts().problems[LINE].code == "trust.missing"


TWO_DISKS_SCENARIO = """
import shutil, subprocess, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from model_sync.agent.client import Client
from model_sync.settings import SyncSettings
disk = Path(sys.argv[1])
exchange = Path(sys.argv[4])
settings = SyncSettings.parse(dict(state_dir=disk / "state", exchange_dir=exchange, root=sys.argv[2], box_id="b", urls=[sys.argv[3]],
                                   attempts=1, disk_reserve_bytes=0))
print(Client(settings).pull().problems["cxr-pneumonia"])
"""


def test_the_disk_of_the_parts_is_asked_too_when_it_is_another_one(box: Box, site: Site, server: BadServer, tmp_path: Path) -> None:
    release(site, "0.2.0", seed=1, hidden=700)
    said = in_a_small_disk(tmp_path, TWO_DISKS_SCENARIO.format(root=str(ROOT)), str(site.root), server.url, str(tmp_path / "exchange"))
    assert str(tmp_path / "disk") in said
    assert "bytes of disk space" in said
    assert not any(request.path.endswith(".onnx") for request in server.log)


TWO_LINES_SCENARIO = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from model_sync.agent.client import Client
from model_sync.settings import SyncSettings
disk = Path(sys.argv[1])
settings = SyncSettings.parse(dict(state_dir=disk / "state", exchange_dir=disk / "exchange", root=sys.argv[2], box_id="b",
                                   urls=[sys.argv[3]], attempts=1, disk_reserve_bytes=0))
pulled = Client(settings).pull()
print(*(f"{{name}}:{{line.decision}}:{{getattr(line.problem, 'code', '')}}" for name, line in pulled.lines.items()))
"""


def test_a_line_that_does_not_fit_on_the_disk_stops_no_other(box: Box, site: Site, server: BadServer, tmp_path: Path) -> None:
    release(site, "0.2.0", seed=1, hidden=700)
    site.publish(tiny_bundle(tmp_path / "made", line="small"))
    site.rollout("stable", "small", "0.1.0")
    said = in_a_small_disk(tmp_path, TWO_LINES_SCENARIO.format(root=str(ROOT)), str(site.root), server.url)
    assert said.split() == [f"{LINE}:error:sync.disk_full", "small:ready:"]


# -- one at a time, status and history ----------------------------------------------------------------------------------------


def test_a_second_agent_is_told_who_is_at_work(box: Box) -> None:
    client = box.client()
    assert client.working_process() is None
    seen = []

    def second(_progress: Any) -> None:
        seen.append(client.working_process())
        with pytest.raises(LibraryUnreachable, match=str(os.getpid())) as caught:
            box.client().pull()
        assert caught.value.code == "sync.busy"

    client.pull(second)
    assert seen
    assert set(seen) == {str(os.getpid())}
    assert box.status()["state"] == "ok"


def test_somebody_who_only_asks_does_not_stand_in_the_way(box: Box) -> None:
    box.pull()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            process_lock.holder_pid(box.settings.state_dir)

    passphrase_source = threading.Thread(target=ask)
    passphrase_source.start()
    try:
        for _ in range(3):
            box.pull()
    finally:
        stop.set()
        passphrase_source.join()


def test_a_lock_without_a_number_names_nobody(tmp_path: Path) -> None:
    with process_lock.hold(tmp_path):
        (tmp_path / "lock").write_bytes(b"\xff")
        assert process_lock.holder_pid(tmp_path) == "unknown"


def test_the_status_says_since_when_and_keeps_the_last_problem(box: Box, server: BadServer) -> None:
    box.pull()
    server.always("/metadata/timestamp.json", DOWN)
    for _ in range(2):
        with pytest.raises(LibraryUnreachable):
            box.pull()
    first = box.status()
    assert first["since"] <= first["at"]
    server.always("/metadata/timestamp.json", Reply())
    box.pull()
    status = box.status()
    assert status["state"] == "ok"
    assert status["last_problem"]["code"] == first["code"]
    assert [outcome["state"] for outcome in box.client().status()["history"]] == ["ok", "unreachable", "unreachable", "ok"]


def test_the_history_is_bounded_and_survives_a_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_status, "MAX_HISTORY_BYTES", 2000)
    status = StatusFile(tmp_path, tmp_path, "b", lambda: datetime(2026, 1, 1, tzinfo=timezone.utc))
    clocks = Clocks(datetime(2026, 1, 1, tzinfo=timezone.utc), datetime(2026, 1, 1, tzinfo=timezone.utc))
    for _ in range(100):
        status.end(None, {}, clocks, 7)
    assert (tmp_path / "history.jsonl").stat().st_size < 3000
    with (tmp_path / "history.jsonl").open("a") as stream:
        stream.write('{"torn')
    assert all(outcome["state"] == "ok" for outcome in status.history())


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    status = StatusFile(tmp_path / "file", tmp_path / "file", "b", lambda: datetime(2026, 1, 1, tzinfo=timezone.utc))
    status.begin()
    moment = datetime(2026, 1, 1, tzinfo=timezone.utc)
    status.end(TrustError("x", hint="y"), {}, Clocks(moment, moment), 0)
    assert status.history() == []
    assert "could not be written" in caplog.text


def test_progress_is_told_and_written(box: Box, site: Site) -> None:
    release(site, "0.2.0", seed=1, hidden=400)
    told: list[Any] = []
    written: list[Any] = []

    def hear(progress: Any) -> None:
        told.append(progress)
        written.append(box.status())

    box.pull(hear)
    assert written[0]["state"] == "downloading"
    assert written[0]["progress"]["total_bytes"] == told[0].total_bytes
    assert max(progress.done_bytes for progress in told) <= told[0].total_bytes
    assert [progress.done_bytes for progress in told] == sorted(progress.done_bytes for progress in told)
    assert box.status()["progress"] is None
