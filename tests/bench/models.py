"""What a new model costs the line and the waiting room: a slow line that breaks, and a switch while scans come in."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from appliance.core.settings import Settings
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.store.store import Store
from model_sync.settings import SyncSettings
from model_sync.transport.fetcher import Fetcher
from quantize.reference.phantom import Phantom, dataset
from tests.support.bad_server import BadServer, Reply

_LINE_BYTES_PER_S = 2_000_000 / 8
_CUT_BYTES = 1_500_000
_FILE_BYTES = 30_000_000
_POLL_S = 0.002


def cut_line(directory: Path) -> dict[str, Any]:
    """30 MB over 2 Mbit/s, cut every 1.5 MB: what the server had to send, headers included, against the file's size."""
    whole = os.urandom(_FILE_BYTES)
    settings = SyncSettings.parse(
        {
            "state_dir": directory / "state", "exchange_dir": directory / "exchange", "root": directory / "root.json", "box_id": "bench",
            "rate_limit_bytes_per_s": _LINE_BYTES_PER_S, "backoff_s": 0.05, "max_backoff_s": 0.2, "disk_reserve_bytes": 0,
        }
    )  # fmt: skip
    with BadServer({"/targets/big": whole}) as server:
        server.always("/targets/big", Reply(cut_after=_CUT_BYTES))
        started = time.perf_counter()
        fetcher = Fetcher(settings.model_copy(update={"urls": [server.url]}), directory / "parts")
        with fetcher.download_file("library:targets/big", len(whole)) as stream:
            assert stream.read() == whole
        seconds = time.perf_counter() - started
        fetcher.close()
        sent = sum(request.sent_bytes for request in server.log)
        requests = len(server.log)
    return {
        "name": f"30 MB over 2 Mbit/s, cut every 1.5 MB ({requests} requests, {seconds:.0f} s): bytes sent / size",
        "measured": sent / len(whole), "target": 1.02, "unit": "",
    }  # fmt: skip


def switch_over(directory: Path, scans: int = 60) -> dict[str, Any]:
    """Scans one after the other while another version of the model takes over: the longest wait, less the usual one."""
    from appliance.core.domain import Source
    from appliance.ingest.ingest import Ingest

    settings = Settings.parse({"data_dir": directory / "box", "disk_reserve_bytes": 0, "web_port": 0, "dicom_port": 0})
    store = Store(settings)
    activate(store, reference_bundle(), "bench")
    newer = _newer_version(directory / "newer")
    ingest, source = Ingest(store), Source("cli", "bench")
    command = [sys.executable, "-m", "appliance"]
    worker = subprocess.Popen([*command, "worker", "--data-dir", str(settings.data_dir)], stderr=subprocess.DEVNULL)
    switching: subprocess.Popen[bytes] | None = None
    waits, made_by = [], set()
    for number in range(10_000):
        if number == scans // 3:
            switching = subprocess.Popen([*command, "models", "activate", str(newer), "--data-dir", str(settings.data_dir)],
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        accepted = ingest.accept(_scan(number), source)
        started = time.perf_counter()
        store.planner.close_series([accepted.stored.series_id])
        while store.queue.pending_jobs():
            time.sleep(_POLL_S)
        waits.append(time.perf_counter() - started)
        row = store.database.one("SELECT model_version FROM findings ORDER BY id DESC LIMIT 1")
        made_by.add(row["model_version"] if row else "")
        if number >= scans and len(made_by) == 2:
            break
    assert switching is not None
    assert switching.wait(60) == 0
    worker.terminate()
    worker.wait()
    store.close()
    return {
        "name": f"switch to another version under load ({len(waits)} scans): longest wait less the median, s",
        "measured": max(waits[1:]) - statistics.median(waits), "target": 1.0, "unit": "s",
    }  # fmt: skip


def _newer_version(directory: Path) -> Path:
    """The reference model under a higher version."""
    shutil.copytree(reference_bundle(), directory)
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text("utf-8").replace('"version": "0.1.0"', '"version": "9.0.0"', 1), "utf-8")
    return directory


def _scan(number: int) -> bytes:
    made = dataset(Phantom(rows=512, cols=512, seed=5), name=f"switch-{number}", bits=16)
    for index, name in enumerate(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")):
        setattr(made, name, f"2.25.{number + 1}{index}7")
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.PatientID = f"SWITCH-{number}"
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def run(directory: Path) -> list[dict[str, Any]]:
    """Both measurements, in a scratch directory."""
    return [cut_line(directory / "line"), switch_over(directory / "switch")]
