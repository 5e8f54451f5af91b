"""What is particular to a USB stick: where the library lies on it, and errors in the words of somebody who holds it."""

from __future__ import annotations

from pathlib import Path

from tuf.api.metadata import Metadata, Root

from model_sync.agent.sync_status import code_of, state_of
from model_sync.errors import LibraryUnreachable, ModelSyncError, TrustError
from model_sync.trust import metadata

FOLDER = "clinic-models"
_AGAIN = "make the stick anew with `model-library export-usb`; the model in use stays"
_ABOUT = {
    "trust.rollback": "the stick is older than this box",
    "trust.expired": "the stick has expired",
    "trust.part_expired": "a part of the stick has expired",
    "trust.digest": "a file on the stick was altered or damaged",
    "trust.signature": "the stick cannot be believed",
    "trust.metadata": "the stick cannot be believed",
}


def tree(directory: Path) -> Path:
    """Return the library's tree on a stick, which is given by its mount point or by the folder itself.

    Raises:
        LibraryUnreachable: ``usb.incomplete``: there is none.
    """
    for place in (directory / FOLDER, directory):
        if (place / "metadata").is_dir():
            return place
    raise LibraryUnreachable(
        f"{directory} holds no folder {FOLDER}/metadata",
        hint="point to the stick itself, which is made with `model-library export-usb`; the model in use stays",
        code="usb.incomplete",
    )


def about(error: ModelSyncError, stick: Path, root: Path) -> ModelSyncError:
    """Return an error of an import as the technician has to hear it; one of the box's own disk stays as it is."""
    code = code_of(error)
    if isinstance(error, TrustError) and code in ("trust.signature", "trust.metadata") and _foreign(stick, root):
        return TrustError(
            "the stick is of another library: its root.json is not the one this box was installed with",
            hint="use a stick of your own central team; the model in use stays",
            code="trust.foreign_root",
        )
    if isinstance(error, TrustError) and code in _ABOUT:
        hint = error.hint if "clock of this box is wrong" in error.hint else _AGAIN
        return TrustError(f"{_ABOUT[code]}: {error.message}", hint=hint, code=code)
    if state_of(error) == "unreachable":
        return LibraryUnreachable(f"the stick is incomplete: {error.message}", hint=_AGAIN, code="usb.incomplete")
    return error


def _foreign(stick: Path, root: Path) -> bool:
    """Say whether the stick's root of the provisioned version is another one."""
    raw = metadata.read_root(root)
    file = stick / "metadata" / f"{Metadata[Root].from_bytes(raw).signed.version}.root.json"
    if not file.is_file():
        return False
    with file.open("rb") as stream:  # a stranger's file: no more of it than the comparison takes
        return stream.read(len(raw) + 1) != raw
