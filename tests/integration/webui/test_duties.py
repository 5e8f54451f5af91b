"""The status page tells those who can act: no security administrator, a changed audit, a syslog server that is away."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.service.audit_sender import AuditSender
from appliance.store.audit_check import BROKEN_INTERVAL_S, CHECK_NAME, INTERVAL_S, check_audit, last_check
from tests.support.box_database import raw_connection
from tests.support.web_box import ROOT, Box, in_process, wait_for, words

COMMAND = "appliance user add NAME --role security_administrator"


@pytest.fixture
def box(settings: Settings, quick_passwords: None) -> Iterator[Box]:
    with in_process(settings.model_copy(update={"audit_syslog": "127.0.0.1:1"})) as running:
        yield running


def cut(data_dir: Path) -> None:
    """Remove the entries at the end of the audit."""
    with closing(raw_connection(data_dir)) as raw:
        raw.execute("DROP TRIGGER audit_no_delete")
        raw.execute("DELETE FROM audit WHERE seq > 1")


def test_a_missing_security_administrator_is_a_plain_line_with_the_command_for_those_who_can_run_it(box: Box) -> None:
    doctor = box.person("wang")
    page = doctor.open("/health")  # nobody else has an account: the doctor asks for help
    assert COMMAND in page
    technician = box.person("zhao", Role.TECHNICIAN)
    assert COMMAND not in doctor.open("/health")
    page = technician.open("/health")
    assert f"{COMMAND} --data-dir {box.settings.data_dir}" in words(page)
    assert "没有安全管理员" in words(technician.speak("zh").open("/health"))
    assert "no_security_administrator" not in box.person("auditor", Role.AUDITOR).open("/health")
    box.accounts.add("chief", Role.SECURITY_ADMINISTRATOR, "test")
    assert COMMAND not in technician.open("/health")


def test_a_missing_security_administrator_changes_no_colour(box: Box) -> None:
    technician = box.person("zhao", Role.TECHNICIAN)
    before = technician.open("/health")
    box.accounts.add("chief", Role.SECURITY_ADMINISTRATOR, "test")
    after = technician.open("/health")

    def heading(page: str) -> str:
        return page[page.index('<section class="health-verdict') : page.index("<ul>")]

    assert heading(before) == heading(after)


@pytest.mark.parametrize("role", sorted(Role))
def test_r10_a_changed_audit_is_on_the_page_of_all_but_clinicians(box: Box, role: Role) -> None:
    assert check_audit(box.store.database).interval_s == INTERVAL_S
    person = box.person("somebody", role)
    assert 'data-item="audit.broken"' not in person.open("/health")
    cut(box.settings.data_dir)
    assert check_audit(box.store.database).interval_s == BROKEN_INTERVAL_S
    page = person.open("/health")
    assert ('data-item="audit.broken"' in page) == (role is not Role.CLINICIAN)
    assert ("leave the disk as it is" in page) == (role is not Role.CLINICIAN)
    box.store.database.anchors().acknowledge("security", "disk exchanged")
    check_audit(box.store.database)
    assert 'data-item="audit.broken"' not in person.open("/health")


def test_r10_the_worker_searches_the_audit_and_the_page_waits_for_no_search(box: Box) -> None:
    data_dir, technician = box.settings.data_dir, box.person("zhao", Role.TECHNICIAN)
    cut(data_dir)
    assert 'data-item="audit.broken"' not in technician.open("/health")
    command = [sys.executable, "-m", "appliance", "worker", "--data-dir", str(data_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        try:
            wait_for((data_dir / "run" / CHECK_NAME).is_file)
        finally:
            worker.terminate()
    assert 'data-item="audit.broken"' in technician.open("/health")


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"at": 1, "problems": "many"}', '{"problems": 1e400}'])
def test_a_damaged_result_counts_as_none(box: Box, damaged: str) -> None:
    path = box.settings.data_dir / "run" / CHECK_NAME
    path.parent.mkdir(exist_ok=True)
    path.write_text(damaged)
    assert last_check(box.settings.data_dir) is None
    box.person("zhao", Role.TECHNICIAN).open("/health")


def test_r12_a_syslog_server_that_is_away_is_on_the_page_of_those_who_can_act(box: Box) -> None:
    technician, doctor = box.person("zhao", Role.TECHNICIAN), box.person("wang")
    assert 'data-item="audit.unreachable"' not in technician.open("/health")
    (box.settings.data_dir / "run").mkdir(exist_ok=True)
    with closing(AuditSender(box.store)) as sender:
        assert not sender.step()  # nothing listens on port 1
    page = technician.open("/health")
    assert 'data-item="audit.unreachable"' in page
    assert "127.0.0.1:1" in words(page)
    assert 'data-item="audit.unreachable"' not in doctor.open("/health")
    state = box.settings.data_dir / "run" / "audit-sender.json"
    state.write_text(json.dumps({"code": "", "detail": ""}))
    assert 'data-item="audit.unreachable"' not in technician.open("/health")
