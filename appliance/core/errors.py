"""What can go wrong on the box, split by where it is mended.

    ApplianceError
    ├── IngestError       a scan was refused at the door; the sender still has it
    │   └── PixelError    a stored scan whose pixels cannot be read
    ├── StoreError        the disk or the database failed; nothing was acknowledged
    ├── VolumeError       a series is no volume: slices are missing or do not fit together
    ├── InferenceError    a job failed; it is retried, then poisoned
    ├── ActivationError   a model was not put to work; the one before it still reads
    └── ReportError       a result object could not be written

Each carries a ``code`` (registered in :mod:`appliance.messages`, where its text in Chinese and English stands) and a ``hint``
that tells the person what to do.
"""

from __future__ import annotations

from model_sync import messages


class ApplianceError(Exception):
    """Base of all errors of the box.

    Args:
        code: a code of :mod:`model_sync.messages`.
        detail: technical particulars in English for the log and the technician; never a patient's name or identifier.
        hint: what to do, when the catalogue's own hint for the code does not fit.
    """

    def __init__(self, code: str, detail: str = "", *, hint: str | None = None) -> None:
        self.code = code
        self.detail = detail
        self.hint = hint or messages.hint(code, "en")
        super().__init__(f"{code}: {messages.text(code, 'en')}" + (f" ({detail})" if detail else ""))


class IngestError(ApplianceError):
    """A scan is refused at the door; nothing of it was kept."""


class PixelError(IngestError):
    """A frame's pixels cannot be decoded or are not what the header says."""


class StoreError(ApplianceError):
    """The durable store failed; nothing was acknowledged and nothing half-written is visible."""


class VolumeError(ApplianceError):
    """The images of a series cannot be read as one volume; each of them is kept and can be viewed."""


class InferenceError(ApplianceError):
    """A job could not be done; the scan is kept and the job retried or shown as failed."""


class ActivationError(ApplianceError):
    """A model was refused; the model before it goes on reading."""


class ReportError(ApplianceError):
    """A result object could not be made."""
