"""Staging of one version of a model line in the exchange directory: from files that are here, by deltas, or by full downloads.

A bundle is assembled in a hidden directory that outlives the process, so a kill costs at most the current file. The complete bundle is
verified and flushed, and then renamed to its digest. A file that a delta builds is verified too; a delta that fails is not tried again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tuf.api.metadata import TargetFile

from model_sync import atomic_files
from model_sync.agent.exchange import Exchange
from model_sync.agent.sync_status import Progress
from model_sync.agent.verified_bundle_cache import VerifiedBundleCache, rejections
from model_sync.bundle import MANIFEST_NAME, ModelBundle, sha256_of
from model_sync.bundle.manifest import Manifest
from model_sync.delta import codec as delta_codec
from model_sync.errors import MODEL_STAYS, Action, BundleError, LibraryUnreachable, TrustError
from model_sync.trust import documents
from model_sync.trust.trusted_metadata import TrustedMetadata
from model_sync.trust.tuf_client import TufClient, concerns_one_file


@dataclass(frozen=True)
class StagingJob:
    """One release of a model line to stage, and the deltas that its index offers."""

    line: str
    release: documents.Release
    deltas: tuple[documents.Delta, ...]


@dataclass(frozen=True)
class MissingFile:
    """One file that has to be downloaded; ``delta`` is the smallest one that fits a file which is here, or None."""

    name: str
    target: TargetFile
    delta: documents.Delta | None = None
    base: Path | None = None

    @property
    def cost(self) -> int:
        """Bytes to download."""
        return self.delta.length if self.delta else self.target.length


@dataclass
class Stager:
    """Assembles bundles in an exchange directory.

    Attributes:
        tuf_client: downloads targets of the library.
        exchange: where bundles are staged.
        deltas_dir: where deltas are stored while they are used.
        reserve_bytes: disk space that stays free.
        on_progress: receives the progress.
        add_note: receives remarks for a technician.
        verified: the bundles that this process has verified; the same object in every pull.
    """

    tuf_client: TufClient
    exchange: Exchange
    deltas_dir: Path
    reserve_bytes: int
    on_progress: Callable[[Progress], None]
    add_note: Callable[[str], None]
    verified: VerifiedBundleCache
    _progress: Progress | None = field(default=None, init=False)

    def is_staged(self, digest: str) -> bool:
        """Return whether a complete bundle is here; it is hashed when necessary, and a damaged one is set aside."""
        directory = self.exchange.bundles_dir / digest
        rejected = rejections(self.exchange, digest)
        if not directory.is_dir():
            return False
        if self.verified.is_verified(directory, rejected):
            return True
        try:
            is_intact = ModelBundle.load(directory).digest == digest
        except BundleError as error:
            is_intact = False
            self.add_note(f"the bundle {digest[:12]} is damaged on the disk ({error.message}); it is fetched again")
        if not is_intact:
            self._set_aside(directory)
            return False
        self.verified.add(directory, rejected)
        return True

    def manifest(self, digest: str) -> Manifest:
        """Return the manifest of a complete bundle; raises OSError or BundleError."""
        return Manifest.parse((self.exchange.bundles_dir / digest / MANIFEST_NAME).read_bytes())

    def _set_aside(self, directory: Path) -> None:
        """Rename a damaged bundle to a hidden part; its files that are still right are used again."""
        self.verified.remove(directory)
        part = self._part(directory.name)
        atomic_files.remove_tree(part)
        directory.replace(part)

    def stage(self, trusted: TrustedMetadata, job: StagingJob) -> ModelBundle:
        """Stage one release, complete and verified.

        Raises:
            LibraryUnreachable: the download stopped; the received part is kept.
            TrustError: what the library signed is inconsistent, or the bytes are not the signed ones.
        """
        digest = job.release.digest
        try:
            part = self._take_over_part(digest)
            manifest = self._manifest(trusted, job, part)
            missing_files = self._missing_files(trusted, job, manifest, part)
            done = 0
            total = sum(file.cost for file in missing_files)
            for number, missing in enumerate(missing_files):
                self._require_room(missing_files[number:])
                self._progress = Progress(missing.name, done, total)
                self.report_received(0)
                self._fetch_file(job, missing, part)
                done += missing.cost
            return self._finish(part, job, manifest)
        except OSError as error:
            raise atomic_files.disk_error(error) from error
        finally:
            self._progress = None

    def report_received(self, file_bytes: int) -> None:
        """Report the progress of the current file; the fetcher calls it."""
        if self._progress is not None:
            self.on_progress(self._progress._replace(done_bytes=self._progress.done_bytes + file_bytes))

    def remove_unwanted(self, wanted: set[str]) -> None:
        """Remove the parts of bundles whose digest is not ``wanted``."""
        if self.exchange.bundles_dir.is_dir():
            for path in self.exchange.bundles_dir.glob(".*"):
                if path.name.split(".")[1] not in wanted:
                    atomic_files.remove_tree(path)
        if not wanted:
            atomic_files.remove_tree(self.deltas_dir)

    def _part(self, digest: str) -> Path:
        return self.exchange.bundles_dir / f".{digest}.{os.getpid()}.part"

    def _take_over_part(self, digest: str) -> Path:
        """Return the part directory of a bundle, taking over what an earlier process left."""
        part = self._part(digest)
        part.parent.mkdir(parents=True, exist_ok=True)
        for leftover in sorted(part.parent.glob(f".{digest}.*.part")):
            if not part.exists():
                leftover.replace(part)
            elif leftover != part:
                atomic_files.remove_tree(leftover)
        part.mkdir(exist_ok=True)
        return part

    def _manifest(self, trusted: TrustedMetadata, job: StagingJob, part: Path) -> Manifest:
        line, version = job.line, job.release.version
        target = _target(trusted, job, MANIFEST_NAME, job.release.digest)
        self.tuf_client.fetch(target.path, part / MANIFEST_NAME, line)
        try:
            manifest = Manifest.parse((part / MANIFEST_NAME).read_bytes())
        except BundleError as error:
            raise _document_error(job, error.message) from error
        if (manifest.name, manifest.version) != (line, version):
            raise _document_error(job, f"its manifest is of {manifest.name} {manifest.version}")
        return manifest

    def _missing_files(self, trusted: TrustedMetadata, job: StagingJob, manifest: Manifest, part: Path) -> list[MissingFile]:
        """Return the files that have to be downloaded; files that are here already are linked into place."""
        here = self._files_here()
        missing_files = []
        for file, sha256 in sorted(manifest.digests().items()):
            target = _target(trusted, job, file, sha256)
            path = part / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if _has_digest(path, sha256) or (sha256 in here and _link_or_copy(here[sha256], path, sha256)):
                continue
            path.unlink(missing_ok=True)
            missing_files.append(self._smallest_download(job, file, target, sha256, here))
        return missing_files

    def _smallest_download(self, job: StagingJob, file: str, target: TargetFile, sha256: str, here: Mapping[str, Path]) -> MissingFile:
        fitting = [
            item
            for item in job.deltas
            if item.to_sha256 == sha256
            and item.from_sha256 in here
            and item.length < target.length
            and not self._failure_mark(item).exists()
        ]
        best = min(fitting, key=lambda item: item.length, default=None)
        return MissingFile(file, target, best, here[best.from_sha256]) if best else MissingFile(file, target)

    def _files_here(self) -> dict[str, Path]:
        """Return a file for each digest that the manifests of complete bundles name; the content is verified when it is used."""
        return {sha256: bundle.directory / file for bundle in self.exchange.bundles() for file, sha256 in bundle.manifest.digests().items()}

    def _require_room(self, missing_files: list[MissingFile]) -> None:
        """Raise before each file when the disk has too little space for the files still to come."""
        largest = max(file.target.length for file in missing_files)
        needs = {self.exchange.directory: sum(file.target.length for file in missing_files), self.deltas_dir.parent: largest}
        if os.stat(self.exchange.directory).st_dev == os.stat(self.deltas_dir.parent).st_dev:
            # The largest file exists twice for a moment: as the received part and as the file of the bundle.
            needs = {self.exchange.directory: sum(needs.values())}
        for directory, need in needs.items():
            free = shutil.disk_usage(directory).free - self.reserve_bytes
            if need > free:
                raise LibraryUnreachable(
                    f"the rest of the update needs {need} bytes of disk space, and {max(0, free)} are free on the disk of {directory} "
                    f"above the reserve of {self.reserve_bytes}",
                    hint=f"free {need - free} bytes there; the update then continues by itself; {MODEL_STAYS}",
                    code="sync.disk_full",
                    action=Action.OPERATOR,
                )

    def _fetch_file(self, job: StagingJob, missing: MissingFile, part: Path) -> None:
        path = part / missing.name
        if missing.delta is not None and missing.base is not None and self._rebuild(job, missing, missing.delta, missing.base, path):
            return
        self.tuf_client.fetch(missing.target.path, path, job.line)

    def _rebuild(self, job: StagingJob, missing: MissingFile, item: documents.Delta, base: Path, path: Path) -> bool:
        """Rebuild a file from an older one; return False when the delta is missing or does not build the signed file."""
        delta_file = self._failure_mark(item).with_suffix("")
        built = path.with_name(f".{path.name}.built")
        try:
            delta_file.parent.mkdir(parents=True, exist_ok=True)
            if self.tuf_client.fetch(item.path, delta_file, job.line) is None:
                raise delta_codec.DeltaError(f"the library does not have {item.path}")
            delta_codec.apply(item.codec, base, delta_file, built, to_sha256=item.to_sha256, to_length=missing.target.length)
            atomic_files.sync_file(built)
            built.replace(path)
        except (delta_codec.DeltaError, TrustError) as error:
            self._note_full_fetch(job, missing, f"the delta failed ({error.message})")
            atomic_files.write(self._failure_mark(item), b"")
            return False
        except LibraryUnreachable as error:
            # A stick need not carry deltas, and a server may have lost one: only a missing full file stops a bundle.
            if not (concerns_one_file(error) or error.code in ("sync.refused", "sync.denied", "sync.rate", "sync.usb")):
                raise
            self._note_full_fetch(job, missing, f"there is no delta ({error.message})")
            return False
        finally:
            built.unlink(missing_ok=True)
        delta_file.unlink(missing_ok=True)
        return True

    def _note_full_fetch(self, job: StagingJob, missing: MissingFile, why: str) -> None:
        self.add_note(f"{job.line} {job.release.version}: {why}, so the complete {missing.name} is fetched")

    def _failure_mark(self, item: documents.Delta) -> Path:
        """Return the mark file of a delta that failed; the delta itself is stored beside it while it is used."""
        return self.deltas_dir / f"{item.to_sha256[:16]}-{item.from_sha256[:16]}-{item.codec}.failed"

    def _finish(self, part: Path, job: StagingJob, manifest: Manifest) -> ModelBundle:
        listed = {*manifest.digests(), MANIFEST_NAME}
        for file in list(atomic_files.iterate_files(part)):
            if str(file.relative_to(part)) not in listed:
                file.unlink()
        try:
            bundle = ModelBundle.load(part)
        except BundleError as error:
            raise self._changed_on_disk(part, job, error.message) from error
        if bundle.digest != job.release.digest:
            raise self._changed_on_disk(part, job, f"{MANIFEST_NAME} is another one")
        atomic_files.sync_tree(part)
        final = self.exchange.bundles_dir / bundle.digest
        part.replace(final)
        atomic_files.sync_directory(final.parent)
        self.verified.add(final, rejections(self.exchange, bundle.digest))
        return ModelBundle(final, bundle.manifest, bundle.digest)

    def _changed_on_disk(self, part: Path, job: StagingJob, what: str) -> LibraryUnreachable:
        """Return the error for files that changed after they were verified; the part is removed, so the next pull starts again."""
        atomic_files.remove_tree(part)
        return LibraryUnreachable(
            f"{job.line} {job.release.version} changed on the disk while it was assembled: {what}",
            hint=f"the next pull fetches it again; if it happens twice, have the disk checked; {MODEL_STAYS}",
            code="sync.state",
            action=Action.OPERATOR,
        )


def require_still_signed(trusted: TrustedMetadata, job: StagingJob, manifest: Manifest) -> None:
    """Check that the role still signs every file of a bundle after its download.

    Raises:
        TrustError: the role was revoked, or signs another file or none.
    """
    _target(trusted, job, MANIFEST_NAME, job.release.digest)
    for file, sha256 in manifest.digests().items():
        _target(trusted, job, file, sha256)


def _target(trusted: TrustedMetadata, job: StagingJob, file: str, sha256: str) -> TargetFile:
    path = documents.file_path(job.line, job.release.version, file)
    target = trusted.target(path, job.line)
    if target is None or target.hashes.get("sha256") != sha256:
        raise _document_error(job, f"{file} is not signed with the digest that the index or the manifest gives")
    return target


def _document_error(job: StagingJob, what: str) -> TrustError:
    return TrustError(
        f"{job.line} {job.release.version} was signed, but its bundle is not valid: {what}", code="trust.document", action=Action.OPERATOR
    )


def _has_digest(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _link_or_copy(source: Path, path: Path, sha256: str) -> bool:
    """Link a file that is here into the bundle, or copy it; return False when its content is not the expected one."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
    return _has_digest(path, sha256)
