"""nginx as the box starts it: restarted when it ends, renewed without losing a request, HSTS where the certificate is trusted."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest
import requests

from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.core.tls_status import tls_statuses
from appliance.service.supervisor import Supervisor, web_address
from tests.support.certificates import make_authority, make_pair
from tests.support.paths import ROOT
from tests.support.web_box import TUS, served, wait_for
from webui.server import process, proxy
from webui.server.security import HEADERS

NAME = "clinicbox.county.example"


def settings_of(tmp_path: Path, **values: object) -> Settings:
    """A box on the network whose pair is in ``tmp_path``."""
    lines = {"web_port": 0, "dicom_port": 0, "disk_reserve_bytes": 0, "tls_certificate": "../web.crt", "tls_key": "../web.key"} | values
    box = tmp_path / "box"
    box.mkdir(exist_ok=True)
    (box / "box.toml").write_text("".join(f"{key} = {value!r}\n" for key, value in lines.items()))
    return Settings.load(box)


@contextmanager
def supervised(settings: Settings) -> Iterator[tuple[Supervisor, Path]]:
    """A box under its supervisor, up; and its log."""
    log = settings.data_dir / "box.log"
    supervisor, is_over = Supervisor(settings, log), threading.Event()
    supervisor.start()
    thread = threading.Thread(target=supervisor.run, args=(is_over.is_set,))
    thread.start()
    try:
        wait_for(lambda: web_address(settings), 90)
        yield supervisor, log
    finally:
        is_over.set()
        thread.join()
        supervisor.stop()


def serial_of(port: int) -> str:
    """The certificate that is served now."""
    return ssl.get_server_certificate(("127.0.0.1", port))


def test_r14_nginx_is_started_again_and_takes_a_new_certificate_without_losing_a_request(tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "ca.crt")
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["localhost", "127.0.0.1"], authority=authority)
    settings = settings_of(tmp_path)
    with supervised(settings) as (supervisor, log):
        nginx = next(child for child in supervisor.children if child.name == "proxy")
        assert nginx.process
        first = psutil.Process(nginx.process.pid)
        assert first.name() == "nginx"
        assert {child.username() for child in first.children()} == {first.username()}
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: nginx.process and nginx.process.pid != first.pid and web_address(settings), 60)
        address = web_address(settings)
        assert address
        port = int(address["port"])

        failures, is_over = [], threading.Event()

        def ask() -> None:
            while not is_over.is_set():
                try:
                    answer = requests.get(f"https://127.0.0.1:{port}/healthz", verify=str(tmp_path / "ca.crt"), timeout=20)
                    if answer.status_code != 200:
                        failures.append(answer.status_code)
                except requests.RequestException as error:
                    failures.append(error)

        old = serial_of(port)
        make_pair(tmp_path / "new.crt", tmp_path / "new.key", ["localhost", "127.0.0.1"], authority=authority)
        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        try:
            (tmp_path / "new.crt").replace(tmp_path / "web.crt")  # half of the new pair: not taken
            wait_for(lambda: "tls.key_mismatch" in log.read_text(), 30)
            assert serial_of(port) == old
            (tmp_path / "new.key").replace(tmp_path / "web.key")
            wait_for(lambda: serial_of(port) != old, 30)
            time.sleep(0.5)
        finally:
            is_over.set()
            for asker in askers:
                asker.join()
        assert failures == []
    assert "Traceback" not in log.read_text()
    wait_for(lambda: not any(pid.info["name"] == "nginx" and str(tmp_path) in " ".join(pid.info["cmdline"] or ())
                             for pid in psutil.process_iter(["name", "cmdline"])))  # fmt: skip


def test_what_nginx_refuses_is_reported_and_the_former_certificate_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["127.0.0.1"])
    pair = {"tls_certificate": str(tmp_path / "web.crt"), "tls_key": str(tmp_path / "web.key")}
    with served(tmp_path / "box", **pair) as (server, _):
        settings = server.settings
        assert not tls_statuses(settings, datetime.now(timezone.utc))[0].problems
        make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["127.0.0.1"])
        with monkeypatch.context() as patch:
            patch.setattr(proxy, "render", lambda *_: "unknown_directive;")
            patch.setattr(proxy, "_TAKEN_S", 1.0)
            with pytest.raises(ApplianceError, match=r"tls\.not_served"):
                proxy.reload(settings)
        assert [problem.code for problem in tls_statuses(settings, datetime.now(timezone.utc))[0].problems] == ["tls.not_served"]
        proxy.reload(settings)
        assert not tls_statuses(settings, datetime.now(timezone.utc))[0].problems


def test_a_process_that_is_not_nginx_gets_no_signal(tmp_path: Path) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["127.0.0.1"])
    settings = settings_of(tmp_path)
    run = settings.data_dir / "run" / "nginx"
    run.mkdir(parents=True)
    (run.parent / "web.json").write_text('{"port": 8443}')
    with subprocess.Popen(["sleep", "60"]) as other:
        for pid in (str(other.pid), "", "4194304"):
            (run / "nginx.pid").write_text(pid)
            with pytest.raises(ApplianceError, match="nginx does not run"):
                proxy.reload(settings)
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("module", ["webui", "webui.server.proxy"])
def test_a_port_in_use_is_an_error_before_anything_says_that_it_listens(tmp_path: Path, module: str) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["localhost"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = settings_of(tmp_path, web_port=port)
        if module == "webui":
            (settings.data_dir / "box.toml").write_text(f"web_port = {port}\n")
        command = [sys.executable, "-m", module, "--data-dir", str(settings.data_dir)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == process.EXIT_USAGE
    assert f"web_port = {port}, 127.0.0.1" in done.stderr
    assert "hint: Stop the program" in done.stderr
    assert "Listening" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (settings.data_dir / "run" / "web.json").exists()


def test_hsts_only_with_a_name_and_a_certificate_that_its_authority_trusts(tmp_path: Path) -> None:
    """A self-signed one must not lock people out of the page for a month."""
    authority = make_authority(tmp_path / "ca.crt")
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME, "127.0.0.1"], authority=authority)
    trusted = {"web_hostname": NAME, "tls_authority": "../ca.crt"}
    assert "Strict-Transport-Security" in proxy.render(settings_of(tmp_path, **trusted), 8443)
    assert "Strict-Transport-Security" not in proxy.render(settings_of(tmp_path, tls_authority="../ca.crt"), 8443)
    assert "Strict-Transport-Security" not in proxy.render(settings_of(tmp_path, web_hostname=NAME), 8443)
    other = settings_of(tmp_path, **trusted | {"web_hostname": "other.example"})
    assert "Strict-Transport-Security" not in proxy.render(other, 8443)
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME], authority=authority, days=-1)
    assert "Strict-Transport-Security" not in proxy.render(settings_of(tmp_path, **trusted), 8443)
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME])
    assert "Strict-Transport-Security" not in proxy.render(settings_of(tmp_path, **trusted), 8443)


def test_hsts_compression_and_versions_as_a_browser_gets_them(tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "ca.crt")
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME, "127.0.0.1"], authority=authority)
    pair = {"tls_certificate": str(tmp_path / "web.crt"), "tls_key": str(tmp_path / "web.key")}
    with served(tmp_path / "box", **pair, web_hostname=NAME, tls_authority=str(tmp_path / "ca.crt")) as (_, box):
        person = box.visitor()
        page = person.get("/login", headers={"Host": NAME})  # the name of the certificate is a name of the box
        assert page.status_code == 200
        assert page.headers["Strict-Transport-Security"] == "max-age=2592000"
        [versioned] = re.findall(r"/static/viewer/page\.css\?v=\w+", page.text)
        style = person.get(versioned, headers={"Accept-Encoding": "gzip"})
        assert style.headers["Content-Encoding"] == "gzip"
        assert "immutable" in style.headers["Cache-Control"]
        assert style.headers["Strict-Transport-Security"] == "max-age=2592000"
        assert {name: style.headers[name] for name in HEADERS} == HEADERS
        for address in ("/static/viewer/page.css", "/static/viewer/page.css?v=000000000000"):
            again = person.get(address, headers={"Accept-Encoding": "identity"})
            assert again.headers["Cache-Control"] == "no-cache"
            assert "Content-Encoding" not in again.headers
            assert again.text == style.text
        kept = person.get("/static/viewer/page.css", headers={"If-None-Match": again.headers["ETag"], "Accept-Encoding": "identity"})
        assert kept.status_code == 304


def test_while_the_web_process_is_away_a_page_in_both_languages_says_so(tmp_path: Path) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["127.0.0.1"])
    pair = {"tls_certificate": str(tmp_path / "web.crt"), "tls_key": str(tmp_path / "web.key")}
    with served(tmp_path / "box", **pair) as (server, box):
        server.kill()
        for method in ("GET", "POST"):
            answer = box.visitor().request(method, "/login")
            assert answer.status_code == 502
            assert "正在启动" in answer.text
            assert "is busy or starting" in answer.text
            assert answer.headers["Retry-After"] == "3"


_MANY_MACHINES = """
set -eu
ip link set lo up
for number in 2 3 4 5 6 7 8 9; do ip -6 addr add "fd00:1::$number/64" dev lo nodad; done
ip -6 addr add fd00:2::1/64 dev lo nodad
exec "$@"
"""
_READY = (
    "import sys, time; from pathlib import Path; from appliance.core.settings import Settings; "
    "from appliance.service.supervisor import web_address; settings = Settings.load(Path(sys.argv[1])); "
    "[time.sleep(0.2) for _ in range(300) if web_address(settings) is None]"
)
_QUOTA = """
import json, socket, ssl, sys

address, certificate = json.load(open(sys.argv[1])), sys.argv[2]
context = ssl.create_default_context(cafile=certificate)

def line(source):
    host = "::1" if ":" in source else "127.0.0.1"
    plain = socket.create_connection((host, address["port"]), source_address=(source, 0), timeout=30)
    return context.wrap_socket(plain, server_hostname=host)

def status(source):
    with line(source) as sock:
        sock.sendall(b"GET /login HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        return sock.recv(12)[9:].decode()

def hold(source):
    sock = line(source)
    sock.sendall(b"POST /login HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 500\\r\\n\\r\\na")
    return sock

held = [hold(f"fd00:1::{number}") for number in range(2, 8)]
print(status("fd00:1::9"), status("fd00:2::1"), status("127.0.0.1"))
held += [hold("127.0.0.1") for _ in range(6)]
print(status("127.0.0.1"), status("127.0.0.2"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="addresses of many machines need a network of their own, which only root can make")
def test_a_machine_has_all_addresses_of_its_ipv6_network_and_ipv4_counts_singly(tmp_path: Path) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["::1", "127.0.0.1"])
    settings = settings_of(tmp_path, web_host="::", web_threads=8)
    (tmp_path / "ask.py").write_text(_QUOTA)
    ask = f'"{sys.executable}" "{tmp_path / "ask.py"}" "{settings.data_dir / "run" / "web.json"}" "{tmp_path / "web.crt"}"'
    serve = f'"{sys.executable}" -m webui --data-dir "$1" & "{sys.executable}" -m webui.server.proxy --data-dir "$1" &'
    ready = f'"{sys.executable}" -c "{_READY}" "$1"'
    script = f"{serve} {ready} && {ask}; code=$?; kill %1 %2; wait; exit $code"
    command = ["unshare", "--net", "sh", "-c", _MANY_MACHINES, "sh", "bash", "-c", script, "bash", str(settings.data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^\d{3}.*", done.stdout, re.MULTILINE) == ["429 200 200", "429 200"]


def refusal(settings: Settings) -> str:
    """The code with which both the web process and nginx's start refuse these settings."""
    with pytest.raises(ApplianceError) as by_web:
        process.check(settings)
    with pytest.raises(ApplianceError) as by_proxy:
        proxy.render(settings, 8443)
    assert by_web.value.code == by_proxy.value.code
    return by_web.value.code


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["localhost"])
    settings = settings_of(tmp_path)
    with pytest.raises(ApplianceError, match=r"tls\.incomplete"):
        process.check(settings.model_copy(update={"tls_certificate": None}))
    assert refusal(settings.model_copy(update={"tls_key": None})) == "tls.incomplete"
    (tmp_path / "web.key").unlink()
    assert refusal(settings) == "tls.unreadable"


def test_the_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "other.key", ["localhost"])
    make_pair(tmp_path / "other.crt", tmp_path / "web.key", ["localhost"])
    assert refusal(settings_of(tmp_path)) == "tls.key_mismatch"


def test_a_pair_that_openssl_refuses_is_refused(tmp_path: Path) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["localhost"], is_weak=True)
    assert refusal(settings_of(tmp_path)) == "tls.refused"
    curve = ["-pkeyopt", "ec_paramgen_curve:brainpoolP256t1", "-pkeyopt", "ec_param_enc:named_curve"]  # which cryptography does not know
    names = ["-subj", "/CN=localhost", "-keyout", str(tmp_path / "web.key"), "-out", str(tmp_path / "web.crt")]
    subprocess.run(["openssl", "req", "-x509", "-nodes", "-newkey", "ec", *curve, *names], check=True, capture_output=True)
    assert refusal(settings_of(tmp_path)) == "tls.refused"


def test_a_damaged_certificate_is_refused(tmp_path: Path) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["localhost"])
    text = (tmp_path / "web.crt").read_text()
    for damaged in ("", text[: len(text) // 2], text.replace("BEGIN", "BEGAN"), "\0"):
        (tmp_path / "web.crt").write_text(damaged)
        assert refusal(settings_of(tmp_path)) == "tls.unreadable"


def test_what_prevents_nginx_is_said_in_one_line(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    command = [sys.executable, "-m", "webui.server.proxy", "--data-dir", str(settings.data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == process.EXIT_USAGE
    assert "error: tls.unreadable" in done.stderr
    assert "hint: Put certificate and key" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_nginx_the_box_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["localhost"])
    monkeypatch.setattr("appliance.core.process.shutil.which", lambda *_, **_more: None)
    with pytest.raises(ApplianceError, match=r"tls\.no_nginx"):
        proxy._start(settings_of(tmp_path))


def test_a_path_that_nginx_cannot_name_or_that_is_too_long_is_refused(tmp_path: Path) -> None:
    odd = tmp_path / 'a "b; $c'
    odd.mkdir()
    make_pair(odd / "web.crt", odd / "web.key", ["localhost"])
    with pytest.raises(ApplianceError, match="a path with a blank"):
        proxy.render(settings_of(odd), 8443)
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    make_pair(deep / "web.crt", deep / "web.key", ["localhost"])
    with pytest.raises(ApplianceError, match="longer than a socket"):
        process.check(settings_of(deep))


def test_an_upload_that_is_refused_gets_the_answer_of_the_box_with_its_body_still_on_the_way(tmp_path: Path) -> None:
    """nginx passes these bodies on as they come; the web process answers without reading them (413, 401)."""
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", ["127.0.0.1"])
    pair = {"tls_certificate": str(tmp_path / "web.crt"), "tls_key": str(tmp_path / "web.key")}
    with served(tmp_path / "box", **pair, max_upload_bytes=1 << 20, max_archive_bytes=2 << 20) as (_, box):
        person, stranger, body = box.person(), box.visitor(), b"x" * (8 << 20)
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        tus = {**TUS, "Upload-Length": "9000000", "Content-Type": "application/offset+octet-stream"}
        for _ in range(25):  # a reset that overtakes the answer is a matter of luck
            answers = [
                person.post("/api/v1/uploads", data=body, headers=form), person.post("/api/v1/tus", data=body, headers=tus),
                stranger.post("/api/v1/uploads", data=body, headers=form), stranger.post("/api/v1/tus", data=body, headers=tus),
            ]  # fmt: skip
            assert [answer.status_code for answer in answers] == [413, 413, 401, 401]
        assert {answer.headers["Content-Type"] for answer in answers} == {"application/problem+json"}
        assert person.get("/").status_code == 200
