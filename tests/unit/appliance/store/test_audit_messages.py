"""Every entry of the audit is a valid message of DICOM PS3.15 A.5 (R9), checked against a schema written from its tables."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from appliance.cli.main import main
from appliance.core.domain import Patient, Source
from appliance.core.settings import Settings
from appliance.store import audit
from appliance.store.accounts import Accounts
from appliance.store.audit_messages import AuditMessages
from appliance.store.logins import Logins
from appliance.store.store import Store
from tests.support.stored_scans import add_scan, scan

SCHEMA = etree.RelaxNG(etree.parse(Path(__file__).parents[4] / "tests" / "support" / "audit_message.rng"))


def messages(store: Store) -> list[etree._Element]:
    """Every entry as a message that the schema has accepted."""
    maker = AuditMessages(store.database, "CLINICBOX")
    rows = store.database.query("SELECT entry FROM audit ORDER BY seq")
    every = [etree.fromstring(maker.message(json.loads(row["entry"]))) for row in rows]
    for message in every:
        SCHEMA.assertValid(message)
    return every


def of_event(every: list[etree._Element], event: str) -> list[etree._Element]:
    return [message for message in every if message.find("EventIdentification/EventID").get("csd-code") == event]


def objects(message: etree._Element, id_type: str) -> list[str]:
    """The ids of the objects with an id of this type."""
    path = f"ParticipantObjectIdentification[ParticipantObjectIDTypeCode/@csd-code='{id_type}']/@ParticipantObjectID"
    return [str(value) for value in message.xpath(path)]


def sent_by_dicom(store: Store) -> Any:
    """An image that a modality sent."""
    patient = Patient(patient_id="ID_2", patient_name="Zhang^San")
    image = scan(study_instance_uid="1.2.3", sop_instance_uid="1.2.3.4", patient=patient)
    return store.add_instance(image, lambda: "ab" * 32, b"DICM" * 100, Source("dimse", "CT1", ""), time.perf_counter())


def test_r9_every_event_is_schema_valid_and_names_patient_and_study(store: Store) -> None:
    uploaded, sent = add_scan(store), sent_by_dicom(store)
    study, instance = f"study:{sent.study_id}", f"instance:{sent.instance_id}"
    store.add_rejection(Source("upload", "doctor", "x.dcm"), 10, "ingest.not_dicom", "")
    for event, action in (
        (audit.INSTANCES_ACCESSED, "R"), (audit.INSTANCES_TRANSFERRED, "R"), (audit.STUDY_DELETED, "D"), (audit.DATA_EXPORT, "R"),
    ):  # fmt: skip
        store.record(event, "doctor", action, study)
    store.record(audit.QUERY, "doctor", "E", "worklist", studies=[uploaded.study_id, sent.study_id], search=True)
    store.record(audit.APPLICATION_ACTIVITY, "worker", "E", instance, 8, code="job.crashed")
    store.record(audit.AUDIT_LOG_USED, "cli:root", "R", audit.AUDIT_OBJECT)
    store.refusals.record("doctor", "10.0.0.1", "web.forbidden", endpoint="admin.rejected", **audit.USE_OF_RESTRICTED_FUNCTION)
    accounts = Accounts(store)
    logins = Logins(store, accounts)
    password = accounts.add("doctor", "clinician", "test")
    assert logins.login("doctor", "wrong", "10.0.0.1") is None
    token = logins.login("doctor", password, "10.0.0.1")
    assert token
    logins.logout(token)
    every = messages(store)
    seen = {message.find("EventIdentification/EventID").get("csd-code") for message in every}
    assert seen == {"110100", "110101", "110103", "110104", "110105", "110106", "110107", "110112", "110113", "110114"}
    (uid,) = [row["study_instance_uid"] for row in store.database.query("SELECT * FROM studies WHERE id = ?", sent.study_id)]
    for event in ("110103", "110105", "110106"):
        (message,) = of_event(every, event)
        assert objects(message, "110180") == [uid]
        assert objects(message, "2") == ["ID_2"]
    (query,) = of_event(every, "110112")
    assert len(objects(query, "110180")) == 2
    assert json.loads(base64.b64decode(query.findtext(".//ParticipantObjectQuery"))) == {"list": "worklist", "search": True}


def test_r9_a_message_names_the_image_its_class_and_who_sent_it(store: Store) -> None:
    sent = sent_by_dicom(store)
    (message,) = messages(store)
    assert message.find("EventIdentification/EventID").get("csd-code") == "110104"
    source, box = message.findall("ActiveParticipant")
    assert (source.get("UserID"), source.find("RoleIDCode").get("csd-code"), source.get("UserIsRequestor")) == ("CT1", "110153", "true")
    assert (box.get("UserID"), box.find("RoleIDCode").get("csd-code")) == ("CLINICBOX", "110152")
    row = store.database.require("x", "SELECT sop_class_uid, sop_instance_uid FROM instances WHERE id = ?", sent.instance_id)
    sop_class = message.find(".//SOPClass")
    assert (sop_class.get("UID"), sop_class.get("NumberOfInstances")) == (row["sop_class_uid"], "1")
    assert sop_class.find("Instance").get("UID") == row["sop_instance_uid"]


def test_r9_a_failure_has_its_outcome_and_reason_and_an_alert_its_particulars(store: Store) -> None:
    store.refusals.record("", "10.0.0.1", "web.host", **audit.NODE_AUTHENTICATION)
    (message,) = messages(store)
    event = message.find("EventIdentification")
    assert (event.get("EventOutcomeIndicator"), event.findtext("EventOutcomeDescription")) == ("4", "web.host")
    assert message.find("ActiveParticipant").get("NetworkAccessPointID") == "10.0.0.1"
    detail = json.loads(base64.b64decode(message.find(".//ParticipantObjectDetail").get("value")))
    assert detail == {"code": "web.host", "peer": "10.0.0.1"}


def test_r9_no_message_holds_a_patients_name(store: Store) -> None:
    sent_by_dicom(store)
    (name,) = [row["patient_name"] for row in store.database.query("SELECT patient_name FROM studies")]
    assert name
    maker = AuditMessages(store.database, "CLINICBOX")
    for row in store.database.query("SELECT entry FROM audit"):
        assert name not in maker.message(json.loads(row["entry"]))


@given(st.text(), st.text(), st.text())
def test_r9_whatever_stands_in_an_entry_makes_valid_xml(store_of_module: Store, actor: str, obj: str, word: str) -> None:
    entry = {
        "seq": 1, "at": "2026-01-01T00:00:00.000+00:00", "event": "110113", "meaning": "Security Alert", "actor": actor, "action": "E",
        "object": obj, "outcome": 4, "detail": {"code": word, "peer": word, "word": word},
    }  # fmt: skip
    text = AuditMessages(store_of_module.database, "CLINICBOX").message(entry)
    etree.fromstring(text)


@pytest.fixture(scope="module")
def store_of_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Store(Settings.parse({"data_dir": tmp_path_factory.mktemp("box")}))
    yield made
    made.close()


def test_r9_the_whole_audit_is_exported_and_valid(
    settings: Settings, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_scan(store)
    store.record(audit.SECURITY_ALERT, "x", "E", "y", 4, code="z")
    assert main(["audit", "export", "--xml", "--data-dir", str(settings.data_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # two, and that somebody exported them
    for line in lines:
        SCHEMA.assertValid(etree.fromstring(line))
