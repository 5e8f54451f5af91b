"""Import from a USB stick: where the library is on it, and errors worded for the person who holds the stick."""

from __future__ import annotations

from pathlib import Path

from tuf.api.metadata import Metadata, Root, Timestamp
from tuf.api.serialization import DeserializationError

from model_sync import atomic_files
from model_sync.errors import Action, ModelSyncError, TrustError, UsbIncomplete
from model_sync.trust import metadata

FOLDER = "clinic-models"
_MAKE_AGAIN = "write the stick again with `model-library export-usb`; the model in use stays"
_WORDING = {
    "trust.rollback": "the stick and this box contradict each other",
    "trust.expired": "the stick has expired",
    "trust.part_expired": "a part of the stick has expired",
    "trust.digest": "a file on the stick was altered or damaged",
    "trust.signature": "the stick cannot be trusted",
    "trust.metadata": "the stick cannot be trusted",
}
_EXPIRED = ("trust.expired", "trust.part_expired")


def find_tree(directory: Path) -> Path:
    """Return the library's directory on a stick, given the mount point or that directory itself.

    Raises:
        UsbIncomplete: there is none.
    """
    for path in (directory / FOLDER, directory):
        if (path / "metadata").is_dir():
            return path
    raise UsbIncomplete(
        f"{directory} has no folder {FOLDER}/metadata",
        hint="give the mount point of a stick that `model-library export-usb` has written; the model in use stays",
    )


def reword_error(error: ModelSyncError, stick: Path, root: Path, known_timestamp: int) -> ModelSyncError:
    """Return an error of an import in words for the technician; an error of the box's own disk is returned unchanged.

    A stick whose signatures are right, and that is only older than what the box knows, or expired, is outdated: that is no alarm.

    Args:
        error: the error of the import.
        stick: the library's directory on the stick.
        root: the provisioned ``root.json``.
        known_timestamp: the highest version of the library's timestamp that this box has seen.
    """
    if isinstance(error, TrustError) and error.code in ("trust.signature", "trust.metadata") and _is_from_other_library(stick, root):
        return TrustError(
            "the stick is of another library: its root.json is not the one this box was installed with", code="trust.foreign_root"
        )
    if isinstance(error, TrustError) and error.code in _WORDING:
        if error.code == "trust.rollback" and _is_older(stick, known_timestamp):
            what = f"the stick is outdated, it is older than this box: {error.message}"
            return TrustError(what, hint=_MAKE_AGAIN, code=error.code, action=Action.OUTDATED)
        has_wrong_clock = "clock of this box is wrong" in error.hint
        hint = error.hint if has_wrong_clock else _MAKE_AGAIN
        action = Action.OUTDATED if error.code in _EXPIRED and not has_wrong_clock else error.action
        return TrustError(f"{_WORDING[error.code]}: {error.message}", hint=hint, code=error.code, action=action)
    if error.action is Action.RETRY:
        return UsbIncomplete(f"the stick is incomplete: {error.message}")
    return error


def _is_from_other_library(stick: Path, root: Path) -> bool:
    """Return whether the stick carries another root than the provisioned one under the same version number."""
    raw = metadata.read_root(root)
    file = stick / "metadata" / f"{Metadata[Root].from_bytes(raw).signed.version}.root.json"
    if not file.is_file():
        return False
    with file.open("rb") as stream:  # not trusted: read no more than the comparison needs
        return stream.read(len(raw) + 1) != raw


def _is_older(stick: Path, known_timestamp: int) -> bool:
    """Return whether the stick's timestamp, whose signature was verified before its version was compared, is an earlier one."""
    try:
        raw = atomic_files.read(stick / "metadata" / "timestamp.json", metadata.MAX_METADATA_BYTES)
        return bool(Metadata[Timestamp].from_bytes(raw).signed.version < known_timestamp)
    except (OSError, DeserializationError):  # the stick was pulled out or changed meanwhile
        return False
