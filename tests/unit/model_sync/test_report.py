"""What may leave a box: the allow-list, its signature, and JSON of strangers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from appliance.store.store import Store
from model_sync import messages
from model_sync.agent import report
from model_sync.agent.report import CODES, ActivationState, BoxReport, ReportError, StatusReport, load_json, sign, verify
from tests.support.fleet_site import box_report, status_json
from tests.support.poisoned_reports import CANARY, TRACES, poisoned, put

KINDS = ("activation.", "model.", "bundle.", "trust.", "runtime.")
ROOT = Path(__file__).resolve().parents[3]
KNOWN = {"cxr-pneumonia": frozenset({"0.1.0"})}


def status(sequence: int = 1, **changes: Any) -> StatusReport:
    return StatusReport.model_validate_json(status_json("box-1", sequence, **changes))


@pytest.fixture(scope="module")
def signer() -> CryptoSigner:
    return CryptoSigner.generate_ecdsa()


def test_a_signed_report_comes_back_as_it_was(signer: CryptoSigner) -> None:
    told = status(7)
    assert verify(sign(told, signer), signer.public_key) == told


def test_a_report_changed_on_its_way_is_refused(signer: CryptoSigner) -> None:
    body = sign(status(7), signer).replace(b'"sequence":7', b'"sequence":8')
    with pytest.raises(ReportError) as refused:
        verify(body, signer.public_key)
    assert refused.value.code == "report.signature"


def test_a_report_signed_by_another_box_is_refused(signer: CryptoSigner) -> None:
    body = sign(status(), CryptoSigner.generate_ecdsa())
    with pytest.raises(ReportError, match="not this box's"):
        verify(body, signer.public_key)


@pytest.mark.parametrize("garbage", ["", "zz", "00", "30" * 36, "é"])
def test_a_garbled_signature_is_refused(signer: CryptoSigner, garbage: str) -> None:
    envelope = json.loads(sign(status(), signer))
    envelope["signature"]["sig"] = garbage
    with pytest.raises(ReportError) as refused:
        verify(json.dumps(envelope).encode(), signer.public_key)
    assert refused.value.code == "report.signature"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\xff\xfe", b"null", b"[]", b"7", b'"text"', b"{", b"[" * 100_000, b'{"signed":' * 5000, b'{"a":1,"a":2}', b'{"a":1.5}',
        b'{"a":NaN}', b'{"a":Infinity}', b'{"a":1e400}', b'{"signed":{},"signature":{}}', b'{"signed":[],"signature":[]}',
        b'{"signed":{},"signature":{"keyid":1,"sig":2}}', b'{"a":' + b"9" * 5000 + b"}", b" " * 70_000,
        b'{"signed":"\\ud800","signature":{}}',
    ],
)  # fmt: skip
def test_hostile_json_is_refused_and_nothing_else_happens(signer: CryptoSigner, raw: bytes) -> None:
    with pytest.raises(ReportError) as refused:
        verify(raw, signer.public_key)
    assert refused.value.code == "report.invalid"


@given(st.binary(max_size=300))
def test_any_bytes_are_a_report_or_refused(raw: bytes) -> None:
    with pytest.raises(ReportError):
        verify(raw, CryptoSigner.generate_ed25519().public_key)


def test_a_larger_body_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ReportError, match="larger than 10 bytes"):
        load_json(b'{"a": "123456"}', 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"note": CANARY}, {"box_id": f"box {CANARY}"}, {"sequence": 0}, {"sequence": 2**53}, {"sequence": "3"}, {"sequence": True},
        {"agent_version": "1.0.0-ZhangSan"}, {"ring": "Zhang San"}, {"schema": 2}, {"sync": {"state": CANARY, "code": "ok"}},
        {"sync": {"state": "ok", "code": "ok", "message": CANARY}}, {"at": CANARY}, {"at": "2026-03-01T08:00:00"}, {"box": {"schema": 1}},
    ],
)  # fmt: skip
def test_r18_what_is_not_on_the_list_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ReportError) as refused:
        report._validated(StatusReport, json.loads(status_json("box-1", 1, **changes)))
    assert CANARY not in str(refused.value)


def test_r18_no_patient_in_any_place_of_a_box_report_passes() -> None:
    passed = refused = 0
    for raw in poisoned():
        try:
            told = BoxReport.parse(raw).restricted_to(KNOWN)
        except ReportError as error:
            refused += 1
            assert not TRACES.search(str(error).encode())
            continue
        passed += 1
        assert not TRACES.search(told.model_dump_json(by_alias=True).encode())
    assert refused > 150
    assert passed > 10  # reasons, moments and names that the library does not know: let through, without what they said


def test_lines_that_the_library_does_not_sign_are_only_counted() -> None:
    told = BoxReport.parse(json.dumps(box_report()).encode())
    assert told.restricted_to({}).unlisted == 2
    assert told.restricted_to({}).models == []
    assert told.restricted_to(KNOWN) == told


def test_a_version_of_a_signed_line_may_be_a_plain_release_or_a_signed_name() -> None:
    odd = BoxReport.parse(json.dumps(box_report("1.0.0-site.7")).encode())
    assert odd.restricted_to(KNOWN).unlisted == 2
    assert odd.restricted_to({"cxr-pneumonia": frozenset({"1.0.0-site.7"})}).unlisted == 0
    assert BoxReport.parse(json.dumps(box_report("3.2.1")).encode()).restricted_to(KNOWN).unlisted == 0


def test_an_unknown_reason_is_said_to_be_unlisted() -> None:
    told = BoxReport.parse(json.dumps(box_report("0.1.0", "failed", "because.of.zhangsan")).encode())
    assert told.activations[0].code == "unlisted"


def test_a_clock_that_is_not_set_is_the_epoch() -> None:
    assert status(at="1971-05-05T05:05:05Z").to_dict()["at"] == "1970-01-01T00:00:00Z"
    assert status(at="2026-03-01T16:00:00.5+08:00").to_dict()["at"] == "2026-03-01T08:00:00Z"


def test_the_last_digits_of_the_disk_are_not_told() -> None:
    raw = put(box_report(), ("health", "disk_free_bytes"), 123_456_789_012)
    assert BoxReport.parse(json.dumps(raw).encode()).health.disk_free_bytes % (64 << 20) == 0


def test_what_the_appliance_really_writes_passes_whole(store: Store) -> None:
    """Every state of the journal with every reason that the box knows for one."""
    from appliance.lifecycle.exchange import box_report as written

    with store.database.transaction() as tx:
        row = (
            "ab" * 32,
            "cxr-pneumonia",
            "0.1.0",
            "models/x",
            "{}",
            "int8",
            "onnxruntime 1.20.1",
            "active",
            "{}",
            "2026-03-01T08:00:00.123Z",
        )
        tx.execute("INSERT INTO models VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    codes = [code for code in sorted(messages.codes("model_sync") | messages.codes("appliance")) if code.startswith(KINDS)]
    states = get_args(ActivationState)
    for number, code in enumerate(codes):
        with store.database.transaction() as tx:
            tx.execute(
                "INSERT INTO activations (name, version, digest, device, source, origin, state, reason, actor, started_at, updated_at)"
                " VALUES ('cxr-pneumonia', '0.1.0', ?, 'x', 'library', '', ?, ?, 'test', '', '2026-03-01T08:00:00.123Z')",
                ("cd" * 32, states[number % len(states)], json.dumps({"code": code})),
            )
        told = BoxReport.parse(json.dumps(written(store)).encode()).restricted_to(KNOWN)
        assert told.activations[0].code == code
        assert (len(told.models), told.unlisted) == (1, 0)
        with store.database.transaction() as tx:
            tx.execute("DELETE FROM activations")


def raised_codes() -> set[str]:
    """Codes that the sources raise and that a status or an activation can carry."""
    found: set[str] = set()
    own = {"report", "messages_central", "page"}  # the last two have the fleet page's own words
    for path in (ROOT / "model_sync").rglob("*.py"):
        if path.stem not in own:
            found |= set(re.findall(r'"((?:sync|trust|usb|bundle)\.[a-z_]+)"', path.read_text("utf-8")))
    return found - {"sync.toml"}


def test_every_reason_that_the_agent_gives_may_be_told() -> None:
    assert raised_codes() - CODES == set()


def test_every_reason_that_the_box_gives_for_an_activation_may_be_told() -> None:
    assert {code for code in messages.codes("model_sync") | messages.codes("appliance") if code.startswith(KINDS)} - CODES == set()
