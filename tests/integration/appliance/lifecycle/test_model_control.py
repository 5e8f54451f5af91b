"""Activation: the real bundle proves itself; a damaged, foreign or failing one leaves the model before it at work."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import ActivationError
from appliance.lifecycle import model_files
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.store.store import Store
from tests.support import activated


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the reference bundle to damage."""
    return Path(shutil.copytree(reference_bundle(), tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")


def states(store: Store) -> list[tuple[str, str]]:
    """Version and state of every model."""
    return sorted((row["version"], row["state"]) for row in store.models())


def test_the_reference_model_is_proven_and_active(store: Store) -> None:
    digest = activate(store, reference_bundle(), "test")
    row = store.model(digest)
    report = json.loads(row["self_test"])
    assert row["state"] == "active"
    assert report["max_difference"]
    assert all(value <= 0.01 for value in report["max_difference"].values())
    assert model_files.load_copy(store.settings.data_dir, digest).digest == digest
    assert activate(store, reference_bundle(), "test") == digest
    assert len(store.models()) == 1


def test_a_new_version_takes_over_and_the_old_one_is_kept(store: Store, bundle: Path) -> None:
    old = activated.activate(store, reference_bundle())
    edit(bundle, lambda manifest: manifest.update(version="9.0.0"))
    activate(store, bundle, "test")
    assert store.model(old)["state"] == "previous"
    edit(bundle, lambda manifest: manifest.update(version="9.1.0"))
    activate(store, bundle, "test")
    assert store.model(old)["state"] == "previous"  # 9.0.0 was still on trial: what is fallen back to is what was proven
    activate(store, reference_bundle(), "test")
    assert store.model(old)["state"] == "active"
    assert sum(row["state"] == "active" for row in store.models()) == 1


def flip(bundle: Path) -> None:
    """One changed byte in the weights."""
    path = next(bundle.glob("*.onnx"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _name_again(bundle: Path) -> None:
    """Let the manifest name the weights as they are now."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.glob("*.onnx")}
    edit(
        bundle, lambda manifest: [entry.update(sha256=digests[entry["file"]]) for entry in (*manifest["variants"], manifest["input_check"])]
    )


def wrong_weights(bundle: Path) -> None:
    """Other weights in every variant under a manifest that names them: only the golden cases can tell."""
    import onnx

    for path in bundle.glob("cxr_*.onnx"):
        model = onnx.load(path)
        weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weight.raw_data = bytes(len(weight.raw_data))
        onnx.save(model, path)
    _name_again(bundle)


def junk_weights(bundle: Path) -> None:
    """Files that are no models, correctly named."""
    for path in bundle.glob("cxr_*.onnx"):
        path.write_bytes(b"junk")
    _name_again(bundle)


def junk_input_check(bundle: Path) -> None:
    """An input check that is no network, correctly named."""
    (bundle / "input_check.onnx").write_bytes(b"junk")
    _name_again(bundle)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "changed byte": (flip, "model.invalid"),
    "missing weights": (lambda bundle: next(bundle.glob("*.onnx")).unlink(), "model.invalid"),
    "unknown field": (lambda bundle: edit(bundle, lambda manifest: manifest.update(surprise=1)), "model.invalid"),
    "no operating point (R29)": (lambda bundle: edit(bundle, lambda manifest: manifest.update(operating_points=[])), "model.invalid"),
    "no golden case": (lambda bundle: edit(bundle, lambda manifest: manifest.update(golden=[])), "model.invalid"),
    "needs a newer appliance": (
        lambda bundle: edit(bundle, lambda manifest: manifest.update(min_appliance_version="99.0.0")),
        "model.too_new",
    ),
    "golden cases fail": (wrong_weights, "model.self_test"),
    "no model at all": (junk_weights, "model.self_test"),
    "an input check that is no network": (junk_input_check, "model.self_test"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_bundle_changes_nothing(store: Store, bundle: Path, name: str) -> None:
    digest = activated.activate(store, reference_bundle())
    damage, code = BAD[name]
    damage(bundle)
    with pytest.raises(ActivationError) as caught:
        activate(store, bundle, "test")
    assert caught.value.code == code
    assert caught.value.hint
    assert [(row["digest"], row["state"]) for row in store.models()] == [(digest, "active")]
    store.database.verify_audit()


def test_an_installed_copy_that_changed_on_disk_is_not_run(store: Store) -> None:
    digest = activated.activate(store, reference_bundle())
    flip(store.settings.data_dir / "models" / digest)
    with pytest.raises(ActivationError, match=r"model\.invalid"):
        model_files.load_copy(store.settings.data_dir, digest)


@pytest.mark.parametrize("damage", [flip, lambda directory: (directory / "manifest.json").unlink(), shutil.rmtree])
def test_a_damaged_copy_is_repaired_by_activation(store: Store, damage: Callable[[Path], None]) -> None:
    digest = activated.activate(store, reference_bundle())
    for number in (1, 2):
        damage(store.settings.data_dir / "models" / digest)
        assert activate(store, reference_bundle(), "test") == digest
        assert model_files.load_copy(store.settings.data_dir, digest).digest == digest
        kept = len(list((store.settings.data_dir / "models").glob(f"{digest}.damaged-*")))
        assert kept == (0 if damage is shutil.rmtree else number)
    assert states(store) == [(store.model(digest)["version"], "active")]
