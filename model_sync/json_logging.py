"""JSON log lines: one object per record, without the text of exceptions, which may contain data of a patient or a secret."""

from __future__ import annotations

import json
import logging
import time


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time in UTC, level, logger, message, and the type of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        entry = {"at": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[0] is not None:
            entry["exception"] = record.exc_info[0].__name__
        return json.dumps(entry, ensure_ascii=False)
