"""Model lines that begin, end and begin again; the names and versions that a line may have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from model_sync.errors import PublishError
from model_sync.library import publish, rollouts, usb_export
from model_sync.library import roles as library_roles
from model_sync.trust.documents import LineIndex, Rollout
from tests.support.library_follower import Follower
from tests.support.library_site import Site, make_site, serve, tiny_bundle
from tests.support.sync_box import make_box, newest

LINE, OTHER = "cxr-pneumonia", "bone-age"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A library with two lines; whatever a test did to it, it is whole at the end."""
    made = make_site(tmp_path / "lib", lines=(LINE, OTHER))
    yield made
    assert made.library.verify().problems == []


@pytest.fixture
def box(site: Site, tmp_path: Path) -> Follower:
    follower = Follower(site, tmp_path / "box")
    follower.look()
    return follower


def refused(says: str) -> pytest.RaisesExc[PublishError]:
    return pytest.raises(PublishError, match=says)


# --- the end of a line ------------------------------------------------------------------------------------------------------


def test_a_line_ends_and_begins_again_and_no_box_sees_a_rollback(site: Site, box: Follower, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=1))
    site.withdraw(LINE, "0.1.0")
    site.rollout("stable", LINE, "0.2.0")
    site.rollout("stable", OTHER, tiny(site, tmp_path, OTHER))
    with serve(site.public) as url:
        real = make_box(tmp_path / "real", site, url)
        real.pull()
        versions = [box.index() and newest(site, LINE).signed.version]
        rollouts.end_line(site.library, LINE)
        assert site.library.lines() == [OTHER]
        assert LINE not in Rollout.parse(box.look("rollout/stable.json")).lines
        with pytest.raises(AssertionError):
            box.look()  # nobody signs its index any more
        real.pull()
        assert "0.2.0" in real.bundles(), "the model in use stays"
        assert LINE not in real.facts().lines
        assert real.facts().lines[OTHER]
        site.add_line(LINE)
        index = box.index()
        assert [release.version for release in index.versions] == ["0.1.0", "0.2.0"]
        assert index.withdrawal("0.1.0"), "what was withdrawn stays so"
        site.publish(tiny_bundle(tmp_path, "0.3.0", seed=2))
        site.rollout("stable", LINE, "0.3.0")
        versions.append(newest(site, LINE).signed.version)
        assert versions[1] > versions[0]
        assert real.pull().problems == {}
        assert real.wants(LINE) == "0.3.0"
        assert real.status()["state"] == "ok"


def tiny(site: Site, directory: Path, line: str) -> str:
    site.publish(tiny_bundle(directory, "0.1.0", line=line))
    return "0.1.0"


def test_a_line_is_ended_only_when_no_public_rollout_names_it(site: Site, box: Follower, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    for ring in ("stable", "canary"):
        site.rollout(ring, LINE, "0.1.0")
    library = site.by_hand()
    for _ in range(2):  # asked again it says the same
        assert rollouts.end_line(library, LINE).role == "rollout"
        assert LINE in library.lines()
    site.sign_all()
    for ring in ("stable", "canary"):
        assert Rollout.parse(box.look(f"rollout/{ring}.json")).lines == {}
    for _ in range(2):
        state = rollouts.end_line(library, LINE)
        assert (state.role, state.published) == ("targets", False)
    assert library.lines() == [OTHER]
    box.index()  # until the holders of targets have signed, nothing has changed for boxes
    site.sign_all()
    assert library.staged_roles() == []
    with refused("no model line"):
        rollouts.end_line(library, LINE)


def test_what_waited_for_an_ended_line_is_dropped(site: Site, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    library = site.by_hand()
    publish.publish(library, tiny_bundle(tmp_path, "0.2.0", seed=1))
    assert library.staged_roles() == [LINE]
    rollouts.end_line(library, LINE)
    library.renew(OTHER)
    assert LINE not in library.staged_roles()
    site.sign_all()
    assert library.staged_roles() == []


def test_an_end_that_is_discarded_did_not_happen(site: Site, box: Follower, tmp_path: Path) -> None:
    library = site.by_hand()
    rollouts.end_line(library, LINE)
    library.discard()
    assert LINE in library.lines()
    assert box.index().versions == []


def test_an_end_that_is_taken_back_before_it_is_signed_changes_the_keys(site: Site, box: Follower) -> None:
    library = site.by_hand()
    rollouts.end_line(library, LINE)
    site.holders[LINE] = [CryptoSigner.generate_ed25519()]
    library.add_line(LINE, [site.holders[LINE][0].public_key], threshold=1)
    site.library.signers.update({signer.public_key.keyid: signer for signer in site.holders[LINE]})
    site.sign_all()
    box.index()
    assert site.library.status()["roles"][LINE]["keys"][0]["keyid"] == site.holders[LINE][0].public_key.keyid


def test_a_line_begun_again_is_public_only_when_its_new_holders_have_signed(site: Site, box: Follower, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    rollouts.end_line(site.library, LINE)
    library, old = site.by_hand(), site.holders[LINE]
    library.add_line(LINE, [signer.public_key for signer in old])  # the same people: what they signed before is not enough
    for signer in site.holders["targets"]:
        if "targets" in library.staged_roles() and signer.public_key.keyid not in library.staged("targets").signatures:  # type: ignore[union-attr]
            library.sign("targets", signer)
    assert library.staged_roles() == ["targets", LINE]
    assert library.published(LINE) is None
    assert library.status()["roles"][LINE]["published"] is None
    with pytest.raises(AssertionError):
        box.look()
    site.sign_all()
    assert box.index().release("0.1.0")


def test_a_stick_of_a_library_with_an_ended_line_serves_a_box(site: Site, tmp_path: Path) -> None:
    site.rollout("stable", LINE, tiny(site, tmp_path, LINE))
    rollouts.end_line(site.library, OTHER)
    (tmp_path / "stick").mkdir()
    assert usb_export.export(site.public, tmp_path / "stick").versions == {LINE: ["0.1.0"]}
    box = make_box(tmp_path / "box", site)
    box.client().import_usb(tmp_path / "stick")
    assert box.wants(LINE) == "0.1.0"


# --- names ------------------------------------------------------------------------------------------------------------------

DEVICES = ["con", "nul", "aux", "prn", "com1", "com9", "lpt1", "lpt9"]
ROLES = ["root", "targets", "snapshot", "timestamp", "rollout"]


@pytest.mark.parametrize("name", [*DEVICES, *ROLES, "tmp", "tmp-line", "tmpabcdef", "", "-", "Cxr", "a/b", "a.b", "a" * 65, "肺"])
def test_a_name_that_no_line_can_have_is_refused_when_it_is_added(name: str, site: Site) -> None:
    keys = [CryptoSigner.generate_ed25519().public_key for _ in range(2)]
    before = site.library.status()["roles"]
    with refused("cannot (be called|name a model line)"):
        site.library.add_line(name, keys)
    assert site.library.status()["roles"] == before


@pytest.mark.parametrize("name", ["1", "lines", "root_history", "console", "com10", "a_tmp", "cxr", "cxr-2"])
def test_a_name_that_only_looks_strange_is_a_line(name: str, tmp_path: Path) -> None:
    site = make_site(tmp_path / "lib", lines=(name,), rollout=False)
    assert Follower(site, tmp_path / "box").look(f"models/{name}/line.json")


# --- versions ---------------------------------------------------------------------------------------------------------------

BAD_VERSIONS = {
    "a number with a zero in front": "1.0.0-01",
    "an empty part": "1.0.0-a..b",
    "longer than 64 characters": "1.4.0-rc.1+20260301120000.4f3c2b1a9e8d7c6b5a4f3e2d1c0b9a8f7e6d5c4b",
    "two numbers": "1.0",
    "a v in front": "v1.0.0",
    "nothing": "",
    "digits of another script": "1.0.٣",
}


@pytest.mark.parametrize("name", BAD_VERSIONS)
def test_a_version_that_boxes_cannot_reckon_with_is_refused(name: str, site: Site, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, "1.0.0")
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"version": BAD_VERSIONS[name]}), "utf-8")
    with refused("is no semantic version of at most 64 characters; nothing was published") as caught:
        site.publish(bundle)
    assert "1.4.0-rc.1" in caught.value.hint
    assert site.library.index(LINE).versions == []


def test_an_index_that_boxes_would_not_read_is_not_staged(site: Site, tmp_path: Path) -> None:
    """Boxes read at most 500 versions of a line."""
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    release = site.library.index(LINE).versions[0]
    many = [release.model_copy(update={"version": f"0.0.{number}"}) for number in range(500)]
    full: LineIndex = site.library.index(LINE).model_copy(update={"versions": [*many[:499], release]})
    publish._stage_index(site.by_hand(), full)
    library = site.by_hand()
    before = library.staged(LINE)
    with refused("this index is not valid: versions"):
        publish.publish(library, tiny_bundle(tmp_path, "0.2.0", seed=1))
    after = library.staged(LINE)
    assert before is not None
    assert after is not None
    assert after.signed_bytes == before.signed_bytes
    library.discard()


def test_metadata_that_boxes_would_not_read_is_not_staged(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = newest(site, LINE)
    monkeypatch.setattr(library_roles, "MAX_METADATA_BYTES", library_roles._ROOM_FOR_SIGNATURES + len(now.to_bytes()) + 100)
    with refused("larger than .* which is the most that a box reads"):
        site.publish(tiny_bundle(tmp_path, "0.1.0"))
    assert newest(site, LINE).signed.version == now.signed.version
    assert site.library.staged_roles() == []
