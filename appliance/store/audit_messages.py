"""Audit entries as the XML messages of DICOM PS3.15: schema A.5.1, conventions A.5.2, one table per event in A.5.3 (requirement R9).

An entry names objects by their number on the box. Patient ID and UIDs are looked up when a message is made; patient names are
never written. What A.5.3 has no type for (a job failed, a study became urgent) is an Application Activity with a type of our own scheme.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree as ET

from appliance.store import audit
from appliance.store.database import Database

# Coding scheme of types that A.5.3 does not have.
OWN_SCHEME: Final = "99CLINICBOX"
# Events whose table allows one action only (EventActionCode).
_ACTIONS: Final = {
    "110100": "E", "110101": "R", "110105": "D", "110106": "R", "110107": "C", "110112": "E", "110113": "E", "110114": "E",
}  # fmt: skip
_APPLICATION: Final = ("110150", "DCM", "Application")
_LAUNCHER: Final = ("110151", "DCM", "Application Launcher")
_DESTINATION: Final = ("110152", "DCM", "Destination Role ID")
_SOURCE: Final = ("110153", "DCM", "Source Role ID")
_DESTINATION_MEDIA: Final = ("110154", "DCM", "Destination Media")
_SOURCE_MEDIA: Final = ("110155", "DCM", "Source Media")
_MEDIA_URI: Final = ("110037", "DCM", "URI")
_PATIENT_NUMBER: Final = ("2", "RFC-3881", "Patient Number")
_URI: Final = ("12", "RFC-3881", "URI")
_STUDY_UID: Final = ("110180", "DCM", "Study Instance UID")
_SOP_CLASS_UID: Final = ("110181", "DCM", "SOP Class UID")
# A list on a page is a query for studies, which this SOP class names (PS3.4 C.6.2).
_STUDY_ROOT_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
_PERSON, _SYSTEM_OBJECT = "1", "2"
_ROLE_PATIENT, _ROLE_REPORT, _ROLE_SECURITY_RESOURCE = "1", "3", "13"
_IP_ADDRESS: Final = "2"
_SOURCE_SERVER: Final = "4"  # application server process (A.5.1, AuditSourceTypeCode)
# What XML 1.0 cannot carry.
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Code = tuple[str, str, str]


@dataclass(frozen=True)
class _Study:
    """What a message says about one study; ``instances`` are the UIDs that an entry is about, by SOP class."""

    uid: str
    patient_id: str
    accession_number: str
    instances: dict[str, list[str]]
    counts: dict[str, int]


class AuditMessages:
    """Makes the messages of one box.

    Args:
        database: of the box.
        ae_title: names the box as source of the audit, with its host name.
    """

    def __init__(self, database: Database, ae_title: str) -> None:
        self._database, self._ae_title = database, ae_title

    def message(self, fields: dict[str, Any]) -> str:
        """One entry, by its fields (``audit.fields_of``), as an ``AuditMessage`` without XML declaration."""
        root = ET.Element("AuditMessage")
        _add_event(root, fields)
        for participant in self._participants(fields):
            root.append(participant)
        source = ET.SubElement(root, "AuditSourceIdentification", AuditSourceID=_text(f"{self._ae_title}@{socket.gethostname()}"))
        ET.SubElement(source, "AuditSourceTypeCode", {"csd-code": _SOURCE_SERVER})
        for item in self._objects(fields):
            root.append(item)
        return ET.tostring(root, encoding="unicode")

    # -- who -----------------------------------------------------------------------------------------------------------

    def _participants(self, fields: dict[str, Any]) -> Iterator[ET.Element]:
        """Who took part, in the roles of the event's table; the person or program that caused it is the requestor."""
        event, actor, peer = fields["event"], fields["actor"], str(fields["detail"].get("peer", ""))
        if event == audit.APPLICATION_ACTIVITY[0]:
            yield _participant(self._ae_title, False, _APPLICATION)
            yield _participant(actor, True, _LAUNCHER, peer=peer)
        elif event == audit.DATA_IMPORT[0]:
            yield _participant(actor, True, _DESTINATION, peer=peer)
            yield _participant(str(fields["detail"].get("source", "")) or "unknown", False, _SOURCE_MEDIA, media=_MEDIA_URI)
        elif event == audit.DATA_EXPORT[0]:
            yield _participant(actor, True, _SOURCE, peer=peer)
            yield _participant(str(fields["detail"].get("destination", "")) or "unknown", False, _DESTINATION_MEDIA, media=_MEDIA_URI)
        elif event in (audit.INSTANCES_TRANSFERRED[0], audit.QUERY[0]):
            yield _participant(actor, True, _SOURCE, peer=peer)
            yield _participant(self._ae_title, False, _DESTINATION)
        else:
            yield _participant(actor, True, peer=peer)

    # -- about what ----------------------------------------------------------------------------------------------------

    def _objects(self, fields: dict[str, Any]) -> Iterator[ET.Element]:
        """What the event is about, as its table wants it: patient and study, the audit log, or what a security alert names."""
        event = fields["event"]
        if event == audit.USER_AUTHENTICATION[0]:
            return
        studies = [study for number, instance in self._concerned(fields) if (study := self._study(number, instance))]
        if event == audit.QUERY[0]:
            yield _query(fields)
        if event == audit.AUDIT_LOG_USED[0]:
            yield _object("urn:clinicbox:audit", _URI, _ROLE_SECURITY_RESOURCE, "Security Audit Log")
        elif event == audit.SECURITY_ALERT[0] or not studies:
            yield _named_object(fields)
        for study in studies:
            yield _study_object(study)
        for patient_id in sorted({study.patient_id for study in studies}):
            yield _object(patient_id, _PATIENT_NUMBER, _ROLE_PATIENT, "", kind=_PERSON)

    def _concerned(self, fields: dict[str, Any]) -> Iterator[tuple[int, int | None]]:
        """The studies by number, with the instance where the entry is about one."""
        kind, _, text = fields["object"].partition(":")
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
        if number is not None and kind == "study":
            yield number, None
        elif number is not None and kind in ("instance", "job", "finding"):
            yield from self._by_instance(kind, number)
        for study in fields["detail"].get("studies", ()):
            yield int(study), None

    def _by_instance(self, kind: str, number: int) -> Iterator[tuple[int, int | None]]:
        instance: int | None = number
        if kind != "instance":
            table = {"job": "jobs", "finding": "findings"}[kind]
            row = self._database.one(f"SELECT instance_id FROM {table} WHERE id = ?", number)  # noqa: S608 - one of two names
            instance = row["instance_id"] if row else None
        row = self._database.one("SELECT s.study_id FROM instances i JOIN series s ON s.id = i.series_id WHERE i.id = ?", instance)
        if row:
            yield row["study_id"], instance

    def _study(self, number: int, instance: int | None) -> _Study | None:
        row = self._database.one("SELECT study_instance_uid, patient_id, accession_number FROM studies WHERE id = ?", number)
        if row is None:
            return None
        rows = self._database.query(
            "SELECT i.id, i.sop_class_uid, i.sop_instance_uid FROM instances i JOIN series s ON s.id = i.series_id WHERE s.study_id = ?",
            number,
        )
        return _Study(row["study_instance_uid"], row["patient_id"], row["accession_number"], *_by_class(rows, instance))


def _by_class(rows: list[sqlite3.Row], instance: int | None) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The UID of the instance that an entry is about, and how many there are of each SOP class."""
    shown = [row for row in rows if instance is None or row["id"] == instance]
    counts: dict[str, int] = {}
    for row in shown:
        counts[row["sop_class_uid"]] = counts.get(row["sop_class_uid"], 0) + 1
    named = {row["sop_class_uid"]: [row["sop_instance_uid"]] for row in shown} if instance is not None else {}
    return named, counts


def _add_event(root: ET.Element, fields: dict[str, Any]) -> None:
    detail, event, outcome = fields["detail"], fields["event"], int(fields["outcome"])
    attributes = {
        "EventActionCode": _ACTIONS.get(event, fields["action"]),
        "EventDateTime": fields["at"],
        "EventOutcomeIndicator": str(outcome),
    }
    element = ET.SubElement(root, "EventIdentification", attributes)
    _add_code(element, "EventID", (event, "DCM", fields["meaning"]))
    if "type" in detail:
        _add_code(element, "EventTypeCode", (detail["type"], "DCM", detail["type_meaning"]))
    elif event in (audit.APPLICATION_ACTIVITY[0], audit.SECURITY_ALERT[0]):
        kind = fields["object"].partition(":")[0]
        _add_code(element, "EventTypeCode", (kind, OWN_SCHEME, kind))
    if outcome:
        ET.SubElement(element, "EventOutcomeDescription").text = _text(str(detail.get("code", "failed")))


def _participant(user: str, is_requestor: bool, role: Code | None = None, *, peer: str = "", media: Code | None = None) -> ET.Element:
    attributes = {"UserID": _text(user), "UserIsRequestor": "true" if is_requestor else "false"}
    if peer:
        attributes |= {"NetworkAccessPointID": _text(peer), "NetworkAccessPointTypeCode": _IP_ADDRESS}
    element = ET.Element("ActiveParticipant", attributes)
    if role:
        _add_code(element, "RoleIDCode", role)
    if media:
        _add_code(ET.SubElement(element, "MediaIdentifier"), "MediaType", media)
    return element


def _object(identity: str, id_type: Code, role: str, name: str | None, *, kind: str = _SYSTEM_OBJECT) -> ET.Element:
    attributes = {
        "ParticipantObjectID": _text(identity), "ParticipantObjectTypeCode": kind, "ParticipantObjectTypeCodeRole": role
    }  # fmt: skip
    element = ET.Element("ParticipantObjectIdentification", attributes)
    _add_code(element, "ParticipantObjectIDTypeCode", id_type)
    if name is not None:
        ET.SubElement(element, "ParticipantObjectName").text = _text(name)
    return element


def _study_object(study: _Study) -> ET.Element:
    element = _object(study.uid, _STUDY_UID, _ROLE_REPORT, "")
    description = ET.SubElement(element, "ParticipantObjectDescription")
    if study.accession_number:
        ET.SubElement(description, "Accession", Number=_text(study.accession_number))
    for sop_class, count in sorted(study.counts.items()):
        item = ET.SubElement(description, "SOPClass", UID=_text(sop_class), NumberOfInstances=str(count))
        for uid in study.instances.get(sop_class, ()):
            ET.SubElement(item, "Instance", UID=_text(uid))
    return element


def _query(fields: dict[str, Any]) -> ET.Element:
    element = _object(_STUDY_ROOT_FIND, _SOP_CLASS_UID, _ROLE_REPORT, None)
    asked = {"list": fields["object"], "search": fields["detail"].get("search", False)}
    ET.SubElement(element, "ParticipantObjectQuery").text = _base64(json.dumps(asked, sort_keys=True))
    return element


def _named_object(fields: dict[str, Any]) -> ET.Element:
    """An object that is neither patient nor study, with the particulars of the entry (A.5.3.11: Alert Description)."""
    element = _object(f"urn:clinicbox:{fields['object']}", _URI, _ROLE_SECURITY_RESOURCE, fields["object"])
    particulars = {name: value for name, value in fields["detail"].items() if name not in ("type", "type_meaning", "studies")}
    value = _base64(json.dumps(particulars, ensure_ascii=False, sort_keys=True))
    ET.SubElement(element, "ParticipantObjectDetail", type="Alert Description", value=value)
    return element


def _add_code(parent: ET.Element, name: str, code: Code) -> None:
    """A coded value (A.5.1, CodedValueType)."""
    value, scheme, meaning = (_text(part) for part in code)
    ET.SubElement(parent, name, {"csd-code": value, "codeSystemName": scheme, "originalText": meaning})


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "replace")).decode()


def _text(value: str) -> str:
    """A text without the characters that XML cannot carry."""
    return _NOT_XML.sub("\ufffd", value)
