"""Calibration and evaluation sets: read as the box reads them, and everything that can be wrong with them said by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from appliance.imaging.preprocessing import from_display, to_tensor
from quantize.draft import Draft, Population
from quantize.errors import QuantizeError
from quantize.gate import image_sets, roc_statistics
from quantize.reference import build
from quantize.reference.phantom import Phantom, dataset
from tests.support import quantize_site

SPEC = build.INPUT
CHEST = ("CR", "DX", "RG")
RNG = np.random.default_rng(1)


def png(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.arange(64 * 48).reshape(64, 48) * (3 + value) % 251).astype(np.uint8)).save(path)
    return path


def pictures(directory: Path, count: int = image_sets.MIN_CALIBRATION) -> Path:
    for number in range(count):
        png(directory / f"p{number:03d}.png", number)
    return directory


def labelled(directory: Path, rows: str, header: str = "file,pneumonia,source,patient") -> Path:
    (directory / "labels.csv").write_text(f"{header}\n{rows}", encoding="utf-8")
    return directory


def calibration(directory: Path, work: Path) -> image_sets.ImageSet:
    return image_sets.read_calibration(directory, SPEC, CHEST, work)


def evaluation(directory: Path, work: Path) -> image_sets.ImageSet:
    return image_sets.read_evaluation(directory, SPEC, CHEST, ("pneumonia",), work)


def refused(code: str, read: Callable[[Path, Path], object], directory: Path, *words: str) -> None:
    with pytest.raises(QuantizeError) as caught:
        read(directory, directory.parent / "work")
    assert caught.value.code == code
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)


# --- read as the clinic does ----------------------------------------------------------------------------------------


def test_a_dicom_file_takes_the_clinics_whole_way(tmp_path: Path) -> None:
    chest = dataset(Phantom(300, 260, seed=1), name="one", photometric="MONOCHROME1")
    directory = pictures(tmp_path / "set")
    chest.save_as(directory / "a_scan", enforce_file_format=True)
    found = calibration(directory, tmp_path / "work")
    assert found.rows[0].path.name == "a_scan"
    assert (found.tensors[0] == to_tensor(chest, SPEC).tensor[0]).all()
    assert found.rows[0].patient == "DEMO-9999"
    assert "Chest phantom" in found.rows[0].source


def test_png_jpeg_and_npz_are_read_as_displayed(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (3, 50, 70), np.uint8)
    directory = pictures(tmp_path / "set")
    np.savez(directory / "a.npz", pixels=pixels)
    Image.fromarray(pixels[0]).save(directory / "b.jpg", quality=95)
    found = calibration(directory, tmp_path / "work")
    for number in range(3):
        assert found.rows[number].index == number
        assert (found.tensors[number] == from_display(pixels[number], SPEC).tensor[0]).all()
    with Image.open(directory / "b.jpg") as jpeg:
        assert (found.tensors[3] == from_display(np.asarray(jpeg), SPEC).tensor[0]).all()


def test_many_calibration_pictures_are_thinned_evenly(tmp_path: Path) -> None:
    directory = pictures(tmp_path / "set", 50)
    found = image_sets.read_calibration(directory, SPEC, CHEST, tmp_path / "work", limit=10)
    assert [row.path.name for row in found.rows][:: len(found) - 1] == ["p000.png", "p049.png"]
    assert len(found) == 10


def test_labels_sources_and_patients_come_from_the_table(tmp_path: Path) -> None:
    directory = pictures(tmp_path / "set", 2)
    found = evaluation(labelled(directory, 'p000.png,1,"A, hospital",x\np001.png,0,B,\n'), tmp_path / "work")
    assert found.positive.tolist() == [[True], [False]]
    assert [row.source for row in found.rows] == ["A, hospital", "B"]
    assert [row.patient for row in found.rows] == ["x", ""]


def test_another_label_makes_another_set(tmp_path: Path) -> None:
    directory = pictures(tmp_path / "set", 2)
    one = evaluation(labelled(directory, "p000.png,1,,\np001.png,0,,\n"), tmp_path / "work")
    other = evaluation(labelled(directory, "p000.png,0,,\np001.png,1,,\n"), tmp_path / "work")
    assert one.digest != other.digest


# --- bad calibration sets -------------------------------------------------------------------------------------------


def test_calibration_directory_missing(tmp_path: Path) -> None:
    refused("data.missing", calibration, tmp_path / "absent")


def test_calibration_set_empty(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "readme.txt").write_text("no picture")
    refused("data.empty", calibration, tmp_path / "set", "DICOM", ".png")


def test_calibration_set_too_small(tmp_path: Path) -> None:
    refused("data.too_few", calibration, pictures(tmp_path / "set", 5), "5 pictures", str(image_sets.MIN_CALIBRATION))


def test_calibration_set_of_the_wrong_modality(tmp_path: Path) -> None:
    directory = pictures(tmp_path / "set")
    scan = dataset(Phantom(64, 64), name="two")
    scan.Modality = "MR"
    scan.save_as(directory / "brain.dcm", enforce_file_format=True)
    refused("data.modality", calibration, directory, "brain.dcm (MR)", "CR, DX, RG", "applies_to.modality")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.png", b"\x89PNG\r\n\x1a\n1234"),
        ("cut.dcm", b"\0" * 128 + b"DICM" + b"\x02\0"),
        ("text.jpg", b"no picture"),
        ("empty.npz", b""),
        ("plain.npz", b"PK\x03\x04"),
    ],
)
def test_an_unreadable_picture_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    directory = pictures(tmp_path / "set")
    (directory / name).write_bytes(content)
    refused("data.unreadable", calibration, directory, name)


def test_sixteen_bits_without_a_window_are_refused(tmp_path: Path) -> None:
    directory = pictures(tmp_path / "set")
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(directory / "deep.png")
    refused("data.unreadable", calibration, directory, "deep.png", "16 bits")


def test_an_npz_of_floats_is_refused(tmp_path: Path) -> None:
    directory = pictures(tmp_path / "set")
    np.savez(directory / "f.npz", pixels=np.zeros((4, 4), np.float32))
    refused("data.unreadable", calibration, directory, "f.npz", "uint8")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from([".png", ".jpg", ".npz", ".dcm"]))
def test_no_bytes_get_past_the_reader(tmp_path: Path, content: bytes, suffix: str) -> None:
    from quantize.gate.image_files import UnreadableError, read_image

    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(UnreadableError):
        read_image(path, 0, SPEC)


# --- bad labels -----------------------------------------------------------------------------------------------------


def test_label_file_missing(tmp_path: Path) -> None:
    refused("data.labels", evaluation, pictures(tmp_path / "set", 2), "labels.csv", "file,pneumonia")


def test_label_column_missing(tmp_path: Path) -> None:
    refused("data.labels", evaluation, labelled(pictures(tmp_path / "set", 1), "p000.png,1\n", "file,tb"), "pneumonia")


def test_unknown_label_columns(tmp_path: Path) -> None:
    directory = labelled(pictures(tmp_path / "set", 1), "p000.png,1,3\n", "file,pneumonia,colour")
    refused("data.labels", evaluation, directory, "colour")


def test_labels_without_both_classes(tmp_path: Path) -> None:
    directory = labelled(pictures(tmp_path / "set", 2), "p000.png,1,,\np001.png,1,,\n")
    refused("data.one_class", evaluation, directory, "2 positive and 0 negative", "pneumonia")


def test_a_picture_that_the_table_names_is_missing(tmp_path: Path) -> None:
    directory = labelled(pictures(tmp_path / "set", 1), "p000.png,1,,\ngone.png,0,,\n")
    refused("data.missing", evaluation, directory, "gone.png", "line 3")


def test_a_picture_outside_the_directory_is_refused(tmp_path: Path) -> None:
    png(tmp_path / "other.png")
    directory = labelled(pictures(tmp_path / "set", 1), "p000.png,1,,\n../other.png,0,,\n")
    refused("data.missing", evaluation, directory, "other.png")


def test_a_picture_that_the_table_leaves_out_is_named(tmp_path: Path) -> None:
    directory = labelled(pictures(tmp_path / "set", 3), "p000.png,1,,\np001.png,0,,\n")
    refused("data.labels", evaluation, directory, "p002.png")


@pytest.mark.parametrize("rows", ["p000.png,yes,,\n", "p000.png,,,\n", "p000.png,1\n", "p000.png,1,,,,\n", "p000.png,1,,\np000.png,1,,\n"])
def test_a_row_that_says_something_else_is_refused(tmp_path: Path, rows: str) -> None:
    refused("data.labels", evaluation, labelled(pictures(tmp_path / "set", 1), rows))


def test_an_index_beyond_the_file_is_refused(tmp_path: Path) -> None:
    directory = labelled(pictures(tmp_path / "set", 1), "p000.png,1,4\n", "file,pneumonia,index")
    refused("data.labels", evaluation, directory, "no picture 4")


def test_a_table_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    directory = pictures(tmp_path / "set", 1)
    (directory / "labels.csv").write_bytes("file,pneumonia,source\np000.png,1,县医院\n".encode("gb18030"))
    refused("data.labels", evaluation, directory, "UTF-8")


# --- both sets ------------------------------------------------------------------------------------------------------


def test_a_patient_in_both_sets_is_refused_without_being_named(tmp_path: Path) -> None:
    one, other = pictures(tmp_path / "one"), tmp_path / "other"
    for number in range(2):
        png(other / f"q{number}.png", 100 + number)
    labelled(one, "".join(f"p{n:03d}.png,{n % 2},,Zhang{n}\n" for n in range(image_sets.MIN_CALIBRATION)))
    labelled(other, "q0.png,1,,Zhang3\nq1.png,0,,Li\n")
    sets = calibration(one, tmp_path / "a"), evaluation(other, tmp_path / "b")
    with pytest.raises(QuantizeError) as caught:
        image_sets.check_disjoint(*sets)
    assert caught.value.code == "data.overlap"
    assert "p003.png" in str(caught.value)
    assert "Zhang" not in str(caught.value)


def test_the_same_picture_in_both_sets_is_refused(tmp_path: Path) -> None:
    one, other = pictures(tmp_path / "one"), pictures(tmp_path / "other", 2)
    labelled(other, "p000.png,1,,\np001.png,0,,\n")
    with pytest.raises(QuantizeError, match=r"in both sets: p000\.png, p001\.png"):
        image_sets.check_disjoint(calibration(one, tmp_path / "a"), evaluation(other, tmp_path / "b"))


def test_an_npz_may_be_shared_out_between_the_sets(tmp_path: Path) -> None:
    stack = RNG.integers(0, 255, (image_sets.MIN_CALIBRATION + 2, 20, 20), np.uint8)
    for name, rows in (
        ("one", range(image_sets.MIN_CALIBRATION)),
        ("other", range(image_sets.MIN_CALIBRATION, image_sets.MIN_CALIBRATION + 2)),
    ):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "all.npz", pixels=stack)
        labelled(tmp_path / name, "".join(f"all.npz,{i},{i % 2}\n" for i in rows), "file,index,pneumonia")
    image_sets.check_disjoint(calibration(tmp_path / "one", tmp_path / "a"), evaluation(tmp_path / "other", tmp_path / "b"))


# --- the draft ------------------------------------------------------------------------------------------------------

DRAFT = build.DRAFT.read_text(encoding="utf-8")


def test_the_draft_of_the_reference_bundle_is_read() -> None:
    draft = Draft.parse(DRAFT.encode())
    assert draft.label_names == ("pneumonia",)
    assert draft.registration.number is None
    assert (draft.output("probability"), draft.output("cam"), draft.output("segmentation_logits")) == ("probability", "cam", None)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ('name = "cxr-pneumonia"', 'name = "CXR pneumonia"', "name"),
        ('version = "0.2.0"', 'version = "two"', "version"),
        ("licence =", "license =", "licence"),
        ("height = 224\nwidth", 'height = "224"\nwidth', "input"),
        ("sensitivity = 0.95", "sensitivity = 95", "operating_points.0.sensitivity"),
        ('label = "pneumonia"', 'label = "effusion"', "operating_points"),
        ('kind = "probability"', 'kind = "logit"', "outputs.0.kind"),
        ("max_years = 5.0", "max_years = 0.5", "min_years must be below"),
        ('[title]\nzh = "', '[title]\nzz = "', "title.zz"),
        ("[title]", "[title", "table declaration"),
    ],
)
def test_a_draft_with_a_wrong_field_names_it(before: str, after: str, named: str) -> None:
    assert before in DRAFT
    with pytest.raises(QuantizeError) as caught:
        Draft.parse(DRAFT.replace(before, after, 1).encode())
    assert caught.value.code == "draft.invalid"
    assert named in caught.value.message


def test_a_draft_that_is_missing_or_no_utf8(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="does not exist"):
        Draft.load(tmp_path / "draft.toml")
    with pytest.raises(QuantizeError, match="not valid"):
        Draft.parse(DRAFT.encode("utf-16"))


# --- the digest of the evaluation set ---------------------------------------------------------------------------------

HEX = st.integers(0, 30).map(lambda number: f"{number:064x}")
ROWS = st.lists(
    st.tuples(HEX, st.integers(0, 3), st.booleans(), st.sampled_from(["", "a", "b", "a\tb", "a\nb"]), st.sampled_from(["", "p", "q", "r"])),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[:2],
)


def set_of(rows: list[tuple[str, int, bool, str, str]], names: str = "") -> image_sets.ImageSet:
    """A set of which only the digests and the rows count."""
    made = tuple(
        image_sets.Row(Path(f"{names}{n}"), index, (label,), source, patient) for n, (_, index, label, source, patient) in enumerate(rows)
    )
    return image_sets.ImageSet(Path(names), made, np.zeros((len(rows), 1), np.float32), tuple(row[0] for row in rows), names)


def digest_of(rows: list[tuple[str, int, bool, str, str]], names: str = "") -> str:
    return image_sets.evaluation_digest(set_of(rows, names), ["pneumonia"])


@given(ROWS, st.randoms())
def test_order_names_and_patient_identifiers_do_not_change_the_digest_of_a_set(
    rows: list[tuple[str, int, bool, str, str]], random: Any
) -> None:
    renamed = [(*row[:4], {"": "", "p": "Zhang", "q": "Li", "r": "Wang"}[row[4]]) for row in rows]
    random.shuffle(renamed)
    assert digest_of(renamed, "other/") == digest_of(rows)


@given(ROWS, st.data())
def test_an_image_a_label_or_a_source_changes_the_digest_of_a_set(rows: list[tuple[str, int, bool, str, str]], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(rows) - 1))
    digest, index, label, source, patient = rows[place]
    for changed in (
        ("f" * 64, index, label, source, patient),
        (digest, index, not label, source, patient),
        (digest, index, label, source + "x", patient),
    ):
        assert digest_of([*rows[:place], changed, *rows[place + 1 :]]) != digest_of(rows)
    assert digest_of([*rows, ("e" * 64, 0, True, "", "")]) != digest_of(rows)
    assert image_sets.evaluation_digest(set_of(rows), ["effusion"]) != digest_of(rows)


def test_which_images_are_of_one_patient_changes_the_digest_of_a_set() -> None:
    three = [(f"{number:064x}", 0, True, "a", patient) for number, patient in enumerate("ppq")]
    apart = [(f"{number:064x}", 0, True, "a", patient) for number, patient in enumerate("pqr")]
    unknown = [(f"{number:064x}", 0, True, "a", "") for number in range(3)]
    in_one_file = [("0" * 64, number, True, "a", patient) for number, patient in enumerate("ppq")]
    in_one_file_apart = [("0" * 64, number, True, "a", patient) for number, patient in enumerate("pqr")]
    assert len({digest_of(rows) for rows in (three, apart, unknown, in_one_file, in_one_file_apart)}) == 5


POPULATIONS = (
    Population(sources=["Children"], population="child", min_years=1, max_years=5),
    Population(sources=["Adults A", "Adults B"], population="adult", min_years=18, max_years=120),
)


def populated(directory: Path, *sources: str) -> image_sets.ImageSet:
    pictures(directory, len(sources))
    rows = "".join(f"p{number:03d}.png,{number % 2},{source},\n" for number, source in enumerate(sources))
    return evaluation(labelled(directory, rows), directory.parent / "work")


def test_sources_and_populations_that_agree(tmp_path: Path) -> None:
    image_sets.check_populations(populated(tmp_path / "set", "Children 2018", "Adults B", "Elsewhere"), POPULATIONS)


def test_a_population_without_a_picture_is_refused(tmp_path: Path) -> None:
    found = populated(tmp_path / "set", "Children 2018", "adults a")
    refused(
        "data.population", lambda *_: image_sets.check_populations(found, POPULATIONS), tmp_path / "set", "Adults A or Adults B", "adults a"
    )


def test_a_source_of_two_populations_is_refused(tmp_path: Path) -> None:
    found = populated(tmp_path / "set", "Children 2018", "Adults A")
    twice = (*POPULATIONS, Population(sources=["Child"], population="child", min_years=7, max_years=9))
    refused("data.population", lambda *_: image_sets.check_populations(found, twice), tmp_path / "set", "Children 2018", "several")


def draft_with(populations: str, version: str = "0.2.0") -> bytes:
    return f"{re.sub('min_appliance_version = .*', f'min_appliance_version = {version!r}', plain_draft())}\n{populations}".encode()


def plain_draft() -> str:
    """The draft of a team whose model needs schema 1 only."""
    return quantize_site.DRAFT


CHILDREN = '[[populations]]\nsources = ["v"]\npopulation = "child"\nmin_years = 1.0\nmax_years = 5.0\n'
YOUTHS = '[[populations]]\nsources = ["t"]\npopulation = "child"\nmin_years = 5.0\nmax_years = 17.0\n'


@pytest.mark.parametrize(
    ("draft", "what"),
    [
        (draft_with(CHILDREN + YOUTHS), "must not overlap in age"),
        (draft_with(CHILDREN.replace("1.0", "5.0")), "min_years must be below max_years"),
        (draft_with(CHILDREN.replace("child", "elderly")), "population"),
        (draft_with(CHILDREN.replace('["v"]', "[]")), "sources"),
        (draft_with(CHILDREN, version="0.1.9"), "min_appliance_version of 0.2.0"),
    ],
)
def test_populations_that_are_wrong_are_named(draft: bytes, what: str) -> None:
    with pytest.raises(QuantizeError, match=re.escape(what)):
        Draft.parse(draft)


def test_a_draft_without_newer_fields_makes_a_manifest_that_older_boxes_read() -> None:
    assert Draft.parse(plain_draft().encode()).schema_version == 1
    assert Draft.parse(draft_with(CHILDREN)).schema_version == 2


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["Children", "Adults A", "Adults B", "Other"]), st.floats(0, 1)), min_size=1))
def test_the_groups_count_every_picture_of_their_sources_once(pictures_of: list[tuple[bool, str, float]]) -> None:
    positive, source, score = (np.array(column) for column in zip(*pictures_of, strict=True))
    scored = roc_statistics.Scored(positive, source, score)
    present = [population for population in POPULATIONS if any(map(population.includes_source, source.tolist()))]
    for one, population in zip(roc_statistics.per_population(scored, 0.5, POPULATIONS), present, strict=True):
        chosen = np.array([population.includes_source(name) for name in source.tolist()])
        assert (one.n_positive, one.n_negative) == ((positive & chosen).sum(), (~positive & chosen).sum())
        alarms = int((score[positive & chosen] >= 0.5).sum())
        assert one.sensitivity == (roc_statistics.wilson(alarms, one.n_positive) if one.n_positive else None)
        quiet = int((score[~positive & chosen] < 0.5).sum())
        assert one.specificity == (roc_statistics.wilson(quiet, one.n_negative) if one.n_negative else None)
        assert set(one.sources) == set(source[chosen].tolist())
