"""Scans without a file, and a store that holds some."""

from __future__ import annotations

import time
from typing import Any

from appliance.core.domain import Patient, Scan, Source
from appliance.store.store import Store
from model_sync.bundle import AppliesTo

SOURCE = Source("upload", "demo", "a.dcm")

RULE = AppliesTo.model_validate(
    {
        "modality": ["CR", "DX"], "sop_class_uid": ["1.2.840.10008.5.1.4.1.1.1"], "body_part": ["CHEST"], "view_position": ["PA", "AP"],
        "when_body_part_absent": "assume", "assumed_body_part": "CHEST", "when_view_absent": "assume", "assumed_view": "PA",
        "age": {"min_years": 1, "max_years": 5, "outside": "caution", "absent": "caution", "note": {"zh": "儿童", "en": "children"}},
    }
)  # fmt: skip


def scan(**changes: Any) -> Scan:
    """A chest CR in scope."""
    values: dict[str, Any] = {
        "study_instance_uid": "1", "series_instance_uid": "2", "sop_instance_uid": "3", "sop_class_uid": "1.2.840.10008.5.1.4.1.1.1",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1", "patient": Patient(), "modality": "CR", "body_part_examined": "CHEST",
        "view_position": "PA", "patient_age_years": 4.0,
    }  # fmt: skip
    return Scan(**(values | changes))


def add_scan(store: Store, number: int = 1, *, source: Source = SOURCE, data: bytes = b"DICM" * 100, **changes: Any) -> Any:
    """Store image ``number`` of one series."""
    image = scan(sop_instance_uid=f"1.{number}", study_instance_uid="1.9", series_instance_uid="1.8", **changes)
    return store.add_instance(image, lambda: f"{number:064x}", data, source, time.perf_counter())
