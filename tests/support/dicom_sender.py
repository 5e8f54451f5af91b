"""A DICOM sender for the receiver's tests."""

from __future__ import annotations

import pydicom
from pynetdicom import AE
from pynetdicom.sop_class import ComputedRadiographyImageStorage  # type: ignore[attr-defined]


def send(port: int, *scans: pydicom.Dataset) -> list[int | None]:
    """C-STORE over one association; the status of each."""
    entity = AE(ae_title="MODALITY")
    entity.add_requested_context(ComputedRadiographyImageStorage)
    association = entity.associate("127.0.0.1", port)
    assert association.is_established
    statuses = [getattr(association.send_c_store(scan), "Status", None) for scan in scans]
    association.release()
    return statuses
