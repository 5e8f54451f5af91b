"""One line's trouble is that line's alone: what is missing, expired, withdrawn, ended or too large, and what went wrong unforeseen."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import TargetFile

from model_sync.agent import verified_bundle_cache
from model_sync.agent.library_view import MAX_DOCUMENT_BYTES
from model_sync.agent.sync_status import StatusFile
from model_sync.errors import LibraryUnreachable, ModelSyncError, TrustError
from model_sync.trust.documents import LineIndex, delta_path
from tests.bad_server import DOWN, BadServer, Reply
from tests.library_site import Site, make_site, tiny_bundle
from tests.sync_box import LINE, Box, days, expires, forge, make_box, newest, revoke

OTHER = "bone-age"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_site(tmp_path / "library", lines=(LINE, OTHER))
    for line in (LINE, OTHER):
        release(site, line, "1.0.0")
    return site


@pytest.fixture
def server(site: Site) -> Iterator[BadServer]:
    with BadServer(directory=site.public) as server:
        yield server


@pytest.fixture
def box(tmp_path: Path, site: Site, server: BadServer) -> Box:
    return make_box(tmp_path / "box", site, server.url)


def release(site: Site, line: str, version: str, **options: Any) -> None:
    """Publish a version and let the ring have it."""
    site.publish(tiny_bundle(site.public.parent / "made", version, line=line, **options))
    site.rollout("stable", line, version)


def code(error: ModelSyncError | None) -> str:
    return str(getattr(error, "code", ""))


def state(box: Box) -> tuple[str, str]:
    return box.status()["state"], box.status()["code"]


def decisions(pulled: Any) -> dict[str, str]:
    return {line: outcome.decision for line, outcome in pulled.lines.items()}


def served(site: Site, role: str, path: str) -> str:
    """The URL path of a target."""
    folder, _, name = path.rpartition("/")
    return f"/targets/{folder}/{newest(site, role).signed.targets[path].hashes['sha256']}.{name}"


def sign(site: Site, role: str, path: str, data: bytes) -> None:
    """A role signs bytes of its own at a path, and they are served."""
    target = TargetFile.from_data(path, data, ["sha256"])
    file = site.public / "targets" / target.get_prefixed_paths()[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    forge(site, {role: lambda signed: signed.targets.__setitem__(path, target)})


# -- the library's own word -------------------------------------------------------------------------------------------------


def test_an_ordinary_withdrawal_is_told_and_raises_no_alarm(box: Box, site: Site) -> None:
    box.pull()
    site.withdraw(LINE, "1.0.0", "misses effusions")
    release(site, OTHER, "1.1.0")
    pulled = box.pull()
    assert decisions(pulled) == {LINE: "withdrawn", OTHER: "ready"}
    assert pulled.worst is None
    assert state(box) == ("ok", "sync.ok")
    assert box.status()["last_problem"] is None
    said = box.status()["lines"][LINE]
    assert said["code"] == "trust.withdrawn"
    assert "misses effusions" in said["message"]
    assert box.facts().lines[LINE].index.withdrawal("1.0.0")
    assert (box.wants(LINE), box.wants(OTHER)) == ("1.0.0", "1.1.0")
    release(site, LINE, "1.1.0")
    box.pull()
    assert box.wants(LINE) == "1.1.0"
    assert "code" not in box.status()["lines"][LINE] or box.status()["lines"][LINE]["code"] == ""


def test_a_minimum_above_the_rollout_raises_no_alarm(box: Box, site: Site) -> None:
    box.pull()
    site.publish(tiny_bundle(site.public.parent / "made", "2.0.0", seed=1), minimum_version="2.0.0")
    assert box.pull().lines[LINE].decision == "below_minimum"
    assert state(box) == ("ok", "sync.ok")


def test_a_line_that_the_library_has_ended_is_told_to_the_box_no_more(box: Box, site: Site) -> None:
    box.pull()
    before = json.loads((box.settings.exchange_dir / "directives.json").read_text())
    forge(site, {"targets": revoke(OTHER)})
    pulled = box.pull()
    assert decisions(pulled) == {LINE: "ready", OTHER: "ended"}
    assert pulled.changed
    assert (box.wants(LINE), box.wants(OTHER)) == ("1.0.0", None)
    after = json.loads((box.settings.exchange_dir / "directives.json").read_text())
    assert after["serial"] == before["serial"] + 1
    assert after["lines"] == {LINE: before["lines"][LINE]}
    assert state(box) == ("ok", "sync.ok")
    again = box.pull()
    assert decisions(again) == {LINE: "ready", OTHER: "ended"}, "it is shown for as long as its bundle is here"
    assert not again.changed
    assert len(box.bundles()) == 1
    assert len(list((box.settings.exchange_dir / "bundles").iterdir())) == 2, "the model stays as it is"


def test_a_line_of_the_settings_that_was_ended_is_no_error_of_the_settings(box: Box, site: Site) -> None:
    followed = Box(box.settings.model_copy(update={"lines": [LINE, OTHER]}))
    followed.pull()
    forge(site, {"targets": revoke(OTHER)})
    for _ in range(2):
        assert followed.pull().lines[OTHER].decision == "ended"
        assert state(box) == ("ok", "sync.ok")


# -- expired ----------------------------------------------------------------------------------------------------------------


def test_a_line_that_has_expired_waits_for_its_signatures_and_the_others_go_on(box: Box, site: Site) -> None:
    box.pull()
    site.withdraw(LINE, "1.0.0")
    release(site, LINE, "1.1.0")
    forge(site, {OTHER: expires(days(-1))})
    pulled = box.pull()
    assert decisions(pulled) == {LINE: "ready", OTHER: "expired"}
    assert state(box) == ("waiting", "trust.part_expired")
    assert "renew" in box.status()["hint"]
    assert box.wants(LINE) == "1.1.0"
    assert box.wants(OTHER) == "1.0.0"
    assert box.facts().lines[LINE].index.withdrawal("1.0.0")
    forge(site, {OTHER: expires(days(90))})
    box.pull()
    assert state(box) == ("ok", "sync.ok")


def test_a_rollout_that_has_expired_stops_no_withdrawal(box: Box, site: Site) -> None:
    box.pull()
    site.withdraw(LINE, "1.0.0")
    forge(site, {"rollout": expires(days(-1))})
    pulled = box.pull()
    assert pulled.lines["rollout"].decision == "expired"
    assert state(box) == ("waiting", "trust.part_expired")
    assert box.facts().lines[LINE].index.withdrawal("1.0.0")


def test_a_forged_line_is_the_alarm_whatever_else_there_is_to_say(box: Box, site: Site) -> None:
    box.pull()
    site.withdraw(LINE, "1.0.0")
    forge(site, {OTHER: lambda _signed: None}, signers={OTHER: site.holders["rollout"]})
    pulled = box.pull()
    assert decisions(pulled) == {LINE: "withdrawn", OTHER: "refused"}
    assert state(box) == ("untrusted", "trust.signature")


def test_a_signed_document_that_is_nonsense_is_an_error_and_no_alarm(box: Box, site: Site) -> None:
    sign(site, OTHER, f"models/{OTHER}/line.json", b"{}")
    pulled = box.pull()
    assert decisions(pulled) == {LINE: "ready", OTHER: "refused"}
    assert state(box) == ("error", "trust.document")


# -- missing ----------------------------------------------------------------------------------------------------------------


def test_a_line_whose_index_is_missing_stops_neither_updates_nor_withdrawals_of_others(box: Box, site: Site, server: BadServer) -> None:
    box.pull()
    release(site, OTHER, "1.1.0")
    release(site, LINE, "1.1.0")
    site.withdraw(LINE, "1.0.0", "kills")
    server.always(served(site, OTHER, f"models/{OTHER}/line.json"), Reply(status=404))
    pulled = box.pull()
    assert decisions(pulled) == {LINE: "ready", OTHER: "unreachable"}
    assert code(pulled.problems[OTHER]) == "sync.incomplete"
    assert state(box) == ("unreachable", "sync.incomplete")
    assert (box.wants(LINE), box.wants(OTHER)) == ("1.1.0", "1.0.0")
    assert box.facts().lines[LINE].index.withdrawal("1.0.0")
    server.always(served(site, OTHER, f"models/{OTHER}/line.json"), Reply())
    box.pull()
    assert box.wants(OTHER) == "1.1.0"


@pytest.mark.parametrize("answer", [Reply(status=404), Reply(status=403), Reply(status=410)])
def test_a_line_whose_metadata_is_missing_stops_no_other(answer: Reply, box: Box, site: Site, server: BadServer) -> None:
    server.always(f"/metadata/{newest(site, OTHER).signed.version}.{OTHER}.json", answer)
    pulled = box.pull()
    assert decisions(pulled) == {LINE: "ready", OTHER: "unreachable"}
    assert box.wants(LINE) == "1.0.0"
    assert set(box.facts().lines) == {LINE}


def test_a_rollout_that_is_missing_stops_no_withdrawal(box: Box, site: Site, server: BadServer) -> None:
    box.pull()
    site.withdraw(LINE, "1.0.0", "kills")
    site.rollout("stable", OTHER, "1.0.0", percent=50)
    server.always(served(site, "rollout", "rollout/stable.json"), Reply(status=404))
    pulled = box.pull()
    assert code(pulled.problems["rollout"]) == "sync.incomplete"
    assert box.facts().lines[LINE].index.withdrawal("1.0.0")
    assert box.wants(LINE) == "1.0.0"


def test_a_line_whose_bundle_is_missing_stops_no_other(box: Box, site: Site, server: BadServer) -> None:
    server.always(served(site, OTHER, f"models/{OTHER}/1.0.0/model_fp32.onnx"), Reply(status=404))
    pulled = box.pull()
    assert code(pulled.problems[OTHER]) == "sync.incomplete"
    assert box.wants(LINE) == "1.0.0"


@pytest.mark.parametrize("answer", [Reply(cut_after=10), DOWN, Reply(hang_up=True)])
def test_a_line_that_breaks_in_a_document_leaves_the_box_the_whole_set_it_has(
    answer: Reply, box: Box, site: Site, server: BadServer
) -> None:
    box.pull()
    release(site, OTHER, "1.1.0")
    server.always(served(site, OTHER, f"models/{OTHER}/line.json"), answer)
    with pytest.raises(LibraryUnreachable):
        box.pull()
    assert set(box.facts().lines) == {LINE, OTHER}


# -- too large --------------------------------------------------------------------------------------------------------------


def test_a_timestamp_that_announces_a_huge_snapshot_is_refused_before_the_download(box: Box, site: Site, server: BadServer) -> None:
    box.pull()

    def boast(signed: Any) -> None:
        signed.snapshot_meta.length = 400 * 2**20
        signed.snapshot_meta.hashes = None

    forge(site, {"timestamp": boast})
    server.log.clear()
    with pytest.raises(TrustError) as caught:
        box.pull()
    assert caught.value.code == "trust.too_large"
    assert not any("snapshot" in request.path for request in server.log)
    assert box.facts().lines


def test_a_snapshot_that_announces_a_huge_line_stops_that_line_alone(box: Box, site: Site, server: BadServer) -> None:
    def boast(signed: Any) -> None:
        signed.meta[f"{OTHER}.json"].length = 5_000_001

    forge(site, {"snapshot": boast})
    pulled = box.pull()
    assert code(pulled.problems[OTHER]) == "trust.too_large"
    assert box.wants(LINE) == "1.0.0"
    assert not any(request.path.endswith(f"{OTHER}.json") for request in server.log)


@pytest.mark.parametrize("role", ["rollout", OTHER])
def test_a_document_of_any_length_is_not_downloaded(role: str, box: Box, site: Site, server: BadServer) -> None:
    box.pull()
    site.withdraw(LINE, "1.0.0")
    path = "rollout/stable.json" if role == "rollout" else f"models/{OTHER}/line.json"
    sign(site, role, path, b" " * (MAX_DOCUMENT_BYTES + 1))
    server.log.clear()
    pulled = box.pull()
    assert code(pulled.problems[role]) == "trust.too_large"
    assert served(site, role, path) not in [request.path for request in server.log]
    assert box.facts().lines[LINE].index.withdrawal("1.0.0")


def test_the_fullest_index_that_can_be_signed_is_not_too_large() -> None:
    line, moment, digests = "l" * 64, "2026-01-01T00:00:00Z", [f"{number:064x}" for number in range(2000)]
    versions = [f"{number}.0.0-{'v' * 54}" for number in range(100, 600)]
    deltas = [
        {"from_sha256": digest, "to_sha256": digest, "codec": "zstd-prefix", "length": 2**40}
        | {"path": delta_path(line, digest, digest, "zstd-prefix")}
        for digest in digests
    ]
    index = LineIndex.model_validate(
        {
            "line": line, "minimum_version": versions[0], "deltas": deltas,
            "versions": [{"version": version, "digest": digests[0], "published_at": moment} for version in versions],
            "withdrawn": [{"version": version, "reason": "误" * 300, "at": moment} for version in versions],
        }
    )  # fmt: skip
    assert 2**20 < len(index.to_json()) <= MAX_DOCUMENT_BYTES


def test_only_a_small_document_may_use_the_disks_reserve(box: Box, site: Site) -> None:
    full = Box(box.settings.model_copy(update={"disk_reserve_bytes": 10**15}))
    full.pull()
    site.withdraw(LINE, "1.0.0")
    full.pull()
    assert box.facts().lines[LINE].index.withdrawal("1.0.0"), "a withdrawal arrives"
    sign(site, OTHER, f"models/{OTHER}/line.json", b" " * 300_000)
    with pytest.raises(LibraryUnreachable) as caught:
        full.pull()
    assert caught.value.code == "sync.disk_full"
    assert state(box) == ("error", "sync.disk_full")


# -- damaged on the disk ----------------------------------------------------------------------------------------------------


def model_of(box: Box, line: str = LINE) -> Path:
    """The model file of the bundle that the box should run."""
    digest = json.loads((box.settings.exchange_dir / "directives.json").read_text())["lines"][line]["digest"]
    return box.settings.exchange_dir / "bundles" / digest / "model_fp32.onnx"


def rot(file: Path) -> bytes:
    """Flip one bit of a file as a disk does it: its length and its times stay."""
    good, before = file.read_bytes(), file.stat()
    with file.open("r+b") as stream:
        stream.seek(len(good) // 2)
        stream.write(bytes([good[len(good) // 2] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return good


def test_a_long_running_agent_notices_a_bundle_that_changed(box: Box) -> None:
    client = box.client()
    client.pull()
    good = model_of(box).read_bytes()
    model_of(box).write_bytes(b"rotten")
    client.pull()
    assert model_of(box).read_bytes() == good
    assert any("damaged" in note for note in box.status()["notes"])
    (model_of(box).parent / "manifest.json").unlink()
    client.pull()
    assert (model_of(box).parent / "manifest.json").is_file()


def test_a_bundle_that_the_box_refused_is_hashed_again_once(box: Box, server: BadServer) -> None:
    client = box.client()
    client.pull()
    good = rot(model_of(box))
    client.pull()
    assert model_of(box).read_bytes() != good, "nothing speaks against it yet"
    refusal = {"line": LINE, "digest": model_of(box).parent.name, "state": "failed", "code": "model.invalid", "at": "2026-01-01T00:00:00Z"}
    report = box.settings.exchange_dir / "box-report.json"
    report.write_text(json.dumps({"activations": [refusal, "nonsense"]}))
    client.pull()
    assert model_of(box).read_bytes() == good
    good = rot(model_of(box))
    client.pull()
    assert model_of(box).read_bytes() != good, "one refusal is one reason"
    report.write_text(json.dumps({"activations": [refusal, refusal | {"at": "2026-01-02T00:00:00Z"}]}))
    client.pull()
    assert model_of(box).read_bytes() == good


def test_a_bundle_is_hashed_again_once_a_day(box: Box) -> None:
    ticks = [0.0]
    client = box.client(ticks=lambda: ticks[0])
    client.pull()
    good = rot(model_of(box))
    ticks[0] += verified_bundle_cache.HASH_AGAIN_S - 1
    client.pull()
    assert model_of(box).read_bytes() != good
    ticks[0] += 1
    client.pull()
    assert model_of(box).read_bytes() == good


# -- unforeseen -------------------------------------------------------------------------------------------------------------


def test_what_nobody_foresaw_is_said_and_goes_on_up(box: Box, site: Site) -> None:
    box.pull()
    release(site, LINE, "1.1.0")
    with pytest.raises(ZeroDivisionError):
        box.pull(lambda _progress: 1 // 0)
    assert state(box) == ("error", "sync.error")
    assert "ZeroDivisionError" in box.status()["message"]
    assert box.status()["hint"]
    assert box.status()["progress"] is None
    assert box.client().busy() is None
    box.pull()
    assert state(box) == ("ok", "sync.ok")


def test_what_nobody_foresaw_in_a_look_is_said_too(box: Box) -> None:
    box.pull()

    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        box.pull(may_continue=fail)
    assert state(box) == ("error", "sync.error")
    assert "MemoryError" in box.status()["message"]


def test_a_pull_that_is_stopped_by_hand_says_so(box: Box) -> None:
    def interrupt(_progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        box.pull(interrupt)
    assert state(box) == ("waiting", "sync.stopped")


def test_what_a_kill_left_is_swept_and_a_role_with_such_a_name_is_not(box: Box) -> None:
    box.pull()
    left, role = box.metadata / "tmpa1b2c3d4", box.metadata / "tmp-lung.json"
    left.write_bytes(b"half")
    role.write_bytes(b"{}")
    box.pull()
    assert not left.exists()
    assert role.exists()


# -- a line that takes its time -----------------------------------------------------------------------------------------------


def test_a_pause_before_the_next_attempt_is_told(box: Box, server: BadServer) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> None:
        if (status := box.settings.exchange_dir / "sync-status.json").exists():
            seen.append(json.loads(status.read_text()))

    patient = Box(box.settings.model_copy(update={"attempts": 3, "backoff_s": 0.01}))
    server.always("/metadata/timestamp.json", DOWN)
    with pytest.raises(LibraryUnreachable):
        patient.pull(may_continue=look)
    told = [status["retry"] for status in seen if status["retry"]]
    assert told
    assert {"code", "message", "pause_s", "at"} <= set(told[0])
    assert told[0]["code"] == "sync.refused"
    assert box.status()["retry"] is None
    assert state(box)[0] == "unreachable"


def test_a_long_trouble_is_a_state_and_a_short_one_is_not(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 1, tzinfo=timezone.utc)
    ticks = [0.0]
    status = StatusFile(tmp_path, tmp_path, "b", lambda: moment, lambda: ticks[0])
    status.began()
    trouble = LibraryUnreachable("no answer", hint="wait")
    status.trying_again(trouble, 30.0)
    written = json.loads((tmp_path / "sync-status.json").read_text())
    assert written["state"] == "ok"
    assert written["retry"] == {"code": "sync.unreachable", "message": "no answer", "pause_s": 30.0, "at": "2026-01-01T00:00:30Z"}
    ticks[0] = 31.0
    status.trying_again(trouble, 100.0)
    written = json.loads((tmp_path / "sync-status.json").read_text())
    assert (written["state"], written["code"]) == ("unreachable", "sync.unreachable")
    assert "trying again in 100 s" in written["message"]


def test_one_client_counts_each_pull_for_itself(box: Box) -> None:
    client = box.client()
    first, second = client.pull().received_bytes, client.pull().received_bytes
    assert 0 < second < first
    assert box.status()["received_bytes"] == second


# -- another library --------------------------------------------------------------------------------------------------------


def test_a_box_that_is_given_another_librarys_root_follows_that_one(box: Box, site: Site, tmp_path: Path) -> None:
    box.pull()
    site.rollout("stable", LINE, "1.0.0", percent=99.0)
    box.pull()
    other = make_site(tmp_path / "new", lines=(LINE,))
    other.publish(tiny_bundle(tmp_path / "new-made", "3.0.0", seed=3))
    other.rollout("stable", LINE, "3.0.0")
    shutil.copyfile(other.root, box.settings.root)
    with BadServer(directory=other.public) as server:
        moved = Box(box.settings.model_copy(update={"urls": [server.url]}))
        with pytest.raises(TrustError):
            box.pull()  # the server of the old library, by whose signatures nothing counts any more
        pulled = moved.pull()
        assert pulled.lines[LINE].decision == "ready"
        assert moved.wants(LINE) == "3.0.0"
        assert set(moved.facts().lines) == {LINE}
        assert pulled.lines[OTHER].decision == "ended", "the new library does not have it"
        assert state(moved) == ("ok", "sync.ok")
        assert moved.pull().problems.keys() == {OTHER}
