"""The directory that the agent shares with the box: trusted metadata, complete bundles, and what the box should run.

Metadata and documents are only of use together, and a box may ask at any moment, also in the middle of a refresh that the
line has cut. So each whole set is laid beside the last one, named after its content, and one link is turned::

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
from model_sync.trust.rollback_protection import FLOOR_FILE, Floors, iso
from model_sync.trust.trusted_metadata import Chain, read_document

DIRECTIVES_FILE = "directives.json"
REPORT_FILE = "box-report.json"
BUNDLES = "bundles"
KEPT_BUNDLES = 3
_KEPT_SETS = 3
_SET = ".trust-"

Source: TypeAlias = Literal["library", "usb"]


@dataclass(frozen=True)
class Installed:
    """A complete bundle in the exchange directory."""

    directory: Path
    digest: str
    manifest: Manifest


class Exchange:
    """Reads and writes the exchange directory; everything the box may read is complete the moment it gets its name."""

    def __init__(self, directory: Path) -> None:
        """Take the directory; nothing is created yet."""
        self.directory = directory
        self.bundles_dir = directory / BUNDLES

    # -- metadata and documents ---------------------------------------------------------------------------------------

    def publish(self, metadata: Path, copies: Path, chain: Chain, floors: Floors) -> bool:
        """Lay one whole, verified set of metadata and documents before the box; returns whether it is a new one.

        The floors follow the set, never lead it: a box must not be told of versions that it has not been given.

        Raises:
            OSError: the set that the box has stays.
        """
        files = dict(_set_files(metadata, copies, chain))
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
        name = self._lay(f"{_SET}{digest.hexdigest()[:32]}", files)
        fresh = _turn(self.directory / CURRENT, name)
        for part in ("metadata", "documents"):  # for people, and for a box that watches these names
            _turn(self.directory / part, f"{name}/{part}")
        if fresh:
            os.utime(self.directory / name)
            self._drop_old_sets(name)
        if Floors.load([self.directory / FLOOR_FILE]).serial < floors.serial:
            floors.save(self.directory / FLOOR_FILE)
        return fresh

    def _lay(self, name: str, files: Mapping[str, bytes]) -> str:
        """Lay a set and return its name. One that is there is read again: damaged, it is laid beside, so that no reader finds a gap."""
        final = next(path for path in self._names(name) if not os.path.lexists(path) or _holds(path, files))
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

    def _drop_old_sets(self, current: str) -> None:
        """A reader that has followed the link keeps its set for as long as two newer ones are not laid."""
        sets = sorted((path for path in self.directory.glob(f"{_SET}*") if path.name != current), key=lambda path: -path.stat().st_mtime)
        parts = [path for path in sets if path.suffix == ".part"]
        for path in parts + [path for path in sets if path not in parts][_KEPT_SETS - 1 :]:
            atomic_files.remove_tree(path)

    # -- what the box should run --------------------------------------------------------------------------------------

    def directives(self) -> dict[str, dict[str, str]]:
        """Return what each line should run, as it was last said."""
        lines = atomic_files.read_json(self.directory / DIRECTIVES_FILE).get("lines")
        return lines if isinstance(lines, dict) else {}

    def direct(self, wanted: Mapping[str, tuple[str, str, Source]], now: datetime) -> bool:
        """Say what lines should run (version, digest, source); the others are left as they are. Returns whether it is new."""
        before = atomic_files.read_json(self.directory / DIRECTIVES_FILE)
        lines = self.directives()
        for line, (version, digest, source) in wanted.items():
            known = lines.get(line, {})
            if (known.get("version"), known.get("digest")) != (version, digest):
                lines[line] = {"version": version, "digest": digest, "source": source}
        if lines == before.get("lines"):
            return False
        serial = before.get("serial")
        value = {"schema": 1, "serial": serial + 1 if isinstance(serial, int) else 1, "issued_at": iso(now), "lines": lines}
        atomic_files.write_json(self.directory / DIRECTIVES_FILE, value)
        return True

    def reported(self) -> list[dict[str, Any]] | None:
        """Return the models that the box says it has; None when it has said nothing that can be read."""
        models = atomic_files.read_json(self.directory / REPORT_FILE).get("models")
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            return None
        return models

    # -- bundles ------------------------------------------------------------------------------------------------------

    def bundles(self) -> Iterator[Installed]:
        """Yield the complete bundles; one whose manifest was damaged on the disk is passed over."""
        if not self.bundles_dir.is_dir():
            return
        for directory in sorted(self.bundles_dir.iterdir()):
            try:
                raw = b"" if directory.name.startswith(".") else (directory / MANIFEST_NAME).read_bytes()
                if hashlib.sha256(raw).hexdigest() == directory.name:
                    yield Installed(directory, directory.name, Manifest.parse(raw))
            except (OSError, BundleError):
                continue

    def installed_lines(self) -> set[str]:
        """Return the lines that this box has anything of: a withdrawal must reach it although no rollout names the line."""
        reported = {str(model.get("line")) for model in self.reported() or ()}
        return set(self.directives()) | {bundle.manifest.name for bundle in self.bundles()} | reported

    def drop_old_bundles(self) -> list[Installed]:
        """Drop bundles that nothing names, beyond the newest three of each line; returns them.

        A box that has not said which models it has keeps them all.
        """
        reported = self.reported()
        if reported is None:
            return []
        named = {str(model.get("digest")) for model in reported} | {line.get("digest", "") for line in self.directives().values()}
        dropped = []
        by_line: dict[str, list[Installed]] = {}
        for bundle in self.bundles():
            by_line.setdefault(bundle.manifest.name, []).append(bundle)
        for bundles in by_line.values():
            newest_first = sorted(bundles, key=lambda bundle: bundle.directory.stat().st_mtime, reverse=True)
            for bundle in newest_first[KEPT_BUNDLES:]:
                if bundle.digest not in named:
                    # Renamed first: a reader must never find half a bundle under a digest.
                    gone = bundle.directory.with_name(f".{bundle.digest}.dropped")
                    bundle.directory.replace(gone)
                    atomic_files.remove_tree(gone)
                    dropped.append(bundle)
        return dropped


def _set_files(metadata: Path, copies: Path, chain: Chain) -> Iterator[tuple[str, bytes]]:
    """Yield what one set holds: every root since the provisioned one, the verified roles, the verified documents."""
    history = metadata / HISTORY
    yield "metadata/root.json", atomic_files.read(history / f"{chain.root.version}.root.json", MAX_ROOT_BYTES)
    for version in range(1, chain.root.version + 1):
        with contextlib.suppress(FileNotFoundError):  # of before the provisioned one
            yield f"metadata/{HISTORY}/{version}.root.json", atomic_files.read(history / f"{version}.root.json", MAX_ROOT_BYTES)
    for role in ("timestamp", "snapshot", "targets", *chain.roles):
        yield f"metadata/{role}.json", atomic_files.read(metadata / f"{role}.json", MAX_METADATA_BYTES)
    rings = [(f"rollout/{file.name}", documents.ROLLOUT_ROLE) for file in (copies / "rollout").glob("*.json")]
    for path, role in [*((documents.line_path(line), line) for line in chain.line_names()), *rings]:
        try:
            yield f"documents/{path}", read_document(chain, copies, path, role)
        except TrustError:
            continue  # `check` says by itself which line it knows nothing of, and why


def _holds(directory: Path, files: Mapping[str, bytes]) -> bool:
    """Say whether every file of a set lies there as it was laid."""
    try:
        return not directory.is_symlink() and all(atomic_files.read(directory / name, len(data)) == data for name, data in files.items())
    except OSError:
        return False


def _turn(link: Path, to: str) -> bool:
    """Point a link elsewhere in one step; returns whether it pointed elsewhere, or was none."""
    if link.is_symlink():
        if os.readlink(link) == to:
            return False
    elif link.is_dir():
        atomic_files.remove_tree(link)  # whatever it was, it was not laid here, and a link cannot take its name
    fresh = link.with_name(f".{link.name}.{os.getpid()}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(to)
    fresh.replace(link)
    atomic_files.sync_directory(link.parent)
    return True
