"""Attacks on the page as the network sees it, through nginx: slow, silent, hoarding and lying clients; others are served all the same."""

from __future__ import annotations

import http.client
import json
import re
import resource
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlencode

import psutil
import pytest

from appliance.cli.demo import _self_signed
from tests.support.scans import scan_bytes
from tests.support.web_box import PASSWORD, TUS, Box, Person, Served, begin, outcome, send, served, wait_for
from webui.server import paced_body, proxy

OTHER = "127.0.0.2"  # another machine, as far as the server can tell
WAIT_S = 30.0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Box]]:
    """A box on the network, with a clinician's account."""
    base = tmp_path_factory.mktemp("slow")
    _self_signed(base / "keys")
    with served(base / "box", web_threads=8, **pair_of(base)) as (server, box):
        box.person()
        yield server, box


def pair_of(base: Path) -> dict[str, str]:
    """The settings for the certificate that the demo makes."""
    return {"tls_certificate": str(base / "keys" / "web.crt"), "tls_key": str(base / "keys" / "web.pem")}


def port_of(box: Box) -> int:
    return int(box.base.rsplit(":", 1)[1])


def plain_line(box: Box, source: str = OTHER) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(box)), source_address=(source, 0), timeout=WAIT_S)


def context_of(box: Box) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=box.settings.tls_certificate)


def line_to(box: Box, source: str = OTHER) -> ssl.SSLSocket:
    return context_of(box).wrap_socket(plain_line(box, source), server_hostname="localhost")


def log_in(box: Box) -> Person:
    """A clinician at a PC; fails when the box does not answer in time."""
    person = box.visitor()
    assert person.log_in("doctor", PASSWORD).status_code == 302
    assert "Worklist" in person.open("/")
    return person


def worker_of(server: Served) -> psutil.Process:
    assert server.process
    [worker] = psutil.Process(server.process.pid).children()
    return worker


def request(text: str, body: bytes = b"") -> bytes:
    return text.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body


def answer_of(line: socket.socket) -> bytes:
    """One whole answer; what the server sends behind it is not read."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += line.recv(1) or pytest.fail(f"the line ended after {got!r}")
    length = re.search(rb"\r\ncontent-length: (\d+)", got.lower())
    wanted = int(length[1]) if length else 0
    body = b""
    while len(body) < wanted:
        body += line.recv(wanted - len(body)) or pytest.fail(f"the line ended after {got!r}")
    return got + body


@contextmanager
def dripping(lines: list[tuple[socket.socket, bytes]], every_s: float = 0.3) -> Iterator[Callable[[], set[int]]]:
    """Send one byte on each line now and then; gives the numbers of the lines that the server has cut."""
    stop, cut = threading.Event(), set[int]()

    def drip() -> None:
        place = 0
        while not stop.wait(every_s):
            for number, (line, data) in enumerate(lines):
                try:
                    line.send(data[place % len(data) :][:1])
                except OSError:
                    cut.add(number)
            place += 1

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield lambda: cut
    finally:
        stop.set()
        thread.join()


def test_60_clients_that_never_close(site: tuple[Served, Box]) -> None:
    server, box = site
    worker = worker_of(server)
    with ExitStack() as stack:
        for _ in range(60):
            line = stack.enter_context(line_to(box))
            line.sendall(request("GET /login HTTP/1.1\nHost: localhost\nConnection: close"))
        for _ in range(3):
            log_in(box)
    assert worker_of(server).pid == worker.pid


def test_r45_420_idle_connections_and_150_silent_tls_handshakes(site: tuple[Served, Box]) -> None:
    _, box = site
    with ExitStack() as stack:
        for _ in range(270):
            stack.enter_context(plain_line(box))
        for _ in range(150):
            stack.enter_context(plain_line(box)).sendall(b"\x16\x03\x01")
        for _ in range(3):
            log_in(box)


def test_r45_one_machine_that_opens_more_connections_than_there_are(site: tuple[Served, Box]) -> None:
    """Those that have sent nothing make room for others."""
    _, box = site
    wanted = proxy._connections() + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, wanted + 500)), hard))
    try:
        with ExitStack() as stack:
            for _ in range(wanted):
                stack.enter_context(plain_line(box))
            log_in(box)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_r45_slow_heads_and_bodies_hold_no_thread(site: tuple[Served, Box]) -> None:
    """Heads are cut off after a time; so is an upload that is too slow, and what came of it is kept."""
    server, box = site
    worker = worker_of(server)
    person = log_in(box)
    data = scan_bytes()
    path = begin(person, "slow.dcm", len(data)).headers["Location"]
    cookie = "; ".join(f"{name}={value}" for name, value in person.cookies.get_dict().items())
    head = b"GET /login HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"y" * 1000
    form = "POST /login HTTP/1.1\nHost: localhost\nContent-Type: application/x-www-form-urlencoded\nContent-Length: 5000"
    patch = (
        f"PATCH {path} HTTP/1.1\nHost: 127.0.0.1\nCookie: {cookie}\nX-CSRFToken: {person.token}\nTus-Resumable: 1.0.0\n"
        f"Upload-Offset: 0\nContent-Type: application/offset+octet-stream\nContent-Length: {len(data)}"
    )
    strange = "POST /api/v1/tus HTTP/1.1\nHost: localhost\nTus-Resumable: 1.0.0\nContent-Length: 5000000"
    kinds = [(b"G", head[1:], 30), (request(strange), b"a", 60), (request(form), b"a", 40), (request(patch, data[:3000]), data[3000:], 1)]
    with ExitStack() as stack:
        lines: list[tuple[socket.socket, bytes]] = []
        for begun, rest, count in kinds:
            for number in range(count):  # the uploads of strangers come from ten machines, each within its share
                other = f"127.0.1.{number % 10 + 1}" if begun == request(strange) else OTHER
                line = stack.enter_context(line_to(box, "127.0.0.1" if begun.startswith(b"PATCH") else other))
                line.sendall(begun)
                lines.append((line, rest))
        must_end = {*range(30), len(lines) - 1}
        with dripping(lines) as cut:
            for _ in range(5):
                log_in(box)
            wait_for(lambda: must_end <= cut(), 3 * (proxy.HEAD_S + paced_body.GRACE_S))
            log_in(box)
    assert worker_of(server).pid == worker.pid
    wait_for(lambda: int(person.head(path, headers=TUS).headers["Upload-Offset"]) >= 3000)
    kept = int(person.head(path, headers=TUS).headers["Upload-Offset"])
    assert send(person, path, data[kept:], offset=kept).status_code == 204
    assert outcome(person, path)[0]["result"] == "stored"


def test_r45_clients_that_read_nothing_leave_threads_to_others(site: tuple[Served, Box]) -> None:
    _, box = site
    with ExitStack() as stack:
        for _ in range(30):
            line = stack.enter_context(socket.socket())
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.bind((OTHER, 0))
            line.connect(("127.0.0.1", port_of(box)))
            secure = stack.enter_context(context_of(box).wrap_socket(line, server_hostname="localhost"))
            secure.sendall(request("GET /static/viewer/viewer.js HTTP/1.1\nHost: localhost"))
        for _ in range(3):
            log_in(box)


def test_one_machine_that_takes_every_thread_is_refused_and_others_are_served(site: tuple[Served, Box]) -> None:
    """Forms that never end: beyond its share a machine gets 429, with a page in both languages."""
    _, box = site
    begun = request("POST /login HTTP/1.1\nHost: localhost\nContent-Length: 5000", b"a")
    with ExitStack() as stack:
        for _ in range(6):  # three quarters of eight threads
            stack.enter_context(line_to(box)).sendall(begun)
        last = stack.enter_context(line_to(box))
        last.sendall(request("GET /login HTTP/1.1\nHost: localhost"))
        answer = answer_of(last).decode()
        assert answer.startswith("HTTP/1.1 429")
        assert "设备正忙" in answer
        assert "The box is busy" in answer
        assert "default-src 'self'" in answer
        log_in(box)


def post_login(box: Box, source: str, password: str, forged: str = "") -> int:
    """One login from a machine, which states another address; returns the status."""
    line = http.client.HTTPSConnection("localhost", port_of(box), context=context_of(box), source_address=(source, 0), timeout=WAIT_S)
    line._create_connection = lambda *_more: plain_line(box, source)  # type: ignore[attr-defined]  # IPv4 in any case
    try:
        line.request("GET", "/login")
        page = line.getresponse()
        cookie, text = str(page.getheader("Set-Cookie")).partition(";")[0], page.read().decode()
        token = re.findall(r'name="csrf-token" content="([^"]+)"', text)[0]
        headers = {"Cookie": cookie, "X-CSRFToken": token, "Content-Type": "application/x-www-form-urlencoded"}
        lies = {"X-Forwarded-For": forged, "X-Real-IP": forged, "Forwarded": f"for={forged}", "X-Forwarded-Proto": "http"} if forged else {}
        line.request("POST", "/login", urlencode({"username": "doctor", "password": password}), headers | lies)
        return line.getresponse().status
    finally:
        line.close()


def test_r03_a_forged_address_is_not_believed(site: tuple[Served, Box]) -> None:
    """The throttle counts the machine that nginx saw, whatever the client writes of itself."""
    _, box = site
    liar = "127.0.0.3"
    for number in range(5):
        assert post_login(box, liar, "wrong", forged=f"10.0.0.{number}") == 401
    assert post_login(box, liar, PASSWORD, forged="10.0.0.77") == 401  # locked for this machine
    assert post_login(box, "127.0.0.1", PASSWORD, forged=liar) == 302  # and for no other


def test_r03_guessing_is_slowed_for_its_machine_alone(site: tuple[Served, Box]) -> None:
    _, box = site
    guesser = "127.0.0.4"
    form = request("POST /login HTTP/1.1\nHost: localhost\nContent-Length: 1", b"a")
    statuses = []
    for _ in range(40):
        with line_to(box, guesser) as line:
            line.sendall(form)
            statuses.append(answer_of(line)[9:12])
    assert statuses[0] == b"400"  # no CSRF token
    assert statuses.count(b"429") >= 10
    log_in(box)


def test_requests_in_pieces_and_in_a_row(site: tuple[Served, Box]) -> None:
    _, box = site
    health = request("GET /healthz HTTP/1.1\nHost: localhost")
    with line_to(box) as line:
        for place in range(0, len(health), 7):
            line.sendall(health[place : place + 7])
        assert answer_of(line).startswith(b"HTTP/1.1 200")
        line.sendall(health + health + health[:20])
        assert answer_of(line).startswith(b"HTTP/1.1 200")
        assert answer_of(line).startswith(b"HTTP/1.1 200")
        line.sendall(health[20:])
        assert answer_of(line).startswith(b"HTTP/1.1 200")


def test_r18_what_is_no_request_gets_a_plain_answer_and_is_not_quoted_in_the_log(site: tuple[Served, Box]) -> None:
    server, box = site
    for raw, status in (
        (b"CANARY CANARY CANARY\r\n\r\n", b"400"),
        (b"GET /CANARY HTTP/1.1\r\nHost: localhost\r\nContent-Length: CANARY\r\n\r\n", b"400"),
        (b"GET /CANARY HTTP/1.1\r\nHost: CANARY CANARY\r\n\r\n", b"400"),
        (b"GET /CANARY HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /" + b"CANARY" * 10_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nX: " + b"CANARY" * 10_000 + b"\r\n\r\n", b"400"),
        (b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: CANARY\r\n\r\n", b"501"),
        (b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", b"400"),
        (b"GET /static/../../../../CANARY HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /static/%2e%2e/CANARY HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        (b"GET /static/CANARY HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
    ):
        with line_to(box) as line:
            with suppress(OSError):  # refused before its end
                line.sendall(raw)
            answer = line.recv(4000)
            assert answer.startswith((b"HTTP/1.1 " + status, b"<html>")), (raw[:60], answer)
            assert b"CANARY" not in answer or b"csrf-token" in answer  # the box's own page, which leads back to where one was
    with line_to(box) as line:
        line.sendall(request("GET /CANARY HTTP/1.1\nHost: canary.example"))  # a name that is not the box's
        assert answer_of(line).startswith(b"HTTP/1.1 400")
    log = server.log.read_text()
    assert "CANARY" not in log
    assert "canary" not in log
    for entry in log.splitlines():
        is_of_the_start = re.search(r'^Listening on |using inherited sockets from "\d+;"$', entry)  # the second is nginx's
        assert is_of_the_start or json.loads(entry)


def test_tls_in_pieces(site: tuple[Served, Box]) -> None:
    _, box = site
    health = request("GET /healthz HTTP/1.1\nHost: localhost")
    with line_to(box) as secure:
        for _ in range(2):
            secure.sendall(health[:11])
            time.sleep(0.05)
            secure.sendall(health[11:] + health)
            assert answer_of(secure).startswith(b"HTTP/1.1 200")
            assert answer_of(secure).startswith(b"HTTP/1.1 200")
    with plain_line(box) as plain:  # somebody who typed no https is led there
        plain.sendall(health)
        assert re.match(rb"HTTP/1.1 301 (.|\r\n)*\r\nLocation: https://localhost:\d+/healthz\r\n", answer_of(plain))


def test_nothing_of_a_request_is_written_to_a_file_of_nginx(site: tuple[Served, Box]) -> None:
    """Its folders for bodies and answers are files here, so that writing into them would fail."""
    server, box = site
    folders = [server.settings.data_dir / "run" / "nginx" / name for name in ("body", "proxy")]
    for folder in folders:
        folder.rename(folder.with_suffix(".aside"))
        folder.write_text("")
    try:
        person = log_in(box)
        form = {"username": "x", "password": "y" * (60 << 10)}
        assert person.post("/login", data=form).status_code in (302, 401, 400)
        data = scan_bytes(Rows=1500, Columns=1500, PixelData=bytes(2 * 1500 * 1500))
        path = begin(person, "large.dcm", len(data)).headers["Location"]
        assert send(person, path, data).status_code == 204
        stored = outcome(person, path)[0]
        assert stored["result"] == "stored"
        frame = person.get(f"/api/studies/{stored['study_id']}")
        assert frame.status_code in (200, 404)
        with ExitStack() as stack, selectors.DefaultSelector():
            line = stack.enter_context(line_to(box, "127.0.0.1"))
            line.sendall(request("GET /static/viewer/viewer.js HTTP/1.1\nHost: localhost"))
            assert answer_of(line).startswith(b"HTTP/1.1 200")
    finally:
        for folder in folders:
            folder.unlink()
            folder.with_suffix(".aside").rename(folder)


def test_a_stopping_server_does_not_wait_for_silent_clients(tmp_path: Path) -> None:
    _self_signed(tmp_path / "keys")
    with served(tmp_path / "box", web_threads=6, **pair_of(tmp_path)) as (server, box), ExitStack() as stack:
        box.person()
        for _ in range(20):
            stack.enter_context(plain_line(box))
        log_in(box)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < proxy.HEAD_S
