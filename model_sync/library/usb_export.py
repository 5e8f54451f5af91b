"""Export to a USB stick: the public tree, for a box without a link.

The stick is not trusted: a box verifies it like the network. It has every root version, so that a box that was off for years can verify
today's keys, and all metadata, but only the chosen model files. Names are valid on FAT; each file is written under a temporary name,
renamed, and read back from the stick; the timestamp is written last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from tuf.api.metadata import Snapshot, TargetFile, Timestamp

from model_sync import atomic_files
from model_sync.bundle import MANIFEST_NAME, Manifest, sha256_of
from model_sync.errors import PublishError, SettingsError
from model_sync.library import check as library_check
from model_sync.library.files import read_metadata
from model_sync.library.roles import delegated
from model_sync.trust.documents import ROLLOUT_ROLE, LineIndex, file_path, line_path

FOLDER = "clinic-models"
_PART = "clinic-models.part"
_CHUNK_BYTES = 1 << 20
_FAT_MAX_BYTES = 2**32 - 1
_FAT_FORBIDDEN = re.compile(r'[\x00-\x1f:*?"<>|\\]|[. ]$')
# FAT allocates clusters; 32 KiB is the largest common size on sticks.
_CLUSTER_BYTES = 32 * 1024
_EXPORTED_NAME = re.compile(r"^(\d+\.[a-z0-9_-]+\.json|[0-9a-f]{64}\..+)$")


class ExportResult(NamedTuple):
    """The result of an export: ``files`` and ``bytes`` count what was not on the stick yet."""

    files: int
    bytes: int
    removed: int
    versions: dict[str, list[str]]
    valid_until: datetime


def export(
    library_public: Path,
    directory: Path,
    lines: Sequence[str] | None = None,
    versions: Sequence[str] | None = None,
    *,
    now: datetime | None = None,
    reserve_bytes: int = 1 << 20,
    on_progress: library_check.Progress | None = None,
) -> ExportResult:
    """Write or update ``<directory>/clinic-models``.

    Args:
        library_public: the library's ``public`` folder.
        directory: the stick's mount point.
        lines: model lines to export; every line when None.
        versions: versions to export; every one that boxes may run when None.
        now: the time against which expiry is checked.
        reserve_bytes: disk space that stays free.
        on_progress: called with the bytes written so far and in all.

    Raises:
        SettingsError: the stick is missing, or there is no such model line or version.
        PublishError: the library is not intact, the stick is too small, or returns other bytes than were written.
    """
    if not directory.is_dir():
        raise SettingsError(f"{directory} is not a directory", hint="mount the stick and give its mount point", code="library.stick")
    chosen, wanted = _choose_versions(library_public, lines, versions)
    checked = library_check.verify(library_public, now or datetime.now(timezone.utc), None, lambda path: path in wanted)
    if not checked.is_clean or checked.valid_until is None:
        raise PublishError(f"the library is not intact: {'; '.join(checked.problems[:3])}", code="library.incomplete")
    metadata = _metadata_names(library_public)
    files = [f"targets/{target.get_prefixed_paths()[0]}" for target in wanted.values()]
    stick = _UsbStick(library_public, directory / FOLDER, reserve_bytes)
    try:
        new = stick.missing([*sorted(files), *metadata])
        stick.require_free_space(new)
        stick.write(new, on_progress or (lambda _done, _total: None))
        removed = stick.remove_old({*files, *metadata})
    except OSError as error:
        raise PublishError(f"the stick cannot be written: {error.strerror or error}", code="library.stick") from error
    return ExportResult(len(new), stick.written, removed, chosen, checked.valid_until)


def _choose_versions(
    public: Path, lines: Sequence[str] | None, versions: Sequence[str] | None
) -> tuple[dict[str, list[str]], dict[str, TargetFile]]:
    """Return the chosen versions of each model line, and all targets to export, by path."""
    roles = _roles(public)
    known = sorted(set(roles) - {ROLLOUT_ROLE})
    if unknown := set(lines or ()) - set(known):
        raise SettingsError(
            f"there is no model line {', '.join(sorted(unknown))}",
            hint=f"the library has: {', '.join(known) or 'none'}",
            code="library.role",
        )
    wanted = dict(roles.get(ROLLOUT_ROLE, {}))
    chosen: dict[str, list[str]] = {}
    for line in known:
        targets = roles[line]
        wanted[line_path(line)] = targets[line_path(line)]
        if lines is None or line in lines:
            index = LineIndex.parse(_place(public, targets[line_path(line)]).read_bytes())
            usable = [release.version for release in index.versions if index.refusal(release.version) is None]
            chosen[line] = [version for version in usable if versions is None or version in versions]
            wanted.update(_files(public, index, targets, chosen[line]))
    if unknown := set(versions or ()) - {version for picked in chosen.values() for version in picked}:
        raise SettingsError(
            f"no chosen model line has a version {', '.join(sorted(unknown))} that boxes may run",
            hint="`model-library status` lists them",
            code="library.version",
        )
    return chosen, wanted


def _files(public: Path, index: LineIndex, targets: dict[str, TargetFile], versions: Iterable[str]) -> dict[str, TargetFile]:
    """Return the targets of some versions, and the deltas between them."""
    chosen: dict[str, TargetFile] = {}
    for version in versions:
        path = file_path(index.line, version, MANIFEST_NAME)
        manifest = Manifest.parse(_place(public, targets[path]).read_bytes())
        for file in (MANIFEST_NAME, *manifest.digests()):
            chosen[file_path(index.line, version, file)] = targets[file_path(index.line, version, file)]
    hashes = {target.hashes["sha256"] for target in chosen.values()}
    for delta in index.deltas:
        if {delta.from_sha256, delta.to_sha256} <= hashes:
            chosen[delta.path] = targets[delta.path]
    return chosen


def _snapshot(metadata: Path) -> tuple[str, Snapshot]:
    """Return the name and the content of the public snapshot."""
    timestamp: Timestamp = read_metadata(metadata / "timestamp.json").signed
    name = f"{timestamp.snapshot_meta.version}.snapshot.json"
    return name, read_metadata(metadata / name).signed


def _roles(public: Path) -> dict[str, dict[str, TargetFile]]:
    """Return the public targets of every delegated role."""
    metadata = public / "metadata"
    _, snapshot = _snapshot(metadata)
    top = read_metadata(metadata / f"{snapshot.meta['targets.json'].version}.targets.json").signed
    return {
        role: dict(read_metadata(metadata / f"{snapshot.meta[f'{role}.json'].version}.{role}.json").signed.targets)
        for role in delegated(top)
    }


def _metadata_names(public: Path) -> list[str]:
    """Return the metadata that a box needs, the timestamp last; it includes every root version."""
    snapshot_name, snapshot = _snapshot(public / "metadata")
    current = sorted(f"{info.version}.{name}" for name, info in snapshot.meta.items())
    roots = sorted(path.name for path in (public / "metadata").glob("*.root.json"))
    return [f"metadata/{name}" for name in (*roots, *current, snapshot_name, "timestamp.json")]


def _place(public: Path, target: TargetFile) -> Path:
    return public / "targets" / target.get_prefixed_paths()[0]


class _UsbStick:
    """The folder on the stick, and the library that is copied to it."""

    def __init__(self, public: Path, folder: Path, reserve_bytes: int) -> None:
        self._public, self._folder, self._reserve_bytes = public, folder, reserve_bytes
        self.written = 0

    def missing(self, names: list[str]) -> list[str]:
        """Return the files that the stick lacks or has with other content, in the given order."""
        for name in names:
            if any(_FAT_FORBIDDEN.search(segment) for segment in name.split("/")):
                raise PublishError(
                    f"{name} is no name for a USB stick", hint="publish the version again with other file names", code="library.stick"
                )
            if (self._public / name).stat().st_size > _FAT_MAX_BYTES:
                raise PublishError(
                    f"{name} is larger than 4 GiB: FAT cannot hold it", hint="split the weights into several files", code="library.stick"
                )
        return [name for name in names if _digest(self._folder / name) != _digest(self._public / name)]

    def require_free_space(self, names: list[str]) -> None:
        """Raise before anything is written when the stick is too small; files that it has are not counted."""
        need = sum((self._public / name).stat().st_size + _CLUSTER_BYTES for name in names) + self._reserve_bytes
        free = shutil.disk_usage(self._folder.parent).free
        if need > free:
            raise PublishError(
                f"the stick needs {need / 2**20:.1f} MiB more and has {free / 2**20:.1f} MiB free; nothing was written",
                hint="delete other files on it, take a larger stick, or choose fewer model lines or versions",
                code="library.stick",
            )

    def write(self, names: list[str], on_progress: library_check.Progress) -> None:
        """Copy files and read each back; raise PublishError when the bytes differ."""
        total = sum((self._public / name).stat().st_size for name in names)
        for name in names:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = self._folder / _PART
            digest = self._copy(self._public / name, part, lambda: on_progress(self.written, total))
            os.replace(part, path)
            _sync_directory(path.parent)
            if _digest(path) != digest:
                raise PublishError(f"the stick returns other bytes of {name} than were written", code="library.stick")

    def _copy(self, source: Path, part: Path, on_progress: Callable[[], None]) -> str:
        digest = hashlib.sha256()
        with source.open("rb") as reader, part.open("wb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
                self.written += len(chunk)
                on_progress()
            atomic_files.flush(writer)
            # So that the bytes are read back from the stick and not from the page cache.
            os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return digest.hexdigest()

    def remove_old(self, wanted: set[str]) -> int:
        """Remove files of earlier exports that are no longer needed; files with other names stay."""
        removed = 0
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            is_exported = name.startswith(("metadata/", "targets/")) and _EXPORTED_NAME.match(path.name) is not None
            if path.is_file() and is_exported and name not in wanted:
                path.unlink()
                removed += 1
        (self._folder / _PART).unlink(missing_ok=True)
        for path in sorted((self._folder / "targets").rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        return removed


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, None when there is none."""
    return sha256_of(path.resolve()) if path.exists() else None


def _sync_directory(path: Path) -> None:
    try:
        atomic_files.sync_directory(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some FAT and exFAT drivers cannot; the file itself is safe
            raise
