"""A search of the raw files for a canary finds nothing, whatever came in, by whichever way, and however it ended (R13)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest

from appliance.store.store import Store
from tests.support.activated import reference_box
from tests.support.dicom_sender import send as send_by_dicom
from tests.support.paths import ROOT
from tests.support.receiver_process import receiver
from tests.support.scans import dataset, encode
from tests.support.web_box import TUS, Person, Served, begin, outcome, send, wait_for

NAME, ID = "金丝雀王", "CANARY-4711"
TRACES = [NAME.encode(encoding) for encoding in ("utf-8", "gbk", "utf-16-le", "utf-16-be")]
TRACES += [ID.encode(encoding) for encoding in ("ascii", "utf-16-le", "utf-16-be")]


def traces(*folders: Path) -> list[str]:
    """Every file below the folders that holds the canary in its bytes or its name."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        data = os.fsencode(path.name) + (path.read_bytes() if path.is_file() else b"")
        found += [str(path) for trace in TRACES if trace in data]
    return found


def film(character_set: str, number: int) -> bytes:
    """An image of the canary, whose name is in that character set."""
    return encode(dataset(SpecificCharacterSet=character_set, PatientName=f"{NAME}^{number}", PatientID=ID, AccessionNumber=str(number)))


def begin_multipart(person: Person, base: str) -> socket.socket:
    """A request with the canary in its body, which never ends."""
    cookie = "; ".join(f"{name}={value}" for name, value in person.cookies.items())
    head = (
        f"POST /api/v1/uploads HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\nX-CSRFToken: {person.token}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9000000\r\n\r\n"
        f'--b\r\nContent-Disposition: form-data; name="file"; filename="{NAME}.dcm"\r\n\r\n'
    )
    line = socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1])), timeout=30)
    line.sendall(head.encode() + b"".join(TRACES) * 40_000)
    return line


def has_spool(data_dir: Path) -> bool:
    """Whether some process holds a file without a name in the folder of the uploads that has got bytes."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
            if str(data_dir) in target and "(deleted)" in target and link.stat().st_size > 1_000_000:
                return not any(trace in link.read_bytes() for trace in TRACES)
        except OSError:  # the process or its file ended meanwhile
            continue
    return False


def test_r13_no_canary_on_the_raw_disk_after_uploads_failures_and_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box_dir, temporary = tmp_path / "box", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    server = Served(reference_box(box_dir))
    box = server.start()
    person = box.person()
    for number, character_set in enumerate(("ISO_IR 192", "GB18030", "GBK")):
        data = film(character_set, number)
        path = begin(person, f"{NAME}-{number}.dcm", len(data)).headers["Location"]
        send(person, path, data)
        assert outcome(person, path)[0]["result"] == "stored"
    form = {"patient_name": NAME, "patient_id": ID, "view": "PA"}
    bad = {"file": (f"{NAME}.dcm", BytesIO(b"".join(TRACES) * 50_000))}
    assert person.post("/api/v1/uploads", data=form, files=bad).json()["outcomes"][0]["result"] == "refused"
    half = film("GB18030", 7)
    path = begin(person, f"{NAME}-half.dcm", len(half)).headers["Location"]
    assert send(person, path, half[:-100]).status_code == 204
    with begin_multipart(person, box.base):
        wait_for(lambda: has_spool(box_dir))
        server.kill()
    box.store.close()  # reading a database file ends the locks that this process has on it
    assert traces(box_dir, temporary) == []
    box = server.start()
    again = Person(box.base)
    again.cookies.update(person.cookies)
    again.open("/health")
    offset = int(again.head(path, headers=TUS).headers["Upload-Offset"])
    assert offset == len(half) - 100
    send(again, path, half[offset:], offset=offset)
    assert outcome(again, path)[0]["result"] == "stored"
    server.stop()
    box.store.close()
    with receiver(server.settings) as (port, _):
        sent = dataset(SpecificCharacterSet="GB18030", PatientName=f"{NAME}^8", PatientID=ID)
        assert send_by_dicom(port, sent) == [0]
    scan = tmp_path / "scan.dcm"
    scan.write_bytes(film("ISO_IR 192", 9))
    command = [sys.executable, "-m", "appliance", "analyze", str(scan), "--data-dir", str(box_dir)]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, check=False).returncode == 0
    assert traces(box_dir, temporary) == []
    store = Store(server.settings)
    assert store.database.number("SELECT count(*) FROM studies WHERE patient_id = ?", ID) == 6
    store.close()
