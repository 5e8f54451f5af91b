"""Certificates and keys that no server can use, and when their files are loaded again."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core import certificates
from appliance.core.certificates import Renewal, load_pair, served_fingerprint
from appliance.core.errors import ApplianceError
from tests.support.certificates import make_pair


def test_a_changed_permission_is_a_change_and_a_failure_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "box.crt", tmp_path / "box.key"
    certificate.write_text("a")
    key.write_text("b")
    renewal = Renewal((certificate, key))
    assert not renewal.is_due()
    key.chmod(0o400)
    assert renewal.is_due()
    assert not renewal.is_due()  # this attempt failed: the next one waits
    key.chmod(0o600)
    assert renewal.is_due()
    monkeypatch.setattr(certificates, "RETRY_S", 0.0)
    assert renewal.is_due()
    renewal.confirm()
    assert not renewal.is_due()


def test_same_time_and_size_in_the_same_file_is_a_change(tmp_path: Path) -> None:
    file = tmp_path / "box.key"
    file.write_text("a")
    status = file.stat()
    renewal = Renewal((file, None))
    while file.stat().st_ctime_ns == status.st_ctime_ns:  # the clock of the file system goes in steps
        file.write_text("b")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert renewal.is_due()


def test_a_change_during_an_attempt_is_loaded_after_it(tmp_path: Path) -> None:
    file = tmp_path / "box.key"
    renewal = Renewal((file, None))
    file.write_text("a")
    assert renewal.is_due()
    file.write_text("bb")
    renewal.confirm()
    assert renewal.is_due()
    renewal.confirm()
    file.unlink()
    assert renewal.is_due()


def test_a_certificate_that_sha_1_signs_is_refused(tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("ca.crt", "ca.key", "box.csr", "box.key", "box.crt")}
    for command in (
        ["req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=CA", "-keyout", files["ca.key"], "-out", files["ca.crt"]],
        ["req", "-new", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=box", "-keyout", files["box.key"], "-out", files["box.csr"]],
        ["x509", "-req", "-sha1", "-in", files["box.csr"], "-CA", files["ca.crt"], "-CAkey", files["ca.key"], "-out", files["box.crt"]],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    with pytest.raises(ApplianceError) as error:
        load_pair(tmp_path / "box.crt", tmp_path / "box.key")
    assert error.value.code == "tls.refused"


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1 << 16), byte=st.integers(0, 255))
def test_a_certificate_with_any_byte_changed_is_used_or_refused_by_a_code(tmp_path: Path, at: int, byte: int) -> None:
    pair = tmp_path / "box.crt", tmp_path / "box.key"
    if not pair[0].exists():
        make_pair(*pair, ["localhost", "127.0.0.1"])
    der = bytearray(x509.load_pem_x509_certificate(pair[0].read_bytes()).public_bytes(Encoding.DER))
    der[at % len(der)] = byte
    changed = tmp_path / "changed.crt"
    changed.write_text(ssl.DER_cert_to_PEM_cert(bytes(der)))
    try:
        load_pair(changed, pair[1])
    except ApplianceError as error:
        assert error.code in ("tls.unreadable", "tls.key_mismatch", "tls.refused")


def test_no_certificate_is_shown_where_no_server_speaks_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()
        assert served_fingerprint(*address) is None
    assert served_fingerprint(*address) is None
