"""The bundle format: what is read is exactly what was signed, and anything doubtful is an error with a hint."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_sync.bundle import BundleError, Manifest, ModelBundle, model_bundle
from model_sync.errors import LibraryUnreachable, ModelSyncError, PublishError, TrustError


def golden_npz(**replaced: Any) -> bytes:
    arrays = {
        "pixels": np.arange(48, dtype=np.uint8).reshape(6, 8),
        "probability": np.array([[0.25]], np.float32),
        "cam": np.zeros((1, 1, 7, 7), np.float32),
        **replaced,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


def both(text: str) -> dict[str, str]:
    return {"zh": text, "en": text}


def write_bundle(directory: Path, **files: bytes) -> dict[str, Any]:
    """Lay a small, valid bundle into `directory` and return its manifest as plain data."""
    content = {
        "model_fp32.onnx": b"float weights",
        "model_int8.onnx": b"small weights",
        "golden/a.npz": golden_npz(),
        "MODEL_CARD.md": b"# card",
        "gate.json": b"{}",
        **files,
    }
    for name, raw in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(raw)
    manifest = manifest_of({name: hashlib.sha256(raw).hexdigest() for name, raw in content.items()})
    write_manifest(directory, manifest)
    return manifest


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    (directory / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")


def manifest_of(digests: dict[str, str]) -> dict[str, Any]:
    rate = {"value": 0.9, "low": 0.8, "high": 0.95}
    return {
        "schema": 1,
        "name": "test-model",
        "version": "1.2.3",
        "task": "classification",
        "title": both("标题"),
        "labels": [{"name": "thing", "title": both("物"), "code": {"scheme": "SCT", "value": "1", "meaning": "Thing"}}],
        "applies_to": {
            "modality": ["CR"],
            "sop_class_uid": ["1.2.840.10008.5.1.4.1.1.1"],
            "body_part": ["CHEST"],
            "view_position": ["PA"],
            "when_body_part_absent": "assume",
            "assumed_body_part": "CHEST",
            "when_view_absent": "out_of_scope",
            "assumed_view": "",
            "age": {"min_years": 1, "max_years": 5, "outside": "caution", "absent": "caution", "note": both("儿童")},
        },
        "intended_use": both("用途"),
        "registration": {"number": None, "device_class": None, "pccp_id": None},
        "change_kind": "algorithm",
        "input": {
            "name": "image",
            "layout": "NCHW",
            "dtype": "float32",
            "channels": 1,
            "height": 4,
            "width": 4,
            "pipeline": [
                {"step": "modality_lut"},
                {"step": "voi", "default": "minmax"},
                {"step": "monochrome2"},
                {"step": "to_uint8"},
                {"step": "letterbox", "fill": 0, "align": "center"},
                {"step": "resize", "height": 4, "width": 4, "filter": "area"},
                {"step": "scale", "divide_by": 255},
                {"step": "normalise", "mean": [0.5], "std": [0.25]},
            ],
        },
        "outputs": [
            {"name": "probability", "kind": "probability", "shape": ["n", 1]},
            {"name": "cam", "kind": "cam", "shape": ["n", 1, 7, 7]},
        ],
        "explain": {"output": "cam", "kind": "cam"},
        "operating_points": [
            {
                "label": "thing",
                "threshold": 0.4,
                "sensitivity": rate,
                "specificity": rate,
                "measured_on": "a set",
                "per_source": [{"source": "s", "n_positive": 1, "n_negative": 0, "sensitivity": rate, "specificity": None, "auc": None}],
            }
        ],
        "variants": [
            {
                "precision": precision,
                "file": f"model_{precision}.onnx",
                "sha256": digests[f"model_{precision}.onnx"],
                "recipe": "r",
                "gate": "gate.json",
            }
            for precision in ("int8", "fp32")
        ],
        "golden": [
            {
                "input": "golden/a.npz",
                "sha256": digests["golden/a.npz"],
                "expected": {"thing": 0.25},
                "tolerance": {"fp32": 0.001, "int8": 0.05},
            }
        ],
        "reference_scores": [{"label": "thing", "edges": [0, 0.5, 1], "counts": [3, 4], "measured_on": "a set"}],
        "training_data": {
            "description": both("数据"),
            "n_images": 7,
            "sources": [{"name": "s", "n_images": 7, "licence": "CC0"}],
        },
        "licence": "Apache-2.0",
        "min_appliance_version": "0.1.0",
        "documents": [{"file": name, "sha256": digests[name]} for name in ("MODEL_CARD.md", "gate.json")],
    }


DIGESTS = dict.fromkeys(("model_fp32.onnx", "model_int8.onnx", "golden/a.npz", "MODEL_CARD.md", "gate.json"), "0" * 64)
VALID = manifest_of(DIGESTS)


def parse(manifest: dict[str, Any]) -> Manifest:
    return Manifest.parse(json.dumps(manifest).encode())


def objects(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every JSON object in `node`, at any depth."""
    if isinstance(node, dict):
        yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from objects(child, (*path, key))


def at(node: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


OBJECTS = list(objects(VALID))
FIELDS = [(*path, key) for path in OBJECTS for key in at(VALID, path)]


def refused(code: str, directory: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        ModelBundle.load(directory)
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value


# --- the manifest ---------------------------------------------------------------------------------------------------


def test_r28_a_complete_manifest_is_read_and_written_without_loss() -> None:
    manifest = parse(VALID)
    assert json.loads(manifest.to_json()) == VALID
    assert Manifest.parse(manifest.to_json()) == manifest


@given(st.sampled_from(OBJECTS), st.text(min_size=1), st.sampled_from([None, 0, "x", [], {}]))
def test_r28_an_unknown_field_at_any_depth_is_an_error(path: tuple[str | int, ...], key: str, value: Any) -> None:
    manifest = copy.deepcopy(VALID)
    target = at(manifest, path)
    if key not in target:
        target[key] = value
        with pytest.raises(BundleError) as caught:
            parse(manifest)
        assert caught.value.code == "bundle.manifest_invalid"


@given(st.sampled_from(FIELDS))
def test_r28_a_missing_field_at_any_depth_is_an_error(path: tuple[str | int, ...]) -> None:
    manifest = copy.deepcopy(VALID)
    del at(manifest, path[:-1])[path[-1]]
    with pytest.raises(BundleError, match="manifest_invalid"):
        parse(manifest)


@given(st.sampled_from(FIELDS), st.sampled_from([True, 1.5, {"x": 1}, [[]], 2**70]))
def test_a_value_of_another_kind_is_never_converted_silently(path: tuple[str | int, ...], value: Any) -> None:
    manifest = copy.deepcopy(VALID)
    at(manifest, path[:-1])[path[-1]] = value
    try:
        read = json.loads(parse(manifest).to_json())
    except BundleError as error:
        assert error.hint
    else:
        assert at(read, path) == value


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | st.recursive(
    st.none() | st.integers() | st.text(max_size=3), lambda c: st.lists(c) | st.dictionaries(st.text(max_size=8), c), max_leaves=8
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_anything_else_is_refused_with_a_hint_and_never_crashes(raw: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.parse(raw)
    assert caught.value.code == "bundle.manifest_invalid"


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_nesting_is_refused(raw: bytes) -> None:
    with pytest.raises(BundleError, match="manifest_invalid"):
        Manifest.parse(raw)


def test_a_key_that_stands_twice_is_an_error() -> None:
    raw = json.dumps(VALID).replace('"threshold": 0.4', '"threshold": 0.1, "threshold": 0.4').encode()
    with pytest.raises(BundleError, match="keys must not repeat: threshold"):
        Manifest.parse(raw)


def test_the_python_name_of_the_schema_field_is_not_accepted_in_a_file() -> None:
    manifest = {("schema_" if key == "schema" else key): value for key, value in VALID.items()}
    with pytest.raises(BundleError, match="manifest_invalid"):
        parse(manifest)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_none_is_an_error(number: str) -> None:
    raw = json.dumps(VALID).replace('"threshold": 0.4', f'"threshold": {number}').encode()
    with pytest.raises(BundleError, match=r"operating_points\.0\.threshold"):
        Manifest.parse(raw)


INVALID = [
    (("schema",), 0, "schema"),
    (("name",), "Test Model", "name"),
    (("version",), "1.2", "version"),
    (("version",), "1.2.3\n", "version"),
    (("min_appliance_version",), "v1.0.0", "min_appliance_version"),
    (("applies_to", "sop_class_uid"), ["1.02.3"], "sop_class_uid"),
    (("applies_to", "modality"), [], "modality"),
    (("applies_to", "assumed_body_part"), "HAND", "assumed_body_part"),
    (("applies_to", "when_view_absent"), "assume", "assumed_view"),
    (("applies_to", "age", "min_years"), 5, "min_years"),
    (("title", "zh"), " ", "title.zh"),
    (("input", "height"), 8, "must resize exactly once"),
    (("input", "channels"), 3, "one mean and one std per channel"),
    (("input", "pipeline", 0, "step"), "sharpen", "sharpen"),
    (("input", "pipeline", 6, "divide_by"), 0, "divide_by"),
    (("operating_points", 0, "threshold"), 1, "threshold"),
    (("operating_points", 0, "label"), "other", "operating_points must name every label"),
    (("operating_points",), [], "operating_points must name every label"),
    (("operating_points", 0, "sensitivity", "low"), 0.91, "low <= value <= high"),
    (("reference_scores",), [], "reference_scores must name every label"),
    (("reference_scores", 0, "edges"), [0, 1], "one more edge"),
    (("reference_scores", 0, "edges"), [0, 0, 1], "must rise"),
    (("reference_scores", 0, "counts"), [0, 0], "at least one count"),
    (("explain", "output"), "probability", "explain.output"),
    (("outputs", 1, "name"), "probability", "outputs must not repeat"),
    (("variants", 0, "precision"), "fp32", "variants must not repeat"),
    (("variants", 0, "file"), "MODEL_FP32.onnx", "files must not repeat"),
    (("variants", 0, "gate"), "other.json", "is not among the documents"),
    (("golden",), [], "golden"),
    (("golden", 0, "tolerance"), {"fp32": 0.1}, "one tolerance per variant"),
    (("golden", 0, "tolerance", "fp32"), 0, "tolerance"),
    (("golden", 0, "expected"), {}, "one expected probability per label"),
    (("golden", 0, "sha256"), "0" * 63, "sha256"),
    (("documents", 0, "file"), "README.md", "documents must list MODEL_CARD.md"),
    (("documents", 0, "file"), "Manifest.json", "cannot list itself"),
]


@pytest.mark.parametrize(("path", "value", "said"), INVALID, ids=lambda item: str(item)[:40])
def test_a_manifest_that_contradicts_itself_is_refused_and_says_where(path: tuple[str | int, ...], value: Any, said: str) -> None:
    manifest = copy.deepcopy(VALID)
    at(manifest, path[:-1])[path[-1]] = value
    with pytest.raises(BundleError) as caught:
        parse(manifest)
    assert said in caught.value.message


@pytest.mark.parametrize(
    "name", ["../x.onnx", "/etc/passwd", "a/../../x", "a//b", "./x", "a\\b", ".hidden", "a/.b", "", "a/", "C:x", "a\n", "é", "x" * 201]
)
def test_a_path_that_could_leave_the_bundle_is_refused(name: str) -> None:
    manifest = copy.deepcopy(VALID)
    manifest["variants"][0]["file"] = name
    with pytest.raises(BundleError, match=r"variants\.0\.file"):
        parse(manifest)


def test_a_model_without_a_map_or_an_operating_point_for_a_measurement_is_valid() -> None:
    manifest = copy.deepcopy(VALID) | {"explain": None, "task": "measurement", "operating_points": [], "reference_scores": []}
    assert parse(manifest).explain is None


def test_labels_and_operating_points_are_found_by_name() -> None:
    manifest = parse(VALID)
    assert manifest.label("thing").code.value == "1"
    assert manifest.operating_point("thing").threshold == 0.4
    with pytest.raises(KeyError):
        manifest.label("other")


@pytest.mark.parametrize(
    ("have", "enough"), [("0.1.0", True), ("0.1.0.dev3", True), ("0.2", True), ("0.0.9", False), ("1.0.0+local", True)]
)
def test_min_appliance_version(have: str, enough: bool) -> None:
    raw = json.dumps(VALID).encode()
    if enough:
        assert Manifest.parse(raw, have).min_appliance_version == "0.1.0"
    else:
        with pytest.raises(BundleError) as caught:
            Manifest.parse(raw, have)
        assert caught.value.code == "bundle.too_new"


def test_what_is_no_version_is_said_so() -> None:
    with pytest.raises(ValueError, match="not a version"):
        Manifest.parse(json.dumps(VALID).encode(), "latest")


def test_the_version_is_read_before_any_field_is_judged() -> None:
    newer = VALID | {"schema": 3, "min_appliance_version": "9.4.0", "a_field_of_the_future": True}
    for version in ("0.2.0", ""):
        with pytest.raises(BundleError, match=r"needs appliance 9\.4\.0") as caught:
            Manifest.parse(json.dumps(newer).encode(), version)
        assert caught.value.code == "bundle.too_new"
    with pytest.raises(BundleError, match="needs a newer appliance") as caught:
        Manifest.parse(b'{"schema": 3}')
    assert caught.value.code == "bundle.too_new"


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda c: st.lists(c) | st.dictionaries(
    st.sampled_from(["schema", "min_appliance_version"]), c), max_leaves=6))  # fmt: skip
def test_any_envelope_is_read_without_a_crash(value: Any) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.parse(json.dumps(value).encode(), "0.2.0")
    assert caught.value.code in ("bundle.too_new", "bundle.manifest_invalid")


# --- schema 2 -------------------------------------------------------------------------------------------------------

SIDE = {"height": 64, "width": 64}
STEPS = [step | (SIDE if step["step"] == "resize" else {}) for step in VALID["input"]["pipeline"]]
CHECK = {
    "file": "input_check.onnx",
    "sha256": "1" * 64,
    "input": VALID["input"] | SIDE | {"pipeline": STEPS},
    "output": "probabilities",
    "classes": ["upright", "turned_90", "negative", "other"],
    "min_upright": 0.5,
    "measured_on": "held-out patients",
    "figures": [{"source": "a", "kind": "negative", "n": 20, "stopped": {"value": 0.95, "low": 0.76, "high": 0.99}}],
}  # fmt: skip
INTERVAL = {"value": 0.9, "low": 0.8, "high": 0.95}
CHILDREN = {
    "population": "child", "min_years": 1, "max_years": 5, "sources": ["a"], "n_positive": 10, "n_negative": 20,
    "sensitivity": INTERVAL, "specificity": INTERVAL,
}  # fmt: skip
ADULTS = CHILDREN | {"population": "adult", "min_years": 18, "max_years": 120}


def schema_2(**fields: Any) -> dict[str, Any]:
    return copy.deepcopy(VALID) | {"schema": 2, "min_appliance_version": "0.2.0"} | fields


def with_groups(*groups: dict[str, Any]) -> dict[str, Any]:
    manifest = schema_2()
    manifest["operating_points"][0]["groups"] = list(groups)
    return manifest


def with_synonyms(**synonyms: Any) -> dict[str, Any]:
    manifest = schema_2()
    manifest["applies_to"]["synonyms"] = synonyms
    return manifest


def test_a_complete_manifest_of_schema_2_is_read_and_written_without_loss() -> None:
    complete = with_groups(CHILDREN, ADULTS) | {"input_check": CHECK}
    complete["applies_to"]["synonyms"] = {"body_part": {"CHEST": ["RTG KLP"]}, "view": {"PA": ["站立位"]}}
    manifest = parse(complete)
    assert json.loads(manifest.to_json()) == complete
    assert manifest.digests()["input_check.onnx"] == "1" * 64


def test_a_patient_belongs_to_the_group_of_the_own_age() -> None:
    point = parse(with_groups(CHILDREN, ADULTS)).operating_points[0]
    for age, population in ((0.9, None), (1.0, "child"), (5.9, "child"), (6.0, None), (17.9, None), (18.0, "adult"), (72.0, "adult")):
        group = point.group_of(age)
        assert (group.population if group else None) == population, age
    assert point.group_of(None) is None


@pytest.mark.parametrize(
    ("manifest", "what"),
    [
        (copy.deepcopy(VALID) | {"input_check": CHECK}, "schema 1 has no input_check"),
        (with_groups(CHILDREN) | {"schema": 1}, "schema 1 has no operating_points.groups"),
        (with_synonyms(view={"PA": ["x"]}) | {"schema": 1}, "schema 1 has no applies_to.synonyms"),
        (schema_2(min_appliance_version="0.1.9"), "min_appliance_version of 0.2.0"),
        (with_groups(CHILDREN, ADULTS | {"min_years": 5}), "must not overlap"),
        (with_groups(CHILDREN | {"min_years": 5}), "min_years must be below"),
        (with_groups(CHILDREN | {"n_positive": 0}), "sensitivity needs images with the finding"),
        (with_synonyms(body_part={"CHEST": ["a"], "HAND": [" A "]}), "two meanings: A"),
        (schema_2(input_check=CHECK | {"classes": ["negative", "other"]}), "must contain upright"),
        (schema_2(input_check=CHECK | {"classes": ["upright", "other"]}), "figures of negative"),
        (schema_2(input_check=CHECK | {"file": "MODEL_FP32.onnx"}), "files must not repeat"),
    ],
)  # fmt: skip
def test_an_invalid_manifest_of_schema_2_is_refused_by_name(manifest: dict[str, Any], what: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse(manifest)
    assert caught.value.code == "bundle.manifest_invalid"
    assert what in caught.value.message


def test_a_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(VALID).operating_points[0].threshold = 0.1  # type: ignore[misc]


# --- the directory --------------------------------------------------------------------------------------------------


def test_a_bundle_is_loaded_and_named_by_the_digest_of_its_manifest(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    loaded = ModelBundle.load(tmp_path)
    assert loaded.digest == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert loaded.directory == tmp_path.resolve()
    assert loaded.path("golden/a.npz").is_file()


def test_the_bundle_directory_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "1.2.3").mkdir()
    write_bundle(tmp_path / "1.2.3")
    (tmp_path / "current").symlink_to("1.2.3")
    assert ModelBundle.load(str(tmp_path / "current")).directory == (tmp_path / "1.2.3").resolve()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    write_bundle(directory)
    return directory


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_r26_any_flipped_bit_of_any_file_is_found(shelf: Path, data: st.DataObject) -> None:
    digest = ModelBundle.load(shelf).digest
    path = data.draw(st.sampled_from(sorted(p for p in shelf.rglob("*") if p.is_file())))
    good = path.read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bad)
    try:
        # A manifest with another text may be valid in itself; it is another version then and carries another name.
        found = ModelBundle.load(shelf).digest != digest
    except BundleError:
        found = True
    finally:
        path.write_bytes(good)
    assert found


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_r26_any_file_cut_short_is_found(shelf: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(p for p in shelf.rglob("*") if p.is_file())))
    good = path.read_bytes()
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    try:
        with pytest.raises(BundleError):
            ModelBundle.load(shelf)
    finally:
        path.write_bytes(good)


def test_no_manifest(tmp_path: Path) -> None:
    refused("bundle.no_manifest", tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    refused("bundle.unreadable", tmp_path / "absent")


def test_a_manifest_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    with (tmp_path / "manifest.json").open("r+b") as stream:
        stream.truncate(model_bundle.MAX_MANIFEST_BYTES + 1)
    assert "larger than" in refused("bundle.manifest_invalid", tmp_path).message


@pytest.mark.parametrize("name", ["model_fp32.onnx", "golden/a.npz", "MODEL_CARD.md"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path)
    (tmp_path / name).unlink()
    assert name in refused("bundle.file_missing", tmp_path).message


@pytest.mark.parametrize("name", ["extra.onnx", "golden/b.npz", ".hidden", "engines/x.plan"])
def test_an_unlisted_file_is_refused(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert name in refused("bundle.file_unlisted", tmp_path).message


def test_a_link_in_place_of_a_file_is_refused_even_with_the_right_content(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle")
    weights = tmp_path / "bundle" / "model_fp32.onnx"
    weights.rename(tmp_path / "outside.onnx")
    weights.symlink_to(tmp_path / "outside.onnx")
    refused("bundle.unsafe_path", tmp_path / "bundle")


def test_a_link_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "golden").rename(tmp_path / "golden")
    (tmp_path / "bundle" / "golden").symlink_to(tmp_path / "golden")
    refused("bundle.unsafe_path", tmp_path / "bundle")


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    (tmp_path / "gate.json").unlink()
    os.mkfifo(tmp_path / "gate.json")
    refused("bundle.unsafe_path", tmp_path)


def test_a_digest_is_never_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to("target")
    assert model_bundle.sha256_of(tmp_path / "target") == hashlib.sha256(b"x").hexdigest()
    with pytest.raises(OSError, match="link"):
        model_bundle.sha256_of(tmp_path / "link")


def test_large_files_are_hashed_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(48 * 1024 * 1024))
    tracemalloc.start()
    model_bundle.sha256_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


def test_a_variant_is_chosen_by_precision_or_by_exactness(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    loaded = ModelBundle.load(tmp_path)
    assert loaded.variant().precision == "fp32"
    assert loaded.variant("int8").file == "model_int8.onnx"
    with pytest.raises(BundleError) as caught:
        loaded.variant("fp16")
    assert caught.value.code == "bundle.no_variant"


@pytest.mark.parametrize("name", ["manifest.json", "../x", "/etc/passwd"])
def test_only_listed_files_are_given_out(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path)
    with pytest.raises(BundleError) as caught:
        ModelBundle.load(tmp_path).path(name)
    assert caught.value.code == "bundle.file_unlisted"


# --- golden cases ---------------------------------------------------------------------------------------------------


def test_golden_cases_are_read_with_their_answers(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    (case,) = ModelBundle.load(tmp_path).golden_cases()
    assert case.name == "a"
    assert case.pixels.shape == (6, 8)
    assert case.expected == {"thing": 0.25}
    assert case.tolerance == {"fp32": 0.001, "int8": 0.05}
    assert case.cam is not None
    assert case.cam.shape == (1, 1, 7, 7)


def test_a_golden_case_without_a_map_is_valid(tmp_path: Path) -> None:
    write_bundle(tmp_path, **{"golden/a.npz": golden_npz(cam=None)})
    (case,) = ModelBundle.load(tmp_path).golden_cases()
    assert case.cam is None


def test_a_golden_case_that_changed_after_loading_is_found(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    loaded = ModelBundle.load(tmp_path)
    (tmp_path / "golden" / "a.npz").write_bytes(golden_npz(probability=np.array([[0.9]], np.float32)))
    with pytest.raises(BundleError) as caught:
        list(loaded.golden_cases())
    assert caught.value.code == "bundle.digest_mismatch"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not an archive",
        golden_npz()[:-30],
        golden_npz(pixels=None),
        golden_npz(probability=None),
        golden_npz(pixels=np.zeros((2, 2), np.float32)),
        golden_npz(pixels=np.zeros((0, 2), np.uint8)),
        golden_npz(probability=np.zeros((1, 2), np.float32)),
        golden_npz(pixels=np.array([[object()]], dtype=object)),
    ],
    ids=["empty", "text", "cut", "no pixels", "no probability", "float pixels", "no rows", "two labels", "pickle"],
)
def test_a_golden_case_that_is_none_is_refused(tmp_path: Path, raw: bytes) -> None:
    write_bundle(tmp_path, **{"golden/a.npz": raw})
    with pytest.raises(BundleError) as caught:
        list(ModelBundle.load(tmp_path).golden_cases())
    assert caught.value.code == "bundle.golden_invalid"


# --- rooms and errors -----------------------------------------------------------------------------------------------


def test_reading_a_manifest_imports_neither_numpy_nor_onnx() -> None:
    script = "import sys, model_sync.bundle; print(sorted({'numpy', 'onnx', 'onnxruntime', 'appliance'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", [LibraryUnreachable, TrustError, PublishError])
def test_errors_carry_a_hint(kind: type[ModelSyncError]) -> None:
    error = kind("it broke", hint="mend it")
    assert isinstance(error, ModelSyncError)
    assert (error.message, error.hint) == ("it broke", "mend it")
    assert str(error) == "it broke\nhint: mend it"


def test_a_bundle_error_shows_code_message_and_hint() -> None:
    assert str(BundleError("bundle.x", "it broke", "mend it")) == "[bundle.x] it broke\nhint: mend it"
