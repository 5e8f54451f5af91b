"""Reading of TUF metadata from a directory: root by root from the provisioned one, then role by role, each verified as it is read.

The files were written by another account or came from a library: each must be a regular file of bounded size.
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
_Role = TypeVar("_Role", bound=Signed)


def load_newest_root(metadata: Path, root: bytes) -> AnchoredRoot:
    """Return the newest root on the disk; each is signed by the root before it and by itself.

    Raises:
        TrustError: the provisioned root is not valid.
    """
    trusted = verified(Root, root, None, Root.type)
    for _ in range(MAX_ROOTS):
        try:
            raw = atomic_files.read(metadata / HISTORY / f"{trusted.version + 1}.root.json", MAX_ROOT_BYTES)
            next_root = verified(Root, raw, trusted, Root.type)
        except (OSError, TrustError):
            # An incomplete file counts as absent, as in python-tuf: the rollback state has the newest version that was seen.
            break
        if next_root.version != trusted.version + 1:
            break
        trusted = next_root
    return AnchoredRoot.of(trusted, root)


def is_of_other_root(metadata: Path, root: bytes) -> bool:
    """Return whether a metadata directory was written under another provisioned root than ``root``.

    Every client stores its provisioned root there; an absent or damaged file is no evidence of another root.

    Raises:
        TrustError: the provisioned root is not valid.
    """
    version = verified(Root, root, None, Root.type).version
    try:
        stored = atomic_files.read(metadata / HISTORY / f"{version}.root.json", MAX_ROOT_BYTES)
        return stored != root and verified(Root, stored, None, Root.type).version == version
    except (OSError, TrustError):
        return False


def set_aside(metadata: Path, root: bytes) -> bool:
    """Rename metadata that was received under another provisioned root to ``<name>.other``; return whether there was any.

    A new library may share a key with the earlier one, whose signatures must count neither as seen nor as trusted. The files are kept
    for an investigation; an older directory of that name is removed.

    Raises:
        TrustError: the provisioned root is not valid.
        OSError: it cannot be moved.
    """
    if not is_of_other_root(metadata, root):
        return False
    aside = metadata.with_name(f"{metadata.name}.other")
    atomic_files.remove_tree(aside)
    metadata.replace(aside)
    atomic_files.sync_directory(metadata.parent)
    return True


def read_root(path: Path) -> bytes:
    """Return the bytes of the provisioned root.

    Raises:
        TrustError: ``trust.root``: it is missing, so nothing can be trusted.
        OSError: it cannot be read.
    """
    try:
        return atomic_files.read(path, MAX_ROOT_BYTES, follow=True)  # the provisioned file may be a link
    except FileNotFoundError as error:
        raise TrustError(
            f"{path} is missing: without the library's first root.json no signature can be checked", code="trust.root"
        ) from error


def read(metadata: Path, role: str) -> bytes:
    """Return the bytes of a role's metadata.

    Raises:
        TrustError: ``trust.missing``; ``trust.metadata``: it is larger than a box reads.
        OSError: it exists and cannot be read.
    """
    try:
        return atomic_files.read(metadata / f"{role}.json", MAX_METADATA_BYTES)
    except FileNotFoundError as error:
        raise missing(f"no {role} metadata is here") from error
    except atomic_files.NotRegularFileError as error:
        if error.errno != errno.EFBIG:
            raise
        raise TrustError(
            f"the {role} metadata is larger than {MAX_METADATA_BYTES} bytes, which is the most that a box reads", code="trust.metadata"
        ) from error


def listed(kind: type[_Role], metadata: Path, delegator: Root | Targets, role: str, meta: Any) -> _Role:
    """Return a role that other metadata names with its version and optional hashes, after all checks."""
    if meta is None:
        raise TrustError(f"{role} is delegated to, but the snapshot does not name it", code="trust.metadata")
    raw = read(metadata, role)
    try:
        meta.verify_length_and_hashes(raw)
    except LengthOrHashMismatchError as error:
        raise altered(f"the {role} metadata") from error
    signed = verified(kind, raw, delegator, role)
    if signed.version != meta.version:
        raise TrustError(f"the {role} metadata is version {signed.version}, and {meta.version} was announced", code="trust.version")
    return signed


def verified(kind: type[_Role], raw: bytes, delegator: Root | Targets | None, role: str) -> _Role:
    """Return the signed part of ``raw`` after a check of its signatures; without a delegator only a root's own.

    Raises:
        TrustError: ``trust.metadata``: it cannot be read; ``trust.signature``: it is not signed by the right keys.
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
        raise TrustError(f"the {role} metadata is damaged: it cannot be read", code="trust.metadata") from error
    except (RepositoryError, ValueError) as error:
        raise TrustError(f"the {role} metadata is not signed by those who may sign it ({error})", code="trust.signature") from error
    return cast("_Role", metadata.signed)


def expired(role: str, at: datetime, clocks: Clocks) -> TrustError:
    """Return the error for expired metadata; its text and hint depend on the clocks."""
    return TrustError(f"the {role} metadata expired on {iso(at)}: {clocks.describe()}", hint=clocks.hint(), code="trust.expired")


def missing(what: str) -> TrustError:
    """Return the error for a file that was never received, or was lost."""
    return TrustError(what, code="trust.missing")


def altered(what: str) -> TrustError:
    """Return the error for a file that is not the signed one."""
    return TrustError(f"{what} is not what was signed: its length or its hash differs", code="trust.digest")


def ambiguous(what: str, why: str) -> TrustError:
    """Return the error for a target that more than one role could sign."""
    return TrustError(f"{what}: {why}", code="trust.ambiguous")
