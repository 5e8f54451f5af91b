"""A central server with everything real: TLS certificates, device authority, database (SQLite or PostgreSQL), and boxes that ask it."""

from __future__ import annotations

import contextlib
import glob
import ipaddress
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psycopg
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from securesystemslib.signer import CryptoSigner

from model_sync.agent.device import make_certificate_request
from model_sync.agent.report import StatusReport, sign
from model_sync.errors import SettingsError
from model_sync.fleet.accounts import Accounts
from model_sync.fleet.database import Fleet
from model_sync.fleet.enrolment import DeviceAuthority, new_token
from model_sync.library.keys import public_path, write_public
from tests.support.certificates import authority_usage
from tests.support.library_site import Site, make_site

ROOT = Path(__file__).resolve().parents[2]
PASSPHRASE = "correct horse battery"
DIGEST = "ab" * 32
NOW = "2026-03-01T08:00:00Z"


def make_tls(directory: Path) -> None:
    """Write ``tls-ca.pem``, ``tls.pem`` and ``tls.key`` for 127.0.0.1, valid for twenty years."""
    directory.mkdir(parents=True, exist_ok=True)
    begin, end = datetime.now(timezone.utc) - timedelta(days=400), datetime.now(timezone.utc) + timedelta(days=7000)
    authority, key = generate_private_key(SECP256R1()), generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test TLS authority")])

    def build(subject: x509.Name, public: Any) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)
        return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)

    top = (
        build(name, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(authority_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, SHA256())
    )
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    own = build(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), key.public_key())
    leaf = own.add_extension(names, critical=False).sign(authority, SHA256())
    (directory / "tls-ca.pem").write_bytes(top.public_bytes(Encoding.PEM))
    (directory / "tls.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    (directory / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


class Postgres:
    """A PostgreSQL cluster of the test's own, on a unix socket in a folder of its own."""

    def __init__(self) -> None:
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
        assert found, "PostgreSQL is missing: run `make setup-test`"
        self._bin = Path(found[-1]).parent
        self.directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        if os.geteuid() == 0:  # the server refuses to run as root
            shutil.chown(self.directory, "postgres", "postgres")
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", str(self.directory / "data"))
        options = f"-c listen_addresses= -c unix_socket_directories={self.directory} -c fsync=off"
        self._run("pg_ctl", "-D", str(self.directory / "data"), "-o", options, "-w", "-l", str(self.directory / "log"), "start")
        self._count = 0

    def _run(self, tool: str, *arguments: str) -> None:
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        subprocess.run(
            [str(self._bin / tool), *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **as_user
        )

    def database(self) -> str:
        """Make an empty database and return its address."""
        self._count += 1
        self.sql(f"CREATE DATABASE fleet{self._count}")
        return f"postgresql+psycopg://postgres@/fleet{self._count}?host={self.directory}"

    def sql(self, statement: str) -> None:
        """Run one statement as the cluster's administrator."""
        with psycopg.connect(f"host={self.directory} user=postgres dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[arg-type]  # a statement of the test's own

    def stop(self) -> None:
        """Stop it and remove its files."""
        self._run("pg_ctl", "-D", str(self.directory / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(self.directory)


class Centre:
    """Everything that the central team has, and its server as a process."""

    def __init__(self, directory: Path, db: str | None = None, *, rollout_key: bool = False) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        make_tls(directory)
        self.site: Site = make_site(directory / "library")
        self.authority = DeviceAuthority.create(directory / "device-ca", PASSPHRASE)
        (directory / "passphrase").write_text(PASSPHRASE + "\n")
        (directory / "passphrase").chmod(0o600)
        self.db = db or f"sqlite:///{directory}/fleet.db"
        self.fleet = Fleet(self.db)
        self.ca = directory / "tls-ca.pem"
        self.rollout_key = self._write_keys() if rollout_key else None
        self.process: subprocess.Popen[str] | None = None
        self.url = ""
        self.log = directory / "server.log"

    def _write_keys(self) -> Path:
        """Lay the library's online keys and the rollout key as encrypted files."""
        online = self.site.library.files.online
        for role, path in (
            ("snapshot", online / "snapshot.pem"),
            ("timestamp", online / "timestamp.pem"),
            ("rollout", self.directory / "r.pem"),
        ):
            key = load_pem_private_key(self.site.holders[role][0].private_bytes, None)
            write_public(public_path(path), self.site.holders[role][0].public_key, role)
            path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE.encode())))
        return self.directory / "r.pem"

    def start(self, *options: str, later: str = "", tls: bool = True, port: int = 0) -> Centre:
        """Start the server; ``later`` (such as ``+20d``) is how far its clock is ahead."""
        command = [sys.executable, "-m", "tests.support.fleet_server", str(self.site.library.files.directory)]
        command += ["--db", self.db, "--port", str(port)]
        command += ["--device-ca", str(self.directory / "device-ca"), "--passphrase-file", str(self.directory / "passphrase")]
        if tls:
            command += ["--tls-certificate", str(self.directory / "tls.pem"), "--tls-key", str(self.directory / "tls.key")]
        if self.rollout_key is not None:
            command += ["--rollout-key", str(self.rollout_key)]
        if later:
            command = ["faketime", "-m", "-f", later, *command]
        environment = os.environ | {"FAKETIME_DONT_RESET": "1", "NO_FAKE_STAT": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command + list(options), cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
            )
        assert self.process.stdout
        line = self.process.stdout.readline()
        found = re.search(r"https?://[\w.]+:(\d+)", line)
        assert found, f"the server did not start: {line}{self.log.read_text()}"
        self.url = found[0]
        return self

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Stop the server."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)  # the worker too, and what faketime started
        self.process.wait(30)
        assert self.process.stdout
        self.process.stdout.close()
        self.process = None

    def close(self) -> None:
        """Stop the server and let go of the database."""
        self.stop()
        self.fleet.close()

    def token(self, box_id: str, ring: str = "stable", hours: float = 1) -> str:
        """Make a token."""
        return new_token(self.fleet, box_id, ring, hours=hours)

    def operator(self, name: str = "wang") -> str:
        """Make an operator, or reset the one there is, and return the password."""
        accounts = Accounts(self.fleet)
        try:
            return accounts.add(name)
        except SettingsError:
            return accounts.reset(name)

    def box(self, box_id: str, ring: str = "stable") -> Box:
        """Enrol a box over the wire."""
        return Box(self, box_id, ring).enrol(self.token(box_id, ring))

    def post(self, path: str, **options: Any) -> requests.Response:
        """Ask without a certificate."""
        return requests.post(f"{self.url}{path}", verify=str(self.ca), timeout=20, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """Ask without a certificate."""
        return requests.get(f"{self.url}{path}", verify=str(self.ca), timeout=20, **options)


class Box:
    """A box made of ``requests``: what the agent does on the wire, by hand."""

    def __init__(self, centre: Centre, box_id: str, ring: str = "stable") -> None:
        self.centre, self.box_id, self.ring = centre, box_id, ring
        self.key, self.csr = make_certificate_request(box_id)
        self.file = centre.directory / f"{box_id}-{id(self):x}.pem"

    def enrol(self, token: str) -> Box:
        """Take a certificate."""
        answer = self.centre.post("/api/v1/enrol", json={"token": token, "csr_pem": self.csr})
        assert answer.status_code == 200, answer.text
        self.keep(answer.json())
        return self

    def keep(self, answer: dict[str, str]) -> None:
        """Write key and certificate where ``requests`` reads them."""
        assert answer["box_id"] == self.box_id
        self.file.write_bytes(self.key + answer["certificate_pem"].encode())

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.file.read_bytes())

    @property
    def signer(self) -> CryptoSigner:
        return CryptoSigner(load_pem_private_key(self.key, None))  # type: ignore[arg-type]

    def report(self, sequence: int, **changes: Any) -> bytes:
        """Return a signed report."""
        return sign(StatusReport.model_validate_json(status_json(self.box_id, sequence, **({"ring": self.ring} | changes))), self.signer)

    def send(self, body: bytes, **options: Any) -> requests.Response:
        """Post a report with the certificate."""
        options = {"headers": {"Content-Type": "application/json"}} | options
        return self.centre.post("/api/v1/reports", data=body, cert=str(self.file), **options)

    def renew(self, csr: str | None = None) -> requests.Response:
        """Ask for a new certificate with the old one."""
        return self.centre.post("/api/v1/renew", json={"csr_pem": csr or self.csr}, cert=str(self.file))


class Person(requests.Session):
    """An operator at a browser."""

    def __init__(self, centre: Centre, language: str = "en") -> None:
        super().__init__()
        self.trust_env = False
        self.verify = str(centre.ca) if centre.url.startswith("https") else True
        self.base = centre.url
        self.cookies.set("lang", language)

    def see(self, path: str = "/fleet") -> str:
        answer = self.get(self.base + path, timeout=30)
        assert answer.status_code == 200, answer.text
        self.csrf = re.findall(r'name="csrf_token" value="([^"]+)"', answer.text)[0]
        self.seen = dict(re.findall(r'name="(version|serial|failed)" value="([^"]+)"', answer.text))
        return answer.text

    def submit(self, path: str, **fields: str) -> requests.Response:
        return self.post(self.base + path, data={"csrf_token": self.csrf} | self.seen | fields, timeout=30, allow_redirects=False)

    def log_in(self, name: str, password: str) -> requests.Response:
        self.see("/fleet/login")
        return self.submit("/fleet/login", name=name, password=password)


def status_json(box_id: str, sequence: int, ring: str = "stable", /, **changes: Any) -> str:
    """Return a valid status report as JSON; ``changes`` replace its top fields."""
    document: dict[str, Any] = {
        "schema": 1, "box_id": box_id, "sequence": sequence, "at": stamp(), "agent_version": "0.1.0", "ring": ring,
        "sync": {"state": "ok", "code": "ok", "since": stamp(-600), "last_success_at": stamp(-60), "received_bytes": 28_000_000},
        "box": box_report(), "box_code": "",
    }  # fmt: skip
    return json.dumps(document | changes)


def box_report(version: str = "0.1.0", state: str = "good", code: str | None = None, at: str | None = None) -> dict[str, Any]:
    """Return a valid box report with one activation."""
    model = {"line": "cxr-pneumonia", "version": version, "digest": DIGEST, "state": "active", "precision": "int8"}
    activation = {"line": "cxr-pneumonia", "version": version, "digest": DIGEST, "state": state, "code": code, "at": at or stamp(-60)}
    running = [model | {"runtime": "onnxruntime 1.20.1"}] if state in ("good", "trial") else []
    return {
        "schema": 1, "at": stamp(), "appliance_version": "0.1.0", "models": running,
        "activations": [activation],
        "health": {"waiting_jobs": 2, "failed_jobs_24h": 1, "analysed_24h": 140, "disk_free_bytes": 41_000_000_000},
    }  # fmt: skip


def stamp(seconds: float = 0) -> str:
    """Return a moment from now in the form of reports."""
    return datetime.fromtimestamp(time.time() + seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Recorder:
    """A TCP proxy that keeps every byte of both directions."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.up, self.down = bytearray(), bytearray()
        self.connections = 0
        self.cut_answers = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._pump, args=(client, server, self.up, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, self.down, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, kept: bytearray, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                kept += data
                if answers and self.cut_answers:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    @property
    def total(self) -> int:
        return len(self.up) + len(self.down)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


@contextmanager
def recorded(port: int) -> Iterator[Recorder]:
    """Record what goes to a port of this machine and back."""
    recorder = Recorder(port)
    try:
        yield recorder
    finally:
        recorder.close()
