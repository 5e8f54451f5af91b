"""The library's roles and keys, watched by a real python-tuf Updater: thresholds, staged signatures, rotation, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from model_sync.errors import SettingsError
from model_sync.library import publish
from model_sync.library.files import LibraryFiles
from model_sync.library.library import Library
from model_sync.library.roles import RoleState
from model_sync.trust.documents import LineIndex
from tests.support.library_follower import Follower, refused
from tests.support.library_site import Site, make_site, tiny_bundle

LINE = "cxr-pneumonia"
ROLES = ["root", "targets", "snapshot", "timestamp", "rollout", LINE]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A library without models; whatever a test did to it, it is whole at the end."""
    made = make_site(tmp_path / "lib")
    yield made
    assert made.library.verify().problems == []


@pytest.fixture
def box(site: Site, tmp_path: Path) -> Follower:
    """A box that has seen the library's first state."""
    follower = Follower(site, tmp_path / "box")
    follower.look()
    return follower


# --- thresholds ---------------------------------------------------------------------------------------------------------


def bare(directory: Path) -> tuple[Library, list[CryptoSigner]]:
    """A fresh library that has only its online keys at hand, and three holders."""
    people = [CryptoSigner.generate_ed25519() for _ in range(3)]
    online = [CryptoSigner.generate_ed25519() for _ in range(2)]
    keys = [signer.public_key for signer in people]
    library = Library.init(directory, keys, keys, snapshot_key=online[0].public_key, timestamp_key=online[1].public_key, signers=online)
    return library, people


def test_nothing_is_public_before_two_of_three_have_signed(tmp_path: Path) -> None:
    library, (alice, bob, _carol) = bare(tmp_path / "lib")
    assert library.sign("root", alice) == RoleState("root", 1, [library.files.config().name(alice.public_key.keyid)], [
        *sorted(key[:8] for key in library.keys("root") if key != alice.public_key.keyid)], 1, 2, False)  # fmt: skip
    library.sign("targets", alice)
    library.sign("root", bob)
    assert not list((library.files.public / "metadata").iterdir())
    assert library.sign("targets", bob).published
    assert library.verify().is_clean
    assert library.staged_roles() == []


def test_the_same_signature_twice_counts_once(tmp_path: Path) -> None:
    library, (alice, _bob, _carol) = bare(tmp_path / "lib")
    library.sign("root", alice)
    assert library.sign("root", alice).have == 1


def test_a_stranger_cannot_sign(tmp_path: Path) -> None:
    library, _people = bare(tmp_path / "lib")
    with refused("no key of root"):
        library.sign("root", CryptoSigner.generate_ed25519())
    assert library.state("root").have == 0


def test_only_what_was_shown_is_signed(site: Site, tmp_path: Path) -> None:
    library, signer = site.by_hand(), site.holders[LINE][0]
    publish.publish(library, tiny_bundle(tmp_path, "0.1.0"), deltas=False)
    shown = library.staged(LINE)
    publish.withdraw(library, LINE, "0.1.0", "changed behind the holder's back")
    with refused("changed while you read it"):
        library.sign(LINE, signer, shown=shown)
    assert library.state(LINE).have == 0
    assert library.sign(LINE, signer, shown=library.staged(LINE)).have == 1


def test_what_does_not_wait_cannot_be_signed(site: Site) -> None:
    for role in ("root", "snapshot", "nonsense", "../targets"):
        with refused("nothing of"):
            site.library.sign(role, site.holders["root"][0])


def test_the_timestamp_says_when_it_was_signed(site: Site) -> None:
    timestamp = site.library.refresh_timestamp()
    issued = datetime.fromisoformat(timestamp.unrecognized_fields["x-issued-at"].replace("Z", "+00:00"))
    assert timestamp.expires - issued == timedelta(days=7)


def test_a_second_init_changes_nothing(site: Site) -> None:
    before = site.root.read_bytes()
    keys = [signer.public_key for signer in site.holders["root"]]
    with refused("is a library already"):
        Library.init(site.library.files.directory, keys, keys, snapshot_key=keys[0], timestamp_key=keys[0])
    assert site.root.read_bytes() == before


@pytest.mark.parametrize("threshold", [0, 4])
def test_a_threshold_that_cannot_be_met(tmp_path: Path, threshold: int) -> None:
    keys = [CryptoSigner.generate_ed25519().public_key for _ in range(3)]
    with refused("cannot give"):
        Library.init(tmp_path / "lib", keys, keys, snapshot_key=keys[0], timestamp_key=keys[1], threshold=threshold)
    assert not (tmp_path / "lib").exists()


def test_the_same_key_twice_for_a_role(tmp_path: Path) -> None:
    key = CryptoSigner.generate_ed25519().public_key
    with refused("given twice"):
        Library.init(tmp_path / "lib", [key, key], [key, key], snapshot_key=key, timestamp_key=key)


def test_what_is_no_library(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is no library"):
        Library.open_library(tmp_path)
    (tmp_path / "library.json").write_text('{"schema": 1, "surprise": 2}')
    with pytest.raises(SettingsError, match="surprise"):
        Library.open_library(tmp_path)


# --- signatures from another machine ------------------------------------------------------------------------------------


@pytest.fixture
def waiting(site: Site, tmp_path: Path) -> tuple[Library, Path]:
    """A library whose line has a new version that waits, and a copy of the waiting file on another machine."""
    library = site.by_hand()
    publish.publish(library, tiny_bundle(tmp_path, "0.1.0"), deltas=False)
    copy = tmp_path / "away.json"
    copy.write_bytes(library.files.staged_path(LINE).read_bytes())
    return library, copy


def sign_file(path: Path, signer: CryptoSigner) -> None:
    md = Metadata.from_bytes(path.read_bytes())
    md.sign(signer, append=True)
    path.write_bytes(md.to_bytes())


def test_signatures_from_other_machines_come_together(site: Site, waiting: tuple[Library, Path], box: Follower, tmp_path: Path) -> None:
    library, copy = waiting
    other = tmp_path / "other.json"
    other.write_bytes(copy.read_bytes())
    sign_file(copy, site.holders[LINE][0])
    sign_file(other, site.holders[LINE][1])
    assert not library.merge(copy).published
    assert library.merge(copy).have == 1
    assert box.index().versions == []
    assert library.merge(other).published
    assert [release.version for release in box.index().versions] == ["0.1.0"]


def test_a_copy_that_was_changed_is_refused(site: Site, waiting: tuple[Library, Path]) -> None:
    library, copy = waiting
    md = Metadata.from_bytes(copy.read_bytes())
    md.signed.targets.clear()
    md.sign(site.holders[LINE][0])
    copy.write_bytes(md.to_bytes())
    with refused("changed"):
        library.merge(copy)
    assert library.state(LINE).have == 0


def test_a_stale_copy_is_refused(site: Site, waiting: tuple[Library, Path]) -> None:
    library, copy = waiting
    for signer in site.holders[LINE]:
        library.sign(LINE, signer)
    sign_file(copy, site.holders[LINE][0])
    with refused("stale"):
        library.merge(copy)


def test_a_copy_of_what_was_changed_here_since_is_refused(site: Site, waiting: tuple[Library, Path], tmp_path: Path) -> None:
    library, copy = waiting
    sign_file(copy, site.holders[LINE][0])
    publish.publish(library, tiny_bundle(tmp_path, "0.2.0"), deltas=False)
    with refused("changed since"):
        library.merge(copy)


def test_a_signature_that_does_not_fit_is_refused(site: Site, waiting: tuple[Library, Path]) -> None:
    library, copy = waiting
    sign_file(copy, site.holders[LINE][0])
    document = json.loads(copy.read_text())
    document["signatures"][0]["sig"] = "00" * 64
    copy.write_text(json.dumps(document))
    with refused("does not fit"):
        library.merge(copy)
    assert library.state(LINE).have == 0


def test_a_signature_of_a_stranger_is_refused_with_the_good_ones_beside_it(site: Site, waiting: tuple[Library, Path]) -> None:
    library, copy = waiting
    sign_file(copy, site.holders[LINE][0])
    sign_file(copy, CryptoSigner.generate_ed25519())
    with refused("no key of"):
        library.merge(copy)
    assert library.state(LINE).have == 0


@pytest.mark.parametrize("text", ["", "{}", "\x00", '{"signed": {"_type": "targets"}, "signatures": []}'])
def test_a_file_that_is_no_metadata(site: Site, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with refused("no TUF metadata"):
        site.library.merge(tmp_path / "x.json")


def test_a_file_of_another_library(site: Site, tmp_path: Path) -> None:
    other, _people = bare(tmp_path / "other")
    with refused("stale"):
        site.library.merge(other.files.staged_path("root"))
    with refused("No such file"):
        site.library.merge(tmp_path / "absent.json")


def test_a_signature_for_one_line_is_none_for_another(tmp_path: Path) -> None:
    site = make_site(tmp_path / "lib", lines=["a", "b"])
    library = site.by_hand()
    for line in ("a", "b"):
        library.renew(line)
    signed = Metadata.from_bytes(library.files.staged_path("a").read_bytes())
    assert signed.signed.unrecognized_fields["x-role"] == "a"
    assert signed.signed_bytes != Metadata.from_bytes(library.files.staged_path("b").read_bytes()).signed_bytes


# --- lines --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["root", "targets", "snapshot", "timestamp", "rollout"])
def test_a_line_cannot_have_the_name_of_a_role(site: Site, name: str) -> None:
    with refused("role of the library"):
        site.library.add_line(name, [CryptoSigner.generate_ed25519().public_key], 1)


@pytest.mark.parametrize("name", ["", "CXR", "a/b", "../a", "a b", "x" * 65, "*"])
def test_what_cannot_name_a_line(site: Site, name: str) -> None:
    with refused("cannot name"):
        site.library.add_line(name, [CryptoSigner.generate_ed25519().public_key], 1)


def test_a_second_delegator_of_a_line_is_refused(site: Site) -> None:
    before = site.library.published("targets")
    with refused("one delegator"):
        site.library.add_line(LINE, [CryptoSigner.generate_ed25519().public_key], 1)
    assert site.library.published("targets") == before
    assert site.library.staged_roles() == []


def test_a_new_line_is_public_only_together_with_its_first_index(site: Site, box: Follower) -> None:
    library = site.by_hand()
    keys = [CryptoSigner.generate_ed25519()]
    library.add_line("ct-lung", [keys[0].public_key], 1)
    for signer in site.holders["targets"][:2]:
        library.sign("targets", signer)
    assert "ct-lung" not in {role for role in library.role_names() if library.published(role)}
    box.look()
    assert library.sign("ct-lung", keys[0]).published
    assert LineIndex.parse(box.look("models/ct-lung/line.json")).line == "ct-lung"


def test_adding_a_line_is_finished_after_a_kill_between_its_two_files(site: Site) -> None:
    library = site.by_hand()
    key = CryptoSigner.generate_ed25519()
    library.add_line("ct-lung", [key.public_key], 1)
    library.files.staged_path("ct-lung").unlink()
    with refused("has no models/ct-lung/line.json"):
        library.index("ct-lung")
    library.add_line("ct-lung", [key.public_key], 1)
    assert library.index("ct-lung").versions == []


# --- rotation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_every_role_changes_a_key_and_boxes_follow(site: Site, box: Follower, tmp_path: Path, role: str) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    box.index()
    old, fresh = site.holders[role][0], CryptoSigner.generate_ed25519()
    site.library.signers[fresh.public_key.keyid] = fresh
    site.library.rotate_key(role, old.public_key.keyid, fresh.public_key)
    del site.library.signers[old.public_key.keyid]
    assert site.library.staged_roles() == []
    assert old.public_key.keyid not in site.library.keys(role)
    assert [release.version for release in box.index().versions] == ["0.1.0"]
    site.library.refresh_timestamp()
    site.publish(tiny_bundle(tmp_path, "0.2.0"))
    assert [release.version for release in box.index().versions] == ["0.1.0", "0.2.0"]


def test_a_new_root_needs_the_thresholds_of_both_roots(site: Site, box: Follower) -> None:
    library, (alice, bob, carol) = site.by_hand(), site.holders["root"]
    dave, erin = CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()
    library.rotate_key("root", alice.public_key.keyid, dave.public_key)
    library.rotate_key("root", bob.public_key.keyid, erin.public_key)
    library.sign("root", dave)
    assert not library.sign("root", erin).published, "the new root's threshold alone"
    assert library.published("root").signed.version == 1  # type: ignore[union-attr]
    assert library.sign("root", carol).have == 1
    assert library.sign("root", alice).published
    box.look()


def test_the_old_root_alone_cannot_make_a_new_one(site: Site) -> None:
    library, (alice, bob, carol) = site.by_hand(), site.holders["root"]
    dave, erin = CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()
    library.rotate_key("root", alice.public_key.keyid, dave.public_key)
    library.rotate_key("root", bob.public_key.keyid, erin.public_key)
    library.sign("root", alice)
    assert not library.sign("root", bob).published
    assert library.sign("root", carol).have == 1
    assert library.state("root").missing == sorted(key.public_key.keyid[:8] for key in (dave, erin))


def test_a_lost_key_is_replaced_by_the_others(site: Site, box: Follower) -> None:
    library, (alice, bob, carol) = site.by_hand(), site.holders["root"]
    dave = CryptoSigner.generate_ed25519()
    for role in ("root", "targets"):
        library.rotate_key(role, carol.public_key.keyid, dave.public_key)
    library.sign("root", alice)
    library.sign("root", bob)
    # targets still has two good signatures, or is staged again for them
    for signer in (alice, bob):
        if "targets" in library.staged_roles():
            library.sign("targets", signer)
    assert library.staged_roles() == []
    assert carol.public_key.keyid not in library.keys("root") | library.keys("targets")
    box.look()


def test_lost_targets_keys_below_their_threshold_are_replaced_by_root(site: Site, box: Follower) -> None:
    library, (alice, bob, _carol) = site.by_hand(), site.holders["root"]
    fresh = [CryptoSigner.generate_ed25519() for _ in range(2)]
    for old, new in zip((alice, bob), fresh, strict=True):
        library.rotate_key("targets", old.public_key.keyid, new.public_key)
    library.sign("root", alice)
    library.sign("root", bob)
    assert library.published("root").signed.version == 1, "held back until targets fits it"  # type: ignore[union-attr]
    box.look()
    for signer in fresh:
        library.sign("targets", signer)
    assert library.published("root").signed.version == 2  # type: ignore[union-attr]
    box.look()


def test_a_rotated_line_is_public_only_with_signatures_of_its_new_keys(site: Site, box: Follower, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    library, fresh = site.by_hand(), CryptoSigner.generate_ed25519()
    assert library.rotate_key(LINE, site.holders[LINE][0].public_key.keyid, fresh.public_key) == ["targets", LINE]
    for signer in site.holders["targets"][:2]:
        library.sign("targets", signer)
    box.index()
    library.sign(LINE, site.holders[LINE][1])
    assert library.sign(LINE, fresh).published
    assert [release.version for release in box.index().versions] == ["0.1.0"]


def test_a_key_is_added_and_one_removed(site: Site, box: Follower) -> None:
    fresh = CryptoSigner.generate_ed25519()
    site.library.rotate_key("root", None, fresh.public_key, threshold=3)
    assert len(site.library.keys("root")) == 4
    site.library.rotate_key("root", fresh.public_key.keyid, None, threshold=2)
    assert len(site.library.keys("root")) == 3
    box.look()


def test_what_cannot_be_rotated(site: Site) -> None:
    alice, bob, carol = (signer.public_key for signer in site.holders["root"])
    library, fresh = site.library, CryptoSigner.generate_ed25519().public_key
    with refused("no role"):
        library.rotate_key("ct-lung", None, fresh)
    with refused("no key of root"):
        library.rotate_key("root", fresh.keyid, CryptoSigner.generate_ed25519().public_key)
    with refused("already"):
        library.rotate_key("root", alice.keyid, bob)
    with refused("cannot give"):
        library.rotate_key("snapshot", site.holders["snapshot"][0].public_key.keyid, None)
    with refused("cannot give"):
        library.rotate_key("root", carol.keyid, None, threshold=3)
    assert library.staged_roles() == []


def test_rollout_keys_given_again_replace_the_old_ones(site: Site, box: Follower, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    site.rollout("stable", LINE, "0.1.0")
    fresh = CryptoSigner.generate_ed25519()
    site.library.signers[fresh.public_key.keyid] = fresh
    site.library.set_rollout_keys([fresh.public_key])
    assert list(site.library.keys("rollout")) == [fresh.public_key.keyid]
    box.look("rollout/stable.json")


# --- locked, expired, discarded -----------------------------------------------------------------------------------------


def test_without_the_online_keys_signatures_are_kept_and_published_later(site: Site, box: Follower, tmp_path: Path) -> None:
    locked = Library(site.library.files.directory)
    publish.publish(locked, tiny_bundle(tmp_path, "0.1.0"), deltas=False)
    locked.sign(LINE, site.holders[LINE][0])
    with refused("locked") as caught:
        locked.sign(LINE, site.holders[LINE][1])
    assert "refresh-timestamp" in caught.value.hint
    assert locked.state(LINE).have == 2
    assert box.index().versions == []
    site.by_hand().refresh_timestamp()
    assert len(box.index().versions) == 1


def test_the_timestamp_cannot_be_refreshed_while_locked_or_empty(site: Site, tmp_path: Path) -> None:
    with refused("locked"):
        Library(site.library.files.directory).refresh_timestamp()
    empty, _people = bare(tmp_path / "empty")
    with refused("nothing is published"):
        empty.refresh_timestamp()


def test_a_refresh_renews_the_snapshot_when_half_of_its_life_is_over(site: Site, box: Follower) -> None:
    start = site.library.published("snapshot").signed.version  # type: ignore[union-attr]
    site.library.refresh_timestamp()
    assert site.library.published("snapshot").signed.version == start  # type: ignore[union-attr]
    later = Library(
        site.library.files.directory, site.library.signers.values(), clock=lambda: datetime.now(timezone.utc) + timedelta(days=8)
    )
    later.refresh_timestamp()
    assert site.library.published("snapshot").signed.version == start + 1  # type: ignore[union-attr]
    box.look()


def test_what_expired_while_it_waited_is_neither_signed_nor_published(site: Site, tmp_path: Path) -> None:
    library = site.by_hand()
    publish.publish(library, tiny_bundle(tmp_path, "0.1.0"), deltas=False)
    late = Library(library.files.directory, library.signers.values(), clock=lambda: datetime.now(timezone.utc) + timedelta(days=181))
    with refused("expired while it waited"):
        late.sign(LINE, site.holders[LINE][0])
    assert any("expired before it was signed" in text for text in late.status()["warnings"])
    library.renew(LINE)
    assert library.sign(LINE, site.holders[LINE][0]).have == 1


def test_renewal_is_for_what_people_sign(site: Site, box: Follower) -> None:
    assert site.library.renew(LINE).version == 2
    assert site.library.renew("root").version == 2
    for role in ("snapshot", "timestamp", "nobody"):
        with refused("no role that people sign"):
            site.library.renew(role)
    box.look()


def test_what_waits_can_be_discarded(site: Site, box: Follower, tmp_path: Path) -> None:
    library = site.by_hand()
    publish.publish(library, tiny_bundle(tmp_path, "0.1.0"), deltas=False)
    library.add_line("ct-lung", [CryptoSigner.generate_ed25519().public_key], 1)
    assert library.discard() == ["targets", "ct-lung", LINE]
    assert library.lines() == [LINE]
    assert library.index(LINE).versions == []
    assert not list((library.files.staged).rglob("*.onnx"))
    box.look()
    empty, _people = bare(tmp_path / "empty")
    with refused("cannot be discarded"):
        empty.discard()


def test_a_second_command_waits_and_then_says_so(site: Site) -> None:
    impatient = Library(site.library.files.directory, lock_timeout_s=0.2)
    with site.library.files.locked(), refused("uses this library"):
        impatient.renew(LINE)
    impatient.renew(LINE)
    impatient.discard()


def test_half_written_files_of_a_killed_command_go(site: Site) -> None:
    files = LibraryFiles(site.library.files.directory)
    (files.scratch / "1.part").write_bytes(b"half")
    with files.locked():
        assert not list(files.scratch.iterdir())


def test_a_web_server_can_read_the_public_folder_whatever_the_umask(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    before = os.umask(0o077)
    try:
        site = make_site(tmp_path / "lib")
        site.publish(bundle)
    finally:
        os.umask(before)
    for path in (site.public, *site.public.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert site.library.files.online.stat().st_mode & 0o777 == 0o700
