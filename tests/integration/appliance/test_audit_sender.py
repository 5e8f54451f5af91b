"""The audit reaches a real syslog server over TLS, whatever happens to it meanwhile, and nobody else (R12; RFC 5424, RFC 5425)."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from lxml import etree

from appliance.cli.main import main
from appliance.core.settings import Settings
from appliance.service.audit_sender import AuditSender, frame, split_destination
from appliance.service.supervisor import Supervisor
from appliance.store import audit
from appliance.store.store import Store
from tests.support.audit_damage import FIRST, LAST, damage_entries
from tests.support.fleet_site import make_tls

SCHEMA = etree.RelaxNG(etree.parse(Path(__file__).parents[2] / "support" / "audit_message.rng"))
_HEAD = re.compile(rb'<(\d+)>1 (\S+) (\S+) clinicbox - DICOM\+RFC3881 \[meta sequenceId="(\d+)"\] \xef\xbb\xbf(.*)', re.DOTALL)


class SyslogServer:
    """A server of RFC 5425: counts octets, keeps every message; can be set to read nothing."""

    def __init__(self, tls: Path, port: int = 0, *, reads: bool = True, host: str = "127.0.0.1") -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(tls / "tls.pem", tls / "tls.key")
        self._listener = socket.create_server((host, port))
        self.port = self._listener.getsockname()[1]
        self.messages: dict[int, bytes] = {}
        self.received = 0
        self._reads, self._open = reads, True
        self._peers: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while self._open:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self._peers.append(plain)
            try:
                with self._context.wrap_socket(plain, server_side=True) as peer:
                    self._peers.append(peer)
                    self._read(peer)
            except OSError:
                continue

    def _read(self, peer: ssl.SSLSocket) -> None:
        if not self._reads:
            while self._open:
                time.sleep(0.01)
            return
        stream = peer.makefile("rb")
        while length := _number(stream.read):
            body = stream.read(length)
            if len(body) < length:
                return
            head = _HEAD.fullmatch(body)
            assert head, body[:200]
            self.messages[int(head[4])] = body
            self.received += 1

    def stop(self) -> None:
        """Go away at once, as after a power cut: what was not read is lost."""
        self._open = False
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self._peers:
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._thread.join()
        for peer in self._peers:
            peer.close()


def _number(read: Callable[[int], bytes]) -> int:
    """The length before a message: digits and one space."""
    digits = b""
    while (byte := read(1)).isdigit():
        digits += byte
    return int(digits or 0)


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    make_tls(tmp_path / "tls")
    return tmp_path / "tls"


@pytest.fixture
def store(settings: Settings, tls: Path) -> Iterator[Store]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = Store(settings.model_copy(update={"audit_syslog": f"127.0.0.1:{port}", "audit_syslog_ca": tls / "tls-ca.pem"}))
    yield made
    made.close()


def port(store: Store) -> int:
    return split_destination(store.settings.audit_syslog)[1]


def write(store: Store, count: int) -> None:
    with store.database.transaction() as tx:
        for number in range(count):
            store.database.audit(tx, audit.SECURITY_ALERT, "t", "E", f"x:{number}", 4, code="张三")


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_r12_every_entry_arrives_as_a_valid_message_of_the_standard(store: Store, tls: Path) -> None:
    write(store, 250)
    server = SyslogServer(tls, port(store))
    sender = AuditSender(store, settle_s=0)
    try:
        assert sender.step()  # more than one batch
        assert not sender.step()
        until(lambda: len(server.messages) == 250)
    finally:
        sender.close()
        server.stop()
    assert sender.arrived() == 250
    for body in server.messages.values():
        head = _HEAD.fullmatch(body)
        assert head
        assert head[1] == b"84"  # facility 10, severity 4
        SCHEMA.assertValid(etree.fromstring(head[5].decode()))


def test_r12_damaged_entries_are_sent_as_alerts_and_those_after_them_follow(store: Store, tls: Path) -> None:
    write(store, LAST + 1)
    damage_entries(store.settings.data_dir)
    server = SyslogServer(tls, port(store))
    sender = AuditSender(store, settle_s=0)
    try:
        assert not sender.step()
        until(lambda: len(server.messages) == LAST + 1)
    finally:
        sender.close()
        server.stop()
    assert sender.arrived() == LAST + 1
    for number in range(FIRST, LAST + 1):
        head = _HEAD.fullmatch(server.messages[number])
        assert head
        assert head[1] == b"82"  # severity 2: critical
        message = etree.fromstring(head[5].decode())
        SCHEMA.assertValid(message)
        assert message.findtext("EventIdentification/EventOutcomeDescription") == audit.UNREADABLE


def test_r12_a_damaged_cursor_sends_every_entry_again(store: Store) -> None:
    with store.database.transaction() as tx:
        tx.execute("INSERT INTO meta VALUES ('audit_sent', ?)", (f"{store.settings.audit_syslog} seven",))
    assert AuditSender(store).arrived() == 0


def test_r12_a_server_that_goes_away_and_comes_back_gets_every_entry(store: Store, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.service.audit_sender._TIMEOUT_S", 1.0)
    now = [0.0]
    sender = AuditSender(store, clock=lambda: now[0])
    got: set[int] = set()
    write(store, 30)
    for reads in (True, False, True, False, True):  # one that reads nothing has acknowledged by TCP what it then loses
        server = SyslogServer(tls, port(store), reads=reads)
        sender.step()
        write(store, 20)
        sender.step()
        if reads:
            until(lambda server=server: server.received >= 20)
        got |= server.messages.keys()
        server.stop()
        write(store, 20)
        sender.step()
        now[0] += 100
        assert sender.arrived() == 0 or sender.arrived() in got
    last = audit.head(store.database.connection()).seq
    server = SyslogServer(tls, port(store))
    while sender.step():
        pass
    until(lambda: last in server.messages)
    now[0] += 100
    sender.step()
    assert sender.arrived() == last
    sender.close()
    server.stop()
    assert got | server.messages.keys() == set(range(1, last + 1))


def test_r12_forty_days_without_the_server_lose_nothing(store: Store, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.store.audit.utc_now", lambda: "2026-01-01T00:00:00.000+00:00")
    write(store, 300)
    monkeypatch.undo()
    sender = AuditSender(store, settle_s=0)
    assert not sender.step()
    sender.close()
    server = SyslogServer(tls, port(store))
    again = AuditSender(store, settle_s=0)
    while again.step():
        pass
    until(lambda: len(server.messages) == 300)
    again.close()
    server.stop()


@pytest.mark.parametrize(("wrong", "host"), [("authority", "127.0.0.1"), ("name", "127.0.0.2")])
def test_r12_a_wrong_certificate_gets_nothing_and_the_error_is_plain(
    store: Store, settings: Settings, tls: Path, tmp_path: Path, wrong: str, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(store, 3)
    if wrong == "authority":
        make_tls(tmp_path / "other")
        tls = tmp_path / "other"
    store.settings = store.settings.model_copy(update={"audit_syslog": f"{host}:{port(store)}"})
    server = SyslogServer(tls, port(store), host=host)
    sender = AuditSender(store, settle_s=0)
    try:
        assert not sender.step()
    finally:
        sender.close()
        server.stop()
    assert server.messages == {}
    assert sender.arrived() == 0
    (entry,) = store.database.query("SELECT entry FROM audit WHERE entry LIKE '%audit.certificate%'")
    assert '"110126"' in entry["entry"]
    toml = f'audit_syslog = "{store.settings.audit_syslog}"\naudit_syslog_ca = "{store.settings.audit_syslog_ca}"\n'
    (settings.data_dir / "box.toml").write_text(toml)
    assert main(["audit", "status", "--data-dir", str(settings.data_dir)]) == 1
    shown = capsys.readouterr()
    assert "0 entries have arrived, 4 wait" in shown.out
    assert "certificate is not trusted" in shown.err


def test_r12_the_supervisor_runs_the_sender_where_a_server_is_configured(
    store: Store, settings: Settings, tls: Path, tmp_path: Path
) -> None:
    without = Supervisor(settings, tmp_path / "box.log")
    without.stop()
    assert [child.name for child in without.children] == ["worker", "receiver", "web"]
    write(store, 5)
    server = SyslogServer(tls, port(store))
    supervisor = Supervisor(store.settings, tmp_path / "box.log")
    toml = f'audit_syslog = "{store.settings.audit_syslog}"\naudit_syslog_ca = "{store.settings.audit_syslog_ca}"\n'
    (settings.data_dir / "box.toml").write_text(toml)
    supervisor.children = [child for child in supervisor.children if child.name == "audit-sender"]
    supervisor.start()
    try:
        until(lambda: supervisor.tick() or len(server.messages) >= 5)
    finally:
        supervisor.stop()
        server.stop()


@pytest.mark.parametrize(
    ("text", "split"),
    [("logs.example", ("logs.example", 6514)), ("10.0.0.1:514", ("10.0.0.1", 514)), ("[2001:db8::1]", ("2001:db8::1", 6514)),
     ("[2001:db8::1]:99", ("2001:db8::1", 99))],
)  # fmt: skip
def test_r12_the_setting_names_host_and_port(text: str, split: tuple[str, int]) -> None:
    assert split_destination(text) == split


def test_r12_nothing_is_sent_by_default(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Store(settings)):
        assert settings.audit_syslog == ""
    assert main(["send-audit", "--data-dir", str(settings.data_dir)]) == 2
    assert main(["audit", "status", "--data-dir", str(settings.data_dir)]) == 0


def test_r12_the_length_before_a_message_counts_octets(store: Store) -> None:
    write(store, 1)
    (row,) = store.database.query("SELECT entry FROM audit")
    length, _, body = frame(json.loads(row["entry"]), "<é/>", "box").partition(b" ")
    assert int(length) == len(body)
