"""Files that are encrypted while they grow: read back at any place, whatever was cut off; nothing plain, nothing exchanged."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.store import plain_files
from appliance.store.encrypted_stream import (
    RECORD_BYTES,
    EncryptedSpool,
    EncryptedStream,
    decrypt_document,
    derive_key,
    encrypt_document,
)

KEY = bytes(range(32))


def opened(path: Path, context: str = "a", key: bytes = KEY) -> EncryptedStream:
    path.touch()
    return EncryptedStream(open(path, "r+b", buffering=0), key, context)


def content(path: Path, context: str = "a") -> bytes:
    with io.BufferedReader(opened(path, context)) as stream:
        return stream.read()


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(0, 600), st.binary(min_size=1, max_size=50))
def test_a_file_cut_off_anywhere_holds_a_prefix_and_can_be_continued(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], cut: int, more: bytes
) -> None:
    path = tmp_path_factory.mktemp("stream") / "file"
    with opened(path) as stream:
        for chunk in chunks:
            stream.append(chunk)
    os.truncate(path, min(cut, path.stat().st_size))
    left = content(path)
    assert b"".join(chunks).startswith(left)
    with opened(path) as stream:
        assert stream.length == len(left)
        stream.append(more)
    assert content(path) == left + more


@given(st.lists(st.tuples(st.integers(0, 700_000), st.integers(0, 300_000)), max_size=6))
def test_it_is_read_at_any_place(tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("spool")
    data = os.urandom(RECORD_BYTES * 2 + 77)
    with EncryptedSpool(folder) as spool, io.BufferedReader(spool) as stream:
        for start in range(0, len(data), 100_000):
            spool.write(data[start : start + 100_000])
        assert stream.seek(0, io.SEEK_END) == len(data)
        for start, count in places:
            stream.seek(start)
            assert stream.read(count) == data[start : start + count]


@pytest.mark.parametrize("place", [4, 8, 20, 60, -1])
def test_every_changed_byte_is_found(tmp_path: Path, place: int) -> None:
    path = tmp_path / "file"
    with opened(path) as stream:
        stream.append(b"x" * 100)
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with opened(path) as stream:
        if stream.length:  # a changed length makes a record that is not complete
            with pytest.raises(OSError, match="changed"):
                stream.read()


def test_records_cannot_be_exchanged_and_other_files_keys_do_not_open_them(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with opened(path) as stream:
        stream.append(b"one")
        first = stream.end
        stream.append(b"two")
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + raw[first:] + raw[4:first])
    with pytest.raises(OSError, match="changed"):
        content(path)
    path.write_bytes(raw)
    for context, key in (("b", KEY), ("a", derive_key(KEY, "other"))):
        with opened(path, context, key) as stream, pytest.raises(OSError, match="changed"):
            stream.read()


def test_a_disk_that_is_full_keeps_the_records_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, written = tmp_path / "file", os.pwrite
    with opened(path) as stream:
        stream.append(b"kept")

        def half(descriptor: int, data: bytes, place: int) -> int:
            written(descriptor, bytes(data)[:10], place)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", half)
        with pytest.raises(OSError, match="No space"):
            stream.append(b"lost")
        monkeypatch.undo()
        stream.append(b" and more")
    assert content(path) == b"kept and more"


def test_nothing_of_a_spool_is_plain_or_has_a_name(tmp_path: Path) -> None:
    with EncryptedSpool(tmp_path) as spool:
        spool.write(b"CANARY" * 100_000)
        spool.seek(0)
        assert list(tmp_path.iterdir()) == []
        raw = os.pread(spool._stream.fileno(), 1 << 20, 0)
        assert (len(raw) > 600_000, b"CANARY" in raw) == (True, False)


def test_a_small_file_belongs_to_its_name_and_key() -> None:
    sealed = encrypt_document(KEY, "a.json", b"CANARY")
    assert decrypt_document(KEY, "a.json", sealed) == b"CANARY"
    assert b"CANARY" not in sealed
    for key, name, data in ((KEY, "b.json", sealed), (derive_key(KEY, "x"), "a.json", sealed), (KEY, "a.json", b'{"plain": 1}')):
        with pytest.raises(ValueError, match="encrypted"):
            decrypt_document(key, name, data)


@pytest.mark.parametrize("at", ["before the renaming", "after it"])
def test_a_plain_file_is_replaced_and_its_bytes_are_overwritten(tmp_path: Path, at: str) -> None:
    path, fresh = tmp_path / "file", tmp_path / "fresh"
    path.write_bytes(b"CANARY" * 1000)
    fresh.write_bytes(b"encrypted")
    old = path.with_name(f"file{plain_files.SUFFIX}")
    with open(path, "rb") as held:
        os.link(path, old)  # a crash here
        if at == "after it":
            fresh.replace(path)  # or here
        plain_files.finish(path)
        if at == "before the renaming":
            assert path.read_bytes() == b"CANARY" * 1000
            plain_files.replace(path, fresh)
        assert (path.read_bytes(), b"CANARY" in held.read(), [item.name for item in tmp_path.iterdir()]) == (b"encrypted", False, ["file"])
