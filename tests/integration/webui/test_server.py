"""The server as the box starts it: TLS or loopback, small, quiet about patients, and gone when asked to go."""

from __future__ import annotations

import json
import logging
import re
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import requests

from appliance.cli.demo import _self_signed
from appliance.core.certificates import load_pair
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from model_sync.web_server import ErrorOnlyLogger
from tests.support.scans import scan_bytes
from tests.support.web_box import ROOT, Served, begin, outcome, send, served, upload, wait_for
from webui import app as app_module
from webui import create_app
from webui.server import process


def test_r14_plain_http_is_for_loopback_alone(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "box.example"):  # noqa: S104
        with pytest.raises(ApplianceError, match="plain http is for loopback only"):
            process.check(Settings.parse({"data_dir": tmp_path, "web_host": host}))
    for host in ("127.0.0.1", "::1", "localhost"):
        process.check(Settings.parse({"data_dir": tmp_path, "web_host": host}))


def test_what_must_not_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text('web_host = "0.0.0.0"\n')
    done = subprocess.run(
        [sys.executable, "-m", "webui", "--data-dir", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == process.EXIT_USAGE
    assert "hint: Set tls_certificate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("torn", ["web.crt", "web.pem"])
def test_a_certificate_of_the_demo_that_a_kill_left_torn_is_made_anew(tmp_path: Path, torn: str) -> None:
    _self_signed(tmp_path)
    (tmp_path / torn).write_bytes((tmp_path / torn).read_bytes()[:60])
    _self_signed(tmp_path)
    assert load_pair(tmp_path / "web.crt", tmp_path / "web.pem")
    whole = (tmp_path / "web.crt").read_bytes()
    _self_signed(tmp_path)
    assert (tmp_path / "web.crt").read_bytes() == whole


def test_r14_tls_1_2_or_newer_and_secure_cookies(tmp_path: Path) -> None:
    _self_signed(tmp_path / "keys")
    pair = {"tls_certificate": str(tmp_path / "keys" / "web.crt"), "tls_key": str(tmp_path / "keys" / "web.pem")}
    with served(tmp_path / "box", **pair) as (_, box):
        trusted = str(tmp_path / "keys" / "web.crt")
        answer = requests.get(f"{box.base}/login", verify=trusted, timeout=30)
        assert "Secure" in answer.headers["Set-Cookie"]
        old = ssl.create_default_context(cafile=trusted)
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            pytest.raises(OSError, match=r"(?i)ssl|tls|reset"),
            socket.create_connection(("127.0.0.1", int(box.base.rsplit(":", 1)[1]))) as line,
        ):
            old.wrap_socket(line, server_hostname="localhost")


def test_the_web_processes_are_small(tmp_path: Path) -> None:
    with served(tmp_path / "box") as (running, box):
        person = box.person()
        person.get("/")
        assert running.process
        master = psutil.Process(running.process.pid)
        family = [master, *master.children(recursive=True)]
        assert len(family) == 2
        assert sum(process.memory_info().rss for process in family) < 140 * 2**20  # with what measures coverage in them
        assert json.loads((box.settings.data_dir / "run" / "web.json").read_text())["pid"] == master.pid
        assert running.log.read_text().count("Listening on ") == 1


def test_a_fallen_worker_process_is_started_again(tmp_path: Path) -> None:
    with served(tmp_path / "box") as (running, box):
        person = box.person()
        assert running.process
        [worker] = psutil.Process(running.process.pid).children()
        worker.kill()
        worker.wait(10)
        wait_for(lambda: person.get("/healthz").ok, 60)
        assert person.get("/").status_code == 200


def test_sigterm_finishes_what_is_under_way(tmp_path: Path) -> None:
    with served(tmp_path / "box") as (running, box):
        person = box.person()
        data = scan_bytes()
        path = begin(person, "a.dcm", len(data)).headers["Location"]
        answers: list[int] = []

        def slow() -> object:
            yield data[:2000]
            running.process.terminate()  # type: ignore[union-attr]
            yield data[2000:]

        thread = threading.Thread(target=lambda: answers.append(send(person, path, slow()).status_code))
        thread.start()
        thread.join(20)
        assert answers in ([204], [411])
        assert running.stop() == 0
    again = Served(tmp_path / "box")
    box = again.start()
    try:
        person.base = box.base
        if answers == [204]:
            assert outcome(person, path)[0]["result"] in ("stored", "duplicate")
    finally:
        again.stop()


def test_r18_no_patient_data_in_the_log(tmp_path: Path) -> None:
    with served(tmp_path / "box") as (running, box):
        person = box.person()
        canary = scan_bytes(PatientName="CANARY^NAME", PatientID="CANARY-ID")
        [stored] = upload(person, "CANARY-file.dcm", canary)
        upload(person, "CANARY-bad.dcm", canary[:700])
        person.post("/", data={"q": "CANARY"})
        person.get(stored["url"])
        person.get("/CANARY/../%00")
        person.post("/CANARY", data=b"x")
    log = running.log.read_text()
    assert "CANARY" not in log
    assert "refused" in log


def test_r18_an_invalid_request_on_loopback_is_not_quoted_in_the_log(tmp_path: Path) -> None:
    with served(tmp_path / "box") as (running, box):
        for raw in (b"CANARY CANARY CANARY\r\n\r\n", b"GET /CANARY HTTP/1.1\r\nCANARY HEADER: x\r\n\r\n", b"GET / CANARY/9\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", int(box.base.rsplit(":", 1)[1])), timeout=30) as line:
                line.sendall(raw)
                answer = line.recv(4000)
            assert answer.startswith(b"HTTP/1.1 400")
            assert b"CANARY" not in answer
    log = running.log.read_text()
    assert "CANARY" not in log
    assert "invalid request" in log


def test_texts_must_be_compiled(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="make texts"):
        app_module._check_translations(tmp_path)
    assert create_app(settings).extensions["box"].stop() is None
    quiet = ErrorOnlyLogger(None)
    quiet.access("x")
    quiet.reopen_files()
    quiet.close_on_exec()
    assert quiet.error_log.level == logging.WARNING
    assert re.match(r"\[::1\]$", process.bracketed("::1"))
    monkeypatch.setattr("os.access", lambda *_: False)
    assert process._heartbeat_directory(settings).endswith("run")
