"""An archive costs no more than its budget, whichever way its entries fail."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from appliance.core.domain import Source
from appliance.core.settings import Settings
from appliance.ingest.archive import accept_file
from appliance.ingest.ingest import Ingest
from appliance.store.store import Store
from tests.support.scans import scan_bytes

MIB = 1 << 20


def made(tmp_path: Path, entries: list[bytes]) -> Path:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, data in enumerate(entries):
            archive.writestr(f"{number}.dcm", data)
    path = tmp_path / "all.zip"
    path.write_bytes(buffer.getvalue())
    return path


def codes(settings: Settings, path: Path) -> list[str]:
    store = Store(settings)
    try:
        return [item.code or "stored" for item in accept_file(Ingest(store), settings, path, path.name, Source("cli", "test"))]
    finally:
        store.close()


@pytest.fixture
def small(settings: Settings) -> Settings:
    """One MiB for an entry, four for all."""
    return settings.model_copy(update={"max_upload_bytes": MIB, "max_archive_bytes": 4 * MIB})


def test_entries_too_large_by_themselves_are_charged(small: Settings, tmp_path: Path) -> None:
    told = codes(small, made(tmp_path, [b"x" * (2 * MIB)] * 6 + [scan_bytes()]))
    assert told == ["ingest.too_large"] * 3 + ["ingest.archive_bomb"] * 4


def test_entries_with_a_wrong_checksum_are_charged(small: Settings, tmp_path: Path) -> None:
    path = made(tmp_path, [b"x" * (MIB - 1)] * 6 + [scan_bytes()])
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        damaged = {info.CRC.to_bytes(4, "little") for info in archive.infolist()[:6]}
    for checksum in damaged:
        raw[:] = raw.replace(checksum, bytes(byte ^ 0xFF for byte in checksum))
    path.write_bytes(raw)
    told = codes(small, path)
    assert told[:4] == ["ingest.archive_corrupt"] * 4
    assert set(told[5:]) == {"ingest.archive_bomb"}


def test_an_archive_within_its_budget_is_taken_whole(small: Settings, tmp_path: Path) -> None:
    assert codes(small, made(tmp_path, [scan_bytes() for _ in range(5)])) == ["stored"] * 5
