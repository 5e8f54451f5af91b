"""The field cases of ../shared/data/field: what real senders do, and what a user expects of each file."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.main import main
from appliance.core.settings import Settings
from tests.conftest import SHARED
from tests.support import web_box
from tests.support.activated import reference_box
from tests.support.receiver_process import receiver

FIELD = SHARED / "data" / "field"
POSITIVE, NEGATIVE = 0.980, 0.014
# Their headers contradict PS3.3 C.7.6.1.1.1: rows that run from head to feet are labelled H, and the other way round.
REVERSED = {"turned_90_neg.dcm", "turned_270_pos.dcm"}

Result = dict[str, Any]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_box(tmp_path_factory.mktemp("field") / "box")


@pytest.fixture(scope="module")
def results(box: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """The results of each file, by its name, from one call of ``appliance analyze``."""
    if not FIELD.is_dir():
        pytest.skip("needs ../shared")
    output = command_output(tmp_path_factory.mktemp("output"), "analyze", "--json", "--data-dir", str(box), str(FIELD))
    found: dict[str, list[Result]] = {}
    for item in json.loads(output):
        name = Path(item["path"].split("!")[0]).relative_to(FIELD).parts[0]
        found.setdefault(name, []).append(item)
    return found


def rows() -> list[Any]:
    """The rows of the manifest."""
    if not FIELD.is_dir():
        return []
    with (FIELD / "manifest.csv").open(encoding="utf-8") as stream:
        return [row["file"] for row in csv.DictReader(stream)]


def scored(item: Result, score: float, tolerance: float = 0.02) -> bool:
    return item["status"] == "analysed" and abs(item["findings"][0]["score"] - score) <= tolerance


def codes(item: Result) -> set[str]:
    return {note["code"] for note in item["notes"]}


def command_output(tmp_path: Path, *arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch, (tmp_path / "output").open("w+", encoding="utf-8") as stream:
        patch.setattr("sys.stdout", stream)
        patch.setattr("appliance.cli.main.limit_memory", lambda _: None)  # it would limit the process of the tests
        mask = os.umask(0o022)
        try:
            main(list(arguments))
        finally:
            os.umask(mask)
        stream.seek(0)
        return stream.read()


@pytest.fixture(scope="module")
def studies(box: Path, results: dict[str, list[Result]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What ``appliance studies --json`` prints when all files are analysed."""
    assert results
    found: list[dict[str, Any]] = json.loads(
        command_output(tmp_path_factory.mktemp("studies"), "studies", "--json", "--data-dir", str(box))
    )
    return found


def study_of(studies: list[dict[str, Any]], item: Result) -> dict[str, Any]:
    (study,) = (study for study in studies if item["sop_instance_uid"] in [image["sop_instance_uid"] for image in study["images"]])
    return study


CHINESE = {
    "name_gbk_under_ir100.dcm": ("张^智宏", {"caution.text_encoding"}),
    "name_gbk_no_charset.dcm": ("张^智宏", {"caution.text_encoding"}),
    "name_utf8_no_charset.dcm": ("张^智宏", {"caution.text_encoding"}),
    "name_ps35_ir58.dcm": ("Zhang^XiaoDong=张^小东=", set()),
}
TURNED = {"turned_90_neg.dcm": NEGATIVE, "turned_180_neg.dcm": NEGATIVE, "turned_270_pos.dcm": POSITIVE, "mirrored_neg.dcm": NEGATIVE}
REFUSED = {
    "words_view_cn_lateral.dcm": ("scope.view", "侧位"), "species_canine.dcm": ("scope.species", ""),
    "words_hand_no_bodypart.dcm": ("scope.body_part", "HAND"), "for_processing.dcm": ("scope.for_processing", ""),
    "quality_control_image.dcm": ("scope.quality_control", ""),
}  # fmt: skip
NOTED = {
    "comma_window.dcm": "caution.decimal_comma",
    "uid_65_characters.dcm": "caution.long_uid",
    "words_view_frontal.dcm": "assume.view_frontal",
    "words_view_cn.dcm": "assume.view_frontal",
    "window_width_negative_pos.dcm": "caution.window",
    "lut_one_entry_short_pos.dcm": "caution.lut_short",
    "j2k_not_closed.dcm": "caution.repaired",
    "j2k_closed_by_zeros.dcm": "caution.repaired",
    "says_j2k_is_native.dcm": "caution.repaired",
}


@pytest.mark.parametrize("name", rows())
def test_field_case(name: str, results: dict[str, list[Result]], studies: list[dict[str, Any]]) -> None:
    if name == "zip_in_zip.zip":
        assert [(item["path"][-9:], item["reason"]["code"]) for item in results[name]] == [
            ("inner.zip", "ingest.nested_archive"),
            ("/a.dcm.gz", "ingest.nested_archive"),
        ]
        return
    (item,) = results[name]
    if name in CHINESE:
        expected, notes = CHINESE[name]
        assert scored(item, POSITIVE)
        assert study_of(studies, item)["patient_name"] == expected
        assert codes(item) == notes
    elif name in TURNED:
        assert scored(item, TURNED[name])
        assert codes(item) == {"caution.turned"} | ({"caution.orientation_reversed"} if name in REVERSED else set())
    elif name in REFUSED:
        assert item["status"] == "out_of_scope"
        assert (item["reason"]["code"], item["reason"]["detail"]) == REFUSED[name]
        assert not item["findings"]
    elif name == "comma_spacing.dcm":
        assert item["status"] == "analysed"
        assert codes(item) == {"caution.decimal_comma"}
    elif name in NOTED:
        assert scored(item, POSITIVE)
        assert codes(item) == {NOTED[name]}
    elif name == "lut_one_entry_short_neg.dcm":
        assert scored(item, NEGATIVE)
        assert codes(item) == {"caution.lut_short"}
    elif name.startswith("negative_polarity"):
        assert item["status"] == "quality_rejected"
        assert item["reason"]["code"] == "quality.negative"
    else:
        assert scored(item, NEGATIVE if name == "base_negative.dcm" else POSITIVE)
        assert codes(item) == set()


def test_studies_lists_what_the_box_has(box: Path, studies: list[dict[str, Any]], tmp_path: Path) -> None:
    (found,) = json.loads(command_output(tmp_path, "studies", "--json", "--search", "XiaoDong", "--data-dir", str(box)))
    assert found in studies
    assert found["state"] == "ai_ready"
    assert found["images"][0]["findings"][0]["positive"]
    table = command_output(tmp_path, "studies", "--search", "XiaoDong", "--data-dir", str(box)).splitlines()
    assert len(table) == 2
    assert found["patient_id"] in table[1]
    audit = [json.loads(line) for line in command_output(tmp_path, "audit", "show", "--data-dir", str(box)).splitlines()]
    assert sum(f"study:{found['id']}" in json.dumps(entry) and "cli" in json.dumps(entry) for entry in audit[-6:]) == 2


# What a C-STORE sender cannot read itself, or does not send with the transfer syntaxes that it proposes.
NOT_SENT = {"j2k_not_closed.dcm", "j2k_closed_by_zeros.dcm", "says_j2k_is_native.dcm", "uid_65_characters.dcm"}


def test_the_same_verdict_by_c_store(results: dict[str, list[Result]], tmp_path: Path) -> None:
    """What ``appliance analyze`` says of a file is what the box says that receives it from storescu (DCMTK)."""
    box = reference_box(tmp_path / "box")
    names = [name for name in results if name.endswith(".dcm") and name not in NOT_SENT]
    with receiver(Settings.load(box)) as (port, _):
        files = [str(FIELD / name) for name in names]
        subprocess.run(["storescu", "-aec", "CLINICBOX", "127.0.0.1", str(port), *files], check=True, capture_output=True)
    compare(box, names, results, tmp_path)


def test_the_same_verdict_by_upload(results: dict[str, list[Result]], tmp_path: Path) -> None:
    """What ``appliance analyze`` says of a file is what the box says whose upload form takes it."""
    box = reference_box(tmp_path / "box")
    names = [name for name in results if name.endswith(".dcm")]
    with web_box.in_process(Settings.load(box)) as served:
        person = served.person()
        for name in names:
            (outcome,) = web_box.upload(person, name, (FIELD / name).read_bytes())
            assert outcome["result"] in ("stored", "duplicate"), (name, outcome)  # two files are the same once they are repaired
        nested = web_box.upload(person, "zip_in_zip.zip", (FIELD / "zip_in_zip.zip").read_bytes())
        assert [item["result"] for item in nested] == ["refused", "refused"]
    compare(box, names, results, tmp_path)


def compare(box: Path, names: list[str], results: dict[str, list[Result]], tmp_path: Path) -> None:
    """Analyse what a box has received, and compare it with what the command said of the same files."""
    subprocess.run([sys.executable, "-m", "appliance", "worker", "--until-idle", "--data-dir", str(box)], check=True, capture_output=True)
    received = json.loads(command_output(tmp_path, "studies", "--json", "--data-dir", str(box)))
    images = {image["sop_instance_uid"]: (study, image) for study in received for image in study["images"]}
    states = {"analysed": "ai_ready"}
    for name in names:
        (item,) = results[name]
        study, image = images[item["sop_instance_uid"]]
        assert image["state"] == states.get(item["status"], item["status"]), name
        reason = (item["reason"] or {}).get("code")
        assert (image["reason"] or {}).get("code") == reason, name
        assert {note["code"] for note in image["notes"]} - {reason} == codes(item) - {reason}, name
        scores = [[round(finding["score"], 4) for finding in found["findings"]] for found in (image, item)]
        assert scores[0] == scores[1], name
        assert name not in CHINESE or study["patient_name"] == CHINESE[name][0]
