"""kill -9 of the worker and the web process at 50 random moments while 40 scans come in: nothing acknowledged is lost or doubled."""

from __future__ import annotations

import base64
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from appliance.core.settings import Settings
from appliance.lifecycle.model_control import reference_bundle
from appliance.service import supervisor as module
from appliance.service.supervisor import Supervisor, web_address
from appliance.store.accounts import Accounts
from appliance.store.store import Store
from tests.support.activated import activate
from tests.support.processes import wait_for
from tests.support.worker_box import chest

CHUNK_BYTES = 64 * 1024


class Browser:
    """What the upload page does, without the page: log in, tus upload that goes on after a broken line, ask for the outcome."""

    def __init__(self, settings: Settings, password: str) -> None:
        self._settings = settings
        self._password = password
        self._session = requests.Session()
        self._token = ""

    def url(self, path: str) -> str:
        """A path on the box, wherever its page listens now (it may just be down)."""
        address = web_address(self._settings)
        return f"http://127.0.0.1:{address['port'] if address else 1}{path}"

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request, repeated until the page is there again; 5xx counts as not there."""
        limit = time.monotonic() + 120
        while True:
            try:
                headers = {"X-CSRFToken": self._token, "Referer": self.url("/"), "Tus-Resumable": "1.0.0"} | options.get("headers", {})
                answer = self._session.request(method, self.url(path), timeout=30, **(options | {"headers": headers}))
                if answer.status_code < 500 and answer.status_code != 423:
                    return answer
            except requests.RequestException:
                pass
            assert time.monotonic() < limit, f"{method} {path} never came through"
            time.sleep(0.1)

    def log_in(self) -> None:
        """Log in with the one-time password and set another."""
        self._fetch_token("/login")
        answer = self.call("POST", "/login", data={"username": "demo", "password": self._password, "csrf_token": self._token})
        assert answer.ok, answer.text[:500]
        self._fetch_token("/password")
        new = {"old": self._password, "new": "quite another 7", "again": "quite another 7", "csrf_token": self._token}
        assert self.call("POST", "/password", data=new).ok
        self._fetch_token("/upload")

    def _fetch_token(self, path: str) -> None:
        page = self.call("GET", path).text
        found = re.search(r'name="csrf[_-]token"[^>]*(?:value|content)="([^"]+)"', page)
        assert found, page[:800]
        self._token = found[1]

    def upload(self, name: str, data: bytes) -> list[dict[str, Any]]:
        """Upload one file in chunks; returns the outcomes once they are known."""
        metadata = f"filename {base64.b64encode(name.encode()).decode()}"
        created = self.call("POST", "/api/v1/tus", headers={"Upload-Length": str(len(data)), "Upload-Metadata": metadata})
        assert created.status_code == 201, created.text[:300]
        path = re.sub(r"^https?://[^/]+", "", created.headers["Location"])
        while (offset := int(self.call("HEAD", path).headers["Upload-Offset"])) < len(data):
            headers = {"Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
            self.call("PATCH", path, headers=headers, data=data[offset : offset + CHUNK_BYTES])
        while True:
            answer = self.call("GET", f"{path}/outcome?wait=5")
            if answer.status_code == 200:
                return list(answer.json()["outcomes"])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("scans", "kills"), [(8, 4), pytest.param(40, 50, marks=pytest.mark.long)])
def test_kill_9_of_worker_and_web_loses_and_doubles_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scans: int, kills: int
) -> None:
    monkeypatch.setattr(module, "_LONGEST_BACKOFF_S", 0.3)
    settings.data_dir.mkdir(parents=True)
    # Killed by chance many times, a job may be hit more than three times: here that must not count as its own fault.
    values = {"web_port": 0, "dicom_port": 0, "disk_reserve_bytes": 0, "job_max_attempts": 1000, "tune_at_activation": "false"}
    (settings.data_dir / "box.toml").write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
    settings = Settings.load(settings.data_dir)
    store = Store(settings)
    activate(store, reference_bundle(), "test")
    browser = Browser(settings, Accounts(store).add("demo", "clinician", "test"))
    supervisor = Supervisor(settings, tmp_path / "box.log")
    rng = random.Random(20260101)
    acknowledged: list[int] = []
    failures: list[BaseException] = []

    def upload() -> None:
        try:
            browser.log_in()
            for number in range(scans):
                acknowledged.extend(item["instance_id"] for item in browser.upload(f"{number}.dcm", chest(seed=number)))
        except BaseException as error:
            failures.append(error)
            raise

    supervisor.start()
    try:
        wait_for(lambda: supervisor.tick() or supervisor.ready(), 60)
        thread = threading.Thread(target=upload)
        thread.start()
        done = 0
        while done < kills:
            child = supervisor.children[rng.choice([0, 2])]
            _look_after(supervisor, rng.uniform(0.05, 1.5))
            if child.process is not None and child.process.poll() is None:
                child.process.kill()
                done += 1
        while thread.is_alive():
            _look_after(supervisor, 0.1)
        thread.join()
        assert not failures
        wait_for(lambda: supervisor.tick() or store.queue.pending_jobs() == 0, 120)
    finally:
        supervisor.stop()
    assert len(acknowledged) == scans
    assert len(set(acknowledged)) == scans
    rows = store.database.query("SELECT instance_id, count(*) AS n FROM findings GROUP BY instance_id")
    assert {row["instance_id"]: row["n"] for row in rows} == dict.fromkeys(acknowledged, 1)
    store.database.verify_audit()
    print(f"{done} kills during {scans} uploads: nothing lost, nothing doubled")


def _look_after(supervisor: Supervisor, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        supervisor.tick()
        time.sleep(0.02)
