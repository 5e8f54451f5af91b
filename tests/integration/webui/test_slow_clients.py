"""Clients that never close, drip, hoard connections or read nothing: real ones are answered all the same, and nobody is waited for."""

from __future__ import annotations

import json
import re
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from appliance.demo import _self_signed
from tests.scans import scan_bytes
from tests.web_box import PASSWORD, TUS, Box, Person, Served, begin, outcome, send, served, wait_for
from webui.server import connection_guard

OTHER = "127.0.0.2"  # another machine, as far as the server can tell


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Box]]:
    with served(tmp_path_factory.mktemp("slow") / "box", web_threads=8) as (server, box):
        box.person()
        yield server, box


def line_to(box: Box, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(box.base.rsplit(":", 1)[1])), source_address=(source, 0), timeout=30)


def log_in(box: Box) -> Person:
    """A clinician at a PC; fails when the box does not answer in time."""
    person = Person(box.base).speak("en")
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
def dripping(lines: list[tuple[socket.socket, bytes]], every_s: float = 0.3) -> Iterator[Callable[[], int]]:
    """Send one byte on each line now and then; gives how many of the lines the server has cut."""
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
        yield lambda: len(cut)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("source", ["127.0.0.1", OTHER])
def test_60_clients_that_never_close(site: tuple[Served, Box], source: str) -> None:
    server, box = site
    worker = worker_of(server)
    with ExitStack() as stack:
        for _ in range(60):
            line = stack.enter_context(line_to(box, source))
            line.sendall(request("GET /login HTTP/1.1\nHost: localhost\nConnection: close"))
        for _ in range(3):
            log_in(box)
        time.sleep(1)
        log_in(box)
    assert worker.is_running()
    assert worker_of(server).pid == worker.pid
    assert "WORKER TIMEOUT" not in server.log.read_text()


def test_40_clients_that_drip_head_or_body_hold_nothing_and_are_cut_off(site: tuple[Served, Box]) -> None:
    server, box = site
    worker = worker_of(server)
    person = log_in(box)
    data = scan_bytes()
    path = begin(person, "slow.dcm", len(data)).headers["Location"]
    cookie = "; ".join(f"{name}={value}" for name, value in person.cookies.get_dict().items())
    head = b"GET /login HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"y" * 1000
    kinds = [
        (b"G", head[1:]),
        (request("POST /login HTTP/1.1\nHost: localhost\nContent-Type: application/x-www-form-urlencoded\nContent-Length: 5000"), b"a"),
        (request("POST /login HTTP/1.1\nHost: localhost\nContent-Length: 5000\nExpect: 100-continue"), b"a"),
        (request("POST /api/v1/tus HTTP/1.1\nHost: localhost\nTus-Resumable: 1.0.0\nContent-Length: 5000000"), b"a"),
    ]
    with ExitStack() as stack:
        lines = []
        for number in range(40):
            begun, rest = kinds[number % len(kinds)]
            line = stack.enter_context(line_to(box, OTHER if number % 2 else "127.0.0.1"))
            line.sendall(begun)
            lines.append((line, rest))
        own = stack.enter_context(line_to(box))
        own.sendall(
            request(
                f"PATCH {path} HTTP/1.1\nHost: 127.0.0.1\nCookie: {cookie}\nX-CSRFToken: {person.token}\nTus-Resumable: 1.0.0\n"
                f"Upload-Offset: 0\nContent-Type: application/offset+octet-stream\nContent-Length: {len(data)}",
                data[:3000],
            )
        )
        lines.append((own, data[3000:]))
        with dripping(lines) as cut:
            for _ in range(5):
                log_in(box)
            wait_for(lambda: cut() == len(lines), 3 * connection_guard.HEAD_S)
            log_in(box)
    assert worker_of(server).pid == worker.pid
    wait_for(lambda: int(person.head(path, headers=TUS).headers["Upload-Offset"]) >= 3000)
    kept = int(person.head(path, headers=TUS).headers["Upload-Offset"])
    assert send(person, path, data[kept:], offset=kept).status_code == 204
    assert outcome(person, path)[0]["result"] == "stored"


def test_connections_of_one_machine_are_bounded_and_the_oldest_idle_ones_go(site: tuple[Served, Box]) -> None:
    _, box = site
    with ExitStack() as stack, selectors.DefaultSelector() as ended:
        lines = [stack.enter_context(line_to(box, OTHER)) for _ in range(connection_guard.MAX_CONNECTIONS_PER_MACHINE + 40)]
        for line in lines:
            ended.register(line, selectors.EVENT_READ)
        wait_for(lambda: len(ended.select(0.1)) >= 40)
        log_in(box)
        last = lines[-1]
        last.sendall(request("GET /healthz HTTP/1.1\nHost: localhost"))
        assert answer_of(last).startswith(b"HTTP/1.1 200")


def test_clients_that_read_nothing_leave_threads_to_others(site: tuple[Served, Box]) -> None:
    _, box = site
    large = re.findall(r"/static/viewer/upload\.js[^\"]*", log_in(box).open("/upload"))[0].replace("upload.js", "viewer.js")
    with ExitStack() as stack:
        for _ in range(30):
            line = socket.socket()
            stack.enter_context(line)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.bind((OTHER, 0))
            line.connect(("127.0.0.1", int(box.base.rsplit(":", 1)[1])))
            line.sendall(request(f"GET {large} HTTP/1.1\nHost: localhost"))
        for _ in range(3):
            log_in(box)


def test_requests_in_pieces_in_a_row_and_after_a_pause(site: tuple[Served, Box]) -> None:
    _, box = site
    health = request("GET /healthz HTTP/1.1\nHost: localhost")
    with line_to(box) as line:
        for place in range(0, len(health), 7):
            line.sendall(health[place : place + 7])
            time.sleep(0.01)
        assert answer_of(line).startswith(b"HTTP/1.1 200")
        line.sendall(health + health + health[:20])
        assert answer_of(line).startswith(b"HTTP/1.1 200")
        assert answer_of(line).startswith(b"HTTP/1.1 200")
        line.sendall(health[20:])
        assert answer_of(line).startswith(b"HTTP/1.1 200")
    with line_to(box) as line:
        form = b"username=doctor&password=wrong"
        line.sendall(request(f"POST /login HTTP/1.1\nHost: localhost\nContent-Length: {len(form)}\nExpect: 100-continue"))
        assert answer_of(line) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(form)
        answers = answer_of(line)
        while answers.endswith(b" 100 Continue\r\n\r\n"):
            answers += answer_of(line)
        assert b"HTTP/1.1 400 " in answers  # no CSRF token


def test_what_is_no_request_gets_a_plain_answer_and_is_not_quoted_in_the_log(site: tuple[Served, Box]) -> None:
    server, box = site
    for raw, status in (
        (b"CANARY CANARY CANARY\r\n\r\n", b"400"),
        (b"GET /CANARY HTTP/1.1\r\nCANARY HEADER: x\r\n\r\n", b"400"),
        (b"GET /" + b"CANARY" * 10_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nX: " + b"CANARY" * 10_000 + b"\r\n\r\n", b"431"),
        (b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"411"),
        (b"GET / CANARY/9\r\n\r\n", b"400"),
        (b"\x16\x03\x01CANARY\r\n\r\n", b"400"),
    ):
        with line_to(box) as line:
            line.sendall(raw)
            answer = line.recv(4000)
            assert answer.startswith(b"HTTP/1.1 " + status), (raw[:40], answer)
            assert b"CANARY" not in answer
    log = server.log.read_text()
    assert "CANARY" not in log
    assert "invalid request" in log
    for entry in log.splitlines():
        assert entry.startswith("Listening on ") or json.loads(entry)


def test_tls_in_pieces_and_clients_that_never_shake_hands(tmp_path: Path) -> None:
    _self_signed(tmp_path / "keys")
    pair = {"tls_certificate": str(tmp_path / "keys" / "web.crt"), "tls_key": str(tmp_path / "keys" / "web.pem")}
    with served(tmp_path / "box", web_threads=6, **pair) as (_, box), ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(line_to(box, OTHER)).sendall(b"\x16\x03\x01")
        trusted = ssl.create_default_context(cafile=pair["tls_certificate"])
        secure = trusted.wrap_socket(line_to(box), server_hostname="localhost")
        stack.enter_context(secure)
        health = request("GET /healthz HTTP/1.1\nHost: localhost")
        for _ in range(2):
            secure.sendall(health[:11])
            time.sleep(0.05)
            secure.sendall(health[11:] + health)
            assert answer_of(secure).startswith(b"HTTP/1.1 200")
            assert answer_of(secure).startswith(b"HTTP/1.1 200")
        with requests.Session() as session:
            session.trust_env, session.verify = False, pair["tls_certificate"]
            for _ in range(20):
                assert session.get(f"{box.base}/login", timeout=20).status_code == 200
        with line_to(box) as plain, pytest.raises((ConnectionError, pytest.fail.Exception)):
            plain.sendall(health)
            answer_of(plain)


def test_a_stopping_server_does_not_wait_for_silent_clients(tmp_path: Path) -> None:
    with served(tmp_path / "box", web_threads=6) as (server, box), ExitStack() as stack:
        box.person()
        for _ in range(20):
            stack.enter_context(line_to(box))
        log_in(box)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < connection_guard.HEAD_S
