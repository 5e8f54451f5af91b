"""The errors of the box, divided by who can correct them.

    ApplianceError
    ├── IngestError       an image was refused by ingest; the sender still has it
    │   └── PixelError    the pixels of a stored image cannot be decoded
    ├── StoreError        the disk or the database failed; nothing was acknowledged
    ├── VolumeError       a series is not a volume: slices are missing or do not fit together
    ├── InferenceError    a job failed; it is retried, then marked as failed
    ├── ActivationError   a model was not activated; the previous one stays active
    └── ReportError       a result object could not be written

Each carries a ``code``, whose text in Chinese and English is registered in :mod:`appliance.messages`, and a ``hint``: what a person can
do about it.
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
    """Ingest refused an image; nothing of it was stored."""


class PixelError(IngestError):
    """The pixels of a frame cannot be decoded, or contradict the header."""


class StoreError(ApplianceError):
    """The store failed; nothing was acknowledged and nothing incomplete is visible."""


class VolumeError(ApplianceError):
    """The images of a series do not form a volume; each of them is stored and can be viewed."""


class InferenceError(ApplianceError):
    """A job failed; the image is stored, and the job is retried or shown as failed."""


class ActivationError(ApplianceError):
    """A model was refused; the previous model stays active."""


class ReportError(ApplianceError):
    """A result object could not be written."""
