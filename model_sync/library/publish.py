"""Publishing: new versions, withdrawals and minimum versions of models.

Each function checks first and stages second: a refused publication changes nothing. What is staged waits for the signatures of its
role (``model_sync.library.library``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import semver
from pydantic import TypeAdapter, ValidationError
from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, DelegatedRole, TargetFile

from model_sync.bundle import MANIFEST_NAME, Manifest, ModelBundle
from model_sync.errors import BundleError, PublishError
from model_sync.field_types import Identifier, SemVer
from model_sync.library.golden_run import run_golden_cases
from model_sync.library.promotion import LibraryPromotion
from model_sync.library.roles import RoleState
from model_sync.trust import documents
from model_sync.trust.documents import ROLLOUT_ROLE, Delta, LineIndex, Release, Withdrawal, file_path, line_path, older

DELTA_BASES = 3
# A file name has 255 characters at most, and a target's begins with its hash: 64 digits and a dot.
_MAX_NAME = 190
_NOTHING = "; nothing was published"
# File names that Windows refuses, with any suffix: USB sticks are also used there.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
OnProgress = Callable[[str, int, int], None]


def check_line_name(name: str) -> None:
    """Refuse a name of a model line that is also a TUF role or a temporary file, or that no USB stick can store."""
    try:
        TypeAdapter(Identifier).validate_python(name)
    except ValidationError as error:
        hint = "lower-case letters, digits, - and _, at most 64"
        raise PublishError(f"{name!r} cannot name a model line", hint=hint, code="library.name") from error
    roles = (*TOP_LEVEL_ROLE_NAMES, ROLLOUT_ROLE)
    reserved = dict.fromkeys(roles, "a role of the library") | dict.fromkeys(_DEVICES, "a device of Windows")
    if what := reserved.get(name, "a temporary file of boxes" if name.startswith("tmp") else ""):
        raise PublishError(f"a model line cannot be called {name!r}: that is {what}", code="library.name")


def publish(
    library: LibraryPromotion,
    directory: Path,
    *,
    deltas: bool = True,
    minimum_version: str | None = None,
    on_progress: OnProgress | None = None,
) -> RoleState:
    """Stage a bundle as the newest version of its model line: its files as targets, a new index, and useful deltas.

    Args:
        library: the library.
        directory: the bundle.
        deltas: whether to make deltas from earlier versions.
        minimum_version: the new minimum version, if it is to be raised.
        on_progress: called with the name of the step, its number and the number of steps.

    Raises:
        BundleError: the bundle is not intact.
        PublishError: it may not be published; nothing was staged.
    """
    bundle = _check_bundle(directory)
    manifest, on_progress = bundle.manifest, on_progress or (lambda *_: None)
    _check_measured(library.index(manifest.name), bundle, on_progress)
    with library.files.locked():
        index = library.index(manifest.name)
        if (known := index.release(manifest.version)) is not None and known.digest == bundle.digest:
            library.promote_complete()  # a killed or repeated command: finish it
            return library.state(manifest.name)
        _check_version(index, manifest.version)
        new_minimum = _minimum(index, minimum_version, manifest.version) if minimum_version is not None else index.minimum_version
        release = Release(version=manifest.version, digest=bundle.digest, published_at=library.now())
        grown = _validated(index.model_copy(update={"versions": [*index.versions, release], "minimum_version": new_minimum}))
        targets = _stage_bundle(library, bundle, on_progress)
        new_deltas = _deltas(library, index, bundle, on_progress) if deltas else []
        index = _validated(grown.model_copy(update={"deltas": [*index.deltas, *(delta for delta, _ in new_deltas)]}))
        library.stage_files(manifest.name, {line_path(manifest.name): index.to_json()}, [*targets, *(target for _, target in new_deltas)])
        library.promote_complete()
        return library.state(manifest.name)


def _check_bundle(directory: Path) -> ModelBundle:
    _check_version_text(directory)
    try:
        bundle = ModelBundle.load(directory)
    except BundleError as error:
        raise PublishError(f"the bundle cannot be published: {error.message}{_NOTHING}", hint=error.hint, code="library.bundle") from error
    manifest = bundle.manifest
    if not manifest.operating_points:
        raise PublishError(
            f"the bundle has no operating point{_NOTHING}",
            hint="a score needs a measured threshold",
            code="library.bundle",
        )
    names = [manifest.name, manifest.version, *manifest.digests(), MANIFEST_NAME]
    for segment in (segment for name in names for segment in name.split("/")):
        if segment.endswith(".") or segment.split(".")[0].lower() in _DEVICES or len(segment) > _MAX_NAME:
            raise PublishError(
                f"{segment!r} is no name for a USB stick{_NOTHING}",
                hint="rename it: too long, ends in a dot, or names a device of Windows",
                code="library.bundle",
            )
    role = DelegatedRole("line", [], 1, True, documents.line_patterns(manifest.name))
    for file in manifest.digests():
        if not role.is_delegated_path(file_path(manifest.name, manifest.version, file)):
            raise PublishError(
                f"{file} is in too many folders{_NOTHING}", hint="a bundle has at most two levels of folders", code="library.bundle"
            )
    return bundle


def _check_measured(index: LineIndex, bundle: ModelBundle, on_progress: OnProgress) -> None:
    """Check that the gate was made with these weights and thresholds, and run the golden cases, before the library is locked.

    A published version is not checked again: a repeated command only finishes it, and older versions have older gate records.
    """
    version = bundle.manifest.version
    if (known := index.release(version)) is not None and known.digest == bundle.digest:
        return
    _check_version(index, version)
    if (problem := bundle.gate_problem()) is not None:
        raise PublishError(f"{problem.message}{_NOTHING}", hint=problem.hint, code=problem.code)
    on_progress("running the golden cases", 0, 1)
    run_golden_cases(bundle)


def _check_version_text(directory: Path) -> None:
    """Check the version first, because the error of the manifest's pattern is hard to understand."""
    try:
        version = json.loads((directory / MANIFEST_NAME).read_bytes())["version"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # reported when the complete bundle is read
    _parse(str(version))


def _check_version(index: LineIndex, version: str) -> None:
    if index.release(version) is not None:
        raise PublishError(f"{index.line} {version} is published already with other content{_NOTHING}", code="library.version")
    newest = _newest(index)
    if newest is not None and not older(newest, version):
        raise PublishError(f"{index.line} {version} is not newer than {newest}{_NOTHING}", code="library.version")


def _newest(index: LineIndex) -> str | None:
    versions = sorted((release.version for release in index.versions), key=semver.Version.parse)
    return versions[-1] if versions else None


def _parse(version: str) -> None:
    try:
        TypeAdapter(SemVer).validate_python(version)
    except ValidationError as error:
        hint = "write it like 1.4.0 or 1.4.0-rc.1, by semver.org"
        raise PublishError(
            f"{version!r} is no semantic version of at most 64 characters{_NOTHING}", hint=hint, code="library.version"
        ) from error


def _minimum(index: LineIndex, wanted: str, newest: str | None) -> str:
    _parse(wanted)
    if older(wanted, index.minimum_version):
        raise PublishError(
            f"the minimum version of {index.line} is {index.minimum_version}: it can only rise{_NOTHING}",
            hint="a lower minimum would allow versions that boxes must not run any more",
            code="library.version",
        )
    if newest is None or older(newest, wanted):
        raise PublishError(
            f"no version of {index.line} reaches {wanted}{_NOTHING}",
            hint=f"the newest is {newest}: publish a newer one first",
            code="library.version",
        )
    return wanted


def _stage_bundle(library: LibraryPromotion, bundle: ModelBundle, on_progress: OnProgress) -> list[TargetFile]:
    """Copy the bundle's files to the staged ones; existing files are not copied again."""
    manifest = bundle.manifest
    files = {**manifest.digests(), MANIFEST_NAME: bundle.digest}
    targets = []
    for number, (file, sha256) in enumerate(sorted(files.items())):
        on_progress(f"copying {file}", number, len(files))
        source = bundle.directory / file
        path = file_path(manifest.name, manifest.version, file)
        target = TargetFile(source.stat().st_size, {"sha256": sha256}, path)
        if library.files.find_target(target) is None:
            target.length = library.files.copy(source, library.files.staged_target(target), sha256)
        targets.append(target)
    return targets


def _deltas(library: LibraryPromotion, index: LineIndex, bundle: ModelBundle, on_progress: OnProgress) -> list[tuple[Delta, TargetFile]]:
    """Make the useful deltas from the last versions that boxes may run."""
    from model_sync.delta import codec as delta_codec  # the encoder needs onnx, which nothing else here does

    usable = [r.version for r in index.versions if index.refusal(r.version) is None]
    bases = sorted(usable, key=semver.Version.parse)[-DELTA_BASES:]
    pairs: dict[tuple[str, str], tuple[Path, Path]] = {}
    for version in bases:
        for variant, old, old_sha256 in _same_precision(library, index.line, version, bundle.manifest):
            if old_sha256 != variant.sha256:
                pairs[old_sha256, variant.sha256] = (old, bundle.path(variant.file))
    new_deltas = []
    for number, ((old_sha256, new_sha256), (old, new)) in enumerate(pairs.items()):
        on_progress(f"delta for {new.name}", number, len(pairs))
        encoded = delta_codec.best(old, new)
        if not delta_codec.is_worth_publishing(len(encoded.data), new.stat().st_size):
            continue
        path = documents.delta_path(index.line, old_sha256, new_sha256, encoded.codec)
        entry = Delta(from_sha256=old_sha256, to_sha256=new_sha256, codec=encoded.codec, path=path, length=len(encoded.data))
        sha256 = hashlib.sha256(encoded.data).hexdigest()
        target = TargetFile(
            entry.length, {"sha256": sha256}, path, {"custom": entry.model_dump(include={"from_sha256", "to_sha256", "codec"})}
        )
        library.files.write(library.files.staged_target(target), encoded.data)
        new_deltas.append((entry, target))
    return new_deltas


def _same_precision(library: LibraryPromotion, line: str, version: str, manifest: Manifest) -> list[tuple[Any, Path, str]]:
    role = library.targets(line)
    before = Manifest.parse(library.read_target(role, file_path(line, version, MANIFEST_NAME)))
    old = {variant.precision: variant for variant in before.variants}
    result = []
    for variant in manifest.variants:
        if (base := old.get(variant.precision)) is not None:
            where = library.files.find_target(role.targets[file_path(line, version, base.file)])
            if where is not None:
                result.append((variant, where, base.sha256))
    return result


def withdraw(library: LibraryPromotion, line: str, version: str, reason: str) -> RoleState:
    """Stage the withdrawal of ``version``; ``reason`` is shown to clinicians.

    Raises:
        PublishError: no such version, withdrawn already, or no reason.
    """
    with library.files.locked():
        index = library.index(line)
        require_version(index, version)
        if not reason.strip():
            raise PublishError("a withdrawal needs a reason", code="library.withdrawal")
        if index.withdrawal(version) is not None:
            raise PublishError(f"{line} {version} is withdrawn already", hint="nothing was changed", code="library.withdrawal")
        try:
            entry = Withdrawal(version=version, reason=reason.strip(), at=library.now())
        except ValidationError as error:
            raise validation_error("withdrawal", error, "say in one sentence what is wrong: clinicians read it") from error
        return _stage_index(library, index.model_copy(update={"withdrawn": [*index.withdrawn, entry]}))


def set_minimum(library: LibraryPromotion, line: str, version: str) -> RoleState:
    """Stage a higher minimum version.

    Raises:
        PublishError: lower than the current one, or above every version.
    """
    with library.files.locked():
        index = library.index(line)
        return _stage_index(library, index.model_copy(update={"minimum_version": _minimum(index, version, _newest(index))}))


def _stage_index(library: LibraryPromotion, index: LineIndex) -> RoleState:
    library.stage_files(index.line, {line_path(index.line): _validated(index).to_json()})
    library.promote_complete()
    return library.state(index.line)


def _validated(index: LineIndex) -> LineIndex:
    """Return an index after validation: nothing else validates a changed copy before it is signed."""
    try:
        return LineIndex.model_validate(index.model_dump(by_alias=True))
    except ValidationError as error:
        raise validation_error("index", error, "boxes would refuse it: use a new model line (`model-library add-line`)") from error


def validation_error(what: str, error: ValidationError, hint: str) -> PublishError:
    """Return the error for a document that its schema refuses."""
    wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)[:5])
    return PublishError(f"this {what} is not valid: {wrong}{_NOTHING}", hint=hint)


def require_version(index: LineIndex, version: str) -> None:
    """Raise PublishError when a model line has no such version."""
    if index.release(version) is None:
        known = ", ".join(release.version for release in index.versions) or "none"
        raise PublishError(f"{index.line} has no version {version}", hint=f"published versions: {known}", code="library.version")
