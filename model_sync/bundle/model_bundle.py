"""The model bundle: one directory, one version of one model.

``manifest.json`` lists every other file with its SHA-256, so the digest of ``manifest.json`` identifies the complete version. numpy is
imported only where it is used: the web process reads manifests too and has to stay small.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model_sync.bundle.envelope import invalid_manifest
from model_sync.bundle.gate_record import check_gate
from model_sync.bundle.manifest import MANIFEST_NAME, Manifest, Variant
from model_sync.bundle.output_spec import Golden
from model_sync.errors import BundleError
from model_sync.field_types import Precision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024

# From the most exact to the least: the order when the caller names no precision.
_BY_EXACTNESS: tuple[Precision, ...] = ("fp32", "fp16", "mixed", "int8")


@dataclass(frozen=True)
class GoldenCase:
    """A golden case of a model of images: ``pixels`` uint8 [rows, columns] as displayed, and the output of the fp32 model.

    ``expected`` and ``probability`` ([1, labels], float32) hold the same values; ``cam`` is [1, labels, h, w] or None.
    """

    name: str
    pixels: NDArray[np.uint8]
    expected: dict[str, float]
    probability: NDArray[np.float32]
    cam: NDArray[np.float32] | None
    tolerance: dict[Precision, float]


@dataclass(frozen=True)
class GoldenVolume:
    """A golden case of a model of volumes.

    ``values`` float32 [depth, height, width] in modality units, ``affine`` float64 [4, 4] from those indices to the patient (LPS, mm),
    ``mask`` uint8 of the same shape: the class of each voxel by the fp32 model. ``expected`` and ``tolerance`` are Dice.
    """

    name: str
    values: NDArray[np.float32]
    affine: NDArray[np.float64]
    mask: NDArray[np.uint8]
    expected: dict[str, float]
    tolerance: dict[Precision, float]


@dataclass(frozen=True)
class ModelBundle:
    """One version of one model on disk, every file checked against the manifest.

    Attributes:
        directory: Absolute path of the bundle.
        manifest: The validated manifest.
        digest: SHA-256 of ``manifest.json`` in hex: it identifies the complete version.
    """

    directory: Path
    manifest: Manifest
    digest: str

    @classmethod
    def load(cls, directory: Path | str, appliance_version: str = "") -> ModelBundle:
        """Read and check the bundle in ``directory``; files are hashed in chunks, not held in memory.

        ``appliance_version`` as in :meth:`Manifest.parse`.

        Raises:
            BundleError: ``bundle.no_manifest``, ``bundle.too_new``, ``bundle.manifest_invalid``, ``bundle.unsafe_path`` (a link or a
                device), ``bundle.file_missing``, ``bundle.file_unlisted``, ``bundle.digest_mismatch`` or
                ``bundle.unreadable``.
        """
        root = Path(directory).resolve()
        if not root.is_dir():
            what = "is not a directory" if root.exists() else "does not exist"
            raise BundleError("bundle.unreadable", f"{root} {what}")
        try:
            present = set(_walk(root))
            raw = _read_manifest(root, present)
            manifest = Manifest.parse(raw, appliance_version)
            listed = manifest.digests()
            _compare_names(present - {MANIFEST_NAME}, set(listed))
            for relative, expected in sorted(listed.items()):
                _compare_digest(relative, sha256_of(root / relative), expected)
        except OSError as error:
            raise BundleError("bundle.unreadable", f"a file of the bundle {root} cannot be read: {error.strerror or error}") from error
        return cls(root, manifest, hashlib.sha256(raw).hexdigest())

    def describe(self) -> list[str]:
        """Return a summary as lines of text: version, operating points, variants and golden cases."""
        manifest = self.manifest
        lines = [f"{manifest.name} {manifest.version} ({self.digest[:12]}): intact"]
        problem = self.gate_problem()
        for point in manifest.operating_points:
            figures = f"sensitivity {point.sensitivity.value:.3f}, specificity {point.specificity.value:.3f}"
            figures = figures if problem is None else f"accuracy not verified: {problem.message} [{problem.code}]"
            lines.append(f"  {point.label}: threshold {point.threshold:.4f}, {figures}")
        variants = ", ".join(variant.precision for variant in manifest.variants)
        return [*lines, f"  variants: {variants}; golden cases: {len(manifest.golden)}"]

    def gate_problem(self) -> BundleError | None:
        """Return why the gate record does not verify the accuracy of this bundle; None where it does. See :func:`check_gate`."""
        try:
            check_gate(self.manifest, lambda name: self.path(name).read_bytes())
        except BundleError as error:
            return error
        return None

    def path(self, relative: str) -> Path:
        """Return the absolute path of a file that the manifest lists.

        Raises:
            BundleError: ``bundle.file_unlisted``: the manifest does not list the file.
        """
        if relative not in self.manifest.digests():
            raise BundleError(
                "bundle.file_unlisted",
                f"{relative!r} is not a file of {self.manifest.name} {self.manifest.version}",
                "use a name that manifest.json lists",
            )
        return self.directory / relative

    def variant(self, precision: str | None = None) -> Variant:
        """Return the first variant in ``precision``, or the most exact one.

        Raises:
            BundleError: ``bundle.no_variant``: the bundle does not ship that precision.
        """
        have = {variant.precision: variant for variant in reversed(self.manifest.variants)}
        for candidate in _BY_EXACTNESS:
            if candidate in have and precision in (None, candidate):
                return have[candidate]
        raise BundleError(
            "bundle.no_variant", f"{self.manifest.name} {self.manifest.version} has no {precision} variant, only {', '.join(have)}"
        )

    def golden_cases(self) -> Iterator[GoldenCase]:
        """Yield the golden cases of a model of images; each is hashed again when it is read.

        Raises:
            BundleError: ``bundle.digest_mismatch``, ``bundle.golden_invalid``, or ``bundle.manifest_invalid`` of a model of volumes.
        """
        _ = self.manifest.image_input
        for golden in self.manifest.golden:
            yield _read_golden(golden, self._golden_bytes(golden))

    def golden_volumes(self) -> Iterator[GoldenVolume]:
        """Yield the golden cases of a model of volumes; errors as :meth:`golden_cases`."""
        _ = self.manifest.volume_input
        classes = next(len(output.classes) for output in self.manifest.outputs if output.classes is not None)
        for golden in self.manifest.golden:
            yield _read_golden_volume(golden, self._golden_bytes(golden), classes)

    def _golden_bytes(self, golden: Golden) -> bytes:
        raw = self.path(golden.input).read_bytes()
        _compare_digest(golden.input, hashlib.sha256(raw).hexdigest(), golden.sha256)
        return raw


def _read_golden(golden: Golden, raw: bytes) -> GoldenCase:
    import numpy as np

    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            pixels, probability = arrays["pixels"], arrays["probability"]
            cam = arrays.get("cam")
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _bad_golden(golden.input, f"cannot be read ({error})") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.size == 0:
        raise _bad_golden(golden.input, "needs `pixels` as uint8 [rows, columns]")
    if probability.dtype != np.float32 or probability.shape != (1, len(golden.expected)):
        raise _bad_golden(golden.input, "needs `probability` as float32 [1, labels]")
    return GoldenCase(_case_name(golden), pixels, dict(golden.expected), probability, cam, dict(golden.tolerance))


def _read_golden_volume(golden: Golden, raw: bytes, classes: int) -> GoldenVolume:
    import numpy as np

    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            values, affine, mask = arrays["values"], arrays["affine"], arrays["mask"]
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _bad_golden(golden.input, f"cannot be read ({error})") from error
    if values.dtype not in (np.int16, np.float32) or values.ndim != 3 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise _bad_golden(golden.input, "needs `values` as int16 or float32 [depth, height, width]")
    if affine.dtype != np.float64 or affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
        raise _bad_golden(golden.input, "needs `affine` as float64 [4, 4]")
    if mask.dtype != np.uint8 or mask.shape != values.shape or int(mask.max()) >= classes:
        raise _bad_golden(golden.input, "needs `mask` as uint8 of the shape of `values`, its classes the manifest's")
    return GoldenVolume(_case_name(golden), values.astype(np.float32), affine, mask, dict(golden.expected), dict(golden.tolerance))


def _case_name(golden: Golden) -> str:
    return golden.input.rsplit("/", 1)[-1].removesuffix(".npz")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file in hex, read in chunks; a symbolic link is not followed.

    Raises:
        OSError: The file is a link or cannot be read.
    """
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _walk(root: Path, prefix: str = "") -> Iterator[str]:
    """Yield the relative path of every file below ``root``; a link, a socket or a device is refused."""
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            relative = f"{prefix}{entry.name}"
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                yield from _walk(root, f"{relative}/")
            elif stat.S_ISREG(mode):
                yield relative
            else:
                raise BundleError("bundle.unsafe_path", f"{relative!r} is a link or a special file")


def _read_manifest(root: Path, present: set[str]) -> bytes:
    if MANIFEST_NAME not in present:
        raise BundleError("bundle.no_manifest", f"{root.name} has no {MANIFEST_NAME}")
    with (root / MANIFEST_NAME).open("rb") as stream:
        raw = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise invalid_manifest(f"larger than {MAX_MANIFEST_BYTES} bytes")
    return raw


def _compare_names(present: set[str], listed: set[str]) -> None:
    if missing := sorted(listed - present):
        raise BundleError("bundle.file_missing", f"the bundle lacks {', '.join(missing[:5])}")
    if extra := sorted(present - listed):
        raise BundleError("bundle.file_unlisted", f"the manifest does not list {', '.join(extra[:5])}")


def _compare_digest(relative: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise BundleError("bundle.digest_mismatch", f"{relative} is not the file that the manifest names: its SHA-256 differs")


def _bad_golden(name: str, what: str) -> BundleError:
    return BundleError("bundle.golden_invalid", f"the golden case {name} {what}")
