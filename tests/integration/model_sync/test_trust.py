"""Trust over time: clocks that are wrong, metadata that is lost, old, expired or revoked; and what `check` says of it, offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import DelegatedRole, Delegations, Key, Targets
from tuf.ngclient import Updater

from model_sync import atomic_files
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.transport.fetcher import Fetcher
from model_sync.trust import metadata, trusted_metadata
from model_sync.trust.rollback_protection import BUILT_AT, Clocks, RollbackState, issued_at
from model_sync.trust.tuf_client import TufClient
from tests.support.bad_server import CAPTIVE_FORBIDDEN, CAPTIVE_PORTAL, DOWN, BadServer, Reply
from tests.support.library_site import Site, make_site, serve, tiny_bundle
from tests.support.sync_box import LINE, Box, days, expires, forge, make_box, newest, revoke, write_config

ROOT = Path(__file__).resolve().parents[3]
DAWN = datetime(1970, 1, 2, tzinfo=timezone.utc)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_site(tmp_path / "library")
    site.publish(tiny_bundle(tmp_path))
    site.rollout("stable", LINE, "0.1.0")
    return site


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    with serve(site.public) as url:
        yield url


@pytest.fixture
def box(tmp_path: Path, site: Site, url: str) -> Box:
    return make_box(tmp_path / "box", site, url)


def at_another_time(moment: str, box: Box) -> subprocess.CompletedProcess[str]:
    """A real `model-sync pull` under another system clock."""
    command = ["faketime", moment, sys.executable, "-m", "model_sync", "--config", str(write_config(box)), "pull"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


# -- the clock ------------------------------------------------------------------------------------------------------------


def test_a_clock_at_1970_neither_hides_nor_hinders(box: Box, site: Site, url: str, tmp_path: Path) -> None:
    first = at_another_time("1970-01-02 00:00:00", box)
    assert first.returncode == 0, first.stderr
    assert box.wants() == "0.1.0"
    forge(site, {"timestamp": expires(days(-1))})
    # The stock client believes the clock, and with it metadata that expired yesterday.
    stock = (
        "import sys; from tuf.ngclient import Updater;Updater(sys.argv[1], sys.argv[2], bootstrap=open(sys.argv[3], 'rb').read()).refresh()"
    )
    (tmp_path / "stock").mkdir()
    arguments = [sys.executable, "-c", stock, str(tmp_path / "stock"), f"{url}/metadata/", str(site.root)]
    assert subprocess.run(["faketime", "1970-01-02 00:00:00", *arguments], check=False, cwd=ROOT).returncode == 0
    refused = at_another_time("1970-01-02 00:00:00", box)
    assert refused.returncode == 1
    assert "expired" in refused.stderr
    assert "clock of this box is wrong" in refused.stderr
    status = box.status()
    assert (status["state"], status["code"]) == ("untrusted", "trust.expired")
    assert status["clock"]["system"].startswith("1970")
    assert status["clock"]["server"] is not None
    assert box.wants() == "0.1.0"


def test_a_clock_ten_days_ahead_refuses_and_poisons_nothing(box: Box) -> None:
    box.pull()
    ahead = at_another_time(days(10).strftime("%Y-%m-%d %H:%M:%S"), box)
    assert ahead.returncode == 1
    assert "expired" in ahead.stderr
    assert "clock of this box is wrong" in ahead.stderr
    assert box.status()["code"] == "trust.expired"
    box.pull()
    assert box.status()["state"] == "ok"
    assert box.status()["last_problem"]["code"] == "trust.expired"
    assert not box.facts().expired


def test_a_clock_five_days_ahead_does_not_raise_the_floor_past_the_server(box: Box, site: Site) -> None:
    ahead = at_another_time(days(5).strftime("%Y-%m-%d %H:%M:%S"), box)
    assert ahead.returncode == 0, ahead.stderr
    rollback_state = RollbackState.load([box.settings.exchange_dir / "floor.json"])
    assert rollback_state.system < days(1)
    forge(site, {"timestamp": expires(days(2))})
    box.pull()
    assert not box.facts().expired


def test_without_a_server_the_floor_rises_only_as_far_as_the_metadata_is_valid(box: Box) -> None:
    box.pull()
    trusted = trusted_metadata.TrustedMetadata.load(box.metadata, box.settings.root.read_bytes())
    clocks = Clocks(days(300), days(0))
    raised = RollbackState().advance(trusted.root, trusted.timestamp, trusted.snapshot, clocks, trusted.valid_until())
    assert raised.system == trusted.valid_until() - timedelta(seconds=1)
    assert not trusted.timestamp.is_expired(raised.earliest_time(trusted.root))


def test_a_clock_that_never_knew_the_time_is_at_least_at_the_build_and_at_the_signing(box: Box) -> None:
    box.pull()
    trusted = trusted_metadata.TrustedMetadata.load(box.metadata, box.settings.root.read_bytes())
    assert RollbackState().earliest_time(trusted.root) == BUILT_AT
    signed = issued_at(trusted.timestamp)
    assert signed is not None
    assert trusted.clocks(RollbackState(), DAWN).effective == signed


def test_a_signed_issue_time_that_is_no_time_counts_as_none(box: Box, site: Site) -> None:
    for text in ("soon", "", 17, None, "2026-13-40T00:00:00Z"):
        signed = newest(site, "timestamp").signed
        signed.unrecognized_fields["x-issued-at"] = text
        assert issued_at(signed) is None

    def edit(timestamp: Any) -> None:
        del timestamp.unrecognized_fields["x-issued-at"]

    forge(site, {"timestamp": edit})
    box.pull()
    assert box.wants() == "0.1.0"


def test_an_issue_time_in_the_future_counts_only_as_far_as_it_is_valid(box: Box, site: Site) -> None:
    def edit(timestamp: Any) -> None:
        timestamp.unrecognized_fields["x-issued-at"] = days(4000).isoformat()

    forge(site, {"timestamp": edit})
    with pytest.raises(TrustError) as caught:
        box.pull()
    assert caught.value.code == "trust.expired"
    # A root that replaces the key of the timestamp takes back what the stolen one has said.
    rotate(site, "timestamp")
    box.pull()
    assert box.wants() == "0.1.0"


def test_an_issue_time_without_a_zone_is_utc(box: Box) -> None:
    box.pull()
    timestamp = trusted_metadata.TrustedMetadata.load(box.metadata, box.settings.root.read_bytes()).timestamp
    timestamp.unrecognized_fields["x-issued-at"] = "2026-05-01T00:00:00"
    assert issued_at(timestamp) == datetime(2026, 5, 1, tzinfo=timezone.utc)


# -- memory ---------------------------------------------------------------------------------------------------------------


def test_a_lost_root_link_is_laid_again(box: Box) -> None:
    box.pull()
    (box.metadata / "root.json").unlink()
    box.pull()
    assert (box.metadata / "root.json").exists()


def old_copy(site: Site, tmp_path: Path) -> Path:
    shutil.copytree(site.public, tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("lost", ["metadata", "documents", "floor.json"])
def test_emptied_cached_metadata_does_not_open_the_way_back(lost: str, box: Box, site: Site, tmp_path: Path) -> None:
    old = old_copy(site, tmp_path)
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=1))
    site.rollout("stable", LINE, "0.2.0")
    box.pull()
    state = box.settings.state_dir
    for path in (state / "metadata", state / lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with serve(old) as url:
        behind = Box(box.settings.model_copy(update={"urls": [url]}))
        with pytest.raises(TrustError) as caught:
            behind.pull()
    assert caught.value.code == "trust.rollback"
    assert box.status()["code"] == "trust.rollback"
    assert box.wants() == "0.2.0"
    assert box.facts().lines[LINE].index.release("0.2.0")
    box.pull()
    assert box.status()["state"] == "ok"


def test_with_its_cache_the_stock_check_refuses_an_old_library_too(box: Box, site: Site, tmp_path: Path) -> None:
    old = old_copy(site, tmp_path)
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=1))
    box.pull()
    with serve(old) as url, pytest.raises(TrustError) as caught:
        Box(box.settings.model_copy(update={"urls": [url]})).pull()
    assert caught.value.code == "trust.rollback"


def test_a_role_that_vanishes_from_the_snapshot_is_a_rollback(box: Box, site: Site) -> None:
    box.pull()
    shutil.rmtree(box.metadata)

    def edit(snapshot: Any) -> None:
        del snapshot.meta[f"{LINE}.json"]

    forge(site, {"snapshot": edit})
    with pytest.raises(TrustError, match="no longer names") as caught:
        box.pull()
    assert caught.value.code == "trust.rollback"


def test_an_older_root_is_a_rollback(box: Box, site: Site, tmp_path: Path) -> None:
    old = old_copy(site, tmp_path)
    rotate(site, "snapshot")
    box.pull()
    shutil.rmtree(box.metadata)
    with serve(old) as url, pytest.raises(TrustError, match="root") as caught:
        Box(box.settings.model_copy(update={"urls": [url]})).pull()
    assert caught.value.code == "trust.rollback"


def rotate(site: Site, role: str) -> None:
    """Replace the key of an online role by a new root, and let its versions begin anew."""
    fresh = CryptoSigner.generate_ed25519()

    def edit(root: Any) -> None:
        for keyid in list(root.roles[role].keyids):
            root.revoke_key(keyid, role)
        root.add_key(fresh.public_key, role)

    site.holders[role] = [fresh]
    forge(site, {"root": edit})


def test_a_new_key_of_the_timestamp_lets_the_central_team_count_anew(box: Box, site: Site) -> None:
    def far(timestamp: Any) -> None:
        timestamp.version = 1_000_000

    forge(site, {"timestamp": far})
    box.pull()

    def low(timestamp: Any) -> None:
        timestamp.version = 3

    forge(site, {"timestamp": low})
    with pytest.raises(TrustError) as caught:
        box.pull()
    assert caught.value.code == "trust.rollback"
    rotate(site, "timestamp")
    forge(site, {"timestamp": low})
    box.pull()
    assert box.status()["state"] == "ok"


@pytest.mark.parametrize("what", ["empty", "half", "noise"])
def test_half_written_metadata_heals_by_itself(what: str, box: Box) -> None:
    box.pull()
    for role in ("timestamp", "snapshot", "targets", LINE, "rollout"):
        file = box.metadata / f"{role}.json"
        raw = file.read_bytes()
        file.write_bytes({"empty": b"", "half": raw[: len(raw) // 2], "noise": os.urandom(200)}[what])
        assert box.pull().problems == {}
        assert file.read_bytes() == raw
        assert box.facts().lines[LINE]


def test_a_half_written_root_heals_by_itself(box: Box, site: Site) -> None:
    rotate(site, "snapshot")
    box.pull()
    file = box.metadata / "root_history" / "2.root.json"
    file.write_bytes(file.read_bytes()[:100])
    box.pull()
    assert metadata.load_newest_root(box.metadata, box.settings.root.read_bytes()).version == 2


def test_what_a_kill_left_in_the_metadata_directory_is_swept(box: Box) -> None:
    box.pull()
    (box.metadata / "tmpabcdef").write_bytes(b"half")
    box.pull()
    assert not list(box.metadata.glob("tmp*"))


def test_a_damaged_floor_is_passed_over_for_its_other_copy(box: Box) -> None:
    box.pull()
    file = box.settings.exchange_dir / "floor.json"
    whole = RollbackState.load([file])
    for damage in (b"", b"{", b"[]", b'{"serial": "x"}', b'{"serial": 1e400, "roles": {}}', b'{"roles": 7}'):
        file.write_bytes(damage)
        assert RollbackState.load([box.settings.state_dir / "floor.json", file]) == whole
        assert RollbackState.load([file]) == RollbackState()


# -- roles ----------------------------------------------------------------------------------------------------------------


def test_a_role_revoked_before_the_look_is_said_and_is_no_fact_any_more(box: Box, site: Site) -> None:
    box.pull()
    forge(site, {"targets": revoke(LINE)})
    result = box.pull()
    assert getattr(result.problems[LINE], "code", "") == "trust.line_ended"
    assert box.facts().lines == {}
    assert box.status()["state"] == "ok", "it is the library's own word, rightly signed"
    assert box.wants() is None, "there is nothing new; the model in use stays"


def test_a_role_revoked_while_its_bundle_comes_is_not_told_to_the_box(box: Box, site: Site) -> None:
    done = []

    def strike(_progress: Any) -> None:
        if not done:
            done.append(forge(site, {"targets": revoke(LINE)}))

    result = box.pull(strike)
    assert getattr(result.problems[LINE], "code", "") == "trust.line_ended"
    assert box.wants() is None
    assert box.facts().lines == {}


def test_a_role_whose_keys_are_replaced_while_its_bundle_comes_must_sign_anew(box: Box, site: Site) -> None:
    thief, fresh = site.holders[LINE], [CryptoSigner.generate_ed25519() for _ in range(2)]
    done = []

    def strike(_progress: Any) -> None:
        if not done:
            done.append(forge(site, {"targets": replace_keys(LINE, fresh)}, signers={LINE: thief}))

    result = box.pull(strike)
    assert getattr(result.problems[LINE], "code", "") == "trust.signature"
    assert box.wants() is None


def replace_keys(role: str, signers: list[CryptoSigner]) -> Any:
    def edit(targets: Targets) -> None:
        for keyid in list(targets.get_delegated_role(role).keyids):
            targets.revoke_key(keyid, role)
        for signer in signers:
            targets.add_key(signer.public_key, role)

    return edit


def test_a_version_withdrawn_while_its_bundle_comes_is_not_told_to_the_box(box: Box, site: Site) -> None:
    done = []

    def strike(_progress: Any) -> None:
        if not done:
            done.append(site.withdraw(LINE, "0.1.0"))

    result = box.pull(strike)
    assert getattr(result.problems[LINE], "code", "") == "trust.withdrawn"
    assert box.wants() is None
    assert box.facts().lines[LINE].index.withdrawal("0.1.0")


def delegate_again(keys: list[Key]) -> Any:
    """A line's role delegates to another line, with keys of its own choice."""

    def edit(targets: Targets) -> None:
        role = DelegatedRole(LINE, [key.keyid for key in keys], 1, True, [f"models/{LINE}/*"])
        targets.delegations = Delegations({key.keyid: key for key in keys}, {LINE: role})

    return edit


def test_two_delegators_of_one_role_the_first_alone_counts(tmp_path: Path) -> None:
    site = make_site(tmp_path / "library", lines=(LINE, "greedy"))
    site.publish(tiny_bundle(tmp_path))
    site.publish(tiny_bundle(tmp_path, line="greedy"))
    site.rollout("stable", LINE, "0.1.0")
    site.rollout("stable", "greedy", "0.1.0")
    forge(site, {"greedy": delegate_again([CryptoSigner.generate_ed25519().public_key])})
    with serve(site.public) as url:
        box = make_box(tmp_path / "box", site, url)
        result = box.pull()
    assert box.wants(LINE) == "0.1.0"
    assert getattr(result.problems["greedy"], "code", "") == "trust.ambiguous"
    assert box.wants("greedy") is None
    facts = box.facts()
    assert set(facts.lines) == {LINE}


def test_a_role_that_stands_before_a_line_and_claims_its_paths_is_refused(box: Box, site: Site) -> None:
    def edit(targets: Targets) -> None:
        assert targets.delegations is not None
        assert targets.delegations.roles is not None
        rollout = targets.delegations.roles["rollout"]
        rollout.paths = [*(rollout.paths or []), f"models/{LINE}/*"]
        line = targets.delegations.roles.pop(LINE)
        targets.delegations.roles[LINE] = line

    forge(site, {"targets": edit})
    result = box.pull()
    assert getattr(result.problems[LINE], "code", "") == "trust.ambiguous"
    assert box.wants() is None


def test_a_line_whose_index_speaks_of_another_is_refused(tmp_path: Path) -> None:
    site = make_site(tmp_path / "library", lines=(LINE, "other"))
    site.publish(tiny_bundle(tmp_path))
    site.rollout("stable", LINE, "0.1.0")
    index = newest(site, "other").signed.targets["models/other/line.json"]
    raw = next((site.public / "targets" / "models" / "other").glob("*.line.json")).read_bytes()
    swapped = raw.replace(b'"other"', f'"{LINE}"'.encode())

    def edit(targets: Targets) -> None:
        from tuf.api.metadata import TargetFile

        target = TargetFile.from_data(index.path, swapped, ["sha256"])
        targets.targets[index.path] = target
        (site.public / "targets" / "models" / LINE / f"{target.hashes['sha256']}.line.json").write_bytes(swapped)

    def place(targets: Targets) -> None:
        edit(targets)
        name = targets.targets[index.path].hashes["sha256"]
        (site.public / "targets" / "models" / "other" / f"{name}.line.json").write_bytes(swapped)

    forge(site, {"other": place})
    with serve(site.public) as url:
        box = make_box(tmp_path / "box", site, url, lines=[LINE, "other"])
        result = box.pull()
    assert getattr(result.problems["other"], "code", "") == "trust.document"
    assert box.wants() == "0.1.0"


# -- check ----------------------------------------------------------------------------------------------------------------


def command_check(box: Box) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "model_sync", "check", "--exchange", str(box.settings.exchange_dir), "--root", str(box.settings.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.returncode, json.loads(done.stdout)


def tree(path: Path) -> dict[str, tuple[int, int]]:
    return {str(file): (file.lstat().st_mtime_ns, file.lstat().st_ino) for file in sorted(path.rglob("*"))}


def test_check_prints_the_facts_and_writes_nothing(box: Box, site: Site) -> None:
    box.pull()
    site.withdraw(LINE, "0.1.0", "too many false alarms")
    box.pull()
    before = tree(box.settings.exchange_dir)
    code, facts = command_check(box)
    assert code == 0
    assert tree(box.settings.exchange_dir) == before
    line = facts["lines"][LINE]
    assert facts["ok"]
    assert not facts["expired"]
    assert line["withdrawn"]["0.1.0"]["reason"] == "too many false alarms"
    assert set(line["versions"]) == {"0.1.0"}
    assert line["minimum_version"] == "0.0.0"
    assert facts["valid_until"] == min(line["valid_until"], facts["valid_until"])


def test_metadata_that_expires_between_download_and_activation_is_said_by_check(box: Box, site: Site) -> None:
    box.pull()
    site.withdraw(LINE, "0.1.0")
    box.pull()
    later = box.facts(days(8))
    assert later.expired
    assert later.lines[LINE].index.withdrawal("0.1.0"), "a withdrawal holds on"
    assert later.to_dict()["expired"] is True


def test_an_expired_line_is_refused_by_the_pull_and_said_by_check(box: Box, site: Site) -> None:
    box.pull()
    forge(site, {LINE: expires(days(-1))})
    result = box.pull()
    assert getattr(result.problems[LINE], "code", "") == "trust.part_expired"
    assert LINE not in box.facts().lines


def test_check_of_a_box_that_never_pulled(box: Box) -> None:
    code, facts = command_check(box)
    assert code == 1
    assert facts == {"ok": False, "code": "trust.missing", "message": facts["message"], "hint": facts["hint"]}


def test_check_without_a_provisioned_root(box: Box) -> None:
    box.settings.root.unlink()
    assert command_check(box)[1]["code"] == "trust.root"


def test_check_with_a_root_that_is_none(box: Box, site: Site) -> None:
    box.settings.root.write_text("{}")
    with pytest.raises(TrustError) as caught:
        box.facts()
    assert caught.value.code == "trust.metadata"
    timestamp = (site.public / "metadata" / "timestamp.json").read_bytes()
    box.settings.root.write_bytes(timestamp)
    with pytest.raises(TrustError) as caught:
        box.facts()
    assert caught.value.code == "trust.signature"


def exchange_file(box: Box, relative: str) -> Path:
    return box.settings.exchange_dir / relative


ALTERED = {
    "metadata/timestamp.json": "trust.signature",
    "metadata/snapshot.json": "trust.digest",
    "metadata/targets.json": "trust.digest",
}


@pytest.mark.parametrize("file", ALTERED)
def test_check_refuses_altered_metadata(file: str, box: Box) -> None:
    box.pull()
    path = exchange_file(box, file)
    path.write_bytes(path.read_bytes().replace(b'"version":', b'"version":1'))
    with pytest.raises(TrustError) as caught:
        box.facts()
    assert caught.value.code == ALTERED[file]


@pytest.mark.parametrize("file", ["metadata/timestamp.json", "metadata/snapshot.json", "metadata/targets.json"])
def test_check_refuses_missing_metadata(file: str, box: Box) -> None:
    box.pull()
    exchange_file(box, file).unlink()
    with pytest.raises(TrustError) as caught:
        box.facts()
    assert caught.value.code == "trust.missing"


@pytest.mark.parametrize(
    ("file", "code"), [(f"metadata/{LINE}.json", "trust.digest"), (f"documents/models/{LINE}/line.json", "trust.digest")]
)
def test_check_leaves_out_a_line_that_was_altered(file: str, code: str, box: Box) -> None:
    box.pull()
    exchange_file(box, file).write_bytes(b"{}")
    facts = box.facts()
    assert facts.lines == {}
    assert facts.problems[LINE].code == "trust.digest"
    exchange_file(box, file).unlink()
    assert box.facts().problems[LINE].code == "trust.missing"


def test_check_that_cannot_read_says_so_and_speaks_of_no_trust(box: Box) -> None:
    box.pull()
    timestamp = exchange_file(box, "metadata/timestamp.json")
    timestamp.unlink()
    timestamp.mkdir()
    with pytest.raises(LibraryUnreachable) as caught:
        box.facts()
    assert caught.value.code == "trust.unreadable"
    assert command_check(box)[0] == 1


def test_check_of_a_snapshot_of_another_time(box: Box, site: Site) -> None:
    """Without hashes in the timestamp the version alone tells that a snapshot is not the one that was announced."""

    def bare(timestamp: Any) -> None:
        timestamp.snapshot_meta.hashes = timestamp.snapshot_meta.length = None

    forge(site, {"timestamp": bare})
    box.pull()
    old = exchange_file(box, "metadata/snapshot.json").read_bytes()
    forge(site, {"timestamp": bare})
    box.pull()
    exchange_file(box, "metadata/snapshot.json").write_bytes(old)
    with pytest.raises(TrustError) as caught:
        box.facts()
    assert caught.value.code == "trust.version"


def test_check_refuses_what_is_older_than_the_floor(box: Box, site: Site) -> None:
    box.pull()
    kept = exchange_file(box, "trust").resolve()
    shutil.copytree(kept, box.settings.exchange_dir / "kept")
    site.publish(tiny_bundle(site.public.parent / "more", "0.2.0", seed=1))
    box.pull()
    exchange_file(box, "trust").unlink()
    exchange_file(box, "trust").symlink_to("kept")
    with pytest.raises(TrustError) as caught:
        box.facts()
    assert caught.value.code == "trust.rollback"


def test_check_never_sees_half_a_refresh(box: Box, site: Site, tmp_path: Path) -> None:
    """The line is cut after each file of a refresh in turn: the box goes on believing the whole set before it."""
    with BadServer(directory=site.public) as server:
        cut = Box(box.settings.model_copy(update={"urls": [server.url]}))
        cut.pull()
        for number in range(2, 5):
            site.publish(tiny_bundle(tmp_path / str(number), f"0.{number}.0", seed=number))
            names = [f"/metadata/{newest(site, role).signed.version}.{role}.json" for role in ("snapshot", LINE)]
            for name in reversed(names):
                server.always(name, DOWN)
                with pytest.raises(LibraryUnreachable):
                    cut.pull()
                versions = [release.version for release in cut.facts().lines[LINE].index.versions]
                assert versions == [f"0.{n}.0" for n in range(1, number)]
            for name in names:
                server.always(name, Reply())
            cut.pull()


# -- errors kept apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [CAPTIVE_PORTAL, DOWN, Reply(hang_up=True), Reply(cut_after=10), Reply(status=404), CAPTIVE_FORBIDDEN])
def test_a_line_that_fails_is_never_called_untrusted(answer: Reply, box: Box, site: Site) -> None:
    with BadServer(directory=site.public) as server:
        there = Box(box.settings.model_copy(update={"urls": [server.url]}))
        there.pull()
        server.always("*", answer)
        for path in ("/metadata/timestamp.json", "/metadata/2.root.json"):
            server.always(path, answer)
        with pytest.raises(LibraryUnreachable) as caught:
            there.pull()
    assert caught.value.code.startswith("sync.")
    assert there.status()["state"] == "unreachable"
    assert there.wants() == "0.1.0"
    assert there.facts().lines


def test_a_captive_portal_that_forbids_only_the_next_root_stops_nothing(site: Site, tmp_path: Path) -> None:
    with BadServer(directory=site.public) as server:
        server.always("/metadata/2.root.json", CAPTIVE_FORBIDDEN)
        box = make_box(tmp_path / "box", site, server.url)
        box.pull()
    assert box.wants() == "0.1.0"


def test_a_forged_library_is_untrusted_and_stops_nothing_in_use(box: Box, site: Site) -> None:
    box.pull()
    forge(site, {}, signers={"timestamp": [CryptoSigner.generate_ed25519()]})
    with pytest.raises(TrustError) as caught:
        box.pull()
    assert caught.value.code == "trust.signature"
    assert box.status()["state"] == "untrusted"
    assert box.wants() == "0.1.0"


def test_what_is_delegated_and_not_in_the_snapshot_is_an_inconsistent_library(box: Box, site: Site) -> None:
    def edit(targets: Targets) -> None:
        assert targets.delegations is not None
        assert targets.delegations.roles is not None
        key = CryptoSigner.generate_ed25519().public_key
        targets.delegations.keys[key.keyid] = key
        targets.delegations.roles["new"] = DelegatedRole("new", [key.keyid], 1, True, ["models/new/*"])

    forge(site, {"targets": edit})
    result = Box(box.settings.model_copy(update={"lines": [LINE, "new"]})).pull()
    assert getattr(result.problems["new"], "code", "") == "trust.metadata"
    assert box.wants() == "0.1.0"


def test_wrong_metadata_hashes_are_untrusted(box: Box, site: Site) -> None:
    def edit(snapshot: Any) -> None:
        snapshot.meta["targets.json"].hashes = {"sha256": "0" * 64}

    forge(site, {"snapshot": edit})
    with pytest.raises(TrustError) as caught:
        box.pull()
    assert caught.value.code == "trust.digest"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (tuf_errors.ExpiredMetadataError("x"), "trust.expired"),
        (tuf_errors.BadVersionNumberError("x"), "trust.rollback"),
        (tuf_errors.LengthOrHashMismatchError("x"), "trust.digest"),
        (tuf_errors.UnsignedMetadataError("x"), "trust.signature"),
        (tuf_errors.RepositoryError("x"), "trust.metadata"),
        (tuf_errors.DownloadError("x"), "sync.unreachable"),
        (tuf_errors.SlowRetrievalError("x"), "sync.unreachable"),
        (OSError(28, "No space left on device"), "sync.disk_full"),
        (OSError(122, "Quota exceeded"), "sync.disk_full"),
        (PermissionError(13, "Permission denied", "/state"), "sync.state"),
    ],
)
def test_every_error_of_the_updater_has_its_own_code(error: Exception, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    box = make_box(tmp_path / "box", make_site(tmp_path / "library", lines=()))

    def fail(_self: Updater) -> None:
        raise error

    monkeypatch.setattr(Updater, "refresh", fail)
    tuf_client = TufClient(tmp_path / "m", box.settings.root.read_bytes(), Fetcher(box.settings, tmp_path / "p"), tmp_path / "floor.json")
    with pytest.raises((LibraryUnreachable, TrustError)) as caught:
        tuf_client.refresh()
    assert caught.value.code == code
    assert isinstance(caught.value, TrustError) == code.startswith("trust.")
    assert "model in use" in caught.value.message + caught.value.hint


def test_atomic_writes_leave_the_old_file_when_they_fail(tmp_path: Path) -> None:
    atomic_files.write(tmp_path / "a", b"old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").mkdir()
    with pytest.raises(OSError):
        atomic_files.write(tmp_path / "b", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert atomic_files.read_json(tmp_path / "a") == {}
