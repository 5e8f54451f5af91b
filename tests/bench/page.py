"""The idle box's memory, and the worklist page with many studies stored."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path

import psutil
import requests

from appliance.core.domain import utc_now
from appliance.core.settings import Settings
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.service.supervisor import Supervisor, web_address
from appliance.store.accounts import Accounts
from appliance.store.database import Database
from appliance.store.store import Store


def measure_page(data_dir: Path, studies: int) -> dict[str, float]:
    """Start a whole box; returns idle_rss_mib (supervisor and children, a page looked at), page_ms (median of 30) and studies."""
    data_dir.mkdir(parents=True)
    (data_dir / "box.toml").write_text("web_port = 0\ndicom_port = 0\n")
    settings = Settings.load(data_dir)
    store = Store(settings)
    activate(store, reference_bundle(), "bench")
    fill(store, studies)
    password = Accounts(store).add("bench", "clinician", "bench")
    store.close()
    supervisor = Supervisor(settings, data_dir / "box.log")
    supervisor.start()
    try:
        while not supervisor.ready():
            supervisor.tick()
            time.sleep(0.1)
        times = _page_times(settings, password)
        time.sleep(3)
        pids = [child.process.pid for child in supervisor.children if child.process]
        family = [process for pid in pids for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
        resident = sum(process.memory_info().rss for process in family)
    finally:
        supervisor.stop()
    # The supervisor lives inside this benchmark, which is far larger: its own share is measured as a process that only imports it.
    return {"idle_rss_mib": resident / 2**20 + _supervisor_mib(), "page_ms": statistics.median(times), "studies": studies}


def fill(store: Store, studies: int) -> None:
    """Put read studies into the tables in one transaction (through the door it would take an hour of fsync)."""
    now = utc_now()
    with store.database.transaction() as tx:
        for number in range(studies):
            study = Database.insert(
                tx, "studies", study_instance_uid=f"2.25.{number}", patient_key=f"P{number}", patient_id=f"P{number}",
                patient_name=f"测试^{number}",
                patient_birth_date="19700101", patient_sex="F", patient_age_years=54.0, study_date="20240101", study_time="080000",
                accession_number=f"A{number}", study_description="胸部正位", received_at=now, revision=number + 1,
            )  # fmt: skip
            series = Database.insert(
                tx,
                "series",
                study_id=study,
                series_instance_uid=f"2.25.1{number}",
                modality="DX",
                series_description="",
                last_received_at=0.0,
                open=0,
            )
            Database.insert(
                tx, "instances", series_id=series, sop_instance_uid=f"2.25.2{number}", sop_class_uid="1", transfer_syntax_uid="1",
                content_sha256=f"{number:064x}", bytes=1, modality="DX", body_part_examined="CHEST", view_position="PA", image_rows=1,
                image_columns=1,
                number_of_frames=1, patient_age_years=54.0, source_kind="cli", source_actor="bench", received_at=now, conflict=0,
                state="ai_ready", reason=None, notes="[]", ingest_ms=1.0,
            )  # fmt: skip
        tx.execute("UPDATE meta SET value = ? WHERE key = 'revision'", (str(studies + 1),))


def _page_times(settings: Settings, password: str) -> list[float]:
    address = web_address(settings)
    assert address
    base, session = f"http://127.0.0.1:{address['port']}", requests.Session()
    for path, form in (
        ("/login", {"username": "bench", "password": password}),
        ("/password", {"old": password, "new": "quite another 7", "again": "quite another 7"}),
    ):
        token = re.search(r'name="csrf[_-]token"[^>]*(?:value|content)="([^"]+)"', session.get(base + path).text)
        assert token
        session.post(base + path, data=form | {"csrf_token": token[1]}, headers={"Referer": base}).raise_for_status()
    times = []
    for _ in range(32):
        started = time.perf_counter()
        page = session.get(base + "/")
        times.append((time.perf_counter() - started) * 1000)
        assert page.ok
        assert "测试" in page.text
    return times[2:]


def _supervisor_mib() -> float:
    import subprocess
    import sys

    code = "import appliance.service.supervisor, time; print(1, flush=True); time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    resident = float(psutil.Process(process.pid).memory_info().rss)
    process.kill()
    process.wait()
    process.stdout.close()
    return resident / 2**20
