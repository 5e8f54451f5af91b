"""The DICOM receiver over real sockets: pynetdicom and dcmtk as senders, refusals, a full disk, parallel senders, a kill."""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import ComputedRadiographyImageStorage, Verification  # type: ignore[attr-defined]

from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.dicom.receiver import CANNOT_UNDERSTAND, OUT_OF_RESOURCES, Receiver
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from tests.support.certificates import make_pair
from tests.support.dicom_sender import send
from tests.support.processes import wait_for
from tests.support.receiver_process import receiver
from tests.support.scans import dataset, encode, scan_bytes


def test_echo_store_and_again(settings: Settings) -> None:
    with receiver(settings) as (port, _):
        entity = AE()
        entity.add_requested_context(Verification)
        association = entity.associate("127.0.0.1", port)
        assert association.send_c_echo().Status == 0
        association.release()
        scan = dataset()
        assert send(port, scan) == [0]
        assert send(port, scan) == [0]
    store = Store(settings)
    view = Worklist(store).study(1)
    assert len(view.instances) == 1
    assert view.instances[0].state.value == "queued"
    kept = pydicom.dcmread(BytesIO(store.read_instance(1)))
    assert kept.PixelData == scan.PixelData
    assert kept.PatientName == scan.PatientName


def test_a_scan_sent_and_uploaded_is_one_scan(settings: Settings) -> None:
    from appliance.core.domain import Source
    from appliance.ingest.ingest import Ingest

    scan = dataset(SpecificCharacterSet="GB18030", PatientName="张^三")
    uploaded = Ingest(Store(settings)).accept(encode(scan), Source("upload", "demo"))
    with receiver(settings) as (port, _):
        assert send(port, scan) == [0]
    assert [view.id for view in Worklist(Store(settings)).study(1).instances] == [uploaded.stored.instance_id]


def test_what_is_refused_stays_with_its_sender(settings: Settings) -> None:
    with receiver(settings) as (port, _):
        statuses = send(port, dataset(PixelData=None), dataset(Rows=60000, Columns=60000, PixelData=b"\0\0"), dataset())
    assert statuses == [CANNOT_UNDERSTAND, CANNOT_UNDERSTAND, 0]
    worklist = Worklist(Store(settings))
    assert worklist.count() == 1
    assert {row["code"] for row in worklist.rejections()} == {"ingest.no_pixel_data", "ingest.absurd_dimensions"}


def test_a_full_disk_is_out_of_resources(settings: Settings) -> None:
    with receiver(settings.model_copy(update={"disk_reserve_bytes": 1 << 60})) as (port, _):
        assert send(port, dataset()) == [OUT_OF_RESOURCES]


def test_parallel_senders_lose_nothing(settings: Settings) -> None:
    statuses: list[int | None] = []

    def sender() -> None:
        statuses.extend(send(port, *(dataset() for _ in range(5))))

    with receiver(settings) as (port, _):
        threads = [threading.Thread(target=sender) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [0] * 30
    assert Worklist(Store(settings)).count() == 30


def test_killed_in_the_middle_everything_acknowledged_is_there(settings: Settings) -> None:
    acknowledged: list[str] = []
    with receiver(settings) as (port, process):
        entity = AE()
        entity.add_requested_context(ComputedRadiographyImageStorage)
        association = entity.associate("127.0.0.1", port)
        threading.Timer(0.3, process.kill).start()
        for _ in range(2000):
            scan = dataset(SOPInstanceUID=generate_uid())
            try:
                status = association.send_c_store(scan)
            except RuntimeError:
                break
            if getattr(status, "Status", None) != 0:
                break
            acknowledged.append(scan.SOPInstanceUID)
        association.abort()
    assert acknowledged
    store = Store(settings)
    stored = {row["sop_instance_uid"]: row["id"] for row in store.database.query("SELECT id, sop_instance_uid FROM instances")}
    assert set(acknowledged) <= set(stored)
    for uid in acknowledged:
        assert pydicom.dcmread(BytesIO(store.read_instance(stored[uid]))).SOPInstanceUID == uid
    store.database.verify_audit()


@pytest.mark.parametrize("name", ["dicom_port", "dicom_tls_port"])
def test_a_port_in_use_is_an_error_that_names_its_setting(settings: Settings, tmp_path: Path, name: str) -> None:
    make_pair(tmp_path / "box.crt", tmp_path / "box.key", ["localhost"])
    pair = {"tls_certificate": tmp_path / "box.crt", "tls_key": tmp_path / "box.key"}
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        box = Receiver(settings.model_copy(update={"dicom_port": 0, "dicom_tls_port": 0, name: port} | pair))
        try:
            with pytest.raises(ApplianceError, match=f"{name} = {port}") as error:
                box.start()
            assert error.value.code == "box.port"
        finally:
            box.stop()


def test_ports_of_a_former_run_are_not_believed(settings: Settings) -> None:
    run = settings.data_dir / "run"
    run.mkdir(parents=True)
    (run / "dicom-tls.port").write_text("2762")
    with receiver(settings) as (port, _):
        assert (run / "dicom.port").read_text() == str(port)
        assert not (run / "dicom-tls.port").exists()
    assert not (run / "dicom.port").exists()


def test_sigterm_that_another_thread_receives_stops_the_receiver(settings: Settings) -> None:
    """The kernel gives a signal to any thread of a process; Python handles it in the main thread, which must not wait without an end."""
    with receiver(settings) as (_, process):
        other = next(int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir() if int(task.name) != process.pid)
        assert ctypes.CDLL(None).tgkill(process.pid, other, int(signal.SIGTERM)) == 0
        assert process.wait(20) == 0


@pytest.mark.skipif(shutil.which("storescu") is None, reason="needs dcmtk")
def test_dcmtk_is_served(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(scan_bytes())
    with receiver(settings) as (port, _):
        for command in (["echoscu"], ["storescu", "--required"]):
            files = [str(path)] if command[0] == "storescu" else []
            subprocess.run([*command, "-aec", "CLINICBOX", "127.0.0.1", str(port), *files], check=True, timeout=60)
    assert Worklist(Store(settings)).count() == 1


def test_a_second_receiver_says_that_the_box_is_busy(settings: Settings) -> None:
    with receiver(settings):
        command = [sys.executable, "-m", "appliance", "receive", "--data-dir", str(settings.data_dir)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 2
    assert "hint:" in second.stderr


def test_stat_of_the_modality_is_heard(settings: Settings, store: Store) -> None:
    with receiver(settings) as (port, _):
        assert send(port, dataset(), dataset(RequestedProcedurePriority="STAT"), dataset(RequestedProcedurePriority="ROUTINE")) == [0, 0, 0]
        wait_for(lambda: len(store.database.query("SELECT id FROM jobs")) == 3)
    told = [row.urgent and (row.urgent.origin, row.urgent.actor, row.urgent.term) for row in reversed(Worklist(store).page())]
    assert told == [None, ("sender", "MODALITY", "STAT"), None]
    job = store.queue.claim_job("test", 60)
    assert job
    assert Worklist(store).study_of(job.instance_id) == 2
