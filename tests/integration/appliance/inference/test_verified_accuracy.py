"""A box shows no accuracy that was not measured with the weights and at the threshold in force (R29); the model runs all the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import main
from appliance.core.accuracy import accuracy_problem
from appliance.lifecycle.model_control import reference_bundle
from appliance.model_queries import model_lines
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from tests.support.activated import activate
from tests.support.activation_box import change_manifest
from tests.support.library_site import tiny_bundle
from tests.support.worker_box import chest, prepared_worker, small_chest, take


def change_gate(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another gate record, with its new digest in the manifest."""
    record = json.loads((bundle / "gate.json").read_text("utf-8"))
    change(record)
    raw = json.dumps(record).encode()
    (bundle / "gate.json").write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    change_manifest(bundle, lambda m: [d.update(sha256=digest) for d in m["documents"] if d["file"] == "gate.json"])


def raise_threshold(bundle: Path) -> None:
    change_manifest(bundle, lambda m: m["operating_points"][0].update(threshold=0.9))


BUNDLES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a gate that binds": (lambda _: None, None),
    "an old gate without digests": (lambda b: change_gate(b, lambda r: r.update(schema=1)), "gate.unbound"),
    "the threshold raised to 0.9 under the gate of 0.366": (raise_threshold, "gate.threshold"),
    "no evaluation set": (lambda b: change_gate(b, lambda r: r.pop("evaluation")), "gate.evaluation"),
    "a gate that is no JSON object": (lambda b: change_gate(b, lambda r: r.clear()), "gate.invalid"),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_accuracy_is_shown_only_where_the_gate_binds(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundle(tmp_path / "bundles", "1.0.0")
    damage, code = BUNDLES[name]
    damage(bundle)
    digest = activate(store, bundle, "test")
    image = take(store, small_chest())
    assert prepared_worker(store).run_once()
    (finding,) = Worklist(store).instance(image).findings
    assert finding.has_verified_accuracy is (code is None)
    shown = finding.to_json()
    assert shown["has_verified_accuracy"] is (code is None)
    children = json.loads((bundle / "manifest.json").read_text("utf-8"))["operating_points"][0]["groups"][0]
    for figure in ("sensitivity", "specificity"):
        measured = [children[figure][name] for name in ("value", "low", "high")]
        assert shown[figure] == (measured if code is None else None)
    (line,) = model_lines(store)
    assert line.active is not None
    assert (line.active.accuracy_problem.code if line.active.accuracy_problem else None) == code
    problem = accuracy_problem(store.settings.data_dir / "models" / digest, digest)
    assert (problem.code if problem else None) == code
    for locale, word in (("C", "verified" if code is None else "not verified"), ("zh_CN.UTF-8", "已核实" if code is None else "未经核实")):
        monkeypatch.setenv("LC_ALL", locale)
        assert main.main(["models", "list", "--data-dir", str(store.settings.data_dir)]) == 0
        assert f"  {word}  " in capsys.readouterr().out
    assert main.main(["models", "list", "--json", "--data-dir", str(store.settings.data_dir)]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert (model["accuracy"]["is_verified"], model["accuracy"]["code"]) == (code is None, code)


def test_a_copy_that_was_changed_on_the_disk_is_not_verified(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, "1.0.0")
    digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert accuracy_problem(bundle, digest) is None
    for number, (name, code) in enumerate((("manifest.json", "bundle.digest_mismatch"), ("gate.json", "bundle.digest_mismatch"))):
        other = Path(shutil.copytree(bundle, tmp_path / str(number)))
        (other / name).write_bytes((other / name).read_bytes() + b" ")
        problem = accuracy_problem(other, digest)
        assert problem is not None
        assert problem.code == code
        (other / name).unlink()
        accuracy_problem.cache_clear()
        absent = accuracy_problem(other, digest)
        assert absent is not None
        assert absent.code == "bundle.unreadable"


def test_a_bundle_whose_gate_does_not_name_its_input_check_runs_and_is_not_verified(store: Store, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(reference_bundle(), tmp_path / "bundle"))
    change_gate(bundle, lambda record: record.pop("input_check"))
    activate(store, bundle, "test")
    image = take(store, chest(seed=1))
    assert prepared_worker(store).run_once()
    (finding,) = Worklist(store).instance(image).findings
    assert not finding.has_verified_accuracy
    (line,) = model_lines(store)
    assert line.active is not None and line.active.accuracy_problem is not None
    assert line.active.accuracy_problem.code == "gate.unbound"
