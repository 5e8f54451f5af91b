"""The format of models of volumes: how a series is fed to them is written down step by step, and nothing else is read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from appliance.lifecycle.model_control import reference_bundle
from model_sync.bundle import BundleError, InputSpec, Manifest, ModelBundle, VolumeSpec
from tests.support import volume_bundle


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    return volume_bundle.write(tmp_path)


def parse(value: dict[str, Any]) -> Manifest:
    return Manifest.parse(json.dumps(value).encode())


def refused(value: dict[str, Any]) -> str:
    with pytest.raises(BundleError) as caught:
        parse(value)
    assert caught.value.code == "bundle.manifest_invalid" and caught.value.hint
    return str(caught.value)


def test_brain_models_preprocessing_is_a_manifest(manifest: dict[str, Any]) -> None:
    read = parse(manifest)
    assert isinstance(read.input, VolumeSpec) and read.volume_input is read.input
    assert read.input.shape == (1, 32, 32, 32)
    assert [step.step for step in read.input.pipeline] == [
        "stack", "modality_lut", "orient", "resample", "clip_quantile", "min_max", "min_max", "sliding_window",
    ]  # fmt: skip
    assert Manifest.parse(read.to_json()) == read
    with pytest.raises(BundleError, match="reads volumes"):
        _ = read.image_input


def test_the_twenty_channel_models_quantiles_are_a_manifest() -> None:
    steps = [{"step": "quantile_scale", "low": 0.05, "high": 0.95}]
    assert VolumeSpec.model_validate(volume_bundle.volume_input(160, scale=steps)).shape == (1, 160, 160, 160)


def test_manifests_of_images_are_the_same_bytes_as_before() -> None:
    raw = (Path(reference_bundle()) / "manifest.json").read_bytes()
    read = Manifest.parse(raw)
    assert read.to_json() == raw
    assert isinstance(read.input, InputSpec) and read.image_input is read.input
    with pytest.raises(BundleError, match="reads images"):
        _ = read.volume_input


def test_layout_decides_and_is_named_without_its_tag(manifest: dict[str, Any]) -> None:
    assert "input.depth" in refused(manifest | {"input": manifest["input"] | {"depth": 0}})
    assert "layout" in refused(manifest | {"input": manifest["input"] | {"layout": "NHWC"}})
    assert "input.height" in refused(manifest | {"input": manifest["input"] | {"height": "32"}})
    assert "input.colour" in refused(manifest | {"input": manifest["input"] | {"colour": 1}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda steps: steps.pop(0), "must begin with stack"),
        (lambda steps: steps.pop(2), "must begin with stack"),
        (lambda steps: steps.insert(5, steps[3]), "resample once"),
        (lambda steps: steps.insert(4, steps[-1]), "sliding_window must be the last"),
        (lambda steps: steps.pop(), "must crop_pad"),
        (lambda steps: steps[0].update(by="number"), "position"),
        (lambda steps: steps[0].update(min_slices=1), "min_slices"),
        (lambda steps: steps[2].update(axes="LRA"), "one of L and R"),
        (lambda steps: steps[2].update(axes="XYZ"), "axes"),
        (lambda steps: steps[3].update(spacing_mm=[1.0, 1.0]), "spacing_mm"),
        (lambda steps: steps[3].update(spacing_mm=[0.0, 1.0, 1.0]), "spacing_mm"),
        (lambda steps: steps[4].update(low=0.999), "low < high"),
        (lambda steps: steps[4].update(high=1.5), "high"),
        (lambda steps: steps[5].update(low=255.0), "low < high"),
        (lambda steps: steps[-1].update(overlap=1.0), "overlap"),
        (lambda steps: steps[-1].update(weight="flat"), "weight"),
        (lambda steps: steps.insert(5, {"step": "normalise", "mean": [0.1, 0.2], "std": [1.0, 1.0]}), "one mean"),
        (lambda steps: steps.insert(5, {"step": "clip", "low": 5.0, "high": 5.0}), "low < high"),
        (lambda steps: steps.insert(5, {"step": "quantile_scale", "low": 0.5, "high": 0.5}), "low < high"),
        (lambda steps: steps.insert(5, {"step": "letterbox", "fill": 0, "align": "center"}), "letterbox"),
    ],
)
def test_pipeline_that_could_be_read_two_ways_is_refused(manifest: dict[str, Any], change: Any, words: str) -> None:
    wrong = copy.deepcopy(manifest)
    change(wrong["input"]["pipeline"])
    assert words in refused(wrong)


def test_without_windows_the_volume_must_be_cut_to_the_models_size(manifest: dict[str, Any]) -> None:
    cut = {"step": "crop_pad", "depth": 32, "height": 32, "width": 32, "fill": 0.0, "align": "center"}
    steps = manifest["input"]["pipeline"][:-1]
    assert parse(manifest | {"input": manifest["input"] | {"pipeline": [*steps, cut]}})
    assert "must crop_pad" in refused(manifest | {"input": manifest["input"] | {"pipeline": [*steps, cut | {"width": 33}]}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "measurement"}, "segmentation"),
        ({"outputs": [{"name": "logits", "kind": "cam", "shape": ["n", 3, "d", "h", "w"]}]}, "segmentation_logits"),
    ],
)
def test_model_of_volumes_is_a_segmentation(manifest: dict[str, Any], change: dict[str, Any], words: str) -> None:
    assert words in refused(manifest | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["white_matter", "background", "grey_matter"]}, "begin with background"),
        ({"classes": ["background", "white_matter", "white_matter"]}, "must not repeat"),
        ({"classes": ["background", "white_matter"]}, "every label exactly once"),
        ({"classes": None}, "classes belong"),
        ({"kind": "probability"}, "classes belong"),
        ({"shape": ["n", 4, "d", "h", "w"]}, r"classes, d, h, w"),
        ({"shape": ["n", 3]}, r"classes, d, h, w"),
    ],
)
def test_classes_are_the_labels_behind_the_background(manifest: dict[str, Any], change: dict[str, Any], words: str) -> None:
    assert words in refused(manifest | {"outputs": [manifest["outputs"][0] | change]})


def test_more_classes_than_a_byte_holds_are_refused(manifest: dict[str, Any]) -> None:
    """The 257th class would be drawn as the background, and measured as nothing."""
    labels = [volume_bundle.label(f"l{number}", "标", "L", str(1000000 + number)) for number in range(256)]
    one = copy.deepcopy(manifest)
    for count, fits in ((255, True), (256, False)):
        names = [item["name"] for item in labels[:count]]
        one["labels"], one["outputs"][0]["classes"] = labels[:count], ["background", *names]
        one["golden"][0]["expected"] = dict.fromkeys(names, 1.0)
        assert parse(one) if fits else "classes" in refused(one)


def test_logits_of_an_image_model_are_refused(manifest: dict[str, Any]) -> None:
    picture = json.loads((Path(reference_bundle()) / "manifest.json").read_bytes())["input"]
    assert "NCDHW" in refused(manifest | {"input": picture})


def test_golden_volume_names_every_label(manifest: dict[str, Any]) -> None:
    wrong = copy.deepcopy(manifest)
    wrong["golden"][0]["expected"] = {"white_matter": 1.0}
    assert "one expected Dice coefficient per label" in refused(wrong)


def test_golden_volume_is_read(tmp_path: Path, manifest: dict[str, Any]) -> None:
    bundle = ModelBundle.load(tmp_path)
    (case,) = bundle.golden_volumes()
    assert case.name == "a" and case.values.dtype == np.float32 and case.values.shape == case.mask.shape == (6, 7, 8)
    assert case.affine.tolist() == np.eye(4).tolist() and case.expected == {"white_matter": 1.0, "grey_matter": 1.0}
    with pytest.raises(BundleError, match="reads volumes"):
        next(bundle.golden_cases())


VALUES, AFFINE, MASK = np.zeros((3, 4, 5), np.float32), np.eye(4), np.zeros((3, 4, 5), np.uint8)


@pytest.mark.parametrize(
    ("values", "affine", "mask", "words"),
    [
        (VALUES.astype(np.float64), AFFINE, MASK, "`values`"),
        (VALUES[0], AFFINE, MASK, "`values`"),
        (VALUES * np.nan, AFFINE, MASK, "`values`"),
        (VALUES, AFFINE[:3], MASK, "`affine`"),
        (VALUES, AFFINE * 0, MASK, "`affine`"),
        (VALUES, AFFINE.astype(np.float32), MASK, "`affine`"),
        (VALUES, AFFINE, MASK[1:], "`mask`"),
        (VALUES, AFFINE, MASK + 3, "`mask`"),
        (VALUES, AFFINE, MASK.astype(np.int64), "`mask`"),
    ],
)
def test_golden_volume_that_cannot_be_right_is_refused(tmp_path: Path, values: Any, affine: Any, mask: Any, words: str) -> None:
    volume_bundle.write(tmp_path, golden=volume_bundle.golden_npz(values, affine, mask))
    with pytest.raises(BundleError, match=words) as caught:
        list(ModelBundle.load(tmp_path).golden_volumes())
    assert caught.value.code == "bundle.golden_invalid"


def test_golden_volume_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    volume_bundle.write(tmp_path, golden=b"no archive")
    with pytest.raises(BundleError, match="cannot be read"):
        list(ModelBundle.load(tmp_path).golden_volumes())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["step", "axes", "low", "high", "fill"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(_JSON, st.integers(0, 7))
def test_any_step_is_read_or_refused(value: Any, at: int) -> None:
    """Whatever stands in a pipeline ends as a spec or as a ValidationError, never as another exception."""
    raw = volume_bundle.volume_input()
    raw["pipeline"][at] = value
    try:
        spec = VolumeSpec.model_validate(raw, strict=True)
    except ValidationError:
        return
    assert VolumeSpec.model_validate_json(spec.model_dump_json()) == spec
