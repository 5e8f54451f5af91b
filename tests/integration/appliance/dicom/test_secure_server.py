"""DICOM over TLS, and who may still send without: dcmtk and pynetdicom as senders, over real sockets (R14)."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import ValidationError
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from appliance.core import certificates
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.dicom.receiver import Receiver
from appliance.dicom.secure_server import PlainSenders, ServerCredentials
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from tests.support.certificates import make_authority, make_pair
from tests.support.dicom_sender import send
from tests.support.processes import wait_for
from tests.support.receiver_process import receiver
from tests.support.scans import dataset, scan_bytes


def port_of_tls(settings: Settings) -> int:
    return int((settings.data_dir / "run" / "dicom-tls.port").read_text())


def storescu(port: int, scan: Path, *tls: str) -> int:
    """dcmtk's sender; its exit code."""
    program = shutil.which("storescu")
    assert program, "dcmtk is missing: run `make setup-test`"
    command = [program, *tls, "-aet", "CT1", "-aec", "CLINICBOX", "127.0.0.1", str(port), str(scan)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


def echo(port: int, title: str = "MODALITY", trusted: Path | None = None, source: str = "127.0.0.1") -> str:
    """``accepted``, or why not."""
    entity = AE(ae_title=title)
    entity.add_requested_context(Verification)
    context = ssl.create_default_context(cafile=trusted) if trusted else None
    association = entity.associate("127.0.0.1", port, tls_args=(context, "localhost") if context else None, bind_address=(source, 0))
    if association.is_established:
        association.release()
        return "accepted"
    answer = association.acceptor.primitive
    return answer.reason_str if association.is_rejected and answer else "aborted"


def test_r14_dcmtk_sends_over_tls(settings: Settings, tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "ca.crt")
    make_pair(tmp_path / "box.crt", tmp_path / "box.key", ["localhost", "127.0.0.1"], authority=authority)
    (tmp_path / "scan.dcm").write_bytes(scan_bytes())
    pair = {"tls_certificate": str(tmp_path / "box.crt"), "tls_key": str(tmp_path / "box.key")}
    with receiver(settings, dicom_tls_port=0, **pair) as (plain, _):
        port = port_of_tls(settings)
        assert storescu(port, tmp_path / "scan.dcm", "+tla", "+cf", str(tmp_path / "ca.crt")) == 0
        make_authority(tmp_path / "other.crt", "Other CA")
        assert storescu(port, tmp_path / "scan.dcm", "+tla", "+cf", str(tmp_path / "other.crt")) != 0
        assert storescu(port, tmp_path / "scan.dcm") != 0  # no TLS on that port
        assert storescu(plain, tmp_path / "scan.dcm") != 0  # nobody is listed
        old = ssl.create_default_context(cafile=tmp_path / "ca.crt")
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", port), timeout=30) as line, pytest.raises(OSError, match=r"(?i)ssl|tls|reset"):
            old.wrap_socket(line, server_hostname="localhost")
    assert Worklist(Store(settings)).count() == 1


def test_r14_a_sender_shows_a_certificate_of_the_clinics_authority(settings: Settings, tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "ca.crt")
    for name, signer in (("box", authority), ("ct", authority), ("stranger", make_authority(tmp_path / "other.crt", "Other CA"))):
        make_pair(tmp_path / f"{name}.crt", tmp_path / f"{name}.key", ["localhost"], authority=signer)
    (tmp_path / "scan.dcm").write_bytes(scan_bytes())
    given = {
        "dicom_tls_certificate": str(tmp_path / "box.crt"), "dicom_tls_key": str(tmp_path / "box.key"),
        "dicom_client_authority": str(tmp_path / "ca.crt"), "dicom_tls_port": 0,
    }  # fmt: skip
    trust = ("+cf", str(tmp_path / "ca.crt"))
    with receiver(settings, **given):
        port = port_of_tls(settings)
        own = certificates.load_pair(tmp_path / "box.crt", tmp_path / "box.key")
        assert certificates.served_fingerprint("127.0.0.1", port) == own.fingerprint  # the status page asks without a certificate
        ct, stranger = ((str(tmp_path / f"{name}.key"), str(tmp_path / f"{name}.crt")) for name in ("ct", "stranger"))
        assert storescu(port, tmp_path / "scan.dcm", "+tla", *trust) != 0
        assert storescu(port, tmp_path / "scan.dcm", "+tls", *stranger, *trust) != 0
        assert storescu(port, tmp_path / "scan.dcm", "+tls", *ct, *trust) == 0


def test_r14_without_tls_only_listed_titles_from_their_addresses(settings: Settings, tmp_path: Path) -> None:
    make_pair(tmp_path / "box.crt", tmp_path / "box.key", ["localhost"])
    pair = {"tls_certificate": str(tmp_path / "box.crt"), "tls_key": str(tmp_path / "box.key")}
    with receiver(settings, dicom_tls_port=0, dicom_plain_senders=["MODALITY@127.0.0.1", "CT1@127.0.0.2"], **pair) as (port, _):
        assert echo(port) == "accepted"
        assert send(port, dataset()) == [0]
        assert echo(port, "CT1", source="127.0.0.2") == "accepted"
        refused = "Calling AE title not recognised"
        assert echo(port, "CT1") == refused
        assert echo(port, "MODALITY", source="127.0.0.2") == refused
        assert echo(port, "OTHER") == refused
        assert echo(port) == "accepted"


def test_silent_handshakes_stop_nobody_and_a_new_certificate_is_taken(settings: Settings, tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "ca.crt")
    make_pair(tmp_path / "box.crt", tmp_path / "box.key", ["localhost"], authority=authority)
    pair = {"tls_certificate": str(tmp_path / "box.crt"), "tls_key": str(tmp_path / "box.key")}
    with receiver(settings, dicom_tls_port=0, **pair), ExitStack() as stack:
        port = port_of_tls(settings)
        for _ in range(80):  # one machine gets a share of the connections, not all of them
            line = stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)))
            line.sendall(b"\x16\x03\x01")
        assert echo(port, trusted=tmp_path / "ca.crt") == "accepted"
        before = ssl.get_server_certificate(("127.0.0.1", port))
        make_pair(tmp_path / "new.crt", tmp_path / "new.key", ["localhost"], authority=authority)
        (tmp_path / "new.crt").replace(tmp_path / "box.crt")  # half of the new pair
        assert ssl.get_server_certificate(("127.0.0.1", port)) == before
        (tmp_path / "new.key").replace(tmp_path / "box.key")
        wait_for(lambda: ssl.get_server_certificate(("127.0.0.1", port)) != before, 10)
        assert echo(port, trusted=tmp_path / "ca.crt") == "accepted"


@pytest.mark.parametrize("damage", ["half", "other", "cut", "authority", "weak"])
def test_a_pair_that_cannot_be_used_is_refused_by_its_name(settings: Settings, tmp_path: Path, damage: str) -> None:
    make_pair(tmp_path / "box.crt", tmp_path / "box.key", ["localhost"])
    values = {"dicom_tls_port": 0, "dicom_tls_certificate": tmp_path / "box.crt", "dicom_tls_key": tmp_path / "box.key"}
    if damage == "half":
        del values["dicom_tls_key"]
    elif damage == "other":
        make_pair(tmp_path / "other.crt", tmp_path / "box.key", ["localhost"])
    elif damage == "weak":
        make_pair(tmp_path / "box.crt", tmp_path / "box.key", ["localhost"], is_weak=True)
    elif damage == "cut":
        (tmp_path / "box.crt").write_text((tmp_path / "box.crt").read_text()[:200])
    else:
        values["dicom_client_authority"] = tmp_path / "none.crt"
    codes = {"half": "tls.incomplete", "other": "tls.key_mismatch", "weak": "tls.refused", "authority": "tls.authority_unreadable"}
    with pytest.raises(ApplianceError) as error:
        Receiver(settings.model_copy(update=values)).start()
    assert error.value.code == codes.get(damage, "tls.unreadable")


def test_a_pair_that_openssl_refuses_leaves_the_former_one_in_use(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = tmp_path / "box.crt", tmp_path / "box.key"
    make_pair(certificate, key, ["localhost"])
    credentials = ServerCredentials(settings.model_copy(update={"dicom_tls_certificate": certificate, "dicom_tls_key": key}))
    before = credentials.context()
    make_pair(certificate, key, ["localhost"], is_weak=True)
    with caplog.at_level(logging.ERROR):
        assert credentials.context() is before
        assert credentials.context() is before
    assert [getattr(record, "code", "") for record in caplog.records] == ["tls.refused"]
    make_pair(certificate, key, ["localhost"])
    assert credentials.context() is not before


def test_a_pair_that_could_not_be_read_is_tried_again_without_a_change_of_its_files(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "box.crt", tmp_path / "box.key"
    make_pair(certificate, key, ["localhost"])
    credentials = ServerCredentials(settings.model_copy(update={"dicom_tls_certificate": certificate, "dicom_tls_key": key}))
    before = credentials.context()
    make_pair(certificate, key, ["localhost"])
    with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _path: (_ for _ in ()).throw(PermissionError()))
        assert credentials.context() is before
        assert credentials.context() is before
    assert [getattr(record, "code", "") for record in caplog.records] == ["tls.unreadable"]
    assert credentials.context() is before
    monkeypatch.setattr(certificates, "RETRY_S", 0.0)
    assert credentials.context() is not before


@pytest.mark.parametrize(
    ("listed", "is_tls", "title", "address", "is_admitted"),
    [
        (None, False, "ANY", "10.0.0.1", True), (None, True, "ANY", "10.0.0.1", False), ((), False, "ANY", "10.0.0.1", False),
        (("CT@10.0.0.1",), False, "CT", "::ffff:10.0.0.1", True), (("CT@fe80:0::1",), True, "CT", "fe80::1%eth0", True),
        (("A@B@10.0.0.1",), True, "A@B", "10.0.0.1", True), (("CT@10.0.0.1",), True, "ct", "10.0.0.1", False),
    ],
)  # fmt: skip
def test_who_may_send_without_tls(listed: tuple[str, ...] | None, is_tls: bool, title: str, address: str, is_admitted: bool) -> None:
    settings = Settings(data_dir=Path("box"), dicom_plain_senders=listed, dicom_tls_port=2762 if is_tls else None)
    assert PlainSenders(settings).admits(title, address) == is_admitted


@pytest.mark.parametrize("entry", ["CT", "@10.0.0.1", "CT@", "CT@host", "A" * 17 + "@10.0.0.1", "C\\T@10.0.0.1"])
def test_a_listed_sender_is_a_title_and_an_address(entry: str) -> None:
    with pytest.raises(ValidationError):
        Settings(data_dir=Path("box"), dicom_plain_senders=(entry,))
