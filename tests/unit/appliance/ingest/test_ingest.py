"""The door: every bad input of the checklist by name, truncation anywhere, text in Chinese, archives, pictures."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, generate_uid

from appliance.core.domain import Note, PictureForm, Source
from appliance.core.errors import ApplianceError, IngestError, StoreError
from appliance.core.settings import Settings
from appliance.ingest import ingest as module
from appliance.ingest.archive import Outcome, accept_file, files_below
from appliance.ingest.ingest import Ingest, content_digest
from appliance.ingest.repairs import meta_end
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from tests.support.scans import dataset, encode, scan_bytes

SOURCE = Source("upload", "demo", "a.dcm")


@pytest.fixture
def door(store: Store) -> Ingest:
    """A door to a fresh store."""
    return Ingest(store)


def refused(door: Ingest, data: bytes) -> str:
    """The code a file is refused with."""
    with pytest.raises(IngestError) as caught:
        door.accept(data, SOURCE)
    return caught.value.code


def test_a_good_scan_is_described(door: Ingest) -> None:
    scan = door.accept(scan_bytes(), SOURCE).scan
    assert (scan.modality, scan.body_part_examined, scan.view_position, scan.patient_age_years) == ("CR", "CHEST", "PA", 4.0)
    assert scan.patient.patient_name == "测试^一"


def deep_sequence() -> bytes:
    """A thousand sequences inside one another, each of undefined length."""
    opening = b"\x40\x00\x75\x02SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return scan_bytes(PixelData=None)[:-12] + opening * 5000


BAD = {
    "not DICOM": (lambda: b"hello" * 100, "ingest.not_dicom"),
    "a PNG that calls itself DICOM": (lambda: b"\x89PNG\r\n\x1a\n" + b"x" * 500, "ingest.not_dicom"),
    "empty": (lambda: b"", "ingest.empty"),
    "only zeros, cut in the preamble": (lambda: b"\0" * 100, "ingest.truncated"),
    "no pixel data": (lambda: scan_bytes(PixelData=None), "ingest.no_pixel_data"),
    "missing SOP Instance UID": (lambda: encode_without_uid("SOPInstanceUID"), "ingest.missing_uid"),
    "UID with path characters": (lambda: scan_bytes(StudyInstanceUID="../../etc/passwd"), "ingest.invalid_uid"),
    "UID of 129 characters": (lambda: scan_bytes(SeriesInstanceUID="1." + "2" * 127), "ingest.invalid_uid"),
    "UID with letters": (lambda: scan_bytes(SOPInstanceUID="1.2.abc"), "ingest.invalid_uid"),
    "65535 x 65535": (lambda: scan_bytes(Rows=65535, Columns=65535, PixelData=b"\0\0"), "ingest.absurd_dimensions"),
    "a million frames": (lambda: scan_bytes(NumberOfFrames="1000000"), "ingest.absurd_dimensions"),
    "NumberOfFrames is no number": (
        lambda: scan_bytes(NumberOfFrames="1").replace(b"IS\x02\x001 ", b"IS\x02\x001A"), "ingest.pixel_attributes"),
    "wrong PixelRepresentation": (lambda: scan_bytes(PixelRepresentation=7), "ingest.pixel_representation"),
    "no PixelRepresentation": (lambda: scan_bytes(PixelRepresentation=None), "ingest.pixel_representation"),
    "unknown transfer syntax": (lambda: with_syntax("1.2.3.4.5"), "ingest.unsupported_syntax"),
    "video transfer syntax": (lambda: with_syntax("1.2.840.10008.1.2.4.102"), "ingest.unsupported_syntax"),
    "meta element without length": (lambda: hidden(b"UN\0\0\xff\xff\xff\xff\xfe\xff\xdd\xe0\0\0\0\0"), "ingest.unreadable"),
    "meta element beyond the file": (lambda: hidden(b"OB\0\0\xff\xff\xff\x00"), "ingest.truncated"),
    "countless sequence items": (lambda: scan_bytes(PixelData=None) + b"\xfe\xff\x00\xe0\0\0\0\0" * 300_000, "ingest.unreadable"),
    "a patient name of a megabyte": (lambda: long_name(), "ingest.unreadable"),
    "countless elements": (lambda: scan_bytes(PixelData=None) + private_elements(), "ingest.unreadable"),
    "sequences without end": (deep_sequence, "ingest.no_pixel_data"),
    "deflate bomb": (lambda: deflated(b"\0" * (300 << 20)), "ingest.too_large"),
    "deflated and cut": (lambda: encode(dataset(transfer_syntax_uid=DeflatedExplicitVRLittleEndian))[:-20], "ingest.truncated"),
}  # fmt: skip


def with_syntax(uid: str) -> bytes:
    """A file whose meta group names another transfer syntax."""
    made = scan_bytes()
    old = b"UI" + struct.pack("<H", 20) + b"1.2.840.10008.1.2.1\0"
    padded = uid.encode() + b"\0" * (len(uid) % 2)
    assert old in made
    return made.replace(old, b"UI" + struct.pack("<H", len(padded)) + padded, 1)


def encode_without_uid(name: str) -> bytes:
    """A file whose data set and meta group both lack the UID."""
    made = dataset(**{name: None})
    data = encode(made)
    return data.replace(b"\x02\x00\x03\x00UI", b"\x02\x00\x03\x01UI", 1)


def hidden(element: bytes) -> bytes:
    """An element at the end of the meta group that would hide the data set from the digest."""
    made = scan_bytes()
    end = meta_end(made)
    return made[:end] + b"\x02\x00\x02\x01" + element + made[end:]


def long_name() -> bytes:
    """A name of a million components, in implicit VR where a PN may be as long."""
    made = dataset(transfer_syntax_uid="1.2.840.10008.1.2", PatientName="X" * 64)
    name = b"a\\" * 500_000
    return encode(made).replace(struct.pack("<HHI", 0x10, 0x10, 64) + b"X" * 64, struct.pack("<HHI", 0x10, 0x10, len(name)) + name)


def private_elements() -> bytes:
    """60,000 elements of ten bytes, each with a tag of its own."""
    return b"".join(struct.pack("<HH2sH2s", 0x7FE1 + 2 * (i >> 14), i & 0x3FFF, b"US", 2, b"\0\0") for i in range(60_000))


def deflated(data: bytes) -> bytes:
    """A deflated file that unpacks to ``data``."""
    made = encode(dataset(transfer_syntax_uid=DeflatedExplicitVRLittleEndian))
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return made[: meta_end(made)] + packer.compress(data) + packer.flush()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_reason(door: Ingest, store: Store, name: str) -> None:
    make, code = BAD[name]
    data = make()
    assert refused(door, data) == code
    row = Worklist(store).rejections()[0]
    assert (row["code"], row["bytes"], row["name"]) == (code, len(data), "a.dcm")
    assert Worklist(store).count() == 0


@pytest.mark.parametrize("name", ["StudyInstanceUID", "SeriesInstanceUID"])
def test_a_scan_without_study_or_series_uid_stands_alone_and_says_so(door: Ingest, name: str) -> None:
    data = scan_bytes(**{name: None})
    first, again, other = door.accept(data, SOURCE), door.accept(data, SOURCE), door.accept(scan_bytes(**{name: None}), SOURCE)
    assert [note.code for note in first.scan.notes] == ["caution.missing_uid"]
    assert again.stored.outcome == "duplicate"
    assert first.stored.series_id != other.stored.series_id


def test_too_large(settings: Settings) -> None:
    small = Store(settings.model_copy(update={"max_upload_bytes": 1000}))
    assert refused(Ingest(small), scan_bytes()) == "ingest.too_large"
    with pytest.raises(IngestError, match="too_large"):
        Ingest(small).accept_picture(b"x" * 2000, PictureForm(), SOURCE)


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 0.99999))
def test_truncated_anywhere_is_refused(door: Ingest, cut: float) -> None:
    data = scan_bytes(SOPInstanceUID="1.2.3", StudyInstanceUID="1.2.4", SeriesInstanceUID="1.2.5")
    with pytest.raises(IngestError):
        door.accept(data[: int(len(data) * cut)], SOURCE)


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3000), junk=st.binary(min_size=1, max_size=12))
def test_damage_in_the_header_never_crashes_the_door(door: Ingest, at: int, junk: bytes) -> None:
    data = bytearray(scan_bytes(SOPInstanceUID="1.2.3", StudyInstanceUID="1.2.4", SeriesInstanceUID="1.2.5"))
    data[at : at + len(junk)] = junk
    try:
        door.accept(bytes(data), SOURCE)
    except ApplianceError as error:
        assert error.code.startswith("ingest.")


@pytest.mark.parametrize(
    ("charset", "name"), [("GB18030", "张^三丰"), ("ISO 2022 IR 58", "张^三"), ("ISO_IR 192", "欧阳^锋𠮷"), ("GBK", "王^五")]
)
def test_r36_chinese_names_arrive_in_any_charset(door: Ingest, charset: str, name: str) -> None:
    assert door.accept(scan_bytes(SpecificCharacterSet=charset, PatientName=name), SOURCE).scan.patient.patient_name == name


def test_hostile_strings_are_text(door: Ingest) -> None:
    scan = door.accept(scan_bytes(PatientName='<script>alert("1")</script>', PatientID="../../../x\x07\n=cmd|'/c calc'"), SOURCE).scan
    assert scan.patient.patient_name == '<script>alert("1")</script>'
    assert "\n" not in scan.patient.patient_id


@pytest.mark.parametrize(
    ("changes", "view"),
    [
        ({"ViewPosition": "ll"}, "LL"),
        ({"ViewPosition": None, "PatientOrientation": ["A", "F"]}, "LATERAL"),
        ({"ViewPosition": None, "PatientOrientation": ["L", "F"]}, ""),
        ({"ViewPosition": None, "SeriesDescription": "W Chest Lat."}, "LATERAL"),
        ({"ViewPosition": None, "SeriesDescription": "胸部侧位"}, "LATERAL"),
        ({"ViewPosition": None, "SeriesDescription": "CHEST_LAT"}, "LATERAL"),
        ({"ViewPosition": None, "SeriesDescription": "Chest LLAT"}, "LL"),
        ({"ViewPosition": None, "StudyDescription": "CHEST 2VIEWS LAT_L"}, "LATERAL"),
        ({"ViewPosition": None, "SeriesDescription": "Thorax seitl."}, "LATERAL"),
        ({"ViewPosition": None, "SeriesDescription": "Latvia"}, ""),
        ({"ViewPosition": None}, ""),
    ],
)
def test_view(door: Ingest, changes: dict[str, Any], view: str) -> None:
    assert door.accept(scan_bytes(**changes), SOURCE).scan.view_position == view


@pytest.mark.parametrize(
    ("description", "parts"), [("手腕", "HAND WRIST"), ("Hand li.", "HAND"), ("CHEST+ABD 2V, abdomen", "ABDOMEN CHEST"), ("routine", "")]
)
def test_a_description_may_name_several_body_parts(description: str, parts: str) -> None:
    scan = module.describe(dataset(BodyPartExamined=None, SeriesDescription=description, StudyDescription=None, ProtocolName=None))
    assert scan.body_part_examined == parts
    assert (Note("assume.body_part_described", parts) in scan.notes) == bool(parts)


def test_view_and_region_codes() -> None:
    made = dataset(ViewPosition=None, BodyPartExamined=None)
    made.ViewCodeSequence = [_coded("postero-anterior")]
    made.AnatomicRegionSequence = [_coded("Chest")]
    scan = module.describe(made)
    assert (scan.view_position, scan.body_part_examined) == ("PA", "CHEST")


def _coded(meaning: str) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeMeaning = meaning
    return item


def test_the_same_scan_with_another_meta_group_is_the_same(door: Ingest) -> None:
    made = dataset()
    first = door.accept(encode(made), SOURCE)
    made.file_meta.ImplementationVersionName = "ELSEWHERE"
    made.file_meta.PrivateInformationCreatorUID = "1.2.3"
    made.file_meta.PrivateInformation = b"1234"
    again = door.accept(encode(made), SOURCE)
    assert again.stored.outcome == "duplicate"
    assert again.stored.instance_id == first.stored.instance_id


def test_same_uid_other_content_is_a_conflict(door: Ingest) -> None:
    uid = generate_uid()
    door.accept(scan_bytes(SOPInstanceUID=uid), SOURCE)
    assert door.accept(scan_bytes(SOPInstanceUID=uid, PatientID="P-2"), SOURCE).stored.outcome == "conflict"


def test_digest_depends_on_transfer_syntax() -> None:
    data = scan_bytes()
    one = module.describe(dataset())
    assert content_digest(data, one) != content_digest(data, replace(one, transfer_syntax_uid="1.3"))
    assert content_digest(data, one) != content_digest(data, replace(one, sop_instance_uid="1.3"))


def test_a_store_that_fails_acknowledges_nothing(settings: Settings) -> None:
    full = Store(settings.model_copy(update={"disk_reserve_bytes": 1 << 60}))
    with pytest.raises(StoreError, match="disk_full"):
        Ingest(full).accept(scan_bytes(), SOURCE)
    assert Worklist(full).rejections()[0]["code"] == "ingest.disk_full"


def test_a_refusal_that_cannot_be_recorded_is_still_a_refusal(door: Ingest, store: Store) -> None:
    store.database.connection().execute("DROP TABLE rejections")
    assert refused(door, b"junk") == "ingest.not_dicom"


# -- pictures ------------------------------------------------------------------------------------------------------------


def picture(kind: str = "PNG", mode: str = "L", size: tuple[int, int] = (60, 80), **save: Any) -> bytes:
    """A grey ramp as an encoded picture."""
    values = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    image = Image.fromarray(values)
    image = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


def huge_picture() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + picture()[24:29]
    return picture()[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture()[33:]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "L"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("PNG", "I;16"),
        ("JPEG", "L"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
    ],
)
def test_pictures_become_secondary_captures(door: Ingest, store: Store, kind: str, mode: str) -> None:
    form = PictureForm("ID1", "李^四", "M", "034Y", "PA", photographed=True)
    accepted = door.accept_picture(picture(kind, mode), form, SOURCE)
    scan = accepted.scan
    assert (scan.modality, scan.view_position, scan.patient_age_years, scan.body_part_examined) == ("RG", "PA", 34.0, "CHEST")
    assert scan.patient.patient_name == "李^四"
    assert [note.code for note in scan.notes] == ["caution.view_from_form", "caution.photograph"]
    assert (scan.rows, scan.columns) == (80, 60)
    again = door.accept_picture(picture(kind, mode), form, SOURCE)
    assert again.stored.outcome == "duplicate"
    other = door.accept_picture(picture(kind, mode), PictureForm("ID2"), SOURCE)
    assert other.stored.study_id != accepted.stored.study_id
    assert store.read_instance(accepted.stored.instance_id)[128:132] == b"DICM"


def test_a_picture_is_upright_as_its_exif_says(door: Ingest) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    scan = door.accept_picture(picture("JPEG", exif=exif), PictureForm(), SOURCE).scan
    assert (scan.rows, scan.columns) == (60, 80)


def test_a_lateral_picture_is_lateral(door: Ingest) -> None:
    assert door.accept_picture(picture(), PictureForm(view="LL"), SOURCE).scan.view_position == "LL"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (picture()[:-40], "ingest.unsupported_image"),
        (b"\x89PNG\r\n\x1a\njunk", "ingest.unsupported_image"),
        (picture("JPEG")[:200], "ingest.unsupported_image"),
        (huge_picture(), "ingest.absurd_dimensions"),
    ],
)
def test_bad_pictures_are_refused(door: Ingest, store: Store, data: bytes, code: str) -> None:
    with pytest.raises(IngestError) as caught:
        door.accept_picture(data, PictureForm(), SOURCE)
    assert caught.value.code == code
    assert Worklist(store).rejections()[0]["code"] == code
    assert "Error" not in caught.value.detail  # words, not the name of a class


def test_a_picture_whose_copy_broke_off_is_called_cut_short(door: Ingest) -> None:
    with pytest.raises(IngestError) as caught:
        door.accept_picture(picture()[:-40], PictureForm(), SOURCE)
    assert caught.value.detail == "cut short"


# -- archives and folders --------------------------------------------------------------------------------------------------


def outcomes(door: Ingest, settings: Settings, path: Path) -> list[Outcome]:
    """What becomes of one file."""
    return list(accept_file(door, settings, path, path.name, SOURCE))


def test_an_archive_gives_one_outcome_per_entry(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/", b"")
        archive.writestr("folder/one.dcm", scan_bytes())
        archive.writestr("picture.png", picture())
        archive.writestr("../evil.dcm", scan_bytes())
        archive.writestr("/etc/evil.dcm", scan_bytes())
        archive.writestr("C:\\evil.dcm", scan_bytes())
        archive.writestr("DICOMDIR", b"x")
        archive.writestr("readme.txt", b"x")
        archive.writestr("broken.dcm", scan_bytes()[:-100])
        archive.writestr("inner.zip", b"PK\x03\x04....")
        archive.writestr("胸片.dcm", scan_bytes())
    got = {outcome.name.partition("!/")[2]: outcome.code for outcome in outcomes(door, settings, path)}
    assert got == {
        "folder/one.dcm": "", "picture.png": "", "../evil.dcm": "ingest.archive_unsafe", "/etc/evil.dcm": "ingest.archive_unsafe",
        "C:\\evil.dcm": "ingest.archive_unsafe", "DICOMDIR": "ingest.skipped", "readme.txt": "ingest.skipped",
        "broken.dcm": "ingest.truncated", "inner.zip": "ingest.nested_archive", "胸片.dcm": "",
    }  # fmt: skip
    assert not list(tmp_path.rglob("evil.dcm"))


def test_gbk_entry_names_are_readable(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("XXXX.dcm", scan_bytes())
    path.write_bytes(path.read_bytes().replace(b"XXXX.dcm", "胸片".encode("gbk") + b".dcm"))
    assert outcomes(door, settings, path)[0].name == "a.zip!/胸片.dcm"


def test_a_zip_bomb_stops_at_the_cap(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    tight = settings.model_copy(update={"max_archive_bytes": 3 << 20, "max_upload_bytes": 2 << 20})
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.dcm", bytes(50 << 20))
        for number in range(5):
            archive.writestr(f"{number}.dcm", bytes(1 << 20))
    got = [outcome.code for outcome in outcomes(door, tight, path)]
    # what was unpacked of the entry that is too large is charged as well
    assert got == ["ingest.too_large", "ingest.not_dicom", *["ingest.archive_bomb"] * 4]


def test_too_many_entries(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(11):
            archive.writestr(f"{number}.txt", b"")
    got = outcomes(door, settings.model_copy(update={"max_archive_files": 10}), path)
    assert [outcome.code for outcome in got] == ["ingest.too_many_files"]


def test_encrypted_damaged_and_empty_archives(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one.dcm", scan_bytes())
    whole = path.read_bytes()
    encrypted = bytearray(whole)
    encrypted[6] |= 1
    encrypted[whole.rindex(b"PK\x01\x02") + 8] |= 1
    damaged = bytearray(whole)
    damaged[200] ^= 0xFF
    for data, code in (
        (encrypted, "ingest.archive_encrypted"),
        (damaged, "ingest.archive_corrupt"),
        (whole[:200], "ingest.archive_corrupt"),
    ):
        path.write_bytes(data)
        assert [outcome.code for outcome in outcomes(door, settings, path)] == [code]
    with zipfile.ZipFile(path, "w"):
        pass
    assert [outcome.code for outcome in outcomes(door, settings, path)] == ["ingest.skipped"]


def test_files_that_cannot_be_read_are_said(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    assert outcomes(door, settings, tmp_path / "absent")[0].code == "ingest.unreadable"
    big = tmp_path / "big.dcm"
    big.write_bytes(bytes(2000))
    assert outcomes(door, settings.model_copy(update={"max_upload_bytes": 1000}), big)[0].code == "ingest.too_large"


def test_folders_are_walked_in_order_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.dcm").write_bytes(b"")
    (tmp_path / "a.dcm").write_bytes(b"")
    (tmp_path / "link").symlink_to("/etc/hostname")
    assert [(path.name, code) for path, code in files_below(tmp_path)] == [("a.dcm", ""), ("2.dcm", ""), ("link", "ingest.skipped")]
    assert files_below(tmp_path / "a.dcm") == [(tmp_path / "a.dcm", "")]
