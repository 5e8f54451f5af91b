"""The brake of a rollout against what else happens: a rollout that waits, a command at work, a disk that fails, a human who resumes."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import Key

from model_sync.agent.report import StatusReport
from model_sync.errors import PublishError
from model_sync.fleet.database import MODEL_FAULT_CODES
from model_sync.fleet.pause import ExpectedRollout
from model_sync.fleet.rollout_pause_policy import RolloutPausePolicy
from model_sync.fleet.rollouts import Rollouts
from model_sync.fleet.tables import boxes
from model_sync.fleet.views import progress
from model_sync.library import rollouts
from model_sync.library.keys import load_signer
from model_sync.library.library import Library
from model_sync.trust.documents import ROLLOUT_ROLE, Rollout, RolloutStep, rollout_path
from tests.support.fleet_site import PASSPHRASE, Centre, box_report, stamp, status_json
from tests.support.library_site import tiny_bundle

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


def until(true: Callable[[], bool]) -> None:
    """Wait for what happens behind a report; the suite's own time limit ends it."""
    while not true():
        time.sleep(0.05)


def take(centre: Centre, box_id: str, sequence: int, report: dict[str, Any]) -> None:
    """Let the centre keep a report of a box that is enrolled without a wire."""
    with centre.fleet.writing() as tx:
        fresh = centre.fleet.insert(boxes).values(box_id=box_id, ring="stable", enrolled_at=1)
        tx.execute(fresh.on_conflict_do_nothing())
    centre.fleet.store_report(StatusReport.model_validate_json(status_json(box_id, sequence, box=report)), per_hour=60)


# -- a rollout that waits


def test_a_pause_publishes_nothing_that_waits_and_what_waits_still_can_be_signed(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.1.0", 10.0)
    centre.site.rollout("canary", LINE, "0.1.0")
    by_hand = Library(centre.site.library.files.directory)
    rollouts.rollout(by_hand, "canary", LINE, "0.2.0", 100.0)
    assert rollouts_of(centre).set_paused("stable", LINE, True, "wang", ExpectedRollout("0.1.0"))
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
    rollouts.rollout(Library(centre.site.library.files.directory), "stable", LINE, version, 100.0)
    rollouts_of(centre).set_paused("stable", LINE, True, "wang", ExpectedRollout("0.1.0"))
    assert (public_step(centre).version, public_step(centre).percent, public_step(centre).paused) == ("0.1.0", 10.0, True)
    assert (staged_step(centre).version, staged_step(centre).percent, staged_step(centre).paused) == (version, 100.0, paused)


def test_where_one_key_does_not_suffice_what_waits_is_left_as_it_is(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.1.0", 10.0)
    centre.site._keys("second", 1)
    keys: list[Key] = [centre.site.holders[ROLLOUT_ROLE][0].public_key, centre.site.holders["second"][0].public_key]
    centre.site.library.set_rollout_keys(keys, 2)
    rollouts.rollout(Library(centre.site.library.files.directory), "stable", LINE, "0.2.0", 100.0)
    before = centre.site.library.files.staged_path(ROLLOUT_ROLE).read_bytes()
    with pytest.raises(PublishError, match="needs more signatures") as caught:
        rollouts_of(centre).set_paused("stable", LINE, True, "wang", ExpectedRollout("0.1.0"))
    assert "discard" in caught.value.hint
    assert centre.site.library.files.staged_path(ROLLOUT_ROLE).read_bytes() == before
    assert not public_step(centre).paused


def test_where_the_online_keys_do_not_open_what_waits_is_left_as_it_is(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.1.0", 10.0)
    rollouts.rollout(Library(centre.site.library.files.directory), "stable", LINE, "0.2.0", 100.0)
    before = centre.site.library.files.staged_path(ROLLOUT_ROLE).read_bytes()
    assert centre.rollout_key is not None
    signer = load_signer(str(centre.rollout_key), lambda _what: PASSPHRASE)
    with pytest.raises(PublishError, match="locked"):
        Rollouts(centre.site.library.files.directory, centre.fleet, signer).set_paused(
            "stable", LINE, True, "wang", ExpectedRollout("0.1.0")
        )
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


def test_a_library_that_cannot_be_read_or_written_takes_no_report_with_it(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.2.0", 50.0)
    centre.start()
    scratch = centre.site.library.files.scratch
    shutil.rmtree(scratch)
    scratch.write_text("in the way")
    failed = box_report("0.2.0", "failed", "model.self_test")
    for number in range(3):
        box = centre.box(f"box-{number}")
        assert box.send(box.report(1, box=failed)).status_code == 204
    until(lambda: "nothing was paused" in centre.log.read_text())
    assert not public_step(centre).paused
    scratch.unlink()
    until(lambda: public_step(centre).paused)  # by itself: nobody reports any more


# -- a command at work


def test_while_a_command_holds_the_library_reports_are_answered_and_the_pause_follows(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.2.0", 50.0)
    centre.start()
    asking = [centre.box(f"box-{number}") for number in range(20)]
    failed = box_report("0.2.0", "failed", "model.self_test")
    with (centre.site.library.files.directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(20) as pool:  # more than the server has threads
            answers = [pool.submit(box.send, box.report(1, box=failed)) for box in asking]
            assert [answer.result().status_code for answer in answers] == [204] * 20
        assert centre.get("/healthz").status_code == 200
        assert not public_step(centre).paused
        with pytest.raises(PublishError, match="another model-library command"):
            rollouts_of(centre).set_paused("stable", LINE, True, "wang", ExpectedRollout("0.2.0"))
    until(lambda: public_step(centre).paused)


def test_a_brake_that_failed_tries_again_by_itself_and_ends_when_it_is_closed(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.2.0", 50.0)
    failed = box_report("0.2.0", "failed", "model.self_test")
    for number in range(2):
        take(centre, f"box-{number}", 1, failed)
    timestamp = centre.site.library.files.metadata_path("timestamp")
    good = timestamp.read_bytes()
    timestamp.write_bytes(b"{")
    pause_policy = RolloutPausePolicy(centre.fleet, rollouts_of(centre), retry_s=0.01)
    with pytest.raises(PublishError):
        pause_policy.check("stable")
    pause_policy.schedule_check("stable")
    timestamp.write_bytes(good)
    until(lambda: public_step(centre).paused)
    pause_policy.close()
    pause_policy.schedule_check("stable")  # harmless


def test_what_was_changed_since_it_was_seen_is_not_undone_by_a_button(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.1.0", 10.0)
    rollouts = rollouts_of(centre)
    old = rollouts.published().serial
    centre.site.rollout("stable", LINE, "0.2.0", 100.0)  # by the command line, while a page is open
    before = centre.site.library.published(ROLLOUT_ROLE)
    assert before is not None
    for paused, seen in (
        (True, ExpectedRollout("0.1.0")),
        (True, ExpectedRollout("")),
        (True, ExpectedRollout("0.2.0", old)),
        (False, ExpectedRollout("0.2.0", old)),
    ):
        with pytest.raises(PublishError, match="changed in the meantime"):
            rollouts.set_paused("stable", LINE, paused, "wang", seen)
    after = centre.site.library.published(ROLLOUT_ROLE)
    assert after is not None
    assert after.signed.version == before.signed.version
    centre.site.rollout("canary", LINE, "0.1.0")  # of no concern to who stops a version
    assert rollouts.set_paused("stable", LINE, True, "wang", ExpectedRollout("0.2.0"))
    assert (public_step(centre).version, public_step(centre).percent, public_step(centre).paused) == ("0.2.0", 100.0, True)


# -- what counts, and who lets a version go on


@pytest.mark.parametrize("code", sorted(MODEL_FAULT_CODES))
def test_what_speaks_of_the_model_spends_the_budget(centre: Centre, code: str) -> None:
    centre.site.rollout("stable", LINE, "0.2.0", 50.0)
    for number in range(2):
        take(centre, f"box-{number}", 1, box_report("0.2.0", "failed", code))
    assert centre.fleet.tally("stable", LINE, "0.2.0") == (2, 0, 2)
    assert RolloutPausePolicy(centre.fleet, rollouts_of(centre)).check("stable")
    assert public_step(centre).paused


def test_what_speaks_of_a_box_or_of_people_does_not(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.2.0", 50.0)
    for code in ("model.disk_full", "trust.expired", "model.absent", "activation.superseded", "model.too_new", "activation.by_hand"):
        take(centre, code, 1, box_report("0.2.0", "rolled-back" if code.startswith("activation") else "failed", code))
    take(centre, "box-9", 1, box_report("0.2.0", "failed", "model.self_test"))
    assert centre.fleet.tally("stable", LINE, "0.2.0") == (1, 0, 1)
    now = centre.fleet.now()
    assert progress(centre.fleet, "stable", LINE, "0.2.0", now - 3600, now + 1).tally == (1, 0, 1)
    assert RolloutPausePolicy(centre.fleet, rollouts_of(centre)).check("stable")
    assert not public_step(centre).paused


@pytest.mark.parametrize("by_page", [True, False])
def test_failures_that_a_human_knew_of_do_not_stop_a_version_again_and_others_do(centre: Centre, by_page: bool) -> None:
    centre.site.rollout("stable", LINE, "0.2.0", 50.0)
    rollouts = rollouts_of(centre)
    pause_policy = RolloutPausePolicy(centre.fleet, rollouts)
    failed = box_report("0.2.0", "failed", "model.self_test")
    for number in range(2):
        take(centre, f"box-{number}", 1, failed)
    pause_policy.check("stable")
    assert public_step(centre).paused
    if by_page:
        assert rollouts.set_paused("stable", LINE, False, "wang", ExpectedRollout("0.2.0", rollouts.published().serial), "2/2")
    else:
        centre.site.rollout("stable", LINE, "0.2.0", 50.0)
    for number in range(2, 4):
        pause_policy.check("stable")
        assert not public_step(centre).paused
        take(centre, f"box-{number}", 1, failed)
    pause_policy.check("stable")
    assert public_step(centre).paused  # two more than were known


def test_the_way_back_is_never_braked_and_the_next_way_forward_is(centre: Centre) -> None:
    centre.site.rollout("stable", LINE, "0.2.0")
    centre.site.rollout("canary", LINE, "0.1.0")
    centre.site.rollout("stable", LINE, "0.1.0")
    for number in range(3):
        take(centre, f"box-{number}", 1, box_report("0.1.0", "failed", "activation.latency"))
        take(centre, f"box-{number}", 2, box_report("0.2.0", "failed", "activation.latency", stamp(-30)))
    rollouts = rollouts_of(centre)
    pause_policy = RolloutPausePolicy(centre.fleet, rollouts)
    pause_policy.check("stable")
    assert rollouts.is_rollback("stable", LINE)
    assert not rollouts.is_rollback("canary", LINE)
    assert not public_step(centre).paused
    centre.site.rollout("stable", LINE, "0.2.0")
    pause_policy.check("stable")
    assert public_step(centre).paused
