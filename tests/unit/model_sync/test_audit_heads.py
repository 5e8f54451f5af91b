"""The centre finds an audit that went backwards or was changed, and no false one (R10)."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from model_sync.agent.report import AuditHead, AuditReport
from model_sync.fleet.audit_heads import AuditState, compare


def head(entries: int, history: str = "right") -> AuditHead:
    return AuditHead(entries=entries, digest=hashlib.sha256(f"{history} {entries}".encode()).hexdigest())


def report(entries: int, *anchors: int, history: str = "right") -> AuditReport:
    return AuditReport(head=head(entries, history), anchors=[head(number, history) for number in anchors])


def after(*reports: AuditReport | None) -> list[AuditState]:
    stored, states = "", []
    for item in reports:
        stored, state = compare(stored, item)
        states.append(state)
    return states


WHOLE, BACKWARDS, CHANGED = AuditState.WHOLE, AuditState.BACKWARDS, AuditState.CHANGED


def test_r10_a_cut_a_wipe_and_an_older_copy_are_found() -> None:
    assert after(report(10), report(20, 10), report(15, 10)) == [WHOLE, WHOLE, BACKWARDS]
    assert after(report(10), report(0)) == [WHOLE, BACKWARDS]


def test_r10_a_history_that_was_written_anew_is_found_however_long_it_is() -> None:
    assert after(report(10), report(20, 10, history="forged")) == [WHOLE, CHANGED]
    assert after(report(10), report(10, history="forged")) == [WHOLE, CHANGED]
    missing = AuditReport(head=head(20, "forged"), anchors=[AuditHead(entries=10, digest="0" * 64)])
    assert after(report(10), missing) == [WHOLE, CHANGED]


def test_r10_a_box_that_stops_naming_known_heads_is_found_and_a_crossing_is_not() -> None:
    assert after(report(10), report(20), report(30, 10), report(40, 30)) == [WHOLE] * 4
    assert after(report(10), *[report(number) for number in (20, 30, 40)]) == [WHOLE, WHOLE, WHOLE, CHANGED]
    assert after(report(10), None, None, None) == [WHOLE, WHOLE, WHOLE, CHANGED]
    assert after(None, None, None, None, report(10)) == [WHOLE] * 5


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(0, 2))
def test_r10_an_honest_box_is_never_accused(steps: list[int], lag: int) -> None:
    entries, sent = 0, []
    reports = []
    for step in steps:
        entries += step
        confirmed = sent[-1 - lag :][:1]
        reports.append(report(entries, *confirmed))
        sent.append(entries)
    assert set(after(*reports)) <= {WHOLE}


def test_r10_what_was_found_is_evidence_and_is_not_replaced() -> None:
    stored, _ = compare("", report(10))
    again, state = compare(stored, report(5))
    assert (again, state) == (stored, BACKWARDS)
