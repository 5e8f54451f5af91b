"""Bringing one version of one line into the exchange directory: from what is here already, by deltas, or whole.

A bundle is assembled in a hidden directory that outlives the process, so that a kill costs at most the piece under way; it is
verified as a whole, flushed, and only then gets the name of its digest. A delta is a wager on fewer bytes: whatever it builds
must be the signed file, and one that fails is not tried again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tuf.api.metadata import TargetFile

from model_sync import atomic_files
from model_sync.agent.exchange import Exchange
from model_sync.agent.sync_status import Progress
from model_sync.agent.verified_bundle_cache import WholeBundles, refusals
from model_sync.bundle import MANIFEST_NAME, ModelBundle, sha256_of
from model_sync.bundle.manifest import Manifest
from model_sync.delta import codec as delta_codec
from model_sync.errors import BundleError, LibraryUnreachable, TrustError
from model_sync.trust import documents
from model_sync.trust.trusted_metadata import Chain
from model_sync.trust.tuf_client import Upstream, of_one_file

_KEEP = "the model in use stays"


@dataclass(frozen=True)
class Job:
    """What is to be brought: one release of a line, and the deltas that its index offers."""

    line: str
    release: documents.Release
    deltas: tuple[documents.Delta, ...]


@dataclass(frozen=True)
class Piece:
    """One file that has to come over the line; ``delta`` is the smallest that fits a file which is here, or None."""

    file: str
    target: TargetFile
    delta: documents.Delta | None = None
    base: Path | None = None

    @property
    def cost(self) -> int:
        """Bytes on the wire."""
        return self.delta.length if self.delta else self.target.length


class Stager:
    """Assembles bundles in an exchange directory.

    Args:
        upstream: the library.
        exchange: where bundles go.
        deltas_dir: where deltas are kept while they are used.
        reserve_bytes: disk space that stays free.
        on_progress: told what is under way.
        note: told what a technician may want to know.
        whole: what this process has found whole; kept by the caller from pull to pull.
    """

    def __init__(
        self,
        upstream: Upstream,
        exchange: Exchange,
        deltas_dir: Path,
        reserve_bytes: int,
        on_progress: Callable[[Progress], None],
        note: Callable[[str], None],
        whole: WholeBundles,
    ) -> None:
        """Prepare; nothing is fetched."""
        self._upstream = upstream
        self._exchange = exchange
        self._deltas_dir = deltas_dir
        self._reserve = reserve_bytes
        self._on_progress = on_progress
        self._note = note
        self._whole = whole
        self._under_way: Progress | None = None

    def has(self, digest: str) -> bool:
        """Say whether a complete bundle is here; it is hashed when there is reason to, and a damaged one is put away."""
        directory = self._exchange.bundles_dir / digest
        refused = refusals(self._exchange, digest)
        if not directory.is_dir():
            return False
        if self._whole.knows(directory, refused):
            return True
        try:
            whole = ModelBundle.load(directory).digest == digest
        except BundleError as error:
            whole = False
            self._note(f"the bundle {digest[:12]} is damaged on the disk ({error.message}); it is fetched again")
        if not whole:
            self._put_away(directory)
            return False
        self._whole.add(directory, refused)
        return True

    def manifest(self, digest: str) -> Manifest:
        """Return the manifest of a complete bundle; raises OSError or BundleError."""
        return Manifest.parse((self._exchange.bundles_dir / digest / MANIFEST_NAME).read_bytes())

    def _put_away(self, directory: Path) -> None:
        """Take a damaged bundle's name from it; its files that are still right are used again."""
        self._whole.forget(directory)
        part = self._part(directory.name)
        atomic_files.remove_tree(part)
        directory.replace(part)

    def stage(self, chain: Chain, job: Job) -> ModelBundle:
        """Bring one release here, complete and verified.

        Raises:
            LibraryUnreachable: it stopped on the way; what has come is kept.
            TrustError: what the library signed does not fit together, or the bytes are not those that were signed.
        """
        digest = job.release.digest
        try:
            part = self._adopt(digest)
            manifest = self._manifest(chain, job, part)
            pieces = self._pieces(chain, job, manifest, part)
            done = 0
            total = sum(piece.cost for piece in pieces)
            for number, piece in enumerate(pieces):
                self._require_room(pieces[number:])
                self._under_way = Progress(piece.file, done, total)
                self.received(0)
                self._bring(job, piece, part)
                done += piece.cost
            return self._finish(part, job, manifest)
        except OSError as error:
            raise atomic_files.disk_trouble(error) from error
        finally:
            self._under_way = None

    def received(self, file_bytes: int) -> None:
        """Hear from the fetcher how far the file under way has come."""
        if self._under_way is not None:
            self._on_progress(self._under_way._replace(done_bytes=self._under_way.done_bytes + file_bytes))

    def sweep(self, wanted: set[str]) -> None:
        """Remove the remains of bundles that nobody wants any more."""
        if self._exchange.bundles_dir.is_dir():
            for path in self._exchange.bundles_dir.glob(".*"):
                if path.name.split(".")[1] not in wanted:
                    atomic_files.remove_tree(path)
        if not wanted:
            atomic_files.remove_tree(self._deltas_dir)

    def _part(self, digest: str) -> Path:
        return self._exchange.bundles_dir / f".{digest}.{os.getpid()}.part"

    def _adopt(self, digest: str) -> Path:
        """Take over what an earlier process left of this bundle."""
        part = self._part(digest)
        part.parent.mkdir(parents=True, exist_ok=True)
        for left in sorted(part.parent.glob(f".{digest}.*.part")):
            if not part.exists():
                left.replace(part)
            elif left != part:
                atomic_files.remove_tree(left)
        part.mkdir(exist_ok=True)
        return part

    def _manifest(self, chain: Chain, job: Job, part: Path) -> Manifest:
        line, version = job.line, job.release.version
        target = _target(chain, job, MANIFEST_NAME, job.release.digest)
        self._upstream.fetch(target.path, part / MANIFEST_NAME, line)
        try:
            manifest = Manifest.parse((part / MANIFEST_NAME).read_bytes())
        except BundleError as error:
            raise _wrong(job, error.message) from error
        if (manifest.name, manifest.version) != (line, version):
            raise _wrong(job, f"its manifest speaks of {manifest.name} {manifest.version}")
        return manifest

    def _pieces(self, chain: Chain, job: Job, manifest: Manifest, part: Path) -> list[Piece]:
        """Return what has to be fetched; files that are here already are put into place."""
        have = self._files_here()
        pieces = []
        for file, sha256 in sorted(manifest.digests().items()):
            target = _target(chain, job, file, sha256)
            path = part / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if _is(path, sha256) or (sha256 in have and _link(have[sha256], path, sha256)):
                continue
            path.unlink(missing_ok=True)
            pieces.append(self._cheapest(job, file, target, sha256, have))
        return pieces

    def _cheapest(self, job: Job, file: str, target: TargetFile, sha256: str, have: Mapping[str, Path]) -> Piece:
        fitting = [
            item
            for item in job.deltas
            if item.to_sha256 == sha256 and item.from_sha256 in have and item.length < target.length and not self._failed(item).exists()
        ]
        best = min(fitting, key=lambda item: item.length, default=None)
        return Piece(file, target, best, have[best.from_sha256]) if best else Piece(file, target)

    def _files_here(self) -> dict[str, Path]:
        """Return a file for each digest that the manifests of complete bundles name; what they hold is verified on use."""
        return {
            sha256: bundle.directory / file for bundle in self._exchange.bundles() for file, sha256 in bundle.manifest.digests().items()
        }

    def _require_room(self, pieces: list[Piece]) -> None:
        """Refuse before the first byte, and before each file, when the disk cannot take what is still to come."""
        largest = max(piece.target.length for piece in pieces)
        needs = {self._exchange.directory: sum(piece.target.length for piece in pieces), self._deltas_dir.parent: largest}
        if os.stat(self._exchange.directory).st_dev == os.stat(self._deltas_dir.parent).st_dev:
            # The largest piece is there twice for a moment: as the part that was received and as the file of the bundle.
            needs = {self._exchange.directory: sum(needs.values())}
        for directory, need in needs.items():
            free = shutil.disk_usage(directory).free - self._reserve
            if need > free:
                raise LibraryUnreachable(
                    f"the rest of the update needs {need} bytes of disk space, and {max(0, free)} are free on the disk of {directory} "
                    f"above the reserve of {self._reserve}",
                    hint=f"free {need - free} bytes there; the update then comes by itself, what has come is kept; {_KEEP}",
                    code="sync.disk_full",
                )

    def _bring(self, job: Job, piece: Piece, part: Path) -> None:
        path = part / piece.file
        if piece.delta is not None and piece.base is not None and self._by_delta(job, piece, piece.delta, piece.base, path):
            return
        self._upstream.fetch(piece.target.path, path, job.line)

    def _by_delta(self, job: Job, piece: Piece, item: documents.Delta, base: Path, path: Path) -> bool:
        """Rebuild a file from an older one; False when that does not give what was signed, or when the delta is not to be had."""
        file = self._failed(item).with_suffix("")
        built = path.with_name(f".{path.name}.built")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if self._upstream.fetch(item.path, file, job.line) is None:
                raise delta_codec.DeltaError(f"the library does not have {item.path}")
            delta_codec.apply(item.codec, base, file, built, to_sha256=item.to_sha256, to_length=piece.target.length)
            atomic_files.sync_file(built)
            built.replace(path)
        except (delta_codec.DeltaError, TrustError) as error:
            self._note(f"{job.line} {job.release.version}: no use of the delta for {piece.file} ({error.message}); the whole is fetched")
            atomic_files.write(self._failed(item), b"")
            return False
        except LibraryUnreachable as error:
            # A stick need not carry deltas, and a server may have lost one: only a whole file that is missing stops a bundle.
            if not (of_one_file(error) or error.code in ("sync.refused", "sync.usb")):
                raise
            self._note(f"{job.line} {job.release.version}: there is no delta for {piece.file} here ({error.message}); the whole is fetched")
            return False
        finally:
            built.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        return True

    def _failed(self, item: documents.Delta) -> Path:
        """Return the mark of a delta that did not serve; beside it lies the delta itself while it is used."""
        return self._deltas_dir / f"{item.to_sha256[:16]}-{item.from_sha256[:16]}-{item.codec}.failed"

    def _finish(self, part: Path, job: Job, manifest: Manifest) -> ModelBundle:
        listed = {*manifest.digests(), MANIFEST_NAME}
        for file in list(atomic_files.files_below(part)):
            if str(file.relative_to(part)) not in listed:
                file.unlink()
        try:
            bundle = ModelBundle.load(part)
        except BundleError as error:
            raise self._changed_on_disk(part, job, error.message) from error
        if bundle.digest != job.release.digest:
            raise self._changed_on_disk(part, job, f"{MANIFEST_NAME} is another one")
        atomic_files.sync_tree(part)
        final = self._exchange.bundles_dir / bundle.digest
        part.replace(final)
        atomic_files.sync_directory(final.parent)
        self._whole.add(final, refusals(self._exchange, bundle.digest))
        return ModelBundle(final, bundle.manifest, bundle.digest)

    def _changed_on_disk(self, part: Path, job: Job, what: str) -> LibraryUnreachable:
        """Every file was right when it came: what is wrong now is the disk, so the next pull begins anew."""
        atomic_files.remove_tree(part)
        return LibraryUnreachable(
            f"{job.line} {job.release.version} changed on the disk while it was put together: {what}",
            hint=f"the next pull fetches it again; if it happens twice, have the disk checked; {_KEEP}",
            code="sync.state",
        )


def still_signed(chain: Chain, job: Job, manifest: Manifest) -> None:
    """Check that a role signs every file of a bundle now, and not only when its download began.

    Raises:
        TrustError: the role was revoked, or signs another file, or none.
    """
    _target(chain, job, MANIFEST_NAME, job.release.digest)
    for file, sha256 in manifest.digests().items():
        _target(chain, job, file, sha256)


def _target(chain: Chain, job: Job, file: str, sha256: str) -> TargetFile:
    path = documents.file_path(job.line, job.release.version, file)
    target = chain.target(path, job.line)
    if target is None or target.hashes.get("sha256") != sha256:
        raise _wrong(job, f"{file} is not signed with the digest that the index or the manifest gives")
    return target


def _wrong(job: Job, what: str) -> TrustError:
    return TrustError(
        f"{job.line} {job.release.version} was signed, but it is no whole bundle: {what}",
        hint=f"tell the central team, which has to publish it again under a new version; {_KEEP}",
        code="trust.document",
    )


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _link(source: Path, path: Path, sha256: str) -> bool:
    """Put a file that is here into the bundle without a second copy where the disk can; False when it is not what it was."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
    return _is(path, sha256)
