"""What people bring, at its worst: names in GBK, pipes, links, huge directories, bombs, files whose names say too little."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from appliance.core.domain import Source
from appliance.core.settings import Settings
from appliance.ingest import archive as module
from appliance.ingest.archive import Outcome, accept_below, accept_file, shown_name
from appliance.ingest.ingest import Ingest
from appliance.store.store import Store
from tests.support.scans import scan_bytes

SOURCE = Source("cli", "test")


@pytest.fixture
def door(store: Store) -> Ingest:
    """The door of a fresh box."""
    return Ingest(store)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder beside the box's."""
    path = tmp_path / "in"
    path.mkdir()
    return path


def below(door: Ingest, settings: Settings, path: Path) -> dict[str, str]:
    """Code of each outcome by the file's bare name."""
    return {outcome.name.rpartition("/")[2]: outcome.code for outcome in accept_below(door, settings, path, SOURCE)}


def refusals(store: Store) -> list[tuple[str, str]]:
    """Name and code of every refusal on record."""
    return [(row["name"], row["code"]) for row in store.database.query("SELECT name, code FROM rejections ORDER BY id")]


def zipped(path: Path, *entries: tuple[str, bytes]) -> Path:
    """An archive of these entries."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def test_names_in_gbk_are_readable_and_harmless(door: Ingest, settings: Settings, store: Store, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "stick")
    os.mkdir(folder)
    for name, data in ((b"\xd5\xc5.dcm", scan_bytes()), (b"\xc0\xee.dcm", b"junk"), ("王.dcm".encode(), scan_bytes())):
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    assert below(door, settings, tmp_path / "stick") == {"张.dcm": "", "李.dcm": "ingest.not_dicom", "王.dcm": ""}
    assert refusals(store) == [(str(tmp_path / "stick" / "李.dcm"), "ingest.not_dicom")]
    shown_name("x\ud800.dcm").encode()


def test_utf8_names_of_an_archive_without_the_flag(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("XXXXXX.dcm", scan_bytes()))
    path.write_bytes(path.read_bytes().replace(b"XXXXXX.dcm", "胸片.dcm".encode()))
    assert below(door, settings, path) == {"胸片.dcm": ""}


def test_pipes_devices_links_and_closed_folders_are_said(
    door: Ingest, settings: Settings, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    (folder / "closed").mkdir(parents=True)
    (folder / "open").mkdir()
    (folder / "open" / "1.dcm").write_bytes(scan_bytes())
    os.mkfifo(folder / "pipe")
    (folder / "link.dcm").symlink_to(folder / "open" / "1.dcm")
    (folder / "circle").symlink_to(folder)
    scandir = os.scandir

    def locked(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(module.os, "scandir", locked)  # the tests may run as root, whom nothing is closed to
    assert below(door, settings, folder) == {
        "circle": "ingest.skipped", "closed": "ingest.unreadable", "link.dcm": "ingest.skipped", "1.dcm": "", "pipe": "ingest.skipped",
    }  # fmt: skip
    assert below(door, settings, Path("/dev/zero")) == {"zero": "ingest.skipped"}
    assert [code for _, code in refusals(store)] == ["ingest.unreadable"]


def test_a_file_too_big_for_memory_costs_only_itself(
    door: Ingest, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1.dcm", "2.dcm"):
        (tmp_path / name).write_bytes(scan_bytes())

    class Huge(io.FileIO):
        def read(self, size: int | None = -1, /) -> Any:
            if size == -1:
                raise MemoryError
            return super().read(size)

    monkeypatch.setattr(module, "open", lambda path, mode: (Huge if path.name == "1.dcm" else open)(path, mode), raising=False)
    got = [outcome for name in ("1.dcm", "2.dcm") for outcome in accept_file(door, settings, tmp_path / name, name, SOURCE)]
    assert [outcome.code for outcome in got] == ["ingest.too_large", ""]


@pytest.mark.parametrize("name", ["version", "LOCKFILE", ".x.dcm", "scan.txt", "dicomdir"])
def test_a_scan_is_a_scan_whatever_its_name(door: Ingest, settings: Settings, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(scan_bytes())
    assert below(door, settings, tmp_path / name) == {name: ""}
    (tmp_path / name).write_bytes(b"words")
    assert below(door, settings, tmp_path / name) == {name: "ingest.skipped"}


def test_a_real_dicomdir_is_skipped(door: Ingest, settings: Settings, folder: Path) -> None:
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x02\x00UI\x14\x001.2.840.10008.1.3.10")
    assert below(door, settings, folder) == {"DICOMDIR": "ingest.skipped"}


def test_after_a_bomb_every_entry_is_answered_and_recorded(door: Ingest, settings: Settings, store: Store, tmp_path: Path) -> None:
    tight = settings.model_copy(update={"max_archive_bytes": 2 << 20})
    path = zipped(tmp_path / "bomb.zip", ("1.dcm", scan_bytes()), ("2.dcm", bytes(9 << 20)), ("3.dcm", scan_bytes()), ("4.dcm", b"x"))
    bombs = dict.fromkeys(("2.dcm", "3.dcm", "4.dcm"), "ingest.archive_bomb")
    assert below(door, tight, path) == {"1.dcm": "", **bombs}
    assert refusals(store) == [(f"{path}!/{name}", code) for name, code in bombs.items()]


def test_refusals_of_archives_are_recorded(door: Ingest, settings: Settings, store: Store, folder: Path) -> None:
    (folder / "a.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    zipped(folder / "b.zip", ("../evil.dcm", b"x"), ("/", b""))
    zipped(folder / "c.zip", *((f"{number}.dcm", b"") for number in range(4)))
    below(door, settings.model_copy(update={"max_archive_files": 3}), folder)
    assert [code for _, code in refusals(store)] == ["ingest.archive_corrupt", "ingest.archive_unsafe", "ingest.too_many_files"]


def test_an_entry_without_a_name_is_no_crash(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    assert [outcome.code for outcome in _all(door, settings, zipped(tmp_path / "a.zip", (".", b"x")))] == ["ingest.not_dicom"]


def _all(door: Ingest, settings: Settings, path: Path) -> list[Outcome]:
    return list(accept_file(door, settings, path, path.name, SOURCE))


@pytest.mark.parametrize("field", ["count", "length", "count64"])
def test_a_huge_directory_is_refused_before_it_is_read(
    door: Ingest, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    path = zipped(tmp_path / "a.zip", ("1.dcm", b"x"))
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    if field == "count64":
        data[end:end] = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 46, 0)
        data[end + 56 : end + 56] = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    else:
        struct.pack_into(
            "<H" if field == "count" else "<L", data, end + (10 if field == "count" else 12), 0xFFF0 if field == "count" else 2**31
        )
    path.write_bytes(data)

    def parsed(*_: object) -> None:
        raise AssertionError("the directory was read")

    monkeypatch.setattr(module.zipfile, "ZipFile", parsed)
    assert [outcome.code for outcome in _all(door, settings, path)] == ["ingest.too_many_files"]


def test_a_picture_too_long_for_dicom(door: Ingest, settings: Settings, folder: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (70_000, 3)).save(buffer, "PNG")
    (folder / "a.png").write_bytes(buffer.getvalue())
    assert below(door, settings, folder) == {"a.png": "ingest.absurd_dimensions"}


def test_a_picture_with_damaged_exif_costs_only_itself(door: Ingest, settings: Settings, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("L", (60, 80), 90).save(buffer, "JPEG", exif=exif)
    whole = buffer.getvalue()
    at = whole.index(b"Exif\0\0")
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.dcm", scan_bytes())
        for cut in range(6, 30):  # the offset, the count, the tag, the type, the value: each damaged in turn
            archive.writestr(f"{cut}.jpg", whole[: at + cut] + b"\xff\xff" + whole[at + cut + 2 :])
        archive.writestr("2.dcm", scan_bytes())
    got = [outcome.code for outcome in accept_file(door, settings, path, "a.zip", SOURCE)]
    assert len(got) == 26
    assert (got[0], got[-1]) == ("", "")
    assert set(got[1:-1]) <= {"", "ingest.unsupported_image"}
