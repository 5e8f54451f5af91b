"""Whether the accuracy of a model on this box is verified: measured on these weights, at the threshold in force (R29)."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final

from appliance.core.domain import Note
from model_sync.bundle import MANIFEST_NAME, Manifest, check_gate
from model_sync.errors import BundleError

_MODELS: Final = 64


@lru_cache(maxsize=_MODELS)
def accuracy_problem(directory: Path, digest: str) -> Note | None:
    """Return why the accuracy of a model is not verified; None where it is. A copy never changes, so the result is kept.

    Only the manifest and the gate record are read and hashed: whoever runs the model verifies the weights.

    Args:
        directory: the box's copy of the model.
        digest: of its manifest.
    """
    try:
        raw = (directory / MANIFEST_NAME).read_bytes()
        manifest = Manifest.parse(raw)
        if hashlib.sha256(raw).hexdigest() != digest:
            return Note("bundle.digest_mismatch", MANIFEST_NAME)
        check_gate(manifest, lambda name: _read(directory, name, manifest))
    except OSError as error:
        return Note("bundle.unreadable", error.strerror or type(error).__name__)
    except BundleError as error:
        return Note(error.code, error.message)
    return None


def _read(directory: Path, name: str, manifest: Manifest) -> bytes:
    raw = (directory / name).read_bytes()
    if hashlib.sha256(raw).hexdigest() != manifest.digests()[name]:
        raise BundleError("bundle.digest_mismatch", f"{name} is not the file that the manifest names")
    return raw
