"""JSON log lines: one object per record, without the text of exceptions, which may contain data of a patient or a secret."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time in UTC, level, logger, message, and the type of an exception.

    Args:
        fields: the extra fields of a record that may be written; all others are left out, so that no patient data gets into a log. A
            formatter with fields also writes milliseconds, and the source line (never the values) of an exception.
    """

    def __init__(self, fields: Sequence[str] | None = None) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        at = datetime.fromtimestamp(record.created, timezone.utc)
        stamp = f"{at:%Y-%m-%dT%H:%M:%SZ}" if self._fields is None else at.isoformat(timespec="milliseconds")
        entry: dict[str, object] = {"at": stamp, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        entry |= {name: value for name in self._fields or () if (value := getattr(record, name, None)) is not None}
        if record.exc_info and record.exc_info[0] is not None:
            entry["exception"] = record.exc_info[0].__name__
            frame = record.exc_info[2] if self._fields is not None else None
            while frame and frame.tb_next:
                frame = frame.tb_next
            if frame:
                entry["where"] = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        return json.dumps(entry, ensure_ascii=False)
