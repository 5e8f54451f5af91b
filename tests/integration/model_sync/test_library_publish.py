"""Publishing, withdrawing, rollouts: what is refused, by name, and what boxes are told."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from model_sync import messages
from model_sync.delta import codec as delta_codec
from model_sync.errors import PublishError
from model_sync.library import publish
from model_sync.trust.documents import FailureBudget, LineIndex, Rollout
from tests.support.binding_gate import write_gate
from tests.support.library_follower import Follower, refused
from tests.support.library_site import Site, make_site, older_publish, reference_bundle, tiny_bundle

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
    "no gate record": (no_gate_document, "gate"),
    "variant without gate record": (lambda b: edit(b, lambda m: m["variants"][0].update(gate=None)), "no gate record"),
    "gate record that is none": (lambda b: replace(b, "gate.json", b"passed"), "no gate record"),
    "gate record on other variants": (lambda b: replace(b, "gate.json", b'{"variants": {}}'), "no gate record"),
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


def change_gate(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another gate record, with its new digest in the manifest."""
    record = json.loads((bundle / "gate.json").read_text("utf-8"))
    change(record)
    replace(bundle, "gate.json", json.dumps(record).encode())


def file_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the gate record states about the file of the float model."""
    entry: dict[str, Any] = record["variants"]["fp32"]["files"]["model_fp32.onnx"]
    return entry


def randomise_weights(bundle: Path) -> None:
    """Put random numbers where the weights were, and name the new file in the manifest; the gate record stays."""
    path = bundle / "model_fp32.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = np.random.default_rng(7).standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(bundle, lambda m: m["variants"][0].update(sha256=digest))


def randomise_weights_and_gate(bundle: Path) -> None:
    """Random weights, and a gate record that claims to have measured them: only the golden cases can show it."""
    randomise_weights(bundle)
    write_gate(bundle)


def no_model_at_all(bundle: Path) -> None:
    (bundle / "model_fp32.onnx").write_bytes(b"no model")
    edit(bundle, lambda m: m["variants"][0].update(sha256=hashlib.sha256(b"no model").hexdigest()))
    write_gate(bundle)


def gate_of_other_weights(bundle: Path) -> None:
    """The gate record of another bundle, complete and valid there."""
    other = tiny_bundle(bundle.parent / "other", seed=5)
    replace(bundle, "gate.json", (other / "gate.json").read_bytes())


def another_variant(bundle: Path) -> None:
    """One more variant, which nobody measured."""
    edit(bundle, lambda m: m["variants"].append(m["variants"][0] | {"precision": "fp16", "file": "model_fp16.onnx"}))
    edit(bundle, lambda m: [case["tolerance"].update(fp16=0.01) for case in m["golden"]])
    shutil.copyfile(bundle / "model_fp32.onnx", bundle / "model_fp16.onnx")


def raise_threshold(bundle: Path) -> None:
    edit(bundle, lambda m: m["operating_points"][0].update(threshold=0.9))


def raise_threshold_in_both(bundle: Path) -> None:
    """The threshold is raised in the manifest and in the record's list, but the measurements were at the old one."""
    raise_threshold(bundle)
    change_gate(bundle, lambda record: record["operating_points"][0].update(threshold=0.9))


def better_sensitivity(bundle: Path) -> None:
    edit(bundle, lambda m: m["operating_points"][0]["sensitivity"].update(value=0.99, high=0.995))


def better_source(bundle: Path) -> None:
    edit(bundle, lambda m: m["operating_points"][0]["per_source"][0].update(auc=0.5))


def another_pipeline(bundle: Path) -> None:
    edit(bundle, lambda m: m["input"]["pipeline"][1].update(default="minmax"))


def renamed_label(bundle: Path) -> None:
    edit(bundle, lambda m: m["labels"][0].update(name="opacity"))
    for field in ("operating_points", "reference_scores"):
        edit(bundle, lambda m, field=field: m[field][0].update(label="opacity"))
    edit(bundle, lambda m: [case.update(expected={"opacity": case["expected"]["pneumonia"]}) for case in m["golden"]])


def allowed_where_it_failed(bundle: Path) -> None:
    change_gate(bundle, lambda record: file_of(record)["runtimes"].update(openvino={"passed": False, "reasons": []}))


def add_input_check(bundle: Path) -> None:
    """The input check of the reference model, named by the gate record."""
    raw = (reference_bundle() / "input_check.onnx").read_bytes()
    (bundle / "input_check.onnx").write_bytes(raw)
    check = json.loads((reference_bundle() / "manifest.json").read_text("utf-8"))["input_check"]
    edit(bundle, lambda m: m.update(input_check=check))
    write_gate(bundle)


def input_check_that_stops_nothing(bundle: Path) -> None:
    add_input_check(bundle)
    edit(bundle, lambda m: m["input_check"].update(min_upright=0.001))


def another_network_of_the_input_check(bundle: Path) -> None:
    add_input_check(bundle)
    raw = (bundle / "model_fp32.onnx").read_bytes()
    (bundle / "input_check.onnx").write_bytes(raw)
    edit(bundle, lambda m: m["input_check"].update(sha256=hashlib.sha256(raw).hexdigest()))


def better_input_check(bundle: Path) -> None:
    add_input_check(bundle)
    edit(bundle, lambda m: m["input_check"]["figures"][-1]["stopped"].update(value=1.0, high=1.0))


def without_its_input_check(bundle: Path) -> None:
    add_input_check(bundle)
    (bundle / "input_check.onnx").unlink()
    edit(bundle, lambda m: m.pop("input_check"))


def input_check_that_the_gate_does_not_name(bundle: Path) -> None:
    add_input_check(bundle)
    change_gate(bundle, lambda record: record.pop("input_check"))


def better_group(bundle: Path) -> None:
    edit(bundle, lambda m: m["operating_points"][0]["groups"][1]["sensitivity"].update(value=0.99, high=0.995))


UNBOUND: dict[str, tuple[Callable[[Path], None], str]] = {
    "randomised weights under an old gate": (randomise_weights, "gate.weights"),
    "randomised weights under a gate that claims them": (randomise_weights_and_gate, "library.golden"),
    "a file that is no model": (no_model_at_all, "library.golden_run"),
    "a gate of other weights": (gate_of_other_weights, "gate.weights"),
    "a variant that was never measured": (another_variant, "gate.invalid"),
    "threshold 0.9 under the gate of 0.366": (raise_threshold, "gate.threshold"),
    "threshold 0.9 in manifest and record, measured at 0.366": (raise_threshold_in_both, "gate.threshold"),
    "another sensitivity than was measured": (better_sensitivity, "gate.figures"),
    "another accuracy within one source": (better_source, "gate.figures"),
    "another sensitivity of a group of patients": (better_group, "gate.figures"),
    "other ages of a group": (lambda b: edit(b, lambda m: m["operating_points"][0]["groups"][1].update(min_years=6.0)), "gate.figures"),
    "a group that was not measured": (
        lambda b: change_gate(b, lambda record: record["operating_points"][0]["groups"].pop()), "gate.figures",
    ),
    "groups of which the record has none": (
        lambda b: change_gate(b, lambda record: record["operating_points"][0].pop("groups")), "gate.figures",
    ),
    "an input check that stops nothing": (input_check_that_stops_nothing, "gate.input"),
    "another network of the input check": (another_network_of_the_input_check, "gate.input"),
    "other figures of the input check": (better_input_check, "gate.input"),
    "the input check is left out": (without_its_input_check, "gate.input"),
    "an input check that the record does not name": (input_check_that_the_gate_does_not_name, "gate.unbound"),
    "another input pipeline": (another_pipeline, "gate.input"),
    "another label": (renamed_label, "gate.input"),
    "an old gate record without digests": (lambda b: change_gate(b, lambda r: r.update(schema=1)), "gate.unbound"),
    "no digest of a file": (lambda b: change_gate(b, lambda r: file_of(r).pop("sha256")), "gate.unbound"),
    "no digest of the evaluation set": (lambda b: change_gate(b, lambda r: r["evaluation"].pop("sha256")), "gate.evaluation"),
    "no evaluation set": (lambda b: change_gate(b, lambda r: r.pop("evaluation")), "gate.evaluation"),
    "an evaluation set of no images": (lambda b: change_gate(b, lambda r: r["evaluation"].update(n_images=0)), "gate.evaluation"),
    "a runtime on which it failed is allowed": (allowed_where_it_failed, "gate.runtime"),
    "measured on no runtime": (lambda b: change_gate(b, lambda r: file_of(r).update(runtimes={})), "gate.failed"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNBOUND)
def test_a_bundle_whose_gate_does_not_bind_is_refused_at_publish(site: Site, tmp_path: Path, name: str) -> None:
    bundle = tiny_bundle(tmp_path)
    damage, code = UNBOUND[name]
    damage(bundle)
    with pytest.raises(PublishError) as caught:
        publish.publish(site.library, bundle)
    assert caught.value.code == code, caught.value.message
    for language in messages.LANGUAGES:
        assert messages.text(code, language) and messages.hint(code, language)
    assert site.library.staged_roles() == []
    assert site.library.index(LINE).versions == []


def test_a_version_that_an_older_program_published_can_still_be_finished(site: Site, tmp_path: Path) -> None:
    """A killed `publish` is repeated by the next program, which would not accept the old gate record of a new version."""
    bundle = tiny_bundle(tmp_path)
    change_gate(bundle, lambda record: record.update(schema=1))
    library = site.by_hand()
    with older_publish():
        publish.publish(library, bundle)
    staged = library.staged(LINE)
    assert publish.publish(library, bundle).published is False
    assert staged is not None
    assert library.staged(LINE) == staged


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
    steps: list[tuple[str, int, int]] = []
    publish.publish(site.library, tiny_bundle(tmp_path), on_progress=lambda *step: steps.append(step))
    assert steps[:2] == [("running the golden cases", 0, 1), ("copying MODEL_CARD.md", 0, 6)]
    assert [number for _, number, _ in steps[1:]] == list(range(6))


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
