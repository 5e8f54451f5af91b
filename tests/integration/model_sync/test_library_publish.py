"""Publishing, withdrawing, rollouts: what is refused, by name, and what boxes are told."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from model_sync.delta import codec as delta_codec
from model_sync.errors import PublishError
from model_sync.library import publish
from model_sync.trust.documents import FailureBudget, LineIndex, Rollout
from tests.support.library_follower import Follower, refused
from tests.support.library_site import Site, make_site, tiny_bundle

LINE = "cxr-pneumonia"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path / "lib")


@pytest.fixture
def box(site: Site, tmp_path: Path) -> Follower:
    return Follower(site, tmp_path / "box")


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")


def replace(bundle: Path, name: str, data: bytes) -> None:
    """Another document, with its new digest in the manifest."""
    (bundle / name).write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        for document in manifest["documents"]:
            if document["file"] == name:
                document["sha256"] = hashlib.sha256(data).hexdigest()

    edit(bundle, change)


def add(bundle: Path, name: str) -> None:
    """One more document."""
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"more")
    entry = {"file": name, "sha256": hashlib.sha256(b"more").hexdigest()}
    edit(bundle, lambda manifest: manifest["documents"].append(entry))


def no_gate_document(bundle: Path) -> None:
    (bundle / "gate.json").unlink()
    edit(bundle, lambda m: m.update(documents=[d for d in m["documents"] if d["file"] != "gate.json"]))


def failed_gate(bundle: Path) -> None:
    replace(bundle, "gate.json", json.dumps({"variants": {"fp32": {"passed": False}}}).encode())


def flip(bundle: Path) -> None:
    path = bundle / "model_fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no gate report": (no_gate_document, "gate"),
    "variant without gate report": (lambda b: edit(b, lambda m: m["variants"][0].update(gate=None)), "no gate report"),
    "gate report that is none": (lambda b: replace(b, "gate.json", b"passed"), "no gate report on"),
    "gate report on other variants": (lambda b: replace(b, "gate.json", b'{"variants": {}}'), "no gate report on"),
    "variant that did not pass its gate": (failed_gate, "did not pass"),
    "no golden case": (lambda b: edit(b, lambda m: m.update(golden=[])), "golden"),
    "no operating point": (lambda b: edit(b, lambda m: m.update(operating_points=[])), "operating_points"),
    "no operating point of a segmentation": (
        lambda b: edit(b, lambda m: m.update(operating_points=[], task="segmentation")),
        "operating point",
    ),
    "changed byte": (flip, "digest|SHA-256"),
    "missing file": (lambda b: (b / "MODEL_CARD.md").unlink(), "lacks"),
    "file that the manifest does not list": (lambda b: (b / "extra.bin").write_bytes(b"x"), "does not list"),
    "unknown field": (lambda b: edit(b, lambda m: m.update(surprise=1)), "surprise"),
    "unknown line": (lambda b: edit(b, lambda m: m.update(name="ct-lung")), "no model line 'ct-lung'"),
    "version that is none": (lambda b: edit(b, lambda m: m.update(version="1.0.0-01")), "no semantic version"),
    "file too deep": (lambda b: add(b, "a/b/c/d.txt"), "is in too many folders"),
    "name that ends in a dot": (lambda b: add(b, "notes."), "no name for a USB stick"),
    "name of a device": (lambda b: add(b, "aux.txt"), "no name for a USB stick"),
    "name too long": (lambda b: add(b, "n" * 191), "no name for a USB stick"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_bundle_is_refused_and_leaves_no_trace(site: Site, tmp_path: Path, name: str) -> None:
    bundle = tiny_bundle(tmp_path)
    damage, says = BAD[name]
    damage(bundle)
    with refused(says) as caught:
        publish.publish(site.library, bundle)
    assert caught.value.hint
    assert site.library.staged_roles() == []
    assert not (site.library.files.staged / "targets").exists()
    assert site.library.index(LINE).versions == []


@pytest.mark.parametrize("version", ["0.2.0", "0.1.9", "0.2.0-rc.1", "0.2.0+build.7", "0.0.1"])
def test_a_version_that_is_not_newer_is_refused(site: Site, tmp_path: Path, version: str) -> None:
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=1))
    with refused("not newer|other content"):
        site.publish(tiny_bundle(tmp_path / "again", version, seed=2))


def test_a_version_never_changes_its_content(site: Site, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    site.publish(tiny_bundle(tmp_path, "0.2.0"))
    with refused("already with other content"):
        site.publish(tiny_bundle(tmp_path / "again", "0.1.0", seed=2))


def test_publishing_the_same_again_finishes_and_changes_nothing(site: Site, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, "0.1.0")
    first = site.publish(bundle)
    assert site.publish(bundle) == first


def test_a_bundle_that_changes_while_it_is_copied_is_refused(site: Site, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)

    def meddle(what: str, *_numbers: int) -> None:
        if "MODEL_CARD" in what:
            flip(bundle)

    with refused("changed while"):
        publish.publish(site.library, bundle, on_progress=meddle)
    assert site.library.staged_roles() == []
    site.publish(tiny_bundle(tmp_path / "good"))
    assert site.library.verify().is_clean


def test_every_file_of_a_bundle_is_a_target(site: Site, box: Follower, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    assert site.publish(bundle).published
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert len(files) == 6
    for path in files:
        assert box.look(f"models/{LINE}/0.1.0/{path.relative_to(bundle)}") == path.read_bytes()
    (release,) = box.index().versions
    assert release.digest == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def test_progress_is_told(site: Site, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    publish.publish(site.library, tiny_bundle(tmp_path), on_progress=lambda *step: told.append(step))
    assert told[0] == ("copying MODEL_CARD.md", 0, 6)
    assert [number for _, number, _ in told] == list(range(6))


# --- deltas -------------------------------------------------------------------------------------------------------------


def test_deltas_lead_from_the_last_three_versions_that_boxes_may_run(site: Site, box: Follower, tmp_path: Path) -> None:
    bundles = [tiny_bundle(tmp_path, f"0.{n}.0", seed=3, hidden=200, drift=1e-4 * n) for n in range(1, 6)]
    for bundle in bundles[:4]:
        site.publish(bundle, deltas=False)
    site.withdraw(LINE, "0.3.0")
    site.publish(bundles[4])
    index = box.index()
    old = {hashlib.sha256((bundle / "model_fp32.onnx").read_bytes()).hexdigest(): n for n, bundle in enumerate(bundles, 1)}
    assert sorted(old[item.from_sha256] for item in index.deltas) == [1, 2, 4]
    assert {old[item.to_sha256] for item in index.deltas} == {5}
    for item in index.deltas:
        raw = box.look(item.path)
        assert len(raw) == item.length < 0.7 * (bundles[4] / "model_fp32.onnx").stat().st_size
        (tmp_path / "delta").write_bytes(raw)
        base = bundles[old[item.from_sha256] - 1] / "model_fp32.onnx"
        new = bundles[4] / "model_fp32.onnx"
        delta_codec.apply(item.codec, base, tmp_path / "delta", tmp_path / "out", to_sha256=item.to_sha256, to_length=new.stat().st_size)
        assert (tmp_path / "out").read_bytes() == new.read_bytes()
    assert site.library.verify().is_clean


def test_a_delta_that_saves_too_little_is_not_published(site: Site, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0", seed=1, hidden=200))
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=2, hidden=200))
    assert site.library.index(LINE).deltas == []


def test_the_same_weights_need_no_delta(site: Site, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0", seed=1, hidden=200))
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=1, hidden=200))
    assert site.library.index(LINE).deltas == []


# --- withdrawal and minimum ---------------------------------------------------------------------------------------------


def test_a_withdrawal_reaches_boxes_with_its_reason(site: Site, box: Follower, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path))
    site.withdraw(LINE, "0.1.0", "  misses effusions ")
    index = box.index()
    assert index.refusal("0.1.0") == "withdrawn"
    assert index.withdrawn[0].reason == "misses effusions"


@pytest.mark.parametrize(
    ("line", "version", "reason", "says"),
    [
        (LINE, "9.9.9", "bad", "no version 9.9.9"),
        ("ct-lung", "0.1.0", "bad", "no model line"),
        (LINE, "0.1.0", "  ", "needs a reason"),
    ],
)
def test_what_cannot_be_withdrawn(site: Site, tmp_path: Path, line: str, version: str, reason: str, says: str) -> None:
    site.publish(tiny_bundle(tmp_path))
    with refused(says):
        site.withdraw(line, version, reason)
    site.withdraw(LINE, "0.1.0")
    with refused("withdrawn already"):
        site.withdraw(LINE, "0.1.0")


def test_the_minimum_only_rises(site: Site, box: Follower, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    site.publish(tiny_bundle(tmp_path, "0.2.0"), minimum_version="0.2.0")
    assert box.index().refusal("0.1.0") == "below_minimum"
    for version, says in (("0.1.0", "only rise"), ("0.3.0", "reaches"), ("two", "no semantic version")):
        with refused(says):
            publish.set_minimum(site.library, LINE, version)
    with refused("only rise"):
        site.publish(tiny_bundle(tmp_path, "0.3.0"), minimum_version="0.1.0")
    assert site.library.staged_roles() == []
    assert publish.set_minimum(site.library, LINE, "0.2.0").published


# --- rollouts -----------------------------------------------------------------------------------------------------------


def test_a_rollout_reaches_boxes_as_it_was_given(site: Site, box: Follower, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path))
    start = datetime(2030, 1, 2, 3, 4, tzinfo=timezone.utc)
    site.rollout("canary", LINE, "0.1.0", 12.5, start, 48.0, FailureBudget(max_fraction=0.2, min_boxes=3), paused=True)
    step = Rollout.parse(box.look("rollout/canary.json")).lines[LINE]
    assert (step.version, step.percent, step.start, step.duration_h, step.paused) == ("0.1.0", 12.5, start, 48.0, True)
    assert (step.failure_budget.max_fraction, step.failure_budget.min_boxes) == (0.2, 3)


def test_rings_and_lines_are_independent(tmp_path: Path) -> None:
    site = make_site(tmp_path / "lib", lines=["a", "b"])
    for line in ("a", "b"):
        site.publish(tiny_bundle(tmp_path, line=line))
    site.rollout("canary", "a", "0.1.0")
    site.rollout("canary", "b", "0.1.0")
    site.rollout("stable", "a", "0.1.0", 1.0)
    box = Follower(site, tmp_path / "box")
    assert set(Rollout.parse(box.look("rollout/canary.json")).lines) == {"a", "b"}
    assert set(Rollout.parse(box.look("rollout/stable.json")).lines) == {"a"}


BAD_ROLLOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "a version that no line signed": ({"version": "9.9.9"}, "no version 9.9.9"),
    "a withdrawn version": ({"version": "0.1.0"}, "is withdrawn"),
    "a version below the minimum": ({"version": "0.2.0"}, "older than the minimum"),
    "an unknown line": ({"line": "ct-lung"}, "no model line"),
    "no ring": ({"ring": ""}, "is not valid"),
    "a ring that is a path": ({"ring": "../x"}, "is not valid"),
    "more than all boxes": ({"percent": 101.0}, "is not valid"),
    "less than no box": ({"percent": -1.0}, "is not valid"),
    "no number of boxes": ({"percent": float("nan")}, "is not valid"),
    "a time without zone": ({"start": datetime(2030, 1, 1)}, "is not valid"),
    "a negative duration": ({"duration_h": -1.0}, "is not valid"),
    "an endless duration": ({"duration_h": float("inf")}, "is not valid"),
}


@pytest.mark.parametrize("name", BAD_ROLLOUTS)
def test_a_bad_rollout_is_refused(site: Site, tmp_path: Path, name: str) -> None:
    for version in ("0.1.0", "0.2.0", "0.3.0"):
        site.publish(tiny_bundle(tmp_path, version))
    site.withdraw(LINE, "0.1.0")
    publish.set_minimum(site.library, LINE, "0.3.0")
    change, says = BAD_ROLLOUTS[name]
    before = site.library.published("rollout")
    with refused(says):
        site.rollout(**({"ring": "stable", "line": LINE, "version": "0.3.0"} | change))
    assert site.library.published("rollout") == before
    assert site.library.staged_roles() == []


def test_a_version_that_still_waits_cannot_be_rolled_out(site: Site, tmp_path: Path) -> None:
    publish.publish(site.by_hand(), tiny_bundle(tmp_path), deltas=False)
    with refused("no version 0.1.0"):
        site.rollout("stable", LINE, "0.1.0")


def test_a_rollout_before_the_role_has_keys(tmp_path: Path) -> None:
    site = make_site(tmp_path / "lib", lines=[], rollout=False)
    with refused("no keys yet"):
        site.rollout("stable", LINE, "0.1.0")


def test_a_rollout_of_a_withdrawn_version_can_still_be_paused_and_status_warns(site: Site, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path))
    site.rollout("stable", LINE, "0.1.0")
    site.withdraw(LINE, "0.1.0")
    assert site.rollout("stable", LINE, "0.1.0", paused=True).published
    assert any("withdrawn: no box installs it" in text for text in site.library.status()["warnings"])
    found = site.library.verify()
    assert found.is_clean
    assert any("withdrawn" in note for note in found.notes)


# --- what the library has lost ------------------------------------------------------------------------------------------


def test_a_library_that_lost_a_file_says_so(site: Site, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"))
    shutil.rmtree(site.public / "targets" / "models")
    with refused("has no models/cxr-pneumonia/line.json"):
        site.publish(tiny_bundle(tmp_path, "0.2.0"))


def test_a_signed_version_whose_files_are_lost_is_not_published(site: Site, tmp_path: Path, box: Follower) -> None:
    library = site.by_hand()
    publish.publish(library, tiny_bundle(tmp_path, "0.1.0"), deltas=False)
    next((library.files.staged / "targets").rglob("*.onnx")).unlink()
    library.sign(LINE, site.holders[LINE][0])
    with pytest.raises(PublishError, match="its file is missing"):
        library.sign(LINE, site.holders[LINE][1])
    assert box.index().versions == []
    assert LineIndex.parse(box.look()).versions == []
