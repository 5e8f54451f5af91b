"""The agent on the box against the real server: enrolment, renewal, reports, the loop, and what must never reach the wire."""

from __future__ import annotations

import json
import os
import random
import signal
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from model_sync.agent import service
from model_sync.agent.device import Device, DeviceError
from model_sync.agent.report import ReportError
from model_sync.agent.service import Agent, enrol, renew_if_due, send_report
from model_sync.errors import LibraryUnreachable, SettingsError
from model_sync.fleet.tables import boxes
from model_sync.settings import SyncSettings
from tests.support.fleet_site import ROOT, Centre, Recorder, box_report, recorded, stamp
from tests.support.library_site import tiny_bundle
from tests.support.poisoned_reports import TRACES, poisoned


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    running = Centre(tmp_path_factory.mktemp("centre"))
    running.site.publish(tiny_bundle(tmp_path_factory.mktemp("bundle"), "0.1.0"))
    running.site.rollout("stable", "cxr-pneumonia", "0.1.0")
    yield running.start("--requests-per-minute", "60000", "--reports-per-hour", "100000")
    running.close()


def settings_of(centre: Centre, directory: Path, box_id: str, **changes: Any) -> SyncSettings:
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "state_dir": directory / "state", "exchange_dir": directory / "exchange", "root": centre.site.root, "box_id": box_id,
        "urls": [centre.url], "report_url": centre.url, "ca_certificate": centre.ca, "disk_reserve_bytes": 0, "attempts": 1,
        "connect_timeout_s": 5.0, "read_timeout_s": 5.0, "backoff_s": 0.01,
    }  # fmt: skip
    settings = SyncSettings.parse(values | changes)
    settings.exchange_dir.mkdir(exist_ok=True)
    return settings


@pytest.fixture
def settings(centre: Centre, tmp_path: Path, request: pytest.FixtureRequest) -> SyncSettings:
    """An enrolled box of its own."""
    fresh = settings_of(centre, tmp_path / "box", f"box-{abs(hash(request.node.nodeid)):x}")
    enrol(fresh, centre.token(fresh.box_id))
    return fresh


def stored(centre: Centre, settings: SyncSettings) -> Any:
    with centre.fleet.reading() as tx:
        return tx.execute(select(boxes).where(boxes.c.box_id == settings.box_id)).mappings().one()


def tell(settings: SyncSettings, report: Any) -> None:
    """Write what the appliance would write."""
    raw = report if isinstance(report, bytes) else json.dumps(report).encode()
    (settings.exchange_dir / "box-report.json").write_bytes(raw)


def sync_state(settings: SyncSettings, state: str = "ok", code: str = "sync.ok", **more: Any) -> None:
    value = {"schema": 1, "at": stamp(), "box_id": settings.box_id, "state": state, "code": code, "since": stamp(-60), "received_bytes": 5}
    (settings.exchange_dir / "sync-status.json").write_text(json.dumps(value | {"message": "zhangsan", "hint": "zhangsan"} | more))


def identity(settings: SyncSettings) -> Any:
    found = Device(settings.state_dir, settings.box_id).identity()
    assert found
    return found


# -- identity


def test_the_key_is_made_here_and_is_for_the_agent_alone(settings: SyncSettings) -> None:
    for name in ("device.pem", "device-ca.pem"):
        assert stat.S_IMODE((settings.state_dir / name).stat().st_mode) == 0o600
    assert not (settings.state_dir / "device-pending.key").exists()
    assert identity(settings).certificate.subject.rfc4514_string() == f"CN={settings.box_id}"


def test_the_private_key_never_crosses_the_line(centre: Centre, tmp_path: Path) -> None:
    with Opened(centre) as door:
        settings = settings_of(centre, tmp_path / "box", "box-secret", report_url=door.url)
        door.answer = (500, b"")
        with pytest.raises(LibraryUnreachable):
            enrol(settings, "x" * 43)
    assert b"CERTIFICATE REQUEST" in bytes(door.heard)
    assert b"PRIVATE" not in bytes(door.heard)


def test_a_token_of_another_box_changes_nothing(centre: Centre, tmp_path: Path) -> None:
    settings = settings_of(centre, tmp_path / "box", "box-mine")
    with pytest.raises(DeviceError, match="not for box-mine"):
        enrol(settings, centre.token("box-yours"))
    assert Device(settings.state_dir, "box-mine").identity() is None


def test_a_wrong_token_says_to_ask_for_a_new_one(centre: Centre, tmp_path: Path) -> None:
    settings = settings_of(centre, tmp_path / "box", "box-wrong")
    with pytest.raises(DeviceError, match="used or expired") as refused:
        enrol(settings, "y" * 43)
    assert refused.value.code == "enrolment.token"


def test_an_answer_lost_on_its_way_is_asked_for_again_with_the_same_token(centre: Centre, tmp_path: Path) -> None:
    token = centre.token("box-cut")
    with recorded(int(centre.url.rpartition(":")[2])) as line:
        settings = settings_of(centre, tmp_path / "box", "box-cut", report_url=f"https://127.0.0.1:{line.port}")
        cut_after_handshake(line)
        with pytest.raises(LibraryUnreachable):
            enrol(settings, token)
        line.cut_answers = False
        enrol(settings, token)
    assert send_report(settings) == "sent"


def cut_after_handshake(line: Recorder) -> None:
    """Let TLS come up, then swallow the first answer: the wire is tripped by the request, before that is passed on."""

    class Tripwire(bytearray):
        tripped = False

        def __iadd__(self, data: Any) -> Any:
            kept = super().__iadd__(data)
            if len(self) >= 1000 and not self.tripped:
                self.tripped = line.cut_answers = True
            return kept

    line.up = Tripwire()


def test_without_https_nothing_is_sent(centre: Centre, tmp_path: Path) -> None:
    for url in (None, "http://127.0.0.1:1"):
        with pytest.raises(SettingsError, match="https"):
            enrol(settings_of(centre, tmp_path / "box", "box-plain", report_url=url), "x" * 43)


def test_another_server_with_another_certificate_is_not_spoken_to(centre: Centre, tmp_path: Path, settings: SyncSettings) -> None:
    other = Centre(tmp_path / "other").start()
    try:
        with pytest.raises(LibraryUnreachable, match="does not answer"):
            send_report(settings.model_copy(update={"report_url": other.url}))
    finally:
        other.close()


def test_a_certificate_is_renewed_in_the_second_half_of_its_life_with_a_new_key(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre").start()
    try:
        settings = settings_of(centre, tmp_path / "box", "box-1")
        enrol(settings, centre.token("box-1"))
        before = identity(settings)
        assert not renew_if_due(settings)
        centre.stop()
        centre.start(later="+20d")
        settings = settings.model_copy(update={"report_url": centre.url})
        later = datetime.now(timezone.utc) + timedelta(days=20)
        assert renew_if_due(settings, now=later)
        after = identity(settings)
        assert after.certificate.not_valid_after_utc > before.certificate.not_valid_after_utc + timedelta(days=15)
        assert after.key.public_key() != before.key.public_key()
        assert not renew_if_due(settings, now=later)
        assert send_report(settings) == "sent"
        centre.stop()
        centre.start(later="+60d")
        settings = settings.model_copy(update={"report_url": centre.url})
        with pytest.raises(DeviceError, match="expired on") as refused:
            renew_if_due(settings, now=later + timedelta(days=40))
        assert (refused.value.code, "new token" in refused.value.hint) == ("device.expired", True)
    finally:
        centre.close()


def test_a_renewal_by_another_authority_is_refused(centre: Centre, tmp_path: Path, settings: SyncSettings) -> None:
    other = Centre(tmp_path / "other")
    before = (settings.state_dir / "device.pem").read_bytes()
    device = Device(settings.state_dir, settings.box_id)
    key, _ = device.pending_request()
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

    public: Any = load_pem_private_key(key, None).public_key()
    forged = other.authority.issue(public, settings.box_id, datetime.now(timezone.utc), 30)
    with pytest.raises(DeviceError, match="not signed by the device authority"):
        device.accept_certificate(key, forged.public_bytes(Encoding.PEM).decode(), other.authority.pem, first=False)
    assert (settings.state_dir / "device.pem").read_bytes() == before
    other.close()


def test_a_damaged_identity_says_what_to_do(settings: SyncSettings) -> None:
    (settings.state_dir / "device.pem").write_bytes(b"garbage")
    with pytest.raises(DeviceError, match="damaged") as refused:
        send_report(settings)
    assert "new token" in refused.value.hint


# -- reports


def test_a_report_arrives_with_what_box_and_agent_say(centre: Centre, settings: SyncSettings) -> None:
    agent_pull(settings)
    tell(settings, box_report("0.1.0", "failed", "trust.digest"))
    assert send_report(settings) == "sent"
    row = stored(centre, settings)
    assert (row["sequence"], row["sync_state"], row["trouble"]) == (1, "ok", "trust.digest")


def test_r10_the_box_learns_which_head_of_its_audit_the_centre_has(centre: Centre, settings: SyncSettings) -> None:
    head = {"entries": 9, "digest": "cd" * 32}
    tell(settings, box_report() | {"audit": {"head": head, "anchors": []}})
    assert send_report(settings) == "sent"
    assert json.loads((settings.exchange_dir / "audit-anchor.json").read_text()) == head
    assert json.loads(stored(centre, settings)["audit_heads"])["heads"] == [[9, "cd" * 32]]
    tell(settings, box_report() | {"audit": {"head": head | {"entries": 8}, "anchors": []}})
    assert send_report(settings) == "sent"
    assert stored(centre, settings)["audit_state"] == "backwards"


def agent_pull(settings: SyncSettings) -> None:
    from model_sync.agent.client import Client

    Client(settings).pull()


def test_without_an_identity_or_a_server_nothing_is_sent(centre: Centre, tmp_path: Path, settings: SyncSettings) -> None:
    assert send_report(settings_of(centre, tmp_path / "new", "box-new")) == "not_enrolled"
    assert send_report(settings.model_copy(update={"report_url": None})) == "no_server"


def test_a_report_whose_answer_was_lost_is_sent_again_byte_for_byte(centre: Centre, settings: SyncSettings) -> None:
    sync_state(settings)
    with Opened(centre) as door:
        broken = settings.model_copy(update={"report_url": door.url})
        door.answer = None  # heard, never answered
        with pytest.raises(LibraryUnreachable):
            send_report(broken)
        assert len(door.bodies) == 2
        door.answer = (204, b"")
        assert send_report(broken) == "sent"
    assert door.bodies[0] == door.bodies[1] == door.bodies[2]


def test_after_a_time_offline_the_newest_state_is_told_under_a_new_number(centre: Centre, settings: SyncSettings) -> None:
    sync_state(settings)
    offline = settings.model_copy(update={"report_url": "https://127.0.0.1:1"})
    for _ in range(3):
        with pytest.raises(LibraryUnreachable):
            send_report(offline)
    sync_state(settings, "untrusted", "trust.expired")
    assert send_report(settings) == "sent"
    row = stored(centre, settings)
    assert (row["sequence"], row["sync_state"], row["sync_code"]) == (2, "untrusted", "trust.expired")


def test_a_box_that_lost_its_count_goes_on_where_the_centre_stands(centre: Centre, settings: SyncSettings) -> None:
    for _ in range(3):
        assert send_report(settings) == "sent"
    (settings.state_dir / "report.json").unlink()
    assert send_report(settings) == "sent"
    assert stored(centre, settings)["sequence"] == 4
    (settings.state_dir / "report.json").write_bytes(b"\x00garbage")
    assert send_report(settings) == "sent"
    assert stored(centre, settings)["sequence"] == 5


def test_the_number_is_on_the_disk_before_the_report_is_on_the_wire(centre: Centre, settings: SyncSettings) -> None:
    seen: list[int] = []
    with Opened(centre) as door:
        door.on_body = lambda _: seen.append(json.loads((settings.state_dir / "report.json").read_text())["sequence"])
        door.answer = (204, b"")
        send_report(settings.model_copy(update={"report_url": door.url}))
        assert seen == [json.loads(door.bodies[0])["signed"]["sequence"]]


def test_the_agent_killed_at_any_moment_of_a_report_never_uses_a_number_twice(
    centre: Centre, settings: SyncSettings, tmp_path: Path
) -> None:
    code = (
        "import sys, json, pathlib; from model_sync.settings import SyncSettings; from model_sync.agent.service import send_report\n"
        "s = SyncSettings.parse(json.loads(sys.argv[1])); p = pathlib.Path(s.exchange_dir, 'sync-status.json'); n = int(sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    n += 1; p.write_text(json.dumps({'state': 'ok', 'code': 'sync.ok', 'received_bytes': n})); send_report(s)\n"
    )
    values = json.dumps(settings.model_dump(mode="json"))
    with Opened(centre) as door:
        door.answer = (204, b"")
        told = json.dumps(json.loads(values) | {"report_url": door.url})
        for attempt in range(6):
            process = subprocess.Popen([sys.executable, "-c", code, told, str(attempt * 10_000)], cwd=ROOT, stdout=subprocess.PIPE)
            assert process.stdout
            process.stdout.readline()
            heard = len(door.bodies)
            until(lambda heard=heard: len(door.bodies) > heard)  # type: ignore[misc]
            time.sleep(random.random() * 0.05)
            process.kill()
            process.wait()
            process.stdout.close()
    by_number: dict[int, set[bytes]] = {}
    for body in door.bodies:
        by_number.setdefault(json.loads(body)["signed"]["sequence"], set()).add(body)
    assert len(by_number) >= 6
    assert all(len(bodies) == 1 for bodies in by_number.values())


@pytest.mark.parametrize(
    ("status", "body", "kind", "error"),
    [
        (200, b"<html>Log in to the network</html>", "text/html", LibraryUnreachable),
        (302, b"", "text/html", LibraryUnreachable),
        (500, b"{}", "application/problem+json", LibraryUnreachable),
        (503, b'{"code": "server.database"}', "application/problem+json", LibraryUnreachable),
        (429, b'{"code": "report.rate"}', "application/problem+json", LibraryUnreachable),
        (409, b'{"code": "report.sequence", "expected": "x"}', "application/problem+json", LibraryUnreachable),
        (409, b'{"code": "report.sequence", "expected": 1}', "application/problem+json", LibraryUnreachable),
        (422, b'{"code": "report.invalid", "detail": "no"}', "application/problem+json", ReportError),
        (403, b'{"code": "enrolment.denied", "detail": "\\u001b[2Jdenied"}', "application/problem+json", DeviceError),
        (200, b"[" * 100_000, "application/json", LibraryUnreachable),
    ],
)
def test_whatever_answers_the_report_is_kept_and_the_error_is_coded(
    centre: Centre, settings: SyncSettings, status: int, body: bytes, kind: str, error: type[Exception]
) -> None:
    with Opened(centre) as door:
        door.answer, door.kind = (status, body), kind
        with pytest.raises(error) as raised:
            send_report(settings.model_copy(update={"report_url": door.url}))
    assert "\x1b" not in str(raised.value)
    assert json.loads((settings.state_dir / "report.json").read_text())["body"]
    assert send_report(settings) == "sent"


# -- the canary


def test_r18_no_patient_reaches_the_wire_whatever_the_box_report_says(centre: Centre, settings: SyncSettings) -> None:
    """Every poisoned report through the real agent, with every byte that leaves it recorded in the clear."""
    agent_pull(settings)
    sync_state(settings, message="zhangsan 1990-03-07", hint="zhangsan", lines={"zhangsan": {"version": "zhangsan"}})
    count = 0
    with Opened(centre) as door:
        door.answer = (204, b"")
        told = settings.model_copy(update={"report_url": door.url})
        for raw in poisoned():
            tell(settings, raw)
            assert send_report(told) == "sent"
            count += 1
    heard = bytes(door.heard)
    assert count > 150
    assert len(door.bodies) == count
    assert not TRACES.search(heard)
    assert b"cxr-pneumonia" in heard  # the recorder does hear what is sent
    assert b"box_report.invalid" in heard


def test_r18_the_same_over_the_real_server_and_into_its_database(centre: Centre, settings: SyncSettings) -> None:
    agent_pull(settings)
    with recorded(int(centre.url.rpartition(":")[2])) as line:
        told = settings.model_copy(update={"report_url": f"https://127.0.0.1:{line.port}"})
        for raw in list(poisoned())[::12]:
            tell(settings, raw)
            assert send_report(told) == "sent"
            assert not TRACES.search(json.dumps(dict(stored(centre, settings))).encode())
    assert line.total > 10_000
    assert not TRACES.search(bytes(line.up))


def test_a_box_report_that_is_no_file_or_too_large_is_not_read(settings: SyncSettings) -> None:
    path = settings.exchange_dir / "box-report.json"
    os.mkfifo(path)
    assert service.build_report(settings, 1).box_code == "box_report.unreadable"
    path.unlink()
    tell(settings, b" " * 300_000)
    assert service.build_report(settings, 1).box_code == "box_report.invalid"
    path.unlink()
    path.symlink_to(settings.state_dir / "device.pem")  # a box account that would like to see the agent's key on the wire
    assert service.build_report(settings, 1).box_code == "box_report.unreadable"


# -- the loop


def test_the_pauses_are_spread_around_the_interval(settings: SyncSettings) -> None:
    draws = iter([0.0, 0.5, 0.999])
    loop = Agent(settings.model_copy(update={"poll_interval_s": 900.0, "poll_jitter": 0.2}), threading.Event(), draw=lambda: next(draws))
    assert [round(loop.pause_s()) for _ in range(3)] == [720, 900, 1080]


def test_a_loop_whose_every_step_fails_goes_on(settings: SyncSettings) -> None:
    stop, count = threading.Event(), []

    def pull() -> None:
        count.append(1)
        if len(count) == 5:
            stop.set()
        raise (LibraryUnreachable("x", hint="y"), ZeroDivisionError(), OSError(28, "full"), ReportError("report.invalid", "x", hint="y"))[
            len(count) % 4
        ]

    Agent(settings.model_copy(update={"poll_interval_s": 0.01, "report_url": "https://127.0.0.1:1"}), stop, pull=pull).work(at_once=True)
    assert len(count) == 5


def test_the_first_look_waits_for_its_turn_unless_told_otherwise(settings: SyncSettings) -> None:
    ticks, looks, stop = [0.0], [], threading.Event()

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            ticks[0] += timeout or 0.001
            return stop.is_set()

    def pull() -> None:
        looks.append(ticks[0])
        stop.set()

    loop = Agent(settings.model_copy(update={"report_url": None}), Clock(), pull=pull, draw=lambda: 0.5, ticks=lambda: ticks[0])
    loop.work()
    assert looks[0] == pytest.approx(450, abs=1)


def test_news_are_told_at_once_and_silence_is_broken_after_the_interval(centre: Centre, settings: SyncSettings) -> None:
    ticks, stop, sent = [0.0], threading.Event(), []
    on_trial = box_report("0.1.0", "trial")  # once: the time of an activation is news, and a second may pass between two
    plan: dict[int, Callable[[], None]] = {
        5: lambda: tell(settings, on_trial),
        10: lambda: tell(settings, on_trial | {"health": {**on_trial["health"], "waiting_jobs": 9}}),
        15: lambda: sync_state(settings, "unreachable", "sync.unreachable"),
        210: stop.set,
    }

    class Clock(threading.Event):
        def __init__(self) -> None:
            super().__init__()
            self.waits = 0

        def is_set(self) -> bool:
            return stop.is_set()

        def wait(self, timeout: float | None = None) -> bool:
            ticks[0] += timeout or 0.001
            self.waits += 1
            sent.append(stored(centre, settings)["sequence"])
            plan.get(self.waits, lambda: None)()
            return stop.is_set()

    agent_pull(settings)
    tuned = settings.model_copy(update={"poll_interval_s": 1e9, "report_interval_s": 3600.0})
    Agent(tuned, Clock(), pull=lambda: None, draw=lambda: 0.5, ticks=lambda: ticks[0]).work()
    assert sent[1:5] == [1, 1, 1, 1]  # the first report, then nothing new
    assert sent[5:10] == [2] * 5  # a model on trial: told at the next look
    assert sent[10:15] == [2] * 5  # a count alone is no news
    assert sent[15] == 3  # the library is away: told
    assert sent[-1] == 4  # an hour of silence is broken


class Opened:
    """A TLS server with the centre's certificate that does as it is told and keeps every byte of every request in the clear."""

    def __init__(self, centre: Centre) -> None:
        self.answer: tuple[int, bytes] | None = (204, b"")
        self.kind = "application/json"
        self.heard, self.bodies = bytearray(), []
        self.on_body: Callable[[bytes], None] = lambda _: None
        door = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                door.heard += self.raw_requestline + bytes(self.headers) + body
                door.on_body(body)
                door.bodies.append(body)
                if door.answer is None:
                    self.close_connection = True
                    return
                self.send_response(door.answer[0])
                if door.answer[0] != 204:
                    self.send_header("Content-Type", door.kind)
                    self.send_header("Content-Length", str(len(door.answer[1])))
                self.end_headers()
                if door.answer[0] != 204:
                    self.wfile.write(door.answer[1])

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(centre.directory / "tls.pem", centre.directory / "tls.key")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Opened:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def write_config(settings: SyncSettings, path: Path) -> Path:
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.model_dump(mode="json").items() if value is not None]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_agent_pulls_and_reports_and_stops_when_asked(centre: Centre, settings: SyncSettings, tmp_path: Path) -> None:
    config = write_config(settings.model_copy(update={"poll_interval_s": 0.5, "report_interval_s": 1.0}), tmp_path / "sync.toml")
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.agent_process", str(config), "--now"], cwd=ROOT, stdout=stream, stderr=stream
        )
    try:
        until(lambda: (settings.exchange_dir / "directives.json").is_file())
        until(lambda: stored(centre, settings)["sequence"] >= 2)
    finally:
        process.terminate()
    assert process.wait(30) == 0, log.read_text()
    assert stored(centre, settings)["sync_state"] == "ok"
    assert "Traceback" not in log.read_text()


def test_sigterm_ends_a_download_that_stands_still(centre: Centre, settings: SyncSettings, tmp_path: Path) -> None:
    """A server that sends half of a file and falls silent: the agent stops long before any timeout of the line."""

    class Stalled(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep quiet."""

        def do_GET(self) -> None:
            waiting.set()
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"{")
            released.wait(120)

    waiting, released = threading.Event(), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stalled)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stalled = settings.model_copy(update={"urls": [f"http://127.0.0.1:{server.server_address[1]}"], "read_timeout_s": 100.0})
    config = write_config(stalled, tmp_path / "sync.toml")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.agent_process", str(config), "--now"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert waiting.wait(60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0  # far below the hundred seconds of silence that the line may have
    finally:
        process.kill()
        released.set()
        server.shutdown()
        server.server_close()
