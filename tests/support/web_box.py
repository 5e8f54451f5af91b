"""A box's pages for tests: served in this process or by gunicorn in its own, and a browser made of ``requests``."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pyotp
import pytest
import requests
from argon2 import PasswordHasher
from jinja2.bccache import Bucket
from werkzeug.serving import make_server

from appliance.core.applicable_accuracy import MIXED_AGES, Accuracy
from appliance.core.domain import Finding, JobResult, Note, ScanState, Source
from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.ingest.ingest import Ingest
from appliance.store import passwords
from appliance.store.accounts import Accounts
from appliance.store.logins import Logins
from appliance.store.store import Store
from model_sync.bundle import Manifest
from model_sync.login_throttle import LoginQueue, LoginThrottle
from webui import create_app
from webui.context import BoxContext

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "Spring-4-Rain"
TUS = {"Tus-Resumable": "1.0.0"}
HOSTILE = "<script>alert(1)</script>\"'&{{7*191}}"
QUICK_HASHER = PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1)
_TOKEN = re.compile(r'name="csrf-token" content="([^"]+)"')


class Person(requests.Session):
    """Somebody at a browser; ``get`` and ``post`` take a path of the box and never follow redirects by themselves."""

    def __init__(self, base: str, trusted: Path | None = None) -> None:
        super().__init__()
        self.base = base
        if trusted is not None:
            self.verify = str(trusted)
        self.trust_env = False
        self.token = ""

    def request(self, method: Any, url: Any, *args: Any, **options: Any) -> requests.Response:
        """One request to the box with the CSRF token, as the page's scripts send it."""
        options["allow_redirects"] = False
        options.setdefault("timeout", 30)
        if method != "GET" and self.token:
            options["headers"] = {"X-CSRFToken": self.token} | (options.get("headers") or {})
        return super().request(method, url if str(url).startswith("http") else self.base + str(url), *args, **options)

    def open(self, path: str) -> str:
        """A page as a person sees it; keeps its CSRF token."""
        answer = self.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.headers.get('Location')}"
        self.token = _TOKEN.findall(answer.text)[0]
        return answer.text

    def log_in(self, username: str, password: str) -> requests.Response:
        """Fill in the login page."""
        self.open("/login")
        return self.post("/login", data={"username": username, "password": password})

    def speak(self, language: str) -> Person:
        """Switch the language."""
        self.cookies.set("lang", language)
        return self


def own_password(accounts: Accounts, username: str, role: Role | str = Role.CLINICIAN) -> str:
    """Create an account, or reset that of this name, with a password that need not be changed; returns it."""
    if accounts.find(username) is None:
        one_time = accounts.add(username, role, "test")
    else:
        one_time = accounts.issue_one_time_password(username, "test")
    accounts.change_password(accounts.require(username), one_time, PASSWORD)
    return PASSWORD


class Box:
    """A running box with its store at hand."""

    def __init__(self, settings: Settings, base: str, store: Store, logins: Logins | None = None) -> None:
        self.throttle = logins.throttle if logins else LoginThrottle(time.monotonic)
        self.queue = logins.queue if logins else LoginQueue(self.throttle)
        self.settings = settings
        self.base = base
        self.store = store
        self.accounts = Accounts(store)

    def person(self, username: str = "doctor", role: Role | str = Role.CLINICIAN, language: str = "en") -> Person:
        """Somebody logged in with a password of their own."""
        with pytest.MonkeyPatch.context() as patch:  # a real hash that costs less: each login in these tests checks it
            patch.setattr(passwords, "_HASHER", QUICK_HASHER)
            own_password(self.accounts, username, role)
        person = self.visitor(language)
        code = "" if role == Role.CLINICIAN else self.second_factor(username)
        assert person.log_in(username, PASSWORD).status_code == 302
        if code:
            person.open("/second-factor")
            assert person.post("/second-factor", data={"code": code}).status_code == 302
        person.open("/health")
        return person

    def visitor(self, language: str = "en") -> Person:
        """Somebody who has opened no page yet."""
        return Person(self.base, self.settings.tls_authority or self.settings.tls_certificate).speak(language)

    def second_factor(self, username: str) -> str:
        """Set up a second factor, in the newest session or else in one that ends then; returns a recovery code."""
        logins, account = Logins(self.store, self.accounts), self.accounts.require(username)
        token = "" if logins.sessions(account) else logins.login(username, PASSWORD, "127.0.0.1") or ""
        session = logins.sessions(account)[0]
        totp = pyotp.TOTP(logins.second_factors.begin(account, session.id))
        code = logins.second_factors.confirm(account, session.id, totp.now())[0]
        logins.logout(token)
        return code

    def take(self, data: bytes, name: str = "scan.dcm") -> Any:
        """Bring one scan through the door and close its series."""
        accepted = Ingest(self.store).accept(data, Source("upload", "test", name))
        self.store.planner.close_series([accepted.stored.series_id])
        return accepted.stored

    def activate(self) -> Manifest:
        """Make the reference model active, as its version 0.1.0, without running it."""
        shipped = json.loads((ROOT / "appliance" / "bundles" / "cxr-pneumonia" / "manifest.json").read_text("utf-8"))
        raw = json.dumps(shipped | {"version": "0.1.0"}, ensure_ascii=False).encode()
        manifest = Manifest.parse(raw)
        values = {
            "digest": "ab" * 32, "name": manifest.name, "version": manifest.version, "directory": "models/x",
            "manifest": raw.decode(), "precision": "fp32", "runtime": "onnxruntime 1.0", "self_test": "{}",
        }  # fmt: skip
        with self.store.database.transaction() as tx:
            self.store.switch_within(tx, values, "test")
        return manifest

    def work(self, result: JobResult | Callable[[], JobResult]) -> None:
        """Do the next job as a worker would."""
        job = self.store.queue.claim_job("test", 60)
        assert job
        assert self.store.queue.finish_job(job, result() if callable(result) else result)

    def fail(self, code: str = "job.error") -> None:
        """Fail the next job for good."""
        for _ in range(self.settings.job_max_attempts):
            job = self.store.queue.claim_job("test", 60)
            assert job
            self.store.queue.fail_job(job, Note(code))


def result(score: float = 0.9, notes: tuple[Note, ...] = (), accuracy: Accuracy = MIXED_AGES) -> JobResult:
    """What the reference model might have found."""
    finding = Finding(
        label="pneumonia", code="233604007", title_zh="肺炎", title_en="Pneumonia", score=score, threshold=0.3664,
        positive=score >= 0.3664, sensitivity=(0.9519, 0.9294, 0.9675), specificity=(0.9324, 0.8897, 0.9593),
        measured_on="a set of pictures", model="cxr-pneumonia", model_version="0.1.0", model_digest="ab" * 32, precision="fp32",
        runtime="onnxruntime 1.0 CPU", peak=(20.5, 30.5), outline=(((1.0, 1.0), (20.0, 1.0), (20.0, 30.0)),),
        heatmap_png=b"\x89PNG\r\n\x1a\nheat", has_verified_accuracy=True, accuracy=accuracy,
    )  # fmt: skip
    timing = {"ingest": 5.0, "decode": 3.2, "infer": 41.0, "total": 1234.0}
    return JobResult(ScanState.AI_READY, None, (finding,), notes, timing, {"name": "onnxruntime"})


class CompiledTemplates(jinja2.BytecodeCache):
    """The compiled templates of this process: each test makes an application, and compiling them costs more than most requests."""

    def __init__(self) -> None:
        self._compiled: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        """Give what was compiled from the same source."""
        if code := self._compiled.get(f"{bucket.key} {bucket.checksum}"):
            bucket.bytecode_from_string(code)

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keep what was compiled."""
        self._compiled[f"{bucket.key} {bucket.checksum}"] = bucket.bytecode_to_string()


_TEMPLATES = CompiledTemplates()


@contextmanager
def in_process(settings: Settings) -> Iterator[Box]:
    """The pages served by threads of this process."""
    app = create_app(settings)
    app.jinja_env.bytecode_cache = _TEMPLATES
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        box: BoxContext = app.extensions["box"]
        yield Box(settings, f"http://127.0.0.1:{server.server_port}", box.store, box.logins)
    finally:
        app.extensions["box"].stop()
        server.shutdown()
        thread.join()
        server.server_close()
        app.extensions["box"].store.close()


class Served:
    """The pages served by gunicorn in processes of its own, as on a box."""

    def __init__(self, data_dir: Path, **values: Any) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        values = {"web_port": 0, "dicom_port": 0, "disk_reserve_bytes": 0} | values
        lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
        (data_dir / "box.toml").write_text(lines + "\n")
        self.settings = Settings.load(data_dir)
        self.log = data_dir / "web.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.proxy: subprocess.Popen[bytes] | None = None

    def start(self) -> Box:
        """Start the server and wait until it listens."""
        address = self.settings.data_dir / "run" / "web.json"
        address.unlink(missing_ok=True)
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "webui", "--data-dir", str(self.settings.data_dir)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
            if self.settings.tls_certificate is not None:
                command[2] = "webui.server.proxy"
                self.proxy = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        wait_for(address.is_file, 60)
        told = json.loads(address.read_text())
        box = Box(self.settings, f"{told['scheme']}://127.0.0.1:{told['port']}", Store(self.settings))
        processes = [process for process in (self.process, self.proxy) if process]
        wait_for(lambda: answers(box) or any(process.poll() is not None for process in processes), 60)
        assert [process.poll() for process in processes] == [None] * len(processes), self.log.read_text()
        return box

    def kill(self) -> None:
        """``kill -9`` of the server and its worker process, as a power cut would."""
        assert self.process
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False).stdout.split()
        for pid in (self.process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """End it as the supervisor does; returns the exit code."""
        assert self.process
        if self.proxy and self.proxy.poll() is None:
            self.proxy.terminate()
            self.proxy.wait(30)
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(30)


def answers(box: Box) -> bool:
    """Whether the pages can be reached; not while nginx starts or waits for them."""
    try:
        return box.visitor().get("/healthz", timeout=60).ok
    except requests.ConnectionError:
        return False


@contextmanager
def served(data_dir: Path, **values: Any) -> Iterator[tuple[Served, Box]]:
    """A box served by gunicorn, stopped at the end."""
    server = Served(data_dir, **values)
    try:
        yield server, server.start()
    finally:
        server.stop()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def metadata(**values: str) -> str:
    """An ``Upload-Metadata`` header."""
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in values.items())


def begin(person: Person, name: str, length: int, form: dict[str, Any] | None = None, **options: Any) -> requests.Response:
    """Create a tus upload."""
    values = {"filename": name} | ({"form": json.dumps(form)} if form is not None else {})
    headers = {**TUS, "Upload-Length": str(length), "Upload-Metadata": metadata(**values)} | options.pop("headers", {})
    return person.post("/api/v1/tus", headers=headers, **options)


def send(person: Person, path: str, data: Any, offset: int = 0) -> requests.Response:
    """Send bytes of a tus upload."""
    headers = {**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
    return person.patch(path, data=data, headers=headers)


def upload(person: Person, name: str, data: bytes, form: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Upload one file whole; returns its outcomes."""
    answer = begin(person, name, len(data), form)
    assert answer.status_code == 201, answer.text
    path = answer.headers["Location"]
    if data:
        assert send(person, path, data).status_code == 204
    return outcome(person, path)


def outcome(person: Person, path: str) -> list[dict[str, Any]]:
    """Ask for the outcome until it is known."""
    while True:
        answer = person.get(f"{path}/outcome?wait=10")
        assert answer.status_code in (200, 202), answer.text
        if answer.status_code == 200:
            outcomes: list[dict[str, Any]] = answer.json()["outcomes"]
            return outcomes


class _Text(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        """Keep a piece of text."""
        self.parts.append(data)


def words(page: str) -> str:
    """What a person reads of a page, blanks folded."""
    parser = _Text()
    parser.feed(page)
    return re.sub(r"\s+", " ", " ".join(parser.parts))


def row(person: Person, study_id: int) -> str:
    """The text of a study's row in the worklist."""
    found = re.search(rf'<tr id="study-{study_id}".*?</tr>', person.get("/").text, re.DOTALL)
    assert found
    return words(found[0])
