"""The audit on the auditor's page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.store.audit import NODE_AUTHENTICATION, SECURITY_ALERT
from appliance.store.audit_anchors import CONFIRMED_NAME
from tests.support.audit_damage import FIRST, LAST, damage_entries
from tests.support.scans import scan_bytes
from tests.support.web_box import HOSTILE, Box, in_process


@pytest.fixture
def box(settings: Settings, quick_passwords: None) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


def test_the_auditor_reads_the_audit_which_is_an_entry_too(box: Box) -> None:
    study = box.take(scan_bytes(PatientName="CANARY^NAME", PatientID="CANARY-ID")).study_id
    assert box.person("wang").get(f"/studies/{study}").status_code == 200
    auditor = box.person("li", Role.AUDITOR)
    assert auditor.get("/").headers["Location"] == "/audit"
    page = auditor.open("/audit")
    assert "CANARY" not in page
    for said in (
        "Study was seen",
        f"study:{study}",
        "Login or logout: Login",
        "Security: Account changed",
        "role = auditor",
        "Audit was read",
    ):
        assert said in page
    assert auditor.open("/audit").count("Audit was read") > page.count("Audit was read")


def test_older_entries_are_on_further_pages(box: Box) -> None:
    auditor = box.person("li", Role.AUDITOR)
    for number in range(120):
        box.store.record(("110100", "Application Activity"), HOSTILE, "E", f"object:{number}")
    page = auditor.open("/audit")
    assert HOSTILE not in page
    first = [int(number) for number in re.findall(r'data-entry="(\d+)"', page)]
    assert len(first) == 100
    (older,) = re.findall(r'href="(/audit\?before=\d+)"', page)
    rest = auditor.open(older)
    second = [int(number) for number in re.findall(r'data-entry="(\d+)"', rest)]
    assert [*first, *second] == list(range(first[0], 0, -1))
    assert "Newest" in rest
    for odd in ("²", "-1", "0", "9" * 40, str(2**63), "x"):
        assert auditor.get(f"/audit?before={odd}").status_code == 200


@pytest.mark.parametrize(
    ("language", "whole", "broken"), [("en", "The audit is whole", "has been changed"), ("zh", "审计记录完整", "被改动")]
)
def test_the_auditor_searches_for_changes(box: Box, language: str, whole: str, broken: str) -> None:
    auditor = box.person("li", Role.AUDITOR, language)
    assert auditor.post("/audit/verify").headers["Location"] == "/audit"
    assert whole in auditor.open("/audit")
    with box.store.database.transaction() as tx:
        tx.execute("DROP TRIGGER audit_no_update")
        tx.execute("UPDATE audit SET entry = replace(entry, 'auditor', 'nobody') WHERE seq = 1")
    auditor.post("/audit/verify")
    assert re.search(rf'class="banner tone-bad" role="alert">.*{broken}', auditor.open("/audit"))


@pytest.mark.parametrize(("language", "said"), [("en", "certificate is not trusted"), ("zh", "syslog 服务器的证书不可信")])
def test_the_reason_of_an_entry_is_shown_in_words(box: Box, language: str, said: str) -> None:
    box.store.record(SECURITY_ALERT, "audit-sender", "E", "syslog", 8, code="audit.certificate", **NODE_AUTHENTICATION)
    page = box.person("li", Role.AUDITOR, language).open("/audit")
    assert said in page
    assert "audit.certificate" in page


def test_the_page_compares_with_the_head_that_the_centre_confirmed(settings: Settings, quick_passwords: None, tmp_path: Path) -> None:
    with in_process(settings.model_copy(update={"exchange_dir": tmp_path})) as box:
        auditor = box.person("li", Role.AUDITOR, "en")
        auditor.post("/audit/verify")
        assert "The audit is whole" in auditor.open("/audit")
        (tmp_path / CONFIRMED_NAME).write_text(json.dumps({"entries": 1, "digest": "ab" * 32}))
        auditor.post("/audit/verify")
        assert "has been changed" in auditor.open("/audit")


def test_damaged_entries_are_shown_as_such_and_hide_no_other(box: Box) -> None:
    auditor = box.person("li", Role.AUDITOR, "en")
    for _ in range(LAST):
        box.store.record(("110100", "Application Activity"), "t", "E", "x:1")
    assert "Some entries below are damaged" not in auditor.open("/audit")
    damage_entries(box.settings.data_dir)
    page = auditor.open("/audit")
    assert "Some entries below are damaged" in page
    damaged = re.findall(r'data-entry="(\d+)".*This entry was changed and cannot be read', page)
    assert damaged == [str(number) for number in range(LAST, FIRST - 1, -1)]
    assert "x:1" in page
    assert 'data-entry="1"' in page
    auditor.post("/audit/verify")
    assert "has been changed" in auditor.open("/audit")
