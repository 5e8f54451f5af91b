"""The exchange directory, which the agent shares with the box: trusted metadata, complete bundles, and the directives for the box.

The box may read metadata and documents at any moment, and must get both of the same state. So each complete set is written to a new
directory, named by its content, and one symbolic link is replaced::

    exchange/trust -> .trust-<hash>/         exchange/metadata -> .trust-<hash>/metadata     exchange/documents -> ...
    exchange/bundles/<digest>/               exchange/directives.json                        exchange/floor.json
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias

from model_sync import atomic_files
from model_sync.bundle import MANIFEST_NAME
from model_sync.bundle.manifest import Manifest
from model_sync.errors import BundleError, TrustError
from model_sync.trust import documents
from model_sync.trust.metadata import HISTORY, MAX_METADATA_BYTES, MAX_ROOT_BYTES
from model_sync.trust.offline_check import CURRENT
from model_sync.trust.rollback_protection import ROLLBACK_FILE, RollbackState, iso
from model_sync.trust.trusted_metadata import TrustedMetadata, read_document

DIRECTIVES_FILE = "directives.json"
REPORT_FILE = "box-report.json"
ANCHOR_FILE = "audit-anchor.json"
BUNDLES = "bundles"
MAX_UNUSED_BUNDLES = 3
_MAX_SETS = 3
_SET = ".trust-"

Source: TypeAlias = Literal["library", "usb"]


@dataclass(frozen=True)
class StagedBundle:
    """A complete bundle in the exchange directory."""

    directory: Path
    digest: str
    manifest: Manifest


class Exchange:
    """Reads and writes the exchange directory; a file or directory gets its final name only when it is complete."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bundles_dir = directory / BUNDLES

    def publish_metadata(self, metadata: Path, documents_dir: Path, trusted: TrustedMetadata, rollback_state: RollbackState) -> bool:
        """Give the box one complete, verified set of metadata and documents; return whether it is a new one.

        The rollback state is written after the set, never before it: after a crash in between, the box would refuse the older metadata.

        Raises:
            OSError: a file cannot be written; the box keeps the set that it has.
        """
        files = dict(_set_files(metadata, documents_dir, trusted))
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
        name = self._write_set(f"{_SET}{digest.hexdigest()[:32]}", files)
        fresh = _replace_link(self.directory / CURRENT, name)
        for part in ("metadata", "documents"):  # for people, and for programs that read these names
            _replace_link(self.directory / part, f"{name}/{part}")
        if fresh:
            os.utime(self.directory / name)
            self._remove_old_sets(name)
        if RollbackState.load([self.directory / ROLLBACK_FILE]).serial < rollback_state.serial:
            rollback_state.save(self.directory / ROLLBACK_FILE)
        return fresh

    def _write_set(self, name: str, files: Mapping[str, bytes]) -> str:
        """Write a set and return its name.

        A set that exists is read again; when it is damaged, a new one is written beside it for the next readers.
        """
        final = next(path for path in self._names(name) if not os.path.lexists(path) or _has_files(path, files))
        if final.is_dir():
            return final.name
        part = self.directory / f"{name}.{os.getpid()}.part"
        atomic_files.remove_tree(part)
        for relative in ("metadata", "documents"):
            (part / relative).mkdir(parents=True, exist_ok=True)
        for relative, data in files.items():
            (part / relative).parent.mkdir(parents=True, exist_ok=True)
            (part / relative).write_bytes(data)
        atomic_files.sync_tree(part)
        part.replace(final)
        atomic_files.sync_directory(self.directory)
        return final.name

    def _names(self, name: str) -> Iterator[Path]:
        yield self.directory / name
        for number in count(1):
            yield self.directory / f"{name}-{number}"

    def _remove_old_sets(self, current: str) -> None:
        """Remove old sets; a reader that has followed the link can use its set until two newer ones exist."""
        sets = sorted((path for path in self.directory.glob(f"{_SET}*") if path.name != current), key=lambda path: -path.stat().st_mtime)
        parts = [path for path in sets if path.suffix == ".part"]
        for path in parts + [path for path in sets if path not in parts][_MAX_SETS - 1 :]:
            atomic_files.remove_tree(path)

    def directives(self) -> dict[str, dict[str, str]]:
        """Return the directive of each model line: the version it should run."""
        lines = atomic_files.read_json(self.directory / DIRECTIVES_FILE).get("lines")
        return lines if isinstance(lines, dict) else {}

    def set_directives(self, wanted: Mapping[str, tuple[str, str, Source]], now: datetime) -> bool:
        """Write which version model lines should run (version, digest, source); return whether something changed.

        The directives of other model lines stay as they are.
        """
        before = atomic_files.read_json(self.directory / DIRECTIVES_FILE)
        lines = self.directives()
        for line, (version, digest, source) in wanted.items():
            known = lines.get(line, {})
            if (known.get("version"), known.get("digest")) != (version, digest):
                lines[line] = {"version": version, "digest": digest, "source": source}
        if lines == before.get("lines"):
            return False
        self._write_directives(before, lines, now)
        return True

    def remove_directives(self, lines: set[str], now: datetime) -> bool:
        """Remove the directives of model lines that the library has ended; return whether there were any."""
        before, directives = atomic_files.read_json(self.directory / DIRECTIVES_FILE), self.directives()
        if not lines & set(directives):
            return False
        left = {line: directive for line, directive in directives.items() if line not in lines}
        self._write_directives(before, left, now)
        return True

    def _write_directives(self, before: Mapping[str, Any], lines: Mapping[str, Any], now: datetime) -> None:
        serial = before.get("serial")
        value = {"schema": 1, "serial": serial + 1 if isinstance(serial, int) else 1, "issued_at": iso(now), "lines": lines}
        atomic_files.write_json(self.directory / DIRECTIVES_FILE, value)

    def reported_models(self) -> list[dict[str, Any]] | None:
        """Return the models of the box's own report; None when there is no readable report."""
        return self._reported("models")

    def reported_activations(self) -> list[dict[str, Any]]:
        """Return the activations of the box's own report, the newest first; empty when there is no readable report."""
        return self._reported("activations") or []

    def _reported(self, part: str) -> list[dict[str, Any]] | None:
        entries = atomic_files.read_json(self.directory / REPORT_FILE).get(part)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            return None
        return entries

    def bundles(self) -> Iterator[StagedBundle]:
        """Yield the complete bundles; one whose manifest was damaged on the disk is skipped."""
        if not self.bundles_dir.is_dir():
            return
        for directory in sorted(self.bundles_dir.iterdir()):
            try:
                raw = b"" if directory.name.startswith(".") else (directory / MANIFEST_NAME).read_bytes()
                if hashlib.sha256(raw).hexdigest() == directory.name:
                    yield StagedBundle(directory, directory.name, Manifest.parse(raw))
            except (OSError, BundleError):
                continue

    def known_lines(self) -> set[str]:
        """Return the model lines that this box has: a withdrawal must reach it also when no rollout names the line."""
        reported = {str(model.get("line")) for model in self.reported_models() or ()}
        return set(self.directives()) | {bundle.manifest.name for bundle in self.bundles()} | reported

    def remove_old_bundles(self) -> list[StagedBundle]:
        """Remove bundles that nothing names, beyond the newest three of each model line; return them.

        Without a report of the box all bundles are kept.
        """
        reported = self.reported_models()
        if reported is None:
            return []
        in_use = {str(model.get("digest")) for model in reported} | {line.get("digest", "") for line in self.directives().values()}
        removed = []
        by_line: dict[str, list[StagedBundle]] = {}
        for bundle in self.bundles():
            by_line.setdefault(bundle.manifest.name, []).append(bundle)
        for bundles in by_line.values():
            newest_first = sorted(bundles, key=lambda bundle: bundle.directory.stat().st_mtime, reverse=True)
            for bundle in newest_first[MAX_UNUSED_BUNDLES:]:
                if bundle.digest not in in_use:
                    # Renamed first: a directory named by a digest must always be complete.
                    hidden = bundle.directory.with_name(f".{bundle.digest}.dropped")
                    bundle.directory.replace(hidden)
                    atomic_files.remove_tree(hidden)
                    removed.append(bundle)
        return removed


def _set_files(metadata: Path, documents_dir: Path, trusted: TrustedMetadata) -> Iterator[tuple[str, bytes]]:
    """Yield the files of one set: every root since the provisioned one, the verified roles, the verified documents."""
    history = metadata / HISTORY
    yield "metadata/root.json", atomic_files.read(history / f"{trusted.root.version}.root.json", MAX_ROOT_BYTES)
    for version in range(1, trusted.root.version + 1):
        with contextlib.suppress(FileNotFoundError):  # versions before the provisioned root
            yield f"metadata/{HISTORY}/{version}.root.json", atomic_files.read(history / f"{version}.root.json", MAX_ROOT_BYTES)
    for role in ("timestamp", "snapshot", "targets", *trusted.roles):
        yield f"metadata/{role}.json", atomic_files.read(metadata / f"{role}.json", MAX_METADATA_BYTES)
    rings = [(f"rollout/{file.name}", documents.ROLLOUT_ROLE) for file in (documents_dir / "rollout").glob("*.json")]
    for path, role in [*((documents.line_path(line), line) for line in trusted.line_names()), *rings]:
        try:
            yield f"documents/{path}", read_document(trusted, documents_dir, path, role)
        except TrustError:
            continue  # `check` reports which model line is missing, and why


def _has_files(directory: Path, files: Mapping[str, bytes]) -> bool:
    """Return whether a directory holds every file of a set, unchanged."""
    try:
        return not directory.is_symlink() and all(atomic_files.read(directory / name, len(data)) == data for name, data in files.items())
    except OSError:
        return False


def _replace_link(link: Path, to: str) -> bool:
    """Point a symbolic link to ``to`` in one step; return whether that changed it."""
    if link.is_symlink():
        if os.readlink(link) == to:
            return False
    elif link.is_dir():
        atomic_files.remove_tree(link)  # not ours, and a link cannot replace a directory
    fresh = link.with_name(f".{link.name}.{os.getpid()}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(to)
    fresh.replace(link)
    atomic_files.sync_directory(link.parent)
    return True
