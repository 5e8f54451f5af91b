"""The brake of a rollout against what else happens: a rollout that waits, a command at work, a disk that fails, a human who resumes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import Key

from model_sync.documents import ROLLOUT_ROLE, Rollout, RolloutStep, rollout_path
from model_sync.errors import PublishError
from model_sync.fleet_rollouts import Rollouts
from model_sync.keys import load_signer
from model_sync.repository import Library
from tests.fleet_site import PASSPHRASE, Centre
from tests.library_site import tiny_bundle

LINE = "cxr-pneumonia"


@pytest.fixture
def centre(tmp_path: Path) -> Iterator[Centre]:
    """A centre with two public versions, and the keys of its server as files."""
    made = Centre(tmp_path / "centre", rollout_key=True)
    for number, version in enumerate(("0.1.0", "0.2.0")):
        made.site.publish(tiny_bundle(tmp_path / "bundles", version, number), deltas=False)
    yield made
    made.close()


def rollouts_of(centre: Centre) -> Rollouts:
    """Return the brake as the server has it."""
    assert centre.rollout_key is not None
    signer = load_signer(str(centre.rollout_key), lambda _what: PASSPHRASE)
    return Rollouts(centre.site.library.files.directory, centre.fleet, signer, lambda _what: PASSPHRASE)


def public_step(centre: Centre, ring: str = "stable") -> RolloutStep:
    library = Library(centre.site.library.files.directory)
    md = library.published(ROLLOUT_ROLE)
    assert md is not None
    return Rollout.parse(library.read_target(md.signed, rollout_path(ring))).lines[LINE]


def staged_step(centre: Centre, ring: str = "stable") -> RolloutStep:
    library = Library(centre.site.library.files.directory)
    md = library.staged(ROLLOUT_ROLE)
    assert md is not None
    assert not md.signatures
    return Rollout.parse(library.read_target(md.signed, rollout_path(ring))).lines[LINE]


# -- a rollout that waits


def test_a_pause_publishes_nothing_that_waits_and_what_waits_still_can_be_signed(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.1.0", 10.0)
    centre.site.rollout("canary", LINE, "0.1.0")
    by_hand = Library(centre.site.library.files.directory)
    by_hand.rollout("canary", LINE, "0.2.0", 100.0)
    assert rollouts_of(centre).set_paused("stable", LINE, True, "wang")
    assert (public_step(centre).version, public_step(centre).percent, public_step(centre).paused) == ("0.1.0", 10.0, True)
    assert public_step(centre, "canary").version == "0.1.0"  # nobody has signed the other yet
    assert (staged_step(centre, "canary").version, staged_step(centre).paused) == ("0.2.0", True)
    assert centre.site.library.sign(ROLLOUT_ROLE, centre.site.holders[ROLLOUT_ROLE][0]).published
    assert public_step(centre, "canary").version == "0.2.0"
    assert public_step(centre).paused
    assert centre.site.library.verify()


@pytest.mark.parametrize(("version", "paused"), [("0.1.0", True), ("0.2.0", False)])
def test_a_waiting_step_of_the_paused_version_is_paused_too_and_another_version_is_not(centre: Centre, version: str, paused: bool) -> None:
    centre.site.rollout("stable", LINE, "0.1.0", 10.0)
    Library(centre.site.library.files.directory).rollout("stable", LINE, version, 100.0)
    rollouts_of(centre).set_paused("stable", LINE, True, "wang")
    assert (public_step(centre).version, public_step(centre).percent, public_step(centre).paused) == ("0.1.0", 10.0, True)
    assert (staged_step(centre).version, staged_step(centre).percent, staged_step(centre).paused) == (version, 100.0, paused)


def test_where_one_key_does_not_suffice_what_waits_is_left_as_it_is(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.1.0", 10.0)
    centre.site._keys("second", 1)
    keys: list[Key] = [centre.site.holders[ROLLOUT_ROLE][0].public_key, centre.site.holders["second"][0].public_key]
    centre.site.library.set_rollout_keys(keys, 2)
    Library(centre.site.library.files.directory).rollout("stable", LINE, "0.2.0", 100.0)
    before = centre.site.library.files.staged_path(ROLLOUT_ROLE).read_bytes()
    with pytest.raises(PublishError, match="needs more signatures") as caught:
        rollouts_of(centre).set_paused("stable", LINE, True, "wang")
    assert "discard" in caught.value.hint
    assert centre.site.library.files.staged_path(ROLLOUT_ROLE).read_bytes() == before
    assert not public_step(centre).paused


def test_where_the_online_keys_do_not_open_what_waits_is_left_as_it_is(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.1.0", 10.0)
    Library(centre.site.library.files.directory).rollout("stable", LINE, "0.2.0", 100.0)
    before = centre.site.library.files.staged_path(ROLLOUT_ROLE).read_bytes()
    assert centre.rollout_key is not None
    signer = load_signer(str(centre.rollout_key), lambda _what: PASSPHRASE)
    with pytest.raises(PublishError, match="locked"):
        Rollouts(centre.site.library.files.directory, centre.fleet, signer).set_paused("stable", LINE, True, "wang")
    assert centre.site.library.files.staged_path(ROLLOUT_ROLE).read_bytes() == before
    assert not public_step(centre).paused


# -- a disk that fails


def test_a_disk_that_fails_does_not_keep_the_lock(centre: Centre) -> None:
    scratch = centre.site.library.files.scratch
    shutil.rmtree(scratch)
    scratch.write_text("in the way")
    held = Library(centre.site.library.files.directory)  # an object that lives on, as a traceback lets it
    with pytest.raises(PublishError, match="scratch"), held.files.locked():
        pass
    scratch.unlink()
    with Library(centre.site.library.files.directory, lock_timeout_s=0.0).files.locked():
        assert scratch.is_dir()
