"""What the upload form, the single request and the tus protocol share: the unfinished uploads, their ingest, names and forms."""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Final, cast

from flask import Flask, Request, current_app, url_for
from flask_login import current_user

from appliance.core.domain import Source
from appliance.core.errors import IngestError, StoreError
from appliance.store.encrypted_stream import EncryptedSpool
from appliance.store.keys import DATABASE_KEY
from webui.context import BoxContext, current_box
from webui.messages import RESULTS, reason_hint, reason_text
from webui.upload.finaliser import Finaliser
from webui.upload.upload_store import UploadStore

logger = logging.getLogger(__name__)

VIEWS: Final = ("PA", "AP", "LL")
_AGE_UNITS: Final = {"years": "Y", "months": "M", "days": "D"}
_NAME: Final = re.compile(r"[^\\=]{0,64}")  # a backslash separates values, an equals sign the groups of a name (PS3.5 6.2)


@dataclass(frozen=True)
class UploadService:
    """The uploads of one box.

    Attributes:
        uploads: the unfinished uploads.
        finaliser: the ingest of complete ones.
        senders: limits the threads that read bodies over slow connections.
        waiters: limits the threads that wait for an outcome.
    """

    uploads: UploadStore
    finaliser: Finaliser
    senders: threading.Semaphore
    waiters: threading.Semaphore


def current_uploads() -> UploadService:
    """The uploads of the application that serves this request."""
    service: UploadService = current_app.extensions["uploads"]
    return service


def init_app(app: Flask, box: BoxContext) -> None:
    """Make the service of an application, and continue with the complete uploads that a former process left.

    Multipart bodies are spooled inside the data directory and encrypted, so that no patient data is on the disk in plain form.
    """
    uploads, threads = UploadStore(box.settings, box.store.keys.load(DATABASE_KEY), box.store.check_space), box.settings.web_threads
    service = UploadService(
        uploads,
        Finaliser(box.store, uploads),
        senders=threading.BoundedSemaphore(max(1, threads // 2)),
        waiters=threading.BoundedSemaphore(max(1, threads // 4)),
    )
    app.extensions["uploads"] = service
    box.on_stop.append(service.finaliser.stop)

    class SpoolingRequest(Request):
        """A request whose uploaded files are written to the data directory, encrypted."""

        def _get_file_stream(
            self, total_content_length: int | None, content_type: str | None, filename: str | None = None, content_length: int | None = None
        ) -> IO[bytes]:
            del total_content_length, content_type, filename, content_length
            return cast("IO[bytes]", EncryptedSpool(uploads.directory))

    app.request_class = SpoolingRequest
    if resumed := service.finaliser.recover():
        logger.info("uploads resumed", extra={"count": resumed})


@contextmanager
def record_refusal(name: str, size: int) -> Iterator[None]:
    """Record a refusal that happens before ingest in the list of refused files, and raise it again."""
    try:
        yield
    except (IngestError, StoreError) as refusal:
        try:
            current_box().store.add_rejection(Source("upload", current_user.account.username, name), size, refusal.code, refusal.detail)
        except StoreError:  # the disk has no room for the record either; the sender gets the refusal all the same
            logger.exception("refusal not recorded")
        raise


def localize_outcome(outcome: dict[str, Any]) -> dict[str, Any]:
    """One outcome with its texts in the language of this request, and the address of its study."""
    code, study = outcome["code"], outcome["study_id"]
    return outcome | {
        "word": str(RESULTS[outcome["result"]]),
        "reason": reason_text(code) if code else "",
        "hint": reason_hint(code) if code else "",
        "url": url_for("study.show", study_id=study) if study else "",
    }


def display_name(filename: str) -> str:
    """The name of a file on the sender's computer, folders included; only shown, never used as a path."""
    name = "".join(char for char in filename if char.isprintable()).strip()
    return name or f"file-{secrets.token_hex(3)}"


def parse_form(fields: Any) -> dict[str, Any] | list[str]:
    """The patient form of a picture as ``PictureForm`` takes it, or the names of the invalid fields.

    A name or an ID is required, so that pictures of two unnamed patients never become one study. A view is required, because a picture
    does not state it.
    """
    if not isinstance(fields, dict):
        return ["patient_name"]
    text = {key: "".join(char for char in str(value) if char.isprintable()).strip() for key, value in fields.items()}
    wrong = [key for key in ("patient_id", "patient_name") if not _NAME.fullmatch(text.get(key, ""))]
    if not text.get("patient_id") and not text.get("patient_name"):
        wrong.append("patient_name")
    sex, view, age = text.get("patient_sex", ""), text.get("view", ""), _parse_age(text)
    checks = {"patient_sex": sex in ("", "M", "F", "O"), "view": view in VIEWS, "age": age is not None}
    wrong += [key for key, is_valid in checks.items() if not is_valid]
    if wrong:
        return wrong
    return {
        "patient_id": text.get("patient_id", ""),
        "patient_name": text.get("patient_name", ""),
        "patient_sex": sex,
        "patient_age": age,
        "view": view,
        "photographed": text.get("photographed", "") in ("1", "true", "True", "on"),
    }


def _parse_age(text: dict[str, str]) -> str | None:
    """A DICOM age (VR AS) from number and unit; empty when not given, None when invalid."""
    number, unit = text.get("age", ""), _AGE_UNITS.get(text.get("age_unit", "years"))
    if not number:
        return ""
    if unit is None or not re.fullmatch(r"\d{1,3}", number) or (unit == "Y" and int(number) > 130):
        return None
    return f"{int(number):03d}{unit}"
