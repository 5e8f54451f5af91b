"""Scans come in by browser: resumed after a broken line, refused with a reason, never lost once acknowledged."""

from __future__ import annotations

import base64
import gc
import json
import os
import re
import resource
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.store.keys import DATABASE_KEY
from appliance.store.store import Store
from tests.support.scans import scan_bytes
from tests.support.web_box import TUS, Box, Person, begin, in_process, metadata, outcome, send, served, upload, wait_for
from webui.upload import finaliser, upload_store
from webui.upload.service import UploadService, display_name, parse_form
from webui.upload.upload_store import UploadStore

FORM = {
    "patient_name": "王小东",
    "patient_id": "P-7",
    "patient_sex": "M",
    "age": "4",
    "age_unit": "years",
    "view": "PA",
    "photographed": "1",
}


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


@pytest.fixture
def person(box: Box) -> Person:
    return box.person()


def picture(seed: int = 1, kind: str = "PNG") -> bytes:
    """A small noisy picture."""
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def archive(**files: bytes) -> bytes:
    """A ZIP of files; ``__`` in a name is a slash."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, data in files.items():
            made.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def incoming(box: Box) -> list[str]:
    return sorted(path.suffix for path in (box.settings.data_dir / "incoming" / "uploads").iterdir())


def test_a_scan_comes_in_and_its_outcome_leads_to_it(box: Box, person: Person) -> None:
    [stored] = upload(person, "胸片/片 1.dcm", scan_bytes())
    assert stored["result"] == "stored"
    assert stored["name"] == "胸片/片 1.dcm"
    assert person.get(stored["url"]).status_code == 200
    assert incoming(box) == [".json", ".outcome"]


def test_the_same_scan_again_is_one_scan(box: Box, person: Person) -> None:
    data = scan_bytes()
    first, again = upload(person, "a.dcm", data)[0], upload(person, "b.dcm", data)[0]
    assert (first["result"], again["result"], again["word"]) == ("stored", "duplicate", "Already on this box")
    assert first["instance_id"] == again["instance_id"]


def test_other_content_under_the_same_uid_is_kept_and_flagged(box: Box, person: Person) -> None:
    upload(person, "a.dcm", scan_bytes(SOPInstanceUID="1.2.3"))
    [conflict] = upload(person, "b.dcm", scan_bytes(SOPInstanceUID="1.2.3"))
    assert conflict["result"] == "conflict"
    assert "other content" in conflict["reason"]
    assert "Conflicting image" in person.get("/").text


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "ingest.empty"), (b"plain text", "ingest.not_dicom"), (scan_bytes()[:900], "ingest."), (scan_bytes(PixelData=None), "ingest."),
     (scan_bytes(StudyInstanceUID="../../etc"), "ingest.invalid_uid"), (b"\x89PNG\r\n\x1a\nnot one", "ingest.unsupported_image"),
     (b"PK\x03\x04 broken", "ingest.archive_corrupt"), (scan_bytes(Rows=65535, Columns=65535), "ingest.absurd_dimensions")],
)  # fmt: skip
def test_what_is_refused_says_why_and_what_to_do(person: Person, data: bytes, code: str) -> None:
    [refused] = upload(person, "x.dcm", data)
    assert refused["code"].startswith(code)
    assert refused["result"] == "refused"
    assert refused["word"] == "Refused"
    assert refused["reason"]
    assert refused["hint"]
    assert refused["url"] == ""
    assert re.search(r"[一-鿿]", outcome_in(person, "zh", data)["reason"])


def outcome_in(person: Person, language: str, data: bytes) -> dict[str, Any]:
    person.cookies.clear(domain="", path="/", name="lang")
    person.speak(language)
    return upload(person, "x.dcm", data)[0]


def test_every_entry_of_an_archive_has_its_outcome(person: Person) -> None:
    data = archive(good__1=scan_bytes(), good__2=scan_bytes(), DICOMDIR=b"x" * 200, bad=b"nothing", **{"..__evil": scan_bytes()})
    outcomes = {item["name"]: item["code"] or item["result"] for item in upload(person, "all.zip", data)}
    assert outcomes == {
        "all.zip!/good/1": "stored", "all.zip!/good/2": "stored", "all.zip!/DICOMDIR": "ingest.skipped", "all.zip!/bad": "ingest.not_dicom",
        "all.zip!/../evil": "ingest.archive_unsafe",
    }  # fmt: skip


def test_an_upload_goes_on_where_the_line_broke(box: Box, person: Person) -> None:
    data = scan_bytes()
    created = begin(person, "a.dcm", len(data))
    assert (created.status_code, created.headers["Tus-Resumable"]) == (201, "1.0.0")
    path = created.headers["Location"]
    assert send(person, path, data[:1000]).headers["Upload-Offset"] == "1000"
    assert person.get(f"{path}/outcome").status_code == 409
    head = person.head(path, headers=TUS)
    assert (head.headers["Upload-Offset"], head.headers["Upload-Length"]) == ("1000", str(len(data)))
    assert "Upload-Expires" in head.headers
    assert send(person, path, data[:1000], offset=0).status_code == 409
    assert "a.dcm" in person.open("/upload")
    assert send(person, path, data[1000:], offset=1000).status_code == 204
    assert outcome(person, path)[0]["result"] == "stored"
    assert "a.dcm" not in person.open("/upload")


def test_what_came_before_the_line_broke_is_kept(box: Box, person: Person) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    cookie = "; ".join(f"{name}={value}" for name, value in person.cookies.get_dict().items())
    head = (
        f"PATCH {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\nX-CSRFToken: {person.token}\r\nTus-Resumable: 1.0.0\r\n"
        f"Upload-Offset: 0\r\nContent-Type: application/offset+octet-stream\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(box.base.rsplit(":", 1)[1]))) as line:
        line.sendall(head.encode() + data[:3000])
        time.sleep(0.2)
    wait_for(lambda: person.head(path, headers=TUS).headers["Upload-Offset"] == "3000")
    wait_for(lambda: send(person, path, data[3000:], offset=3000).status_code == 204)
    assert outcome(person, path)[0]["result"] == "stored"


def test_the_outcome_may_be_asked_for_again(box: Box, person: Person) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data), headers={"Content-Type": "application/offset+octet-stream"}, data=data).headers["Location"]
    first = outcome(person, path)
    assert first == outcome(person, path)
    assert first[0]["result"] == "stored"
    assert person.head(path, headers=TUS).headers["Upload-Offset"] == str(len(data))
    assert send(person, path, b"", offset=len(data)).status_code == 204
    assert first == outcome(person, path)


def test_the_end_of_a_batch_queues_it_at_once(box: Box, person: Person) -> None:
    box.activate()
    paths = []
    for _ in range(3):
        data = scan_bytes()
        paths.append(
            begin(person, "a.dcm", len(data), headers={"Content-Type": "application/offset+octet-stream"}, data=data).headers["Location"]
        )
        outcome(person, paths[-1])
    assert box.store.queue.pending_jobs() == 3
    assert not box.store.database.query("SELECT 1 FROM jobs")
    ids = [path.rsplit("/", 1)[1] for path in paths]
    assert person.post("/api/v1/uploads/close", json={"uploads": [*ids, "nonsense", 7, "0" * 32]}).status_code == 204
    assert len(box.store.database.query("SELECT 1 FROM jobs WHERE state = 'queued'")) == 3
    assert person.post("/api/v1/uploads/close", json={"uploads": "x"}).status_code == 400
    assert person.post("/api/v1/uploads/close", data=b"no json").status_code == 400


def test_tus_says_what_it_can_do(person: Person) -> None:
    answer = person.options("/api/v1/tus")
    assert answer.status_code == 204
    assert answer.headers["Tus-Version"] == "1.0.0"
    assert set(answer.headers["Tus-Extension"].split(",")) == {"creation", "creation-with-upload", "expiration", "termination"}
    assert int(answer.headers["Tus-Max-Size"]) == 2 * 2**30


def test_tus_refuses_what_is_not_tus(person: Person) -> None:
    assert person.post("/api/v1/tus", headers={"Upload-Length": "1"}).status_code == 412
    for headers in (
        {},
        {"Upload-Length": "-1"},
        {"Upload-Length": "x"},
        {"Upload-Length": "9" * 20},
        {"Upload-Length": "1", "Upload-Metadata": "filename @@"},
    ):
        assert person.post("/api/v1/tus", headers={**TUS, **headers}).status_code == 400
    path = begin(person, "a.dcm", 10).headers["Location"]
    assert person.patch(path, data=b"x", headers={**TUS, "Upload-Offset": "0", "Content-Type": "text/plain"}).status_code == 415
    for missing in ("0" * 32, "..", "x"):
        assert person.head(f"/api/v1/tus/{missing}", headers=TUS).status_code == 404


def test_an_upload_can_be_called_off_until_it_is_complete(box: Box, person: Person) -> None:
    path = begin(person, "a.dcm", 10).headers["Location"]
    assert person.delete(path, headers=TUS).status_code == 204
    assert person.head(path, headers=TUS).status_code == 404
    assert incoming(box) == []
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    send(person, path, data)
    assert outcome(person, path)[0]["result"] == "stored"
    assert person.delete(path, headers=TUS).status_code == 204


def test_an_upload_is_its_owners_alone(box: Box, person: Person) -> None:
    path = begin(person, "secret-name.dcm", 10).headers["Location"]
    other = box.person("other")
    assert other.head(path, headers=TUS).status_code == 404
    assert other.delete(path, headers=TUS).status_code == 404
    assert "secret-name" not in other.open("/upload")


def test_two_senders_of_one_upload_do_not_mix(box: Box, person: Person) -> None:
    path = begin(person, "a.dcm", 10).headers["Location"]
    held, go = threading.Event(), threading.Event()
    own = UploadStore(box.settings, box.store.keys.load(DATABASE_KEY), box.store.check_space)
    found = own.find(path.rsplit("/", 1)[1], box.accounts.find("doctor").id)  # type: ignore[union-attr]
    assert found

    def slow(_size: int) -> bytes:
        held.set()
        go.wait(10)
        return b""

    thread = threading.Thread(target=own.append, args=(found, 0, slow))
    thread.start()
    held.wait(10)
    assert send(person, path, b"12345").status_code == 423
    assert person.delete(path, headers=TUS).status_code == 423
    go.set()
    thread.join()
    assert send(person, path, b"12345").status_code == 204


def test_r20_caps_on_size_and_number(settings: Settings) -> None:
    small = settings.model_copy(update={"max_upload_bytes": 1000, "max_archive_bytes": 5000, "max_archive_files": 2})
    with in_process(small) as box:
        person = box.person()
        refused = begin(person, "a.dcm", 1001)
        assert (refused.status_code, refused.json()["code"]) == (413, "ingest.too_large")
        assert "larger than allowed" in refused.json()["title"]
        assert begin(person, "a.ZIP", 4000).status_code == 201
        assert begin(person, "b.zip", 5001).status_code == 413
        assert begin(person, "a.dcm", 1000).status_code == 201
        crowd = begin(person, "b.dcm", 10)
        assert (crowd.status_code, crowd.json()["code"]) == (413, "ingest.too_many_files")
        path = "/api/v1/uploads"
        assert person.post(path, files={"file": ("a.dcm", b"x" * 6000)}).status_code == 413
        assert person.post("/", data={"q": "x" * 100_000}).status_code == 413
        refused = person.get("/rejected").text
        assert refused.count('data-code="ingest.too_large"') == 3
        assert refused.count('data-code="ingest.too_many_files"') == 1


def test_disk_full_is_said_and_leaves_nothing_half_written(box: Box, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    send(person, path, data[:100])

    monkeypatch.setattr(UploadStore, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    answer = begin(person, "b.dcm", len(data))
    assert (answer.status_code, answer.json()["code"]) == (507, "ingest.disk_full")
    assert "nothing stored was deleted" in answer.json()["title"]
    monkeypatch.undo()
    assert incoming(box) == [".data", ".json"]


@pytest.mark.parametrize("where", ["reserve", "write", "fsync"])
def test_a_disk_that_fills_up_midway_keeps_what_came_and_the_upload_goes_on_when_there_is_room(
    box: Box, person: Person, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    send(person, path, data[:100])

    def full(*_: object) -> None:
        if where == "reserve":
            raise StoreError("ingest.disk_full")
        raise OSError(28, "No space left on device")

    own = box_parts(box)
    if where == "reserve":
        monkeypatch.setattr(own, "_check_space", full)
    else:
        monkeypatch.setattr(os, "pwrite" if where == "write" else "fsync", full)
    answer = send(person, path, data[100:], offset=100)
    assert (answer.status_code, answer.json()["code"]) == (507, "ingest.disk_full")
    monkeypatch.undo()
    assert person.head(path, headers=TUS).headers["Upload-Offset"] == "100"
    assert send(person, path, data[100:], offset=100).status_code == 204
    assert outcome(person, path)[0]["result"] == "stored"


def box_parts(box: Box) -> UploadStore:
    """The very object that serves this box's uploads."""
    return next(item for item in gc.get_objects() if isinstance(item, UploadStore) and item.directory.is_relative_to(box.settings.data_dir))


def test_a_full_disk_on_a_real_file_system_keeps_what_fits(box: Box, person: Person) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        own = UploadStore(box.settings, box.store.keys.load(DATABASE_KEY), box.store.check_space)
        found = own.find(path.rsplit("/", 1)[1], box.accounts.find("doctor").id)  # type: ignore[union-attr]
        assert found
        for _ in range(2):
            with pytest.raises(StoreError, match=r"disk_full"):
                own.append(found, own.offset(found), BytesIO(data[own.offset(found) :]).read)
            assert own.offset(found) <= 4096
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    offset = int(person.head(path, headers=TUS).headers["Upload-Offset"])
    assert send(person, path, data[offset:], offset=offset).status_code == 204
    assert outcome(person, path)[0]["result"] == "stored"


def test_the_reserve_of_the_disk_is_kept(settings: Settings) -> None:
    with in_process(settings.model_copy(update={"disk_reserve_bytes": 2**60})) as box:
        person = box.person()
        answer = begin(person, "a.dcm", 10)
        assert (answer.status_code, answer.json()["code"]) == (507, "ingest.disk_full")
        assert "The disk is nearly full" in person.get("/health").text
        single = person.post("/api/v1/uploads", files={"file": ("a.dcm", b"x" * 6000)})
        assert (single.status_code, single.json()["code"]) == (507, "ingest.disk_full")
        assert person.get("/rejected").text.count('data-code="ingest.disk_full"') == 2


def test_a_single_request_is_refused_before_a_byte_of_it_is_written(settings: Settings, tmp_path: Path) -> None:
    huge = 1 << 30
    with served(tmp_path / "box", disk_reserve_bytes=2**60) as (_, box):
        person = box.person()
        stranger = Person(box.base)
        stranger.open("/login")
        without = Person(box.base)
        without.cookies.update(person.cookies)
        for sender, status in ((stranger, 401), (without, 400), (person, 507)):
            assert _begin_multipart(box, sender, huge) == status
        assert list((box.settings.data_dir / "incoming" / "uploads").iterdir()) == []
        assert person.get("/rejected").text.count('data-code="ingest.disk_full"') == 1


def _begin_multipart(box: Box, sender: Person, length: int) -> int:
    """The status of an upload whose body is announced and begun, and never ends."""
    cookie = "; ".join(f"{name}={value}" for name, value in sender.cookies.get_dict().items())
    head = (
        f"POST /api/v1/uploads HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\nX-CSRFToken: {sender.token}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a.dcm"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", int(box.base.rsplit(":", 1)[1])), timeout=30) as line:
        line.sendall(head.encode() + b"x" * 100_000)
        return int(line.recv(4000).split()[1])


def test_waiters_for_outcomes_are_bounded_and_the_rest_answered_at_once(tmp_path: Path) -> None:
    with served(tmp_path / "box", web_threads=8) as (server, box):
        person = box.person()
        own = UploadStore(server.settings, box.store.keys.load(DATABASE_KEY), box.store.check_space)
        waiting = own.create(box.accounts.find("doctor").id, "doctor", "w.dcm", 3, None)  # type: ignore[union-attr]
        own.append(waiting, 0, BytesIO(b"abc").read)
        with own.lock(waiting):  # nobody can bring it in as long as this test holds it
            answers: list[int] = []

            def ask() -> None:
                asker = Person(box.base)
                asker.cookies.update(person.cookies)
                answers.append(asker.get(f"/api/v1/tus/{waiting.id}/outcome?wait=20").status_code)

            threads = [threading.Thread(target=ask) for _ in range(12)]
            for thread in threads:
                thread.start()
            wait_for(lambda: len(answers) >= 10)
            assert answers == [202] * len(answers)
            assert person.get("/").status_code == 200
        for thread in threads:
            thread.join()


def test_senders_are_bounded_and_the_next_is_told_to_come_again(box: Box, person: Person) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    shared = next(
        item
        for item in gc.get_objects()
        if isinstance(item, UploadService) and item.uploads.directory.is_relative_to(box.settings.data_dir)
    )
    taken = 0
    while shared.senders.acquire(blocking=False):
        taken += 1
    assert taken == box.settings.web_threads // 2
    refused = send(person, path, data)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "3")
    for _ in range(taken):
        shared.senders.release()
    assert send(person, path, data).status_code == 204


def test_a_list_of_many_abandoned_uploads_reads_each_once(settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    own = UploadStore(settings, store.keys.load(DATABASE_KEY), store.check_space)
    begun = [own.create(1, "a", f"{number}.dcm", 3, None) for number in range(200)]
    fresh, reads = UploadStore(settings, store.keys.load(DATABASE_KEY), store.check_space), []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or whole(path))  # type: ignore[func-returns-value]
    for _ in range(5):
        assert [item.id for item in fresh.unfinished(1)] == [item.id for item in begun]
    assert len(reads) == 200
    own.remove(begun[0])
    assert fresh.find(begun[0].id, 1) is None


def test_an_upload_that_is_finished_while_its_offset_is_asked_for_is_complete(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = UploadStore(settings, store.keys.load(DATABASE_KEY), store.check_space)
    begun = own.create(1, "a", "film.dcm", 3, None)

    def finished_first(path: Path, *args: Any, **kwargs: Any) -> Any:
        path.unlink()
        return open(path, *args, **kwargs)

    monkeypatch.setattr(upload_store, "open", finished_first, raising=False)
    assert own.offset(begun) == 3


def uploads_of(settings: Settings, store: Store) -> UploadStore:
    return UploadStore(settings, store.keys.load(DATABASE_KEY), store.check_space)


@pytest.mark.parametrize("head", [b"\0" * 300, b"CE", b"junk"])
def test_bytes_that_a_power_cut_left_are_not_taken_for_those_of_an_older_appliance(settings: Settings, store: Store, head: bytes) -> None:
    begun = uploads_of(settings, store).create(1, "a", "film.dcm", 600, None)
    (settings.data_dir / "incoming" / "uploads" / f"{begun.id}.data").write_bytes(head)
    again = uploads_of(settings, store)
    assert again.offset(begun) == 0
    assert again.append(begun, 0, BytesIO(b"x" * 600).read) == 600
    assert again.open(begun).read() == b"x" * 600


def test_an_upload_of_an_older_appliance_whose_encryption_was_cut_off_goes_on(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = uploads_of(settings, store)
    begun = own.create(1, "a", "film.dcm", 6, None)
    base = settings.data_dir / "incoming" / "uploads" / begun.id
    base.with_suffix(".json").write_text(json.dumps(vars(begun)))
    base.with_suffix(".data").write_bytes(b"pla")
    encrypt = UploadStore._encrypt_file

    def cut_off(store: UploadStore, path: Path) -> None:
        encrypt(store, path)
        raise OSError("cut off")

    monkeypatch.setattr(UploadStore, "_encrypt_file", cut_off)
    with pytest.raises(StoreError):
        uploads_of(settings, store)
    monkeypatch.undo()
    again = uploads_of(settings, store)
    assert again.find(begun.id, 1) == begun
    assert again.append(begun, 3, BytesIO(b"ins").read) == 6
    assert again.open(begun).read() == b"plains"


@pytest.mark.parametrize("damage", [b"", b"{}", b"CED1 changed"])
def test_a_damaged_outcome_stops_neither_the_start_nor_the_sweep(settings: Settings, damage: bytes) -> None:
    with in_process(settings) as box:
        person = box.person()
        data = scan_bytes()
        kept, gone = (begin(person, name, len(data)).headers["Location"] for name in ("kept.dcm", "gone.dcm"))
        for path in (kept, gone):
            send(person, path, data)
            assert outcome(person, path)[0]["result"] in ("stored", "duplicate")
    own = uploads_of(settings, box.store)
    directory = own.directory
    for path in (kept, gone):
        (directory / f"{path.rsplit('/', 1)[1]}.outcome").write_bytes(damage)
    upload_id = kept.rsplit("/", 1)[1]
    kept_upload = own.find(upload_id, box.accounts.find("doctor").id)  # type: ignore[union-attr]
    assert kept_upload
    (directory / f"{upload_id}.data").touch()
    stream = own._open(kept_upload, "r+b")
    stream.append(data)
    stream.close()
    with in_process(settings) as box:
        person = box.person()
        assert outcome(person, kept)[0]["result"] == "duplicate"
        answer = person.get(f"{gone}/outcome?wait=1")
        assert (answer.status_code, answer.json()["code"]) == (500, "store.outcome_damaged")
        box_parts(box).sweep()


def test_an_upload_whose_bytes_cannot_be_opened_for_a_moment_is_kept(box: Box, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    monkeypatch.setattr(UploadStore, "open", lambda *_: (_ for _ in ()).throw(StoreError("store.failed", "Too many open files")))
    send(person, path, data)
    for _ in range(finaliser._MAX_ATTEMPTS + 3):
        assert person.get(f"{path}/outcome?wait=2").status_code == 202
    monkeypatch.undo()
    assert outcome(person, path)[0]["result"] == "stored"


def test_an_offset_that_was_read_before_a_failed_flush_is_not_believed_afterwards(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = uploads_of(settings, store)
    begun = own.create(1, "a", "film.dcm", 6, None)

    def fail(_: int) -> None:
        assert own.offset(begun) == 6  # somebody asks while it is written
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(upload_store.os, "fsync", fail)
    with pytest.raises(StoreError):
        own.append(begun, 0, BytesIO(b"abcdef").read)
    monkeypatch.undo()
    assert own.offset(begun) == 0
    assert not own.is_complete(begun)


def test_the_upload_page_shows_the_newest_of_many_interrupted_uploads(box: Box, person: Person) -> None:
    for number in range(60):
        begin(person, f"film-{number}.dcm", 10)
    page = person.open("/upload")
    assert page.count("data-upload=") == 50
    assert "film-59.dcm" in page
    assert "and 10 more" in page


@pytest.mark.parametrize("form", ["{", "[" * 100_000, "\x00", "7"])
def test_odd_metadata_is_the_senders_fault(person: Person, form: str) -> None:
    headers = {**TUS, "Upload-Length": "10", "Upload-Metadata": metadata(filename="a.png", form=form)}
    assert person.post("/api/v1/tus", headers=headers).status_code in (400, 422, 431)


def test_odd_ends_of_a_batch_are_the_senders_fault(person: Person) -> None:
    for odd in ([1], "x", 7, None, {"uploads": {"a": 1}}, {"uploads": [[1]]}):
        assert person.post("/api/v1/uploads/close", json=odd).status_code in (204, 400), odd


def test_a_picture_is_stored_with_what_the_form_says(box: Box, person: Person) -> None:
    for kind in ("PNG", "JPEG"):
        [stored] = upload(person, f"film.{kind.lower()}", picture(kind=kind), FORM)
        assert stored["result"] == "stored"
        page = person.get(stored["url"]).text
        for said in ("王小东", "P-7", "male, 4 y", "RG CHEST PA", "The view was stated by the person", "photographed film"):
            assert said in page
    [infant] = upload(person, "b.png", picture(2), FORM | {"age": "7", "age_unit": "months"})
    assert "7 mo" in person.get(infant["url"]).text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"patient_name": "", "patient_id": ""}, "patient_name"), ({"view": ""}, "view"), ({"view": "XX"}, "view"),
        ({"patient_sex": "Q"}, "patient_sex"), ({"age": "four"}, "age"), ({"age": "131"}, "age"), ({"age": "9", "age_unit": "eons"}, "age"),
        ({"patient_name": "a=b"}, "patient_name"), ({"patient_id": "x" * 65}, "patient_id"),
    ],
)  # fmt: skip
def test_an_incomplete_form_names_its_fields(person: Person, change: dict[str, str], field: str) -> None:
    answer = begin(person, "a.png", 10, FORM | change)
    assert answer.status_code == 422
    assert answer.json()["fields"] == [field]
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_form_and_names_without_surprises() -> None:
    assert parse_form("nonsense") == ["patient_name"]
    assert parse_form(FORM | {"age": ""})["patient_age"] == ""  # type: ignore[call-overload]
    assert parse_form(FORM | {"patient_name": "王\x00小\n东"})["patient_name"] == "王小东"  # type: ignore[call-overload]
    assert display_name("a\r\nb\x1b[2J.dcm") == "ab[2J.dcm"
    assert display_name("").startswith("file-")


def test_one_request_for_scripts(box: Box, person: Person) -> None:
    files = [("file", ("a.dcm", scan_bytes())), ("file", ("b.txt", b"text")), ("file", ("c.zip", archive(x=scan_bytes())))]
    answer = person.post("/api/v1/uploads", files=files)
    assert [item["code"] or item["result"] for item in answer.json()["outcomes"]] == ["stored", "ingest.skipped", "stored"]
    assert len(box.store.database.query("SELECT 1 FROM jobs")) == 2
    with_form = person.post("/api/v1/uploads", files={"file": ("p.png", picture())}, data=FORM)
    assert with_form.json()["outcomes"][0]["result"] == "stored"
    assert person.post("/api/v1/uploads", files={"file": ("p.png", picture())}, data=FORM | {"view": "up"}).status_code == 422
    assert person.post("/api/v1/uploads", data={"x": "y"}).status_code == 400
    assert incoming(box) == []


def test_a_door_that_falls_gives_a_definite_answer(box: Box, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(finaliser.Finaliser, "accept", fall)
    assert upload(person, "a.dcm", scan_bytes())[0]["code"] == "ingest.unreadable"


def test_a_file_that_kills_the_door_again_and_again_is_given_up(box: Box, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finaliser, "_MAX_ATTEMPTS", 0)
    assert upload(person, "a.dcm", scan_bytes())[0]["code"] == "ingest.unreadable"
    assert "a.dcm" in person.get("/rejected").text


def test_no_room_for_the_outcome_loses_nothing(box: Box, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    whole = UploadStore.finish
    monkeypatch.setattr(UploadStore, "finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    send(person, path, data)
    waiting = person.get(f"{path}/outcome?wait=1")
    assert (waiting.status_code, waiting.json()["done"]) == (202, False)
    monkeypatch.setattr(UploadStore, "finish", whole)
    assert outcome(person, path)[0]["result"] == "duplicate"


def test_abandoned_uploads_go_after_a_day_and_acknowledged_ones_never(settings: Settings, store: Store) -> None:
    own = UploadStore(settings, store.keys.load(DATABASE_KEY), store.check_space)
    abandoned, complete, known = (own.create(1, "a", name, 3, None) for name in ("abandoned", "complete", "known"))
    for item in (complete, known):
        own.append(item, 0, BytesIO(b"abc").read)
    own.finish(known, [])
    (own.directory / "multipart-left-by-a-crash").touch()
    own.sweep()
    assert len(list(own.directory.iterdir())) == 7
    long_ago = time.time() - upload_store.ABANDONED_AFTER_S - 10
    for path in own.directory.iterdir():
        os.utime(path, (long_ago, long_ago))
    own.sweep()
    assert {path.stem for path in own.directory.iterdir()} == {complete.id}
    assert own.find(abandoned.id, 1) is None
    assert [item.id for item in own.unfinished()] == [complete.id]
    with pytest.raises(StoreError, match="no such record"):
        own.append(abandoned, 0, BytesIO(b"").read)


def test_kill_9_between_the_last_byte_and_the_door_loses_nothing(tmp_path: Path) -> None:
    data = scan_bytes()
    with served(tmp_path / "box") as (server, box):
        person = box.person()
        half = begin(person, "half.dcm", len(data)).headers["Location"]
        send(person, half, data[:2000])
        server.kill()
        own = UploadStore(server.settings, box.store.keys.load(DATABASE_KEY), box.store.check_space)
        whole = own.create(box.accounts.find("doctor").id, "doctor", "whole.dcm", len(data), None)  # type: ignore[union-attr]
        own.append(whole, 0, BytesIO(data).read)
        again = server.start()
        person.base = again.base
        assert outcome(person, f"/api/v1/tus/{whole.id}")[0]["result"] == "stored"
        assert person.head(half, headers=TUS).headers["Upload-Offset"] == "2000"
        assert send(person, half, data[2000:], offset=2000).status_code == 204
        assert outcome(person, half)[0]["result"] == "duplicate"


def test_200_files_at_once(tmp_path: Path) -> None:
    with served(tmp_path / "box") as (_, box):
        person = box.person()
        scans = [scan_bytes() for _ in range(200)]
        outcomes: list[str] = []

        def sender(mine: list[bytes]) -> None:
            own = Person(box.base)
            own.cookies.update(person.cookies)
            own.token = person.token
            outcomes.extend(upload(own, "a.dcm", data)[0]["result"] for data in mine)

        threads = [threading.Thread(target=sender, args=(scans[place::3],)) for place in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes == ["stored"] * 200
        assert "Studies on this box: 200" in person.get("/").text


def test_metadata_helper_speaks_tus() -> None:
    assert metadata(filename="胸.dcm") == "filename " + base64.b64encode("胸.dcm".encode()).decode()


def test_a_full_disk_asked_for_the_outcome_again_and_again_does_not_condemn_the_upload(
    box: Box, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scan_bytes()
    path = begin(person, "a.dcm", len(data)).headers["Location"]
    monkeypatch.setattr(UploadStore, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    send(person, path, data)
    for _ in range(finaliser._MAX_ATTEMPTS + 3):
        assert person.get(f"{path}/outcome?wait=2").status_code == 202
    monkeypatch.undo()
    answer = person.get(f"{path}/outcome?wait=10")
    assert answer.status_code == 200
    assert answer.json()["outcomes"][0]["result"] in ("stored", "duplicate")


def test_r13_uploads_that_an_older_appliance_left_are_encrypted_and_go_on(settings: Settings) -> None:
    data, directory = scan_bytes(), settings.data_dir / "incoming" / "uploads"
    ids = {"whole": "a" * 32, "half": "b" * 32}
    with in_process(settings) as box:
        box.person()
        owner = box.accounts.find("doctor").id  # type: ignore[union-attr]
        for kind, upload_id in ids.items():
            upload = {"id": upload_id, "owner": owner, "actor": "doctor", "name": "王小明.dcm", "length": len(data), "form": None}
            text = json.dumps(upload | {"created_at": time.time()}, ensure_ascii=False)
            (directory / f"{upload_id}.json").write_text(text, "utf-8")
            (directory / f"{upload_id}.data").write_bytes(data if kind == "whole" else data[:3000])
    with in_process(settings) as box:
        person = box.person()
        files = b"".join(path.read_bytes() for path in directory.iterdir())
        assert "王小明".encode() not in files
        assert data[:3000] not in files
        half = f"/api/v1/tus/{ids['half']}"
        assert person.head(half, headers=TUS).headers["Upload-Offset"] == "3000"
        assert send(person, half, data[3000:], offset=3000).status_code == 204
        for upload_id in ids.values():
            assert outcome(person, f"/api/v1/tus/{upload_id}")[0]["result"] in ("stored", "duplicate")
