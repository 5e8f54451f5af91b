"""Boxes at the server's door: tokens, certificates, renewal, deny-list and reports, over real TLS, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sqlalchemy import func, select

from model_sync.errors import SettingsError
from model_sync.fleet.enrolment import DeviceAuthority, new_token
from model_sync.fleet.tables import boxes, events, tokens
from tests.support.fleet_site import PASSPHRASE, Box, Centre, Postgres, box_report, stamp

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    cluster = Postgres()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def centre(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    db = request.getfixturevalue("postgres").database() if request.param == "postgresql" else None
    running = Centre(tmp_path_factory.mktemp("centre"), db).start("--requests-per-minute", "6000")
    yield running
    running.close()


@pytest.fixture
def box(centre: Centre, request: pytest.FixtureRequest) -> Box:
    return centre.box(f"box-{abs(hash(request.node.name)):x}")


def request_of(key: Any, *, name: str = "box", extensions: bool = False) -> str:
    """A certificate request for any key, asking for too much when told to."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
    if extensions:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=5), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("library.example")]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    algorithm = None if isinstance(key, Ed25519PrivateKey) else SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM).decode()


def stored(centre: Centre, box_id: str) -> Any:
    with centre.fleet.reading() as tx:
        return tx.execute(select(boxes).where(boxes.c.box_id == box_id)).mappings().one()


def problem(answer: requests.Response) -> tuple[int, str]:
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "Traceback" not in answer.text
    return answer.status_code, answer.json()["code"]


# -- enrolment


def test_a_box_enrols_and_its_certificate_says_who_it_is_and_nothing_else(centre: Centre) -> None:
    box = Box(centre, "box-plain")
    box.enrol(centre.token("box-plain"))
    certificate = box.certificate
    assert [name.value for name in certificate.subject] == ["box-plain"]
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc <= timedelta(days=31)
    assert centre.authority.has_issued(certificate)


def test_nothing_that_a_request_asks_for_is_taken_over(centre: Centre) -> None:
    key = Ed25519PrivateKey.generate()
    csr = request_of(key, name="admin", extensions=True)
    answer = centre.post("/api/v1/enrol", json={"token": centre.token("box-modest"), "csr_pem": csr})
    certificate = x509.load_pem_x509_certificate(answer.json()["certificate_pem"].encode())
    assert certificate.subject.rfc4514_string() == "CN=box-modest"
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_a_token_is_kept_as_a_hash_only(centre: Centre) -> None:
    token = centre.token("box-hash")
    with centre.fleet.reading() as tx:
        kept = tx.execute(select(tokens)).mappings().all()
    assert all(token not in str(dict(row)) for row in kept)


def test_a_token_works_for_one_device_only(centre: Centre) -> None:
    token = centre.token("box-once")
    Box(centre, "box-once").enrol(token)
    answer = centre.post("/api/v1/enrol", json={"token": token, "csr_pem": Box(centre, "box-once").csr})
    assert problem(answer) == (403, "enrolment.token")


def test_the_same_device_gets_its_certificate_again_when_the_answer_was_lost(centre: Centre) -> None:
    box, token = Box(centre, "box-lost"), centre.token("box-lost")
    first, second = (centre.post("/api/v1/enrol", json={"token": token, "csr_pem": box.csr}) for _ in range(2))
    assert first.json() == second.json()
    assert second.status_code == 200


def test_two_devices_that_race_with_one_token_one_wins(centre: Centre) -> None:
    for attempt in range(5):
        token, answers = centre.token(f"box-race-{attempt}"), []
        start = threading.Barrier(4)

        def ask(box: Box, token: str = token, start: threading.Barrier = start, answers: list[int] = answers) -> None:
            start.wait()
            answers.append(centre.post("/api/v1/enrol", json={"token": token, "csr_pem": box.csr}).status_code)

        threads = [threading.Thread(target=ask, args=(Box(centre, f"box-race-{attempt}"),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [200, 403, 403, 403]


def test_an_expired_token_is_refused(centre: Centre) -> None:
    token = centre.token("box-late", hours=-0.1)
    assert problem(centre.post("/api/v1/enrol", json={"token": token, "csr_pem": Box(centre, "box-late").csr})) == (403, "enrolment.token")


def test_an_unknown_token_is_refused_with_the_same_words_as_a_used_one(centre: Centre) -> None:
    used = centre.token("box-words")
    Box(centre, "box-words").enrol(used)
    csr = Box(centre, "box-words").csr
    answers = [centre.post("/api/v1/enrol", json={"token": token, "csr_pem": csr}).content for token in (used, "x" * 43)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "csr",
    [
        "", "no request", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "é" * 10,
        request_of(generate_private_key(SECP384R1())), request_of(generate_rsa(65537, 2048)),
    ],
    ids=["empty", "text", "no-asn1", "not-ascii", "p-384", "rsa"],
)  # fmt: skip
def test_a_request_that_is_none_or_of_another_key_type_is_refused_and_costs_no_token(centre: Centre, csr: str) -> None:
    token = centre.token("box-csr")
    assert problem(centre.post("/api/v1/enrol", json={"token": token, "csr_pem": csr})) == (422, "enrolment.csr")
    Box(centre, "box-csr").enrol(token)


def test_a_request_signed_by_another_key_is_refused(centre: Centre) -> None:
    good = Box(centre, "box-forged")
    der = bytearray(x509.load_pem_x509_csr(good.csr.encode()).public_bytes(Encoding.DER))
    der[-3] ^= 1
    forged = subprocess.run(
        ["openssl", "req", "-inform", "DER", "-outform", "PEM"], input=bytes(der), capture_output=True, check=True
    ).stdout.decode()
    answer = centre.post("/api/v1/enrol", json={"token": centre.token("box-forged"), "csr_pem": forged})
    assert problem(answer) == (422, "enrolment.csr")


def test_a_new_token_replaces_the_box_and_shuts_the_old_device_out(centre: Centre, box: Box) -> None:
    replacement = centre.box(box.box_id)
    assert problem(box.send(box.report(1))) == (403, "enrolment.denied")
    assert replacement.send(replacement.report(1)).status_code == 204


# -- renewal


def test_a_young_certificate_is_not_renewed(box: Box) -> None:
    assert problem(box.renew()) == (409, "enrolment.too_early")


def test_renewal_needs_a_certificate_of_this_fleet(centre: Centre, tmp_path: Path) -> None:
    assert problem(centre.post("/api/v1/renew", json={"csr_pem": "x"})) == (401, "enrolment.certificate")
    stranger = Box(centre, "box-stranger")
    other = DeviceAuthority.create(tmp_path / "other", PASSPHRASE)
    key = generate_private_key(SECP384R1())
    certificate = other.issue(key.public_key(), "box-1", datetime.now(timezone.utc), 30)
    stranger.file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM))
    with pytest.raises(requests.exceptions.ConnectionError):  # TLS itself turns it away
        stranger.renew()


# -- deny-list


def test_a_denied_box_is_out_at_once_and_in_again_when_allowed(centre: Centre, box: Box) -> None:
    assert box.send(box.report(1)).status_code == 204
    token = centre.token(box.box_id)
    centre.fleet.deny(box.box_id, "test")
    assert problem(box.send(box.report(2))) == (403, "enrolment.denied")
    assert problem(box.renew()) == (403, "enrolment.denied")
    fresh = Box(centre, box.box_id)
    assert problem(centre.post("/api/v1/enrol", json={"token": token, "csr_pem": fresh.csr})) == (403, "enrolment.denied")
    with pytest.raises(SettingsError, match="denied"):
        new_token(centre.fleet, box.box_id, "stable")
    centre.fleet.allow(box.box_id, "test")
    assert box.send(box.report(3)).status_code == 204
    fresh.enrol(token)  # a token shown while the box was denied is not spent


def test_one_certificate_can_be_denied_by_its_serial(centre: Centre, box: Box) -> None:
    centre.fleet.deny_serial(f"{box.certificate.serial_number:X}", "test")
    assert problem(box.send(box.report(1))) == (403, "enrolment.denied")
    with pytest.raises(SettingsError, match="no certificate"):
        centre.fleet.deny_serial("abc", "test")


# -- reports


def test_a_report_needs_a_certificate(centre: Centre, box: Box) -> None:
    answer = centre.post("/api/v1/reports", data=box.report(1), headers=JSON)
    assert problem(answer) == (401, "enrolment.certificate")


def test_a_report_sent_again_is_the_same_report(centre: Centre, box: Box) -> None:
    body = box.report(5)
    assert [box.send(body).status_code for _ in range(3)] == [204, 204, 204]
    assert stored(centre, box.box_id)["sequence"] == 5


def test_another_report_under_a_number_that_is_not_above_the_last_is_refused(centre: Centre, box: Box) -> None:
    box.send(box.report(5))
    for sequence in (5, 4, 1):
        answer = box.send(box.report(sequence, box=None))
        assert problem(answer) == (409, "report.sequence")
        assert answer.json()["expected"] == 6
    assert box.send(box.report(9)).status_code == 204


def test_a_replayed_old_report_never_overwrites_the_newest(centre: Centre, box: Box) -> None:
    old = box.report(1, sync={"state": "untrusted", "code": "trust.signature"})
    assert box.send(old).status_code == 204
    assert box.send(box.report(2)).status_code == 204
    assert problem(box.send(old)) == (409, "report.sequence")
    assert stored(centre, box.box_id)["sync_state"] == "ok"


def test_a_report_of_another_box_is_refused(centre: Centre, box: Box) -> None:
    other = centre.box(f"{box.box_id}-other")
    assert problem(box.send(other.report(1))) == (403, "report.signature")
    impostor = Box(centre, other.box_id)
    impostor.key, impostor.file = box.key, box.file  # box's own key and certificate, another's name
    assert problem(impostor.send(impostor.report(1))) == (403, "report.signature")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"signed": {}, "signature": {}}', b"[" * 60_000, b"\xff", b'{"a": NaN}'])
def test_hostile_json_is_refused(box: Box, body: bytes) -> None:
    assert problem(box.send(body)) == (422, "report.invalid")


def test_a_report_that_says_more_than_the_schema_is_refused_and_not_quoted(box: Box) -> None:
    envelope = json.loads(box.report(1))
    envelope["signed"]["patient_name"] = "ZhangSan"
    answer = box.send(json.dumps(envelope).encode())
    assert problem(answer) == (422, "report.invalid")
    assert "ZhangSan" not in answer.text


def test_an_oversized_report_is_refused(box: Box) -> None:
    assert problem(box.send(b" " * 70_000))[0] == 413


def test_an_oversized_report_without_a_length_is_refused(box: Box) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 4096

    assert problem(box.send(endless()))[0] == 413  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_another_content_type_is_refused(box: Box, kind: str) -> None:
    assert problem(box.send(box.report(1), headers={"Content-Type": kind}))[0] == 415


@pytest.mark.parametrize("body", [{"token": 1, "csr_pem": "x"}, {"token": "x" * 43}, {"token": "x" * 43, "csr_pem": "x", "more": 1}, []])
def test_an_enrolment_that_does_not_fit_its_schema_is_refused(centre: Centre, body: Any) -> None:
    assert problem(centre.post("/api/v1/enrol", json=body)) == (422, "report.invalid")


def test_wrong_methods_and_addresses_are_problems_without_particulars(centre: Centre) -> None:
    assert problem(centre.get("/api/v1/reports"))[0] == 405
    assert problem(centre.get("/api/v2/anything"))[0] == 404


def test_the_history_of_a_box_is_bounded_and_each_event_stands_once(centre: Centre, box: Box) -> None:
    sequence = 0
    for batch in range(5):
        activations = [
            box_report("0.1.0", "trial" if number % 2 else "good", at=stamp(-5000 + batch * 400 + number * 10))["activations"][0]
            for number in range(20)
        ]
        for _ in range(2):
            sequence += 1
            assert box.send(box.report(sequence, box=box_report() | {"activations": activations})).status_code == 204
    with centre.fleet.reading() as tx:
        count = tx.execute(select(func.count()).where(events.c.box_id == box.box_id)).scalar_one()
    assert count == 60


def test_a_trial_that_goes_on_is_one_event(centre: Centre, box: Box) -> None:
    for sequence in range(1, 5):
        told = box_report("0.1.0", "trial" if sequence < 4 else "good", at=stamp(-100 + sequence))
        assert box.send(box.report(sequence, box=told)).status_code == 204
    with centre.fleet.reading() as tx:
        states = tx.execute(select(events.c.state).where(events.c.box_id == box.box_id).order_by(events.c.id)).scalars().all()
    assert states == ["trial", "good"]


def test_what_a_box_with_a_wrong_clock_says_is_moved_to_this_servers_time(centre: Centre, box: Box) -> None:
    year = 366 * 86400
    report = box_report("0.1.0", "good", at=stamp(year - 3600)) | {"at": stamp(year)}
    assert box.send(box.report(1, at=stamp(year), box=report)).status_code == 204
    with centre.fleet.reading() as tx:
        at = tx.execute(select(events.c.at).where(events.c.box_id == box.box_id)).scalar_one()
    assert abs(centre.fleet.now() - 3600 - at) < 30


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.long)])
def test_the_server_killed_at_any_moment_of_a_report_loses_nothing_that_it_acknowledged(tmp_path: Path, kills: int) -> None:
    """kill -9 while reports pour in: what was answered 204 is kept, and the same report again is 204."""
    centre, before = Centre(tmp_path / "killed"), 0
    try:
        for attempt in range(kills):
            centre.start()
            if attempt == 0:
                box = centre.box("box-1")
            acknowledged, bodies = 0, {number: box.report(attempt * 1000 + number) for number in range(1, 120)}
            threading.Timer(0.05 + attempt * 0.06, kill, [centre]).start()
            for number, body in bodies.items():
                try:
                    assert box.send(body).status_code == 204
                except requests.exceptions.ConnectionError:
                    break
                acknowledged = number
            assert acknowledged < 119
            print(f"kill {attempt + 1} of {kills}: {acknowledged} reports acknowledged before it")
            centre.stop(signal.SIGKILL)
            kept = stored(centre, "box-1")["sequence"]
            last = attempt * 1000 + acknowledged if acknowledged else before  # on a busy machine the kill may come before any answer
            assert kept in (last, attempt * 1000 + acknowledged + 1)
            before = max(kept, attempt * 1000 + 1)
            centre.start()
            body = bodies[max(1, kept - attempt * 1000)]
            assert box.send(body).status_code == 204
            centre.stop()
    finally:
        centre.close()


def kill(centre: Centre) -> None:
    assert centre.process
    os.killpg(centre.process.pid, signal.SIGKILL)


def test_a_box_that_reports_too_often_is_slowed_down(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "slow").start("--reports-per-hour", "3")
    try:
        box = centre.box("box-1")
        answers = [box.send(box.report(number)) for number in range(1, 6)]
        assert [answer.status_code for answer in answers] == [204, 204, 204, 429, 429]
        assert 0 < int(answers[-1].headers["Retry-After"]) <= 3600
        assert box.send(box.report(3)).status_code in (409, 204)
    finally:
        centre.close()


def test_an_address_that_asks_too_often_is_slowed_down(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "crowd").start("--requests-per-minute", "5")
    try:
        answers = [centre.post("/api/v1/enrol", json={}).status_code for _ in range(8)]
        assert answers == [422] * 5 + [429] * 3
    finally:
        centre.close()


def test_certificates_are_renewed_from_half_of_their_life_until_their_end(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "time")
    try:
        centre.start()
        box = centre.box("box-1")
        centre.stop()
        centre.start(later="+16d")
        fresh = Box(centre, "box-1")
        answer = box.renew(fresh.csr)
        assert answer.status_code == 200, answer.text
        fresh.keep(answer.json())
        assert fresh.certificate.not_valid_after_utc - box.certificate.not_valid_after_utc > timedelta(days=15)
        assert fresh.send(fresh.report(1)).status_code == 204
        assert box.send(box.report(2)).status_code == 204  # the old one is good until its end: an answer may be lost
        centre.stop()
        centre.start(later="+31d")
        for answer in (box.renew(), box.send(box.report(3))):
            assert problem(answer) == (401, "enrolment.expired")
            assert "new token" in answer.json()["detail"]
        assert fresh.send(fresh.report(3)).status_code == 204
    finally:
        centre.close()


def test_a_database_that_is_away_is_said_so_and_nothing_is_lost(postgres: Postgres, tmp_path: Path) -> None:
    db = postgres.database()
    centre = Centre(tmp_path / "away", db).start()
    try:
        box = centre.box("box-1")
        name = db.partition("?")[0].rpartition("/")[2]
        postgres.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")  # noqa: S608
        answer = box.send(box.report(1))
        assert problem(answer) == (503, "server.database")
        assert answer.headers["Retry-After"]
        postgres.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert box.send(box.report(1)).status_code == 204
    finally:
        centre.close()


def test_it_refuses_plain_http_beyond_this_machine(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "plain")
    with pytest.raises(AssertionError, match="needs TLS"):
        centre.start("--host", "0.0.0.0", tls=False)  # noqa: S104
    centre.stop()
    with pytest.raises(AssertionError, match="behind-proxy is for plain http"):
        centre.start("--behind-proxy")
    centre.close()
