"""Reading what trust hangs on: root by root from the provisioned one, then role by role, each verified as it is read.

What lies there was written by another account, or by a library: every file is a plain one of bounded size, or it is refused.
"""

from __future__ import annotations

import errno
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from tuf.api.exceptions import LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import Metadata, Root, Signed, Targets
from tuf.api.serialization import DeserializationError

from model_sync import atomic_files
from model_sync.errors import TrustError
from model_sync.trust.rollback_protection import AnchoredRoot, Clocks, iso

MAX_METADATA_BYTES = 5_000_000
MAX_ROOT_BYTES = 512_000
MAX_ROOTS = 1024
HISTORY = "root_history"
KEEP = "the model in use stays"
_Role = TypeVar("_Role", bound=Signed)


def newest_root(metadata: Path, root: bytes) -> AnchoredRoot:
    """Go from the provisioned root to the newest one on disk, each signed by the one before it and by itself.

    Raises:
        TrustError: the provisioned root is none.
    """
    trusted = verified(Root, root, None, Root.type)
    for _ in range(MAX_ROOTS):
        try:
            raw = atomic_files.read(metadata / HISTORY / f"{trusted.version + 1}.root.json", MAX_ROOT_BYTES)
            following = verified(Root, raw, trusted, Root.type)
        except (OSError, TrustError):
            # A half-written file counts as absent, as in python-tuf: the floor knows whether a newer root was seen.
            break
        if following.version != trusted.version + 1:
            break
        trusted = following
    return AnchoredRoot.of(trusted, root)


def foreign(metadata: Path, root: bytes) -> bool:
    """Say whether a metadata directory was filled from another provisioned root than ``root``.

    Every client lays the root it was given there; a file that is absent or damaged speaks for neither.

    Raises:
        TrustError: the provisioned root is none.
    """
    version = verified(Root, root, None, Root.type).version
    try:
        laid = atomic_files.read(metadata / HISTORY / f"{version}.root.json", MAX_ROOT_BYTES)
        return laid != root and verified(Root, laid, None, Root.type).version == version
    except (OSError, TrustError):
        return False


def set_aside(metadata: Path, root: bytes) -> bool:
    """Put metadata away that was received under another provisioned root; returns whether there was any.

    A library that was laid anew may share a key with the one before it: what that one signed must neither count as seen nor as
    trusted. It is kept beside, as ``<name>.other``, for whoever wants to know what happened; the one before that is dropped.

    Raises:
        TrustError: the provisioned root is none.
        OSError: it cannot be moved.
    """
    if not foreign(metadata, root):
        return False
    aside = metadata.with_name(f"{metadata.name}.other")
    atomic_files.remove_tree(aside)
    metadata.replace(aside)
    atomic_files.sync_directory(metadata.parent)
    return True


def read_root(path: Path) -> bytes:
    """Return the bytes of the provisioned root.

    Raises:
        TrustError: ``trust.root``: there is none, so nothing can be trusted.
        OSError: it cannot be read.
    """
    try:
        return atomic_files.read(path, MAX_ROOT_BYTES, follow=True)  # whoever provisions may lay a link
    except FileNotFoundError as error:
        raise TrustError(
            f"{path} is missing: without the library's first root.json no signature can be checked",
            hint="copy root.json from the central team's installation folder again",
            code="trust.root",
        ) from error


def read(metadata: Path, role: str) -> bytes:
    """Return the bytes of a role's metadata.

    Raises:
        TrustError: ``trust.missing``; ``trust.metadata``: it is larger than any box reads.
        OSError: it is there and cannot be read.
    """
    try:
        return atomic_files.read(metadata / f"{role}.json", MAX_METADATA_BYTES)
    except FileNotFoundError as error:
        raise missing(f"no {role} metadata is here") from error
    except atomic_files.NotPlain as error:
        if error.errno != errno.EFBIG:
            raise
        raise TrustError(
            f"the {role} metadata is larger than {MAX_METADATA_BYTES} bytes, which is the most that a box reads",
            hint=f"tell the central team: it has to sign less in one role; {KEEP}",
            code="trust.metadata",
        ) from error


def listed(kind: type[_Role], metadata: Path, delegator: Root | Targets, role: str, meta: Any) -> _Role:
    """Read a role that the metadata before it names with its version, and with hashes if it likes."""
    if meta is None:
        raise TrustError(
            f"{role} is delegated to, but the snapshot does not name it",
            hint=f"tell the central team: the library is inconsistent; {KEEP}",
            code="trust.metadata",
        )
    raw = read(metadata, role)
    try:
        meta.verify_length_and_hashes(raw)
    except LengthOrHashMismatchError as error:
        raise altered(f"the {role} metadata") from error
    signed = verified(kind, raw, delegator, role)
    if signed.version != meta.version:
        raise TrustError(
            f"the {role} metadata is version {signed.version}, and {meta.version} was announced",
            hint=f"run `model-sync pull`; {KEEP}",
            code="trust.version",
        )
    return signed


def verified(kind: type[_Role], raw: bytes, delegator: Root | Targets | None, role: str) -> _Role:
    """Return what ``raw`` signs, after its signatures; without a delegator a root's own only.

    Raises:
        TrustError: ``trust.metadata``: it cannot be read; ``trust.signature``: others signed it, or nobody.
    """
    try:
        metadata = Metadata.from_bytes(raw)
        if not isinstance(metadata.signed, kind):
            raise RepositoryError(f"a {metadata.signed.type} where {kind.__name__} is due")
        if delegator is not None:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        if isinstance(metadata.signed, Root):
            metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except DeserializationError as error:
        raise TrustError(
            f"the {role} metadata is damaged: it cannot be read",
            hint=f"run `model-sync pull`, which fetches it again; {KEEP}",
            code="trust.metadata",
        ) from error
    except (RepositoryError, ValueError) as error:
        raise TrustError(
            f"the {role} metadata is not signed by those who may sign it ({error})",
            hint=f"tell the central team: somebody may be forging models; {KEEP}",
            code="trust.signature",
        ) from error
    return cast("_Role", metadata.signed)


def expired(role: str, at: datetime, clocks: Clocks) -> TrustError:
    """Return the error for metadata that is no longer valid; the clocks say whether it or the box is wrong."""
    return TrustError(f"the {role} metadata expired on {iso(at)}: {clocks.describe()}", hint=clocks.hint(), code="trust.expired")


def missing(what: str) -> TrustError:
    """Return the error for something that was never received, or was lost."""
    return TrustError(f"{what}", hint=f"run `model-sync pull`; {KEEP}", code="trust.missing")


def altered(what: str) -> TrustError:
    """Return the error for bytes that are not those which were signed."""
    return TrustError(
        f"{what} is not what was signed: its length or its hash differs",
        hint=f"run `model-sync pull` again; if it stays, have the disk and the line checked; {KEEP}",
        code="trust.digest",
    )


def ambiguous(what: str, why: str) -> TrustError:
    """Return the error for a target that more than one role could sign."""
    return TrustError(
        f"{what}: {why}", hint=f"tell the central team: who may sign a line must be beyond doubt; {KEEP}", code="trust.ambiguous"
    )
