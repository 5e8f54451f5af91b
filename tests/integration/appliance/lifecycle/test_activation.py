"""A model is proven in a process of its own that may die, hang, lie or starve: whatever it does, the one before it goes on reading."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.core.errors import ActivationError
from appliance.core.settings import Settings
from appliance.lifecycle import model_files
from appliance.lifecycle.journal_queries import reason_code
from appliance.lifecycle.model_control import activate, find, roll_back
from appliance.store.store import Store
from tests.support.activation_box import (
    ENDLESS,
    Box,
    change_manifest,
    digest_of,
    hungry,
    junk,
    looping,
    nan_on_pictures,
    self_tests,
    wanted,
    watched,
)
from tests.support.paths import ROOT


@pytest.fixture
def box(tmp_path: Path, store: Store) -> Iterator[Box]:
    """A box whose first model is at work."""
    made = Box(tmp_path, store)
    made.first()
    yield made
    store.database.verify_audit()
    assert not self_tests()


def test_the_first_model_of_a_line_is_good_at_once_and_watched(box: Box) -> None:
    """There is nothing to fall back to: a trial could only end in no model at all."""
    (row,) = box.journal.history()
    report = json.loads(row["self_test"])
    assert (row["state"], row["attempts"]) == ("good", 0)
    assert json.loads(row["trial"])["watching"]
    assert report["median_ms"] > 0
    assert report["worst_ms"] >= report["median_ms"]
    assert report["peak_rss_bytes"] > 2**20
    assert report["details"]["provider"] == "CPUExecutionProvider"
    assert box.journal.monitored()[0]["id"] == row["id"]


def test_every_state_is_journalled_with_its_audit_entry(box: Box) -> None:
    number = box.journal.start(wanted(box.bundle("1.1.0")))
    box.settle(box.activator())
    assert box.state(number) == "trial"
    assert box.active() == box.journal.row(number)["digest"]
    entries = [json.loads(row["entry"]) for row in box.store.database.query("SELECT entry FROM audit ORDER BY seq")]
    states = [entry["detail"]["state"] for entry in entries if entry["detail"].get("version") == "1.1.0" and "state" in entry["detail"]]
    assert states == ["staged", "staged", "building", "self-test", "self-test"]
    assert entries[-1]["detail"]["type_meaning"] == "Software Configuration"


def slow_to_build(bundle: Path) -> Path:
    return looping(bundle, empty=60_000)


def slow_to_prove(bundle: Path) -> Path:
    return looping(bundle, picture=40_000)


@pytest.mark.parametrize(("state", "slow"), [("staged", slow_to_build), ("building", slow_to_build), ("self-test", slow_to_prove)])
def test_a_proof_killed_in_any_state_is_begun_again(box: Box, state: str, slow: Callable[[Path], Path]) -> None:
    old, bundle = box.active(), slow(box.bundle("1.1.0"))
    number = box.journal.start(wanted(bundle))
    activator = box.activator()
    box.step_until(activator, lambda: activator.self_test_pid and box.state(number) == state)
    assert activator.self_test_pid
    os.kill(activator.self_test_pid, signal.SIGKILL)
    assert box.active() == old
    box.step_until(activator, lambda: not box.under_way(number))
    assert box.state(number) == "trial"
    assert box.active() == digest_of(bundle)


def test_a_proof_that_keeps_dying_ends_the_crash_loop_and_is_not_tried_again(box: Box) -> None:
    old, bundle = box.active(), looping(box.bundle("1.1.0"), empty=ENDLESS)
    number = box.journal.start(wanted(bundle))
    activator = box.activator()
    killed = 0
    while box.under_way(number):
        activator.tick()
        if activator.self_test_pid and box.state(number) == "building":
            os.kill(activator.self_test_pid, signal.SIGKILL)
            box.step_until(activator, lambda: box.state(number) != "building")
            killed += 1
    assert killed == 3
    assert box.last() == ("failed", "activation.crash_loop")
    assert box.active() == old
    remembered = box.journal.find_blocking_failure(digest_of(bundle))
    assert remembered
    with pytest.raises(ActivationError, match=r"activation\.failed_before.*activation\.crash_loop"):
        activate(box.store, bundle, "test")


def lying(bundle: Path) -> Path:
    return change_manifest(bundle, lambda manifest: [golden.update(expected={"pneumonia": 0.01}) for golden in manifest["golden"]])


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "NaN": (nan_on_pictures, "model.self_test"),
    "more memory than there is": (hungry, "model.self_test"),
    "no model at all": (junk, "model.self_test"),
    "another answer than promised": (lying, "model.self_test"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_fails_its_self_test_is_remembered_on_this_device(box: Box, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, (spoil, code) = box.active(), BAD[name]
    bundle = spoil(box.bundle("1.1.0"))
    with pytest.raises(ActivationError) as caught:
        activate(box.store, bundle, "test")
    assert caught.value.code == code
    assert caught.value.hint
    assert (box.last(), box.active()) == (("failed", code), old)
    with pytest.raises(ActivationError, match=r"activation\.failed_before"):
        activate(box.store, bundle, "test")
    assert len(box.journal.history()) == 2
    monkeypatch.setattr(box.journal, "device", "another")
    assert box.journal.find_blocking_failure(digest_of(bundle)) is None


def test_again_tries_what_failed_before(box: Box) -> None:
    bundle = nan_on_pictures(box.bundle("1.1.0"))
    for again in (False, True):
        with pytest.raises(ActivationError, match=r"model\.self_test"):
            activate(box.store, bundle, "test", again=again)
    assert [row["state"] for row in box.journal.history()] == ["failed", "failed", "good"]


@pytest.mark.parametrize("where", ["building", "self-test"])
def test_a_proof_that_hangs_is_ended_at_its_deadline(tmp_path: Path, settings: Settings, where: str) -> None:
    old = Box(tmp_path, Store(settings)).first()
    box = Box(tmp_path, Store(settings.model_copy(update={"activation_deadline_s": 8.0})))
    bundle = looping(box.bundle("1.1.0"), **{"empty" if where == "building" else "picture": ENDLESS})
    with pytest.raises(ActivationError, match=r"activation\.deadline") as caught:
        activate(box.store, bundle, "test")
    assert where in caught.value.detail
    assert box.active() == old
    assert not self_tests()


def test_a_proof_that_is_stopped_is_ended_at_its_deadline(tmp_path: Path, settings: Settings) -> None:
    """SIGSTOP: what a process in the kernel's hands looks like from outside."""
    old = Box(tmp_path, Store(settings)).first()
    box = Box(tmp_path, Store(settings.model_copy(update={"activation_deadline_s": 1.0})))
    number = box.journal.start(wanted(box.bundle("1.1.0")))
    activator = box.activator()
    box.step_until(activator, lambda: activator.self_test_pid)
    assert activator.self_test_pid
    os.kill(activator.self_test_pid, signal.SIGSTOP)
    box.step_until(activator, lambda: not box.under_way(number))
    assert (box.last(), box.active()) == (("failed", "activation.deadline"), old)
    assert not self_tests()


def test_a_proof_dies_with_whoever_started_it(box: Box, tmp_path: Path) -> None:
    """Also while it is stopped, when no other signal would reach it."""
    bundle = looping(box.bundle("1.1.0"), empty=ENDLESS)
    box.journal.start(wanted(bundle))
    script = (
        "import sys, time; from pathlib import Path; from appliance.core.settings import Settings\n"
        "from appliance.store.store import Store\n"
        "from tests.support.activation_box import Box\n"
        "settings = Settings.parse({'data_dir': sys.argv[2], 'tune_at_activation': False})\n"
        "box = Box(Path(sys.argv[1]), Store(settings)); activator = box.activator()\n"
        "while True: activator.tick(); time.sleep(0.01)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(box.store.settings.data_dir)], cwd=ROOT)
    limit = time.monotonic() + 60
    while box.journal.history(1)[0]["state"] != "building":
        assert time.monotonic() < limit
        time.sleep(0.01)
    (proof,) = self_tests(parent)
    proof.suspend()
    parent.kill()
    parent.wait()
    proof.wait(10)
    assert not proof.is_running()


def test_the_next_version_takes_the_place_of_one_that_is_not_proven_yet(box: Box) -> None:
    first = box.journal.start(wanted(looping(box.bundle("1.1.0"), empty=ENDLESS)))
    activator = box.activator()
    box.step_until(activator, lambda: box.state(first) == "building")
    second = box.journal.start(wanted(box.bundle("1.2.0")))
    box.step_until(activator, lambda: not box.under_way(second))
    assert (box.state(first), box.state(second)) == ("failed", "trial")
    assert reason_code(box.journal.row(first)) == "activation.superseded"
    assert box.journal.find_blocking_failure(box.journal.row(first)["digest"]) is None


def test_two_lines_have_their_models_side_by_side(box: Box) -> None:
    other = activate(box.store, box.bundle("0.1.0", line="bone-age"), "test")
    assert box.active("bone-age") == other
    assert box.active() is not None
    with pytest.raises(ActivationError, match="say which line"):
        roll_back(box.store, None, "test")
    with pytest.raises(ActivationError, match=r"model\.no_previous"):
        roll_back(box.store, "bone-age", "test")


def test_back_by_hand_and_on_again(box: Box) -> None:
    old = box.active()
    new = activate(box.store, box.bundle("1.1.0"), "test")
    image = box.scan()
    assert box.work() == new
    waiting = box.scan("2")
    assert roll_back(box.store, None, "test") == old
    assert box.active() == old
    states = {row["version"]: row["state"] for row in reversed(box.journal.history())}
    assert states == {"1.1.0": "rolled-back", "1.0.0": "good"}
    (job,) = box.store.database.query("SELECT notes FROM jobs WHERE instance_id = ?", image)
    assert json.loads(job["notes"])[-1] == {"code": "activation.rolled_back", "detail": "activation.by_hand"}
    assert box.work() == old  # what waited for the version taken back went to the one that reads now
    assert [row["model_digest"] for row in box.store.database.query("SELECT * FROM jobs WHERE instance_id = ?", waiting)] == [old]
    with pytest.raises(ActivationError, match=r"activation\.failed_before.*by_hand"):
        activate(box.store, find(box.store, "1.1.0"), "test")
    assert activate(box.store, find(box.store, new[:8]), "test", again=True) == new


def test_anti_rollback_holds_by_hand(box: Box) -> None:
    """R26: a version below the signed minimum, or withdrawn, is refused however it comes."""
    old = box.active()
    new = activate(box.store, box.bundle("1.1.0"), "test")
    box.journal.record_restrictions("cxr-pneumonia", "1.1.0", {"1.2.0": "reads healthy children as ill"})
    for version, code in (("0.9.0", "model.below_minimum"), ("1.2.0", "model.withdrawn")):
        with pytest.raises(ActivationError) as caught:
            activate(box.store, box.bundle(version), "test")
        assert (caught.value.code, bool(caught.value.hint)) == (code, True)
    with pytest.raises(ActivationError, match=r"model\.below_minimum"):
        roll_back(box.store, None, "test")
    assert box.active() == new != old
    assert not box.journal.record_restrictions("cxr-pneumonia", "1.0.0", {})  # neither ever gets less strict
    assert box.journal.find_restriction("cxr-pneumonia", "1.0.0")
    assert box.journal.find_restriction("cxr-pneumonia", "1.2.0")


def test_a_minimum_that_rises_between_proof_and_switch_is_heeded(box: Box) -> None:
    old = box.active()
    number = box.journal.start(wanted(slow_to_prove(box.bundle("1.1.0"))))
    activator = box.activator()
    box.step_until(activator, lambda: box.state(number) == "self-test")
    box.journal.record_restrictions("cxr-pneumonia", "2.0.0", {})
    box.step_until(activator, lambda: not box.under_way(number))
    assert box.last() == ("failed", "model.below_minimum")
    row = box.journal.active("cxr-pneumonia")
    assert row
    assert row["digest"] == old  # below the minimum too, but nothing better is here: only a withdrawal switches off


def test_the_copy_is_made_of_what_was_checked(box: Box) -> None:
    """What the wish names is not what lies there: the agent's directory may change at any moment."""
    old, bundle = box.active(), box.bundle("1.1.0")
    wish = wanted(bundle)
    change_manifest(bundle, lambda manifest: manifest.update(licence="another"))
    number = box.journal.start(wish)
    box.step_until(box.activator(), lambda: not box.under_way(number))
    assert (box.last(), box.active()) == (("failed", "model.mismatch"), old)
    target = bundle / "MODEL_CARD.md"
    target.rename(bundle.parent / "elsewhere")
    target.symlink_to(bundle.parent / "elsewhere")
    number = box.journal.start(wanted(bundle))
    box.step_until(box.activator(), lambda: not box.under_way(number))
    assert (box.last(), box.active()) == (("failed", "model.invalid"), old)


def test_what_dead_proofs_left_is_swept(box: Box) -> None:
    models = box.store.settings.data_dir / "models"
    for name in (f"{'a' * 64}.123.part", "b" * 64, f"{'c' * 64}.damaged-1"):
        (models / name).mkdir()
    activate(box.store, box.bundle("1.1.0"), "test")
    assert {path.name for path in models.iterdir()} == {*box.journal.installed_digests(), f"{'c' * 64}.damaged-1"}


def test_a_database_that_cannot_be_written_stops_nothing_for_good(box: Box) -> None:
    """Another process holds the write lock for ever, as on a disk that became read-only; then it lets go."""
    old, number = box.active(), box.journal.start(wanted(box.bundle("1.1.0")))
    activator = box.activator()
    connection = box.store.database.connection()
    connection.execute("PRAGMA query_only = ON")
    for _ in range(5):
        activator._next_tick = 0.0
        activator.tick()
    assert (box.state(number), box.journal.row(number)["attempts"], activator.self_test_pid) == ("staged", 0, None)
    connection.execute("PRAGMA query_only = OFF")
    activator._next_tick = 0.0
    box.step_until(activator, lambda: activator.self_test_pid)
    connection.execute("PRAGMA query_only = ON")
    for _ in range(50):
        activator._next_tick = 0.0
        activator.tick()
        time.sleep(0.05)
    assert box.active() == old
    connection.execute("PRAGMA query_only = OFF")
    activator._next_tick = 0.0
    box.step_until(activator, lambda: not box.under_way(number))
    assert box.state(number) == "trial"


FILL = """
import sys
from pathlib import Path
from appliance.core.errors import ActivationError, StoreError
from appliance.lifecycle.journal_queries import reason_code
from appliance.lifecycle.model_control import activate
from appliance.core.settings import Settings
from appliance.store.store import Store
from tests.support.activation_box import Box, digest_of
outside, inside, room = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
box = Box(outside, Store(Settings.parse({"data_dir": inside, "disk_reserve_bytes": 0, "tune_at_activation": False})))
old, bundle = box.first(), box.bundle("1.1.0", hidden=256)
ballast = open(inside / "ballast", "wb", buffering=0)
try:
    while ballast.write(bytes(4096)): pass
except OSError:
    ballast.truncate(ballast.tell() - room)
try:
    activate(box.store, bundle, "test")
    code = "fits"
except (ActivationError, StoreError) as error:
    code = error.code
(inside / "ballast").unlink()
ballast.close()
print(code, box.active() in (old, digest_of(bundle)))
new = activate(box.store, bundle, "test")
print(box.active() == new, len(list((inside / "models").iterdir())), box.store.database.verify_audit() > 0)
"""


@pytest.mark.parametrize(
    "room_bytes", [0, 40_000, 320_000, *(pytest.param(room, marks=pytest.mark.long) for room in (8192, 150_000, 450_000))]
)
def test_disk_full_at_any_step_leaves_a_working_model(tmp_path: Path, room_bytes: int) -> None:
    """A real file system that fills up: the copy, the journal or the database's log is what does not fit."""
    script = 'mkdir "$1/disk" && mount -t tmpfs -o size=8m none "$1/disk" && exec "$2" -c "$3" "$1" "$1/disk" "$4"'
    line = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, FILL, str(room_bytes)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("this kernel lets no user mount a file system of its own")
    assert done.returncode == 0, done.stderr
    code, kept, *after = done.stdout.split()
    print(f"{room_bytes} bytes of room: {code}")
    assert code in {"fits", "model.disk_full", "ingest.disk_full", "store.failed"}
    assert [kept, *after] == ["True", "True", "2", "True"]


def test_the_copy_that_is_fallen_back_to_must_be_whole(box: Box) -> None:
    old = box.active()
    new = activate(box.store, watched(box.bundle("1.1.0"), max_failure_fraction=0.0), "test")
    assert old
    (model_files.model_dir(box.store.settings.data_dir, old) / "model_fp32.onnx").write_bytes(b"junk")
    waiting = [box.scan(str(n)) for n in range(4)]
    for _ in range(3):
        box.fail()
    activator = box.activator()
    box.step_until(activator, lambda: box.last()[0] == "rolled-back")
    box.settle(activator)
    assert box.active() is None  # none rather than a damaged one, and it is said, never silent
    rows = box.store.database.query("SELECT state, reason FROM instances WHERE id IN (SELECT value FROM json_each(?))", json.dumps(waiting))
    assert {(row["state"], json.loads(row["reason"])["code"]) for row in rows} == {("not_analysed", "activation.failures")}
    assert activate(box.store, box.bundles / "cxr-pneumonia-1.0.0", "test") == old
    assert box.store.model(new)["state"] == "retired"
    box.store.planner.close_series([row["id"] for row in box.store.database.query("SELECT id FROM series WHERE open = 1")])
    assert [box.work() for _ in waiting] == [old] * 4  # what nobody could read meanwhile is read now
